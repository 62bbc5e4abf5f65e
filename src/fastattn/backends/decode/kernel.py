"""Split-KV attention for few queries ("flash decoding"): the kernel, and the code that launches it.

Decode is bound by the reading of K and V, so each key is read once: the queries of all heads that share a K/V head are
the rows of one tensor-core tile. Few rows are few programs, so the keys of a tile are divided among several programs
("splits"); each leaves its unfinished softmax and output, and a second kernel (`combine.py`) combines them.

Lengths are read on the device: each program finds the range of keys that any row of its tile sees and takes its share
of *that* range. Short rows finish early, and a launch does not depend on a length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Call, Problem, token_major_strides
from ..base import Runner
from ..scratch import scratch
from ..triton_launch import Launcher
from .combine import combine_kernel
from .launch import MAX_SPLITS, Launch, rows

# Integers are never specialised: a kernel compiled for one length or layout serves all of them. Loads stay vectorised
# because the strides of q, k, v come in units of 8 elements (see `attend`).
_STRIDES = ["q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"]
_MASK_STRIDES = ["mask_sb", "mask_sh", "mask_si", "mask_sj", "interval_sb", "interval_si"]
_INTEGERS = [*_STRIDES, *_MASK_STRIDES, "q_len", "kv_len", "left", "right"]


@triton.jit
def _tanh(x):
    """Triton has none that its interpreter knows. Near 0, where the closed form cancels, Taylor's series."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _visible(
    b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
):
    """The keys `[lo, hi)` that band, lengths and Intervals let row i see; hi <= lo: none. Equals `masks.bounds`."""
    end = kv_len
    if kv_lengths_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(kv_lengths_ptr + b), 0), kv_len)
    queries = q_len
    if q_lengths_ptr is not None:
        queries = tl.minimum(tl.maximum(tl.load(q_lengths_ptr + b), 0), q_len)
    position = i + (end - queries)
    lo = tl.maximum(position - left, 0)
    hi = tl.minimum(position + right + 1, end)
    if lo_ptr is not None:
        at = b.to(tl.int64) * interval_sb + i.to(tl.int64) * interval_si
        lo = tl.maximum(lo, tl.load(lo_ptr + at, mask=valid, other=0))
        hi = tl.minimum(hi, tl.load(hi_ptr + at, mask=valid, other=0))
    return lo, tl.where(valid & (i < queries), hi, 0)


@triton.jit(do_not_specialize=_INTEGERS)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    scratch_ptr,  # None: the only split, writes out and lse; else see `combine.py`
    mask_ptr,
    lo_ptr,
    hi_ptr,
    sinks_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    q_sb,
    q_sh,
    q_si,
    k_sb,
    k_sh,
    k_sj,
    v_sb,
    v_sh,
    v_sj,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    interval_sb,
    interval_si,
    q_len,
    kv_len,
    left,
    right,
    scale,
    softcap,  # None: off
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of q's, k's and v's strides
    GAPS: tl.constexpr,  # between the first and the last visible key may lie keys that no row of the tile sees
    PRECISION: tl.constexpr,  # of float32 products
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = tile // KV_HEADS
    kv_head = tile % KV_HEADS
    b64 = b.to(tl.int64)

    # Rows run over the heads of one query first: so does the output's memory, and neighbours see the same keys.
    r = tl.arange(0, BLOCK_M)
    i = r // GROUP
    head = kv_head * GROUP + r % GROUP
    valid = i < q_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    lo, hi = _visible(
        b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
    )
    first = tl.min(tl.where(hi > lo, lo, kv_len), 0)
    last = tl.max(tl.where(hi > lo, hi, 0), 0)
    # Steps are dealt out evenly, the first splits taking one more; the splits with work come before those without.
    steps = (tl.maximum(last - first, 0) + BLOCK_N - 1) // BLOCK_N
    share = steps // splits
    extra = steps % splits
    start = first + (split * share + tl.minimum(split, extra)) * BLOCK_N
    stop = tl.minimum(start + (share + (split < extra).to(tl.int32)) * BLOCK_N, last)
    hi = tl.minimum(hi, stop)

    q_at = (b64 * q_sb + head.to(tl.int64) * q_sh + i.to(tl.int64) * q_si) * UNIT
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += (b64 * k_sb + kv_head.to(tl.int64) * k_sh) * UNIT
    v_ptr += (b64 * v_sb + kv_head.to(tl.int64) * v_sh) * UNIT
    if mask_ptr is not None:
        mask_ptr += b64 * mask_sb
        mask_at = head.to(tl.int64) * mask_sh + i.to(tl.int64) * mask_si

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's greatest score so far
    l = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(score - m)
    if scratch_ptr is None and sinks_ptr is not None:  # a sink is a score whose value is 0
        m = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
        l = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for step in range(start, stop, BLOCK_N):
        j = step + tl.arange(0, BLOCK_N)
        j64 = j.to(tl.int64)
        # Columns padded in D hold 0 in q and k both: 0 in q alone would make NaN of an infinite key.
        k_mask = (d < D)[:, None] & (j < stop)[None, :]
        k = tl.load(k_ptr + (j64 * k_sj * UNIT)[None, :] + d[:, None], mask=k_mask, other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if softcap is not None:
            s = softcap * _tanh(s / softcap)
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if mask_ptr is not None:
            bias = tl.load(mask_ptr + mask_at[:, None] + (j64 * mask_sj)[None, :], mask=seen, other=0)
            if mask_ptr.dtype.element_ty == tl.int1:
                seen = seen & bias
            else:
                if mask_ptr.dtype.element_ty == tl.float64:  # what is finite must stay so in float32
                    bias = tl.where(bias > float("-inf"), tl.maximum(bias, -3.4028234663852886e38), bias)
                bias = bias.to(tl.float32)
                seen = seen & (bias > float("-inf"))
                # The least float32 is a legal bias. (Hence exp: scores times log2(e) for exp2 would make it -inf.)
                s += bias
        # Whatever a key that the row does not see holds, its score ends here.
        s = tl.where(seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        p = tl.exp(s - base[:, None])
        decay = tl.exp(m - base)
        m = m_new
        l = l * decay + tl.sum(p, 1)

        v_mask = (j < stop)[:, None] & (dv < DV)[None, :]
        v = tl.load(v_ptr + (j64 * v_sj * UNIT)[:, None] + dv[None, :], mask=v_mask, other=0.0)
        if GAPS:  # p is 0 in them, but 0 * NaN is not
            v = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)

    if scratch_ptr is None:
        total = tl.where(l == 0.0, 1.0, l)
        out_at = ((b64 * q_len + i) * (KV_HEADS * GROUP) + head) * DV
        tl.store(
            out_ptr + out_at[:, None] + dv[None, :],
            (acc / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (dv < DV)[None, :],
        )
        if lse_ptr is not None:
            lse = m + tl.log(total)  # m is -inf where l is 0
            tl.store(lse_ptr + (b64 * (KV_HEADS * GROUP) + head) * q_len + i, lse, mask=valid)
    else:
        count = q_len * GROUP
        parts = tl.num_programs(0).to(tl.int64) * splits * count
        part = (tile.to(tl.int64) * splits + split) * count + r
        # Without work: no acc, only the l of 0 that makes the combine kernel stop short of it.
        written = r < tl.where(start < stop, count, 0)
        acc_mask = written[:, None] & (dv < DV)[None, :]
        tl.store(scratch_ptr + part[:, None] * DV + dv[None, :], acc, mask=acc_mask)
        tl.store(scratch_ptr + parts * DV + part, m, mask=valid)
        tl.store(scratch_ptr + parts * (DV + 1) + part, l, mask=valid)


def bind(problem: Problem, call: Call, launch: Launch) -> Runner:
    """See `Backend.bind`."""
    plain, p = _plain(problem, call)
    if plain is call:
        return _Bound(p, call, launch)

    def run(call: Call) -> tuple[Tensor, Tensor | None]:
        plain, p = _plain(problem, call)
        out, lse = _Bound(p, plain, launch)(plain)
        return out.to(problem.dtype), lse

    return run


def _plain(p: Problem, call: Call) -> tuple[Call, Problem]:
    """The call, what the kernel cannot read in place copied; the same object if there is no such thing."""
    if p.device == "cpu" and p.dtype == torch.bfloat16:  # Triton's interpreter multiplies bfloat16's bits as integers
        q, k, v = (x.float() for x in call[:3])
        return _plain(replace(p, dtype=torch.float32), call._replace(q=q, k=k, v=v))
    changed: dict[str, Any] = {}
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        if x.stride(3) != 1:
            changed[name] = x.contiguous()
    for name in ("sinks", "q_lengths", "kv_lengths"):
        x = getattr(call, name)
        if x is not None and not x.is_contiguous():
            changed[name] = x.contiguous()
    if call.lo is not None and call.hi is not None and call.lo.stride() != call.hi.stride():
        changed |= {"lo": call.lo.contiguous(), "hi": call.hi.contiguous()}
    return call._replace(**changed) if changed else call, p


class _Bound:
    """The kernels bound to one problem and one set of strides."""

    __slots__ = ("_attend", "_combine", "_lse", "_out", "_problem", "_scratch", "_softcap")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        self._problem = p
        device, tiles, count = call.q.device, p.batch * p.kv_heads, rows(p)
        self._out = (p.batch, p.q_heads, p.q_len, p.value_dim), token_major_strides(p.q_heads, p.q_len, p.value_dim)
        self._lse = (p.batch, p.q_heads, p.q_len) if p.return_lse else None
        self._softcap = p.softcap or None
        integers, constants = _arguments(p, launch, call)
        grid = (tiles, launch.splits)
        self._attend = {
            precision: Launcher(
                attend_kernel,
                grid,
                device,
                integers,
                (*constants, precision),
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
            for precision in (("ieee", "tf32") if p.dtype == torch.float32 else ("ieee",))
        }
        self._scratch = 4 * tiles * launch.splits * count * (p.value_dim + 2) if launch.splits > 1 else 0  #: bytes
        self._combine = Launcher(
            combine_kernel,
            (tiles, count),
            device,
            (p.q_len, launch.splits),
            # the last: splits read at a time, so that they fill 32 registers a thread
            (p.kv_heads, p.group, p.value_dim, launch.block_dv, MAX_SPLITS, 4096 // launch.block_dv),
            num_warps=4,
        )

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, call.q
        out = torch.empty_strided(*self._out, dtype=p.dtype, device=q.device)
        lse = torch.empty(self._lse, dtype=torch.float32, device=q.device) if self._lse else None
        parts = scratch(q.device, self._scratch).view(torch.float32) if self._scratch else None
        self._attend[_precision(p.dtype)](
            (q, call.k, call.v, out, lse, parts, *call[3:9]),
            (call.scale, self._softcap),
        )
        if parts is not None:
            self._combine((parts, out, lse, call.sinks))
        return out, lse


def _arguments(p: Problem, launch: Launch, call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kernel's integers and constants."""
    flat = [stride for x in call[:3] for stride in x.stride()[:3]]
    # A stride known to be a multiple of 8 lets 16 bytes be loaded at once.
    unit = 1 if any(stride % 8 for stride in flat) else 8
    far = p.q_len + p.kv_len  # as good as open, and no position overflows by it
    left, right = (far if side < 0 else min(side, far) for side in (p.left, p.right))
    integers = (
        *(stride // unit for stride in flat),
        *_broadcast_strides(p.mask_shape, None if call.mask is None else call.mask.stride(), 4),
        *_broadcast_strides(p.mask_shape, None if call.lo is None else call.lo.stride(), 2),
        p.q_len,
        p.kv_len,
        left,
        right,
    )
    blocks = (launch.block_m, launch.block_n, launch.block_d, launch.block_dv)
    gaps = p.dense_mask or (p.mask == "intervals" and p.mask_shape[1] > 1)
    return integers, (p.kv_heads, p.group, p.head_dim, p.value_dim, *blocks, unit, gaps)


def _broadcast_strides(shape: tuple[int, ...], strides: tuple[int, ...] | None, dims: int) -> tuple[int, ...]:
    """The strides, 0 along the dims that are broadcast."""
    if strides is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user let torch's own use TF32. Other dtypes have only one way."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
