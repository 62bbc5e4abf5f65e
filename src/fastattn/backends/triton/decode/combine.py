"""The second kernel of split-KV attention: puts together what the splits of one tile left behind.

(Where rows and splits are few, the last program of a tile to be done does it in eager calls, and spares a launch: see
`counting.py`. Measured on an H100, with one load of all rows and splits at once: 4% less time for 8x2048 and 1% for
8x8192, where a tile has two splits; 6% more for 1x2048, 6% for 64/8 heads against 8192, where it has 16: one SM then
reads what here each row's program reads its part of.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def located(splits, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """What this program's row is: its batch entry, its query, its head; where its first split is among all rows of all
    splits; how many these are."""
    tile = tl.program_id(0)
    r = tl.program_id(1)
    count = tl.num_programs(1)
    b = (tile // KV_HEADS).to(tl.int64)
    i = r // GROUP
    head = (tile % KV_HEADS) * GROUP + r % GROUP
    part = tile.to(tl.int64) * splits * count + r
    every = tl.num_programs(0).to(tl.int64) * splits * count
    return b, i, head, part, every


@triton.jit
def store_row(out_ptr, lse_ptr, out, m, total, dv, b, i, head, q_len, HEADS: tl.constexpr, DV: tl.constexpr):
    """Columns of a row of the output, and by one program its log-sum-exp. total: of exp(score - m), not 0."""
    out_at = ((b * q_len + i) * HEADS + head) * DV
    tl.store(out_ptr + out_at + dv, (out / total).to(out_ptr.dtype.element_ty), mask=dv < DV)
    if lse_ptr is not None:
        lse_at = lse_ptr + (b * HEADS + head) * q_len + i
        tl.store(lse_at, m + tl.log(total), mask=tl.program_id(2) == 0)


@triton.jit(do_not_specialize=["q_len", "splits"])
def combine_kernel(
    scratch_ptr,  # float32: acc [B * Hkv, splits, rows, Dv], then m and l [B * Hkv, splits, rows] each
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    sinks_ptr,
    q_len,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,  # columns of a program
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits read at a time
    PDL: tl.constexpr,
):
    """Columns of one row of one tile: out = sum of exp(m_s - m) acc_s over sum of exp(m_s - m) l_s; a sink adds
    exp(sink - m).

    m, l and acc are those of a running softmax: the row's greatest score, the sum of exp(score - m), and the values so
    weighted. Their log-sum-exp alone would not do: m + log(l) loses l where m is as large as a mask's finfo.min.
    """
    if PDL:  # waits for the first kernel's end; then the one after this one may get ready, to wait for this one's end
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, i, head, part, every = located(splits, KV_HEADS, GROUP)
    count = tl.num_programs(1)
    dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_ptr = scratch_ptr + every * DV + part
    l_ptr = m_ptr + every

    s = tl.arange(0, MAX_SPLITS)
    m_s = tl.load(m_ptr + s * count, mask=s < splits, other=float("-inf"))
    l_s = tl.load(l_ptr + s * count, mask=s < splits, other=0.0)
    # Splits without work come last and left no acc. (l is NaN, not 0, where the row saw a NaN: that has to show.)
    used = tl.max(tl.where(l_s != 0.0, s + 1, 0), 0)
    m = tl.max(m_s, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = tl.maximum(m, sink)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp(m_s - base) * l_s, 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - base)
    total = tl.where(total == 0.0, 1.0, total)

    out = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(0, used, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        weight = tl.exp(tl.load(m_ptr + c * count, mask=c < used, other=float("-inf")) - base)
        acc = tl.load(
            scratch_ptr + (part + c * count)[:, None] * DV + dv[None, :],
            mask=(c < used)[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        out += tl.sum(weight[:, None] * acc, 0)

    store_row(out_ptr, lse_ptr, out, m, total, dv, b, i, head, q_len, KV_HEADS * GROUP, DV)
