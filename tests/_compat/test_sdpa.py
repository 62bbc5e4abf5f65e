"""What torch tells of its function's surroundings, and what becomes of calls where it does not."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import drop_in
from fastattn._compat import sdpa as torchs
from fastattn.integrations.torch import decide


def test_it_is_torchs_function() -> None:
    assert torchs.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_this_torch_tells_all() -> None:
    """Versions that are tested have every name."""
    assert len(torchs._SWITCHES) == 4
    assert None not in (torchs._order, torchs._function_modes, torchs._function_mode, torchs._tracing)
    assert not torchs.insists_on_torch()
    seen = []
    torch.func.vmap(lambda x: seen.append(torchs.innermost_is_vmap()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(torchs.innermost_is_vmap()) or x)(torch.ones(()))
    assert seen == [True, False]
    assert not torchs.innermost_is_vmap()


def test_without_the_stack_of_transforms_vmap_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    q = torch.randn(3, 1, 2, 4, 8)
    with fastattn.use_backend("reference"):
        before = fastattn.stats()["handed_to_torch"].get(decide.TRANSFORMS, 0)
        assert not torchs.innermost_is_vmap()
        monkeypatch.setattr(decide.torch_internals, "may_be_watched", lambda: True)
        monkeypatch.setattr(decide.torch_internals, "transforms_active", lambda: True)
        drop_in.scaled_dot_product_attention(q[0], q[0], q[0])
    assert fastattn.stats()["handed_to_torch"][decide.TRANSFORMS] == before + 1


def test_without_the_stack_of_modes_every_mode_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cpu"):
        assert not torchs.watched_by_a_function_mode()
        monkeypatch.setattr(torchs, "_function_mode", None)
        assert torchs.watched_by_a_function_mode()
    assert not torchs.watched_by_a_function_mode()
    monkeypatch.setattr(torchs, "_function_modes", None)
    assert not torchs.watched_by_a_function_mode()
