"""The binaries of the decode kernels: what one call has made ready serves all others that differ in lengths alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_backend import stand_in_binaries
from stand_in_compiler import Driver

from fastattn._compat import torch as torch_internals
from fastattn.backends.base import NotReady
from fastattn.backends.triton import cuda_driver
from fastattn.backends.triton.binaries.flag_set import FlagSet
from fastattn.backends.triton.binaries.launcher import BinaryLauncher
from fastattn.backends.triton.binding import with_intervals
from fastattn.backends.triton.cuda_driver import Function
from fastattn.backends.triton.decode import DecodeBackend, combination, family, forward
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.backends.triton.decode.chunks import is_chunk
from fastattn.backends.triton.decode.family import resized
from fastattn.backends.triton.representative import representative
from fastattn.call import Problem

INT32, BF16 = torch.int32, torch.bfloat16
PROBLEM = Problem(
    device="cuda", index=0, capability=(9, 0), dtype=BF16, batch=1, q_heads=32, kv_heads=8, q_len=1, kv_len=1000,
    head_dim=128, value_dim=128, mask="none", mask_shape=(), mask_dtype=None, left=-1, right=0, softcap=0.0,
    sinks=False, q_lengths=False, kv_lengths=False, return_lse=False, grads="",
)  # fmt: skip
HEADS = {
    "8/8 64": {"q_heads": 8, "kv_heads": 8, "head_dim": 64, "value_dim": 64},
    "32/8 128": {},
    "24/8 128 fp16": {"q_heads": 24, "dtype": torch.float16},
    "64/1 256": {"q_heads": 64, "kv_heads": 1, "head_dim": 256, "value_dim": 256},
    "80/1 128": {"q_heads": 80, "kv_heads": 1},
    "8/1 512": {"q_heads": 8, "kv_heads": 1, "head_dim": 512, "value_dim": 512},
    "128/1 576/512": {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512},
    "16/4 fp32": {"q_heads": 16, "kv_heads": 4, "dtype": torch.float32},
    "128/128 192/128": {"q_heads": 128, "kv_heads": 128, "head_dim": 192},
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"kv_lengths": True},
    "window": {"left": 20},
    "two-sided window": {"left": 60, "right": 4, "kv_lengths": True},
    "softcap": {"softcap": 30.0, "return_lse": True, "sinks": True},
    "bool": {"mask": "bool", "mask_shape": (2, 1, 3, 1000), "mask_dtype": torch.bool},
    "intervals": {"mask": "intervals", "mask_shape": (2, 3), "mask_dtype": INT32},
    "intervals of entries": {"mask": "intervals", "mask_shape": (2, 1), "mask_dtype": INT32},
    "segments": {"mask": "segments", "mask_shape": (3, 5), "mask_dtype": INT32},
}
SMS = 132


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100's numbers, for nobody to ask a device."""
    monkeypatch.setattr(forward, "sm_count", lambda index: SMS)
    monkeypatch.setattr(forward, "shared_memory", lambda index: None)
    yield
    launch.choose.cache_clear()  # type: ignore[attr-defined]


def needed(p: Problem, same: bool = False) -> list[FlagSet]:
    """What a call of a problem launches, by the kernel that is bound to it."""
    if p.mask == "segments":
        p = with_intervals(p)
    call = representative(p)
    kernel = forward.DecodeKernel(p, call, forward._launch(p, same), same)
    return [x.flags(y, z) for x, y, z in kernel.launches(call) if isinstance(x, BinaryLauncher)]


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (8, 9)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_no_other_length_and_no_other_batch_needs_another_binary(
    heads: str, capability: tuple[int, int], seed: int
) -> None:
    rng, chunks = random.Random(seed), 0
    q_lens = 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 65, 100, 300
    for name, features in FEATURES.items():
        first = replace(PROBLEM, **HEADS[heads], capability=capability)
        if features.get("mask_shape", ())[1:2] == (3,) or name == "bool":
            first = replace(first, batch=2, q_len=3)
        p = replace(first, **features)
        if not launch.fits(p):
            continue
        ready = list(DecodeBackend().binaries(p))
        assert ready[: len(needed(p))] == needed(p), "the problem's own are first"
        assert len(set(ready)) == len(ready) <= 24
        batches = [1, 2, 16, 17, 132, 133, rng.randrange(1, 300), 1057, 5000]
        for kv_len in (1, 15, 16, 17, 64, 129, rng.randrange(1, 5000), 1 << 15):
            for batch in batches:
                for other in (replace(resized(p, batch, q_len), kv_len=kv_len) for q_len in rng.sample(q_lens, 4)):
                    if other.dense_mask:
                        other = replace(other, mask_shape=(*other.mask_shape[:3], kv_len))
                    if not launch.fits(other):
                        continue
                    chunks += is_chunk(other)
                    for same in (False, True) if forward._in_keys(p) else (False,):
                        assert not set(needed(other, same)) - set(ready), f"{name}: {other}"
    # float32 has none, nor do 128 heads of queries leave much of a GPU to others.
    assert chunks > 5 or heads in ("16/4 fp32", "128/1 576/512", "128/128 192/128")


@pytest.mark.parametrize("heads", ["32/32", "32/8", "32/4", "20/20", "14/2"])
def test_every_batch_has_a_launch_of_the_family(heads: str) -> None:
    """What a launch is but for the number of splits, of which there are one or more."""
    q_heads, kv_heads = map(int, heads.split("/"))

    def kind(p: Problem) -> launch.Launch:
        found = launch.choose(p, SMS)
        return replace(found, splits=min(found.splits, 2))

    for dim in (64, 96, 128, 256):
        p = replace(PROBLEM, q_heads=q_heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim)
        listed = {kind(other) for other in family.family(p, SMS)}
        for batch in range(1, 300):
            assert kind(resized(p, batch, 1)) in listed, (dim, batch)


def test_a_growing_cache_needs_one_launch_s_binaries() -> None:
    """From the first token on: with few keys some splits are empty."""
    for batch in (1, 8, 64):
        p = replace(PROBLEM, batch=batch, kv_lengths=batch > 1)
        found = {tuple(needed(replace(p, kv_len=n))) for n in range(1, 3000, 7)}
        assert len(found) == 1


def test_values_in_the_keys_are_expected_where_one_head_has_a_prefix_of_them() -> None:
    absorbed = replace(PROBLEM, **HEADS["128/1 576/512"])
    ready = set(DecodeBackend().binaries(absorbed))
    assert set(needed(absorbed)) | set(needed(absorbed, same=True)) <= ready
    assert not set(needed(PROBLEM, same=True)) <= set(DecodeBackend().binaries(PROBLEM))


def test_segments_need_the_kernel_that_finds_their_bounds() -> None:
    p = replace(PROBLEM, **FEATURES["segments"])
    kernels = [str(flags).partition(":")[2].partition("'")[0] for flags in DecodeBackend().binaries(p)]
    assert kernels[:3] == ["attend_kernel", "attend_kernel", "combine_kernel"] and kernels.count("bounds_kernel") == 1


def test_slices_of_lengths_take_the_same_binary() -> None:
    """Which lie at any address; q, k and v do not."""
    p = replace(PROBLEM, kv_lengths=True, sinks=True)
    call = representative(p)
    lengths, sinks = torch.empty(9, dtype=INT32, device="meta"), torch.empty(33, dtype=BF16, device="meta")
    assert lengths[1:2].data_ptr() % 16 and sinks[1:].data_ptr() % 16

    def flags(**changes: torch.Tensor) -> list[FlagSet]:
        other = call._replace(**changes)
        kernel = forward.DecodeKernel(p, other, forward._launch(p))
        return [x.flags(y, z) for x, y, z in kernel.launches(other) if isinstance(x, BinaryLauncher)]

    assert flags() == flags(kv_lengths=lengths[1:2], sinks=sinks[1:])
    odd = torch.empty(8 * 1000 * 128 + 1, dtype=BF16, device="meta")[1:].view(1, 1000, 8, 128).transpose(1, 2)
    assert flags()[0] != flags(k=odd)[0]


def test_the_test_notices_a_batch_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "family", lambda p, sms: iter([p]))
    assert not set(needed(replace(PROBLEM, batch=100))) <= set(DecodeBackend().binaries(PROBLEM))
    assert len(list(family.family(PROBLEM, SMS))) > 50


def test_the_interpreter_has_no_binaries() -> None:
    assert list(DecodeBackend().binaries(replace(PROBLEM, device="cpu", index=-1, capability=(0, 0)))) == []


def test_a_call_is_not_ready_until_all_kernels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is launched by the driver: the kernel, and where the call is captured the one that combines its
    splits."""
    binaries, driver = stand_in_binaries(tmp_path, monkeypatch), Driver()
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(torch_internals, "current_device", lambda: 0)
    monkeypatch.setattr(torch_internals, "raw_stream", lambda index: 77)

    def on_gpu(kernel: Any, grid: Any, device: torch.device, *rest: Any, **options: Any) -> BinaryLauncher:
        return BinaryLauncher(
            kernel, grid, device if device.type == "meta" else torch.device("cuda", 0), *rest, **options
        )

    for module in (forward, combination):
        monkeypatch.setattr(module, "launcher_of", on_gpu)
    p = replace(PROBLEM, return_lse=True)
    k = torch.zeros(1, 1000, 8, 128, dtype=BF16).transpose(1, 2)
    call = representative(p)._replace(q=torch.zeros(1, 32, 1, 128, dtype=BF16), k=k, v=k.clone(), scale=0.125)
    backend = DecodeBackend()
    own = list(backend.binaries(p))[:3]
    for flags in own:
        with pytest.raises(NotReady, match="FASTATTN_COMPILE=off"):
            backend.bind(p, call)
        binaries._ready[flags] = Function(b"\x7fELF", "a_kernel", 4096, 128)
    kernel = backend.bind(p, call)
    assert not driver.launched
    kernel.forward(call)
    assert [x["grid"] for x in driver.launched] == [(8, launch.choose(p, SMS).splits, 1)]
    driver.launched.clear()
    monkeypatch.setattr(forward, "counted", lambda *arguments: None)
    out, lse = kernel.forward(call)
    assert out.shape == (1, 32, 1, 128) and lse is not None and lse.shape == (1, 32, 1)
    splits = launch.choose(p, SMS).splits
    assert [x["grid"] for x in driver.launched] == [(8, splits, 1), (8, 4, 1)]
    assert [x["block"] for x in driver.launched] == [(128, 1, 1)] * 2
    # With another tensor's values in the keys it is another binary: it says so, and launches nothing.
    with pytest.raises(NotReady):
        kernel.forward(call._replace(v=call.k))
    assert len(driver.launched) == 2
    binaries.compilers.stop()
