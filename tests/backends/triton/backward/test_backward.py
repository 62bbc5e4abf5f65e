"""The portable backward against float64: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, a_problem, assert_right, make, reference_results
from features import BROADCASTS, FEATURES
from portable_backward import call_of, check, gradients
from portable_cases import SERVED, sized
from torch import Tensor

from fastattn import reference
from fastattn.backends.triton.backward import backward, launch, launch_config
from fastattn.backends.triton.backward.before import Before
from fastattn.backends.triton.backward.sizes import Sizes, Walk
from fastattn.call import Problem

pytestmark = pytest.mark.usefixtures("poison")

#: Several blocks of queries and keys, heads padded, lengths that are multiples of nothing.
CASE = Case(batch=2, q_heads=2, kv_heads=1, q_len=37, kv_len=50, head_dim=24, dtype=FP32, return_lse=True)


#: Where the batch does not matter: the interpreter takes its time.
ONE = CASE.but(batch=1)


#: Of `SERVED` the interpreter runs what `BLOCKS`, `MASKS`, and the tests of dims and layouts do not have in several
#: blocks, and one of each kind that they have.
INTERPRETED = (
    "additive-float",
    "additive-sliced",
    "bool-none-0d",
    "bool-one-key",
    "bool-sliced",
    "everything",
    "finfo-keys",
    "heads-three",
    "intervals-11",
    "intervals-lengths",
    "left-padding-long-q",
    "one-key-sinks",
    "one-query",
    "scale-negative",
    "scale-zero",
    "segments-apart-causal",
    "segments-window",
    "sinks-bool",
    "value-dim-larger",
    "window-additive",
)


@pytest.mark.parametrize("name", SERVED)
def test_features(name: str, device: str) -> None:
    if device == "cpu" and name not in INTERPRETED:
        pytest.skip("the interpreter takes its time: see INTERPRETED")
    case = FEATURES[name]
    check(case.but(return_lse=True, dtype=FP32 if case.dtype == FP64 else case.dtype), device)


BLOCKS = {
    "plain": ONE,
    "causal": ONE.but(mask="causal", q_heads=4, kv_heads=2),
    "causal-long-q": ONE.but(mask="causal", q_len=50, kv_len=37),
    "causal-square": ONE.but(mask="causal", q_len=50, sinks=BF16),
    "window": ONE.but(window=(30, 0)),
    "window-narrow": ONE.but(window=(3, 0)),
    "window-two-sided": ONE.but(window=(20, 3), q_len=50),
    "window-ahead": ONE.but(window=(-1, 9)),
    "window-of-nobody": ONE.but(window=(4, 0), q_len=20, kv_len=75),  # keys before every window
    "lengths": CASE.but(kv_lengths=(19, 0), mask="causal"),
    "lengths-outside": CASE.but(kv_lengths=(-7, 1000), mask="causal"),
    "lengths-both": CASE.but(batch=3, kv_lengths=(33, 1, 50), q_lengths=(20, 37, 0), mask="causal", sinks=BF16),
    "lengths-window": CASE.but(kv_lengths=(50, 18), window=(20, 0)),
    "intervals": CASE.but(mask="intervals:bq"),
    "intervals-shared": CASE.but(mask="intervals:b1", kv_lengths=(40, 50)),
    "intervals-window": ONE.but(mask="intervals:1q", window=(30, 0), sinks=FP32),
    "segments": CASE.but(mask="segments:5", sinks=FP32),
    "packed": CASE.but(mask="segments:3c", q_len=50),
    "left-padded": CASE.but(mask="segments:pc"),
    "sinks": ONE.but(sinks=FP32, mask="causal"),
    "sinks-nothing-seen": CASE.but(sinks=FP32, kv_lengths=(0, 0)),
    "softcap": ONE.but(softcap=3.0, mask="causal"),
    "softcap-bias": ONE.but(softcap=3.0, mask="additive:1hqk", sinks=FP32),
    "finfo": CASE.but(mask="finfo:b1qk"),
    "finfo-float64": ONE.but(mask="finfo:b1qk", mask_dtype=FP64, return_lse=False),
    "finfo-lengths": CASE.but(mask="finfo:b1qk", kv_lengths=(45, 20), mask_dtype=FP32),
    "additive-bf16": CASE.but(mask="additive:b1qk", mask_dtype=BF16, kv_lengths=(45, 20)),
    "additive-rare": ONE.but(mask="additive:b1qk", keep=0.02),  # hidden blocks
    "additive-whole": CASE.but(mask="additive:bhqk", window=(20, 5)),
    "bool-rare": ONE.but(mask="bool:b1qk", keep=0.02, sinks=FP32),
    "bool-all": CASE.but(mask="bool:bhqk", keep=1.0, kv_lengths=(50, 33)),
    "bool-none": ONE.but(mask="bool:b1qk", keep=0.0, sinks=FP32),
    "keys": CASE.but(mask="bool:b11k", keep=0.1, kv_len=90),
    "keys-all": ONE.but(mask="bool:b11k", keep=1.0, window=(20, 0)),
    "keys-none": ONE.but(mask="bool:b11k", keep=0.0),
    "keys-lengths": CASE.but(mask="bool:111k", q_lengths=(37, 5), kv_lengths=(40, 50)),
    "key-bias": CASE.but(mask="additive:1h1k", window=(30, 3), kv_lengths=(40, 50)),
    "key-bias-of-each-head": ONE.but(mask="additive:1h1k", kv_heads=2, keep=0.5),
    "window-bool": ONE.but(mask="bool:1hqk", window=(20, 2)),
    "everything": CASE.but(
        mask="additive:b1qk", window=(50, 1), q_lengths=(30, 1), kv_lengths=(50, 40), sinks=FP32, softcap=4.0, scale=0.3
    ),
}


#: Of these the interpreter runs in half precision too: one for each way to find which keys a tile sees.
IN_HALF = (
    "causal",
    "window-narrow",
    "lengths-both",
    "intervals-window",
    "segments",
    "softcap-bias",
    "bool-all",
    "keys",
    "key-bias",
    "finfo",
)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, dtype: torch.dtype, device: str) -> None:
    """Several blocks of queries and of keys: full, partial and hidden ones."""
    if dtype == FP16 and device == "cpu" and name not in IN_HALF:
        pytest.skip("the interpreter takes its time: see IN_HALF")
    check(sized(BLOCKS[name].but(dtype=dtype), device), device)


#: What the kernels tell apart of `BROADCASTS`: dims that are missing in front are dims of size 1 to them.
MASKS = ("bhqk", "b1qk", "1h1k", "b11k", "11q1", "1hq1", "hqk", "qk", "h11", "k", "")


def test_masks_are_all_that_kernels_tell_apart() -> None:
    def shapes(masks: Sequence[str]) -> list[Any]:
        return [Problem.of(call_of(make(CASE.but(mask=f"bool:{letters}")))).mask_shape for letters in masks]

    assert sorted(shapes(MASKS)) == sorted(set(shapes(BROADCASTS)))


@pytest.mark.parametrize("shape, listed", [(x, False) for x in MASKS] + [(x, True) for x in MASKS if x.endswith("qk")])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_broadcast_masks(kind: str, shape: str, listed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without lists of blocks, where there can be any; the gradient of an additive mask is summed over its
    broadcast dims."""
    monkeypatch.setattr(launch_config, "listed", lambda p: listed)
    case = CASE.but(mask=f"{kind}:{shape}", keep=0.3, q_len=20, kv_len=35, head_dim=16)
    check(sized(case, device), device)


@pytest.mark.parametrize("mask", ["causal", "additive:1hqk"])
@pytest.mark.parametrize(
    "dims",
    [
        *((n, n) for n in (8, 24, 32, 40, 64, 72, 96, 112, 144, 160, 256, 288, 512)),
        *((192, 128), (128, 192), (576, 512)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_head_dims(
    dims: tuple[int, int], dtype: torch.dtype, mask: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of parts that a head dim has (`tile_parts.py`); on a GPU with the tiles that are listed."""
    if device == "cuda":
        monkeypatch.setattr(backward, "choose", launch_config.choose)
    head, value = dims
    if device == "cpu" and mask != "causal" and (head > 96 or dtype == BF16):
        pytest.skip("the interpreter takes its time: parts of every kind are among the smaller dims")
    if device == "cpu" and (dims == (512, 512) or (dtype == BF16 and head >= 256)):
        pytest.skip("the interpreter takes its time: 256 is in one part, too, 576 larger, and smaller dims in parts")
    check(CASE.but(mask=mask, head_dim=head, value_dim=value, dtype=dtype, q_len=20, kv_len=23), device)


@pytest.mark.parametrize("layout", ["bshd", "sliced", "cache", "expanded", "strided", "misaligned", "dmajor"])
@pytest.mark.parametrize("mask", ["causal", "additive:b1qk"])
def test_layouts(layout: str, mask: str, device: str) -> None:
    check(CASE.but(layout=layout, mask=mask, dtype=FP16, q_len=20, kv_len=23), device)


@pytest.mark.parametrize("grads", ["q", "k", "v", "kv", "m", "s", "qms"])
def test_what_is_asked_for(grads: str, device: str) -> None:
    """Gradients of a part of the inputs; `gradients` asserts that there are no others."""
    check(ONE.but(mask="additive:1hqk", sinks=FP32, grads=grads, q_len=20, kv_len=23), device)


def upstream(layout: str, x: Tensor) -> Tensor:
    if layout == "expanded":
        return torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
    if layout == "strided":
        return torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)[..., 0].copy_(x)
    return x.mT.contiguous().mT


@pytest.mark.parametrize("layout", ["expanded", "strided", "d-major"])
def test_upstream_gradients_of_any_layout(layout: str, device: str) -> None:
    inputs = make(CASE.but(mask="causal", dtype=FP16, grads="qkv", q_len=20, kv_len=23), device)
    inputs.grad_out = upstream(layout, inputs.grad_out)
    got = gradients(inputs)
    packed = dataclasses.replace(inputs, grad_out=inputs.grad_out.contiguous())
    want = gradients(packed)
    assert all(torch.equal(x, want[name]) for name, x in got.items())


@pytest.mark.parametrize("sinks", [None, FP32], ids=str)
@pytest.mark.parametrize("mask", ["bool:b1qk", "additive:b1qk", "intervals:bq", "segments:5", "none"])
def test_nothing_flows_back_from_rows_that_see_nothing(mask: str, sinks: Any, device: str) -> None:
    """Also where the gradient of their output is NaN."""
    case = CASE.but(mask=mask, sinks=sinks, q_len=30, kv_len=40, return_lse=False)
    if mask == "none":
        case = case.but(q_lengths=(17, 3), kv_lengths=(20, 0))
    case = case.but(grads=case.leaves)
    inputs = make(case, device)
    masked = ~inputs.seen.any(-1).expand(inputs.grad_out.shape[:3])
    assert masked.any()
    clean = gradients(dataclasses.replace(inputs, grad_out=inputs.grad_out.masked_fill(masked[..., None], 0.0)))
    got = gradients(dataclasses.replace(inputs, grad_out=inputs.grad_out.masked_fill(masked[..., None], torch.nan)))
    assert all(torch.equal(x, clean[name]) for name, x in got.items())
    assert (got["dq"][masked] == 0).all()
    keys = ~inputs.seen.any(2).expand(case.batch, case.q_heads, case.kv_len).any(1)
    assert (got["dk"][keys[:, None].expand(got["dk"].shape[:3])] == 0).all()
    assert (got["dv"][keys[:, None].expand(got["dv"].shape[:3])] == 0).all()


@pytest.mark.parametrize("sink", [-torch.inf, 0.5])
def test_values_of_zero_beside_a_sink(sink: float, device: str) -> None:
    """Their output is 0, as is that of rows of which the mask hides every key. A sink of -inf is none."""
    case = CASE.but(mask="bool:b1qk", sinks=FP32, grads="v", q_len=20, kv_len=23, return_lse=False)
    inputs = make(case, device)
    for x in (inputs.v.detach(), inputs.clean[2]):
        x.zero_()
    inputs.options["sinks"] = torch.full_like(inputs.options["sinks"], sink)
    want = reference_results(inputs)["dv"]
    assert want.abs().min() > 0
    assert_right(case, inputs, gradients(inputs), {"dv": want})


@pytest.mark.parametrize("low", [torch.finfo(FP32).min, -1e9], ids=["finfo", "1e9"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "finfo:b1qk"},
        {"mask": "finfo:bhqk", "sinks": FP32, "softcap": 3.0, "kv_lengths": (30, 20)},
        {"mask": "finfo:b1qk", "dtype": FP16, "return_lse": False},
        {"mask": "finfo:b11k", "keep": 0.0, "kv_len": 90},
        {"mask": "finfo:1hqk", "keep": 0.1, "batch": 3, "kv_heads": 2, "q_len": 13, "kv_len": 15},
    ],
    ids=["rows", "everything", "half", "keys", "window"],
)
def test_what_flows_into_rows_whose_scores_drown_in_their_bias(
    changes: dict[str, Any], low: float, device: str
) -> None:
    """Such a row sees all its keys alike, and float32 has no room for log(n) beside the bias: see `coarse_kernel`."""
    case = sized(CASE.but(**({"mask_dtype": FP32, "q_len": 20, "kv_len": 35} | changes)), device)
    case = case.but(grads=case.leaves)
    inputs = make(case, device)
    mask = inputs.options["mask"].detach()
    drowned = ((mask == torch.finfo(FP32).min) | ~inputs.seen).all(-1) & inputs.seen.any(-1)
    assert drowned.any()
    other = make(case.but(mask="none", grads=""), device, seed=1)  # whose gradients are 0 nowhere
    inputs = dataclasses.replace(inputs, grad_out=other.grad_out, grad_lse=other.grad_lse)
    want = {name: x for name, x in reference_results(inputs).items() if name.startswith("d")}
    given = mask.masked_fill(mask == torch.finfo(FP32).min, low).requires_grad_()
    inputs = dataclasses.replace(inputs, options=inputs.options | {"mask": given}, leaves=inputs.leaves | {"m": given})
    assert_right(case, inputs, gradients(inputs), want)


@pytest.mark.parametrize("name", ["additive-whole", "key-bias", "everything"])
def test_every_row_can_be_taken_apart(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_config, "coarse", lambda p: 0.0)
    check(sized(BLOCKS[name], device), device)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "keys"])
def test_rows_that_are_taken_apart_meet_blocks_without_bias(
    rows: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of which are in the run of a list of keys, and others are not."""
    monkeypatch.setattr(launch_config, "coarse", lambda p: 0.0)
    case = CASE.but(mask="additive:b1qk" if rows else "additive:b11k", mask_dtype=FP32, keep=1.0, kv_len=70)
    case = sized(case, device)
    case = case.but(grads=case.leaves)
    inputs = make(case, device)
    mask = inputs.options["mask"].detach().clone()
    block = 16 if device == "cpu" else 64
    mask[..., :block] = 0.0
    mask[..., 2 * block : 3 * block] = 0.0
    mask.requires_grad_()
    inputs = dataclasses.replace(inputs, options=inputs.options | {"mask": mask}, leaves=inputs.leaves | {"m": mask})
    want = {name: x for name, x in reference_results(inputs).items() if name.startswith("d")}
    assert_right(case, inputs, gradients(inputs), want)


@pytest.mark.parametrize("name", ["packed", "additive-whole", "key-bias", "everything"])
def test_bits_repeat(name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("the interpreter runs programs one after another: there no order changes")
    case = sized(BLOCKS[name].but(dtype=FP16), device)
    inputs = make(case.but(grads=case.leaves), device)
    first = gradients(inputs)
    for _ in range(10):
        again = gradients(inputs)
        assert all(torch.equal(x, again[n]) for n, x in first.items())


def test_one_kernel_serves_other_data(device: str) -> None:
    """Lengths and scale of a call are data; the log-sum-exp and its gradient may lie in memory as they like."""
    case = CASE.but(mask="causal", kv_lengths=(19, 44), q_len=20, kv_len=45, grads="qkv")
    inputs = make(case, device)
    call = call_of(inputs)
    kernel = launch.bind(Problem.of(call), call)
    other = make(case.but(kv_lengths=(45, 3), scale=0.4), device, seed=5)
    other.grad_lse = other.grad_lse.mT.contiguous().mT
    fresh, reused = gradients(other), gradients(other, kernel)
    assert all(torch.equal(x, reused[name]) for name, x in fresh.items())


@pytest.mark.parametrize("group", [3, 4])
def test_programs_share_a_group(group: int, device: str) -> None:
    case = ONE.but(q_heads=group, kv_heads=1, mask="causal", grads="qkv", q_len=20, kv_len=40)
    call = call_of(make(case, device))
    p = Problem.of(call)
    tiles = backward.choose(p)
    assert Sizes(p, tiles, 0, Before(p, call, tiles)).group_parts == group
    check(case, device)


@pytest.mark.parametrize("shape", ["bhqk", "b1qk", "1hqk", "1h1k", "b11k", "11q1", "1"])
def test_programs_share_a_sum(shape: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, and not where there are programs enough."""
    case = CASE.but(mask=f"additive:{shape}", q_len=20, kv_len=40, grads="m", batch=3)
    p = Problem.of(call_of(make(case, device)))
    walk = Walk.of(p, backward.choose(p))
    assert (walk.parts > 1) == (shape != "bhqk")
    check(case, device)
    monkeypatch.setattr(launch_config, "PROGRAMS", 1)
    assert Walk.of(p, backward.choose(p)).parts == 1
    check(case, device)


#: A tile holds all queries and keys.
WINDOW = CASE.but(batch=3, kv_heads=2, q_len=13, kv_len=15, mask="additive:1hqk")
WINDOWS = {
    "plain": WINDOW,
    "shared-by-heads": WINDOW.but(mask="additive:hqk", q_heads=1, kv_heads=1, dtype=FP16),
    "bounds": WINDOW.but(window=(3, 0), kv_lengths=(15, 9, 0), q_lengths=(13, 4, 13), softcap=3.0),
    "finfo": WINDOW.but(mask="finfo:1hqk", mask_dtype=BF16, sinks=FP32, head_dim=72, value_dim=40),
    "mask-alone": WINDOW.but(grads="m"),
    "without-keys": WINDOW.but(grads="qm"),
    "without-queries": WINDOW.but(grads="kvm"),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_small_windows_take_one_pass(name: str, device: str) -> None:
    case = WINDOWS[name]
    call = call_of(make(case.but(grads=case.grads or case.leaves), device))
    p = Problem.of(call)
    assert Walk.of(p, backward.choose(p)).whole
    assert not Walk.of(dataclasses.replace(p, q_len=65), backward.choose(p)).whole
    kernels = {x.kernel.split(":")[1] for x in launch.binaries(dataclasses.replace(p, device="cuda"))}
    assert "bias_kernel" in kernels and not kernels & {"keys_kernel", "queries_kernel"}
    check(case, device)


def test_gradients_of_a_mask_take_no_more_memory_than_they_have() -> None:
    """A mask of a head for all batch entries: neither is it repeated nor are its scores kept."""
    p = a_problem(
        batch=8, q_heads=12, kv_heads=12, q_len=2048, kv_len=2048, head_dim=64, value_dim=64, right=-1, grads="qkvm",
        mask="additive", mask_shape=(1, 12, 2048, 2048), mask_dtype=BF16,
    )  # fmt: skip
    walk = Walk.of(p, launch_config.choose(p))
    assert walk.parts == 1 and walk.each == 8


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_other_lengths_have_their_launches_prepared(kv_heads: int) -> None:
    """Lengths pick another launch where programs are few, and whether they share a group: none that is not named."""
    p = a_problem(q_len=2048, kv_len=2048, kv_heads=kv_heads, grads="qkv")
    named = {(x.keys, x.queries, parts > 1) for x, parts in launch_config.variants(p)}
    assert launch_config.variants(p)[0][0] == launch_config.choose(p)
    met = set()
    for n in (1, 64, 300, 500, 1000, 2048, 3000, 8192, 30000):
        for batch in (1, 16):
            other = dataclasses.replace(p, q_len=n, kv_len=n, batch=batch)
            chosen = launch_config.choose(other)
            met.add((chosen.keys, chosen.queries, launch_config.group_parts(other, chosen) > 1))
    assert len(met) > 1
    assert {(keys, shared) for keys, _, shared in met} <= {(keys, shared) for keys, _, shared in named}
    assert {queries for _, queries, _ in met} <= {queries for _, queries, _ in named}


def test_refusals() -> None:
    taken = a_problem(q_len=512, grads="qkv")
    assert launch.reasons(taken) == launch.reasons(dataclasses.replace(taken, head_dim=576, value_dim=512))
    for change, word in (
        ({"head_dim": 584}, "head dim 584"),
        ({"value_dim": 20}, "value dim 20"),
        ({"dtype": FP64}, "float64"),
        ({"kv_len": 0}, "no keys"),
        ({"q_len": 1 << 29}, "tokens"),
        ({"capability": (7, 5)}, "7.5"),
        ({"capability": (8, 6), "dtype": FP32, "head_dim": 576, "value_dim": 512}, "shared memory"),
    ):
        why = launch.reasons(dataclasses.replace(taken, **change))
        assert any(word in reason for reason in why), (change, why)


def test_reference_agrees_where_the_helper_relies_on_it() -> None:
    """The helper's forward is the reference's: a log-sum-exp in natural logarithms, -inf in rows without keys."""
    inputs = make(CASE.but(mask="bool:b1qk", grads="q"))
    call = call_of(inputs)
    _, lse = reference.forward(Problem.of(call), call)
    assert torch.equal(lse == -torch.inf, ~inputs.seen.any(-1).expand(lse.shape))
