"""What a call of the Hopper backward does, once it is bound: see `launch.py`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import Call, Gradients, Problem
from ...layout import ALIGNMENT, Fresh, readable, realigned
from ...scratch import Pieces, scratch
from ..arguments import score_factors
from ..bounds import Bounds
from ..cuda_driver import MAP_WORDS
from ..hopper.tensors import brought, fits
from ..program import Program
from .room import Room

_LOG2_E = math.log2(math.e)
#: The main kernel's tensors that have maps, in order; the last two with bounds alone.
MAPPED = "q", "grad_out", "k", "v", "rows", "dk", "dv", "clean_q", "clean_grad_out"
#: Where a call writes the addresses of its own: see `Room.maps`.
_Q, _GRAD_OUT, _K, _V, _DK, _DV = [MAP_WORDS * MAPPED.index(x) for x in ("q", "grad_out", "k", "v", "dk", "dv")]

#: Of a call, output, log-sum-exp, and gradients of these two.
Backward = Callable[[Call, Tensor, Tensor, Tensor, Tensor | None], Gradients]


def _address(x: Tensor) -> int:
    """Where a log-sum-exp's gradient lies; no multiple of 16 where a copy is to be read, whose strides are others."""
    return x.data_ptr() if x.dtype is torch.float32 else 1


def _lie_well(out: Tensor, lse: Tensor, grad_out: Tensor) -> bool:
    """Whether the kernels can read them where they are."""
    return readable(out) is out and realigned(lse) is lse and brought(grad_out) is grad_out


class _Rooms(threading.local):
    """One thread's, by the strides of what the backward is given."""

    def __init__(self) -> None:
        self.by_strides: dict[Any, Room] = {}


class Run:
    """The kernels for calls of one kind. Strides of the output, the log-sum-exp and their gradients may differ from
    call to call."""

    __slots__ = (
        "_bounds", "_copies", "_device", "_grads", "_make_room", "_memory", "_of_copies", "_of_sinks", "_problem",
        "_rooms", "_where", "_with_inputs",
    )  # fmt: skip

    def __init__(
        self,
        problem: Problem,
        call: Call,
        grads: Sequence[Fresh],
        of_sinks: Fresh | None,
        memory: Pieces,
        bounds: Bounds | None,
        make_room: Callable[[Call, Tensor, Tensor, Tensor, Tensor | None], Room],
        with_inputs: Callable[[Call], Backward],
    ) -> None:
        """grads: what makes those of q, k and v. of_sinks: what makes that of sinks, if they have one. memory: what one
        call's holds. make_room: for tensors that lie as these, in this thread. with_inputs: the backward of calls whose
        q, k and v lie as those of this one."""
        self._problem, self._memory, self._bounds = problem, memory, bounds
        self._make_room, self._with_inputs = make_room, with_inputs
        self._where, self._device = call.q.device, call.q.device.index
        inputs = call.q, call.k, call.v
        self._copies = not all([fits(x) for x in inputs])
        self._of_copies: dict[Any, Backward] = {}
        self._rooms = _Rooms()
        self._grads, self._of_sinks = grads, of_sinks

    def __call__(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """See `backends.base.Kernel.backward`."""
        if self._device != torch_internals.current_device():
            with torch.cuda.device(self._device):
                return self(call, out, lse, grad_out, grad_lse)
        q, k, v = call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()
        o, r, g = out.data_ptr(), lse.data_ptr(), grad_out.data_ptr()
        d, of_lse = 0, None
        if grad_lse is not None:
            d, of_lse = _address(grad_lse), grad_lse.stride()
        room = self._rooms.by_strides.get((out.stride(), lse.stride(), grad_out.stride(), of_lse))
        if room is None or self._copies or (q | k | v | o | r | g | d) % ALIGNMENT:
            return self._brought(call, out, lse, grad_out, grad_lse)
        stream = torch_internals.raw_stream(self._device)
        memory = scratch(self._where, self._memory.total, stream)
        make_dq, make_dk, make_dv = self._grads
        dq, dk, dv = make_dq.here(), make_dk.here(), make_dv.here()
        at = memory.data_ptr()
        if at != room.memory:
            room.move(at)
        if call.scale != room.scale:
            self._put_scale(call.scale, room)
        held = self._put_more(call, room, grad_lse) if room.reads_more else None
        if self._bounds is not None:
            self._bounds(call, memory)
            room.extents.launch(stream)
        values = room.prepare.values
        values[0], values[1], values[2] = o, g, r
        room.prepare.launch(stream)
        maps, a, b = room.main.maps, dk.data_ptr(), dv.data_ptr()
        maps[_Q], maps[_GRAD_OUT], maps[_K], maps[_V], maps[_DK], maps[_DV] = q, g, k, v, a, b
        room.main.launch(stream)
        values, i = room.finish.values, room.grads
        values[i], values[i + 1], values[i + 2] = dq.data_ptr(), a, b
        room.finish.launch(stream)
        del held
        wanted = self._problem.grads
        if wanted == "qkv":
            return Gradients(dq, dk, dv)
        dsinks = None
        if self._of_sinks is not None:
            dsinks = self._of_sinks.here()
            room.sums.values[room.slots["grad_sinks"]] = dsinks.data_ptr()
            room.sums.launch(stream)
        return Gradients(
            q=dq if "q" in wanted else None,
            k=dk if "k" in wanted else None,
            v=dv if "v" in wanted else None,
            sinks=dsinks,
        )

    def _brought(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The same for tensors that lie as none before did in this thread, or where they cannot be read."""
        q, k, v = brought(call.q), brought(call.k), brought(call.v)
        if self._copies or q is not call.q or k is not call.k or v is not call.v:
            call, strides = call._replace(q=q, k=k, v=v), (q.stride(), k.stride(), v.stride())
            found = self._of_copies.get(strides)
            if found is None:
                found = self._of_copies[strides] = self._with_inputs(call)
            return found(call, out, lse, grad_out, grad_lse)
        out, lse, grad_out = readable(out), realigned(lse), brought(grad_out)
        grad_lse = None if grad_lse is None else realigned(grad_lse.float())
        given = out.stride(), lse.stride(), grad_out.stride(), None if grad_lse is None else grad_lse.stride()
        rooms = self._rooms.by_strides
        if given not in rooms:
            if len(rooms) > 16:
                rooms.clear()
            rooms[given] = self._make_room(call, out, lse, grad_out, grad_lse)
        return self(call, out, lse, grad_out, grad_lse)

    def program(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Program | None:
        """See `backends.base.HasBackwardProgram`."""
        sinks = call.sinks
        if self._copies:
            return None
        if not _lie_well(out, lse, grad_out) or (sinks is not None and realigned(sinks.contiguous()) is not sinks):
            return None
        given = ["q", "k", "v", "out", "lse", "grad_out", *(["sinks"] if sinks is not None else [])]
        makers = *self._grads, None, self._of_sinks
        program = Program.of_backward(makers, self._memory.total, aligned=given)
        room = self._make_room(call, out, lse, grad_out, None)
        self._put_scale(call.scale, room)
        if self._bounds is not None:
            if not self._bounds.add_to(program, call):
                return None
            program.launches.append(room.extents.launch)
        for array, i, start in room.in_memory:
            program.write(array, i, "memory", start)
        for i, name in enumerate(("out", "grad_out", "lse")):
            program.write(room.prepare.values, i, name)
        for name in {"given_sinks", "q"} & room.slots.keys():
            program.write(room.prepare.values, room.slots[name], name.removeprefix("given_"))
        mapped = {_Q: "q", _GRAD_OUT: "grad_out", _K: "k", _V: "v", _DK: "grad_k", _DV: "grad_v"}
        for word, name in mapped.items():
            program.write(room.main.maps, word, name)
        for i, name in enumerate("qkv", room.grads):
            program.write(room.finish.values, i, f"grad_{name}")
        program.launches += room.prepare.launch, room.main.launch, room.finish.launch
        if room.sums is not None:
            program.write(room.sums.values, room.slots["grad_sinks"], "grad_sinks")
            program.launches.append(room.sums.launch)
        return program

    def _put_scale(self, scale: float, room: Room) -> None:
        inner, outer = score_factors(scale, self._problem.softcap)
        room.main.put(inner, outer * _LOG2_E, scale)
        room.finish.put((scale,))
        room.scale = scale

    def _put_more(self, call: Call, room: Room, grad_lse: Tensor | None) -> list[Tensor]:
        """Writes the addresses of what the first kernel reads besides the usual. Returns what has to live until it is
        launched."""
        slots, values = room.slots, room.prepare.values
        held: list[Tensor] = []
        if grad_lse is not None:
            values[slots["grad_lse"]] = grad_lse.data_ptr()
        if call.sinks is not None:
            sinks = realigned(call.sinks.contiguous())
            values[slots["given_sinks"]] = sinks.data_ptr()
            held.append(sinks)
        if self._bounds is not None:
            values[slots["q"]] = call.q.data_ptr()
        return held
