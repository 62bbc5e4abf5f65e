"""The Hopper forward: what it takes, and, on a GPU, its results."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hopper_cases import COUNT, KINDS, child, draw
from hopper_masks import ROWS

from fastattn.backends.base import NotReady
from fastattn.backends.triton.binaries.store import Binaries
from fastattn.backends.triton.hopper import HopperBackend, launch, segments, tensors
from fastattn.backends.triton.hopper.binary import ALIGNED, BAND, BLOCKS, FULL, INTERVALS, SEGMENTS, Flags
from fastattn.backends.triton.hopper.segments import LEAST_QUERIES, MOST_SEGMENTS
from fastattn.call import Call, Problem

#: Kinds of masks of `Problem`, by the names of `hopper_masks`; the others are Segments.
MASK_KINDS = dict.fromkeys(("intervals", "entry", "holes"), "intervals")
MASK_KINDS |= {"bool": "bool", "bias": "additive", "edge": "additive"}
MASK_KINDS |= {name: "bool" if dtype == torch.bool else "additive" for name, dtype in ROWS.items()}

_on_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def problem(**changes: object) -> Problem:
    q, k = torch.empty(2, 8, 300, 128, dtype=torch.bfloat16), torch.empty(2, 2, 500, 128, dtype=torch.bfloat16)
    plain = dataclasses.replace(Problem.of(Call(q, k, k)), device="cuda", index=0, capability=(9, 0))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_takes_what_it_is_made_for() -> None:
    pytest.importorskip("triton")
    assert launch.reasons(problem()) == []
    everything = problem(
        dtype=torch.float16, left=5, right=3, softcap=30.0, sinks=True, q_lengths=True, kv_lengths=True, return_lse=True
    )
    assert launch.reasons(everything) == []
    for mask, shape in (
        ("segments", (5, 9)),
        ("intervals", (1, 300)),
        ("bool", (2, 1, 1, 500)),
        ("additive", (1, 8, 1, 1)),
        ("bool", (1, 1, 300, 500)),
        ("additive", (2, 8, 300, 500)),
    ):
        rows = mask in ("bool", "additive") and shape[2] > 1
        masked = dataclasses.replace(everything, mask=mask, mask_shape=shape, mask_dtype=torch.float32)
        if rows:  # its blocks may reach past the last key, which has to be the tensor's
            assert launch.reasons(masked) == ["has no lengths of keys beside a mask with a row for each query"]
            masked = dataclasses.replace(masked, kv_lengths=False)
        assert launch.reasons(masked) == HopperBackend().reasons(masked) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"capability": (10, 0)}, "compute capability 9.0, this device is 10.0"),
        ({"device": "cpu", "capability": (0, 0)}, "this device is a cpu"),
        ({"dtype": torch.float32}, "not float32"),
        (
            {"mask": "additive", "mask_shape": (2, 8, 300, 500), "mask_dtype": torch.float64},
            "has no float64 mask with a row for each query",
        ),
        ({"head_dim": 264}, "head dim 264"),
        ({"value_dim": 20}, "value dim 20"),
        ({"kv_len": 0}, "no queries or no keys"),
        ({"kv_len": (1 << 28) + 1}, "tokens"),
    ],
)
def test_says_why_not(changes: dict[str, object], words: str) -> None:
    why = launch.reasons(problem(**changes))
    assert len(why) == 1 and words in why[0]


@pytest.mark.parametrize(
    "head_dim, value_dim, padded",
    [
        (64, 64, (64, 64)),
        (32, 8, (64, 64)),
        (72, 72, (128, 128)),
        (128, 64, (128, 128)),
        (192, 128, (256, 128)),
        (256, 256, (256, 256)),
        (64, 256, (256, 256)),
    ],
)
def test_dims_are_padded_to_the_smallest_blocks(head_dim: int, value_dim: int, padded: tuple[int, int]) -> None:
    assert launch.dims(problem(head_dim=head_dim, value_dim=value_dim)) == padded
    assert padded in BLOCKS


def test_no_binary_depends_on_a_length() -> None:
    """Only whether keys are few counts, and under a causal mask whether there are as many as queries."""
    for band in ({}, {"right": 0}, {"left": 100, "right": 0}, {"left": 7}, {"kv_lengths": True}):
        found = {}
        for short, lengths in (True, ((1, 2), (129, 768), (700, 1), (9000, 768))), (False, ((1, 769), (4096, 5000))):
            names = {
                launch.flags(problem(q_len=q_len, kv_len=kv_len, batch=batch, q_heads=heads, **band))
                for q_len, kv_len in lengths
                for batch in (1, 40)
                for heads in (2, 16)
            }
            assert len(names) == 1
            found[short] = names.pop()
        assert found == {short: dataclasses.replace(found[True], short=short) for short in found}
    wide = problem(head_dim=256, value_dim=256, kv_len=700)
    assert launch.flags(wide) == launch.flags(dataclasses.replace(wide, kv_len=7000))
    assert launch.flags(problem()).mask == FULL
    assert launch.flags(problem(right=0)).mask == BAND
    assert launch.flags(problem(right=0, q_len=500)).mask == ALIGNED
    for other in ({"left": 3}, {"kv_lengths": True}, {"q_lengths": True}):
        assert launch.flags(problem(right=0, q_len=500, **other)).mask == BAND


def test_masks_by_row_share_a_binary() -> None:
    """Whatever else hides keys is in the bounds."""
    bands = ({}, {"right": 0}, {"left": 100, "right": 0}, {"kv_lengths": True}, {"q_lengths": True, "kv_lengths": True})
    for masks, keys in (
        ((("intervals", (2, 300)), ("intervals", (1, 1))), False),
        ((("bool", (2, 1, 1, 500)), ("additive", (1, 8, 1, 500)), ("additive", (1, 1, 1, 1))), True),
    ):
        found = {launch.flags(problem(mask=kind, mask_shape=shape, **band)) for kind, shape in masks for band in bands}
        assert found == {Flags("bf16", (128, 128), INTERVALS, keys=keys, short=True)}


def test_segments_share_binaries() -> None:
    """Of lengths only whether keys are few counts: of the call, or of a segment in the mean."""
    for batch, kv_len, count, short in (
        (2, 768, 1, True),
        (2, 769, 1, False),
        (1, 8192, 21, False),
        (1, 8192, 22, True),
        (8, 2048, 8, False),
        (1, 8192, 0, False),
    ):
        for band in ({}, {"right": 0}, {"left": 100, "right": 0}):
            p = problem(mask="segments", mask_shape=(5, count), batch=batch, kv_len=kv_len, q_len=kv_len, **band)
            assert launch.flags(p) == Flags("bf16", (128, 128), SEGMENTS, short=short)
            for mask in SEGMENTS, INTERVALS:  # which of them is a matter of lengths, too
                shorts = {x.short for x in launch.all_flags(p) if x.mask == mask}
                assert shorts == ({False, True} if count or mask == SEGMENTS else set())
    wide = problem(mask="segments", mask_shape=(5, 50), q_len=8192, kv_len=8192, head_dim=256, value_dim=256)
    assert launch.all_flags(wide) == [Flags("bf16", (256, 256), mask) for mask in (SEGMENTS, INTERVALS)]


def test_short_segments_and_many_go_by_the_bounds_of_rows() -> None:
    few = {SEGMENTS, INTERVALS}
    for batch, q_len, count, mask, masks in (
        (1, 50 * LEAST_QUERIES, 50, SEGMENTS, few),
        (1, 50 * LEAST_QUERIES - 1, 50, INTERVALS, few),
        (2, 25 * LEAST_QUERIES, 50, SEGMENTS, few),
        (1, MOST_SEGMENTS * LEAST_QUERIES, MOST_SEGMENTS, SEGMENTS, few),
        (1, 2 * MOST_SEGMENTS * LEAST_QUERIES, MOST_SEGMENTS + 1, INTERVALS, {INTERVALS}),
    ):
        p = problem(mask="segments", mask_shape=(5, count), batch=batch, kv_len=q_len, q_len=q_len)
        assert launch.reasons(p) == [] and launch.flags(p).mask == mask
        assert {x.mask for x in launch.all_flags(p)} == masks
        kernels = [getattr(x, "kernel", "") for x in launch.binaries_of(p)]
        assert any("segment_tiles" in name for name in kernels) == (SEGMENTS in masks)
        assert any("bounds_kernel:order" in name for name in kernels)


def test_rows_of_segments_are_int32() -> None:
    most = problem(mask="segments", mask_shape=(5, 9), batch=1 << 10, q_len=1 << 20)
    assert launch.reasons(most) == []
    (why,) = launch.reasons(dataclasses.replace(most, batch=1025))
    assert "queries of all batch entries" in why


def test_masks_with_rows_take_tiles() -> None:
    """Of the mask only its dtype names the binary, and whether blocks are listed; a causal mask is a band there."""
    bool_mask = {"mask": "bool", "mask_shape": (2, 1, 300, 500), "mask_dtype": torch.bool}
    assert launch.flags(problem(**bool_mask)) == Flags("bf16", (128, 128), FULL, tiles="bool")
    square = {"q_len": 500, "right": 0}
    assert launch.flags(problem(**bool_mask, **square)) == Flags("bf16", (128, 128), BAND, tiles="bool")
    for dtype, name in (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"):
        for shape in (1, 1, 300, 4000), (2, 8, 300, 4000):
            changes = {"mask": "additive", "mask_shape": shape, "mask_dtype": dtype, "kv_len": 4000, "q_lengths": True}
            expected = Flags("bf16", (128, 128), FULL, tiles=name, listed=True, q_lengths=True)
            assert launch.flags(problem(**changes)) == expected
            assert str(expected) == f"Hopper forward bf16 128/128 full listed q_lengths mask {name}"


def test_masks_that_the_copy_engine_reads() -> None:
    for dtype, step in (torch.bool, 16), (torch.bfloat16, 8), (torch.float32, 4):
        x = torch.empty(2, 4, 30, 20 * step, dtype=dtype)
        assert tensors.tiles_readable(x)
        assert tensors.tiles_readable(x[..., step : step + 7]) and tensors.tiles_readable(x[..., 1:8])
        assert tensors.tiles_readable(x[:1, :1].expand(5, 4, 30, 20 * step))
        assert tensors.tiles_readable(x.transpose(1, 2).contiguous().transpose(1, 2))
        assert not tensors.tiles_readable(torch.empty(2, 4, 30, 20 * step + 1, dtype=dtype))
        assert not tensors.tiles_readable(x.mT) and not tensors.tiles_readable(x[..., ::2])
        assert not tensors.tiles_readable(x[..., :1])
        assert not tensors.tiles_readable(x[:, :, :1].expand(2, 4, 30, 20 * step))
        assert tensors.once(x[:1, :1].expand(5, 4, 30, 20 * step)).shape == (1, 1, 30, 20 * step)
        assert tensors.once(x).shape == x.shape


def test_other_masks_with_rows_get_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `reasons` cannot see is served all the same."""
    from fastattn.backends.triton.prefill import PrefillBackend

    monkeypatch.setattr(PrefillBackend, "bind", lambda self, p, call: "portable")
    monkeypatch.setattr(launch, "Forward", lambda p, call: "tiles")
    q = torch.empty(1, 2, 9, 128, dtype=torch.bfloat16)
    for keys, expected in (13, "portable"), (16, "tiles"):
        k = torch.empty(1, 2, keys, 128, dtype=torch.bfloat16)
        call = Call(q, k, k, mask=torch.ones(1, 1, 9, keys, dtype=torch.bool))
        found = HopperBackend().bind(Problem.of(call), call)
        assert getattr(found, "forward", found) == expected


@pytest.mark.parametrize(
    "changes, kernels",
    [
        ({}, []),
        ({"mask": "segments", "mask_shape": (5, 9)}, ["bounds_kernel", "order_kernel", "segment_tiles_kernel"]),
        ({"mask": "intervals", "mask_shape": (1, 300)}, ["bounds_kernel", "order_kernel"]),
        (
            {"mask": "bool", "mask_shape": (2, 1, 1, 500), "mask_dtype": torch.bool},
            ["key_bias_kernel", "bounds_kernel", "order_kernel"],
        ),
        (
            {"mask": "bool", "mask_shape": (2, 1, 300, 512), "kv_len": 512, "mask_dtype": torch.bool},
            ["list_kernel", "classify_kernel"],
        ),
    ],
    ids=["plain", "segments", "intervals", "keys", "rows"],
)
def test_kernels_before_the_main_one_are_among_the_binaries(changes: dict[str, object], kernels: list[str]) -> None:
    """`fastattn.warmup` makes them ready, too. They are listed as they run."""
    found = HopperBackend().binaries(problem(**changes))
    assert found[0] == launch.flags(problem(**changes))
    others = [x for x in found if not isinstance(x, Flags)]
    assert [x.kernel.partition(":")[2] for x in others] == kernels


def test_every_binary_of_other_lengths_is_known_beforehand() -> None:
    for changes in ({}, {"right": 0}, {"left": 9, "right": 0}, {"kv_lengths": True, "right": 0}, {"head_dim": 256}):
        listed = launch.all_flags(problem(**changes))
        assert listed[0] == launch.flags(problem(**changes)) and len(set(listed)) == len(listed)
        others = [(q_len, kv_len) for q_len in (1, 5, 768, 769, 4000) for kv_len in (1, 5, 768, 769, 4000)]
        found = {launch.flags(problem(q_len=q_len, kv_len=kv_len, **changes)) for q_len, kv_len in others}
        assert found <= set(listed)


def test_a_call_is_not_bound_before_its_binary_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    monkeypatch.setattr(launch.binaries, "shared", Binaries())
    q = torch.empty(1, 2, 9, 128, dtype=torch.bfloat16)
    with pytest.raises(NotReady, match="FASTATTN_COMPILE=off"):
        launch.Forward(problem(), Call(q, q, q))


def test_layouts_that_the_copy_engine_reads() -> None:
    x = torch.empty(2, 4, 10, 64, dtype=torch.bfloat16)
    assert tensors.readable(x)
    assert tensors.readable(x.transpose(1, 2))
    assert tensors.readable(x[:, :, 3:7])
    assert tensors.readable(torch.empty(2, 10, 3, 4, 64, dtype=torch.bfloat16)[:, :, 1].transpose(1, 2))
    one = torch.empty(1, 1, 10, 64, dtype=torch.bfloat16)
    assert tensors.readable(one.as_strided((1, 1, 10, 64), (3, 5, 64, 1)))  # strides of what there is one of
    assert not tensors.readable(x[..., 1:57])  # starts at 2 bytes
    assert not tensors.readable(x.mT)
    assert not tensors.readable(torch.empty(2, 4, 10, 68, dtype=torch.bfloat16)[..., :64])  # rows 136 bytes apart
    assert not tensors.readable(x[:, :1].expand(2, 4, 10, 64))


@pytest.mark.parametrize("name", KINDS)
def test_cases_are_what_their_kind_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU test draws reaches the binary that it is to test."""
    monkeypatch.setattr(segments, "LEAST_QUERIES", 0)  # as the cases' program does
    kind = KINDS[name]
    for i in range(COUNT):
        case = draw(kind, random.Random(f"{name} {i}"), i)
        batch, kv_heads, group, q_len, kv_len = case["sizes"]
        assert min(batch, kv_heads, group, q_len, kv_len) >= 1
        assert (case["q_lengths"] is not None, case["kv_lengths"] is not None) == (kind.q_lengths, kind.kv_lengths)
        found = launch.flags(
            problem(
                batch=batch,
                q_heads=kv_heads * group,
                kv_heads=kv_heads,
                q_len=q_len,
                kv_len=kv_len,
                left=case["left"],
                right=case["right"],
                q_lengths=kind.q_lengths,
                kv_lengths=kind.kv_lengths,
                mask=MASK_KINDS.get(case["mask"][0], "segments") if case["mask"] else "none",
                mask_shape=(1, 1, q_len if case["mask"] and case["mask"][0] in ROWS else 1, kv_len),
                mask_dtype=ROWS.get(case["mask"][0]) if case["mask"] else None,
            )
        )
        if kind.masks:
            what = case["mask"][0]
            assert what in kind.masks
            if what in ROWS and q_len > 1:
                assert found.tiles and found.mask == (BAND if max(case["left"], case["right"]) >= 0 else FULL)
                assert found.listed == (kv_len >= 1024)
            else:
                assert found.mask == (INTERVALS if what in MASK_KINDS else SEGMENTS)
            continue
        if kind.band == "full":
            assert found.mask == FULL
        if kind.band == "causal" and not kind.kv_lengths:
            assert found.mask == ALIGNED
        if kind.band in ("window", "left", "right") and (q_len != kv_len or case["left"] >= 0 or case["right"]):
            assert found.mask == BAND


@pytest.mark.gpu
@_on_hopper
@pytest.mark.parametrize("name", KINDS)
def test_equals_the_truth(name: str, seed: int) -> None:
    pytest.importorskip("triton")
    done = child("hopper_cases", name, 6, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done ") == 6
