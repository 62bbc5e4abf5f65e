"""The op's arguments as a validated call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.call import Call
from fastattn.validation import Arguments, validated


def prepared(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **arguments: Any) -> Call:
    """The call that `fastattn.scaled_dot_product_attention` makes of these arguments."""
    return validated(Arguments(q, k, v, **arguments), scale)
