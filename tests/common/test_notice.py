"""Warnings are given once, at the caller's line."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.backends.base import Refusal
from fastattn.backends.torch import TorchBackend
from fastattn.common import notice

pytestmark = pytest.mark.usefixtures("fresh_warnings")


def test_a_warning_is_given_once_per_kind() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text, kind in (("a", None), ("a", None), ("b", "k"), ("c", "k"), ("d", None)):
            notice.warn_once(text, kind)
    assert [str(w.message) for w in caught] == ["a", "b", "d"]
    assert all(w.category is fastattn.FastattnWarning for w in caught)


@pytest.mark.parametrize("grad", [False, True])
def test_a_warning_points_at_the_line_that_called(
    grad: bool, monkeypatch: pytest.MonkeyPatch, fresh_caches: None
) -> None:
    def forward(call: object) -> None:
        raise Refusal("not today")

    monkeypatch.setattr(TorchBackend, "bind", lambda *args: SimpleNamespace(forward=forward))
    q = torch.randn(1, 2, 3, 8, requires_grad=grad)
    with pytest.warns(fastattn.FastattnWarning, match="not today") as caught:
        fastattn.scaled_dot_product_attention(q, q, q)
    if not grad:  # with a gradient torch's dispatcher stands between
        assert caught[0].filename == __file__
    assert not caught[0].filename.startswith(notice._HERE)
