"""warmup: the calls that it makes are those that later calls would need. (No GPU: plans are recorded, not built.)"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGpu, pretend
from torch import Tensor

import fastattn
from fastattn.backends.cudnn import backward, geometry
from fastattn.backends.triton.decode import shapes
from fastattn.warming import kinds, run
from fastattn.warming.kinds import LAYOUTS, PHASES
from fastattn.warming.report import Family, Warmth
from fastattn.warming.run import warmup

SMALL: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "device": "cpu", "progress": False}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    return pretend(monkeypatch)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the op that warmup makes, which are made."""
    found: list[dict[str, Any]] = []
    op = run.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        found.append({"q": q, "k": k, "v": v, "grad": torch.is_grad_enabled() and q.requires_grad, **arguments})
        return op(q, k, v, **arguments)

    monkeypatch.setattr(run, "scaled_dot_product_attention", spy)
    return found


def test_the_capacities_are_the_plans_own() -> None:
    assert (kinds.FORWARD_CAPACITY, kinds.BACKWARD_CAPACITY) == (geometry.MIN_CAPACITY, backward._MIN_CAPACITY)
    assert geometry.MIN_TOTAL == kinds.BACKWARD_CAPACITY and geometry.MIN_SEGMENTS == 16
    assert max(kinds.TILES) == shapes.MAX_ROWS < kinds.MANY
    assert (kinds.FEW_QUERIES, kinds.WIDE) == (shapes.FEW_QUERIES, shapes.WIDE)


def test_the_calls_are_really_made(calls: list[dict[str, Any]]) -> None:
    warmth = warmup(
        **SMALL,
        value_dim=32,
        dtype=torch.float32,
        masks=("causal",),
        windows=(None, (7, 0)),
        sinks=True,
        phases=PHASES,
        batch_sizes=(1, 3),
    )
    shapes = {(len(c["q"]), c["q"].shape[2], c["k"].shape[2]) for c in calls}
    assert {(1, 513, 513), (3, 513, 513), (1, 513, 1026), (1, 1, 1), (3, 1, 1024)} <= shapes
    assert {c["window"] for c in calls} == {None, (7, 0)}
    assert all(c["v"].shape[3] == 32 and c["sinks"].shape == (4,) and c["softcap"] is None for c in calls)
    assert {c["q"].dtype for c in calls} == {torch.float32}
    assert {c["k"].stride(1) > c["k"].stride(2) for c in calls if c["k"].shape[2] > 1} == {True, False}, "layouts"
    trained = [c for c in calls if c["grad"]]
    assert trained and all(c["sinks"].requires_grad and c["q"].shape[2] == c["k"].shape[2] for c in trained)
    decoded = [c for c in calls if c["q"].shape[2] == 1]
    assert {c.get("kv_lengths") is not None for c in decoded} == {True, False}
    assert any(isinstance(c["mask"], fastattn.Intervals) for c in decoded)
    assert [f.name for f in warmth.families][:2] == ["prefill, causal, batch 1", "prefill, causal, batch 3"]
    assert len(warmth.families) == 6 * 2 * 2
    assert warmth.complete and warmth.built == warmth.loaded == 0


def test_batch_sizes_share_powers_of_two(gpu: PretendedGpu) -> None:
    warmth = warmup(**SMALL, batch_sizes=(3, 4, 5, 8), phases=("prefill", "decode"))
    names = [f.name for f in warmth.families]
    assert names[:2] == ["prefill, causal, batch 4", "prefill, causal, batch 8"]
    assert len(names) == 2 + 4, "decode depends on the batch itself"
    assert {f.served_by for f in warmth.families} == {("decode", "cudnn"), ("decode",)}
    assert warmth.built == len(gpu.plans) == 4 and warmth.families[0].built == 2, "a plan for each layout"


@pytest.mark.parametrize("max_length, forwards, backwards", [(8192, 1, 4), (1024, 1, 1), (1025, 1, 2), (16385, 2, 6)])
def test_training_has_a_plan_per_power_of_two(
    gpu: PretendedGpu, max_length: int, forwards: int, backwards: int
) -> None:
    warmup(**SMALL, max_length=max_length, phases=("training",), layouts=("token_major",))
    found = [key.direction for key in gpu.plans]
    assert all(key.operand("q").dims[0] == 2 for key in gpu.plans)  # type: ignore[union-attr]
    assert (found.count("forward"), found.count("backward")) == (forwards, backwards)


def some_call(
    rng: random.Random,
    q_heads: int,
    kv_heads: int,
    max_length: int,
    batches: tuple[int, ...],
    options: dict[str, Any],
    layouts: Any,
) -> None:
    """One call of a kind that was made ready, at random lengths."""
    phase, batch = rng.choice(PHASES), rng.choice(batches)
    training = phase == "training" or (phase == "packed" and rng.random() < 0.5)
    kv = rng.choice((rng.randint(2, max_length), rng.randint(2, min(100, max_length))))
    q = {"chunked": rng.randint(1, kv), "decode": 1}.get(phase, kv)
    lies = LAYOUTS[rng.choice(layouts)]
    shapes = ((q_heads, q), (kv_heads, kv), (kv_heads, kv))
    x = [
        torch.empty(batch, s, h, 16, dtype=torch.bfloat16).transpose(1, 2)
        if how == "token"
        else torch.empty(batch, h, s + (how == "slice") * rng.choice((0, 3, 50)), 16, dtype=torch.bfloat16)[:, :, :s]
        for how, (h, s) in zip(lies, shapes)
    ]
    arguments = {"mask": rng.choice(options["masks"]), "window": rng.choice(options["windows"])}
    if options.get("sinks"):
        arguments["sinks"] = torch.zeros(q_heads, dtype=torch.bfloat16, requires_grad=training)
    causal = arguments["mask"] == "causal"
    if phase == "packed":
        count = rng.choice([n for n in (3, 10, 15) if n != batch])
        table = torch.zeros(3, count, dtype=torch.int32)
        arguments["mask"] = fastattn.Segments(table, causal)
    elif phase in ("prefill", "training", "chunked") and rng.random() < 0.3:
        arguments["mask"] = fastattn.Segments.left_padded(torch.zeros(batch, dtype=torch.int32), q, kv, causal=causal)
    elif phase in ("chunked", "decode") and rng.random() < 0.5:
        arguments["kv_lengths"] = torch.full((batch,), kv, dtype=torch.int32)
        if phase == "chunked" and rng.random() < 0.5:
            arguments["q_lengths"] = torch.full((batch,), q, dtype=torch.int32)
    if training:
        x = [t.requires_grad_() for t in x]
        out = fastattn.scaled_dot_product_attention(*x, **arguments)
        assert isinstance(out, Tensor)
        out.backward(torch.empty_like(out))
    else:
        with torch.inference_mode():
            fastattn.scaled_dot_product_attention(*x, **arguments)


@pytest.mark.parametrize(
    "heads, max_length, batches, options",
    [
        ((8, 2), 3000, (1, 2, 7, 8), {"masks": ("causal",), "windows": (None, (500, 0))}),
        ((2, 2), 20000, (1, 3), {"masks": (None, "causal"), "windows": (None,)}),
        ((6, 2), 3000, (3, 8), {"masks": ("causal",), "windows": (None, (63, 0)), "sinks": True}),
        ((80, 1), 1500, (1, 2), {"masks": ("causal",), "windows": (None,)}),  # more heads than a tile has rows
        ((8, 2), 40, (1, 2, 7, 8), {"masks": ("causal", None), "windows": (None, (9, 9))}),
    ],
)
def test_no_later_call_needs_anything_else(
    gpu: PretendedGpu,
    heads: tuple[int, int],
    max_length: int,
    batches: tuple[int, ...],
    options: dict[str, Any],
    seed: int,
) -> None:
    layouts = ("token_major", "cache", "head_major")
    sizes = dict(zip(("q_heads", "kv_heads"), heads)) | {"head_dim": 16, "device": "cpu", "progress": False}
    warmup(**sizes, **options, max_length=max_length, batch_sizes=batches, phases=PHASES, layouts=layouts)
    plans, kernels = gpu.plans, gpu.kernels
    gpu.clear()
    rng = random.Random(seed)
    for _ in range(50):
        some_call(rng, *heads, max_length, batches, options, layouts)
    assert gpu.plans and gpu.plans <= plans
    assert gpu.kernels and gpu.kernels <= kernels


def test_less_is_made_ready_for_less(gpu: PretendedGpu) -> None:
    """The test before this one would pass if everything were made ready always."""
    warmup(**SMALL, phases=("prefill",), layouts=("cache",))
    assert len(gpu.plans) == 1
    for more in ({"windows": (None, (5, 0))}, {"masks": ("causal", None)}, {"batch_sizes": (1, 2)}):
        gpu.clear()
        warmup(**SMALL, phases=("prefill",), layouts=("cache",), **more)
        assert len(gpu.plans) == 2


def test_what_is_slow_is_said_and_whether_it_need_be(gpu: PretendedGpu) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastattn.FastattnWarning)
        warmth = warmup(**SMALL, softcap=30.0, phases=("training",))
    (family,) = warmth.families
    assert family.slow and family.served_by == ("reference",)
    assert "cudnn: softcap is not offered" in str(warmth) and "runs on the slow reference" in str(warmth)
    assert warmth.complete, "nothing could be done about it"
    with fastattn.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore", fastattn.FastattnWarning)  # given once a process: another test may have had it
        warmth = warmup(**SMALL, phases=("prefill",))
    assert not warmth.complete, "it was switched off"
    with fastattn.use_backend("decode"):
        warmth = warmup(**SMALL, phases=("training",))
    assert warmth.families[0].slow and "no allowed backend serves it: decode: has no gradients" in str(warmth)
    assert not warmth.complete


def test_too_little_memory_for_one_length_is_said(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    op = run.scaled_dot_product_attention

    def small(q: Tensor, *rest: Any, **arguments: Any) -> Any:
        if q.shape[2] > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return op(q, *rest, **arguments)

    monkeypatch.setattr(run, "scaled_dot_product_attention", small)
    warmth = warmup(**SMALL, max_length=2048, phases=("training",))
    assert warmth.families[0].notes == ("not ready: out of memory at 1025 queries and 1025 keys",)
    assert warmth.families[0].built and not warmth.complete


def test_the_report() -> None:
    families = (
        Family("prefill, causal, batch 1", ("decode", "cudnn"), 2, 1, 1234.0),
        Family("decode, causal, batch 1", ("reference",), 0, 0, 5.0, ("runs on the slow reference: why",), True),
    )
    warmth = Warmth("cuda:0", families, ("layers left out",), 2000.0)
    lines = str(warmth).splitlines()
    assert lines[2].split() == ["prefill,", "causal,", "batch", "1", "decode,", "cudnn", "2", "1", "1234"]
    assert lines[4] == "2 families on cuda:0 in 2.0 s: 2 plans built, 1 read from disk."
    assert lines[5:] == ["decode, causal, batch 1: runs on the slow reference: why.", "Note: layers left out."]
    assert (warmth.built, warmth.loaded, warmth.complete) == (2, 1, False)
    assert "nothing to build" in str(Warmth("cpu", (), (), 0.0))


def test_progress_is_a_line_for_each_family_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    warmup(**(SMALL | {"progress": True}), phases=("decode",), batch_sizes=(1, 2))
    assert capsys.readouterr().err.splitlines() == ["[1/2] decode, causal, batch 1", "[2/2] decode, causal, batch 2"]
    warmup(**SMALL, phases=("decode",))
    assert capsys.readouterr() == ("", "")


def test_the_caller_s_state_is_left_alone(calls: list[dict[str, Any]]) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
        warmup(**SMALL, phases=("training", "decode"), max_length=16)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert {c["grad"] for c in calls} == {True, False} and {c["q"].dtype for c in calls} == {torch.bfloat16}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q_heads": 0}, "q_heads: expected an int, at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads: expected a number that divides q_heads=4, got 3"),
        ({"head_dim": 64.0}, "head_dim: "),
        ({"value_dim": 0}, "value_dim: "),
        ({"dtype": torch.int8}, "dtype: "),
        ({"device": "tpu"}, "device: "),
        ({"batch_sizes": ()}, "batch_sizes: "),
        ({"batch_sizes": (1, 0)}, "batch_sizes: "),
        ({"batch_sizes": 8}, "batch_sizes: "),
        ({"max_length": True}, "max_length: "),
        ({"masks": "causal"}, "masks: expected a sequence"),
        ({"masks": ("bool",)}, "masks: expected one or more of None, 'causal', got 'bool'"),
        ({"windows": (5,)}, r"windows: window: expected a pair \(left, right\), got 5"),
        ({"windows": (5, 0)}, "windows: "),
        ({"sinks": 1}, "sinks: "),
        ({"softcap": 0.0}, "softcap: "),
        ({"phases": ("train",)}, "phases: "),
        ({"layouts": ("bshd",)}, "layouts: "),
        ({"progress": None}, "progress: "),
    ],
)
def test_errors_name_the_argument(calls: list[dict[str, Any]], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        warmup(**(SMALL | wrong))
    assert not calls
