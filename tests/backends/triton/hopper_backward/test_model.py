"""The Hopper backward's own source in a model of the machine, against autograd in float64: see `hopper_model`."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

import gradient_bounds
import naive
from gradient_bounds import CAPPED, ROW, WORST
from hopper_masks import Mask, draw, unseen, unseen_by_head

from fastattn import Segments
from fastattn.call import Call

pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels around the main one run natively")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")


def equals_the_truth(rng: random.Random, **options: Any) -> None:
    """One call. options: sizes (batch, K/V heads, group, queries, keys), dims, left, right, mask, segments (columns),
    lengths, sinks, softcap, lse, dtype, split, section, residents (programs at a time), ordered (as where bits repeat:
    alone and several at a time). NaN in dO of every query that sees nothing, and, as far as that is not for a tensor's
    sake, in the query and in every key that nothing sees."""
    import hopper_model

    from fastattn.backends.triton.hopper_backward import schedule

    batch, kv_heads, group, q_len, kv_len = options["sizes"]
    dim, value_dim = options.get("dims", (64, 64))
    dtype = options.get("dtype") or rng.choice((torch.bfloat16, torch.float16))
    heads, left, right = kv_heads * group, options.get("left", -1), options.get("right", -1)
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    k = torch.randn(batch, kv_heads, kv_len, dim).to(dtype)
    v = torch.randn(batch, kv_heads, kv_len, value_dim).to(dtype)
    grad_out = torch.randn(batch, heads, q_len, value_dim).to(dtype)
    drawn = draw(options["mask"], rng, batch, heads, q_len, kv_len, "cpu") if options.get("mask") else None
    if options.get("tensor") is not None:
        drawn = Mask({"mask": options["tensor"]}, options["tensor"], q_len)
    if options.get("segments"):
        table = torch.tensor(options["segments"], dtype=torch.int32).mT
        drawn = Mask({"segments": table}, Segments(table), q_len)
    lengths = {}
    if options.get("lengths"):
        for name, most in ("q_lengths", q_len), ("kv_lengths", kv_len):
            lengths[name] = torch.tensor([rng.randint(-1, most + 2) for _ in range(batch)], dtype=torch.int32)
    sinks = torch.randn(heads) if options.get("sinks") else None
    softcap = options.get("softcap", 0.0)
    grad_lse = torch.randn(batch, heads, q_len) if options.get("lse") else None
    argument = drawn.argument if drawn else None
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    sink_leaf = None if sinks is None else sinks.double().requires_grad_()
    expected = naive.attention(
        *leaves, mask=argument, window=(left, right), sinks=sink_leaf, softcap=softcap or None, **lengths
    )
    what = {"window": (left, right), **lengths}
    rows, keys = unseen_by_head(naive.visible(q, k, mask=argument, **what), heads, kv_heads)
    bounds = None if isinstance(argument, torch.Tensor) else argument
    beyond_rows, beyond_keys = unseen(naive.visible(q, k, mask=bounds, **what))
    there = ~rows
    # Of a row of nothing but finfo.min the log-sum-exp has no bits left for probabilities: it is padding.
    lost = (expected.lse < -1e30) & there[..., 0]
    grad_out.masked_fill_(lost[..., None], 0.0)
    if grad_lse is not None:
        grad_lse.masked_fill_(lost, 0.0)
    coarse = expected.lse[there[..., 0] & ~lost].abs().max().item() * 2**-22 if (there[..., 0] & ~lost).any() else 0.0
    loss = (expected.out * grad_out.double() * there).sum()
    if grad_lse is not None:
        counted = torch.where(there[..., 0] if sinks is None else torch.ones_like(there[..., 0]), grad_lse.double(), 0)
        loss = loss + (torch.where(counted != 0, expected.lse, 0.0) * counted).sum()
    out, lse = expected.out.detach().to(dtype), expected.lse.detach().float()
    shift = gradient_bounds.shift(out, expected.out.detach(), grad_out, there[..., 0])
    loss = loss - (torch.where(there[..., 0], expected.lse, 0.0) * shift).sum()
    floors = gradient_bounds.floors(q, k, v, grad_out, there[..., 0], dim**-0.5)
    wanted = torch.autograd.grad(loss, [*leaves, *([] if sink_leaf is None else [sink_leaf])], allow_unused=True)
    for x, hidden in ((q, beyond_rows), (grad_out, rows)):
        x.masked_fill_(hidden, rng.choice((torch.nan, torch.inf)))
    for x in (k, v):
        x.masked_fill_(beyond_keys, torch.nan)
    if grad_lse is not None and sinks is None:
        grad_lse.masked_fill_(rows[..., 0], torch.nan)
    call = Call(
        q, k, v, sinks=sinks, scale=dim**-0.5, left=left, right=right, softcap=softcap, return_lse=True,
        grads="qkv" + ("s" if sinks is not None else ""), **lengths, **(drawn.fields if drawn else {}),
    )  # fmt: skip
    with schedule.forced(split=options.get("split", 0), section=options.get("section", 0)):
        given = call, out, lse, grad_out, grad_lse, rng
        if options.get("ordered"):
            found = hopper_model.backward(*given, ordered=True)
            again = hopper_model.backward(*given, ordered=True, residents=rng.randint(2, 5))
            for ours, other in zip(found, again, strict=True):
                assert ours is other is None or torch.equal(ours, other)
        else:
            found = hopper_model.backward(*given, residents=options.get("residents", 1))
    names = "dq", "dk", "dv", "dsinks"
    for name, ours, truth in zip(names, found, wanted, strict=False):
        truth = torch.zeros_like(ours, dtype=torch.float64) if truth is None else truth
        assert not ours.isnan().any(), name
        if name == "dsinks":
            torch.testing.assert_close(ours.double(), truth, atol=1e-4, rtol=1e-3)
            continue
        error, row = gradient_bounds.errors(ours, truth, floors[name[1]], dtype)
        assert error < WORST[dtype] + coarse, (name, error, row)
        assert row < ROW[dtype] * (CAPPED if softcap else 1) + 4 * coarse, (name, error, row)
    for ours, hidden in zip(found, (rows, keys, keys), strict=False):  # exact zeros
        assert not ours.masked_select(hidden.expand(ours.shape)).any()


def test_full(seed: int) -> None:
    rng = random.Random(seed)
    for sizes in ((1, 1, 1, 130, 200), (2, 1, 2, 65, 257), (1, 2, 1, 200, 40)):
        equals_the_truth(rng, sizes=sizes)
    equals_the_truth(rng, sizes=(1, 1, 2, 100, 150), dims=(128, 128))
    equals_the_truth(rng, sizes=(1, 1, 1, 100, 150), dims=(72, 40))


def test_causal(seed: int) -> None:
    rng = random.Random(seed)
    for sizes in ((1, 1, 2, 300, 300), (2, 1, 1, 100, 333), (1, 1, 1, 1, 140)):
        equals_the_truth(rng, sizes=sizes, right=0, lse=rng.random() < 0.5)
    equals_the_truth(rng, sizes=(1, 1, 2, 190, 190), right=0, dims=(128, 96))


@pytest.mark.parametrize("split", [2, 4])
def test_splits_and_sections(split: int, seed: int) -> None:
    """Programs that share a block, and every order of heads, reach each block once."""
    rng = random.Random(seed)
    equals_the_truth(rng, sizes=(1, 2, 4, 150, 150), right=0, split=split, section=3)
    equals_the_truth(rng, sizes=(1, 1, 4, 70, 200), split=split, section=1, dims=(128, 128))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_windows_and_sinks(softcap: float, seed: int) -> None:
    rng = random.Random(seed)
    for left, right in ((0, 0), (64, 0), (100, 30), (5, -1), (-1, 7)):
        sizes = (1, 1, 2, 200, 200) if left != 5 else (1, 1, 1, 120, 300)
        equals_the_truth(rng, sizes=sizes, left=left, right=right, softcap=softcap, sinks=rng.random() < 0.6, lse=True)


def test_lengths(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        equals_the_truth(
            rng, sizes=(2, 1, 2, rng.randint(1, 200), rng.randint(1, 300)), lengths=True, right=rng.choice((-1, 0)),
            left=rng.choice((-1, 60)), sinks=rng.random() < 0.5, lse=True,
        )  # fmt: skip
    equals_the_truth(rng, sizes=(1, 1, 1, 300, 100), right=0)  # rows that see nothing


@pytest.mark.parametrize(
    "mask", ["packed", "left", "chunks", "gaps", "wild", "intervals", "entry", "holes", "bool", "bias", "edge"]
)
def test_masks(mask: str, seed: int) -> None:
    rng = random.Random(seed)
    for split in (1, 2):
        q_len = rng.randint(60, 300)
        kv_len = q_len if mask in ("packed", "left", "gaps") else rng.randint(60, 300)
        equals_the_truth(
            rng, sizes=(2, 1, 2, q_len, kv_len), mask=mask, right=rng.choice((-1, 0, 60)), left=rng.choice((-1, 40)),
            split=split, sinks=rng.random() < 0.3, softcap=rng.choice((0.0, 3.0)), lse=rng.random() < 0.5,
        )  # fmt: skip


def test_tiles_between_of_queries_that_see_nothing(seed: int) -> None:
    """A block is visited by the tiles from the first that sees it to the last, in between by some that see nothing:
    what is in them is NaN."""
    rng = random.Random(seed)
    for split in (1, 2):
        sizes = (2, 1, 2, rng.randint(400, 440), rng.randint(60, 200))
        equals_the_truth(rng, sizes=sizes, mask="rooms", split=split, sinks=split == 2, lse=rng.random() < 0.5)
    # Two segments of queries that see keys of one block, and one without keys between them.
    columns = [[0, 0, 40, 0, 30], [0, 40, 200, 30, 30], [0, 200, 300, 30, 100]]
    equals_the_truth(rng, sizes=(1, 1, 1, 300, 100), segments=columns)


@pytest.mark.parametrize("sinks", [False, True])
def test_holes_of_a_mask_that_hide_all_of_a_window(sinks: bool, seed: int) -> None:
    """Within their bounds queries see no key, others in each head; and whole tiles of them. Their dO is NaN."""
    rng = random.Random(seed)
    for dtype in (torch.bool, torch.float32):
        mask = torch.zeros(1, 4, 1, 320)
        for head, (first, end) in enumerate(((40, 220), (150, 163), (1, 90), (200, 319))):
            mask[:, head, :, first:end] = -torch.inf
        mask = mask == 0 if dtype == torch.bool else mask
        equals_the_truth(
            rng, sizes=(1, 2, 2, 320, 320), tensor=mask, left=rng.randint(0, 9), right=0, sinks=sinks, lse=not sinks,
            split=rng.choice((1, 2)),
        )  # fmt: skip


def test_biases_of_every_size(seed: int) -> None:
    """Biases of heads that share keys, and rows whose keys are all low: what is low beside a greater one is nothing."""
    rng = random.Random(seed)
    for low in (-30.0, -1e4, -1e9, torch.finfo(torch.float32).min):
        mask = torch.randn(2, 4, 1, 150)
        mask[torch.rand(2, 4, 1, 150) < 0.4] = low
        mask[:, 1, :, 20:90] = low
        mask[1, 2:] = low
        equals_the_truth(
            rng, sizes=(2, 1, 4, 100, 150), tensor=mask, split=rng.choice((1, 2, 4)), softcap=rng.choice((0.0, 3.0)),
            lse=True,
        )  # fmt: skip


def test_programs_at_a_time(seed: int) -> None:
    rng = random.Random(seed)
    equals_the_truth(rng, sizes=(1, 1, 2, 200, 300), residents=4, split=2)


_WIDE = (256, 256)


def test_wide_heads(seed: int) -> None:
    """Blocks of 64 keys, whose dims two consumers share: full, causal and banded, of every length, in groups."""
    rng = random.Random(seed)
    equals_the_truth(rng, sizes=(1, 1, 1, 130, 200), dims=_WIDE)
    equals_the_truth(rng, sizes=(2, 1, 2, 65, 129), dims=(200, 176), lse=True)
    equals_the_truth(rng, sizes=(1, 1, 2, 1, 64), dims=_WIDE)
    equals_the_truth(rng, sizes=(1, 1, 1, 300, 40), dims=(256, 248), split=1)
    equals_the_truth(rng, sizes=(1, 1, 2, 200, 200), dims=_WIDE, right=0, sinks=True, lse=True)
    equals_the_truth(rng, sizes=(1, 2, 1, 100, 170), dims=(184, 256), right=0)
    for left, right in ((0, 0), (52, 40), (64, 0), (100, 30), (5, -1), (-1, 7)):
        sizes = (1, 1, 2, 150, 150) if left != 5 else (1, 1, 1, 80, 200)
        equals_the_truth(rng, sizes=sizes, dims=_WIDE, left=left, right=right, softcap=3.0, sinks=rng.random() < 0.5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_wide_heads_that_share_blocks(softcap: float, seed: int) -> None:
    rng = random.Random(seed)
    what = {"dims": _WIDE, "softcap": softcap}
    equals_the_truth(rng, sizes=(1, 2, 4, 100, 100), right=0, split=2, section=3, **what)
    equals_the_truth(rng, sizes=(1, 1, 4, 70, 150), split=4, section=1, residents=3, **what)
    equals_the_truth(rng, sizes=(2, 1, 2, 150, 150), right=0, left=70, split=2, lse=True, **what)


def test_wide_heads_with_lengths(seed: int) -> None:
    rng = random.Random(seed)
    for right in (-1, 0):
        equals_the_truth(
            rng, sizes=(2, 1, 2, rng.randint(1, 150), rng.randint(1, 200)), dims=_WIDE, lengths=True, right=right,
            left=rng.choice((-1, 60)), sinks=rng.random() < 0.5, lse=True, softcap=rng.choice((0.0, 3.0)),
        )  # fmt: skip
    equals_the_truth(rng, sizes=(1, 1, 1, 200, 70), dims=_WIDE, right=0)  # rows that see nothing


@pytest.mark.parametrize(
    "mask", ["packed", "left", "chunks", "gaps", "wild", "intervals", "entry", "holes", "rooms", "bool", "bias", "edge"]
)
def test_masks_of_wide_heads(mask: str, seed: int) -> None:
    rng = random.Random(seed)
    q_len = rng.randint(400, 440) if mask == "rooms" else rng.randint(60, 200)
    kv_len = q_len if mask in ("packed", "left", "gaps") else rng.randint(60, 200)
    equals_the_truth(
        rng, sizes=(1 if mask == "rooms" else 2, 1, 2, q_len, kv_len), dims=_WIDE, mask=mask,
        right=-1 if mask == "rooms" else rng.choice((-1, 0, 60)), left=-1 if mask == "rooms" else rng.choice((-1, 40)),
        split=rng.choice((1, 2)), sinks=rng.random() < 0.3, softcap=rng.choice((0.0, 3.0)), lse=rng.random() < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["", "packed", "wild", "bias"])
def test_wide_heads_in_order(mask: str, seed: int) -> None:
    rng = random.Random(seed)
    for split in (1, 2):
        n = rng.randint(100, 200)
        equals_the_truth(
            rng, ordered=True, sizes=(1, 1, 2, n, n), dims=_WIDE, mask=mask, right=0, left=rng.choice((-1, 70)),
            split=split, softcap=rng.choice((0.0, 3.0)), lse=True,
        )  # fmt: skip


@pytest.mark.parametrize("mask", ["full", "causal", "chunk", "window", "right", "padded"])
def test_in_order(mask: str, seed: int) -> None:
    """Additions come in the order of the blocks, and bits are those of programs that run one after the other."""
    rng = random.Random(seed)
    q_len = rng.randint(130, 330)
    what = {
        "full": {"sizes": (1, 2, 2, 130, 400)},
        "causal": {"sizes": (1, 1, 4, q_len, q_len), "right": 0, "lse": True},
        "chunk": {"sizes": (2, 1, 2, 100, 400), "right": 0},
        "window": {"sizes": (1, 1, 2, 400, 400), "left": rng.choice((0, 64, 130)), "right": rng.choice((0, 30))},
        "right": {"sizes": (1, 1, 2, 120, 300), "left": 5, "softcap": 3.0},
        "padded": {"sizes": (1, 2, 1, 260, 260), "dims": (96, 72), "right": 0},
    }[mask]
    equals_the_truth(rng, ordered=True, sinks=rng.random() < 0.5, section=rng.choice((0, 1)), **what)


@pytest.mark.parametrize("split", [2, 4])
def test_shared_blocks_in_order(split: int, seed: int) -> None:
    rng = random.Random(seed)
    equals_the_truth(rng, ordered=True, sizes=(1, 2, 4, 150, 150), right=0, split=split, section=rng.choice((0, 1, 3)))
    equals_the_truth(rng, ordered=True, sizes=(2, 1, 4, 70, 200), lengths=True, split=split)


@pytest.mark.parametrize(
    "mask", ["packed", "left", "chunks", "gaps", "wild", "intervals", "entry", "holes", "rooms", "bool", "bias", "edge"]
)
def test_masks_in_order(mask: str, seed: int) -> None:
    """Also where a block's tiles are not next to each other, and some between them see nothing of it."""
    rng = random.Random(seed)
    q_len = rng.randint(200, 400)
    kv_len = q_len if mask in ("packed", "left", "gaps") else rng.randint(200, 500)
    equals_the_truth(
        rng, ordered=True, sizes=(1, 1, 2, q_len, kv_len), mask=mask, right=rng.choice((-1, 0, 60)),
        left=rng.choice((-1, 40)), split=rng.choice((1, 2)), sinks=rng.random() < 0.3, softcap=rng.choice((0.0, 3.0)),
        lse=rng.random() < 0.5,
    )  # fmt: skip
