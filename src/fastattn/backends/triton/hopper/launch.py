"""Which calls the Hopper forward serves, which binary a call takes, and its launch."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import Call, Problem
from ...layout import ALIGNMENT, Output, RowNumbers
from ...scratch import scratch
from ..arguments import score_factors
from ..binaries import store as binaries
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import flag_sets, prepare
from ..bounds import Bounds
from ..cuda_driver import MAP_WORDS, Function
from ..limits import sm_count
from ..prefill.launch_config import LISTED_KEYS
from ..prefill.lists import Lists
from ..program import Program
from ..representative import representative
from .arguments import FIRST, FOURTH, SECOND, THIRD, Arguments, Room
from .binary import (
    ALIGNED,
    BAND,
    BLOCKS,
    FULL,
    INTERVALS,
    ROWS,
    SEGMENTS,
    SHORT,
    SHORT_BLOCKS,
    TILE,
    Flags,
)
from .limits import DTYPES, refusals, sides
from .segments import LEAST_QUERIES, MOST_ROWS, MOST_SEGMENTS, SegmentTiles, pays
from .tensors import Layout, brought, brought_mask, fits, layout_of, once, tiles_layout

_LOG2_E = math.log2(math.e)
_OUT, _LSE, _SINKS, _Q_LENGTHS, _KV_LENGTHS, _BOUNDS, _BIAS = range(7)  #: the kernel's pointers
_L2 = 24 << 20  #: bytes of keys and values that programs work on at a time without a band: half of an H100's L2 cache
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_BIASES = {torch.float32: "fp32", **DTYPES}


def reasons(problem: Problem) -> list[str]:
    """Why the kernel cannot serve the problem. Empty: it can."""
    p, why = problem, refusals(problem)
    if p.masked_rows and p.mask == "additive" and p.mask_dtype not in _BIASES:
        why.append(f"has no {str(p.mask_dtype).removeprefix('torch.')} mask with a row for each query")
    if p.masked_rows and p.kv_lengths:
        why.append("has no lengths of keys beside a mask with a row for each query")
    if p.mask == "segments" and p.batch * p.q_len > MOST_ROWS:
        why.append(f"takes up to {MOST_ROWS} queries of all batch entries beside Segments")
    if not p.empty and dims(p) is None:
        why.append(f"head dim {p.head_dim} with value dim {p.value_dim}: both must be multiples of 8 up to 256")
    return why


def dims(p: Problem) -> tuple[int, int] | None:
    """The key of `BLOCKS` whose dims hold the problem's, or None."""
    if p.head_dim % 8 or p.value_dim % 8:
        return None
    fitting = [(d, dv) for d, dv in BLOCKS if p.head_dim <= d and p.value_dim <= dv]
    return min(fitting, default=None)


def flags(p: Problem, sinks_dtype: torch.dtype | None = None) -> Flags:
    """Names the binary that serves the problem."""
    lengths = p.q_lengths or p.kv_lengths
    rows = p.masked_rows
    short = p.kv_len <= SHORT
    if p.mask == "segments" and pays(p):
        mask = SEGMENTS
        # Or of a segment, where the tensor is full of them; twice as many as the mean: some are longer.
        short = short or 2 * p.batch * p.kv_len <= SHORT * p.mask_shape[1]
    elif p.mask != "none" and not rows:
        mask = INTERVALS
    elif not p.banded:
        mask = FULL
    elif p.causal and p.left < 0 and not rows and p.q_len == p.kv_len and not lengths:
        mask = ALIGNED
    else:
        mask = BAND
    found = dims(p)
    assert found is not None
    return Flags(
        dtype=DTYPES[p.dtype],
        dims=found,
        mask=mask,
        keys=p.masked_keys,
        tiles="" if not rows else "bool" if p.mask == "bool" else _BIASES[p.mask_dtype or p.dtype],
        listed=rows and p.kv_len >= LISTED_KEYS,
        q_lengths=p.q_lengths and mask != INTERVALS,  # there they are in the bounds, as all else
        kv_lengths=p.kv_lengths and mask != INTERVALS,
        sinks=_FLOATS[sinks_dtype or p.dtype] if p.sinks else "",
        softcap=p.softcap != 0,
        lse=p.return_lse or bool(p.grads),
        short=short and not rows and found in SHORT_BLOCKS,
    )


def all_flags(p: Problem) -> list[Flags]:
    """The binaries of the problem and of problems that differ from it in lengths alone: its own first."""
    own = flags(p)
    lengths = [(p.q_len, p.kv_len), (1, SHORT), (SHORT, SHORT), (1, SHORT + 1), (SHORT + 1, SHORT + 1)]
    if p.masked_rows:
        lengths[1:] = [(2, LISTED_KEYS - 1), (2, LISTED_KEYS)]
    if p.mask == "segments" and p.mask_shape[1] <= MOST_SEGMENTS:  # long ones, however many there are: see `flags`
        many = LEAST_QUERIES * (p.mask_shape[1] + 1)
        lengths += [(many, SHORT), (many, SHORT * (p.mask_shape[1] + 1))]
    return list(dict.fromkeys([own, *(flags(replace(p, q_len=q, kv_len=kv)) for q, kv in lengths)]))


def binaries_of(p: Problem) -> list[FlagSet]:
    """All that calls like this one need, its own main kernel first."""
    own, call = flags(p), representative(p)
    kinds = all_flags(p)
    found: list[FlagSet] = [*kinds]
    masks = {x.mask for x in kinds}
    if INTERVALS in masks:
        found += flag_sets(Bounds(p, call, TILE, ordered=True).launches(call))
    if SEGMENTS in masks:
        found += flag_sets(SegmentTiles(p, call, TILE, sides(p)).launches(call))
    if own.tiles:
        found += flag_sets(_lists_of(p, call, own).launches(call))
    return list(dict.fromkeys(found))


def _lists_of(p: Problem, call: Call, flags: Flags) -> Lists:
    """Of the blocks that a mask with rows leaves."""
    mask = once(call.mask)
    entries = replace(p, mask_shape=tuple(mask.shape))
    return Lists(entries, call._replace(mask=mask), TILE, flags.blocks.keys)


def function(name: Flags, device: int | None = None) -> Function:
    """The binary of that name, ready to be launched: see `Binaries.function`, also for what it raises."""
    return binaries.shared.function(name, device)


def arguments(flags: Flags, integers: tuple[int, ...]) -> Arguments:
    """What the binary is launched with."""
    described = 3 + flags.blocks.staged + bool(flags.tiles)
    present = True, flags.lse, bool(flags.sinks), flags.q_lengths, flags.kv_lengths, flags.prepared, flags.keys
    return Arguments((4,) * described, present, integers, floats=2)


class Forward:
    """The kernel bound to calls of one kind: see `backends.base.Backend.bind`. Strides of a mask with rows are
    `tiles_readable`."""

    __slots__ = (
        "_arguments", "_blocks", "_bounds", "_copies", "_device", "_flags", "_function", "_layouts", "_lists", "_local",
        "_lse", "_mask_at", "_of_copies", "_output", "_problem", "_programs", "_reads_more", "_where",
    )  # fmt: skip

    def __init__(self, problem: Problem, call: Call) -> None:
        p = self._problem = problem
        self._flags = flags(p, None if call.sinks is None else call.sinks.dtype)
        blocks = self._blocks = self._flags.blocks
        self._function = function(self._flags, call.q.device.index)
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if self._flags.lse else None
        self._where = call.q.device
        self._device = call.q.device.index
        rows = -(-p.q_len // TILE)
        heads = p.batch * p.q_heads
        section = heads
        if self._flags.mask == FULL:
            bytes_of_a_head = p.kv_len * (p.head_dim + p.value_dim) * 2
            section = min(heads, max(1, _L2 // bytes_of_a_head) * p.group)
        self._bounds: Any = None
        bias_strides: tuple[int, ...] = (0, 0)
        if self._flags.mask == INTERVALS:
            self._bounds = Bounds(p, call, TILE, ordered=True)
            prepare(self._bounds.launches(call))
            if self._bounds.keys is not None:
                bias_strides = self._bounds.keys.strides
        if self._flags.mask == SEGMENTS:
            self._bounds = SegmentTiles(p, call, TILE, sides(p))
            prepare(self._bounds.launches(call))
            rows = self._bounds.tiles
        self._lists: Any = None
        list_strides: tuple[int, ...] = (0, 0, 0)
        if self._flags.tiles:
            mask_once = once(call.mask)
            bias_strides = tuple([int(size > 1) for size in mask_once.shape[:2]])
        if self._flags.listed:
            self._lists = _lists_of(p, call, self._flags)
            prepare(self._lists.launches(call))
            list_strides = self._lists.strides
            section = heads  # as with a band: the longest tiles first
        tiles = rows * (p.q_heads if self._flags.mask == SEGMENTS else heads)
        self._programs = min(tiles, sm_count(self._device))
        integers = (
            p.batch, p.q_heads, p.group, p.q_len, p.kv_len, *sides(p), rows, section, p.value_dim // 8, *bias_strides,
            *list_strides,
        )  # fmt: skip
        self._arguments = arguments(self._flags, integers)
        self._local = threading.local()
        self._copies = not all([fits(x) for x in (call.q, call.k, call.v)])
        self._of_copies: dict[Any, Forward] = {}
        keys = blocks.keys
        boxes = (call.q, ROWS), (call.k, keys), (call.v, keys)
        layouts = [layout_of(x, self._flags.dtype, n) for x, n in boxes]
        if blocks.staged:
            layouts.append(Layout(self._output.shape, self._output.strides, self._flags.dtype, ROWS))
        self._mask_at = MAP_WORDS * len(layouts)
        if self._flags.tiles:
            layouts.append(tiles_layout(call.mask, self._flags))
        self._layouts = tuple(layouts)  #: of q, k, v, a staged output, a mask with rows
        #: Whether the kernel reads anything besides q, k and v.
        self._reads_more = bool(
            self._bounds or self._flags.tiles or p.sinks or self._flags.q_lengths or self._flags.kv_lengths
        )

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self._device != torch_internals.current_device():
            with torch.cuda.device(self._device):
                return self(call)
        q, k, v = call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()
        if self._copies or (q | k | v) % ALIGNMENT:
            return self._copied(call)
        room: Room = self._local.__dict__.get("room") or self._room()
        maps, pointers = room.maps, room.pointers
        out, lse = self._output.here(), None
        out_at = pointers[_OUT] = out.data_ptr()
        if self._lse is not None:
            lse = self._lse.here()
            pointers[_LSE] = lse.data_ptr()
        maps[FIRST], maps[SECOND], maps[THIRD] = q, k, v
        if self._blocks.staged:
            maps[FOURTH] = out_at
        held = self._put_more(call, room) if self._reads_more else None
        scale = call.scale
        if scale != room.scale:
            self._put_scale(scale, room)
        room.launch(torch_internals.raw_stream(self._device))
        del held
        return out, lse

    def _room(self) -> Room:
        """This thread's."""
        found = self._arguments.room(self._function, self._programs, self._device, self._layouts)
        self._local.__dict__["room"] = found
        return found

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`."""
        given = {name: getattr(call, name) for name in ("sinks", "q_lengths", "kv_lengths")}
        present = [name for name, x in given.items() if x is not None]
        if self._copies or not all([given[name].is_contiguous() for name in present]):
            return None
        before = self._lists or self._bounds
        mapped = {"q": FIRST, "k": SECOND, "v": THIRD, **({"mask": self._mask_at} if self._flags.tiles else {})}
        program = Program.of_forward(self._output, self._lse, before.size if before else 0, aligned=mapped)
        if before and not before.add_to(program, call):
            return None
        room = self._arguments.room(self._function, self._programs, self._device, self._layouts)
        self._put_scale(call.scale, room)
        if self._blocks.staged:
            mapped["out"] = FOURTH
        for name, word in mapped.items():
            program.write(room.maps, word, name)
        for i, name in enumerate(("out", "lse", "sinks", "q_lengths", "kv_lengths")):
            if name in program.made or name in present:
                program.write(room.pointers, i, name)
        if before:
            program.write(room.pointers, _BOUNDS, "memory")
        if self._bounds is not None and self._bounds.keys is not None:
            program.write(room.pointers, _BIAS, "memory", 4 * self._bounds.keys.bias_at)
        program.launches.append(room.launch)
        return program

    def _put_scale(self, scale: float, room: Room) -> None:
        """scale: > 0, see `validation`."""
        p = self._problem
        inner, outer = score_factors(scale, p.softcap)
        if not (self._flags.tiles and p.mask == "additive"):  # see `masking.with_tile`
            outer *= _LOG2_E
        room.put(inner, outer)
        room.scale = scale

    def _put_more(self, call: Call, room: Room) -> list[Any]:
        """Writes the addresses of what the kernel reads besides q, k and v, which is made where it is ours. Returns
        what has to live until the launch."""
        held: list[Any] = []
        pointers, bounds = room.pointers, self._bounds
        for i, x in enumerate((call.sinks, call.q_lengths, call.kv_lengths), _SINKS):
            if x is not None:
                x = x.contiguous()
                held.append(x)
                pointers[i] = x.data_ptr()
        if self._flags.tiles:
            held.append(brought_mask(call.mask))
            room.maps[self._mask_at] = held[-1].data_ptr()
        if self._lists is not None:
            lists = self._lists(call, scratch(self._where, self._lists.size))
            held.append(lists)
            pointers[_BOUNDS] = lists.data_ptr()
        elif bounds is not None:
            memory = scratch(self._where, bounds.size)
            held.append(memory)
            bounds(call, memory)
            address = pointers[_BOUNDS] = memory.data_ptr()
            if bounds.keys is not None:
                pointers[_BIAS] = address + 4 * bounds.keys.bias_at
        return held

    def _copied(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The same for inputs that the copy engine cannot read where they are."""
        call = call._replace(q=brought(call.q), k=brought(call.k), v=brought(call.v))
        strides = call.q.stride(), call.k.stride(), call.v.stride()
        found = self._of_copies.get(strides)
        if found is None:
            found = self._of_copies[strides] = Forward(self._problem, call)
        return found(call)
