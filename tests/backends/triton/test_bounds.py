"""Bounds of rows and tiles against `masks.bounds`: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

pytest.importorskip("triton")

from fastattn import Segments, masks
from fastattn.backends.triton.bounds import HEADER_NUMBERS, TILE_NUMBERS, Bounds
from fastattn.call import Call, Problem

KINDS = (
    "packed",
    "left",
    "gaps",
    "wild",
    "first",
    "windows",
    "nothing",
    "intervals",
    "entry",
    "shared",
    "lengths",
    "band",
)
MASKS = {
    "bool": torch.bool,
    "half": torch.float16,
    "brain": torch.bfloat16,
    "single": torch.float32,
    "double": torch.float64,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels run natively")
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    return str(request.param)


def cut(rng: random.Random, total: int, pieces: int, empty: bool) -> list[int]:
    """Cumulative lengths of some pieces of `total` tokens."""
    inner = [rng.randint(0, total) for _ in range(pieces - 1)]
    if not empty:
        inner = list(set(inner) - {0, total})
    return [0, *sorted(inner), total]


def table(kind: str, rng: random.Random, batch: int, q_len: int, kv_len: int, device: str) -> Tensor:
    """A table of segments, `[3, N]` where queries and keys are the same."""
    columns: list[list[int]] = []
    for b in range(batch):
        if kind == "left":
            pad = rng.randint(0, kv_len)
            columns.append([b, max(pad - (kv_len - q_len), 0), q_len, pad, kv_len])
            continue
        pieces = rng.randint(1, 9)
        q_cuts = cut(rng, q_len, pieces, kind != "packed")
        kv_cuts = q_cuts if q_len == kv_len else sorted(rng.randint(0, kv_len) for _ in q_cuts)
        for n, (first, end) in enumerate(pairwise(q_cuts)):
            columns.append([b, first, end, kv_cuts[n], kv_cuts[n + 1]])
    if kind in ("gaps", "wild"):  # some sequences are missing, the others do not fill their place
        columns = [c for c in columns if rng.random() < 0.7]
        for c in columns:
            c[1] = rng.randint(c[1], c[2])
            c[3] = rng.randint(c[3], c[4])
            if q_len == kv_len:
                c[3] = c[1]
    if kind == "wild" and columns:  # bounds outside of the tensors
        columns[0][1] = columns[0][3] = -7
        columns[-1][2] += 1000
        columns[-1][4] += 1000
    found = torch.tensor(columns, dtype=torch.int32, device=device).reshape(-1, 5).mT
    return found[:3] if q_len == kv_len and rng.random() < 0.5 else found


def of_the_first_entry(kind: str, rng: random.Random, q_len: int, kv_len: int, device: str) -> Tensor:
    """A table without the batch entries. windows: its rows are parts of one tensor."""
    if kind == "windows" and q_len == kv_len:
        cuts = torch.tensor(cut(rng, q_len, rng.randint(1, 9), True), dtype=torch.int32, device=device)
        step = rng.choice((1, 3))
        return cuts.repeat_interleave(step).as_strided((2, len(cuts) - 1), (step, step))
    found = table("gaps", rng, 1, q_len, kv_len, device)
    assert not found[0].any()
    return found[1:]


def draw(kind: str, rng: random.Random, device: str) -> Call:
    batch = rng.randint(1, 4)
    q_len = rng.choice((1, 31, 32, 33, 64, rng.randint(1, 200)))
    kv_len = q_len if rng.random() < 0.5 else rng.randint(1, 250)
    left, right = rng.choice((-1, -1, 0, 5, 70)), rng.choice((-1, 0, 0, 3, 90))
    q = torch.empty(batch, 2, q_len, 8, device=device)
    k = torch.empty(batch, 1, kv_len, 8, device=device)
    call = Call(q, k, k, left=left, right=right)
    if kind == "nothing":
        return call._replace(
            segments=torch.empty(rng.choice((2, 3) if q_len == kv_len else (4, 5)), 0, dtype=torch.int32, device=device)
        )
    if kind in ("first", "windows"):
        return call._replace(segments=of_the_first_entry(kind, rng, q_len, kv_len, device))
    if kind in ("packed", "left", "gaps", "wild"):
        return call._replace(segments=table(kind, rng, batch, q_len, kv_len, device))
    if kind != "band" and (kind == "lengths" or rng.random() < 0.5):
        lengths = [[rng.randint(-2, most + 3) for _ in range(batch)] for most in (q_len, kv_len)]
        q_lengths, kv_lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in lengths)
        call = call._replace(q_lengths=q_lengths, kv_lengths=kv_lengths)
        if rng.random() < 0.3:
            call = call._replace(q_lengths=None)
    shape = {"intervals": (batch, q_len), "entry": (batch, 1), "shared": (1, q_len)}.get(kind)
    if shape:
        lo, hi = (torch.randint(-5, kv_len + 9, shape, dtype=torch.int32, device=device) for _ in range(2))
        if rng.random() < 0.3:
            hi = torch.stack([hi, hi], -1)[..., 0]  # not laid out as lo is
        call = call._replace(lo=lo, hi=hi)
    return call


def found_by(call: Call, tile: int) -> tuple[Bounds, Tensor]:
    bounds = Bounds(Problem.of(call), call, tile, ordered=True)
    memory = torch.full((bounds.size,), 0x7F, dtype=torch.uint8, device=call.q.device)
    bounds(call, memory)
    return bounds, memory.view(torch.int32).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str, device: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(12):
        call = draw(kind, rng, device)
        tile = rng.choice((32, 64, 128))
        bounds, found = found_by(call, tile)
        batch, q_len, kv_len = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        lo, hi = (x.expand(batch, -1).cpu() for x in masks.bounds(call))
        seeing = lo < hi
        rows = [
            x.view(batch, bounds.tiles * tile)
            for x in (found[bounds.lo_at : bounds.hi_at], found[bounds.hi_at : bounds.order_at])
        ]
        for x, expected in zip(rows, (lo, hi), strict=True):
            assert torch.equal(x[:, :q_len], torch.where(seeing, expected, 0))
            assert not x[:, q_len:].any()
        sizes = check_tiles(
            found[HEADER_NUMBERS : bounds.lo_at].view(batch, bounds.tiles, TILE_NUMBERS), lo, hi, tile, kv_len
        )
        check_order(found[bounds.order_at :], int(found[0]), sizes)


def key_mask(dtype: torch.dtype, rng: random.Random, batch: int, kv_len: int, device: str) -> Tensor:
    """Padding, holes, nothing hidden or everything, values of every size."""
    shape = rng.choice((1, batch)), rng.choice((1, 2)), 1, rng.choice((1, kv_len, kv_len, kv_len))
    seen = torch.rand(shape, device=device) < rng.choice((0.0, 0.5, 0.98, 1.0))
    if rng.random() < 0.5 and shape[3] > 1:  # padding
        first, end = sorted((rng.randint(0, kv_len), rng.randint(0, kv_len)))
        keys = torch.arange(kv_len, device=device)
        seen = ((keys >= first) & (keys < end)).expand(shape)
    if rng.random() < 0.3:
        seen = seen.mT.contiguous().mT
    if dtype == torch.bool:
        return seen
    values = torch.zeros(shape, dtype=dtype, device=device)
    if rng.random() < 0.7:
        values = torch.randn(shape, device=device).to(dtype)
        values[torch.rand(shape, device=device) < 0.2] = rng.choice(
            (torch.finfo(dtype).min, torch.finfo(dtype).max, 0.0)
        )
    return values.masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("name", MASKS)
def test_key_masks_become_biases(name: str, device: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(15):
        call = draw("lengths", rng, device)
        batch, kv_len = call.q.shape[0], call.k.shape[2]
        mask = key_mask(MASKS[name], rng, batch, kv_len, device)
        call = call._replace(mask=mask)
        bounds, found = found_by(call, 64)
        keys = bounds.keys
        assert keys is not None
        biases = found.view(torch.float32)[keys.bias_at : keys.end].view(*mask.shape[:2], kv_len)
        expected = masks.additive(Call(call.q, call.k, call.k, mask=mask), torch.float64)
        assert expected is not None
        expected = expected.expand(*mask.shape[:2], 1, kv_len)[:, :, 0].cpu()
        seen = expected > -torch.inf
        assert torch.equal(seen, biases > -torch.inf)
        # What is so low or so high that a float32 with log2(e) would not hold it is low or high, and finite.
        assert biases[seen].isfinite().all()
        torch.testing.assert_close(biases[seen].double(), expected[seen].clamp(-1e38, 2e38) * 1.4426950408889634)
        check_ranges(call, bounds, found, seen.expand(batch, -1, -1), expected.expand(batch, -1, -1))


def check_ranges(call: Call, bounds: Bounds, found: Tensor, seen: Tensor, bias: Tensor) -> None:
    """Rows' bounds within the keys that the mask leaves, and which tiles need biases besides."""
    lo, hi = (x.expand(seen.shape[0], -1).cpu() for x in masks.bounds(call))
    rows = found[bounds.lo_at : bounds.order_at].view(2, seen.shape[0], -1)
    tiles = found[HEADER_NUMBERS : bounds.lo_at].view(seen.shape[0], bounds.tiles, TILE_NUMBERS)
    for b in range(seen.shape[0]):
        some = seen[b].any(0).nonzero()[:, 0].tolist() or [0, -1]
        for i in range(call.q.shape[2]):
            low, high = max(int(lo[b, i]), some[0]), min(int(hi[b, i]), some[-1] + 1)
            assert rows[:, b, i].tolist() == ([low, high] if low < high else [0, 0])
        plain = bool((bias[b][:, some[0] : some[-1] + 1] == 0).all())
        for t in tiles[b].tolist():
            assert t[5] == int(t[1] > 0 and not plain)


def check_tiles(tiles: Tensor, lo: Tensor, hi: Tensor, tile: int, kv_len: int) -> list[int]:
    """Returns how many keys each tile spans."""
    sizes = []
    for b in range(tiles.shape[0]):
        for t in range(tiles.shape[1]):
            pairs = [
                (x, y)
                for x, y in zip(*(z[b, t * tile : (t + 1) * tile].tolist() for z in (lo, hi)), strict=True)
                if x < y
            ]
            got = tiles[b, t, :5].tolist()
            if not pairs:
                assert got == [0] * 5
                sizes.append(0)
                continue
            expected = [
                min(x for x, _ in pairs),
                max(y for _, y in pairs),
                max(x for x, _ in pairs),
                min(y for _, y in pairs),
            ]
            assert got[:4] == expected
            seen = set().union(*(range(x, y) for x, y in pairs))
            whole = len(seen) == expected[1] - expected[0]
            assert whole or got[4] == 1, "a key that no row sees"
            if pairs == sorted(pairs):  # as under a band: the rows' order hides nothing
                assert got[4] == int(not whole)
            sizes.append(expected[1] - expected[0])
    return sizes


def check_order(order: Tensor, live: int, sizes: list[int]) -> None:
    assert live == sum(size > 0 for size in sizes)
    units = [-(-sizes[t] // 64) for t in order.tolist()]
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert units == sorted(units, reverse=True)
    assert all(size > 0 for size in units[:live])


def test_left_padding_and_packing_have_no_gaps(device: str) -> None:
    """What is common must not take the way of what is rare."""
    q = torch.empty(3, 1, 300, 8, device=device)
    padding = torch.tensor([0, 130, 300], dtype=torch.int32, device=device)
    left = Segments.left_padded(padding, 300, 300)
    packed = Segments.packed(padding.new_tensor([0, 10, 10, 131, 300]), causal=True)
    for segments in (left, packed):
        call = Call(q, q, q, segments=segments.table, right=0)
        bounds, found = found_by(call, 128)
        assert not found[HEADER_NUMBERS : bounds.lo_at].view(-1, TILE_NUMBERS)[:, 4].any()
