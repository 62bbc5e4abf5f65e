"""Bad arguments are named before anything is sent; what shards are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fastattn import Segments
from fastattn.parallel import ContextParallel


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def complaints() -> dict[str, str]:
    cp, q = ContextParallel(), torch.randn(1, 4, 8, 8)
    two_rows, table = torch.randn(2, 4, 8, 8), torch.zeros(5, 2, dtype=torch.int32)

    def attend(x: Tensor = q, **options: Any) -> str:
        return said_by(lambda: cp.attention(x, x, x, **({"length": 16} | options)))

    return {
        "mesh: expected one dimension": said_by(lambda: ContextParallel(init_device_mesh("cpu", (2, 1)))),
        "mesh: expected a DeviceMesh": said_by(lambda: ContextParallel("all")),  # type: ignore[arg-type]
        "strategy: expected auto, ulysses, ring, allgather, got 'best'": attend(strategy="best"),
        "strategy: expected auto, ulysses, ring, allgather, got 'x'": said_by(lambda: ContextParallel(strategy="x")),
        "order: expected head-tail or contiguous": said_by(lambda: ContextParallel(order="zigzag")),
        "length: expected the number of tokens": attend(length=16.0),
        "q: expected the 10 of 20 tokens that rank": attend(length=20),
        'mask: expected None, "causal" or Segments': attend(mask=torch.ones(8, 8, dtype=torch.bool)),
        "mask.table: expected [3, segments], got [5, 2]": attend(mask=Segments(table)),
        "cu_seqlens: expected None beside Segments": attend(mask=Segments(table[:3]), cu_seqlens=(0, 16)),
        "cu_seqlens: expected one batch entry, got 2": attend(two_rows, cu_seqlens=(0, 16)),
        "cu_seqlens: expected ascending numbers within 0..16": attend(cu_seqlens=(0, 9, 7, 16)),
        "softcap: expected None": attend(softcap=-1.0),
        '"ulysses" needs a number of query heads that 2 ranks divide, got 3': attend(q[:, :3], strategy="ulysses"),
    }


def test_bad_arguments_are_named(two: Ranks) -> None:
    for found in two.run(complaints):
        for expected, text in found.items():
            assert expected in text


def parts() -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    cp, ids = ContextParallel(), torch.arange(10, 23)[None]
    return cp.shard(ids, 1), cp.positions(13), cp.targets(ids), cp.unshard(cp.shard(ids, 1), 1, 13)


def test_shards_positions_and_targets(two: Ranks) -> None:
    answers = two.run(parts)
    for ids, positions, targets, whole in answers:
        assert torch.equal(ids, positions + 10)
        assert torch.equal(whole, torch.arange(10, 23)[None])
        # Each token predicts the next one, wherever that is; the last one predicts nothing.
        want = torch.where(ids == 22, -100, ids + 1)
        assert torch.equal(targets["shift_labels"], want)
        assert float(targets["num_items_in_batch"]) == 12 / 2
    assert sorted(torch.cat([a[1] for a in answers], 1)[0].tolist()) == list(range(13))


def in_pairs() -> Tensor:
    """Two groups of two: each attends to itself alone."""
    cp = ContextParallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"], strategy="ring")
    row = dist.get_rank() // 2
    x = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(row), dtype=torch.float64)
    q = cp.shard(x, 2)
    return cp.unshard(cp.attention(q, q, q, length=16, mask="causal"), 2, 16)  # type: ignore[arg-type]


def test_a_dimension_of_a_mesh(four: Ranks) -> None:
    import fastattn

    for rank, found in enumerate(four.run(in_pairs)):
        x = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(rank // 2), dtype=torch.float64)
        torch.testing.assert_close(found, fastattn.scaled_dot_product_attention(x, x, x, mask="causal"))


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ContextParallel()
