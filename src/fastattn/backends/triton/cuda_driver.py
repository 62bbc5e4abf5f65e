"""The few calls of the CUDA driver that a ready binary needs: load it, describe tensors to the copy engine, launch it.

Triton's own launcher makes a tensor map of each tensor at every launch and has another signature in each release; the
driver's functions stay what they are.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

_FLOAT32 = 7  #: CUtensorMapDataType
_TYPES = {"bf16": (9, 2), "fp16": (6, 2), "fp32": (7, 4), "bool": (0, 1)}  #: CUtensorMapDataType, and bytes
_SWIZZLES, _PROMOTE_TO_128 = {64: 2, 128: 3}, 2  #: CUtensorMapSwizzle, CUtensorMapL2promotion
_MAX_SHARED = 8  #: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ROW = 128  #: bytes that a swizzled row has, at most
_MAP = 128  #: bytes of a CUtensorMap, which lies at a multiple of 64
MAP_WORDS = _MAP // 8

_loading = threading.Lock()


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'?').decode()} (CUDA driver error {status})")


def make_current(device: int) -> None:
    """Gives this thread the context that torch uses on a device, if it has none: one may have run nothing yet."""
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for a context")
    if context.value is None:
        _check(driver.cuDeviceGet(ctypes.byref(handle), device), "finding a device")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "finding a context")
        _check(driver.cuCtxSetCurrent(context), "setting a context")


def functions() -> tuple[int, ...]:
    """For code that is not Python: the addresses of cuLaunchKernelEx, cuCtxGetCurrent, cuCtxSetCurrent and
    cuStreamIsCapturing."""
    names = "cuLaunchKernelEx", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamIsCapturing"
    return tuple([ctypes.cast(getattr(_driver(), name), ctypes.c_void_p).value or 0 for name in names])


def context() -> int:
    """This thread's, 0: none."""
    found = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(found)), "asking for a context")
    return found.value or 0


def use_device(device: int) -> None:
    """Makes the context that torch uses on a device this thread's, whichever it had: for threads of our own."""
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), "finding a device")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "finding a context")
    _check(driver.cuCtxSetCurrent(context), "setting a context")


@contextmanager
def _during_captures() -> Iterator[None]:
    """Within the block this thread may load a module while it, or another one, captures a CUDA graph in "global" mode,
    torch's default: that would end the capture otherwise."""
    driver, mode = _driver(), ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "setting a thread's capture mode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # as it was


class Function:
    """A kernel of a binary, on every device that asks for it."""

    __slots__ = ("_cubin", "_handles", "_name", "_shared", "_threads")

    def __init__(self, cubin: bytes, name: str, shared: int, threads: int) -> None:
        self._cubin, self._name, self._shared, self._threads = cubin, name.encode(), shared, threads
        self._handles: dict[int, ctypes.c_void_p] = {}

    def load(self, device: int) -> ctypes.c_void_p:
        """The handle on a device, which must be the current one with a context."""
        with _loading:
            handle = self._handles.get(device)
            if handle is None:
                module, handle, driver = ctypes.c_void_p(), ctypes.c_void_p(), _driver()
                with _during_captures():
                    _check(driver.cuModuleLoadData(ctypes.byref(module), self._cubin), "loading a kernel")
                    _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, self._name), "finding a kernel")
                    _check(driver.cuFuncSetAttribute(handle, _MAX_SHARED, self._shared), "its shared memory")
                self._handles[device] = handle
        return handle

    def told(self, grid: tuple[int, int, int], overlaps: bool) -> _Config:
        """What the driver is told of launches over such a grid. overlaps: see `BoundLaunch`."""
        config = _Config((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(self._threads, 1, 1), self._shared)
        if overlaps:
            config.attributes, config.count = _OVERLAP, 1
        return config


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of whose 64 bytes for a value ours takes the first four."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("value", ctypes.c_uint32),
        ("_rest", ctypes.c_uint32 * 15),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    )


class BoundLaunch:
    """Launches of one kernel over one grid, of which only the values of arguments change.

    Of one thread at a time, as the memory that holds these values.
    """

    __slots__ = ("_config", "_handle", "_how", "_memory", "_run", "_stream", "places")

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        device: int,
        places: ctypes.Array[ctypes.c_void_p],
        memory: Any,
        overlaps: bool = False,
    ) -> None:
        """places: the address of each argument. memory: where they are, which lives as long as this. overlaps: it may
        start while the kernel before it in the stream still runs, to wait for that one itself (programmatic dependent
        launch). The device must be the current one, with a context."""
        self.places, self._memory = places, memory
        self._config = function.told(grid, overlaps)
        self._how = ctypes.byref(self._config)
        self._handle = function.load(device)
        self._run = _driver().cuLaunchKernelEx
        self._stream = 0

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Addresses, of what cuLaunchKernelEx is given: the config, where that has the stream, the function, and the
        arguments' places. They hold as long as this object."""
        config = ctypes.addressof(self._config)
        function, places = self._handle.value or 0, ctypes.addressof(self.places)
        return config, config + _Config.stream.offset, function, places

    def __call__(self, stream: int) -> None:
        """On that stream, of which this is the address."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        status = self._run(self._how, self._handle, self.places, None)
        if status:
            _check(status, "launching a kernel")


_OVERLAP = (_Attribute * 1)(_Attribute(id=6, value=1))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class TensorMap(NamedTuple):
    """What the copy engine knows of tensors that differ in their addresses alone (a CUtensorMap)."""

    data: bytes
    address_first: bool  #: the first word is the address, and no other depends on it


class _Moved:
    """The words of maps whose address only the driver can change: see `TensorMaps.words`."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __setitem__(self, i: int, address: int) -> None:
        status = _driver().cuTensorMapReplaceAddress(ctypes.c_void_p(self._first + 8 * i), ctypes.c_void_p(address))
        _check(status, "moving the map of a tensor")


class TensorMaps:
    """The maps of one launch's tensors, side by side: the driver copies them when it launches.

    words: `words[MAP_WORDS * i] = a` says that the i-th tensor lies at address a, a multiple of 16. addresses: of the
    maps themselves.
    """

    __slots__ = ("_memory", "addresses", "words")

    def __init__(self, maps: Sequence[TensorMap]) -> None:
        self._memory = ctypes.create_string_buffer(_MAP * len(maps) + 64)
        start = -ctypes.addressof(self._memory) % 64
        first = ctypes.addressof(self._memory) + start
        ctypes.memmove(first, b"".join([x.data for x in maps]), _MAP * len(maps))
        self.addresses = [first + _MAP * i for i in range(len(maps))]
        words: Any = (ctypes.c_uint64 * (MAP_WORDS * len(maps))).from_buffer(self._memory, start)
        self.words = words if all([x.address_first for x in maps]) else _Moved(first)


def tensor_map(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, rows: int, columns: int = 0, together: int = 1
) -> TensorMap:
    """Of tensors `[B, H, S, D]` read or written in boxes of `rows` tokens of one head, or of each of `together` heads,
    one head after the other.

    strides: in elements, multiples of 16 bytes (anything along dims of size 1), the last 1. dtype: "bf16", "fp16",
    "fp32" or "bool". columns: of a block in shared memory, where they may take less than 128 bytes (64 at least). What
    a box has outside of the tensor reads as 0 and is not written.
    """
    kind, size = _TYPES[dtype]
    row = min(columns * size or _ROW, _ROW)
    batch, heads, length, dim = shape
    # Where there is only one of a thing its stride means nothing, but must be a legal one.
    steps = [size * s if n > 1 else 16 for s, n in ((strides[2], length), (strides[1], heads), (strides[0], batch))]
    what = f"a tensor of shape {list(shape)} and strides {list(strides)}"
    return _encoded(what, kind, (dim, length, heads, batch), steps, (row // size, rows, together, 1), _SWIZZLES[row])


def flat_tensor_map(count: int, box: int) -> TensorMap:
    """Of `count` float32 numbers, read `box` at a time."""
    # The stride is not read: there is no other dim.
    return _encoded(f"{count} numbers", _FLOAT32, (count,), (0,), (box,), 0)


#: Addresses that a map is made for, to be told the one of a tensor before a launch: every bit differs that may.
_SOMEWHERE = 0x5555_5555_5550, 0x2AAA_AAAA_AAA0


def _encoded(
    what: str, kind: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> TensorMap:
    """The driver's map; sizes from the innermost dim outwards. A CUtensorMap is opaque: whether its first word is the
    address is seen by comparing two."""
    rank = len(shape)
    memory = ctypes.create_string_buffer(_MAP + 64)
    place = (ctypes.addressof(memory) + 63) // 64 * 64
    found = []
    for address in _SOMEWHERE:
        status = _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place),
            kind,
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*shape),
            (ctypes.c_uint64 * len(strides))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # not interleaved
            swizzle,
            _PROMOTE_TO_128,
            0,  # filled with zeros
        )
        _check(status, f"describing {what}")
        found.append(ctypes.string_at(place, _MAP))
    first = all([int.from_bytes(x[:8], "little") == address for x, address in zip(found, _SOMEWHERE, strict=True)])
    return TensorMap(found[0], first and found[0][8:] == found[1][8:])
