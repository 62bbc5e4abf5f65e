"""The decode kernel bound to one kind of call: what is launched, and what has to be copied for it to be read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import CALL, Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import ALIGNMENT, Output, RowNumbers, aligned
from ...scratch import counted, may_keep, scratch
from ..arguments import band, broadcast_strides, same_strides, strides_in_units
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import BinaryLauncher, Room, flag_sets, launcher_of, launches_binary, prepare, rooms_of
from ..binaries.launcher import Launch as Prepared
from ..binaries.triton_kernel import NamedKernel
from ..binding import TILE, WithCopies, WithSegments, readable, tf32_is_allowed, with_intervals
from ..bounds import Bounds
from ..launcher import Launcher
from ..limits import shared_memory, sm_count
from ..program import Program, named
from ..representative import representative, stand_in
from .chunks import is_chunk
from .combination import combination
from .counting import combines, counts, steps
from .family import family
from .launch_config import Launch, choose, may_be_same
from .shapes import MAX_ROWS, gaps, is_wide, rows

_ATTEND = NamedKernel(f"{__package__}.kernel", "attend_kernel")
#: Tensors, the first ones, whose alignment changes its code. Of masks and lengths it does not: their strides are
#: arguments. So a slice of lengths takes the same binary.
_ATTEND_ALIGNED = 7
_OUT, _LSE = 3, 4  #: of the first kernel's pointers
_MASKING = "mask", "lo", "hi", "sinks", "q_lengths", "kv_lengths"  #: of a call, in the order of its arguments


def bind(problem: Problem, call: Call) -> Kernel:
    """See `Backend.bind`."""
    if call.segments is not None:
        return WithSegments(problem, call, bind)
    found, p = readable(problem, call)
    if found is call and may_be_same(p) and same_strides(call.k, call.v):
        return _ValuesInKeys(p, call)
    kernel = DecodeKernel(p, found, _launch(p if found is call else problem))
    prepare(kernel.launches(found))
    return kernel if found is call else WithCopies(problem, kernel)


def _launch(p: Problem, same: bool = False) -> Launch:
    return choose(p, sm_count(p.index), shared_memory(p.index), same)


def binaries(problem: Problem) -> list[FlagSet]:
    """See `Compiled.binaries`: of calls with any batch, any number of keys, and any of queries that this kernel
    takes."""
    found: dict[FlagSet, None] = {}
    before: list[Prepared] = []
    if problem.mask == "segments":
        call = representative(problem)
        before = Bounds(problem, call, TILE).launches(call)
    seen = set()
    for other in family(problem, sm_count(problem.index)):
        p = with_intervals(other) if other.mask == "segments" else other
        for same in (False, True) if _in_keys(p) else (False,):
            chosen = _launch(p, same)
            # Of chunks, larger batches take one split, smaller ones more.
            for splits in dict.fromkeys((min(chosen.splits, 2), 1, 2)) if is_chunk(p) else (min(chosen.splits, 2),):
                launch = replace(chosen, splits=splits)
                looked_at = launch, gaps(p), same
                if looked_at not in seen:
                    seen.add(looked_at)
                    call = representative(p)
                    found |= dict.fromkeys(flag_sets(DecodeKernel(p, call, launch, same).launches(call)))
    return list(found | dict.fromkeys(flag_sets(before)))


def _in_keys(p: Problem) -> bool:
    """True when the values are probably the keys' first columns: absorbed MLA. (They are so, or not, by their
    addresses; where nobody expects it their binary is compiled when the first such call comes.)"""
    return p.kv_heads == 1 and p.value_dim < p.head_dim and may_be_same(p)


class _ValuesInKeys(ForwardOnly):
    """Calls whose values may be the keys' first columns (absorbed MLA: one buffer holds both). They are where both
    begin at one address: then each key is read once. That is data: the next call may be another."""

    __slots__ = ("_apart", "_same")

    def __init__(self, p: Problem, call: Call) -> None:
        self._apart = DecodeKernel(p, call, _launch(p))
        self._same = DecodeKernel(p, call, _launch(p, same=True), same=True)
        first = self._same if call.k.data_ptr() == call.v.data_ptr() else self._apart
        prepare(first.launches(call))

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if call.k.data_ptr() == call.v.data_ptr():
            return self._same.forward(call)
        return self._apart.forward(call)

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`: of values that lie apart."""
        if call.k.data_ptr() == call.v.data_ptr():
            return None
        program = self._apart.program(call)
        if program is not None:
            program.apart = True
        return program


@dataclass(slots=True)
class _Launches:
    """One thread's arguments of a call's launches."""

    attend: Room
    combine: Room | None  #: the second one, if there is one
    alone: Room | None  #: of the one that is all, if there is one


class _Rooms(threading.local):
    """One thread's, by the precision of products."""

    def __init__(self) -> None:
        self.of: dict[str, _Launches] = {}


class DecodeKernel(ForwardOnly):
    """One kernel or two, bound to one problem and one set of strides. same: of calls whose v is k's first columns."""

    __slots__ = (
        *("_alone", "_attend", "_binary", "_combine", "_combines", "_device", "_fields", "_lse", "_output"),
        *("_precision", "_problem", "_rooms", "_scratch", "_scratch_at", "_softcap", "_tiles", "_where", "same"),
    )

    def __init__(self, p: Problem, call: Call, launch: Launch, same: bool = False) -> None:
        self._problem, self.same = p, same
        device, tiles, count = call.q.device, p.batch * p.kv_heads, rows(p)
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if p.return_lse else None
        self._softcap = p.softcap or None
        large = _is_large(p, launch)
        integers = _integers(p, call)
        blocks = -(-count // launch.block_m)
        grid = (tiles * blocks, launch.splits, 1) if launch.near else (tiles, launch.splits, blocks)

        def attending(read_at_once: tuple[int, int, int]) -> dict[str, BinaryLauncher | Launcher]:
            """By the precision of products. read_at_once: by the last program of a tile; zeros: it does not combine."""
            constants = (*_constants(p, launch, call, large, same), *read_at_once)
            options = {"launch_pdl": True} if launch.meanwhile else {}
            return {
                precision: launcher_of(
                    _ATTEND,
                    grid,
                    device,
                    p.capability,
                    integers,
                    (*constants, precision),
                    _ATTEND_ALIGNED,
                    num_warps=launch.warps,
                    num_stages=launch.stages,
                    **options,
                )
                for precision in (("ieee", "tf32") if p.dtype == torch.float32 else ("ieee",))
            }

        self._attend = attending((0, 0, 0))
        #: Other binaries, which combine too: what that takes in registers is not to slow the first ones. Empty: none.
        self._alone = attending(steps(p)) if counts(p, launch, large) else {}
        self._combines = bool(self._alone) and combines(p, launch)
        self._tiles = tiles
        self._scratch = 4 * tiles * launch.splits * count * (p.value_dim + 2) if launch.splits > 1 else 0  #: bytes
        self._combine = combination(p, launch.splits, device, launch.columns)
        self._where = device
        attend = next(iter(self._attend.values()))
        #: Whether the kernels are launched by their binaries, and on which GPU.
        self._binary = launches_binary(attend)
        self._device = attend.device if isinstance(attend, BinaryLauncher) else None
        self._precision = None if p.dtype == torch.float32 else "ieee"  #: None: as torch is set when it is called
        self._rooms = _Rooms()
        #: The first kernel's pointers: q, k, v, out, the log-sum-exp if there is one, scratch if it is needed, counters
        #: where it is alone; of what masks all that there is, with its place in a call (alone it is one further on).
        self._scratch_at = 4 + p.return_lse
        given = [CALL.names.index(name) for name in _MASKING if getattr(call, name) is not None]
        self._fields = list(enumerate(given, self._scratch_at + bool(self._scratch)))

    def launches(self, call: Call) -> list[Prepared]:
        """What calls launch, the kernel first: that of captured calls, then that of others, where it combines too."""
        first, *second = self._stand_ins(call, None)
        return [first, *(self._stand_ins(call, stand_in(torch.int32)) if self._alone else []), *second]

    def _stand_ins(self, call: Call, counters: Tensor | None) -> list[Prepared]:
        """`_in_order`, where nothing is made for the launches."""
        lse, parts = (stand_in(torch.float32) if x else None for x in (self._lse, self._scratch))
        return self._in_order(call, stand_in(self._output.dtype), lse, parts, counters)

    def _in_order(self, call: Call, out: Any, lse: Any, parts: Any, counters: Any) -> list[Prepared]:
        """The launches of a call: the kernel that combines too where there are counters. Takes `Named` in the place of
        tensors, too."""
        attend = (self._attend if counters is None else self._alone)[_precision(self._problem.dtype)]
        tensors = call.q, call.k, call.v, out, lse, parts, counters, *_masking(call)
        found: list[Prepared] = [(attend, tensors, (call.scale, self._softcap))]
        combines = parts is not None and counters is None
        return [*found, (self._combine, (parts, out, lse, call.sinks), ())] if combines else found

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        launches = self._rooms.of.get(self._precision or _precision(torch.float32))
        q, k, v = call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()
        if launches is None or (q | k | v) % ALIGNMENT or self._device != torch_internals.current_device():
            return self._forward_anew(call)
        attend, combine = launches.attend, launches.combine
        stream = torch_internals.raw_stream(self._device)
        out, lse = self._output.here(), None
        further = 0
        if combine is not None:
            alone, at = launches.alone, self._scratch_at
            if alone is not None and (held := counted(self._where, self._scratch, self._tiles, stream)) is not None:
                attend, combine, further, (memory, counters) = alone, None, 1, held
                attend.values[at + 1] = counters.data_ptr()
            else:
                memory = scratch(self._where, self._scratch, stream)  # held until the launch
            attend.values[at] = memory.data_ptr()
        values = attend.values
        if self._lse is not None:
            lse = self._lse.here()
            values[_LSE] = lse.data_ptr()
        values[0], values[1], values[2], values[3] = q, k, v, out.data_ptr()
        for i, field in self._fields:
            values[i + further] = call[field].data_ptr()  # type: ignore[union-attr]
        if call.scale != attend.floats[0]:
            attend.put((call.scale, self._softcap))
        attend.launch(stream)
        if combine is not None:
            combine.launch(stream)
        return out, lse

    def _forward_anew(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """`forward`: for tensors of any alignment, on whichever device is the current one, in Triton's interpreter, and
        where this thread has not launched the kernels before."""
        if self._binary and self._device != torch_internals.current_device():
            with torch.cuda.device(self._device):
                return self.forward(call)
        out, lse = self._output(), None if self._lse is None else self._lse()
        parts, counters = None, None
        if self._scratch:
            stream = self._stream()
            if self._combines and (held := counted(self._where, self._scratch, self._tiles, stream)) is not None:
                memory, counters = held
            else:
                memory = scratch(self._where, self._scratch, stream)
            parts = memory.view(torch.float32)
        launches = self._in_order(call, out, lse, parts, counters)
        for launcher, tensors, floats in launches:
            launcher(tensors, floats)
        _, tensors, floats = launches[0]
        if self._binary and aligned(*[x for x in tensors[:_ATTEND_ALIGNED] if x is not None]):
            precision = _precision(self._problem.dtype)
            self._rooms.of[precision] = self._made(precision, tensors, floats)
        return out, lse

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`."""
        if self._precision is None or not self._binary or not aligned(call.q, call.k, call.v):
            return None  # (no precision: torch may be told to use TF32)
        program = Program.of_forward(self._output, self._lse, self._scratch, aligned=("q", "k", "v"))
        # Numbers to count with stay allocated, which what belongs to a graph must not.
        if self._combines and may_keep(self._stream()):
            program.counters = torch.zeros(self._tiles, dtype=torch.int32, device=self._where)
        rooms = rooms_of(self._stand_ins(call, program.counters))
        assert rooms is not None
        out, lse, memory = [program.own(name) for name in ("out", "lse", "memory")]
        program.add_all(rooms, self._in_order(named(call), out, lse, memory, program.counters))
        return program

    def _stream(self) -> int:
        return 0 if self._device is None else torch_internals.raw_stream(self._device)

    def _made(self, precision: str, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...]) -> _Launches:
        """This thread's, for tensors that begin where 16 bytes do, as these. The second kernel finds its pointers where
        the first one's are: a call writes them once."""
        attend, combine = self._attend[precision], self._combine
        assert isinstance(attend, BinaryLauncher) and isinstance(combine, BinaryLauncher)
        before, masking = tensors[:6], tensors[7:]
        first = attend.room((*before, None, *masking), floats)
        if not self._scratch:
            return _Launches(first, None, None)
        _, _, _, out, lse, parts = before
        sinks = masking[_MASKING.index("sinks")]
        second = combine.room((parts, out, lse, sinks))
        places = [self._scratch_at, _OUT, *([] if lse is None else [_LSE])]
        if sinks is not None:
            places += [i for i, field in self._fields if CALL.names[field] == "sinks"]
        for i, place in enumerate(places):
            second.share(i, first, place)
        alone = None
        if self._combines:
            launcher = self._alone[precision]
            assert isinstance(launcher, BinaryLauncher)
            alone = launcher.room((*before, stand_in(torch.int32), *masking), floats)
        return _Launches(first, second, alone)


def _masking(call: Call) -> tuple[Tensor | None, ...]:
    """What masks, as `_MASKING` names it."""
    return call.mask, call.lo, call.hi, call.sinks, call.q_lengths, call.kv_lengths


def _integers(p: Problem, call: Call) -> tuple[int, ...]:
    """The kernel's."""
    _, strides = strides_in_units(call)
    return *strides, *broadcast_strides(call.mask, 4), *broadcast_strides(call.lo, 2), p.q_len, p.kv_len, *band(p)


def _constants(p: Problem, launch: Launch, call: Call, large: bool, same: bool) -> tuple[int, ...]:
    """The kernel's, but for those of the combination."""
    unit, _ = strides_in_units(call)
    blocks = (launch.block_m, launch.block_n, *launch.head, *launch.value)
    how = launch.near, large, same, launch.meanwhile
    return p.kv_heads, p.group, p.head_dim, p.value_dim, *blocks, unit, gaps(p), *how


def _is_large(p: Problem, launch: Launch) -> bool:
    """Whether tiles are so large that what a step computes counts as much as what it reads: those of wide heads, of 128
    rows, and of 64 for Hopper's products."""
    asynchronous = p.capability[0] == 9 and p.dtype.itemsize == 2
    return is_wide(p) or launch.block_m > MAX_ROWS or (launch.block_m == MAX_ROWS and asynchronous)


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user let torch's own use TF32. Other dtypes have only one way."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() else "ieee"
