"""What a call costs the host does not grow: Python function calls, calls of built-in functions, operators of torch.

The figures of `RECORDED` are those of the code as it is. A change that needs more of something says so here, with the
reason; one that needs less lowers the figure. (`python -m benchmarks.host` has the times.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

import hopper_launches
import native_driver
from counted import Counts, counted, without_gradients
from pretended_gpu import pretend
from torch import Tensor

import fastattn
from benchmarks.null_backend import null_backend
from fastattn import Intervals, Segments, debug, drop_in
from fastattn.backends.triton.hopper import segments
from fastattn.integrations.torch import decide, patching

attend, varlen = fastattn.scaled_dot_product_attention, fastattn.varlen_attention

B, H, HKV, S, D = 2, 4, 2, 16, 8


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """No settings of the machine's."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET", "FASTATTN_PLANS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(debug, "ENABLED", False)


def made(heads: int, length: int = S, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, length, heads, D, dtype=dtype).transpose(1, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def options_of(name: str) -> dict[str, Any]:
    return {
        "plain": {},
        "causal": {"mask": "causal"},
        "scaled": {"mask": "causal", "scale": 0.3},
        "lengths": {"mask": "causal", "kv_lengths": ints(S, 3)},
        "mask": {"mask": torch.ones(1, 1, S, S, dtype=torch.bool)},
        "keys": {"mask": torch.ones(B, 1, 1, S, dtype=torch.bool)},
        "sinks": {"mask": "causal", "sinks": torch.zeros(H)},
        "segments": {"mask": Segments(ints(0, 0, 9, 1, 2, 9).view(2, 3).T.contiguous(), True)},
        "intervals": {"mask": Intervals(ints(0, 1)[:, None], ints(9, 4)[:, None])},
    }[name]


def forward(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    return partial(attend, made(H, dtype=dtype), made(HKV, dtype=dtype), made(HKV, dtype=dtype), **options_of(name))


def both(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """Forward and backward."""
    leaves = [made(heads, dtype=dtype).requires_grad_() for heads in (H, HKV, HKV)]
    options, grad_out = options_of(name), made(H, dtype=dtype)
    if "sinks" in options:
        leaves.append(options["sinks"].requires_grad_())

    def run() -> Any:
        return torch.autograd.grad(attend(*leaves[:3], **options), leaves, grad_out)

    return run


def packed(differentiated: bool) -> Callable[[], Any]:
    q, k, v = (torch.randn(S, heads, D, requires_grad=differentiated) for heads in (H, HKV, HKV))
    cu, grad_out = ints(0, 5, S), torch.randn(S, H, D)

    def run() -> Any:
        out = varlen(q, k, v, cu, cu, causal=True)
        return torch.autograd.grad(out, (q, k, v), grad_out) if differentiated else out

    return run


def operator() -> Callable[[], Any]:
    """What a compiled graph calls."""
    from prepared import prepared

    call = prepared(made(H), made(HKV), made(HKV), mask="causal")
    return without_gradients(partial(torch.ops.fastattn.attention, *call, "null"))


def layer(mask: bool) -> Callable[[], Any]:
    """A layer of a transformers model."""
    pytest.importorskip("transformers")
    from fastattn.integrations.transformers import attention_forward, interval_mask

    made_mask = interval_mask(B, S, S) if mask else None
    inputs = made(H), made(HKV), made(HKV)
    return partial(attention_forward, torch.nn.Module(), *inputs, made_mask, scaling=0.3, is_causal=True)


def cache_step() -> Callable[[], Any]:
    """A token of generation, in one layer."""
    sizes = {"layers": 1, "batch": B, "kv_heads": HKV, "head_dim": D, "capacity": 64}
    cache = fastattn.KVCache(**sizes, dtype=torch.float32, device="cpu")
    q, k, v = made(H, 1), made(HKV, 1), made(HKV, 1)

    def run() -> Any:
        cache.reset()
        cache.step(1)
        return cache.attend(0, q, k, v)

    return without_gradients(run)


#: Over a backend that allocates its results (out; log-sum-exp where there are gradients; a gradient for each input)
#: and computes nothing. Python 3.11; later versions need fewer calls.
CASES: dict[str, tuple[Callable[[], Callable[[], Any]], Counts]] = {
    "forward": (partial(forward, "causal"), Counts(10, 16, 0)),
    "forward, scaled": (partial(forward, "scaled"), Counts(10, 16, 0)),
    "forward, lengths": (partial(forward, "lengths"), Counts(14, 19, 0)),
    "forward, mask": (partial(forward, "mask"), Counts(13, 20, 0)),
    "forward, segments": (partial(forward, "segments"), Counts(14, 19, 0)),
    "forward, intervals": (partial(forward, "intervals"), Counts(19, 22, 0)),
    "both": (partial(both, "causal"), Counts(24, 31, 0)),
    "both, lengths": (partial(both, "lengths"), Counts(31, 38, 0)),
    "both, mask": (partial(both, "mask"), Counts(30, 39, 0)),
    "both, sinks": (partial(both, "sinks"), Counts(31, 39, 1)),
    "varlen": (partial(packed, False), Counts(28, 50, 0)),
    "varlen, both": (partial(packed, True), Counts(46, 64, 17)),
    "operator": (operator, Counts(18, 13, 1)),
    "layer": (partial(layer, False), Counts(15, 27, 1)),
    "layer, mask": (partial(layer, True), Counts(16, 27, 1)),
    "cache": (cache_step, Counts(52, 47, 30)),
}


@pytest.fixture
def nothing_computed() -> Iterator[None]:
    with null_backend():
        yield


def check(found: Counts, recorded: Counts) -> None:
    for what, most, count in zip(Counts._fields, recorded, found):
        assert count <= most, f"{what}: {count} where {most} were recorded ({found})"
        if sys.version_info[:2] == (3, 11):  # so that what is recorded is what is
            assert count == most, f"{what}: {count} where {most} were recorded: lower the figure ({found})"


@pytest.mark.parametrize("name", CASES)
def test_the_way_to_a_backend_and_back(name: str, nothing_computed: None) -> None:
    make, recorded = CASES[name]
    check(counted(make()), recorded)


BF16 = torch.bfloat16
#: Over cuDNN's kernels bound to plans that execute nothing; the offsets of lengths are given.
CUDNN: dict[str, tuple[Callable[[], Callable[[], Any]], bool, Counts]] = {
    "dynamic": (partial(forward, "causal", BF16), False, Counts(16, 18, 7)),
    "static": (partial(forward, "causal", BF16), True, Counts(16, 18, 0)),
    "dynamic, both": (partial(both, "causal", BF16), False, Counts(42, 46, 21)),
    "static, both": (partial(both, "causal", BF16), True, Counts(43, 45, 1)),
    "lengths, both": (partial(both, "lengths", BF16), False, Counts(49, 59, 27)),
    "mask, both": (partial(both, "mask", BF16), False, Counts(105, 120, 38)),
}


@pytest.mark.parametrize("name", CUDNN)
def test_cudnns_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, static, recorded = CUDNN[name]
    gpu = pretend(monkeypatch)
    monkeypatch.setattr(type(gpu), "static", static)
    with fastattn.use_backend("cudnn"):
        check(counted(make()), recorded)


#: Over Hopper's kernels, which a driver takes that runs nothing. Allocations are calls of a built-in function.
HOPPER: dict[str, tuple[Callable[[], Callable[[], Any]], Counts]] = {
    "forward": (partial(forward, "causal", BF16), Counts(12, 27, 0)),
    "forward, lengths": (partial(forward, "lengths", BF16), Counts(17, 33, 0)),
    "forward, keys": (partial(forward, "keys", BF16), Counts(26, 38, 0)),
    "forward, segments": (partial(forward, "segments", BF16), Counts(23, 36, 0)),
    "both": (partial(both, "causal", BF16), Counts(32, 64, 0)),
    "both, lengths": (partial(both, "lengths", BF16), Counts(48, 79, 0)),
    "both, segments": (partial(both, "segments", BF16), Counts(54, 82, 0)),
    "both, sinks": (partial(both, "sinks", BF16), Counts(45, 81, 0)),
}


def launches_of(
    backend: str, kind: tuple[Callable[[], Callable[[], Any]], Counts], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Checks what a call costs over a backend's kernels. Returns how many it launches."""
    pytest.importorskip("triton")
    make, recorded = kind
    gpu = hopper_launches.pretend(monkeypatch)
    hopper_launches.allocate_in_place(monkeypatch)
    run = make()
    with fastattn.use_backend(backend):
        found = counted(run)
        gpu.taken()
        run()
        check(found, recorded)
    return len(gpu.taken())


@pytest.mark.parametrize("name", HOPPER)
def test_hoppers_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LEAST_QUERIES", 0)  # short ones have tiles of their own, as long ones
    launched = launches_of("hopper", HOPPER[name], monkeypatch)
    kernels = 1 + 3 * name.startswith("both")
    if "keys" in name:
        kernels += 3
    if "segments" in name or name == "both, lengths":
        kernels += ("segments" in name) + 2 * name.startswith("both")
    kernels += name == "both, sinks"  # what adds up their gradient
    assert launched == kernels


def step(name: str, **more: Any) -> Callable[[], Any]:
    """One query for each entry, of a kind that the decode kernel serves with several splits."""
    return partial(attend, made(H, 1, BF16), made(HKV, 64, BF16), made(HKV, 64, BF16), **step_options(name), **more)


def step_options(name: str) -> dict[str, Any]:
    return {
        "plain": {},
        "lengths": {"mask": "causal", "kv_lengths": ints(64, 3)},
        "mask": {"mask": torch.ones(B, 1, 1, 64, dtype=torch.bool)},
        "sinks": {"mask": "causal", "sinks": torch.zeros(H)},
        "segments": {"mask": Segments.left_padded(ints(0, 7), 1, 64)},
    }[name]


#: Over the kernels for few queries, as Hopper's. With splits and without there is one launch.
DECODE: dict[str, tuple[Callable[[], Callable[[], Any]], Counts]] = {
    "plain": (partial(step, "plain"), Counts(13, 24, 0)),
    "lengths": (partial(step, "lengths"), Counts(17, 28, 0)),
    "mask": (partial(step, "mask"), Counts(16, 29, 0)),
    "sinks": (partial(step, "sinks"), Counts(17, 28, 0)),
    "log-sum-exp": (partial(step, "plain", return_lse=True), Counts(13, 25, 0)),
    "segments": (partial(step, "segments"), Counts(27, 35, 4)),
}


@pytest.mark.parametrize("name", DECODE)
def test_decodes_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches_of("decode", DECODE[name], monkeypatch) == 1 + (name == "segments")


def dropped_in(differentiated: bool, **options: Any) -> Callable[[], Any]:
    """A call of torch's function, by the function that `patch` puts in its place."""
    leaves = [made(H).requires_grad_(differentiated) for _ in range(3)]
    grad_out = made(H)

    def run() -> Any:
        out = patching.scaled_dot_product_attention(*leaves, **options)
        return torch.autograd.grad(out, leaves, grad_out) if differentiated else out

    return run


def three_dims() -> Callable[[], Any]:
    return partial(patching.scaled_dot_product_attention, *(torch.randn(B, S, D) for _ in range(3)))


#: torch's function while it is patched. Of each forward the op itself is 9, 16, 0 (with a mask 12, 20, 0).
DROP_IN: dict[str, tuple[Callable[[], Callable[[], Any]], Counts]] = {
    "forward": (partial(dropped_in, False, is_causal=True), Counts(20, 27, 0)),
    "mask": (partial(dropped_in, False, attn_mask=torch.ones(B, 1, 1, S, dtype=torch.bool)), Counts(23, 31, 0)),
    "both": (partial(dropped_in, True, is_causal=True), Counts(34, 42, 0)),
    "three dims": (three_dims, Counts(45, 81, 4)),
    "dropout": (partial(dropped_in, False, dropout_p=0.5), Counts(13, 8, 1)),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The drop-in, patched in, serves what is on a CPU too."""
    monkeypatch.setattr(decide, "ON_A_CPU", "")
    with drop_in.patched():
        yield


@pytest.mark.parametrize("name", DROP_IN)
def test_the_drop_ins_way(name: str, nothing_computed: None, as_on_a_gpu: None) -> None:
    make, recorded = DROP_IN[name]
    check(counted(make()), recorded)


#: The same where the native module serves, of which no Python sees more: whether it is there, which backends may serve.
NATIVE: dict[str, tuple[Callable[[], Callable[[], Any]], Counts]] = {
    "forward": (partial(forward, "causal", BF16), Counts(4, 4, 0)),
    "forward, lengths": (partial(forward, "lengths", BF16), Counts(4, 4, 0)),
    "forward, sinks": (partial(forward, "sinks", BF16), Counts(4, 4, 0)),
    "both": (partial(both, "causal", BF16), Counts(4, 4, 0)),
    "both, lengths": (partial(both, "lengths", BF16), Counts(4, 4, 0)),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, recorded = NATIVE[name]
    gpu = hopper_launches.pretend(monkeypatch)
    driver = native_driver.take(monkeypatch, gpu)
    run = make()
    for _ in range(4):
        run()
    driver.quiet = True
    before = driver.launches
    found = counted(run, warmups=0)
    assert driver.launches > before
    check(found._replace(operators=0), recorded)  # (it allocates with torch's, which the profiler does not count)


def test_the_drop_ins_way_to_torch(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kind that torch's kernels are known to serve: without a GPU no backend before them can."""
    with fastattn.use_backend("cudnn", "torch"):
        run = dropped_in(False, is_causal=True)
        check(counted(run), Counts(14, 22, 1))
        monkeypatch.setattr(decide, "_decided", None)  # nothing is decided again
        run()


def test_more_work_is_noticed(nothing_computed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts count: of a call that takes the full path, and of one operator more."""
    make, recorded = CASES["forward"]
    run = make()
    assert counted(lambda: (run(), torch.zeros(1))).operators == recorded.operators + 1
    monkeypatch.setattr("fastattn.dispatch.fast_path.key_of", lambda *arguments: None)
    found = counted(run)
    assert found.calls > 2 * recorded.calls and found.builtins > recorded.builtins
    with pytest.raises(AssertionError, match=r"calls: \d+ where"):
        check(found, recorded)
