"""The Hopper forward and backward without a GPU: its own source, run as Python with numpy in place of Gluon.

What it shares with a kernel is every line of it: which tiles, which blocks, which barriers in which order. What it
has of its own is a model of the machine: threads for the three groups of warps, barriers with phases, a copy engine and
tensor cores that are done when they like. A wait too few gives wrong numbers, a wait too many hangs. Several programs
may run at a time, begun in any order; what they add to memory arrives when it likes, but before a counter says so.
"""

from __future__ import annotations

import ast
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import fastattn

FOLDERS = Path(fastattn.__file__).parent / "backends" / "triton"
FILES = ("parts", "tiles", "turns", "masking", "softmax", "output", "producer", "consumer", "forward")
BACKWARD_FILES = (
    "../hopper/turns", "parts", "tiles", "masking", "steps", "sums", "order", "producer", "consumer", "wide_consumer",
    "backward",
)  # fmt: skip
PATIENCE = 20.0  #: seconds; a wait that takes longer never ends


class Value:
    """A scalar or a tensor of a kernel."""

    def __init__(self, a: Any) -> None:
        self.a = np.asarray(a)
        self.product: Any = None  #: of a product of float32: what it is in float64

    type = SimpleNamespace(layout=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        assert not bitcast
        return Value(_rounded(self.a, dtype)) if dtype in _ROUND else Value(self.a.astype(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.a.reshape(shape))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.a[key])

    def __bool__(self) -> bool:
        return bool(self.a)

    def __index__(self) -> int:
        return int(self.a)

    def __neg__(self) -> Value:
        return Value(-self.a)

    __hash__ = None  # type: ignore[assignment]


def _divided(x: Any, y: Any) -> Any:
    """As C divides: towards 0."""
    q = np.abs(x) // np.abs(y)
    return np.where((np.asarray(x) < 0) != (np.asarray(y) < 0), -q, q)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": _divided,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
    "rshift": np.right_shift, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _operator(f: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Value, Any], Any]:
    """Products keep what float32 does not hold: the compiler adds to them without rounding them first."""

    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        x, y = self.a, _plain(other)
        if f in (np.add, np.subtract):
            product = self.product
            if product is None and isinstance(other, Value):
                y = y if other.product is None else other.product
            else:
                x = x if product is None else product
        result = f(y, x) if swapped else f(x, y)
        if f in (np.add, np.subtract) and np.result_type(self.a, _plain(other)) == np.float32:
            result = np.asarray(result, np.float32)
        found = Value(result)
        if f is np.multiply and found.a.dtype == np.float32:
            found.product = np.multiply(x, y, dtype=np.float64)
        return found

    return apply


for _name, _f in _OPERATORS.items():
    setattr(Value, f"__{_name}__", _operator(_f, False))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{_name}__", _operator(_f, True))


def _plain(x: Any) -> Any:
    """Floats as a kernel has them: 32 bits."""
    x = x.a if isinstance(x, Value) else x
    return np.float32(x) if isinstance(x, float) else x


_ROUND = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _rounded(a: Any, dtype: str) -> Any:
    return torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(_ROUND[dtype]).float().numpy()


class Pointer:
    """Into a flat array. Reading or writing outside of it is an error."""

    def __init__(self, memory: Any, at: Any = 0, element: Any = None) -> None:
        self.memory, self.at = memory, np.asarray(at)
        self.dtype = SimpleNamespace(element_ty=element)

    def __add__(self, n: Any) -> Pointer:
        return Pointer(self.memory, self.at + _plain(n), self.dtype.element_ty)

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[Any, Any]:
        mask = np.broadcast_to(True if mask is None else _plain(mask), self.at.shape)
        at = np.where(mask, self.at, 0)
        assert (at >= 0).all() and (at < len(self.memory)).all(), "outside of the tensor"
        return at, mask


class Shared:
    """Shared memory."""

    def __init__(self, a: Any, dtype: Any) -> None:
        self.a, self.dtype = a, dtype

    def index(self, i: Any) -> Any:
        found = self.a[int(i)]
        return found if isinstance(found, Barrier) else Shared(found, self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        found = self.a.reshape(shape)
        assert np.shares_memory(found, self.a)
        return Shared(found, self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.a.transpose(order), self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.a[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def load(self, layout: Any) -> Value:
        return Value(self.a.copy())

    def store(self, x: Value) -> None:
        assert self.a.shape == x.a.shape
        self.a[...] = x.a


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def check(self) -> None:
        assert self.pending >= 0, "more arrive than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Descriptor:
    """What the copy engine knows of a tensor [B, H, S, D]."""

    layout = None

    def __init__(self, x: Any, rows: int, columns: int, dtype: Any, size: int = 2) -> None:
        self.x, self.rows, self.columns, self.dtype, self.size = x, rows, columns, dtype, size

    def box(self, place: list[Any]) -> tuple[Any, slice, slice]:
        """The part of the tensor that a box covers, and the rows and columns of the box that it fills."""
        b, h, row, column = (int(x) for x in place)
        assert column * self.size % 16 == 0, "an illegal instruction on a GPU"
        length, dim = self.x.shape[2:]
        begin, end = (min(max(x, 0), length) for x in (row, row + self.rows))
        left, right = (min(max(x, 0), dim) for x in (column, column + self.columns))
        part = self.x[b, h, begin:end, left:right]
        return part, slice(begin - row, end - row), slice(left - column, right - column)


class FlatDescriptor:
    """What it knows of float32 numbers in a row."""

    layout = None
    rows, size = 1, 4

    def __init__(self, x: Any, columns: int) -> None:
        self.x, self.columns = x, columns

    def box(self, place: list[Any]) -> tuple[Any, slice, slice]:
        at = int(place[0])
        assert at % 4 == 0, "an illegal instruction on a GPU"
        assert 0 <= at <= len(self.x) - self.columns
        return self.x[None, at : at + self.columns], slice(0, 1), slice(0, self.columns)


class Machine:
    """One multiprocessor that runs one program."""

    def __init__(self, pid: int, programs: int, rng: random.Random) -> None:
        self.pid, self.programs, self.rng = pid, programs, rng
        self.changed = threading.Condition()
        self.copies: list[Callable[[], None]] = []
        self.turns: dict[int, list[int]] = {9: [0, 0], 10: [0, 0]}  # half arrived, times complete
        self.errors: list[BaseException] = []
        self.working = 0
        self.own = threading.local()  # products that a group of warps has issued
        self.ticket: int | None = None
        self.on_the_way: list[Callable[[], None]] = []  # what is to be added to memory

    def arrives(self, everything: bool) -> None:
        """What is on the way to memory arrives, or some of it."""
        with self.changed:
            waiting, self.on_the_way = self.on_the_way, []
            self.rng.shuffle(waiting)
            for one in waiting:
                if everything or self.rng.random() < 0.5:
                    one()
                else:
                    self.on_the_way.append(one)

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: ready() or bool(self.errors), PATIENCE) or self.errors:
                raise RuntimeError(f"waits for ever: {what}")

    def copy_engine(self) -> None:
        """Does what it was asked for, in any order."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.copies) or not self.working or bool(self.errors), PATIENCE)
                if not self.copies:
                    return
                self.copies.pop(self.rng.randrange(len(self.copies)))()
                self.changed.notify_all()

    def run(self, parts: list[Any]) -> None:
        self.working = len(parts)

        def work(f: Any, arguments: Any) -> None:
            try:
                with np.errstate(all="ignore"):
                    f(*arguments)
                assert not getattr(self.own, "products", []), "a product that nobody has waited for"
            except BaseException as error:
                with self.changed:
                    self.errors.append(error)
            with self.changed:
                self.working -= 1
                self.changed.notify_all()

        threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts]
        threads.append(threading.Thread(target=self.copy_engine, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if self.errors:
            raise self.errors[0]
        self.arrives(everything=True)


def _half_of_dims(k: Shared, group: int, cfg: Any) -> Shared:
    dims = cfg.D // 2
    return Shared(k.a.reshape(-1, cfg.D)[:, group * dims : (group + 1) * dims], k.dtype)


class Together:
    """The programs of one launch: what they share, and what was seen of their order."""

    def __init__(self, residents: int) -> None:
        self.residents = residents  #: programs at a time
        self.changed = threading.Condition()
        self.failed = False
        #: By array and first place in it: the tickets of those who added something other than 0, as it arrived.
        self.added: dict[tuple[int, int], list[int | None]] = {}

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """For what another program does. Alone, a program waits for those that are done."""
        with self.changed:
            patience = PATIENCE if self.residents > 1 else 0.0
            if not self.changed.wait_for(lambda: ready() or self.failed, patience) or self.failed:
                raise RuntimeError(f"waits for ever: {what}")


class Model:
    """The kernel's functions, and what they call."""

    def __init__(self, folder: str = "hopper", files: tuple[str, ...] = FILES) -> None:
        self._own = threading.local()
        self.together = Together(1)
        self.names: dict[str, Any] = self._names()
        for file in files:
            path = FOLDERS / folder / f"{file}.py"
            tree = ast.parse(path.read_text(), str(path))
            tree.body = [x for x in tree.body if not isinstance(x, ast.Import | ast.ImportFrom)]
            exec(compile(tree, str(path), "exec"), self.names)
        # Pairs of 16-bit numbers in registers are none of the algorithm.
        self.names["pack"] = lambda p, dtype, cfg: Value(_rounded(p.a, dtype))
        self.names["as_operand"] = lambda p, dtype, layout, cfg: Value(_rounded(p.a, dtype))
        # Nor are the places of shared memory, nor how numbers are added to memory.
        self.names["half_of_dims"] = _half_of_dims
        self.names["rows_of"] = lambda x, group, cfg: Shared(x.a.reshape(2, -1, cfg.D)[group], x.dtype)
        self.names["add"] = self._add
        # The memory model of a GPU, which two instructions ask for.
        self.names["wait_for"], self.names["count"] = self._wait_for, self._count

    @property
    def machine(self) -> Machine:
        """The one that the caller's thread belongs to."""
        found: Machine = self._own.machine
        return found

    def launch(
        self, programs: int, rng: random.Random, arguments: dict[str, Any], kernel: str = "forward_kernel",
        residents: int = 1,
    ) -> Together:  # fmt: skip
        """residents: how many programs run at a time. More than one begin in any order."""
        self.together = together = Together(residents)
        waiting = list(range(programs))
        if residents > 1:
            rng.shuffle(waiting)
        errors: list[BaseException] = []

        def work() -> None:
            while not errors:
                with together.changed:
                    if not waiting:
                        return
                    pid = waiting.pop(0)
                self._own.machine = Machine(pid, programs, random.Random(rng.random()))
                try:
                    self.names[kernel](**arguments)
                except BaseException as error:
                    with together.changed:
                        errors.append(error)
                        together.failed = True
                        together.changed.notify_all()

        others = [threading.Thread(target=work, daemon=True) for _ in range(residents - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]
        return together

    def _specialize(self, parts: list[Any]) -> None:
        machine = self.machine

        def of_this(f: Any) -> Any:
            def run(*arguments: Any) -> None:
                self._own.machine = machine
                f(*arguments)

            return run

        machine.run([(of_this(f), arguments) for f, arguments in parts])

    def _add(self, pointers: Pointer, x: Value) -> None:
        """On its way to memory, where it arrives some time."""
        assert (pointers.at >= 0).all() and (pointers.at < len(pointers.memory)).all(), "outside of the tensor"
        machine, together = self.machine, self.together
        values = x.a.copy()

        def arrive() -> None:
            with together.changed:
                np.add.at(pointers.memory, pointers.at, values)
                if values.any():
                    place = id(pointers.memory), int(pointers.at.min())
                    together.added.setdefault(place, []).append(machine.ticket)

        with machine.changed:
            machine.on_the_way.append(arrive)
        machine.arrives(everything=False)

    def _atomic_add(self, p: Pointer, x: int, sem: str) -> Value:
        """Of the tickets: there is no other."""
        with self.together.changed:
            found = int(p.memory[p.at])
            p.memory[p.at] += x
        self.machine.ticket = found
        return Value(np.int32(found))

    def _wait_for(self, counter: Pointer, number: Any) -> None:
        what = f"number {int(number)} of counter {int(counter.at)}"
        self.together.wait_until(lambda: bool(counter.memory[counter.at] >= int(number)), what)

    def _count(self, counter: Pointer, number: Any) -> None:
        self.machine.arrives(everything=True)
        with self.together.changed:
            assert counter.memory[counter.at] == int(number) - 1, "counts out of turn"
            counter.memory[counter.at] = int(number)
            self.together.changed.notify_all()

    def _names(self) -> dict[str, Any]:
        from fastattn.backends.triton.bounds_kernel import FIELDS, HEADER
        from fastattn.backends.triton.hopper.segments import HEADER_NUMBERS, TILE_NUMBERS
        from fastattn.backends.triton.prefill.block_lists import HEADER as LIST_HEADER

        def jit(f: Any = None, **_: Any) -> Any:
            return f if f is not None else lambda f: f

        def aggregate(cls: Any) -> Any:
            names = tuple(cls.__annotations__)

            def make(self: Any, *values: Any) -> None:
                for name, value in zip(names, values, strict=True):
                    setattr(self, name, value)

            cls.__init__ = make
            return cls

        class Constant:
            def __new__(cls, x: Any) -> Any:
                return x

        gl = SimpleNamespace(
            constexpr=Constant, tensor=Value, shared_memory_descriptor=Shared, static_range=range,
            int32=np.int32, int64=np.int64, float32=np.float32, bfloat16="bf16", float16="fp16",
            program_id=lambda axis: Value(self.machine.pid),
            num_programs=lambda axis: Value(self.machine.programs),
            arange=lambda a, b, layout: Value(np.arange(a, b)),
            zeros=lambda shape, dtype, layout: Value(np.zeros(shape, np.float32 if dtype in _ROUND else dtype)),
            zeros_like=lambda x: Value(np.zeros_like(x.a)),
            full=lambda shape, x, dtype, layout: Value(np.full(shape, x, dtype)),
            where=lambda c, x, y: Value(np.where(_plain(c), _plain(x), _plain(y))),
            maximum=lambda x, y: Value(np.maximum(_plain(x), _plain(y))),
            minimum=lambda x, y: Value(np.minimum(_plain(x), _plain(y))),
            max=lambda x, axis: Value(np.fmax.reduce(x.a, axis)),
            sum=lambda x, axis: Value(x.a.sum(axis)),
            exp2=lambda x: Value(np.exp2(x.a)), log2=lambda x: Value(np.log2(x.a)),
            convert_layout=lambda x, layout: x,
            load=self._load, store=self._store, inline_asm_elementwise=self._asm,
            allocate_shared_memory=self._allocate,
            warp_specialize=lambda parts, warps, registers: self._specialize(parts), atomic_add=self._atomic_add,
        )  # fmt: skip
        for layout in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
                       "SwizzledSharedLayout", "NVMMASharedLayout"):  # fmt: skip
            setattr(gl, layout, lambda *arguments, **named: arguments)
        nothing = lambda *_: None  # noqa: E731
        return {
            "gl": gl, "gluon": SimpleNamespace(jit=jit), "aggregate": aggregate, "base_value": Value,
            "HEADER": HEADER.value, "FIELDS": FIELDS.value, "LIST_HEADER": LIST_HEADER.value,
            "TILE_HEADER": HEADER_NUMBERS, "TILE_FIELDS": TILE_NUMBERS,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barrier", init=self._init, wait=self._wait, expect=self._expect,
                arrive=self._arrive,
            ),
            "tma": SimpleNamespace(store_wait=nothing), "reinterpret": nothing,
            "fence_async_shared": nothing, "barrier": nothing,
            "load_tile": self._load_tile, "store_tile": self._store_tile,
            "warpgroup_mma": self._product, "warpgroup_mma_wait": self._product_wait,
        }  # fmt: skip

    def _load(self, p: Pointer, mask: Any = None, other: Any = 0) -> Value:
        at, mask = p.places(mask)
        return Value(np.where(mask, p.memory[at], other).astype(p.memory.dtype))

    def _store(self, p: Pointer, x: Any, mask: Any = None) -> None:
        at, mask = p.places(mask)
        p.memory[at[mask]] = np.broadcast_to(_plain(x), at.shape)[mask]

    def _asm(self, asm: str, constraints: str, arguments: list[Any], **_: Any) -> Any:
        operation = asm.split()[0]
        if operation in ("bar.sync", "bar.arrive"):
            number = int(asm.split()[1].rstrip(","))
            turn = self.machine.turns[number]
            with self.machine.changed:
                before = turn[1]
                turn[0] += 1
                if turn[0] == 2:
                    turn[:] = [0, before + 1]
                self.machine.changed.notify_all()
            if operation == "bar.sync":
                self.machine.wait_until(lambda: turn[1] > before, f"turn {number}")
        elif operation == "tanh.approx.f32":
            return Value(np.tanh(arguments[0].a))
        elif operation == "popc.b32":
            return Value(int(arguments[0]).bit_count())
        elif operation == "mov.u32":
            return arguments[0]
        else:
            assert "nanosleep" in asm, asm

    def _allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        if layout == "barrier":
            return Shared([Barrier() for _ in range(shape[0])], dtype)
        return Shared(np.full(shape, np.nan, np.float32), dtype)

    def _init(self, x: Barrier, count: int) -> None:
        x.count = x.pending = count

    def _arrive(self, x: Barrier, pred: Any = True) -> None:
        if not pred:
            return
        with self.machine.changed:
            x.pending -= 1
            x.check()
            self.machine.changed.notify_all()

    def _expect(self, x: Barrier, size: int) -> None:
        with self.machine.changed:
            x.bytes += size
        self._arrive(x)

    def _wait(self, x: Barrier, phase: Any) -> None:
        self.machine.wait_until(lambda: x.phase & 1 != int(phase), f"a barrier in phase {x.phase}")

    def _load_tile(self, x: Descriptor, place: list[Any], full: Barrier, into: Shared) -> None:
        target = into.a.reshape(x.rows, x.columns)
        part, rows, columns = x.box(place)

        def copy() -> None:
            target[...] = 0
            target[rows, columns] = part
            full.bytes -= target.size * x.size
            full.check()

        with self.machine.changed:
            target[...] = np.nan  # what was there is gone from now on
            self.machine.copies.append(copy)
            self.machine.changed.notify_all()

    def _store_tile(self, x: Descriptor, place: list[Any], source: Shared) -> None:
        part, rows, columns = x.box(place)
        part[...] = source.a.reshape(x.rows, x.columns)[rows, columns]

    def _product(self, a: Any, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
        """Issued. Early or late, as it likes, it reads shared memory."""
        found = Value(np.nan)

        def compute() -> None:
            if not found.a.shape:
                found.a = a.a @ b.a + (acc.a if use_acc else 0)

        products = self.machine.own.__dict__.setdefault("products", [])
        products.append(compute)
        if self.machine.rng.random() < 0.3:
            for one in products:  # in order: a product may add to what the one before it gives
                one()
        return found

    def _product_wait(self, pending: int, deps: list[Any]) -> Any:
        products = self.machine.own.__dict__.setdefault("products", [])
        while len(products) > pending:
            products.pop(0)()
        return deps[0] if len(deps) == 1 else tuple(deps)


def forward(call: Any, rng: random.Random, programs: int, changes: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a call, as the kernel computes them. The call's tensors are on the CPU; the kernels of
    `bounds.py` run in Triton's interpreter.

    changes: of the `Flags`. Outputs begin as NaN.
    """
    from dataclasses import replace

    from fastattn.backends.triton.bounds import Bounds
    from fastattn.backends.triton.hopper import launch, tensors
    from fastattn.backends.triton.hopper.binary import INTERVALS, ROWS, SEGMENTS, SIZES, TILE, tiles_of
    from fastattn.backends.triton.hopper.segments import SegmentTiles
    from fastattn.backends.triton.prefill.lists import Lists
    from fastattn.call import Problem

    p = Problem.of(call)
    flags = replace(launch.flags(p, None if call.sinks is None else call.sinks.dtype), **(changes or {}))
    blocks, (dim, value_dim) = flags.blocks, flags.dims
    out = np.full((p.batch, p.q_len, p.q_heads, p.value_dim), np.nan, np.float32)
    lse = np.full(p.batch * p.q_heads * p.q_len, np.nan, np.float32)

    def described(x: Any, rows: int, columns: int) -> Descriptor:
        return Descriptor(x.float().numpy() if isinstance(x, torch.Tensor) else x, rows, columns, flags.dtype)

    def pointer(x: Any) -> Any:
        return None if x is None else Pointer((x.float() if x.is_floating_point() else x).numpy())

    bounds_ptr = bias_ptr = None
    strides = (0, 0)
    rows = -(-p.q_len // TILE)
    most = rows * p.batch * p.q_heads
    if flags.mask == SEGMENTS:
        tiles = SegmentTiles(p, call, TILE, launch.sides(p))
        memory = torch.full((tiles.size,), 0x7F, dtype=torch.uint8)
        tiles(call, memory)
        bounds_ptr, rows = Pointer(memory.view(torch.int32).numpy()), tiles.tiles
        most = rows * p.q_heads
    if flags.mask == INTERVALS:
        bounds = Bounds(p, call, TILE, ordered=True)
        memory = torch.full((bounds.size,), 0x7F, dtype=torch.uint8)
        bounds(call, memory)
        bounds_ptr = Pointer(memory.view(torch.int32).numpy())
        if bounds.keys is not None:
            bias_ptr = Pointer(memory.view(torch.float32).numpy(), bounds.keys.bias_at)
            strides = bounds.keys.strides
    mask_desc, list_strides = None, (0, 0, 0)
    if flags.tiles:
        assert tensors.tiles_readable(call.mask)
        size = SIZES[flags.tiles]
        element = SimpleNamespace(primitive_bitwidth=8 * size)
        once = tensors.once(call.mask)
        mask_desc = Descriptor(once.float().numpy(), ROWS, blocks.keys, element, size)
        strides = tuple(int(n > 1) for n in once.shape[:2])
    if flags.listed:
        entries = replace(p, mask_shape=tuple(once.shape))
        lists = Lists(entries, call._replace(mask=once), TILE, blocks.keys)
        memory = torch.full((lists.size,), 0x7F, dtype=torch.uint8)
        bounds_ptr, list_strides = Pointer(lists(call, memory).numpy()), lists.strides
    left, right = launch.sides(p)
    log2_e = 1.0 if flags.tiles and flags.tiles != "bool" else math.log2(math.e)
    inner, scale = (call.scale / p.softcap, p.softcap * log2_e) if p.softcap else (1.0, call.scale * log2_e)
    integers = {
        "batch": p.batch, "heads": p.q_heads, "group": p.group, "q_len": p.q_len, "kv_len": p.kv_len, "left": left,
        "right": right, "rows": rows, "section": p.group, "dv8": p.value_dim // 8, "bias_b": strides[0],
        "bias_h": strides[1], "list_b": list_strides[0], "list_h": list_strides[1], "list_m": list_strides[2],
    }  # fmt: skip
    names = dict(
        MASK=flags.mask, KEYS=flags.keys, TILES=tiles_of(flags), MASK_STAGES=flags.mask_stages, LISTED=flags.listed,
        Q_LENGTHS=flags.q_lengths, KV_LENGTHS=flags.kv_lengths,
        SINKS=bool(flags.sinks), SOFTCAP=flags.softcap, LSE=True, BLOCK_M=TILE, BLOCK_N=blocks.keys, D=dim,
        DV=value_dim, STAGES=blocks.stages, Q_SLOTS=blocks.q_slots, STAGED=blocks.staged, TURNS=blocks.turns,
    )  # fmt: skip
    arguments = {
        "q_desc": described(call.q, ROWS, dim), "k_desc": described(call.k, blocks.keys, dim),
        "v_desc": described(call.v, blocks.keys, value_dim),
        "out_desc": described(out.transpose(0, 2, 1, 3), ROWS, value_dim),
        "mask_desc": mask_desc, "out_ptr": Pointer(out.reshape(-1), element=flags.dtype), "lse_ptr": Pointer(lse),
        "sinks_ptr": pointer(call.sinks), "q_lengths_ptr": pointer(call.q_lengths),
        "kv_lengths_ptr": pointer(call.kv_lengths), "bounds_ptr": bounds_ptr, "bias_ptr": bias_ptr,
        **{name: Value(x) for name, x in integers.items()}, "inner": Value(np.float32(inner)),
        "scale": Value(np.float32(scale)), **names,
    }  # fmt: skip
    Model().launch(min(programs, most), rng, arguments)
    return torch.from_numpy(out).transpose(1, 2), torch.from_numpy(lse).view(p.batch, p.q_heads, p.q_len)


def backward(
    call: Any, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
    rng: random.Random, ordered: bool = False, residents: int = 1,
) -> Any:  # fmt: skip
    """Gradients of a call, as the kernels compute them: those before and after the main one in Triton's interpreter.
    Tensors are on the CPU. Memory and gradients begin as NaN.

    ordered: as under torch's deterministic algorithms; the order of additions is checked."""
    from dataclasses import replace

    from fastattn.backends.triton.hopper_backward import launch
    from fastattn.backends.triton.hopper_backward.binary import HALF, INTERVALS, ROWS, keys_of
    from fastattn.call import Problem

    p = replace(Problem.of(call), deterministic=ordered)
    bound = launch.Backward(p, call, loads=False)
    flags = bound.flags
    memory = torch.full((bound._memory.total // 4,), torch.nan).view(torch.uint8)
    pieces = bound._memory.cut(memory)

    def numbers(name: str) -> Any:
        return Pointer(pieces[name].numpy()) if name in pieces else None

    lengths = (p.q_heads, p.q_len, p.head_dim), (p.kv_heads, p.kv_len, p.head_dim), (p.kv_heads, p.kv_len, p.value_dim)
    found = [torch.full((p.batch, n, h, d), torch.nan, dtype=p.dtype).transpose(1, 2) for h, n, d in lengths]
    if bound._bounds is not None:
        bound._bounds(call, memory)
        bound._extents(launch._extents_tensors(pieces))
    tensors = bound._prepare_tensors(pieces, out, grad_out, lse, grad_lse, call.sinks, call.q)
    bound._prepare(out, grad_out, lse, grad_lse, call.q)(tensors)

    def described(x: Any, rows: int) -> Descriptor:
        return Descriptor(x.float().numpy() if isinstance(x, torch.Tensor) else x, rows, flags.dim, flags.dtype)

    clean = [None, None]
    if flags.mask == INTERVALS:
        shape = p.batch, p.q_heads, launch.tiles_of(p) * ROWS, flags.dim
        clean = [described(pieces[name].view(shape), ROWS) for name in ("clean_q", "clean_grad_out")]
    dk, dv = (x.float().numpy() for x in found[1:])
    names = (
        "batch", "heads", "kv_heads", "q_len", "kv_len", "left", "right", "tiles", "blocks", "share", "split",
        "section", "sections",
    )  # fmt: skip
    integers = dict(zip(names, bound._arguments.integers, strict=False))
    bias_ptr, strides = None, bound._arguments.integers[len(names) :]
    if flags.biased:
        bias_ptr = Pointer(pieces["bounds"].view(torch.float32).numpy(), bound._bounds.keys.bias_at)
        integers |= dict(zip(("bias_b", "bias_h"), strides, strict=True))
    else:
        assert not strides
    log2_e = math.log2(math.e)
    inner, scale = (call.scale / p.softcap, p.softcap * log2_e) if p.softcap else (1.0, call.scale * log2_e)
    arguments = {
        "q_desc": described(call.q, ROWS), "grad_out_desc": described(grad_out, ROWS),
        "k_desc": described(call.k, keys_of(flags.dim)), "v_desc": described(call.v, keys_of(flags.dim)),
        "rows_desc": FlatDescriptor(pieces["rows"].numpy(), ROWS),
        "dk_desc": described(dk, HALF), "dv_desc": described(dv, HALF),
        "clean_q_desc": clean[0], "clean_grad_out_desc": clean[1], "dq_sum_ptr": numbers("dq"),
        "dkv_sum_ptr": numbers("dkv"), "counters_ptr": numbers("counters"), "bounds_ptr": numbers("bounds"),
        "extents_ptr": numbers("extents"), "bias_ptr": bias_ptr, "bias_b": None, "bias_h": None,
        **{name: Value(x) for name, x in integers.items()}, "inner": Value(np.float32(inner)),
        "scale": Value(np.float32(scale)), "factor": Value(np.float32(call.scale)), "D": flags.dim,
        "KEYS": keys_of(flags.dim), "MASK": flags.mask, "SOFTCAP": flags.softcap, "SPLIT": flags.split,
        "BIASED": flags.biased, "ORDERED": flags.ordered,
    }  # fmt: skip
    model = Model("hopper_backward", BACKWARD_FILES)
    together = model.launch(bound._programs, rng, arguments, "backward_kernel", residents)
    assert flags.ordered == ordered
    if ordered:
        for tickets in together.added.values():
            assert tickets == sorted(set(tickets)), "not in order"  # type: ignore[type-var]
    found[1].copy_(torch.from_numpy(dk))
    found[2].copy_(torch.from_numpy(dv))
    bound._finish(launch._finish_tensors(pieces, *found), (call.scale,))
    if "s" not in p.grads:
        return *found, None
    assert call.sinks is not None
    of_sinks = torch.full_like(call.sinks, math.nan)
    bound._sum((pieces["sinks"], of_sinks))
    return *found, of_sinks
