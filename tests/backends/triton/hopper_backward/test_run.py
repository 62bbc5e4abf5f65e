"""What the Hopper backward tells the driver, call by call: what is kept between calls is no other call's."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hopper_launches import HopperGpu, Launched, pretend, side_by_side
from torch import Tensor

import fastattn
from fastattn.backends.triton.hopper_backward import schedule
from fastattn.backends.triton.hopper_backward.launch import Backward
from fastattn.call import Call, Gradients, Problem, token_major
from fastattn.shape_cache import shape_cache

pytest.importorskip("triton")
BF16 = torch.bfloat16
B, H, HKV, S, D = 2, 4, 2, 70, 64
LOG2_E = math.log2(math.e)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    return pretend(monkeypatch)


def made(heads: int, length: int = S, dim: int = D) -> Tensor:
    return torch.randn(B, length, heads, dim).to(BF16).transpose(1, 2)


def call_of(**changes: Any) -> Call:
    plain = Call(made(H), made(HKV), made(HKV), scale=0.2, right=0, grads="qkv")
    return plain._replace(**changes)


def given(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and gradient of the output."""
    return made(H), torch.randn(B, H, S), made(H)


def check(
    launches: Sequence[Launched],
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    found: Gradients,
    grad_lse: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """All launches of one call, for tensors that are read where they are."""
    if "s" in call.grads:
        *launches, of_sinks = launches
        a = of_sinks.arguments
        assert of_sinks.kernel.endswith(":sum_kernel") and found.sinks is not None
        assert (a["out_ptr"], a["count"], a["pieces"]) == (found.sinks.data_ptr(), H, B * -(-S // 64))
        assert a["pieces_ptr"] == launches[-3].arguments["sink_sums_ptr"] and of_sinks.stream == launches[-1].stream
    *before, first, main, last = launches
    names = [x.kernel.partition(":")[2] for x in (*before, first, last)]
    assert names == [*(["bounds_kernel", "extents_kernel"] if before else []), "prepare_kernel", "finish_kernel"]
    a, b, c = (x.arguments for x in (first, main, last))
    dq, dk, dv = found.q, found.k, found.v
    assert dq is not None and dk is not None and dv is not None
    # What is the caller's.
    assert (a["out_ptr"], a["grad_out_ptr"], a["lse_ptr"]) == (out.data_ptr(), grad_out.data_ptr(), lse.data_ptr())
    for name, x in ("o", out), ("g", grad_out):
        assert [8 * a[f"{name}_{dim}"] for dim in "bhs"] == list(x.stride()[:3])
    assert [a[f"l_{dim}"] for dim in "bhs"] == list(lse.stride())
    if grad_lse is not None:
        assert a["grad_lse_ptr"] == grad_lse.data_ptr()
        assert [a[f"d_{dim}"] for dim in "bhs"] == list(grad_lse.stride())
    assert ("grad_lse_ptr" in a) == (grad_lse is not None)
    for name, x in ("q", call.q), ("k", call.k), ("v", call.v), ("grad_out", grad_out), ("dk", dk), ("dv", dv):
        assert b[f"{name}_desc"].tells(x), name
    for name, x in ("dq", dq), ("dk", dk), ("dv", dv):
        assert c[f"{name}_ptr"] == x.data_ptr()
        batch, heads, length, dim = x.shape
        assert x.stride() == (length * heads * dim, dim, heads * dim, 1)
    # What lies in the memory: each of the kernels knows the same.
    assert a["rows_ptr"] == b["rows_desc"].address
    sums = [x["dq_sum_ptr"] for x in (a, b, c)]
    assert len(set(sums)) == 1
    shared = [x.get("dkv_sum_ptr") for x in (a, b, c)]
    assert len(set(shared)) == 1 and (shared[0] is not None) == main.flags.split
    if before:
        bounds, extents = (x.arguments for x in before)
        assert len({bounds["memory_ptr"], *[x["bounds_ptr"] for x in (extents, a, b)]}) == 1
        assert len({x["extents_ptr"] for x in (extents, a, b)}) == 1
        for name in "clean_q", "clean_grad_out":
            assert b[f"{name}_desc"].address == a[f"{name}_ptr"]
            assert b[f"{name}_desc"].shape == (64, 64 * a["tiles"], H, B)
        assert a["q_ptr"] == call.q.data_ptr()
        assert [8 * a[f"q_{dim}"] for dim in "bhs"] == list(call.q.stride()[:3])
    counters = [x.get("counters_ptr") for x in (a, b)]
    assert len(set(counters)) == 1 and (counters[0] is not None) == main.flags.ordered
    others = counters[0], a["rows_ptr"], a.get("extents_ptr"), a.get("bounds_ptr")
    apart = sorted({x for x in (sums[0], shared[0], *others) if x})
    assert len(apart) == 2 + main.flags.split + main.flags.ordered + 2 * bool(before)
    # Numbers.
    scale = call.scale if scale is None else scale
    inner, outer = (scale / call.softcap, call.softcap) if call.softcap else (1.0, scale)
    assert (b["inner"], b["scale"], b["factor"]) == tuple(np.float32([inner, outer * LOG2_E, scale]))
    assert c["factor"] == np.float32(scale)
    assert b["split"] * b["share"] == H // HKV and b["tiles"] == a["tiles"] == c["tiles"] == -(-S // 64)
    assert len({x.stream for x in launches}) == 1


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_each_call_has_its_own_addresses(split: int, ordered: bool, gpu: HopperGpu) -> None:
    """On its own stream, with its own scale, in memory that is elsewhere; also after what is cached was dropped."""
    with schedule.forced(split=split):
        bound = Backward(replace(Problem.of(call_of()), deterministic=ordered), call_of())
    assert bound.flags.ordered == ordered
    held = []
    for turn in range(8):
        call = call_of(scale=0.1 * (turn % 3 + 1))
        out, lse, grad_out = given(call)
        gpu.stream = 70 + turn
        found = bound.backward(call, out, lse, grad_out, None)
        check(gpu.taken(), call, out, lse, grad_out, found)
        if turn % 3 == 2:
            held.append(torch.empty(bound._memory.total, dtype=torch.uint8))
        if turn == 5:
            shape_cache.clear()


@pytest.mark.parametrize("dim, keys, columns", [(64, 128, 32), (128, 128, 64), (256, 64, 64)])
@pytest.mark.parametrize("split", [1, 2])
def test_blocks_and_boxes(dim: int, keys: int, columns: int, split: int, gpu: HopperGpu) -> None:
    """A block of keys is what one copy brings, in boxes of swizzled rows; the kernels around count blocks alike."""
    length = 130
    call = call_of(q=made(H, length, dim), k=made(HKV, length, dim), v=made(HKV, length, dim))
    with schedule.forced(split=split):
        bound = Backward(Problem.of(call), call)
    assert bound.flags.dim == dim
    out = made(H, length, dim)
    bound.backward(call, out, torch.randn(B, H, length), made(H, length, dim), None)
    first, main, last = gpu.taken()
    blocks = -(-length // keys)
    assert main.arguments["blocks"] == first.arguments["blocks"] == last.arguments["blocks"] == blocks
    assert main.programs[0] == blocks * B * HKV * split
    boxes = {name: main.arguments[f"{name}_desc"].box for name in ("q", "grad_out", "k", "v", "dk", "dv")}
    assert boxes == dict.fromkeys(("q", "grad_out", "dk", "dv"), (64, 64, 1, 1)) | {
        "k": (columns, keys, 1, 1), "v": (64, keys, 1, 1)
    }  # fmt: skip
    parts = 2 * B * HKV * blocks * (keys // 64) if split > 1 else 0
    assert (first.programs[0], last.programs[0]) == (B * H * 3, B * H * 3 + parts)
    assert first.arguments["zeros"] == (B * HKV * blocks * 2 * keys * dim // 4096 if split > 1 else 0)
    begin, end, _ = bound._memory.at.get("dkv", (0, 0, None))
    assert end - begin == 4096 * 4 * first.arguments["zeros"]


def test_layouts_that_alternate(gpu: HopperGpu) -> None:
    """Of the output, its gradient and the log-sum-exp: arguments of one layout are not those of another one, whose
    scale and memory were others."""
    bound = Backward(Problem.of(call_of()), call_of())
    held = []
    for turn in range(12):
        call = call_of(scale=0.1 * (turn % 5 + 1))
        out, lse, grad_out = given(call)
        if turn % 2:
            grad_out = grad_out.contiguous()
        if turn % 3 == 2:
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        if turn % 4 == 3:
            out = out.contiguous()
        found = bound.backward(call, out, lse, grad_out, None)
        check(gpu.taken(), call, out, lse, grad_out, found)
        held.append(torch.empty(bound._memory.total, dtype=torch.uint8))
    assert len(bound.backward._rooms.by_strides) > 3  # type: ignore[attr-defined]


def test_layouts_are_bounded(gpu: HopperGpu) -> None:
    bound, call = Backward(Problem.of(call_of()), call_of()), call_of()
    for more in range(40):
        grad_out = torch.randn(B, S + more, H, D).to(BF16).transpose(1, 2)[:, :, :S]
        out, lse, _ = given(call)
        found = bound.backward(call, out, lse, grad_out, None)
        check(gpu.taken(), call, out, lse, grad_out, found)
        assert len(bound.backward._rooms.by_strides) <= 17  # type: ignore[attr-defined]


def test_what_cannot_be_read_where_it_is(gpu: HopperGpu) -> None:
    """Copies are read, of the inputs and of what the backward is given; each call's own, also between calls that need
    none."""
    read: dict[str, Tensor] = {}

    def look(x: Launched) -> None:
        for name, what in x.arguments.items():
            if name in ("q_desc", "k_desc", "v_desc", "grad_out_desc"):
                read[name] = what.values(BF16)

    gpu.driver.after = look
    wide = torch.randn(B, S, HKV, 2 * D + 8).to(BF16).transpose(1, 2)
    offset = wide[..., 1 : D + 1]
    one_row = torch.randn(B, 1, 1, D).to(BF16).expand(B, H, S, D)
    shifted = torch.randn(B * H * S * D + 1).to(BF16)[1:].view(B, H, S, D)
    bound = Backward(Problem.of(call_of()), call_of())
    of_wide = call_of(k=offset, v=torch.randn(B, HKV, D, S).to(BF16).mT)
    other = Backward(Problem.of(of_wide), of_wide)
    for _ in range(3):
        for one, call in (bound, call_of()), (other, of_wide):
            for grad_out in made(H), one_row, shifted, made(H).contiguous(), one_row.mT.contiguous().mT:
                out, lse, _ = given(call)
                if grad_out is shifted:
                    lse = torch.randn(B * H * S + 1)[1:].view(B, H, S)
                found = one.backward(call, out, lse, grad_out, None)
                for name, x in ("q", call.q), ("k", call.k), ("v", call.v), ("grad_out", grad_out):
                    assert torch.equal(read[f"{name}_desc"], x), name
                launches = gpu.taken()
                a = launches[0].arguments
                assert a["grad_out_ptr"] == launches[1].arguments["grad_out_desc"].address
                steps = launches[1].arguments["grad_out_desc"].strides
                assert [16 * a[f"g_{dim}"] for dim in "bhs"] == [steps[2], steps[1], steps[0]]
                assert (a["lse_ptr"] == lse.data_ptr()) == (grad_out is not shifted)
                assert found.q is not None and launches[2].arguments["dq_ptr"] == found.q.data_ptr()


def test_tensors_of_one_kind_some_of_which_are_misaligned(gpu: HopperGpu) -> None:
    """The same strides: those that are not aligned are copied, each by itself."""
    read: dict[str, Any] = {}

    def look(x: Launched) -> None:
        for name, what in x.arguments.items():
            if name in ("q_desc", "k_desc", "v_desc", "grad_out_desc"):
                read[name] = what.values(BF16)
        if "lse_ptr" in x.arguments:
            read["lse"] = _at(x.arguments["lse_ptr"], torch.empty(B, H, S)).clone()

    gpu.driver.after = look
    memory = [torch.randn(B, S, heads, D + 8).to(BF16).transpose(1, 2) for heads in (H, HKV, HKV, H)]
    lses = torch.randn(B * H * S + 4)
    call = call_of(**{name: x[..., :D] for name, x in zip("qkv", memory, strict=False)})
    bound = Backward(Problem.of(call), call)
    for bits in [0, *range(32), *range(32)]:
        q, k, v, grad_out = (x[..., (bits >> i & 1) :][..., :D] for i, x in enumerate(memory))
        lse = lses[bits >> 4 :][: B * H * S].view(B, H, S)
        bound.backward(call._replace(q=q, k=k, v=v), made(H), lse, grad_out, None)
        for name, x in ("q", q), ("k", k), ("v", v), ("grad_out", grad_out):
            assert torch.equal(read[f"{name}_desc"], x), name
        assert torch.equal(read["lse"], lse)


def test_the_log_sum_exp_s_gradient_and_sinks(gpu: HopperGpu) -> None:
    sinks = torch.randn(2 * H)[::2]  # not contiguous: a copy is read
    base = call_of(sinks=sinks, return_lse=True, grads="qkvs", softcap=30.0)
    bound = Backward(Problem.of(base), base)
    read: list[Tensor] = []

    def look(x: Launched) -> None:
        if "sinks_ptr" in x.arguments:
            read.append(torch.frombuffer(memory_at(x.arguments["sinks_ptr"], 4 * H), dtype=torch.float32).clone())

    gpu.driver.after = look
    for turn in range(6):
        call = base._replace(q=made(H), scale=0.1 * (turn + 1), sinks=torch.randn(2 * H)[::2])
        out, lse, grad_out = given(call)
        grad_lse = None if turn % 3 == 2 else torch.randn(B, H, S)
        found = bound.backward(call, out, lse, grad_out, grad_lse)
        launches = gpu.taken()
        check(launches, call, out, lse, grad_out, found, grad_lse)
        assert torch.equal(read[-1], call.sinks)
        assert found.sinks is not None and found.sinks.shape == (H,) and found.sinks.dtype is torch.float32


def memory_at(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def test_only_gradients_that_are_wanted_are_given(gpu: HopperGpu) -> None:
    for grads in "q", "k", "v", "qv", "kv":
        call = call_of(grads=grads)
        found = Backward(Problem.of(call), call).backward(call, *given(call), None)
        assert [name for name, x in zip("qkvms", found, strict=True) if x is not None] == list(grads)


@pytest.mark.parametrize("kind", ["segments", "lengths"])
def test_bounds(kind: str, gpu: HopperGpu) -> None:
    def changes() -> dict[str, Any]:
        if kind == "lengths":
            return {"kv_lengths": torch.tensor([S, 7], dtype=torch.int32)}
        return {"segments": torch.tensor([0, 0, 9, 1, 2, 9], dtype=torch.int32).view(2, 3).T.contiguous()}

    bound = Backward(Problem.of(call_of(**changes())), call_of(**changes()))
    held = []
    for turn in range(6):
        call = call_of(**changes(), scale=0.1 * (turn % 2 + 1))
        out, lse, grad_out = given(call)
        if turn % 3 == 1:
            grad_out = grad_out.contiguous()
        found = bound.backward(call, out, lse, grad_out, None)
        launches = gpu.taken()
        check(launches, call, out, lse, grad_out, found)
        a = launches[0].arguments
        if kind == "lengths":
            assert call.kv_lengths is not None and a["kv_lengths_ptr"] == call.kv_lengths.data_ptr()
        else:
            assert call.segments is not None and a["table_ptr"] == call.segments.data_ptr()
        if turn % 2:
            held.append(torch.empty(bound._memory.total, dtype=torch.uint8))


def test_through_the_op_in_threads(gpu: HopperGpu) -> None:
    """As autograd runs it: the backward in another thread than the forward, several at a time."""
    wrong: list[AssertionError] = []

    def run() -> None:
        pool = ThreadPoolExecutor(1)
        for turn in range(6):
            leaves = [x.requires_grad_() for x in (made(H), made(HKV), made(HKV))]
            grad_out = made(H)
            scale = 0.1 * (turn + 1)
            out = fastattn.scaled_dot_product_attention(*leaves, mask="causal", backend="hopper", scale=scale)
            assert isinstance(out, Tensor)
            forward = [x for x in gpu.driver.launches if x.thread == threading.get_ident()][-1]
            found = pool.submit(torch.autograd.grad, out, leaves, grad_out).result()
            thread = pool.submit(threading.get_ident).result()
            mine = [forward, *[x for x in gpu.driver.launches if x.thread == thread][-3:]]
            call = Call(*[x.detach() for x in leaves], scale=scale, right=0, grads="qkv")
            try:
                lse = torch.empty(B, H, S)
                a = mine[1].arguments
                assert a["lse_ptr"] == mine[0].arguments["lse_ptr"] and a["out_ptr"] == out.data_ptr()
                lse.set_(_at(a["lse_ptr"], lse))  # type: ignore[arg-type]
                check(mine[1:], call, out.detach(), lse, grad_out, Gradients(*found))
            except AssertionError as error:
                wrong.append(error)

    side_by_side(gpu, 3, run)
    assert not wrong and len(gpu.driver.launches) == 3 * 6 * 4


def _at(address: int, like: Tensor) -> Tensor:
    return torch.frombuffer(memory_at(address, 4 * like.numel()), dtype=torch.float32).view(like.shape)


def test_another_device_is_current(gpu: HopperGpu) -> None:
    call = call_of()
    bound = Backward(Problem.of(call), call)
    seen: list[Any] = []
    gpu.driver.before = lambda: seen.append(gpu.device)
    for _ in range(2):
        out, lse, grad_out = given(call)
        with gpu.on(3):
            found = bound.backward(call, out, lse, grad_out, None)
            assert gpu.device == 3
        check(gpu.taken(), call, out, lse, grad_out, found)
    assert seen == [None] * 6


def test_gradients_are_token_major_whatever_the_inputs_are(gpu: HopperGpu) -> None:
    packed = torch.randn(B, S, 3, HKV, D).to(BF16)
    k, v = packed[:, :, 1].transpose(1, 2), packed[:, :, 2].transpose(1, 2)
    call = call_of(q=made(H).contiguous(), k=k, v=v)
    out, lse, grad_out = given(call)
    found = Backward(Problem.of(call), call).backward(call, out, lse, grad_out, None)
    for x, like in zip((found.q, found.k, found.v), call[:3], strict=True):
        assert x is not None and x.stride() == token_major(like, *like.shape).stride() and x.dtype == BF16  # type: ignore[misc]


def test_gradients_of_log_sum_exps_that_were_stacked(gpu: HopperGpu) -> None:
    """Every other number of a tensor: one of the two begins where 16 bytes do, and a copy of the other has no gaps."""
    read: list[Tensor] = []

    def look(x: Launched) -> None:
        a = x.arguments
        if "grad_lse_ptr" in a:
            strides = [a[f"d_{dim}"] for dim in "bhs"]
            count = 1 + sum((n - 1) * stride for n, stride in zip((B, H, S), strides, strict=True))
            memory = torch.frombuffer(memory_at(a["grad_lse_ptr"], 4 * count), dtype=torch.float32)
            read.append(memory.as_strided((B, H, S), strides).clone())

    gpu.driver.after = look
    call = call_of(return_lse=True)
    bound = Backward(Problem.of(call), call)
    for _ in range(3):
        out, lse, grad_out = given(call)
        for grad_lse in torch.randn(B, H, S, 2).unbind(-1):
            bound.backward(call, out, lse, grad_out, grad_lse)
            assert torch.equal(read.pop(), grad_lse)
    assert not read
