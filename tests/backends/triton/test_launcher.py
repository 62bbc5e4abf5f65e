"""Launching a compiled Triton kernel again: only when everything that Triton specialises on is the same.

No GPU: a fake kernel specialises as Triton does, and what it compiles checks at each launch that it may be launched.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn._compat import torch as torch_internals
from fastattn.backends.triton import launcher as triton_launch
from fastattn.backends.triton.launcher import Launcher
from fastattn.shape_cache import Section

CUDA = SimpleNamespace(type="cuda", index=0)
OTHER = SimpleNamespace(type="cuda", index=1)


class Compiled:
    """What Triton compiles for arguments of one kind. Launched with arguments of another it would read wrong memory."""

    def __init__(self, gpu: Gpu, kernel: Any, kind: Any) -> None:
        self.gpu, self.kernel, self.kind = gpu, kernel, kind
        self.function, self.packed_metadata = object(), object()

    def run(self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        launch_metadata, enter, leave, *arguments = rest
        assert (launch_metadata, enter, leave) == (None, None, None)
        assert function is self.function and metadata is self.packed_metadata
        gpu, kernel = self.gpu, self.kernel
        assert gpu.device == self.kind[0], "compiled for, and loaded on, another device"
        assert stream == gpu.streams[gpu.device]
        addresses, integers, floats, constants = kernel.split(arguments)
        assert kernel.kind(gpu.device, addresses, integers, floats, constants)[2:] == self.kind[2:]
        gpu.log.append(("again", self, (x, y, z), addresses, integers, floats, constants))


class Kernel:
    """A kernel of `tensors` pointers, `integers` integers, `floats` floats, and constants."""

    def __init__(self, gpu: Gpu, tensors: int, integers: int, floats: int) -> None:
        self.gpu, self.counts = gpu, (tensors, integers, floats)
        self.compiled: dict[Any, Compiled] = {}

    def split(self, arguments: Any) -> tuple[list[Any], list[int], list[Any], list[Any]]:
        tensors, integers, floats = self.counts
        at = tensors, tensors + integers, tensors + integers + floats
        return arguments[: at[0]], arguments[at[0] : at[1]], arguments[at[1] : at[2]], arguments[at[2] :]

    def kind(self, device: int, addresses: Any, integers: Any, floats: Any, constants: Any) -> Any:
        """(device, dtypes, what else Triton looks at): the dtypes are not to be seen in addresses."""
        aligned = tuple(None if x is None else x % 16 == 0 for x in addresses)
        widths = tuple("i64" if x >= 2**31 else "i32" for x in integers)
        types = tuple((type(x), x) for x in constants)
        return device, None, aligned, widths, tuple(x is None for x in floats), types

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3

        def launch(*arguments: Any, **options: int) -> Compiled | None:
            tensors, integers, floats, constants = self.split(arguments)
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            device, _, *rest = self.kind(self.gpu.device, addresses, integers, floats, constants)
            dtypes = tuple(None if x is None else x.dtype for x in tensors)
            name = (device, dtypes, *rest, *options.items())
            compiled = self.compiled.get(name)
            if compiled is None:
                compiled = self.compiled[name] = Compiled(self.gpu, self, (device, dtypes, *rest))
                compiled.dtypes, compiled.options = dtypes, options  # type: ignore[attr-defined]
            self.gpu.log.append(("anew", compiled, grid, addresses, list(integers), list(floats), list(constants)))
            return None if self.gpu.interprets else compiled

        return launch


class Gpu:
    """The current device, each device's current stream, and what was launched."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = {0: 11, 1: 22}
        self.log: list[Any] = []
        self.interprets = False

    @property
    def ways(self) -> list[str]:
        return [entry[0] for entry in self.log]

    @contextlib.contextmanager
    def switch(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch_internals, "current_device", lambda: found.device)
    monkeypatch.setattr(torch_internals, "raw_stream", found.streams.__getitem__)
    monkeypatch.setattr(torch.cuda, "device", found.switch)
    monkeypatch.setattr(triton_launch, "_compiled", Section("test", 1 << 12))
    return found


def aligned(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.zeros(64, dtype=dtype)
    return x[(-x.data_ptr() % 16) // x.element_size() :]


def misaligned(dtype: torch.dtype = torch.float32) -> Tensor:
    return aligned(dtype)[1:]


def launcher(
    kernel: Kernel, integers: tuple[int, ...] = (5, 7), constants: Any = (64, True), **changes: Any
) -> Launcher:
    changes = {"grid": (3,), "device": CUDA, "num_warps": 4} | changes
    return Launcher(kernel, changes.pop("grid"), changes.pop("device"), integers, constants, **changes)


def test_the_second_launch_takes_the_short_way_with_the_same_arguments(gpu: Gpu) -> None:
    kernel = Kernel(gpu, 3, 2, 2)
    launch = launcher(kernel, grid=(3, 9))
    for turn in range(4):
        x, y = aligned(), aligned()
        launch((x, None, y), (0.5 + turn, None))
        way, compiled, grid, addresses, integers, floats, constants = gpu.log[-1]
        assert way == ("again" if turn else "anew") and grid == (3, 9, 1)
        assert addresses == [x.data_ptr(), None, y.data_ptr()], "of these tensors, not of the first ones"
        assert (integers, floats, constants) == ([5, 7], [0.5 + turn, None], [64, True])
        assert compiled is gpu.log[0][1]
    assert compiled.options == {"num_warps": 4}


def test_alignment_chooses_among_compiled_kernels(gpu: Gpu) -> None:
    kernel = Kernel(gpu, 2, 2, 0)
    launch = launcher(kernel)
    a, m = aligned, misaligned
    sequence = [(a, a), (a, a), (a, m), (a, a), (a, m), (m, a), (a, m), (m, m), (m, a), (a, a), (m, m)]
    used: dict[Any, set[Any]] = {}
    for pair in sequence:
        launch([make() for make in pair])
        used.setdefault(pair, set()).add(gpu.log[-1][1])
    assert all(len(found) == 1 for found in used.values()) and len(set.union(*used.values())) == 4
    assert gpu.ways.count("anew") == 4
    assert gpu.ways[:2] == ["anew", "again"]


def test_misaligned_first(gpu: Gpu) -> None:
    """What was compiled for a misaligned tensor would do for aligned ones, but slowly: it must not stick."""
    launch = launcher(Kernel(gpu, 1, 2, 0))
    for make in (misaligned, misaligned, aligned, aligned, misaligned):
        launch([make()])
    slow, fast = gpu.log[0][1], gpu.log[2][1]
    assert slow is not fast
    assert [entry[1] for entry in gpu.log] == [slow, slow, fast, fast, slow]
    assert gpu.ways == ["anew", "again", "anew", "again", "again"]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_alignment_is_to_16_bytes(size: int, gpu: Gpu) -> None:
    dtype = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float64}[size]
    launch = launcher(Kernel(gpu, 1, 2, 0))
    launch([aligned(dtype)])
    launch([aligned(dtype)[16 // size :]])
    assert gpu.ways == ["anew", "again"], "16 bytes on is aligned too"
    launch([aligned(dtype)[8 // size :]])
    assert gpu.ways[-1] == "anew" and gpu.log[-1][1] is not gpu.log[0][1]


def test_integers_beyond_32_bits(gpu: Gpu) -> None:
    """Triton types an integer by its value; the others share a compiled kernel, whatever they are."""
    kernel = Kernel(gpu, 1, 2, 0)
    for integers, way in [
        ((5, 7), "anew"),
        ((0, 1), "again"),
        ((16, 2**31 - 1), "again"),
        ((5, 2**31), "anew"),
        ((5, 2**40), "again"),
        ((2**31, 5), "anew"),
        ((2**31, 2**31), "anew"),
        ((5, 7), "again"),
    ]:
        launcher(kernel, integers)([aligned()])
        assert gpu.ways[-1] == way, integers
        assert gpu.log[-1][4] == list(integers)
    assert len(kernel.compiled) == 4


def test_none_for_tensors_and_floats(gpu: Gpu) -> None:
    kernel = Kernel(gpu, 2, 2, 2)
    patterns = [
        (tensors, floats) for tensors in ((1, 1), (1, 0), (0, 1), (0, 0)) for floats in ((1, 1), (0, 1), (1, 0))
    ]
    for turn in range(2):
        for tensors, floats in patterns:
            launcher(kernel)([aligned() if there else None for there in tensors], [2.0 if f else None for f in floats])
            assert gpu.ways[-1] == ("again" if turn else "anew")
    assert len(kernel.compiled) == len(patterns)


def test_what_is_compiled_is_shared_but_not_with_other_kinds(gpu: Gpu) -> None:
    kernel = Kernel(gpu, 1, 2, 1)
    launcher(kernel)([aligned()], (1.0,))
    shared = [launcher(kernel), launcher(kernel, (9, 9)), launcher(kernel, grid=(100, 2))]
    for launch in shared:
        launch([aligned()], (3.0,))
        assert gpu.ways[-1] == "again"
    others: list[tuple[Any, torch.dtype, tuple[Any, ...]]] = [
        (launcher(kernel, constants=(64, False)), torch.float32, (1.0,)),
        (launcher(kernel, constants=(32, True)), torch.float32, (1.0,)),
        (launcher(kernel, constants=(64, True, "tf32")), torch.float32, (1.0,)),
        (launcher(kernel, num_warps=8), torch.float32, (1.0,)),
        (launcher(kernel, num_stages=3), torch.float32, (1.0,)),
        (launcher(kernel), torch.float16, (1.0,)),
        (launcher(kernel), torch.bfloat16, (1.0,)),
        (launcher(kernel), torch.int32, (1.0,)),
        (launcher(kernel), torch.float32, (None,)),
        (launcher(Kernel(gpu, 1, 2, 1)), torch.float32, (1.0,)),
    ]
    for launch, dtype, floats in others:
        launch([aligned(dtype)], floats)
        assert gpu.ways[-1] == "anew"
    assert len({id(entry[1]) for entry in gpu.log}) == 1 + len(others)


def test_another_current_device(gpu: Gpu) -> None:
    """It is made current for the launch, Triton's own and the short one, and not left so."""
    kernel = Kernel(gpu, 1, 2, 0)
    launch = launcher(kernel, device=OTHER)
    for way in ("anew", "again", "again"):
        launch([aligned()])
        assert gpu.ways[-1] == way and gpu.log[-1][1].kind[0] == 1
        assert gpu.device == 0
    gpu.device = 1
    launch([aligned()])
    assert gpu.ways[-1] == "again"
    launcher(kernel)([aligned()])
    assert gpu.ways[-1] == "anew" and gpu.log[-1][1].kind[0] == 0, "what one device compiled is not another's"
    assert gpu.device == 1


def test_the_current_stream_is_asked_at_each_launch(gpu: Gpu) -> None:
    launch = launcher(Kernel(gpu, 1, 2, 0))
    for stream in (11, 12, 12, 0):
        gpu.streams[0] = stream
        launch([aligned()])  # `Compiled.run` looks at it
    assert gpu.ways == ["anew", "again", "again", "again"]


def test_the_interpreter_compiles_nothing(gpu: Gpu) -> None:
    gpu.interprets = True
    cpu = launcher(Kernel(gpu, 1, 2, 0), device=torch.device("cpu"))
    fake = launcher(Kernel(gpu, 1, 2, 0))
    for launch in (cpu, cpu, fake, fake):
        launch([aligned()])
    assert gpu.ways == ["anew"] * 4


def test_a_launch_that_fails_is_not_remembered(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(gpu, 1, 2, 0)
    launch = launcher(kernel)

    def out_of_resources(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__getitem__", lambda self, grid: out_of_resources)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of resource"):
                launch([aligned()])
    launch([aligned()])
    assert gpu.ways == ["anew"]


def test_what_is_remembered_is_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", Section("test", 3))
    kernel = Kernel(gpu, 1, 2, 0)
    launchers = [launcher(kernel, constants=(i, True)) for i in range(10)]
    for _ in range(3):
        for launch in launchers:
            launch([aligned()])
            assert len(triton_launch._compiled) <= 3


def test_any_launch_gets_a_kernel_that_fits_it(gpu: Gpu, seed: int) -> None:
    """Launchers, tensors and devices at random: `Compiled.run` checks all but the dtypes, which are checked here."""
    rng = random.Random(seed)
    kernels = [Kernel(gpu, 3, 2, 2) for _ in range(2)]
    dtypes = (torch.float16, torch.float32, torch.int32)
    launchers = []
    for _ in range(40):
        pattern = [rng.choice([None, *dtypes]) for _ in range(3)]
        floats = [rng.random() < 0.5 for _ in range(2)]
        integers = tuple(rng.choice([0, 1, 7, 16, 2**31 - 1, 2**31, 2**40]) for _ in range(2))
        constants = (rng.choice([16, 32]), rng.choice([True, False]))
        options = {"num_warps": rng.choice([4, 8]), "device": rng.choice([CUDA, OTHER])}
        launchers.append((launcher(rng.choice(kernels), integers, constants, **options), pattern, floats))
    for _ in range(1500):
        launch, pattern, floats = rng.choice(launchers)
        gpu.device = rng.randrange(2)
        gpu.streams[rng.randrange(2)] = rng.randrange(5)
        tensors = [dtype and (misaligned if rng.random() < 0.2 else aligned)(dtype) for dtype in pattern]
        launch(tensors, tuple(rng.random() if there else None for there in floats))
        compiled = gpu.log[-1][1]
        assert compiled.dtypes == tuple(pattern)
        assert compiled.options == launch._options and compiled.kernel is launch._kernel
    assert gpu.ways.count("again") > 1000
