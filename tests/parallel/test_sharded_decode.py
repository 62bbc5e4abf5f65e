"""Decode against a cache that is spread over ranks is decode against the whole cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import relative_error
from ranks import Ranks
from torch import Tensor

import fastattn
from fastattn.parallel import ContextParallel

HELD = (13, 0, 20, 4)  #: tokens in each rank's part; capacity is more


def cache(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    total = sum(HELD)
    shapes = [(2, 6, 2, 16), (2, 2, total, 16), (2, 2, total, 8), (6,)]
    q, k, v, sinks = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    return q, k, v, sinks


def part(x: Tensor, rank: int, capacity: int) -> Tensor:
    """What a rank holds, and NaN in the rest of its capacity."""
    start = sum(HELD[:rank])
    found = x.new_full((*x.shape[:2], capacity, x.shape[3]), torch.nan)
    found[:, :, : HELD[rank]] = x[:, :, start : start + HELD[rank]]
    return found


def decoded(with_sinks: bool, softcap: float | None) -> tuple[Tensor, Tensor]:
    cp = ContextParallel()
    q, k, v, sinks = cache()
    lengths = torch.full((2,), HELD[cp.rank], dtype=torch.int32)
    out, lse = cp.decode(
        q, part(k, cp.rank, 24), part(v, cp.rank, 24), kv_lengths=lengths, sinks=sinks if with_sinks else None,
        softcap=softcap, scale=0.3, return_lse=True,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize("with_sinks, softcap", [(False, None), (True, None), (True, 1.0)])
def test_the_parts_add_up(with_sinks: bool, softcap: float | None, four: Ranks) -> None:
    q, k, v, sinks = cache()
    want, want_lse = fastattn.scaled_dot_product_attention(
        q, k, v, sinks=sinks if with_sinks else None, softcap=softcap, scale=0.3, return_lse=True, backend="reference"
    )
    for out, lse in four.run(decoded, with_sinks, softcap):
        assert relative_error(out, want) < 1e-12
        assert relative_error(lse, want_lse) < 1e-12


def nothing_cached() -> Any:
    cp, q = ContextParallel(), torch.randn(1, 2, 1, 8)
    return cp.decode(q, q[:, :, :0], q[:, :, :0], return_lse=True)


def test_an_empty_cache_gives_zero(two: Ranks) -> None:
    for out, lse in two.run(nothing_cached):
        assert not out.any() and bool((lse == -torch.inf).all())


def generators_layout(dtype: torch.dtype) -> tuple[Tensor, torch.dtype, tuple[int, ...]]:
    cp = ContextParallel()
    q, k, v, _ = cache(torch.float32)
    lengths = torch.full((2,), HELD[cp.rank], dtype=torch.int32)
    out = cp.decode(q.to(dtype), part(k.to(dtype), cp.rank, 24), part(v.to(dtype), cp.rank, 24), kv_lengths=lengths)
    assert isinstance(out, Tensor)
    return out.float(), out.dtype, out.stride()


def test_half_precision_is_merged_in_float32(four: Ranks) -> None:
    q, k, v, _ = (x.bfloat16() for x in cache(torch.float32))
    want = fastattn.scaled_dot_product_attention(q.double(), k.double(), v.double(), backend="reference")
    for out, dtype, strides in four.run(generators_layout, torch.bfloat16):
        assert relative_error(out, want) < 4e-3
        assert dtype == torch.bfloat16
        assert strides == (2 * 6 * 8, 8, 6 * 8, 1)  # token-major, as the op's
