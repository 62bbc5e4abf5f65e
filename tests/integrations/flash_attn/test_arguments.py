"""What flash-attn's functions refuse, and by which name; packed tensors, dropout, determinism, tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import flash
from fastattn.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.integrations.flash_attn import alibi
from fastattn.integrations.flash_attn.arguments import Options

DENSE, VARLEN, CACHED = "dense", "varlen", "cached"


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good(kind: str) -> dict[str, Any]:
    """Arguments of a call that works."""
    torch.manual_seed(0)
    if kind == DENSE:
        return {"q": torch.randn(2, 3, 4, 8), "k": torch.randn(2, 5, 2, 8), "v": torch.randn(2, 5, 2, 8)}
    if kind == VARLEN:
        cu = {"cu_seqlens_q": ints(0, 1, 3), "cu_seqlens_k": ints(0, 2, 5), "max_seqlen_q": 2, "max_seqlen_k": 3}
        return {"q": torch.randn(3, 4, 8), "k": torch.randn(5, 2, 8), "v": torch.randn(5, 2, 8), **cu}
    caches = {"k_cache": torch.zeros(2, 6, 2, 8), "v_cache": torch.zeros(2, 6, 2, 8)}
    new = {"k": torch.randn(2, 1, 2, 8), "v": torch.randn(2, 1, 2, 8), "cache_seqlens": ints(2, 3)}
    return {"q": torch.randn(2, 1, 4, 8), **caches, **new}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    DENSE: flash_attn_func,
    VARLEN: flash_attn_varlen_func,
    CACHED: flash_attn_with_kvcache,
}
HALF, ALL = (DENSE, VARLEN), (DENSE, VARLEN, CACHED)
#: (kinds of call, what is changed, the name that the error begins with; or the first of these names)
BAD: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (ALL, {"q": None}, "q"),
    (ALL, {"q": [[1.0]]}, "q"),
    (ALL, {"q": torch.randn(4, 8)}, "q"),
    (HALF, {"k": torch.randn(4, 8)}, "k"),
    (HALF, {"v": "v"}, "v"),
    ((DENSE,), {"q": torch.randint(0, 3, (2, 3, 4, 8))}, "q"),
    ((DENSE,), {"k": torch.randn(1, 5, 2, 8)}, "k"),
    ((DENSE,), {"k": torch.randn(2, 5, 2, 16)}, "k"),
    ((DENSE,), {"k": torch.randn(2, 5, 3, 8), "v": torch.randn(2, 5, 3, 8)}, "k"),
    ((DENSE,), {"v": torch.randn(2, 4, 2, 8)}, "v"),
    ((DENSE,), {"v": torch.randn(2, 5, 1, 8)}, "v"),
    ((DENSE,), {"v": torch.randn(2, 5, 2, 8, device="meta")}, "v"),
    ((DENSE,), {"k": torch.randn(2, 5, 2, 8).to(torch.float8_e4m3fn)}, "k"),
    ((VARLEN,), {"k": torch.randn(5, 2, 16)}, "k"),
    ((VARLEN,), {"v": torch.randn(4, 2, 8)}, "v"),
    ((VARLEN,), {"v": torch.randn(5, 3, 8)}, "v"),
    (ALL, {"softmax_scale": "x"}, "softmax_scale"),
    (ALL, {"softmax_scale": float("nan")}, "softmax_scale"),
    (ALL, {"causal": 1}, "causal"),
    (ALL, {"window_size": 3}, "window_size"),
    (ALL, {"window_size": (3, 3, 3)}, "window_size"),
    (ALL, {"window_size": (3, 1.5)}, "window_size"),
    (ALL, {"window_size": (True, 1)}, "window_size"),
    (ALL, {"softcap": None}, "softcap"),
    (ALL, {"softcap": float("inf")}, "softcap"),
    (ALL, {"softcap": True}, "softcap"),
    (ALL, {"alibi_slopes": torch.rand(3)}, "alibi_slopes"),
    (ALL, {"alibi_slopes": torch.rand(3, 4)}, "alibi_slopes"),
    (ALL, {"alibi_slopes": ints(1, 2, 3, 4)}, "alibi_slopes"),
    (ALL, {"alibi_slopes": torch.rand(4, device="meta")}, "alibi_slopes"),
    (ALL, {"alibi_slopes": 0.5}, "alibi_slopes"),
    (ALL, {"learnable_sink": torch.rand(3)}, "learnable_sink"),
    (ALL, {"learnable_sink": ints(1, 2, 3, 4)}, "learnable_sink"),
    (HALF, {"dropout_p": 1.0}, "dropout_p"),
    (HALF, {"dropout_p": -0.1}, "dropout_p"),
    (HALF, {"dropout_p": "0"}, "dropout_p"),
    (HALF, {"dropout_p": 0.1, "softcap": 2.0}, "dropout_p"),
    (HALF, {"dropout_p": 0.1, "learnable_sink": torch.rand(4)}, "dropout_p"),
    (HALF, {"dropout_p": 0.1, "return_attn_probs": True}, "dropout_p"),
    (HALF, {"dropout_p": 0.1, "return_lse": True}, "dropout_p"),
    (HALF, {"deterministic": 1}, "deterministic"),
    (HALF, {"return_attn_probs": None}, "return_attn_probs"),
    (HALF, {"return_lse": 1}, "return_lse"),
    ((CACHED,), {"return_softmax_lse": 1}, "return_softmax_lse"),
    (ALL, {"num_splits": -1}, "num_splits"),
    (ALL, {"num_splits": None}, "num_splits"),
    (ALL, {"pack_gqa": 1}, "pack_gqa"),
    (ALL, {"sm_margin": 0.5}, "sm_margin"),
    (ALL, {"attention_chunk": 128}, "attention_chunk"),
    (ALL, {"qv": torch.randn(1)}, "qv"),
    (ALL, {"q_descale": torch.ones(1)}, "q_descale"),
    (ALL, {"k_descale": torch.ones(1)}, "k_descale"),
    (ALL, {"v_descale": torch.ones(1)}, "v_descale"),
    ((VARLEN,), {"cu_seqlens_q": [0, 1, 3]}, "cu_seqlens_q"),
    ((VARLEN,), {"cu_seqlens_q": ints(0, 1, 3).long()}, "cu_seqlens_q"),
    ((VARLEN,), {"cu_seqlens_q": ints(0, 1, 3)[None]}, "cu_seqlens_q"),
    ((VARLEN,), {"cu_seqlens_q": ints()}, "cu_seqlens_q"),
    ((VARLEN,), {"cu_seqlens_k": ints(0, 5)}, "cu_seqlens_k"),
    ((VARLEN,), {"cu_seqlens_k": ints(0, 2, 5).to("meta")}, "cu_seqlens_k"),
    ((VARLEN,), {"seqused_q": ints(1)}, "seqused_q"),
    ((VARLEN,), {"seqused_k": ints(1, 1).float()}, "seqused_k"),
    ((VARLEN,), {"max_seqlen_q": None, "alibi_slopes": torch.rand(4)}, "max_seqlen_q"),
    ((VARLEN,), {"max_seqlen_k": -1, "alibi_slopes": torch.rand(4)}, "max_seqlen_k"),
    ((VARLEN,), {"block_table": ints(0, 1)}, "k"),
    (
        (VARLEN,),
        {"k": torch.randn(3, 2, 2, 8), "v": torch.randn(3, 2, 2, 8), "block_table": ints(0, 1)[None]},
        "block_table",
    ),
    ((CACHED,), {"k_cache": torch.zeros(2, 6, 8)}, "k_cache"),
    ((CACHED,), {"k_cache": torch.zeros(1, 6, 2, 8), "v_cache": torch.zeros(1, 6, 2, 8)}, "k_cache"),
    ((CACHED,), {"k_cache": torch.zeros(2, 6, 2, 4), "k": torch.zeros(2, 1, 2, 4)}, "k_cache"),
    ((CACHED,), {"v_cache": torch.zeros(2, 5, 2, 8)}, "v_cache"),
    ((CACHED,), {"v_cache": None}, "v_cache"),
    ((CACHED,), {"k": None}, "k"),
    ((CACHED,), {"v": None}, "v"),
    ((CACHED,), {"k": torch.randn(2, 1, 3, 8)}, "k"),
    ((CACHED,), {"v": torch.randn(2, 2, 2, 8)}, "v"),
    ((CACHED,), {"k": torch.zeros(2, 1, 2, 8, dtype=torch.int32)}, "k"),
    ((CACHED,), {"cache_seqlens": None}, "cache_seqlens"),
    ((CACHED,), {"cache_seqlens": 6}, "cache_seqlens"),
    ((CACHED,), {"cache_seqlens": -1}, "cache_seqlens"),
    ((CACHED,), {"cache_seqlens": 1.0}, "cache_seqlens"),
    ((CACHED,), {"cache_seqlens": ints(1)}, "cache_seqlens"),
    ((CACHED,), {"cache_seqlens": ints(1, 1).long()}, "cache_seqlens"),
    ((CACHED,), {"cache_batch_idx": ints(1)}, "cache_batch_idx"),
    ((CACHED,), {"cache_leftpad": ints(1, 1).long()}, "cache_leftpad"),
    ((CACHED,), {"cache_batch_idx": ints(1, 0), "block_table": ints(0, 1)[:, None]}, "cache_batch_idx"),
    ((CACHED,), {"block_table": ints(0, 1, 1)[:, None]}, "block_table"),
    ((CACHED,), {"page_table": ints(0, 1)[:, None], "block_table": ints(0, 1)[:, None]}, "page_table"),
    ((CACHED,), {"rotary_cos": torch.rand(6, 4)}, "rotary_sin"),
    ((CACHED,), {"rotary_sin": torch.rand(6, 4)}, "rotary_cos"),
    ((CACHED,), {"rotary_cos": torch.rand(5, 4), "rotary_sin": torch.rand(5, 4)}, "rotary_cos"),
    ((CACHED,), {"rotary_cos": torch.rand(6, 5), "rotary_sin": torch.rand(6, 5)}, "rotary_cos"),
    ((CACHED,), {"rotary_cos": torch.rand(6, 4), "rotary_sin": torch.rand(7, 4)}, "rotary_sin"),
    ((CACHED,), {"rotary_cos": ints(1)[:, None].expand(6, 4), "rotary_sin": torch.rand(6, 4)}, "rotary_cos"),
    ((CACHED,), {"rotary_cos": torch.rand(6, 4), "rotary_sin": torch.rand(6, 4), "k": None, "v": None}, "rotary_cos"),
    ((CACHED,), {"rotary_interleaved": None}, "rotary_interleaved"),
    ((CACHED,), {"rotary_seqlens": ints(1)}, "rotary_seqlens"),
    ((CACHED,), {"cu_seqlens_q": ints(0, 1, 2), "q": torch.randn(2, 4, 8)}, "cu_seqlens_q"),
    ((CACHED,), {"cu_seqlens_q": ints(0, 1, 2), "q": torch.randn(2, 4, 8), "k": None, "v": None}, "max_seqlen_q"),
    ((CACHED,), {"cu_seqlens_k_new": ints(0, 1, 2)}, "cu_seqlens_k_new"),
]
BAD_CALLS = [(kind, changes, name) for kinds, changes, name in BAD for kind in kinds]


def shown(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


@pytest.mark.parametrize(
    "kind, changes, name",
    BAD_CALLS,
    ids=[f"{kind}-" + ",".join(f"{k}={shown(v)}" for k, v in changes.items()) for kind, changes, _ in BAD_CALLS],
)
def test_bad_calls(kind: str, changes: dict[str, Any], name: str) -> None:
    arguments = good(kind)
    FUNCTIONS[kind](**arguments)
    before = {key: x.clone() for key, x in arguments.items() if key.endswith("_cache")}
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected "):
        FUNCTIONS[kind](**arguments | changes)
    assert all(torch.equal(arguments[key], x) for key, x in before.items()), "a refused call stores nothing"


@pytest.mark.parametrize("kind", ALL)
def test_hints_change_nothing(kind: str) -> None:
    want = FUNCTIONS[kind](**good(kind))
    hints: dict[str, Any] = {"num_splits": 4, "pack_gqa": True, "sm_margin": 8}
    if kind == CACHED:
        hints["scheduler_metadata"] = ints(1)
    assert torch.equal(FUNCTIONS[kind](**good(kind), **hints), want)


def test_names_and_order() -> None:
    """Code passes flash-attn's arguments by position."""
    common = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    expected = {
        flash_attn_func: ["q", "k", "v", *common, "return_attn_probs"],
        flash_attn_varlen_func: ["q", "k", "v", *lengths, *common, "return_attn_probs", "block_table"],
        flash_attn_with_kvcache: [
            *["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"],
            *["cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap"],
            *["rotary_interleaved", "alibi_slopes", "num_splits", "return_softmax_lse"],
        ],
    }
    for function, names in expected.items():
        found = inspect.signature(function).parameters.values()
        assert [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] == names
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        assert getattr(fastattn, name) is getattr(flash, name)


# Packed tensors.


def test_packed_tensors() -> None:
    """One gradient for all of them, that of the parts."""
    qkv = torch.randn(2, 5, 3, 4, 8, requires_grad=True)
    parts = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    kv = torch.stack([x.detach() for x in parts[1:]], 2).requires_grad_()
    out = flash.flash_attn_qkvpacked_func(qkv, 0.0, None, True, window_size=(2, -1))
    other = flash.flash_attn_kvpacked_func(parts[0], kv, causal=True, window_size=(2, -1))
    want = flash_attn_func(*parts, causal=True, window_size=(2, -1))
    assert torch.equal(out, want) and torch.equal(other, want)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(want, parts, upstream)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, upstream)[0], torch.stack(gradients, 2))
    torch.testing.assert_close(torch.autograd.grad(other, kv, upstream)[0], torch.stack(gradients[1:], 2))

    cu, flat = ints(0, 5, 10), qkv.detach().flatten(0, 1).requires_grad_()
    out = flash.flash_attn_varlen_qkvpacked_func(flat, cu, 5, causal=True, window_size=(2, -1))
    q, pair = flat[:, 0], flat[:, 1:]
    other = flash.flash_attn_varlen_kvpacked_func(q, pair, cu, cu, 5, 5, causal=True, window_size=(2, -1))
    torch.testing.assert_close(out, want.flatten(0, 1))
    torch.testing.assert_close(other, out)
    found = torch.autograd.grad(out, flat, upstream.flatten(0, 1))[0]
    torch.testing.assert_close(found, torch.stack(gradients, 2).flatten(0, 1))


def test_packed_tensors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^qkv: expected 3 tensors in its dim 2"):
        flash.flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"^kv: expected 5 dims"):
        flash.flash_attn_kvpacked_func(torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8))
    with pytest.raises(ValueError, match=r"^kv: expected 2 tensors in its dim 1"):
        flash.flash_attn_varlen_kvpacked_func(
            torch.randn(5, 4, 8), torch.randn(5, 3, 4, 8), ints(0, 5), ints(0, 5), 5, 5
        )
    with pytest.raises(ValueError, match=r"^qkv: expected 4 dims"):
        flash.flash_attn_varlen_qkvpacked_func(torch.randn(5, 4, 8), ints(0, 5), 5)


# Dropout.


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (2, 1)}, {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1])}],
    ids=["plain", "causal", "window", "alibi"],
)
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=str)
def test_dropout(lengths: tuple[int, int], options: dict[str, Any]) -> None:
    """With the identity for values the output is the probabilities: each is dropped, or divided by 1 - p."""
    queries, keys = lengths
    q, k = torch.randn(2, queries, 2, 8), torch.randn(2, keys, 1, 8)
    v = torch.eye(keys)[None, :, None].expand(2, keys, 1, keys)
    whole = flash_attn_func(q, k, v, **options)
    dropped = flash_attn_func(q, k, v, 0.25, **options)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75, rtol=1e-4, atol=1e-6)
    share = kept.sum() / (whole > 0).sum()
    assert 0.5 < share < 0.95
    assert bool((whole > 0).all()) == (not options)
    torch.manual_seed(3)
    one = flash_attn_func(q, k, v, 0.25, **options)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, 0.25, **options), one), "its random numbers are torch's"


def test_dropout_of_packed_sequences_and_its_gradient() -> None:
    q, k = torch.randn(5, 2, 8, requires_grad=True), torch.randn(6, 2, 8)
    v = torch.eye(6)[:, None].repeat(1, 2, 1).requires_grad_()
    arguments = (ints(0, 2, 5), ints(0, 2, 6), 3, 4)
    whole = flash_attn_varlen_func(q, k, v, *arguments)
    dropped = flash_attn_varlen_func(q, k, v, *arguments, 0.25)
    kept = dropped != 0
    assert not dropped[:2, :, 2:].any() and not dropped[2:, :, :2].any()
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75, rtol=1e-4, atol=1e-6)
    upstream = torch.randn_like(dropped)
    (found,) = torch.autograd.grad(dropped, v, upstream)
    torch.testing.assert_close(found, torch.einsum("ihj,ihd->jhd", dropped.detach(), upstream), rtol=1e-4, atol=1e-5)


# Determinism.


def test_deterministic_covers_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.torch import _TorchKernel

    seen: list[bool] = []
    backward = _TorchKernel._gradients

    def spied(*arguments: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return backward(*arguments)

    monkeypatch.setattr(_TorchKernel, "_gradients", spied)
    q, k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in "qkv")
    plain = flash_attn_func(q, k, v, causal=True)
    out = flash_attn_func(q, k, v, causal=True, deterministic=True)
    assert torch.equal(out, plain) and not torch.are_deterministic_algorithms_enabled()
    for result in (plain, out):
        gradients = [torch.autograd.grad(result.sum(), (q, k, v), retain_graph=True) for _ in "12"]
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert seen == [False, False, True, True] and not torch.are_deterministic_algorithms_enabled()


def test_deterministic_gives_no_wrong_second_derivative() -> None:
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    out = flash_attn_func(q, q.detach(), q.detach(), deterministic=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# ALiBi's mask.


def test_alibi_masks_are_as_small_as_they_can_be() -> None:
    slopes, plain = torch.rand(4), Options(None, -1, -1, None, None)
    causal = plain._replace(right=0)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert alibi.bias(slopes, 5, 9, bf16, causal).mask.shape == (1, 4, 1, 9)
    assert alibi.bias(slopes, 1, 9, bf16, plain).mask.shape == (1, 4, 1, 9)
    assert alibi.bias(slopes.expand(2, 4), 5, 9, bf16, causal).mask.shape == (2, 4, 1, 9)
    assert alibi.bias(slopes, 5, 9, bf16, plain).mask.shape == (1, 4, 5, 9)
    assert alibi.bias(slopes, 5, 9, fp32, causal).mask.shape == (1, 4, 5, 9)
    assert alibi.bias(slopes, 5, 9, bf16, causal._replace(sinks=slopes)).mask.shape == (1, 4, 5, 9)
    assert alibi.bias(slopes.half(), 5, 9, bf16, causal).mask.dtype == fp32


def test_alibi_of_long_distances() -> None:
    """A bfloat16 bias would round a distance of 1000 to the next multiple of 4."""
    q, k, v = (torch.randn(1, 1024, heads, 8).bfloat16() for heads in (2, 1, 1))
    slopes = torch.tensor([0.5, 0.01])
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    distance = torch.arange(1024)[:, None] - torch.arange(1024)
    bias = (-slopes.double()[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    scores = torch.einsum("ihd,jd->hij", q[0].double(), k[0, :, 0].double()) * 8**-0.5 + bias
    want = torch.einsum("hij,jd->ihd", scores.softmax(-1), v[0, :, 0].double())
    assert ((out[0].double() - want).norm() / want.norm()).item() < 4e-3


def test_slopes_that_require_a_gradient_get_one() -> None:
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in "qkv")
    assert torch.autograd.gradcheck(lambda s: flash_attn_func(q, k, v, alibi_slopes=s, causal=True), slopes)
    assert torch.autograd.gradcheck(lambda s: flash_attn_func(q, k, v, alibi_slopes=s), slopes)


# Nothing to compute.

OPTIONS: list[dict[str, Any]] = [
    {},
    {"dropout_p": 0.2, "causal": True},
    {"dropout_p": 0.2, "alibi_slopes": torch.rand(4)},
    {"alibi_slopes": torch.rand(4), "return_attn_probs": True, "causal": True},
    {"deterministic": True, "learnable_sink": torch.rand(4), "return_lse": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_nothing_to_compute(batch: int, queries: int, keys: int, options: dict[str, Any]) -> None:
    """Rows that see nothing give 0, and all of it is part of the graph."""
    q = torch.randn(batch, queries, 4, 8, requires_grad=True)
    k, v = torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 8)
    found = flash_attn_func(q, k, v, **options)
    out = found[0] if isinstance(found, tuple) else found
    out.sum().backward()
    assert out.shape == q.shape and not out.any() and not q.grad.any()
    if isinstance(found, tuple):
        assert found[1].shape == (batch, 4, queries)

    q = torch.randn(queries, 4, 8, requires_grad=True)
    k, v = torch.randn(keys, 2, 8), torch.randn(keys, 2, 8)
    cu_q, cu_k = (ints(0, *[length] * batch) for length in (queries, keys))
    found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, queries, keys, **options)
    out = found[0] if isinstance(found, tuple) else found
    out.sum().backward()
    assert out.shape == q.shape and bool(out.isfinite().all())


@pytest.mark.parametrize("batch, queries, capacity, new", [(0, 1, 4, 1), (2, 0, 4, 0), (2, 1, 0, 0), (2, 1, 4, 0)])
def test_nothing_to_store(batch: int, queries: int, capacity: int, new: int) -> None:
    caches = [torch.zeros(batch, capacity, 2, 8) for _ in "kv"]
    step = [torch.randn(batch, new, 2, 8) for _ in "kv"]
    for lengths in (0, torch.zeros(batch, dtype=torch.int32)):
        out = flash_attn_with_kvcache(torch.randn(batch, queries, 4, 8), *caches, *step, cache_seqlens=lengths)
        assert out.shape == (batch, queries, 4, 8) and not out.any() and not caches[0].any()


# What runs, and tracing.


def test_the_backend_can_be_chosen() -> None:
    before = fastattn.stats()["calls"].get("reference", 0)
    with fastattn.use_backend("reference"):
        for kind in ALL:
            FUNCTIONS[kind](**good(kind))
    assert fastattn.stats()["calls"]["reference"] == before + 3


@pytest.mark.parametrize("kind", ALL)
def test_it_compiles_in_one_graph(kind: str) -> None:
    options: dict[str, Any] = {"causal": True, "window_size": (2, -1), "alibi_slopes": torch.rand(4)}
    if kind == CACHED:
        options |= {"rotary_cos": torch.rand(6, 4), "rotary_sin": torch.rand(6, 4), "return_softmax_lse": True}
    else:
        options["return_attn_probs"] = True
    want_in, got_in = good(kind), good(kind)
    want = FUNCTIONS[kind](**want_in, **options)
    compiled = torch.compile(FUNCTIONS[kind], fullgraph=True, backend="aot_eager")
    got = compiled(**got_in, **options)
    torch.testing.assert_close(got[:2], want[:2])
    for name in ("k_cache", "v_cache"):
        if kind == CACHED:
            torch.testing.assert_close(got_in[name], want_in[name])
            assert got_in[name].any()


def test_deterministic_while_compiling() -> None:
    """It is no part of a graph: it breaks one, or is refused."""
    arguments = good(DENSE)
    arguments["q"].requires_grad_()
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"deterministic: expected False under torch\.compile"):
        torch.compile(flash_attn_func, backend="eager", fullgraph=True)(**arguments, deterministic=True)
    torch.compiler.reset()
    out = torch.compile(flash_attn_func, backend="eager")(**arguments, deterministic=True)
    assert torch.equal(out, flash_attn_func(**arguments)) and out.requires_grad


def test_debug_reads_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn import debug

    monkeypatch.setattr(debug, "ENABLED", True)
    with pytest.raises(ValueError, match=r"^cache_seqlens: expected at most 6 tokens"):
        flash_attn_with_kvcache(**good(CACHED) | {"cache_seqlens": ints(2, 6)})
