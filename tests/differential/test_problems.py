"""Problems drawn at random: every backend that accepts one against the plain reference, outputs and gradients.

The suite draws the same 2,000 problems each time: a change that breaks a test has broken it, and not luck; another
FASTATTN_TEST_SEED draws others. FASTATTN_EXAMPLES=N (`make fuzz`) draws N new ones each time and keeps what fails in
`.hypothesis`. A failure is shrunk to the smallest problem that shows it and printed as Python: keep it in KEPT.
(FASTATTN_SHRINK=0 leaves that out, for who wants to know only whether there is one.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, refusals
from drawn import Drawn, inputs_of, problems, results
from drawn_checks import EXAMPLES, SHARDS, SLOW, hold, wrong
from hypothesis import Phase, given

DECODE_SHARE = 20  #: of so many problems one is the decode kernel's: Triton's interpreter takes its time
PREFILL_SHARE = 40  #: the same for the prefill kernel's, which are larger

#: Problems that were wrong once, or that are one step away from one that was.
KEPT: tuple[Drawn, ...] = (
    # torch's kernels: rows of finfo.min alone, in a dtype of their own, seen through a mask that lies key-major
    Drawn(Case(dtype=BF16, mask="finfo:b1qk", mask_dtype=FP32), mask_layout="key-major"),
    # only the very first row sees nothing, and its memory is shared with rows that see something
    Drawn(Case(q_len=14, mask="causal", dtype=FP32, grads="qkv"), layouts=("one token", "bhsd", "one head")),
    # lengths of 0 beside full ones: what is cached of the first call is wrong for the second
    Drawn(Case(kv_lengths=(0, 13), q_lengths=(9, 0), mask="causal", dtype=FP32)),
    # an expanded mask has a gradient of its full shape
    Drawn(Case(dtype=FP64, mask="additive:k", mask_dtype=FP64, grads="m"), mask_layout="expanded", chunk=1),
    Drawn(Case(batch=0, dtype=FP16, mask="bool:b1qk", grads="qk", return_lse=True), entry="operator"),
    Drawn(Case(kv_len=0, dtype=FP32, sinks=FP64, grads="s", return_lse=True), entry="list"),
)
KEPT_FOR_DECODE: tuple[Drawn, ...] = (
    Drawn(Case(q_len=4, kv_len=70, mask="additive:1h1k", kv_lengths=(70, 3)), layouts=("one head", "sliced", "cache")),
    Drawn(Case(q_len=1, kv_len=130, dtype=FP32, sinks=FP32, kv_lengths=(0, 129), return_lse=True)),
)


def check_on_cpu(drawn: Drawn) -> None:
    found = wrong(drawn, ("torch", "reference"), "cpu")
    assert not found, f"{drawn.case}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("gradients", [False, True], ids=["outputs", "gradients"])
def test_problems(gradients: bool, shard: int, seed: int) -> None:
    kept = [drawn for drawn in KEPT if bool(drawn.case.grads) == gradients] if shard == 0 else []
    share = EXAMPLES * (DECODE_SHARE - 1) // DECODE_SHARE // (2 * SHARDS)
    hold(problems(gradients=gradients), check_on_cpu, share, seed, kept)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_decode_problems(shard: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel and its combine kernel, through Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("Triton runs natively here: the test on the GPU says more")

    def check(drawn: Drawn) -> None:
        assert not refusals(inputs_of(drawn), "decode")
        found = wrong(drawn, ("decode",), "cpu")
        assert not found, f"{drawn.case}: {found}"

    strategy = problems(longest=150, gradients=False, rows=16, least=1)
    hold(strategy, check, EXAMPLES // DECODE_SHARE // SHARDS, seed, KEPT_FOR_DECODE if shard == 0 else [])


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_prefill_problems(shard: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill kernel and those that list its blocks, through Triton's interpreter, in small blocks."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("Triton runs natively here: the test on the GPU says more")
    from fastattn.backends.triton.prefill import forward, launch_config

    choose = launch_config.choose
    monkeypatch.setattr(forward, "choose", lambda p: replace(choose(p), block_m=16, block_n=16))
    monkeypatch.setattr(launch_config, "LISTED_KEYS", 32)

    def check(drawn: Drawn) -> None:
        assert not refusals(inputs_of(drawn), "prefill")
        found = wrong(drawn, ("prefill",), "cpu")
        assert not found, f"{drawn.case}: {found}"

    strategy = problems(longest=70, gradients=False, rows=64, least=1)
    hold(strategy, check, EXAMPLES // PREFILL_SHARE // SHARDS, seed)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # the reference serves some
def test_problems_on_a_gpu(shard: int, seed: int) -> None:
    """All backends. Few head counts and dims, so that not every problem needs a cuDNN plan of its own."""

    def few_families(drawn: Drawn) -> Drawn:
        c = drawn.case
        dims = {"head_dim": 64 if c.head_dim % 8 == 0 else c.head_dim, "value_dim": None}
        return Drawn(
            c.but(q_heads=4, kv_heads=2, **dims), drawn.layouts, drawn.mask_layout, drawn.entry, 1 << 21, drawn.seed
        )

    def check(drawn: Drawn) -> None:
        found = wrong(drawn, ("decode", "hopper", "cudnn", "torch", "prefill", "reference"), "cuda")
        assert not found, f"{drawn.case}: {found}"

    hold(problems().map(few_families), check, EXAMPLES // 20, seed, [*KEPT, *KEPT_FOR_DECODE] if shard == 0 else [])


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all of this rests on: one number that is off, one NaN, one gradient of a row that sees nothing."""
    import drawn_checks as module

    drawn = Drawn(Case(q_len=14, mask="causal", dtype=FP32, grads="qkv"))
    right = results(drawn, inputs_of(drawn), "reference")
    assert not wrong(drawn, ("reference",), "cpu")
    for name, change in (("out", 1.0), ("out", float("nan")), ("dq", 1.0), ("dv", float("inf"))):
        spoiled = {key: x.clone() for key, x in right.items()}
        spoiled[name][0, 1, 0, 2] += change

        def result(*arguments: Any, spoiled: dict[str, Any] = spoiled) -> dict[str, Any]:
            return spoiled

        monkeypatch.setattr(module, "results", result)
        assert wrong(drawn, ("reference",), "cpu"), (name, change)


def test_drawing_reaches_everything() -> None:
    """Each kind of mask, layout and entry, and every backend's own ground, is among a few hundred problems."""
    seen: dict[str, set[Any]] = {name: set() for name in ("mask", "layout", "mask_layout", "entry", "grads", "long")}

    @hypothesis.settings(
        max_examples=400, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=SLOW
    )
    @hypothesis.seed(1)
    @given(drawn=problems())
    def look(drawn: Drawn) -> None:
        seen["mask"].add(drawn.case.mask.partition(":")[0])
        seen["layout"].update(drawn.layouts)
        seen["mask_layout"].add(drawn.mask_layout)
        seen["entry"].add(drawn.entry)
        seen["grads"].add(drawn.case.grads)
        seen["long"].add(drawn.case.kv_len > 200)

    look()
    assert seen["mask"] == {"none", "causal", "bool", "additive", "finfo", "intervals", "segments"}
    assert {kind: len(values) for kind, values in seen.items() if kind != "mask"} == {
        "layout": 13, "mask_layout": 4, "entry": 3, "grads": len(seen["grads"]), "long": 2,
    }  # fmt: skip
    assert len(seen["grads"]) >= 10 and set("".join(seen["grads"])) == set("qkvms")
