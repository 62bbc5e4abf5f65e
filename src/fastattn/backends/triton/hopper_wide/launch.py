"""Which calls of wide heads the Hopper forward serves, which binary a call takes, and its launch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import ALIGNMENT, Output, RowNumbers
from ...scratch import scratch
from ..arguments import same_strides, score_factors
from ..binaries import store as binaries_store
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import Launch, flag_sets, prepare
from ..binaries.policy import mode
from ..decode.combination import combination
from ..hopper.arguments import FIRST, SECOND, THIRD, Arguments, Room
from ..hopper.limits import DTYPES, refusals, sides
from ..hopper.tensors import brought, fits, layout_of
from ..limits import sm_count
from ..representative import stand_in
from .binary import KEYS, ROWS, Flags
from .schedule import Grid, grid_of

_LOG2_E = math.log2(math.e)
_OUT, _LSE, _SINKS, _Q_LENGTHS, _KV_LENGTHS, _SCRATCH = range(6)  #: the kernel's pointers
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
HEAD_DIMS, VALUE_DIMS = range(8, 577, 8), range(8, 513, 8)
_USUAL = 132  #: multiprocessors of the GPUs that this is made for


def reasons(problem: Problem) -> list[str]:
    """Why the kernel cannot serve the problem. Empty: it can."""
    p, why = problem, refusals(problem)
    if p.mask != "none":
        why.append("takes wide heads (above 256) without tensor masks, Intervals and Segments")
    if not p.empty and (p.head_dim not in HEAD_DIMS or p.value_dim not in VALUE_DIMS):
        why.append(f"head dim {p.head_dim} with value dim {p.value_dim}: multiples of 8 up to 576 and up to 512")
    return why


def flags(p: Problem, split: bool, same: bool, sinks_dtype: torch.dtype | None = None) -> Flags:
    """Names the binary that serves the problem. split: programs share a tile's keys. same: the values are the keys'
    first columns."""
    return Flags(
        dtype=DTYPES[p.dtype],
        rest=p.head_dim > 512,
        same=same,
        band=p.banded,
        split=split,
        q_lengths=p.q_lengths,
        kv_lengths=p.kv_lengths,
        sinks=_FLOATS[sinks_dtype or p.dtype] if p.sinks and not split else "",
        softcap=p.softcap != 0,
        lse=(p.return_lse or bool(p.grads)) and not split,
    )


def _sms(p: Problem) -> int:
    return sm_count(p.index) if p.index >= 0 else _USUAL


def may_be_same(p: Problem) -> bool:
    """True when the values may be the keys' first columns, as in absorbed MLA."""
    return p.value_dim <= p.head_dim


def binaries(p: Problem) -> list[FlagSet]:
    """All that calls like this one need, with any batch and lengths: its own main kernel first."""
    same = p.kv_heads == 1 and p.value_dim < p.head_dim  # probably: see `decode.forward`
    own = grid_of(p, _sms(p), same).splits > 1
    found: list[FlagSet] = []
    for q_len in dict.fromkeys((p.q_len, 1)):
        other = replace(p, q_len=q_len)
        for split in (own, not own):
            found += [flags(other, split, kind) for kind in ((same, False) if same else (False,))]
    found += flag_sets([second(p, 2, torch.device("meta"))])
    return list(dict.fromkeys(found))


def second(p: Problem, splits: int, device: torch.device) -> Launch:
    """The kernel that combines the splits, and tensors that stand for those of a call."""
    out, numbers = stand_in(p.dtype), stand_in(torch.float32)
    lse = numbers if p.return_lse or p.grads else None
    return combination(p, splits, device), (numbers, out, lse, out if p.sinks else None), ()


def bind(problem: Problem, call: Call) -> Kernel:
    """See `Backend.bind`."""
    if may_be_same(problem) and same_strides(call.k, call.v):
        return _ValuesInKeys(problem, call)
    return _Kernel(problem, call, False)


class _Kernel(ForwardOnly):
    __slots__ = ("forward",)

    def __init__(self, problem: Problem, call: Call, same: bool) -> None:
        self.forward = Forward(problem, call, same)


class _ValuesInKeys(ForwardOnly):
    """Calls whose values may be the keys' first columns: they are where both begin at one address. Then each key is
    read once. That is data: the next call may be another."""

    __slots__ = ("_kinds", "_problem")

    def __init__(self, problem: Problem, call: Call) -> None:
        self._problem = problem
        self._kinds: dict[bool, Forward] = {}
        self._kind(call)

    def _kind(self, call: Call) -> Forward:
        same = call.k.data_ptr() == call.v.data_ptr()
        found = self._kinds.get(same)
        if found is None:
            found = self._kinds[same] = Forward(self._problem, call, same)
        return found

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._kind(call)(call)


class Forward:
    """The kernel bound to calls of one kind: see `backends.base.Backend.bind`. same: of calls whose v is k's first
    columns."""

    __slots__ = (
        *("_arguments", "_combine", "_copies", "_device", "_flags", "_function", "_layouts", "_local", "_lse"),
        *("_of_copies", "_output", "_problem", "_programs", "_scratch", "_where", "grid"),
    )

    def __init__(self, problem: Problem, call: Call, same: bool) -> None:
        p = self._problem = problem
        self._where, self._device = call.q.device, call.q.device.index
        self.grid: Grid = grid_of(p, _sms(p), same)
        splits = self.grid.splits
        self._flags = flags(p, splits > 1, same, None if call.sinks is None else call.sinks.dtype)
        self._combine: Any = None
        wants_lse = p.return_lse or bool(p.grads)
        if splits > 1:
            launcher, (parts, out, lse, _), floats = second(p, splits, self._where)
            self._combine = launcher
            if mode() == "background":  # side by side with the second one
                binaries_store.shared.ask(self._flags, self._device)
            prepare([(launcher, (parts, out, lse, call.sinks), floats)])
        self._function = binaries_store.shared.function(self._flags, self._device)
        self._programs = min(self.grid.items, _sms(p))
        self._scratch = 4 * p.batch * p.q_heads * p.q_len * splits * (p.value_dim + 2) if splits > 1 else 0  #: bytes
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if wants_lse else None
        self._arguments = arguments(self._flags, integers(p, self.grid))
        self._local = threading.local()
        self._copies = not all([fits(x) for x in (call.q, call.k, call.v)])
        self._of_copies: dict[Any, Forward] = {}
        self._layouts = layouts(p, call, self.grid)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self._device != torch_internals.current_device():
            with torch.cuda.device(self._device):
                return self(call)
        q, k, v = call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()
        if self._copies or (q | k | v) % ALIGNMENT:
            return self._copied(call)
        room: Room = self._local.__dict__.get("room") or self._room()
        pointers = room.pointers
        out, lse, parts = self._output.here(), None, None
        pointers[_OUT] = out.data_ptr()
        if self._lse is not None:
            lse = self._lse.here()
            pointers[_LSE] = lse.data_ptr()
        if self._scratch:
            parts = scratch(self._where, self._scratch)
            pointers[_SCRATCH] = parts.data_ptr()
        held: list[Any] = []  # what has to live until the launch
        for i, x in enumerate((call.sinks, call.q_lengths, call.kv_lengths), _SINKS):
            if x is not None:
                x = x.contiguous()
                held.append(x)
                pointers[i] = x.data_ptr()
        maps = room.maps
        maps[FIRST], maps[SECOND], maps[THIRD] = q, k, v
        if call.scale != room.scale:
            self._put_scale(call.scale, room)
        room.launch(torch_internals.raw_stream(self._device))
        if parts is not None:
            sinks = None if call.sinks is None else held[0]
            self._combine((parts.view(torch.float32), out, lse, sinks))
        del held
        return out, lse

    def _room(self) -> Room:
        """This thread's."""
        parts = 1 + self._flags.rest  # of a head dim
        uses = [0] * parts + [1] * parts + [2] * (not self._flags.same)
        found = self._arguments.room(self._function, self._programs, self._device, self._layouts, uses)
        self._local.__dict__["room"] = found
        return found

    def _put_scale(self, scale: float, room: Room) -> None:
        room.put(*scales(self._problem, scale))
        room.scale = scale  # once it is there

    def _copied(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The same for inputs that the copy engine cannot read where they are."""
        same = self._flags.same
        k = brought(call.k)
        v = k[..., : call.v.shape[3]] if same else brought(call.v)
        call = call._replace(q=brought(call.q), k=k, v=v)
        strides = call.q.stride(), call.k.stride(), call.v.stride()
        found = self._of_copies.get(strides)
        if found is None:
            found = self._of_copies[strides] = Forward(self._problem, call, same)
        return found(call)


def scales(p: Problem, scale: float) -> tuple[float, float]:
    """What scores are multiplied by before the softcap's tanh, and after it."""
    inner, outer = score_factors(scale, p.softcap)
    return inner, outer * _LOG2_E


def layouts(p: Problem, call: Call, grid: Grid) -> tuple[Any, Any, Any]:
    """Of q, k and v, as the copy engine reads them."""
    kind = DTYPES[p.dtype]
    of_q = layout_of(call.q, kind, grid.queries, together=ROWS // grid.queries)
    of_k, of_v = [layout_of(x, kind, KEYS) for x in (call.k, call.v)]
    return of_q, of_k, of_v


def integers(p: Problem, grid: Grid) -> tuple[int, ...]:
    """The kernel's, in order."""
    return (
        p.batch, p.kv_heads, p.group, p.q_len, p.kv_len, *sides(p), grid.rows, grid.queries, grid.blocks, grid.splits,
        p.value_dim // 8,
    )  # fmt: skip


def arguments(flags: Flags, integers: tuple[int, ...]) -> Arguments:
    """What the binary is launched with."""
    described = 2 + 2 * flags.rest + (not flags.same)
    present: Sequence[bool] = (
        True, flags.lse, bool(flags.sinks), flags.q_lengths, flags.kv_lengths, flags.split,
    )  # fmt: skip
    return Arguments((4,) * described, present, integers, floats=2)
