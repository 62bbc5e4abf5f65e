"""What is launched by a binary: grid, arguments as they lie in memory, attributes; and which binary."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_compiler import Driver, Flags, command

from fastattn._compat import torch as torch_internals
from fastattn.backends.base import NotReady
from fastattn.backends.triton import cuda_driver
from fastattn.backends.triton.binaries import policy, store
from fastattn.backends.triton.binaries.compilers import Compilers
from fastattn.backends.triton.binaries.launcher import BinaryLauncher
from fastattn.backends.triton.binaries.process import Child
from fastattn.backends.triton.binaries.store import Binaries
from fastattn.backends.triton.binaries.triton_kernel import TritonFlags, flags_of
from fastattn.backends.triton.cuda_driver import Function

KERNEL = SimpleNamespace(__module__="fastattn.somewhere", __name__="a_kernel")
WIDE = 5_000_000_000


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: found)
    monkeypatch.setattr(torch_internals, "current_device", lambda: 0)
    monkeypatch.setattr(torch_internals, "raw_stream", lambda index: 77)
    return found


@pytest.fixture(autouse=True)
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Binaries]:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested=""))
    found = Binaries(Compilers(command(tmp_path / "log"), most=1))
    monkeypatch.setattr(store, "shared", found)
    yield found
    found.compilers.stop()


def launcher(**options: int) -> BinaryLauncher:
    return BinaryLauncher(KERNEL, (3, 5), torch.device("cuda", 0), (9, 0), (7, -2, WIDE), (64, True), **options)


def known(binaries: Binaries, flags: TritonFlags) -> None:
    binaries._ready[flags] = Function(b"\x7fELF" + repr(flags).encode(), "a_kernel", 4096, 256)


def read(arguments: Any, form: str) -> list[Any]:
    """What a kernel of these parameters would read, by the addresses that it is given."""
    return [
        struct.unpack(kind, ctypes.string_at(arguments[i], struct.calcsize(kind)))[0] for i, kind in enumerate(form)
    ]


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_the_kernel_reads(binaries: Binaries, driver: Driver, overlaps: bool) -> None:
    launch = launcher(num_warps=8, **({"launch_pdl": True} if overlaps else {}))
    x, y = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    known(binaries, launch.flags((x, None, y), (0.5, None)))
    for scale in (0.5, -3.25):
        launch((x, None, y), (scale, None))
        found = driver.launched[-1]
        assert read(found["arguments"], "QQiiqfQQ") == [x.data_ptr(), y.data_ptr(), 7, -2, WIDE, scale, 0, 0]
        assert (found["grid"], found["block"], found["shared"], found["stream"]) == ((3, 5, 1), (256, 1, 1), 4096, 77)
        assert found["attributes"] == ([(6, 1)] if overlaps else [])
    assert len(driver.loaded) == 1


def test_a_binary_is_named_as_triton_would_specialise_it() -> None:
    launch = launcher(num_warps=8, num_stages=2)
    x = torch.zeros(8, dtype=torch.float16)
    flags = launch.flags((x, None, x[1:], torch.zeros(4, dtype=torch.bool)), (1.0, None))
    assert flags == TritonFlags(
        kernel="fastattn.somewhere:a_kernel",
        capability=(9, 0),
        types=("*fp16", "", "*fp16", "*i1", "i32", "i32", "i64", "fp32", "", "", ""),
        aligned=(0, 3),
        constants=((1, None), (8, None), (9, 64), (10, True)),
        options=(("num_stages", 2), ("num_warps", 8)),
    )
    assert flags.sources == ("fastattn.somewhere",)


def test_another_alignment_takes_another_binary(binaries: Binaries, driver: Driver) -> None:
    launch, x = launcher(), torch.zeros(9)
    for each in (x, x[1:]):
        known(binaries, launch.flags((each,)))
    for each in (x, x[1:], x):
        launch((each,))
    handles = [read(found["arguments"], "Q")[0] - x.data_ptr() for found in driver.launched]
    assert len(driver.loaded) == 2 and handles == [0, 4, 0]


def test_a_binary_that_is_not_there(binaries: Binaries, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` says so before anything is launched."""
    launch, x = launcher(), torch.zeros(4)
    monkeypatch.setattr(launch.__class__, "flags", lambda self, tensors, floats=(): Flags())
    with pytest.raises(NotReady):
        launch.prepare((x,))
    assert binaries.wait(20.0)
    launch.prepare((x,))
    launch((x,))
    assert driver.launched[0]["block"] == (128, 1, 1)


def test_the_driver_s_structures_have_their_size() -> None:
    """Of cuda.h, on 64-bit Linux: CUlaunchAttribute and CUlaunchConfig."""
    assert ctypes.sizeof(cuda_driver._Attribute) == 72 and cuda_driver._Attribute.value.offset == 8
    offsets = [
        getattr(cuda_driver._Config, name).offset for name in ("grid", "block", "shared", "stream", "attributes")
    ]
    assert offsets == [0, 12, 24, 32, 40] and cuda_driver._Config.count.offset == 48
    assert ctypes.sizeof(cuda_driver._Config) == 56


@pytest.mark.slow
def test_a_kernel_takes_what_its_launcher_gives() -> None:
    """As many parameters, in the widths that it packs, and the two that Triton adds."""
    pytest.importorskip("triton")
    child = Child()
    decode = "fastattn.backends.triton.decode"
    combine = flags_of(
        SimpleNamespace(__module__=f"{decode}.combine", __name__="combine_kernel"), (9, 0),
        [("float32", True), ("bfloat16", True), None, None], [1, 4], [], [8, 4, 64, 64, 64, 64, True],
        {"num_warps": 4},
    )  # fmt: skip
    attend = flags_of(
        SimpleNamespace(__module__=f"{decode}.kernel", __name__="attend_kernel"), (9, 0),
        [("bfloat16", True)] * 4 + [None] * 9, [1] * 18 + [WIDE], [0.5, None],
        [8, 4, 64, 64, 16, 64, 64, 0, 64, 0, 8, *[False] * 5, 0, 0, 0, "ieee"], {"num_warps": 4, "num_stages": 2},
    )  # fmt: skip
    assert parameters(child.compile(combine).cubin) == [8, 8, 4, 4, 8, 8]
    assert parameters(child.compile(attend).cubin) == [8] * 4 + [4] * 18 + [8, 4, 8, 8]
    child.end()


def parameters(cubin: bytes) -> list[int]:
    """The sizes of a kernel's parameters: the attributes EIATTR_KPARAM_INFO of its section .nv.info."""
    head = b"\x04\x17\x0c\x00"  # format, attribute, 12 bytes: index, ordinal and offset, size
    found, at = {}, cubin.find(head)
    while at >= 0:
        _, ordinal, _, size = struct.unpack_from("<IHHI", cubin, at + 4)
        found[ordinal] = size >> 18
        at = cubin.find(head, at + 1)
    return [found[i] for i in sorted(found)]
