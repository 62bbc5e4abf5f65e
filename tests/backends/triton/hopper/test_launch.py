"""What the Hopper forward tells the driver, call by call: what is kept between calls is no other call's."""

from __future__ import annotations

import math
import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hopper_launches import HopperGpu, Launched, pretend, side_by_side
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn.backends.triton.bounds import Bounds
from fastattn.backends.triton.hopper import segments
from fastattn.call import Call, Problem
from fastattn.shape_cache import shape_cache

pytest.importorskip("triton")
BF16 = torch.bfloat16
B, H, HKV, S, D = 2, 4, 2, 40, 64


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    return pretend(monkeypatch)


def made(heads: int, length: int = S, dim: int = D, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(B, length, heads, dim).to(dtype).transpose(1, 2)


def inputs() -> list[Tensor]:
    return [made(H), made(HKV), made(HKV)]


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, backend="hopper", **options)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(launched: Launched, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float = D**-0.5) -> dict[str, Any]:
    """The main kernel's. Returns its arguments."""
    a = launched.arguments
    for name, x in ("q_desc", q), ("k_desc", k), ("v_desc", v), ("out_desc", out):
        assert a[name].tells(x), name
    assert a["out_ptr"] == out.data_ptr()
    assert a["scale"] == np.float32(scale * math.log2(math.e)) and a["inner"] == 1.0
    sizes = "batch", "heads", "group", "q_len", "kv_len"
    assert [a[name] for name in sizes] == [*q.shape[:2], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]]
    return a


def test_each_call_has_its_own_addresses(gpu: HopperGpu) -> None:
    """On its own stream, with its own scale; also after what is cached was dropped."""
    for turn in range(6):
        q, k, v = inputs()
        gpu.stream, scale = 70 + turn, 0.1 * (turn % 3 + 1)
        out = attend(q, k, v, mask="causal", scale=scale)
        (launched,) = gpu.taken()
        check(launched, q, k, v, out, scale)
        assert launched.stream == 70 + turn
        if turn == 3:
            shape_cache.clear()
    out, lse = attend(q, k, v, mask="causal", return_lse=True)
    (launched,) = gpu.taken()
    assert check(launched, q, k, v, out)["lse_ptr"] == lse.data_ptr() and lse.is_contiguous()
    assert (lse.shape, lse.dtype) == ((B, H, S), torch.float32)


@pytest.mark.parametrize("address_at", [0, 1])
def test_other_addresses_cost_no_new_map(address_at: int, gpu: HopperGpu) -> None:
    """Tensors that lie alike have one map, to which a call writes their addresses; the driver does where these are not
    the map's first word."""
    gpu.driver.address_at = address_at
    kept = []
    for turn in range(4):
        q, k, v = inputs()
        out = attend(q, k, v, mask="causal")
        kept.append((q, k, v, out))  # so that no address comes back
        (launched,) = gpu.taken()
        check(launched, q, k, v, out)
        if not turn:
            encoded = gpu.driver.encoded
    assert gpu.driver.encoded == encoded
    assert gpu.driver.moved == address_at * 4 * len((q, k, v, out))


def piece(memory: Tensor, heads: int, sizes: tuple[int, int], dtype: torch.dtype, token_major: bool) -> Tensor:
    """A tensor at the beginning of the memory. sizes: length and dim."""
    length, dim = sizes
    x = memory.view(dtype)[: B * heads * length * dim]
    return x.view(B, length, heads, dim).transpose(1, 2) if token_major else x.view(B, heads, length, dim)


def test_memory_that_is_used_again_for_other_shapes(gpu: HopperGpu) -> None:
    """The same addresses, other shapes, strides and dtypes: maps are not theirs who were there before."""
    memory, dtypes = torch.randn(3, 1 << 14), {BF16: "bf16", torch.float16: "fp16"}
    shapes = (H, HKV, S, D), (H, HKV, 20, 128), (HKV, HKV, S, D), (H, HKV, S, D)
    for (heads, kv_heads, length, dim), dtype, token_major in 2 * list(product(shapes, dtypes, (True, False))):
        how = (length, dim), dtype, token_major
        q, k, v = piece(memory[0], heads, *how), piece(memory[1], kv_heads, *how), piece(memory[2], kv_heads, *how)
        out = attend(q, k, v, mask="causal")
        (launched,) = gpu.taken()
        check(launched, q, k, v, out, dim**-0.5)
        assert launched.flags.dtype == dtypes[dtype]


def test_inputs_that_cannot_be_read_where_they_are(gpu: HopperGpu) -> None:
    """Copies are read: of misaligned tensors, of other strides; each call's own, also between calls that need none."""
    wide = torch.randn(B, S, HKV, 2 * D + 8).to(BF16).transpose(1, 2)
    offset = wide[..., 1 : D + 1], wide[..., D + 1 : 2 * D + 1]
    turned = [torch.randn(B, HKV, D, S).to(BF16).mT for _ in range(2)]
    read: list[Tensor] = []
    gpu.driver.after = lambda x: read.extend([x.arguments[f"{name}_desc"].values(BF16) for name in "qkv"])
    for turn in range(3):
        for k, v in offset, turned, (made(HKV), offset[1]), (made(HKV), made(HKV)), (turned[0], offset[0]):
            q = made(H) if turn else torch.cat([made(H), made(H)], -1)[..., :D]
            read.clear()
            out = attend(q, k, v)
            (launched,) = gpu.taken()
            for got, want in zip(read, (q, k, v), strict=True):
                assert torch.equal(got, want)
            assert launched.arguments["q_desc"].tells(q) and launched.arguments["out_desc"].tells(out)


def test_inputs_of_one_kind_some_of_which_are_misaligned(gpu: HopperGpu) -> None:
    """The same strides: those that are not aligned are copied, each by itself."""
    read: list[Tensor] = []
    gpu.driver.after = lambda x: read.extend([x.arguments[f"{name}_desc"].values(BF16) for name in "qkv"])
    memory = [torch.randn(B, S, heads, D + 8).to(BF16).transpose(1, 2) for heads in (H, HKV, HKV)]
    for bits in [0, *range(8), *range(8)]:
        shifts = [bits >> i & 1 for i in range(3)]
        q, k, v = (x[..., shift : shift + D] for x, shift in zip(memory, shifts, strict=True))
        read.clear()
        attend(q, k, v)
        (launched,) = gpu.taken()
        for name, x, shift, got in zip("qkv", (q, k, v), shifts, read, strict=True):
            assert torch.equal(got, x), name
            assert launched.arguments[f"{name}_desc"].tells(x) == (not shift)


def test_what_else_is_read(gpu: HopperGpu) -> None:
    for _ in range(3):
        q, k, v = inputs()
        sinks, q_lengths, kv_lengths = torch.randn(H), ints(S, 3), ints(S, 5)
        out = attend(q, k, v, mask="causal", sinks=sinks, q_lengths=q_lengths, kv_lengths=kv_lengths)
        a = check(gpu.taken()[-1], q, k, v, out)
        found = a["sinks_ptr"], a["q_lengths_ptr"], a["kv_lengths_ptr"]
        assert found == (sinks.data_ptr(), q_lengths.data_ptr(), kv_lengths.data_ptr())
    out = attend(q, k, v, softcap=30.0, scale=0.2)
    (launched,) = gpu.taken()
    log2_e = math.log2(math.e)
    assert launched.arguments["inner"] == np.float32(0.2 / 30.0)
    assert launched.arguments["scale"] == np.float32(30.0 * log2_e)


KERNELS = ("key_bias_kernel", "bounds_kernel", "order_kernel", "segment_tiles_kernel")
OF_KIND = {"segments": KERNELS[3:], "short segments": KERNELS[1:3], "intervals": KERNELS[1:3]}


@pytest.mark.parametrize("kind", ["bool", "bias", "misaligned", "lengths", "segments", "short segments", "intervals"])
def test_masks(kind: str, gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels before the main one write to the memory that it reads, from the call's tensors."""
    if kind == "segments":
        monkeypatch.setattr(segments, "LEAST_QUERIES", 0)
    held = []
    for turn in range(4):
        q, k, v = inputs()
        options: dict[str, Any] = {}
        wanted: dict[str, Tensor] = {}
        if kind in ("bool", "lengths"):
            options["mask"] = wanted["mask_ptr"] = torch.rand(B, 1, 1, S) > 0.2
        if kind == "bias":
            options["mask"] = wanted["mask_ptr"] = torch.randn(B, 1, 1, S)
        if kind == "misaligned":  # in some calls
            options["mask"] = wanted["mask_ptr"] = torch.randn(B * S + 3)[turn % 3 :][: B * S].view(B, 1, 1, S)
        if kind == "lengths":
            options["kv_lengths"] = wanted["kv_lengths_ptr"] = ints(S, 7)
        if "segments" in kind:
            table = wanted["table_ptr"] = ints(0, 0, 9, 1, 2, 9).view(2, 3).T.contiguous()
            options["mask"] = Segments(table, True)
        if kind == "intervals":
            lo, hi = wanted["lo_ptr"], wanted["hi_ptr"] = ints(0, 1)[:, None], ints(9, 4)[:, None]
            options["mask"] = Intervals(lo, hi)
        gpu.stream = turn
        out = attend(q, k, v, **options)
        *before, main = gpu.taken()
        names = [x.kernel.partition(":")[2] for x in before]
        assert names == list(OF_KIND.get(kind, KERNELS[:3]))
        a = check(main, q, k, v, out)
        assert {x.stream for x in (*before, main)} == {turn}
        assert {x.arguments["memory_ptr"] for x in before} == {a["bounds_ptr"]}
        given = {name: x for launch in before for name, x in launch.arguments.items()}
        for name, x in wanted.items():
            assert given[name] == x.data_ptr(), name
        if "mask" in kind or "bias_ptr" in a:
            assert a["bias_ptr"] == a["bounds_ptr"] + 4 * given["bias_at"]
        if turn % 2:
            held.append(torch.empty(1 << 20))  # so that memory is elsewhere


def test_threads(gpu: HopperGpu) -> None:
    """Each has arguments of its own: what one writes while another is about to launch is not launched by that one."""
    wrong: list[AssertionError] = []
    attempts = 12

    def run() -> None:
        for turn in range(attempts):
            q, k, v = inputs()
            mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
            out = attend(q, k, v, mask=mask if turn % 2 else "causal")
            mine = [x for x in gpu.driver.launches if x.thread == threading.get_ident()]
            try:
                a = check(mine[-1], q, k, v, out)
                if turn % 2:
                    assert {x.arguments["memory_ptr"] for x in mine[-4:-1]} == {a["bounds_ptr"]}
                    assert mine[-4].arguments["mask_ptr"] == mask.data_ptr()
            except AssertionError as error:
                wrong.append(error)

    side_by_side(gpu, 4, run)
    assert not wrong and len(gpu.driver.launches) == 4 * attempts * (1 + 4) // 2


def test_another_device_is_current(gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the tensors is, while the call runs."""
    q, k, v = inputs()
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    seen: list[Any] = []
    gpu.driver.before = lambda: seen.append(gpu.device)
    for _ in range(3):
        with gpu.on(5):
            out = attend(q, k, v, mask=mask)
            assert gpu.device == 5
        check(gpu.taken()[-1], q, k, v, out)
    assert seen == [None] * 12


def test_bounds_for_others_on_a_device_that_is_not_current(gpu: HopperGpu) -> None:
    lengths = ints(S, 3)
    call = Call(*inputs(), kv_lengths=lengths)
    bounds = Bounds(Problem.of(call), call)
    seen: list[Any] = []
    gpu.driver.before = lambda: seen.append(gpu.device)
    for turn in range(4):
        memory = torch.empty(bounds.size, dtype=torch.uint8)
        with gpu.on(turn % 2 or None):
            bounds(call, memory)
        (launched,) = gpu.taken()
        found = launched.arguments["memory_ptr"], launched.arguments["kv_lengths_ptr"]
        assert found == (memory.data_ptr(), lengths.data_ptr())
    assert seen == [None] * 4
