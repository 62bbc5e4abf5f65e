"""Which rank holds which tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("head-tail", "contiguous")


class Span(NamedTuple):
    """The indices `[start, stop)`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` tokens cut into chunks of (all but) equal size, of which each rank holds some.

    "head-tail": 2 x ranks chunks; rank r holds the chunks r and 2 x ranks - 1 - r, one from each end, so that under a
    causal mask all ranks have the same work. "contiguous": one chunk per rank. No token is padding: the sizes of
    chunks differ by one where the length is no multiple, and some are empty where there are fewer tokens than chunks.
    """

    length: int
    ranks: int
    order: str = "head-tail"

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self.ranks * self.per_rank

    @property
    def per_rank(self) -> int:
        return 2 if self.order == "head-tail" else 1

    @cached_property
    def chunks(self) -> tuple[Span, ...]:
        """All chunks, in the order of the sequence."""
        cuts = [i * self.length // self.count for i in range(self.count + 1)]
        return tuple(Span(a, b) for a, b in pairwise(cuts))

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk."""
        return max(chunk.size for chunk in self.chunks)

    def owner(self, chunk: int) -> tuple[int, int]:
        """The rank that holds a chunk, and the chunk's index among that rank's."""
        return (chunk, 0) if chunk < self.ranks else (2 * self.ranks - 1 - chunk, 1)

    def held(self, rank: int) -> tuple[Span, ...]:
        """The chunks of a rank, ascending."""
        if self.order == "contiguous":
            return (self.chunks[rank],)
        return self.chunks[rank], self.chunks[2 * self.ranks - 1 - rank]

    def size(self, rank: int) -> int:
        """Tokens of a rank."""
        return sum(chunk.size for chunk in self.held(rank))

    def pieces(self, rank: int) -> tuple[Span, ...]:
        """The rank's chunks as spans of the tokens that it holds."""
        first, *rest = self.held(rank)
        return (Span(0, first.size), *(Span(first.size, first.size + chunk.size) for chunk in rest))

    def positions(self, rank: int) -> Tensor:
        """int64 `[tokens of the rank]`, ascending, on the CPU."""
        return torch.cat([torch.arange(*chunk) for chunk in self.held(rank)])

    def take(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's part of a whole tensor, a copy."""
        return torch.cat([x.narrow(dim, chunk.start, chunk.size) for chunk in self.held(rank)], dim)

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """The whole tensor from the ranks' parts, which may be longer than the tokens that they hold."""
        found = []
        for chunk in range(self.count):
            rank, index = self.owner(chunk)
            piece = self.pieces(rank)[index]
            found.append(parts[rank].narrow(dim, piece.start, piece.size))
        return torch.cat(found, dim)
