"""Calls of a kind that was decided before: they are served as if each were the first, and nothing stale is kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from caches import own_caches
from served import Served
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_calls import BF16, FP32, TORCHS, TorchCall, assert_right, default_backends, make, truth

import fastattn
from fastattn import drop_in
from fastattn.dispatch import fast_path, routes
from fastattn.integrations.torch import decide, known
from fastattn.shape_cache import Reason, shape_cache

pytestmark = pytest.mark.usefixtures("default_backends", "caches")
__all__ = ["default_backends"]
SDPA = drop_in.scaled_dot_product_attention


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own_caches(monkeypatch)
    with fastattn.use_backend("reference"):
        yield


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that took the long way."""
    found: list[Any] = []
    real = decide.decision

    def noted(*arguments: Any) -> decide.Decision:
        found.append(arguments)
        return real(*arguments)

    monkeypatch.setattr("fastattn.integrations.torch.sdpa.decision", noted)
    return found


def qkv(dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=dtype) for _ in range(3))
    return q, k, v


KNOWN = {
    "plain": TorchCall(k=(2, 4, 9, 8)),
    "causal": TorchCall(k=(2, 4, 6, 8), is_causal=True),
    "bool": TorchCall(mask="bool:2,1,1,9"),
    "float": TorchCall(mask="float:1,4,6,9"),
    "float of its own dtype": TorchCall(mask="float32:1,4,6,9", dtype=BF16),
    "grouped": TorchCall(k=(2, 2, 9, 8), enable_gqa=True),
    "two dims": TorchCall(q=(6, 8), k=(9, 8)),
    "three dims": TorchCall(q=(4, 6, 8), k=(4, 9, 8)),
    "three dims and a mask": TorchCall(q=(4, 6, 8), k=(4, 9, 8), mask="bool:6,9"),
    "three dims, broadcast": TorchCall(q=(4, 6, 8), k=(1, 9, 8)),
    "causal, more keys": TorchCall(is_causal=True),
    "causal, fewer keys": TorchCall(q=(2, 4, 9, 8), k=(2, 4, 6, 8), is_causal=True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_again_and_again(name: str) -> None:
    """The second call of a kind, of other data and another scale, is as right as the first."""
    for scale in (None, 0.5, -0.25):
        inputs = make(dataclasses.replace(KNOWN[name], scale=scale))
        served = Served()
        assert_right(inputs.call(SDPA), truth(inputs), inputs.q.dtype)
        assert served() == {"reference": 1}


def test_one_look_up(decided: list[Any]) -> None:
    """A known kind takes the short way, with gradients too; a kind that differs in anything but data does not."""
    q, k, v = qkv()
    changes: list[Callable[[], Any]] = [
        lambda: SDPA(q, k, v),
        lambda: SDPA(q, k, v, is_causal=True),
        lambda: SDPA(q, k, v, None, 0, False, enable_gqa=True),
        lambda: SDPA(q, k, v, torch.ones(1, 1, 6, 6).bool()),
        lambda: SDPA(q, k, v, torch.ones(1, 1, 6, 6)),
        lambda: SDPA(q, k, v, torch.ones(1, 1, 6, 6, requires_grad=True)),
        lambda: SDPA(q.clone().requires_grad_(), k, v),
        lambda: SDPA(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        lambda: SDPA(*qkv(BF16)),
    ]
    for count, call in enumerate(changes, 1):
        for _ in range(3):
            call()
        assert len(decided) == count and len(known._known) == count
    fastattn.clear_plans()
    assert not known._known
    for call in changes:
        call()
    assert len(decided) == 2 * len(changes)


def test_what_is_asked_at_each_call(decided: list[Any]) -> None:
    """What no key holds: torch's switches, dropout, modes, transforms, forward-mode gradients, arguments' types."""
    q, k, v = qkv()
    want = TORCHS(q, k, v)
    for _ in range(2):
        SDPA(q, k, v)

    def torchs_serve(call: Callable[[], Any]) -> None:
        served = Served()
        call()
        assert served() == {}
        SDPA(q, k, v)
        assert served() == {"reference": 1}

    def insists() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(SDPA(q, k, v), want)

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            SDPA(torch.autograd.forward_ad.make_dual(q, q), k, v)

    torchs_serve(insists)
    torchs_serve(forward_mode)
    torchs_serve(lambda: SDPA(q, k, v, dropout_p=0.5))
    torchs_serve(lambda: torch.func.grad(lambda x: SDPA(x, k, v).sum())(q))
    torchs_serve(lambda: torch.jit.trace(lambda x: SDPA(x, k, v), q, check_trace=False))
    for options in ({"is_causal": 1}, {"enable_gqa": 1}, {"is_causal": torch.ones(2)}, {"dropout_p": "0"}):
        with pytest.raises(TypeError):
            SDPA(q, k, v, **options)  # type: ignore[arg-type]
        with pytest.raises((TypeError, RuntimeError)):
            SDPA(q, k, v, torch.ones(6, 6), **options)  # type: ignore[arg-type]
    SDPA(q, k, v, is_causal=True)  # and yet no text is a mask, nor what else the op takes as one
    full = fastattn.Intervals(torch.zeros(2, 6).int(), torch.full((2, 6), 6).int())
    fastattn.scaled_dot_product_attention(q, k, v, mask=full)
    for mask in ("causal", full, (1, 0)):
        with pytest.raises(TypeError):
            SDPA(q, k, v, mask)  # type: ignore[arg-type]

    def both_masks() -> None:
        with contextlib.suppress(RuntimeError):  # of some versions and kernels
            SDPA(q, k, v, torch.ones(1, 1, 6, 6), is_causal=True)

    torchs_serve(both_masks)
    assert len(torch.func.vmap(lambda x: SDPA(x, k, v))(q[None])) == 1


def test_grouped_heads_unasked() -> None:
    """The op takes them; torch's function does so if it is asked to, whoever asked before."""
    q, k, v = torch.randn(1, 4, 6, 8), *(torch.randn(1, 2, 6, 8) for _ in range(2))
    for _ in range(2):
        SDPA(q, k, v, enable_gqa=True)
    fastattn.scaled_dot_product_attention(q, k, v)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            SDPA(q, k, v)


def test_autocast() -> None:
    """A kind that was met without it is another kind within, and the other way round."""
    q, k, v = qkv()
    half = [x.to(BF16) for x in (q, k, v)]
    mask = torch.randn(1, 1, 6, 6)
    for _ in range(2):
        assert SDPA(q, k, v).dtype == FP32
        assert SDPA(q, k, v, mask).dtype == FP32
        plain = SDPA(*half, mask)
        with torch.autocast("cpu", dtype=BF16):
            assert SDPA(q, k, v).dtype == BF16
            assert SDPA(*half).dtype == BF16
            rounded = SDPA(*half, mask)
        torch.testing.assert_close(rounded, SDPA(*half, mask.to(BF16)), rtol=0, atol=0)
        assert not torch.equal(rounded, plain)


def test_what_torch_serves_is_known_too(decided: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not what autocast makes another call of."""
    q, k, v = qkv()
    with fastattn.use_backend("torch", "reference"):
        for _ in range(3):
            before = fastattn.stats()["handed_to_torch"].get(decide.KERNELS, 0)
            torch.testing.assert_close(SDPA(q, k, v), TORCHS(q, k, v))
            assert fastattn.stats()["handed_to_torch"][decide.KERNELS] == before + 1
        assert len(decided) == 1
        with torch.autocast("cpu", dtype=BF16):
            for _ in range(2):
                assert SDPA(q, k, v).dtype == BF16
        assert len(decided) == 3, "autocast is asked for by the long way"
    served = Served()
    SDPA(q, k, v)
    assert served() == {"reference": 1}


def test_what_is_dropped_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend refuses, or a binary is ready, while the first call of a kind is under way in another thread."""
    q, k, v = qkv()
    real = fast_path.bound

    def dropped(key: Any) -> Any:
        found = real(key)
        shape_cache.invalidate(Reason.BINARY_READY)
        return found

    monkeypatch.setattr(fast_path, "bound", dropped)
    SDPA(q, k, v)
    assert not known._known
    monkeypatch.setattr(fast_path, "bound", real)
    SDPA(q, k, v)
    assert len(known._known) == 1
    before = routes.generation()
    shape_cache.invalidate(Reason.BACKEND_REFUSED)
    assert not known._known and routes.generation() > before


def test_routes_are_dropped_first() -> None:
    """Of the process's own caches; `known.remember` relies on it."""
    holders = shape_cache._all()
    names = [holder.name for holder in holders]
    assert names.index("routes") < names.index("drop-in calls")
