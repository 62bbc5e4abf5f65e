"""What the mask of a whole sequence says, read from its arguments. (No processes: one rank's part of two.)"""

from __future__ import annotations

import pytest
import torch

from fastattn import Segments
from fastattn.parallel.layout import Layout
from fastattn.parallel.plan import Pattern
from fastattn.parallel.sequence import pattern_of

CUTS = [0, 5, 9, 16]


def read(mask: Segments) -> Pattern:
    x = torch.randn(1, 2, 8, 8)
    return pattern_of(Layout(16, 2), 0, x, x, x, mask, None, None, None, None, None)[0]


@pytest.mark.parametrize("causal", [False, True])
def test_segments_with_and_without_batch_entries(causal: bool) -> None:
    cu = torch.tensor(CUTS, dtype=torch.int32)
    packed = Segments.packed(cu, causal=causal)
    with_entries = Segments(torch.cat([torch.zeros_like(packed.table[:1]), packed.table]), causal)
    for mask in (packed, with_entries):
        found = read(mask)
        assert found.segments == ((0, 0, 5), (0, 5, 9), (0, 9, 16))
        assert found.right == (0 if causal else -1)


def test_queries_and_keys_apart_are_refused() -> None:
    cu = torch.tensor(CUTS, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^mask.table: expected \[3, segments\], got \[4, 3\]"):
        read(Segments.packed(cu, cu.clone()))
