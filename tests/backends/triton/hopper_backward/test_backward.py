"""The Hopper backward: what it takes, and, on a GPU, its results."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import gradient_bounds
import naive
import pytest
import torch
from hopper_backward_cases import COUNT, KINDS, draw, problem_of
from hopper_cases import child

from fastattn.backends.base import NotReady
from fastattn.backends.triton.binaries.store import Binaries
from fastattn.backends.triton.hopper_backward import launch
from fastattn.backends.triton.hopper_backward.binary import BAND, CAUSAL, FULL, INTERVALS
from fastattn.call import Call, Problem

_on_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def problem(**changes: object) -> Problem:
    q, k = torch.empty(2, 8, 300, 128, dtype=torch.bfloat16), torch.empty(2, 2, 500, 128, dtype=torch.bfloat16)
    plain = dataclasses.replace(Problem.of(Call(q, k, k, grads="qkv")), device="cuda", index=0, capability=(9, 0))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_takes_what_it_is_made_for() -> None:
    pytest.importorskip("triton")
    assert launch.reasons(problem()) == []
    everything = problem(
        dtype=torch.float16, left=5, right=3, softcap=30.0, sinks=True, q_lengths=True, kv_lengths=True, grads="qkvs"
    )
    assert launch.reasons(everything) == []
    for mask, shape in (
        ("segments", (5, 9)),
        ("intervals", (1, 300)),
        ("bool", (2, 1, 1, 500)),
        ("additive", (1, 8, 1, 1)),
    ):
        assert launch.reasons(dataclasses.replace(everything, mask=mask, mask_shape=shape)) == []


FIRST = """
import torch, fastattn
q, k, v, grad = torch.randn(4, 1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
leaves = [x.requires_grad_() for x in (q, k, v)]
out = fastattn.scaled_dot_product_attention(*leaves, mask="causal", backend="hopper")
torch.cuda.synchronize()
out.backward(grad)
assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)
print("fine")
"""


@pytest.mark.gpu
@_on_hopper
def test_the_first_thing_that_autograds_thread_does() -> None:
    """It has no CUDA context then."""
    environment = os.environ | {"FASTATTN_COMPILE": "wait"}
    done = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"capability": (10, 0)}, "compute capability 9.0, this device is 10.0"),
        ({"device": "cpu", "capability": (0, 0)}, "this device is a cpu"),
        ({"dtype": torch.float32}, "not float32"),
        ({"mask": "bool", "mask_shape": (1, 1, 300, 500)}, "has no bool mask with a row for each query"),
        ({"mask": "additive", "mask_shape": (2, 8, 300, 500), "grads": "qkvm"}, "has no additive mask with a row"),
        ({"mask": "additive", "mask_shape": (2, 8, 1, 500), "grads": "qkvm"}, "has no gradient of a mask"),
        ({"mask": "additive", "mask_shape": (1, 1 << 14, 1, 1), "kv_len": 1 << 17, "batch": 1}, "tokens"),
        ({"head_dim": 136}, "head dim 136 with value dim 128: both must be multiples of 8 up to 256"),
        ({"head_dim": 192}, "padding must not be more than 30% of the work"),
        ({"head_dim": 264, "value_dim": 256}, "head dim 264"),
        ({"value_dim": 20}, "value dim 20"),
        ({"kv_len": 0}, "no queries or no keys"),
        ({"kv_len": (1 << 28) + 1}, "tokens"),
        ({"q_len": 1 << 26}, "tokens"),
    ],
)
def test_says_why_not(changes: dict[str, object], words: str) -> None:
    pytest.importorskip("triton")
    why = launch.reasons(problem(**changes))
    assert len(why) == 1 and words in why[0]


def test_results_repeat_where_they_must() -> None:
    """By binaries of their own, whatever hides keys and however the work is split; no other one is among them."""
    pytest.importorskip("triton")
    keys = {"mask": "bool", "mask_shape": (2, 1, 1, 500), "mask_dtype": torch.bool}
    everything = {"left": 5, "softcap": 30.0, "sinks": True, "q_lengths": True, "kv_lengths": True, "grads": "qkvs"}
    for changes in (
        {},
        {"right": 0},
        {"right": 0, "left": 300},
        {"mask": "segments", "mask_shape": (5, 9)},
        keys,
        everything,
    ):
        p = problem(deterministic=True, **changes)
        assert launch.reasons(p) == []
        main = [x for x in launch.binaries(p) if not hasattr(x, "kernel")]
        assert len(main) == 2 and all(x.ordered for x in main)
        plain = launch.binaries(dataclasses.replace(p, deterministic=False))
        assert {dataclasses.replace(x, ordered=False) for x in main} == {x for x in plain if not hasattr(x, "kernel")}
    assert launch.reasons(problem(deterministic=True, mask="bool", mask_shape=(1, 1, 300, 500)))


def test_counters_are_memory_of_the_call() -> None:
    p = problem(sinks=True)
    tiles, blocks = 2 * 8 * 5, 2 * 2 * 4
    for split, count in ((False, tiles + 1), (True, tiles + blocks + 1)):
        assert "counters" not in launch.pieces_of(p, 128, split, 0).at
        begin, end, dtype = launch.pieces_of(p, 128, split, 0, True).at["counters"]
        assert (end - begin, dtype) == (4 * count, torch.int32)


def test_what_hides_keys() -> None:
    """Bounds of rows wherever a query may see nothing, or nobody may see a key."""
    assert launch.mask_of(problem()) == FULL
    assert launch.mask_of(problem(right=0)) == CAUSAL
    assert launch.mask_of(problem(right=0, left=200)) == BAND
    assert launch.mask_of(problem(right=0, left=199)) == INTERVALS  # keys before the first query's window
    assert launch.mask_of(problem(right=0, q_len=501)) == INTERVALS  # the first query sees nothing
    assert launch.mask_of(problem(right=1, q_len=501)) == BAND
    assert launch.mask_of(problem(left=3, q_len=600)) == BAND
    for other in ({"kv_lengths": True}, {"q_lengths": True}, {"mask": "segments"}, {"mask": "intervals"}):
        assert launch.mask_of(problem(**other)) == INTERVALS
    keys = problem(mask="bool", mask_shape=(2, 1, 1, 500), mask_dtype=torch.bool)
    assert launch.flags(keys, False) == launch.Flags("bf16", 128, INTERVALS, biased=True)
    assert not launch.flags(problem(mask="segments", mask_shape=(5, 9)), False).biased


def test_a_problem_of_every_mask_knows_its_binaries() -> None:
    pytest.importorskip("triton")
    keys = {"mask": "additive", "mask_shape": (2, 1, 1, 500), "mask_dtype": torch.float32}
    segments = {"mask": "segments", "mask_shape": (5, 9)}
    for changes in ({}, {"right": 0}, segments, keys, {"sinks": True, "return_lse": True}):
        found = launch.binaries(problem(**changes))
        assert len(set(found)) == len(found)
        kernels = [x.kernel.rpartition(":")[2] for x in found if hasattr(x, "kernel")]
        # Where programs share blocks of keys there are sums of dK and dV besides.
        assert kernels.count("finish_kernel") == 2
        assert kernels.count("prepare_kernel") == (4 if changes.get("return_lse") else 2)
        assert ("bounds_kernel" in kernels, "extents_kernel" in kernels) == ("mask" in changes,) * 2
        assert ("key_bias_kernel" in kernels) == (changes is keys)
        main = [x for x in found if not hasattr(x, "kernel")]
        own = main[0].split
        assert main == [launch.flags(problem(**changes), split) for split in (own, not own)]


@pytest.mark.parametrize("batch, q_heads, kv_heads, head_dim", [(2, 8, 4, 256), (2, 16, 8, 128), (8, 32, 8, 128)])
@pytest.mark.parametrize("mask", ["causal", "segments", "keys"])
def test_binaries_of_a_problem_are_those_of_other_lengths(
    batch: int, q_heads: int, kv_heads: int, head_dim: int, mask: str
) -> None:
    """As few lengths as `warmup` tries must do for all."""
    pytest.importorskip("triton")

    def of(length: int) -> Problem:
        masks = {
            "causal": {"right": 0},
            "segments": {"right": 0, "mask": "segments", "mask_shape": (5, batch)},
            "keys": {"mask": "bool", "mask_shape": (batch, 1, 1, length), "mask_dtype": torch.bool},
        }
        sizes = {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "q_len": length, "kv_len": length}
        return problem(**sizes, head_dim=head_dim, value_dim=head_dim, **masks[mask])

    ready, splits = set(launch.binaries(of(513))), set[bool]()
    for length in (1, 60, 200, 700, 1500, 4000, 9000):
        call = launch.representative(of(length))
        bound = launch.Backward(of(length), call, loads=False)
        out = launch.token_major(call.q, batch, q_heads, length, head_dim)
        assert {bound.flags, *bound.others(call, out)} <= ready, length
        splits.add(bound.flags.split)
    assert splits == {True, False}


def test_a_call_is_not_bound_before_its_binaries_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    monkeypatch.setattr(launch.store, "shared", Binaries())
    q = torch.empty(1, 2, 9, 128, dtype=torch.bfloat16)
    with pytest.raises(NotReady, match="FASTATTN_COMPILE=off"):
        launch.bind(problem(batch=1, q_heads=2, kv_heads=2, q_len=9, kv_len=9), Call(q, q, q, grads="qkv"))


@pytest.mark.parametrize("dim, keys", [(64, 128), (128, 128), (256, 64)])
def test_memory_holds_what_the_kernels_write(dim: int, keys: int) -> None:
    p = problem(head_dim=dim, value_dim=dim, mask="segments", mask_shape=(5, 9), softcap=50.0)
    assert launch.reasons(p) == [] and launch.flags(p, True).dim == dim
    blocks = -(-500 // keys)
    at = launch.pieces_of(p, dim, True, 1000).at
    sizes = {name: end - begin for name, (begin, end, _) in at.items()}
    assert sizes["dkv"] == 4 * 2 * 2 * 2 * blocks * keys * dim
    assert sizes["dq"] == 4 * 2 * 8 * 5 * 64 * dim
    assert sizes["extents"] == 4 * 2 * (4 * blocks + 5 + keys * blocks)


@pytest.mark.parametrize(
    "dims, padded",
    [((128, 128), 128), ((64, 8), 64), ((136, 136), None), ((176, 176), None), ((184, 184), 256), ((192, 128), None),
     ((256, 64), 256), ((256, 56), None), ((200, 176), 256), ((256, 256), 256), ((256, 264), None), ((250, 250), None)],
)  # fmt: skip
def test_padded_dims(dims: tuple[int, int], padded: int | None) -> None:
    assert launch.dim_of(problem(head_dim=dims[0], value_dim=dims[1])) == padded


def test_pieces_of_the_memory_are_apart() -> None:
    p = problem(sinks=True, mask="segments", mask_shape=(5, 9))
    where = launch.pieces_of(p, 128, True, 1000)
    names = ("bounds", "extents", "rows", "sinks", "dq", "dkv", "clean_q", "clean_grad_out")
    places = [where.at[name][:2] for name in names]
    for (_, end), (begin, _) in zip(places, [*places[1:], (where.total, 0)], strict=True):
        assert end <= begin and begin % 256 == 0
    assert all(begin < end for begin, end in places)


@pytest.mark.parametrize("name", KINDS)
def test_cases_are_what_their_kind_says(name: str) -> None:
    """What the GPU test draws reaches the binary that it is to test."""
    pytest.importorskip("triton")
    kind = KINDS[name]
    for i in range(COUNT):
        case = draw(kind, random.Random(f"{name} {i}"), i)
        found = problem_of(kind, case)
        assert launch.reasons(found) == []
        mask = launch.mask_of(found)
        assert launch.flags(found, False).biased == (found.mask in ("bool", "additive"))
        if kind.masks or kind.q_lengths or kind.kv_lengths:
            assert mask == INTERVALS
        elif kind.band in ("full", "causal"):
            assert mask == (FULL if kind.band == "full" else CAUSAL)
        if kind.split:
            assert found.group % kind.split == 0


@pytest.mark.parametrize("window", [(-1, 0), (0, 0)], ids=["causal", "one-key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_bounds_of_errors_hold_and_notice(window: tuple[int, int], dtype: torch.dtype) -> None:
    """Of gradients by the formula, with what the kernel rounds rounded: right; what is a little off in a row is not."""
    q, k, v, grad_out = (torch.randn(2, 3, 200, 64).to(dtype) for _ in range(4))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = naive.attention(*leaves, window=window)
    out, there = truth.out.detach().to(dtype), torch.ones(2, 3, 200, dtype=torch.bool)
    shift = gradient_bounds.shift(out, truth.out.detach(), grad_out, there)
    plain = (truth.out * grad_out.double()).sum()
    wanted = torch.autograd.grad(plain - (truth.lse * shift).sum(), leaves, retain_graph=True)
    floors = gradient_bounds.floors(q, k, v, grad_out, there, 0.125)
    scores = (q.float() @ k.float().mT * 0.125).masked_fill(~naive.visible(q, k, window=window), -torch.inf)
    p = (scores - truth.lse.detach().float()[..., None]).exp()
    delta = (out.float() * grad_out.float()).flip(-1).cumsum(-1)[..., -1:]  # float32, in another order than dP
    ds = (p * (grad_out.float() @ v.float().mT - delta)).to(dtype).float()
    found = ds @ k.float() * 0.125, ds.mT @ q.float() * 0.125, p.to(dtype).float().mT @ grad_out.float()

    def right(name: str, x: torch.Tensor, true: torch.Tensor) -> bool:
        error, row = gradient_bounds.errors(x.to(dtype), true, floors[name], dtype)
        return error < gradient_bounds.WORST[dtype] and row < gradient_bounds.ROW[dtype]

    for name, x, true in zip("qkv", found, wanted, strict=True):
        assert right(name, x, true)
        assert right(name, true, true) and not right(name, x * torch.nan, true)
        off = x.clone()
        off[1, 2, 77] += 0.05 * torch.randn(64).mul(off[1, 2, 77].norm() / 8) + (1e-3 if window[0] == 0 else 0)
        assert not right(name, off, true)
    # What the truth takes the rounded output for is what the formula makes of it.
    exact = scores.double().sub(truth.lse.detach()[..., None]).exp()
    exact = exact * (grad_out.double() @ leaves[2].mT - (out.double() * grad_out.double()).sum(-1, keepdim=True))
    torch.testing.assert_close(exact.detach() @ k.double() * 0.125, wanted[0], atol=1e-4, rtol=1e-4)
    unrounded = torch.autograd.grad(plain, leaves)
    assert torch.equal(unrounded[0], wanted[0]) or (unrounded[0] - wanted[0]).abs().max() > 1e-4


@pytest.mark.gpu
@_on_hopper
@pytest.mark.parametrize("name", KINDS)
def test_equals_the_truth(name: str, seed: int) -> None:
    pytest.importorskip("triton")
    done = child("hopper_backward_cases", name, 6, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done ") == 6
