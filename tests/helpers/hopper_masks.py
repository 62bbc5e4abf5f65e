"""Masks by row and by key, drawn at random, for calls of the Hopper forward: on a GPU and in its model."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import Intervals, Segments

#: What is drawn. Segments: end to end, left padded, chunks at the end of what a cache holds, with room in between, with
#: bounds outside of the tensors. Intervals: any, one for each entry, such that some keys in between are seen by no row.
#: Of tensors: padding, holes, biases, and the values that stand for -inf.
MASKS = ("packed", "left", "chunks", "gaps", "wild", "intervals", "entry", "holes", "bool", "bias", "edge")


#: Tensor masks with a row for each query, by name: their dtypes. What they hide is drawn: nothing, what a causal mask
#: or a prefix does, squares, some keys, all; some rows see nothing. "odd": the copy engine does not read the layout.
ROWS = {"rows-bool": torch.bool, "rows-bf16": torch.bfloat16, "rows-fp16": torch.float16, "rows-fp32": torch.float32}
ROWS |= {f"{name}-odd": dtype for name, dtype in ROWS.items()}


class Mask(NamedTuple):
    fields: dict[str, Tensor]  #: of the Call
    argument: Any  #: of the op, for `naive`
    q_len: int  #: as many as Segments of one length for both have, else as drawn


def draw(name: str, rng: random.Random, batch: int, heads: int, q_len: int, kv_len: int, device: str) -> Mask:
    if name in ("packed", "left", "chunks", "gaps", "wild"):
        columns = [column for b in range(batch) for column in _segments(name, rng, b, q_len, kv_len)]
        if name in ("gaps", "wild"):
            columns = [x for x in columns if rng.random() < 0.85]
        if name == "wild" and columns:
            columns[0][1] = columns[0][3] = -7
            columns[-1][2] += 1000
            columns[-1][4] += 1000
        table = torch.tensor(columns, dtype=torch.int32, device=device).reshape(-1, 5).mT
        if q_len == kv_len and torch.equal(table[1:3], table[3:5]) and rng.random() < 0.5:
            table = table[:3]
        return Mask({"segments": table}, Segments(table), q_len)
    if name in ("intervals", "entry", "holes", "rooms"):
        lo, hi = _intervals(name, rng, batch, q_len, kv_len)
        both = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lo, hi)]
        return Mask({"lo": both[0], "hi": both[1]}, Intervals(*both), q_len)
    if name in ROWS:
        mask = _row_mask(name, rng, batch, heads, q_len, kv_len, device)
        return Mask({"mask": mask}, mask, q_len)
    mask = _key_mask(name, rng, batch, heads, kv_len).to(device)
    return Mask({"mask": mask}, mask, q_len)


def _segments(name: str, rng: random.Random, b: int, q_len: int, kv_len: int) -> list[list[int]]:
    if name == "left":
        pad = rng.choice((0, kv_len, rng.randint(0, kv_len), rng.randint(0, kv_len)))
        return [[b, max(pad - (kv_len - q_len), 0), q_len, pad, kv_len]]
    if name == "chunks":  # right-padded queries at the end of a row's keys
        keys, queries = rng.randint(0, kv_len), rng.randint(0, q_len)
        return [[b, 0, queries, 0, keys]]
    pieces = rng.choice((1, 2, 5, max(1, q_len // 30)))
    inner = [rng.randint(0, q_len) for _ in range(pieces - 1)]
    q_cuts = [0, *sorted(inner), q_len]
    kv_cuts = q_cuts if q_len == kv_len else [0, *sorted(rng.randint(0, kv_len) for _ in inner), kv_len]
    found = []
    for (q_first, q_end), (first, end) in zip(pairwise(q_cuts), pairwise(kv_cuts), strict=True):
        if name != "packed":  # aligned sequences: room after some
            q_end -= min(rng.choice((0, 0, 1, 7, 40)), q_end - q_first)
            end = q_end if q_len == kv_len else end - min(rng.choice((0, 0, 1, 7, 200)), end - first)
        found.append([b, q_first, q_end, first, end])
    return found


def _intervals(name: str, rng: random.Random, batch: int, q_len: int, kv_len: int) -> tuple[Any, Any]:
    entries, rows = rng.choice((1, batch)), 1 if name == "entry" else q_len
    if name == "rooms":
        return _rooms(rng, entries, q_len, kv_len)
    if name != "holes":
        lo = [[rng.randint(-5, kv_len) for _ in range(rows)] for _ in range(entries)]
        return lo, [[x + rng.choice((0, 1, 60, rng.randint(-9, kv_len + 9))) for x in row] for row in lo]
    lo, hi = [], []
    for _ in range(entries):
        here, low, high = rng.randint(0, kv_len), [], []
        for _ in range(rows):
            if rng.random() < 0.05:  # on to other keys
                here = rng.randint(0, kv_len)
            low.append(here)
            high.append(here + rng.choice((0, 1, 5, 90)))
        lo.append(low)
        hi.append(high)
    return lo, hi


def _rooms(rng: random.Random, entries: int, q_len: int, kv_len: int) -> tuple[Any, Any]:
    """For a backward, whose tiles of rows visit blocks of keys: rows see keys of one range, and between them lie whole
    tiles of rows that see nothing."""
    lo, hi = [], []
    for _ in range(entries):
        room, offset = rng.choice((100, 128, 190)), rng.randint(0, 63)
        first = rng.randint(0, kv_len - 1)
        end = rng.randint(first + 1, min(first + 200, kv_len))
        seeing = [(i + offset) // room % 2 == 0 for i in range(q_len)]
        lo.append([rng.randint(first, min(first + 3, end - 1)) if x else 0 for x in seeing])
        hi.append([end if x else 0 for x in seeing])
    return lo, hi


def _key_mask(name: str, rng: random.Random, batch: int, heads: int, kv_len: int) -> Tensor:
    shape = rng.choice((1, batch)), rng.choice((1, 1, heads)), 1, rng.choice((1, kv_len, kv_len, kv_len, kv_len))
    keys = torch.arange(kv_len)
    what = rng.choice(("padding", "padding", "holes", "nothing" if name == "edge" else "everything", "nothing"))
    seen = torch.rand(shape) < {"holes": 0.8, "nothing": 0.0}.get(what, 1.0)
    if what == "padding" and shape[3] > 1:
        first, end = sorted((rng.randint(0, kv_len), rng.randint(0, kv_len)))
        seen = ((keys >= first) & (keys < end)).expand(shape).clone()
        seen[-1] = keys < rng.randint(0, kv_len)
    if name == "bool":
        return seen
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32, torch.float64))
    if name == "edge":
        low = rng.choice((torch.finfo(dtype).min, -1e4, -torch.inf))
        return torch.zeros(shape, dtype=dtype).masked_fill_(~seen, low)
    values = (rng.choice((1.0, 5.0)) * torch.randn(shape)).to(dtype)
    return values.masked_fill_(~seen, rng.choice((-torch.inf, torch.finfo(dtype).min)))


def _row_mask(name: str, rng: random.Random, batch: int, heads: int, q_len: int, kv_len: int, device: str) -> Tensor:
    shape = rng.choice((1, batch)), rng.choice((1, 1, heads)), q_len, kv_len
    dtype = ROWS[name]
    rows = torch.arange(q_len, device=device)[:, None] + kv_len - q_len
    keys = torch.arange(kv_len, device=device)
    what = rng.choice(("everything", "causal", "causal", "prefix", "squares", "holes", "window", "nothing"))
    seen = {
        "everything": lambda: keys >= 0 * rows,
        "causal": lambda: keys <= rows,
        "prefix": lambda: (keys <= rows) | (keys < rng.randint(0, kv_len)),
        "squares": lambda: (keys // 160 + rows // 160) % 2 == 0,
        "holes": lambda: torch.rand(shape, device=device) < 0.8,
        "window": lambda: (keys > rows - 100) & (keys <= rows + 50),
        "nothing": lambda: keys < 0 * rows,
    }[what]()
    seen = seen.expand(shape).clone()
    seen[:, :, [rng.randrange(q_len) for _ in range(3)]] &= rng.random() < 0.5
    # Rows lie 16 bytes apart, or an odd number of elements.
    width = kv_len + 1 - kv_len % 2 if name.endswith("odd") else -(-kv_len // 16) * 16
    memory = torch.ones(*shape[:3], width, dtype=dtype, device=device)
    mask = memory[..., :kv_len]
    if dtype == torch.bool:
        mask.copy_(seen)
    else:
        kind = rng.choice(("zero", "random", "distance"))
        values = torch.zeros(shape, device=device)
        if kind == "random":
            values = rng.choice((1.0, 5.0)) * torch.randn(shape, device=device)
        elif kind == "distance":  # ALiBi
            slopes = 2.0 ** -(1 + torch.arange(shape[1], device=device) % 8)
            values = (slopes[:, None, None] * -(rows - keys).abs()).expand(shape)
        low = rng.choice((-torch.inf, -torch.inf, torch.finfo(dtype).min, -1e4))
        mask.copy_(values.to(dtype).masked_fill(~seen, low))
    if rng.random() < 0.3:  # expanded, or stored as other tensors are
        mask = (
            mask.expand(batch, heads, -1, -1)
            if rng.random() < 0.5
            else mask.transpose(0, 1).contiguous().transpose(0, 1)
        )
        if not name.endswith("odd") and mask.stride(2) % 16:
            mask = memory[..., :kv_len]
    return mask


def hidden(mask: Tensor) -> Tensor:
    """Keys `[B|1, 1, Skv, 1]` that a mask hides from all queries of all heads."""
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return ~seen.any(2, keepdim=True).any(1, keepdim=True).mT


def unseen_by_head(visible: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """As `unseen`, where heads differ: queries `[B, H, Sq, 1]`, and keys `[B, Hkv, Skv, 1]` that no query of their
    group of heads sees. visible: bool `[B, H or 1, Sq, Skv]`."""
    visible = visible.expand(-1, heads, -1, -1)
    keys = visible.any(2).unflatten(1, (kv_heads, heads // kv_heads)).any(2)
    return ~visible.any(3, keepdim=True), ~keys[..., None]


def unseen(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[B, 1, Sq, 1]` that see no key, and keys `[B, 1, Skv, 1]` that no query sees. visible: bool
    `[B, 1, Sq, Skv]`."""
    return ~visible.any(3, keepdim=True), ~visible.any(2, keepdim=True).mT
