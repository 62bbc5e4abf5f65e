"""The small Triton kernels around cuDNN: offsets and lengths, sinks. On the CPU through Triton's interpreter."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported
pytest.importorskip("triton")

from cases import relative_error

import fastattn
from fastattn.backends.cudnn import operands
from fastattn.backends.cudnn.operands import masked
from fastattn.backends.cudnn.ragged_offsets import ragged_offsets, ragged_offsets_from_host
from fastattn.backends.cudnn.sinks import add_sinks, sink_gradient
from fastattn.call import Call, Problem

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="native on a GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fold", [2, 6])
@pytest.mark.parametrize("data", ["none", "lengths", "intervals", "both"])
def test_offsets_and_lengths(device: str, fold: int, data: str) -> None:
    batch, rows, heads = 3, 4 * fold, {"q": 6, "o": 6, "do": 6, "dq": 6, "k": 2, "v": 2, "dk": 2, "dv": 2}
    tensors = {}
    for i, (role, count) in enumerate(heads.items()):  # no two alike; token-major, head-major, longer than used
        head_major = torch.empty(batch, count + i, 12, 8, device=device)[:, :count, :9]
        token_major = torch.empty(batch, 12, count, 8 + i, device=device)[:, :9, :, :8].transpose(1, 2)
        tensors[role] = head_major if i % 2 else token_major
    int32 = lambda *x: torch.tensor(x, dtype=torch.int32, device=device)  # noqa: E731
    q_lengths, kv_lengths = (int32(4, 99, -1), int32(9, 0, 5)) if data in ("lengths", "both") else (None, None)
    lo, hi = (int32(2, 0, 4)[:, None], int32(7, 9, 4)[:, None]) if data in ("intervals", "both") else (None, None)
    call = Call(*(tensors[role] for role in "qkv"), lo=lo, hi=hi, q_lengths=q_lengths, kv_lengths=kv_lengths)
    found = ragged_offsets(tensors, rows, fold, call)
    if data == "none":
        host = ragged_offsets_from_host(tensors, rows, fold, call)
        assert found.keys() == host.keys()
        assert all(torch.equal(found[name], host[name]) and found[name].dtype == host[name].dtype for name in found)
    for row in range(rows):
        b, f = divmod(row, fold)
        queries, keys, first = 9, 9, 0
        if q_lengths is not None and kv_lengths is not None and b < batch:
            queries, keys = (min(max(int(x[b]), 0), 9) for x in (q_lengths, kv_lengths))
        if lo is not None and hi is not None and b < batch:
            first = min(int(lo[b, 0]), keys)
            keys = max(min(int(hi[b, 0]), keys) - first, 0)
        queries = queries if keys else 0
        if b >= batch:
            queries = keys = 0
        assert (int(found["seq_q"][row, 0, 0, 0]), int(found["seq_kv"][row, 0, 0, 0])) == (queries, keys), row
        if b < batch:
            for role, x in tensors.items():
                head = f * heads[role] // fold if heads[role] == 6 else f // (fold // 2)
                start = first if heads[role] == 2 else 0
                want = b * x.stride(0) + head * x.stride(1) + start * x.stride(2)
                assert int(found[f"ragged_{role}"][row, 0, 0, 0]) == want, (row, role)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kinds", [3, 5])
def test_offsets_of_segments(device: str, kinds: int) -> None:
    fold, rows = 2, 16
    q, k = torch.empty(3, 9, 6, 8, device=device).transpose(1, 2), torch.empty(3, 2, 12, 8, device=device)[:, :, :9]
    lse = torch.empty(3, 9, 6, device=device).transpose(1, 2)
    entry, start, stop = [0, 0, 1, 2, 2, 7], [0, 4, 2, -3, 5, 0], [4, 9, 2, 3, 99, 9]
    kv_start, kv_stop = ([1, 1, 0, 2, 5, 0], [4, 9, 9, 2, 6, 9]) if kinds == 5 else (start, stop)
    columns = [entry, start, stop] + [kv_start, kv_stop] * (kinds == 5)
    segments = torch.tensor(columns, dtype=torch.int32, device=device)
    tensors = {"q": q, "k": k, "v": k, "o": q, "stats": lse}
    found = ragged_offsets(tensors, rows, fold, Call(q, k, k, segments=segments))
    clamp = lambda x: min(max(x, 0), 9)  # noqa: E731
    for row in range(rows):
        n, f = divmod(row, fold)
        if n >= len(entry):
            assert int(found["seq_q"][row, 0, 0, 0]) == int(found["seq_kv"][row, 0, 0, 0]) == 0
            continue
        b, first, last, first_kv, last_kv = min(entry[n], 2), *map(clamp, (start[n], stop[n], kv_start[n], kv_stop[n]))
        keys = max(last_kv - first_kv, 0)
        assert int(found["seq_kv"][row, 0, 0, 0]) == keys
        assert int(found["seq_q"][row, 0, 0, 0]) == (max(last - first, 0) if keys else 0)
        for role, x in tensors.items():
            head, at = (f, first_kv) if role in "kv" else (3 * f, first)
            want = b * x.stride(0) + head * x.stride(1) + at * x.stride(2)
            assert int(found[f"ragged_{role}"][row, 0, 0, 0]) == want, (row, role)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length, dim", [(5, 16), (33, 72), (40, 256)])
def test_sinks_around_a_softmax_without_them(device: str, length: int, dim: int) -> None:
    q, k, v = (torch.randn(2, heads, length, dim, device=device, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, device=device, dtype=torch.float64).requires_grad_()
    options = {
        "mask": "causal",
        "window": (3, 0),
        "kv_lengths": torch.tensor([length, 2], dtype=torch.int32, device=device),
    }
    want, want_lse = fastattn.scaled_dot_product_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    grad_out = torch.randn_like(want)
    (want_gradient,) = torch.autograd.grad(want, sinks, grad_out)

    out, lse = fastattn.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), return_lse=True, backend="reference", **options
    )
    stats = torch.full((2, 4, length + 3), torch.nan, device=device)[..., :length].copy_(lse)
    with_sinks = add_sinks(out, stats, sinks.detach().float())
    assert relative_error(out, want) < 1e-6
    assert (with_sinks - want_lse).abs().max() < 1e-5
    grad_out[1, :, : length - 2] = torch.nan  # rows that see nothing
    found = sink_gradient(out, grad_out.float(), with_sinks, sinks.detach().float())
    assert relative_error(found, want_gradient) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_intervals_and_sinks_of_any_strides(device: str) -> None:
    table = torch.tensor([[3, 8], [4, 8], [5, 8], [6, 8]], dtype=torch.int32, device=device)
    q, k = torch.empty(4, 2, 9, 8, device=device), torch.empty(4, 2, 9, 8, device=device)
    call = Call(q, k, k, q_lengths=table[:1, 0].expand(4), kv_lengths=table[:, 0])
    found = ragged_offsets({"q": q, "k": k}, 8, 2, call)
    assert found["seq_kv"].flatten().tolist() == [3, 3, 4, 4, 5, 5, 6, 6]
    assert found["seq_q"].flatten().tolist() == [3] * 8
    lo = torch.zeros(4, 1, dtype=torch.int32, device=device)
    found = ragged_offsets({"q": q, "k": k}, 8, 2, Call(q, k, k, lo=lo, hi=table[2:3, :1].expand(4, 1)))
    assert found["seq_kv"].flatten().tolist() == [5] * 8
    out, stats = torch.randn(1, 4, 3, 8, device=device), torch.zeros(1, 4, 3, device=device)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    sinks = torch.tensor([[0.0, 50.0], [1.0, 50.0], [2.0, 50.0], [3.0, 50.0]], device=device)[:, 0]
    want = torch.logaddexp(stats, sinks[:, None])
    assert torch.allclose(add_sinks(out, stats, sinks), want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sink_of_minus_infinity_is_none(device: str) -> None:
    out, lse = torch.randn(1, 2, 4, 16, device=device), torch.randn(1, 2, 4, device=device)
    out[:, :, 2], lse[:, :, 2] = 0.0, -math.inf
    kept = out.clone()
    found = add_sinks(out, lse, torch.full((2,), -math.inf, device=device))
    assert torch.equal(out, kept) and torch.allclose(found, lse)
    gradient = sink_gradient(out, torch.randn_like(out), found, torch.full((2,), -math.inf, device=device))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, grads",
    [
        (torch.bool, ""),
        *((dtype, grads) for dtype in (torch.float16, torch.bfloat16, torch.float32) for grads in ("", "m")),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (2, 1), (1, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"left": 3, "right": 0},
        {"right": 0, "kv_lengths": (290, 70)},
        {"left": 9, "q_lengths": (40, 11), "kv_lengths": (33, 999)},
    ],
    ids=lambda options: "-".join(options) or "mask alone",
)
def test_what_a_mask_hides(
    device: str, dtype: torch.dtype, grads: str, shape: tuple[int, int], options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The kernel against torch's operations, on masks that hide rows and keys, and lie strangely in memory."""
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    batch, heads, rows, keys = 2, 4, 40, 304 if shape[1] == 1 else 300
    torch.manual_seed(5)
    keep = torch.rand(*shape, keys, rows) < 0.2
    keep[..., 7, :] = keep[..., :, 5] = False  # a key that nobody sees, a query that sees nothing
    mask = keep if dtype == torch.bool else torch.randn(keep.shape).masked_fill(~keep, -math.inf).to(dtype)
    if dtype in (torch.bfloat16, torch.float32):
        mask[..., 9, 9] = torch.finfo(dtype).min
    mask = mask.transpose(2, 3).to(device)
    mask = mask.contiguous() if shape[0] == 1 else mask
    if shape == (1, 1):
        mask = mask.expand(batch, 1, rows, keys)
    q, k = torch.randn(batch, heads, rows, 8, device=device), torch.randn(batch, 2, keys, 8, device=device)
    lengths = {n: torch.tensor(options[n], dtype=torch.int32, device=device) for n in options if "lengths" in n}
    call = Call(q, k, k, mask=mask, grads=grads, **(options | lengths))
    problem = Problem.of(call)
    assert operands.native(device), "or both ways are torch's"
    found = masked(problem, call, whole=True)
    monkeypatch.setattr(operands, "native", lambda kind: False)
    want = masked(problem, call, whole=True)
    assert found.bias.dtype == want.bias.dtype
    for name in ("bias", "q", "k", "v"):
        one, other = torch.broadcast_tensors(getattr(found, name), getattr(want, name))
        assert torch.equal(one, other), name
    assert (
        torch.equal(*torch.broadcast_tensors(found.fully_masked, want.fully_masked))
        and found.fully_masked.any()
        and (found.k == 0).any()
    )
