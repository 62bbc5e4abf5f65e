"""flash-attn's documented rules, written down plainly in float64 for one sequence: the reference of its tests.

Each head and each query is a step of a loop, so that every rule is a line. It shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """What a call asks for."""

    scale: float | None = None
    causal: bool = False
    window: tuple[Any, Any] = (-1, -1)
    softcap: float = 0.0


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """q `[Sq, Hq, D]`, k, v `[Skv, Hkv, D]`, slopes and sinks `[Hq]`, nobody sees the keys before `first`.

    Returns the output `[Sq, Hq, Dv]` and the log-sum-exp `[Hq, Sq]`; gradients are autograd's.
    """
    queries, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    scale = dim**-0.5 if rules.scale is None else rules.scale
    left, right = (math.inf if side is None or side < 0 else side for side in rules.window)
    zero = (q.sum() + k.sum() + v.sum()) * 0.0  # of the graph, for rows that see nothing
    outs, lses = [], []
    for i in range(queries):
        p = i + keys - queries
        row_out, row_lse = [], []
        for h in range(heads):
            seen = [j for j in range(first, keys) if p - left <= j <= p + right and not (rules.causal and j > p)]
            key, value = k[seen, h * kv_heads // heads], v[seen, h * kv_heads // heads]
            s = torch.einsum("d,jd->j", q[i, h], key) * scale
            if rules.softcap > 0:
                s = rules.softcap * torch.tanh(s / rules.softcap)
            if slopes is not None:
                s = s - slopes[h] * torch.tensor([abs(p - j) for j in seen], dtype=s.dtype)
            logits = s if sinks is None else torch.cat([s, sinks[h : h + 1]])
            if logits.numel():
                lse = torch.logsumexp(logits, 0)
                row_out.append(torch.einsum("j,jd->d", torch.exp(s - lse), value) + zero)
            else:
                lse = zero - math.inf
                row_out.append(zero.expand(v.shape[2]))
            row_lse.append(lse)
        outs.append(torch.stack(row_out))
        lses.append(torch.stack(row_lse))
    if not queries:
        return q.new_zeros(0, heads, v.shape[2]) + zero, q.new_zeros(heads, 0) + zero
    return torch.stack(outs), torch.stack(lses, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, first: int, step: int, interleaved: bool) -> Tensor:
    """x `[S, H, D]`: token i rotated by the row `first + step * i` of the tables, number by number."""
    out, pairs = x.clone(), cos.shape[1]
    for i in range(x.shape[0]):
        for n in range(pairs):
            a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + pairs)
            c, s = cos[first + step * i, n].item(), sin[first + step * i, n].item()
            out[i, :, a] = x[i, :, a] * c - x[i, :, b] * s
            out[i, :, b] = x[i, :, a] * s + x[i, :, b] * c
    return out


#: Layouts of a tensor `[..., H, D]`: a function that gives the same numbers in other memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "head-major": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "last-stride-2": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 0), value=torch.nan)[..., 1:, 3:-5],
    "dim-major": lambda x: x.mT.contiguous().mT,
}
