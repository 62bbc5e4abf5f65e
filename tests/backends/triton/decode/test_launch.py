"""What decode tells the driver, call by call: what is kept between calls is no other call's."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hopper_launches import HopperGpu, Launched, pretend, side_by_side
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn.backends import scratch
from fastattn.backends.triton import binding
from fastattn.backends.triton.binaries.triton_kernel import NamedKernel, TritonFlags
from fastattn.backends.triton.decode import forward
from fastattn.shape_cache import shape_cache

pytest.importorskip("triton")
BF16, FP32 = torch.bfloat16, torch.float32
B, H, HKV, S, D = 2, 4, 2, 300, 64


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    return pretend(monkeypatch)


@pytest.fixture(params=["one launch", "captured"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The launches of a call: while it is captured it gets no counters."""
    captured = request.param == "captured"
    if captured:
        monkeypatch.setattr(forward, "counted", lambda *arguments: None)
    return 1 + captured


def made(heads: int, length: int = S, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(B, length, heads, D).to(dtype).transpose(1, 2)


def inputs(dtype: torch.dtype = BF16) -> list[Tensor]:
    return [made(H, 1, dtype), made(HKV, S, dtype), made(HKV, S, dtype)]


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, backend="decode", **options)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def constants_of(flags: TritonFlags) -> dict[str, Any]:
    module, _, name = flags.kernel.partition(":")
    names = NamedKernel(module, name).load().arg_names
    return {names[i]: value for i, value in flags.constants}


def check(
    launches: list[Launched],
    tensors: list[Tensor],
    out: Tensor,
    scale: float = D**-0.5,
    lse: Tensor | None = None,
    **others: Tensor,
) -> dict[str, Any]:
    """Of the launches of one call, which have nothing but these: of the kernel alone, or of the one that combines its
    splits, too. others: what masks, by its name. Returns the first one's arguments."""
    kernels = ["attend_kernel", "combine_kernel"]
    assert [x.kernel.partition(":")[2] for x in launches] == kernels[: len(launches)]
    first, last = launches[0], launches[-1]
    a = first.arguments
    q, k, v = tensors
    given = {"q": q, "k": k, "v": v, "out": out, **({} if lse is None else {"lse": lse}), **others}
    alone = {"counters"} if len(launches) == 1 else set()
    assert {name.removesuffix("_ptr") for name in a if name.endswith("_ptr")} == {*given, "scratch", *alone}
    for name, x in given.items():
        assert a[f"{name}_ptr"] == x.data_ptr(), name
    assert a["scratch_ptr"] != 0
    if len(launches) == 1:
        assert a["counters_ptr"] not in (0, a["scratch_ptr"])
    else:
        b = last.arguments
        assert {name.removesuffix("_ptr") for name in b if name.endswith("_ptr")} == {
            name for name in (*given, "scratch") if name in ("scratch", "out", "lse", "sinks")
        }
        assert all(b.get(f"{name}_ptr", x.data_ptr()) == x.data_ptr() for name, x in given.items())
        assert a["scratch_ptr"] == b["scratch_ptr"]
        assert (b["q_len"], b["splits"]) == (1, first.programs[1]) and first.stream == last.stream
    unit = constants_of(first.flags)["UNIT"]
    for name, x in zip("qkv", tensors, strict=True):
        strides = a[f"{name}_sb"], a[f"{name}_sh"], a[f"{name}_s{'i' if name == 'q' else 'j'}"]
        assert [unit * stride for stride in strides] == list(x.stride()[:3])
    assert (a["q_len"], a["kv_len"], a["scale"]) == (1, k.shape[2], np.float32(scale))
    return a


def test_each_call_has_its_own_addresses(gpu: HopperGpu, many: int) -> None:
    """On its own stream, with its own scale; also after what is cached was dropped."""
    held = []
    for turn in range(6):
        tensors = inputs()
        gpu.stream, scale = 70 + turn, 0.1 * (turn % 3 + 1)
        out = attend(*tensors, mask="causal", scale=scale)
        launches = gpu.taken()
        check(launches, tensors, out, scale)
        assert [x.stream for x in launches] == [70 + turn] * many
        if turn == 3:
            shape_cache.clear()
        held.append(out)
    for _ in range(3):
        tensors = inputs()
        out, lse = attend(*tensors, mask="causal", return_lse=True)
        check(gpu.taken(), tensors, out, lse=lse)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((B, H, 1), FP32, True)
        held.append(lse)


def test_scratch_memory_that_moves(gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph's capture, and on another stream."""
    pieces: list[Tensor] = []

    def anew(device: torch.device, size: int, stream: int | None = None) -> Tensor:
        assert stream in (None, gpu.stream)
        pieces.append(torch.empty(size, dtype=torch.uint8))
        return pieces[-1]

    def counters(device: torch.device, size: int, count: int, stream: int) -> tuple[Tensor, Tensor] | None:
        """While it is captured there are none, and memory of its own."""
        return None if turn % 3 == 0 else (anew(device, size, stream), numbers[turn])

    monkeypatch.setattr(forward, "scratch", anew)
    monkeypatch.setattr(forward, "counted", counters)
    numbers = [torch.zeros(B * HKV, dtype=torch.int32) for _ in range(8)]
    for turn in range(8):
        gpu.stream, tensors = turn, inputs()
        out = attend(*tensors)
        launches = gpu.taken()
        a = check(launches, tensors, out)
        assert len(launches) == 1 + (turn % 3 == 0)
        assert turn % 3 == 0 or a["counters_ptr"] == numbers[turn].data_ptr()
        assert len(pieces) == turn + 1 and a["scratch_ptr"] == pieces[-1].data_ptr()
        splits = launches[0].programs[1]
        assert splits > 1 and len(pieces[-1]) == 4 * B * H * splits * (D + 2)
    assert len({x.data_ptr() for x in pieces}) == 8


def test_inputs_that_are_not_aligned(gpu: HopperGpu) -> None:
    """Each takes a binary that knows; calls before and after do not."""
    memory = [torch.randn(B, length, heads, D + 8).to(BF16).transpose(1, 2) for heads, length in ((H, 1), (HKV, S))]
    memory.append(memory[1].clone())
    for bits in [0, *range(8), *range(8)]:
        tensors = [x[..., bits >> i & 1 :][..., :D] for i, x in enumerate(memory)]
        out = attend(*tensors)
        launches = gpu.taken()
        check(launches, tensors, out)
        aligned = [i not in launches[0].flags.aligned for i in range(3)]
        assert aligned == [bool(bits >> i & 1) for i in range(3)]


KINDS = ("lengths", "bool", "bias", "sinks", "intervals", "everything", "slices")


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_read(kind: str, gpu: HopperGpu, many: int) -> None:
    held = []
    for turn in range(4):
        tensors = inputs()
        others: dict[str, Tensor] = {}
        options: dict[str, Any] = {}
        if kind in ("lengths", "everything"):
            others |= {"q_lengths": ints(1, 0), "kv_lengths": ints(S, 3)}
        if kind == "slices":  # at any address
            others |= {"kv_lengths": ints(9, 8, 7, 6, 5, 4)[turn:][:B], "sinks": torch.randn(H + 3)[turn:][:H]}
        if kind in ("bool", "everything"):
            others["mask"] = torch.rand(B, 1, 1, S) > 0.2
        if kind == "bias":
            others["mask"] = torch.randn(B, H, 1, S + 1)[..., 1:]
        if kind in ("sinks", "everything"):
            others["sinks"] = torch.randn(H)
        options |= others
        if kind == "intervals":
            others |= {"lo": ints(0, 1)[:, None], "hi": ints(9, 4)[:, None]}
            options["mask"] = Intervals(others["lo"], others["hi"])
        out = attend(*tensors, **options)
        launches = gpu.taken()
        a = check(launches, tensors, out, **others)
        assert len(launches) == many
        if kind == "bias":
            assert [a[f"mask_s{dim}"] for dim in "bhij"] == [H * (S + 1), S + 1, 0, 1]
        held.append((tensors, others, out))


def test_a_softcap_and_its_scale(gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for turn, scale in enumerate((0.2, 0.2, 0.3, 0.2, 0.3, 0.2)):
        if turn == 3:  # the arguments of launches without counters are others
            monkeypatch.setattr(forward, "counted", lambda *arguments: None)
        tensors = inputs()
        out = attend(*tensors, softcap=30.0, scale=scale)
        assert check(gpu.taken(), tensors, out, scale)["softcap"] == 30.0


def test_one_split(gpu: HopperGpu) -> None:
    """No second kernel, and no memory for it."""
    for _ in range(3):
        tensors = inputs()
        out, lse = attend(*tensors, window=(3, 0), mask=None, return_lse=True)
        (launched,) = gpu.taken()
        a = launched.arguments
        found = [a[f"{name}_ptr"] for name in ("q", "k", "v", "out", "lse")]
        assert found == [x.data_ptr() for x in (*tensors, out, lse)]
        assert "scratch_ptr" not in a and (a["left"], a["right"]) == (3, 0)


def test_segments_are_read_from_memory_that_the_kernel_does_not_write(
    gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch memory is the same piece for all who ask, while nobody launches."""
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    for module in (scratch, forward, binding):
        monkeypatch.setattr(module, "scratch", lambda *arguments: memory, raising=False)
    monkeypatch.setattr(forward, "counted", lambda *arguments: None)
    held = []
    for turn in range(4):
        tensors, table = inputs(), Segments.left_padded(ints(0, 7 + turn), 1, S).table
        gpu.stream = turn
        out = attend(*tensors, mask=Segments(table, True))
        before, first, second = gpu.taken()
        assert before.kernel.endswith(":bounds_kernel") and before.arguments["table_ptr"] == table.data_ptr()
        assert [x.stream for x in (before, first, second)] == [turn] * 3
        a, bounds = first.arguments, before.arguments["memory_ptr"]
        assert a["out_ptr"] == second.arguments["out_ptr"] == out.data_ptr()
        assert a["scratch_ptr"] == second.arguments["scratch_ptr"] == memory.data_ptr()
        end = memory.data_ptr() + 4 * B * H * first.programs[1] * (D + 2)
        tile = binding.TILE
        assert (a["lo_ptr"] - bounds, a["hi_ptr"] - a["lo_ptr"]) == (4 * (4 + 8 * B), 4 * B * tile)
        assert bounds + 4 * (4 + (8 + 2 * tile) * B) <= memory.data_ptr() or bounds >= end
        held.append((tensors, table, out))


def test_values_that_are_the_keys(gpu: HopperGpu) -> None:
    """Another binary than for values elsewhere, from call to call."""
    kinds = []
    for turn in range(6):
        q, k, v = inputs()
        v = k if turn % 3 == 1 else v
        out = attend(q, k, v)
        launches = gpu.taken()
        check(launches, [q, k, v], out)
        kinds.append(constants_of(launches[0].flags)["SAME"])
    assert kinds == [False, True, False] * 2


def test_float32_in_the_precision_that_torch_has(gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for turn in range(6):
        monkeypatch.setattr(forward, "tf32_is_allowed", lambda turn=turn: turn % 3 == 1)
        tensors = inputs(FP32)
        out = attend(*tensors, scale=0.1 * (turn + 1))
        launches = gpu.taken()
        check(launches, tensors, out, 0.1 * (turn + 1))
        assert constants_of(launches[0].flags)["PRECISION"] == ("tf32" if turn % 3 == 1 else "ieee")


def test_threads(gpu: HopperGpu, many: int) -> None:
    """Each has arguments of its own: what one writes while another is about to launch is not launched by that one."""
    wrong: list[AssertionError] = []
    attempts = 12

    def run() -> None:
        for turn in range(attempts):
            tensors, others = inputs(), {"kv_lengths": ints(S, 5)} if turn % 2 else {}
            scale = float(torch.rand(()) + 0.1)
            out, lse = attend(*tensors, **others, scale=scale, return_lse=True)
            mine = [x for x in gpu.driver.launches if x.thread == threading.get_ident()]
            try:
                check(mine[-many:], tensors, out, scale, lse, **others)
            except AssertionError as error:
                wrong.append(error)

    side_by_side(gpu, 4, run)
    assert not wrong and len(gpu.driver.launches) == 4 * attempts * many


def test_another_device_is_current(gpu: HopperGpu, many: int) -> None:
    """That of the tensors is, while the call runs."""
    seen: list[Any] = []
    gpu.driver.before = lambda: seen.append(gpu.device)
    for turn in range(4):
        tensors = inputs()
        with gpu.on(5 if turn != 2 else None):
            out = attend(*tensors)
            assert gpu.device == (5 if turn != 2 else None)
        check(gpu.taken(), tensors, out)
    assert seen == [None] * 4 * many
