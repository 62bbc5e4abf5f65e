"""The Hopper forward for wide heads in the machine of `hopper_model`: its own source, without a GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hopper_model import Descriptor, Model, Pointer, Value

FILES = (
    "../hopper/tiles", "../hopper/turns", "parts", "tiles", "output", "producer", "consumer", "forward",
)  # fmt: skip


class ManyHeads:
    """What the copy engine knows of queries [B, H, S, D] that it reads of several heads together."""

    layout = None
    size = 2

    def __init__(self, x: Any, together: int, queries: int, columns: int, dtype: Any) -> None:
        self.x, self.together, self.queries, self.columns, self.dtype = x, together, queries, columns, dtype
        self.rows = together * queries

    def box(self, place: list[Any]) -> tuple[Any, slice, slice]:
        b, h, row, column = (int(x) for x in place)
        found = np.zeros((self.together, self.queries, self.columns), np.float32)
        part = self.x[b, h : h + self.together, max(row, 0) : row + self.queries, column : column + self.columns]
        found[: part.shape[0], : part.shape[1], : part.shape[2]] = part
        return found.reshape(self.rows, self.columns), slice(None), slice(None)


def forward(
    call: Any, rng: random.Random, programs: int, same: bool = False, splits: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a call, as the kernel computes them. Outputs and scratch memory begin as NaN."""
    from dataclasses import replace

    from fastattn.backends.triton.hopper_wide import launch, schedule
    from fastattn.call import Problem

    p = replace(Problem.of(call), return_lse=True)
    grid = schedule.grid_of(p, 4, same)
    grid = replace(grid, splits=splits, items=grid.items // grid.splits * splits)
    flags = launch.flags(p, splits > 1, same, None if call.sinks is None else call.sinks.dtype)
    out = torch.full((p.batch, p.q_len, p.q_heads, p.value_dim), torch.nan)
    lse = torch.full((p.batch, p.q_heads, p.q_len), torch.nan)
    parts = torch.full((p.batch * p.q_heads * p.q_len * splits * (p.value_dim + 2),), torch.nan)

    def pointer(x: Any) -> Any:
        return None if x is None else Pointer((x.float() if x.is_floating_point() else x).numpy())

    def queries(columns: int) -> ManyHeads:
        return ManyHeads(call.q.float().numpy(), launch.ROWS // grid.queries, grid.queries, columns, flags.dtype)

    def keys(x: torch.Tensor, columns: int) -> Descriptor:
        return Descriptor(x.float().numpy(), launch.KEYS, columns, flags.dtype)

    names = (
        "batch", "kv_heads", "group", "q_len", "kv_len", "left", "right", "rows", "queries", "blocks", "splits", "dv8",
    )  # fmt: skip
    integers = dict(zip(names, launch.integers(p, grid), strict=True))
    inner, scale = launch.scales(p, call.scale)
    arguments = {
        "q_desc": queries(256), "q_rest_desc": queries(64) if flags.rest else None, "k_desc": keys(call.k, 256),
        "k_rest_desc": keys(call.k, 64) if flags.rest else None, "v_desc": None if same else keys(call.v, 256),
        "out_ptr": Pointer(out.view(-1).numpy(), element=flags.dtype),
        "lse_ptr": Pointer(lse.view(-1).numpy()) if flags.lse else None,
        "sinks_ptr": pointer(call.sinks) if flags.sinks else None, "q_lengths_ptr": pointer(call.q_lengths),
        "kv_lengths_ptr": pointer(call.kv_lengths), "scratch_ptr": Pointer(parts.numpy()) if splits > 1 else None,
        **{name: Value(x) for name, x in integers.items()}, "inner": Value(np.float32(inner)),
        "scale": Value(np.float32(scale)), "REST": flags.rest, "SAME": same, "BAND": flags.band,
        "SPLIT": flags.split, "Q_LENGTHS": flags.q_lengths, "KV_LENGTHS": flags.kv_lengths,
        "SINKS": bool(flags.sinks), "SOFTCAP": flags.softcap, "LSE": flags.lse,
    }  # fmt: skip
    Model("hopper_wide", FILES).launch(min(programs, grid.items), rng, arguments, "wide_kernel")
    if splits > 1:
        out, lse = _combined(parts, call.sinks, p, splits)
    return out.transpose(1, 2), lse


def _combined(
    parts: torch.Tensor, sinks: torch.Tensor | None, p: Any, splits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `combine.py` makes of what the splits leave, which Triton's interpreter would take minutes for."""
    rows = p.batch * p.kv_heads, splits, p.q_len, p.group
    acc, m, total = parts.split([x * parts.numel() // (p.value_dim + 2) for x in (p.value_dim, 1, 1)])
    m, total = m.view(rows), total.view(rows)
    top = m.amax(1)
    sink = None
    if sinks is not None:
        sink = sinks.view(1, p.kv_heads, 1, p.group).expand(p.batch, -1, p.q_len, -1).flatten(0, 1)
        top = torch.maximum(top, sink)
    base = torch.where(top.isinf(), 0.0, top)
    weights = (m - base[:, None]).exp()
    found = (weights[..., None] * acc.view(*rows, p.value_dim)).sum(1)
    total = (weights * total).sum(1) + (0.0 if sink is None else (sink - base).exp())
    found = found / torch.where(total == 0, 1.0, total)[..., None]
    lse = torch.where(total == 0, -torch.inf, base + total.log())
    heads = p.batch, p.kv_heads, p.q_len, p.group
    lse = lse.view(heads).transpose(2, 3).reshape(p.batch, p.q_heads, p.q_len)
    return found.view(*heads, p.value_dim).transpose(1, 2).reshape(p.batch, p.q_len, p.q_heads, -1), lse
