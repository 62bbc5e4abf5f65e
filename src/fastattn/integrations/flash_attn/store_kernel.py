"""The kernel of `store.store`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...backends.triton.launcher import Launcher


def store(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, starts: Tensor, rows: Tensor | None, table: Tensor | None
) -> None:
    """See `store.store`: one launch for keys and values. The caches' and the new tokens' dtypes are the same."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, new, heads, dim = k.shape
    if not k.numel() or not keys.numel():
        return
    block_d = triton.next_power_of_2(max(dim, v.shape[3]))
    block = max(1, min(triton.next_power_of_2(new), 4096 // block_d))
    strides = [s for x in (keys, values) for s in x.stride()] + [s for x in (k, v) for s in x.stride()[:3]]
    pages = 1 if table is None else table.shape[1]
    launch = Launcher(
        _store,
        (batch * heads, -(-new // block)),
        k.device,
        (
            heads,
            new,
            keys.shape[0],
            keys.shape[1],
            pages,
            dim,
            v.shape[3],
            *((0, 0) if table is None else table.stride()),
            *strides,
        ),
        (rows is not None, table is not None, block, block_d),
        num_warps=4,
    )
    # Not read where the flags say so, but Triton wants a pointer.
    launch(
        (
            keys,
            values,
            k,
            v,
            starts.contiguous(),
            starts if rows is None else rows.contiguous(),
            starts if table is None else table,
        )
    )


@triton.jit(do_not_specialize=list(range(7, 7 + 9 + 14)))
def _store(  # type: ignore[no-untyped-def]
    keys, values, k, v, starts, rows, table, heads, new, cache_rows, size, pages, dim, value_dim, table_b, table_p,
    ck_b, ck_t, ck_h, ck_d, cv_b, cv_t, cv_h, cv_d, k_b, k_t, k_h, v_b, v_t, v_h,
    ROWS: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(starts + b) + i
    there = (i < new) & (position >= 0) & (position < pages * size)
    if PAGES:
        page = position // size
        row = tl.load(table + b * table_b + page.to(tl.int64) * table_p, mask=there, other=-1)
        position = position % size
    elif ROWS:
        row = tl.load(rows + b) + i * 0
    else:
        row = b.to(tl.int32) + i * 0
    there = there & (row >= 0) & (row < cache_rows)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    i64, row64, position64 = i.to(tl.int64), row.to(tl.int64), position.to(tl.int64)
    mask = there[:, None] & (d < dim)[None, :]
    x = tl.load(k + b * k_b + head * k_h + i64[:, None] * k_t + d[None, :], mask=mask)
    place = row64[:, None] * ck_b + position64[:, None] * ck_t + head * ck_h + d[None, :] * ck_d
    tl.store(keys + place, x, mask=mask)
    mask = there[:, None] & (d < value_dim)[None, :]
    x = tl.load(v + b * v_b + head * v_h + i64[:, None] * v_t + d[None, :], mask=mask)
    place = row64[:, None] * cv_b + position64[:, None] * cv_t + head * cv_h + d[None, :] * cv_d
    tl.store(values + place, x, mask=mask)
