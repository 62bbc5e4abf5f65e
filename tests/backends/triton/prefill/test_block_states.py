"""Which blocks of a tensor mask with rows count as hidden, partial or full, against the mask itself, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64
from torch import Tensor

from fastattn.backends.triton.prefill import lists
from fastattn.backends.triton.prefill.lists import Lists
from fastattn.call import Call, Problem
from fastattn.validation import Arguments, validated

BOOL = torch.bool
BLOCK = 16
HIDDEN, PARTIAL, FULL = 0, 1, 2


def a_call(mask: Tensor, batch: int, heads: int, **options: Any) -> Call:
    """A call under the mask `[B|1, H|1, Sq, Skv]`."""
    q, k = (torch.zeros(batch, heads, n, 16, device=mask.device) for n in mask.shape[2:])
    return validated(Arguments(q, k, k, mask=mask, **options), None)


def states(call: Call, block: int) -> Tensor:
    """As the kernel says: uint8 [batch, heads, row blocks, key blocks]."""
    found = Lists(Problem.of(call), call, block, block)
    memory = torch.full((-(-found.size // 16) * 16,), 7, dtype=torch.uint8, device=call.q.device)
    found(call, memory)
    count = *found.entries, found.row_blocks, found.key_blocks
    return found.states(memory)[: torch.Size(count).numel()].view(count).cpu()


def truth(call: Call, block: int) -> Tensor:
    """As the mask, the band and the lengths say."""
    p, mask = Problem.of(call), call.mask
    assert mask is not None
    mask = mask.cpu()
    queries, keys = (
        torch.full((p.batch,), n) if x is None else x.cpu().long().clamp(0, n)
        for x, n in ((call.q_lengths, p.q_len), (call.kv_lengths, p.kv_len))
    )
    batch = p.batch if len(mask) > 1 or call.q_lengths is not None or call.kv_lengths is not None else 1
    i, j = torch.arange(p.q_len)[:, None], torch.arange(p.kv_len)
    position = i + (keys - queries)[:batch, None, None]
    bounded = (i < queries[:batch, None, None]) & (j < keys[:batch, None, None])
    if p.left >= 0:
        bounded &= j >= position - p.left
    if p.right >= 0:
        bounded &= j <= position + p.right
    entries = mask.view(torch.uint8) != 0 if mask.dtype == BOOL else mask
    seen = entries if mask.dtype == BOOL else ~entries.isneginf()
    neutral = entries if mask.dtype == BOOL else entries == 0
    bounded = bounded[:, None]
    some = (seen & bounded).expand(batch, mask.shape[1], -1, -1)
    every = ((neutral & bounded) | ~bounded.any(-1, keepdim=True)).expand(batch, mask.shape[1], -1, -1)
    found = torch.empty(batch, mask.shape[1], -(-p.q_len // block), -(-p.kv_len // block), dtype=torch.uint8)
    for m in range(found.shape[2]):
        for n in range(found.shape[3]):
            rows, columns = slice(m * block, (m + 1) * block), slice(n * block, (n + 1) * block)
            whole = every[..., rows, columns].all(-1).all(-1) & ((n + 1) * block <= p.kv_len)
            found[..., m, n] = torch.where(whole, FULL, PARTIAL)
            found[..., m, n].masked_fill_(~some[..., rows, columns].any(-1).any(-1), HIDDEN)
    return found


def the_same(mask: Tensor, batch: int, heads: int, block: int = BLOCK, **options: Any) -> Tensor:
    call = a_call(mask, batch, heads, **options)
    want = truth(call, block)
    assert torch.equal(states(call, block), want)
    return want


def filled(shape: tuple[int, ...], value: Any, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def patchwork(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Blocks of all kinds: hidden, neutral, mixed, each of them with and without one entry that is otherwise."""
    rng = torch.Generator().manual_seed(seed)
    hide, neutral, other = (False, True, None) if dtype == BOOL else (-torch.inf, 0.0, -3.5)
    mask = torch.empty(shape, dtype=dtype)
    for b in range(shape[0]):
        for h in range(shape[1]):
            for m in range(0, shape[2], BLOCK):
                for n in range(0, shape[3], BLOCK):
                    tile = mask[b, h, m : m + BLOCK, n : n + BLOCK]
                    kind, odd, at = torch.randint(1 << 20, (3,), generator=rng).tolist()
                    if kind % 3 == 0:
                        picked = torch.rand(tile.shape, generator=rng) < 0.5
                        tile.copy_(
                            torch.where(picked, torch.tensor(hide, dtype=dtype), torch.tensor(neutral, dtype=dtype))
                        )
                    else:
                        tile.fill_(hide if kind % 3 == 1 else neutral)
                    if odd % 2:
                        values = [x for x in (hide, neutral, other) if x is not None]
                        tile[at % tile.shape[0], (at >> 8) % tile.shape[1]] = values[odd // 2 % len(values)]
    return mask.to(device)


def laid_out(mask: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The mask in several layouts."""
    keys = mask.shape[3]
    unit = 16 // mask.element_size()
    yield "contiguous", mask
    wide = torch.zeros(*mask.shape[:3], -(-keys // unit) * unit + unit, dtype=mask.dtype, device=mask.device)
    wide[..., :keys] = mask
    yield "rows 16 bytes apart", wide[..., :keys]
    wide = torch.zeros(*mask.shape[:3], -(-keys // unit) * unit + unit, dtype=mask.dtype, device=mask.device)
    wide[..., 1 : keys + 1] = mask
    yield "rows 16 bytes apart that begin elsewhere", wide[..., 1 : keys + 1]
    yield "transposed", mask.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every other key", torch.stack((mask, ~mask if mask.dtype == BOOL else -mask), -1)[..., 0]


BANDS: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": (40, 9)},
    "lengths": {"kv_lengths": (64, 33), "q_lengths": (53, 20)},
    "none": {"kv_lengths": (0, 80)},
    "causal": {"window": (-1, 0), "kv_lengths": (10, 80)},
}


@pytest.mark.parametrize("dtype", [BOOL, BF16, FP16, FP32, FP64], ids=str)
def test_layouts(dtype: torch.dtype, device: str, seed: int) -> None:
    found = set()
    for keys in (80, 75):
        mask = patchwork((1, 2, 37, keys), dtype, device, seed)
        for name, one in laid_out(mask):
            assert torch.equal(one, mask), name
            found |= set(the_same(one, 1, 2).unique().tolist())
    assert found == {HIDDEN, PARTIAL, FULL}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("dtype", [BOOL, BF16], ids=str)
def test_bands_and_lengths(dtype: torch.dtype, band: str, device: str, seed: int) -> None:
    options = {
        name: torch.tensor(x, dtype=torch.int32, device=device) if name.endswith("lengths") else x
        for name, x in BANDS[band].items()
    }
    found = set()
    for shape in ((2, 1, 53, 80), (1, 2, 37, 75)):  # one block for each program, and several
        found |= set(the_same(patchwork(shape, dtype, device, seed), 2, 2, **options).unique().tolist())
    assert found == {HIDDEN, PARTIAL, FULL}


@pytest.mark.parametrize("dtype", [BOOL, BF16, FP32], ids=str)
def test_broadcast_masks(dtype: torch.dtype, device: str, seed: int) -> None:
    """Strides of 0, along rows too."""
    mask = patchwork((1, 1, 53, 80), dtype, device, seed)
    the_same(mask, 2, 2)
    the_same(mask.expand(2, 2, -1, -1), 2, 2)
    the_same(mask[:, :, 3:4].expand(1, 2, 53, 80), 2, 2)
    the_same(
        mask[:, :, 3:4].expand(1, 2, 53, 80), 2, 2, kv_lengths=torch.tensor([80, 31], dtype=torch.int32, device=device)
    )


@pytest.mark.parametrize(
    "dtype, value, odd",
    [
        (BOOL, False, True),
        (BOOL, True, False),
        *((dtype, -torch.inf, odd) for dtype in (BF16, FP16, FP32, FP64) for odd in ("least", torch.nan)),
        *((dtype, 0.0, odd) for dtype in (BF16, FP16, FP32) for odd in (-torch.inf, "smallest")),
        (BF16, -torch.inf, 0.0),
        (FP64, -torch.inf, -1e300),
    ],
    ids=str,
)
def test_one_entry_makes_a_block_partial(dtype: torch.dtype, value: Any, odd: Any, device: str, seed: int) -> None:
    """Wherever it is: what is looked at first decides only what it can."""
    if isinstance(odd, str):
        odd = torch.finfo(dtype).min if odd == "least" else torch.finfo(dtype).smallest_normal
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(BLOCK * BLOCK, generator=generator)[:128].view(2, 4, 16).to(device)
    mask = filled((1, 2, 5 * BLOCK, 16 * BLOCK), value, dtype, device)  # the last row of blocks has no such entry
    h, m, n = (torch.arange(size, device=device) for size in places.shape)
    m, n = m[:, None] * BLOCK, n * BLOCK
    mask[0, h[:, None, None], m + places // BLOCK, n + places % BLOCK] = odd
    want = the_same(mask, 1, 2)
    whole = HIDDEN if value is False or value == -torch.inf else FULL
    assert (want[..., :4, :] == PARTIAL).all() and (want[..., 4, :] == whole).all()


def test_signs_of_zeros_and_other_bytes(device: str) -> None:
    for dtype in (BF16, FP16, FP32, FP64):
        mask = filled((1, 2, 32, 48), 0.0, dtype, device)
        mask[..., ::2] = -0.0
        assert (the_same(mask, 1, 2) == FULL).all()
        assert (the_same(filled((1, 2, 32, 48), torch.inf, dtype, device), 1, 2) == PARTIAL).all()
    data = torch.randint(1, 256, (1, 2, 32, 48), dtype=torch.uint8, device=device)
    assert (the_same(data.view(BOOL), 1, 2) == FULL).all()


def test_blocks_of_the_sizes_of_a_gpu(device: str, seed: int) -> None:
    """ALiBi, and a window of it, whose visible entries are in none of a block's corners."""
    i, j = torch.arange(200, device=device)[:, None], torch.arange(256, device=device)
    for dtype in (BF16, FP32):
        slopes = torch.tensor([0.5, 0.01], device=device)[:, None, None]
        bias = (-slopes * (i + 56 - j)).masked_fill(j > i + 56, -torch.inf)
        the_same(bias.to(dtype)[None], 1, 2, 64)
        the_same(bias.masked_fill((i + 56 - j > 9), -torch.inf).to(dtype)[None], 1, 2, 128)
        the_same(bias.to(dtype)[None, :1], 1, 2, 128)
    the_same(((j <= i + 56) & (j % 50 > 0))[None, None], 1, 1, 128)
    the_same((j <= i + 56)[None, None].expand(1, 2, -1, -1).contiguous(), 1, 2, 64)


def test_layouts_of_rows() -> None:
    mask = torch.zeros(1, 2, 5, 80, dtype=BF16)
    assert lists.rows_layout(mask) == (8, 8, (0, 50, 10, 1), True)
    assert lists.rows_layout(mask[..., :75]) == (8, 1, (0, 50, 10, 1), True)
    assert lists.rows_layout(torch.zeros(1, 2, 5, 75, dtype=BF16)) == (1, 1, (0, 375, 75, 1), True)
    assert lists.rows_layout(mask[..., ::2])[-1] is False
