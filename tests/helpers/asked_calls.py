"""Listens to what the op is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from fastattn.integrations.transformers import attention


@contextmanager
def calls() -> Iterator[list[dict[str, Any]]]:
    """What the op is asked while this lasts."""
    asked: list[dict[str, Any]] = []
    op = attention.scaled_dot_product_attention

    def listen(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        asked.append({"q": q, "k": k, **settings})
        return op(q, k, v, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "scaled_dot_product_attention", listen)
        yield asked
