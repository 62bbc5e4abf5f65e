"""The Hopper forward's own source in a model of the machine, against plain attention in float64: see `hopper_model`."""

from __future__ import annotations

import os
import random

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

import naive
from hopper_masks import MASKS, ROWS, draw, hidden, unseen

from fastattn import Segments
from fastattn.backends.triton.hopper import segments
from fastattn.call import Call

pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")

#: 2 * heads, queries, keys: about a block, several, and more of the one or the other
SIZES = ((1, 130, 130), (2, 300, 300), (1, 257, 400), (2, 140, 695), (1, 400, 90))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels of bounds run natively")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")


def equals_the_truth(rng: random.Random, dim: int, mask: str, **options: object) -> None:
    """One call, with NaN in every query that sees nothing and every key that nothing sees."""
    import hopper_model

    batch, (kv_heads, q_len, kv_len) = rng.randint(1, 3), rng.choice(SIZES)
    if mask in ("packed", "left", "gaps") and rng.random() < 0.7:
        kv_len = q_len
    dtype = rng.choice((torch.bfloat16, torch.float16))
    heads = 2 * kv_heads
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, kv_len, dim).to(dtype)
    right, left = rng.choice((-1, 0, 0, 60)), rng.choice((-1, -1, 0, 100))
    drawn = draw(mask, rng, batch, heads, q_len, kv_len, "cpu") if mask else None
    lengths = {}
    if "segments" not in (drawn.fields if drawn else {}) and rng.random() < 0.5:
        for name, most in ("q_lengths", q_len), ("kv_lengths", kv_len):
            lengths[name] = torch.tensor([rng.randint(-1, most + 2) for _ in range(batch)], dtype=torch.int32)
    if mask in ROWS:
        lengths.pop("kv_lengths", None)  # refused
    sinks = torch.randn(heads) if rng.random() < 0.3 else None
    softcap = rng.choice((0.0, 0.0, 20.0))
    argument = drawn.argument if drawn else None
    expected = naive.attention(
        q.double(), k.double(), v.double(), mask=argument, window=(left, right), sinks=sinks, softcap=softcap or None,
        **lengths,
    )  # fmt: skip
    tensor_mask = isinstance(argument, torch.Tensor)
    visible = naive.visible(q, k, mask=None if tensor_mask else argument, window=(left, right), **lengths)
    rows, keys = unseen(visible)
    if mask in ROWS:  # hidden keys hold anything finite
        keys = hidden(argument).expand(-1, kv_heads, -1, -1)
        k.masked_fill_(keys, 100.0)
        v.masked_fill_(keys, 1000.0)
        for b in range(batch if lengths else 0):
            q[b, :, max(int(lengths["q_lengths"][b]), 0) :] = torch.nan
    elif drawn:  # under a band alone only lengths exclude anything
        q.masked_fill_(rows, torch.nan)
        k.masked_fill_(keys, torch.nan)
        v.masked_fill_(keys, rng.choice((torch.nan, torch.inf)))
    call = Call(
        q, k, v, sinks=sinks, scale=dim**-0.5, left=left, right=right, softcap=softcap, return_lse=True,
        **lengths, **(drawn.fields if drawn else {}),
    )  # fmt: skip
    out, lse = hopper_model.forward(call, rng, rng.choice((1, 3, 7)), options)
    assert not out.isnan().any() and not lse.isnan().any()
    torch.testing.assert_close(out.double(), expected.out, atol=0.02, rtol=0.02)
    fine = expected.lse.isinf() | (expected.lse < -1e30)
    torch.testing.assert_close(lse.double()[~fine], expected.lse[~fine], atol=1e-3, rtol=1e-4)
    assert torch.equal(lse == -torch.inf, expected.lse == -torch.inf)


@pytest.mark.parametrize("short", [False, True], ids=["blocks", "short"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, short: bool, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        equals_the_truth(rng, 64, mask, short=short)


@pytest.mark.parametrize("dim", [128, 192, 256])
@pytest.mark.parametrize("mask", ["", "packed", "gaps", "holes", "bias"])
def test_head_dims(dim: int, mask: str, seed: int) -> None:
    """With wide heads there is one place for queries, and the output is not staged."""
    rng = random.Random(seed)
    for _ in range(2):
        equals_the_truth(rng, dim, mask, short=False)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("mask", [name for name in ROWS if not name.endswith("odd")])
def test_masks_with_rows(mask: str, listed: bool, seed: int) -> None:
    rng = random.Random(seed)
    for dim in (64, 64, 128, 192, 256):
        equals_the_truth(rng, dim, mask, listed=listed)


@pytest.mark.parametrize("kv_len", [681, 687, 688, 695])
def test_a_causal_call_under_a_mask_that_hides_nothing(kv_len: int, seed: int) -> None:
    """The first block begins at a multiple of 16 keys and ends past what the tile sees: the next is masked, too."""
    import hopper_model

    q, k, v = (torch.randn(1, 2, n, 64).bfloat16() for n in (140, kv_len, kv_len))
    room = torch.ones(1, 1, 140, -(-kv_len // 16) * 16, dtype=torch.bool)
    call = Call(q, k, v, mask=room[..., :kv_len], scale=0.125, right=0, return_lse=True)
    out, lse = hopper_model.forward(call, random.Random(seed), 3, {})
    expected = naive.attention(q.double(), k.double(), v.double(), window=(-1, 0), scale=0.125)
    torch.testing.assert_close(out.double(), expected.out, atol=0.01, rtol=0.01)
    torch.testing.assert_close(lse.double(), expected.lse, atol=1e-3, rtol=1e-4)


@pytest.fixture(autouse=True)
def short_segments_have_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LEAST_QUERIES", 0)


#: By name: segments one after another, as queries, keys, and room that is in none, of both.
LENGTHS = {
    "tiny": [(n, n, 0) for n in (1, 2, 3, 1, 3, 129, 2, 1, 0, 127, 3, 128)],
    "gaps": [(0, 0, 70), (127, 127, 1), (128, 128, 0), (129, 129, 60), (5, 5, 130), (64, 64, 3)],
    "more keys": [(3, 200, 5), (130, 300, 0), (1, 1, 0), (65, 129, 2)],
    "more queries": [(200, 3, 5), (140, 130, 0), (130, 0, 7), (0, 40, 0), (65, 64, 2)],
    "none": [(0, 0, 150)],
}


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 0), (100, 30)], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_segments(name: str, window: tuple[int, int], seed: int) -> None:
    """NaN in queries, keys and values of no segment. Dims 256: an output that is not staged."""
    check_segments(name, window, seed)


@pytest.mark.parametrize("name", LENGTHS)
def test_more_segments_than_tiles_are_made_for(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bounds of rows, to the same result."""
    monkeypatch.setattr(segments, "MOST_SEGMENTS", 0)
    check_segments(name, (-1, 0), seed)


def check_segments(name: str, window: tuple[int, int], seed: int) -> None:
    import hopper_model

    rng = random.Random(seed)
    columns, at = [], [0, 0]
    for queries, keys, room in LENGTHS[name]:
        columns.append([0, at[0], at[0] + queries, at[1], at[1] + keys])
        at = [at[0] + queries + room, at[1] + keys + room]
    table = torch.tensor(columns, dtype=torch.int32).mT
    for dim, short, sinks in (64, False, torch.randn(2)), (64, True, None), (256, False, torch.randn(2)):
        q, k, v = torch.randn(1, 2, at[0], dim).half(), *torch.randn(2, 1, 1, at[1], dim).half()
        expected = naive.attention(
            q.double(), k.double(), v.double(), mask=Segments(table), window=window, sinks=sinks, scale=0.1
        )
        rows, keys = unseen(naive.visible(q, k, mask=Segments(table), window=window))
        q.masked_fill_(rows, torch.nan)
        k.masked_fill_(keys, torch.nan)
        v.masked_fill_(keys, torch.nan)
        call = Call(
            q, k, v, segments=table, sinks=sinks, scale=0.1, left=window[0], right=window[1], return_lse=True
        )  # fmt: skip
        out, lse = hopper_model.forward(call, rng, rng.choice((1, 4)), {"short": short})
        torch.testing.assert_close(out.double(), expected.out, atol=0.01, rtol=0.01)
        torch.testing.assert_close(lse.double(), expected.lse, atol=1e-3, rtol=1e-4)


def test_bands_and_lengths(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        equals_the_truth(rng, 64, "", short=rng.random() < 0.5)
