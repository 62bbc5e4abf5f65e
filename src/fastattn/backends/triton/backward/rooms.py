"""What a call of the backward costs the host where nothing of it is new: addresses are written, kernels launched.

`backward.py` finds out about each call what its launches are, from tensors cut out of the call's memory. Of calls whose
tensors lie alike all of that is the same but the addresses. So a thread keeps the arguments of each launch (`Room`),
and which of a call's tensors each pointer is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import CALL, Call, Gradients, Problem
from ...layout import ALIGNMENT, Fresh
from ...scratch import Pieces, scratch
from ..arguments import exponent_factors
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import Room, rooms_of
from ..prefill.forward import precision_of
from ..program import GRADIENTS, Named, Program, named

#: What a backward is given besides the call: output, log-sum-exp, and their gradients (the last may be None).
Upstream = tuple[Tensor, Tensor, Tensor, Tensor | None]
_UPSTREAM = "out", "lse", "grad_out", "grad_lse"
#: Of a call, `Upstream`, pieces of the memory, and gradients: the launches in order. Takes `Named` in the place of
#: tensors, too.
Launches = Callable[[Call, Any, dict[str, Any], Gradients], list[Prepared]]

MOST_LAYOUTS = 16  #: of output, log-sum-exp and their gradients, whose launches are kept


class _Launch(NamedTuple):
    room: Room
    slots: tuple[int, ...]  #: of its pointers, among the addresses of a call
    floats: int  #: how many it takes


class _Rooms:
    """One thread's launches for tensors that lie alike.

    starts: what the launches read or write of the memory begins there. scale: of the floats that were put last.
    """

    __slots__ = ("launches", "scale", "starts")

    def __init__(self, launches: Sequence[_Launch], starts: Sequence[int], scale: float) -> None:
        self.launches, self.starts, self.scale = launches, starts, scale


class _Local(threading.local):
    def __init__(self) -> None:
        self.by_strides: dict[Any, _Rooms] = {}


class Quick:
    """Of one problem and one set of strides of the call's tensors, on a GPU."""

    __slots__ = ("_device", "_grads", "_local", "_names", "_pieces", "_problem")

    def __init__(self, p: Problem, call: Call, pieces: Pieces, grads: Sequence[Fresh | None]) -> None:
        """pieces: of the memory. grads: what makes each of `Gradients`."""
        self._problem, self._pieces, self._device = p, pieces, call.q.device
        self._local = _Local()
        self._grads = grads
        #: Of the tensors that the kernels may read. (With segments there is more to a call.)
        self._names = [name for name in CALL.tensor_names if getattr(call, name) is not None]

    def __call__(self, call: Call, upstream: Upstream) -> Gradients | None:
        """The gradients; None where the call has something new, or cannot be read where it is."""
        index = self._device.index
        if index != torch_internals.current_device():
            return None
        out, lse, grad_out, grad_lse = upstream
        rooms = self._local.by_strides.get(self._key(upstream))
        if rooms is None:
            return None
        addresses = [getattr(call, name).data_ptr() for name in self._names]
        addresses += out.data_ptr(), lse.data_ptr(), grad_out.data_ptr()
        if grad_lse is not None:
            addresses.append(grad_lse.data_ptr())
        bits = 0
        for address in addresses:
            bits |= address
        if bits % ALIGNMENT:
            return None
        stream = torch_internals.raw_stream(index)
        memory = scratch(self._device, self._pieces.total, stream)  # held until the launches
        at = memory.data_ptr()
        addresses += [at + start for start in rooms.starts]
        grads = [None if make is None else make.here() for make in self._grads]
        addresses += [x.data_ptr() for x in grads if x is not None]
        if call.scale != rooms.scale:
            floats = floats_of(self._problem, call.scale)
            for launch in rooms.launches:
                launch.room.put(floats[: launch.floats])
            rooms.scale = call.scale
        for room, slots, _ in rooms.launches:
            room.pack(room.values, 0, *[addresses[i] for i in slots])
            room.launch(stream)
        return Gradients(*grads)

    def remember(
        self, call: Call, upstream: Upstream, pieces: dict[str, Tensor], grads: Gradients, in_order: Launches
    ) -> None:
        """Keeps what a call has launched whose tensors the kernels read where they are."""
        given = [getattr(call, name) for name in self._names] + [x for x in upstream if x is not None]
        given += [*pieces.values(), *[x for x in grads if x is not None]]
        if any(x.data_ptr() % ALIGNMENT for x in given) or self._device.index != torch_internals.current_device():
            return
        rooms, launches = self._found(call, upstream, pieces, grads, in_order)
        pointers: list[list[Any]] = [[x for x in tensors if x is not None] for _, tensors, _ in launches]
        starts = dict.fromkeys([x.offset for of_one in pointers for x in of_one if x.source == "memory"])
        # As `__call__` collects their addresses.
        every = *map(Named, self._names), *_named(_UPSTREAM, upstream), *map(partial(Named, "memory"), starts)
        slots = {x: i for i, x in enumerate([x for x in (*every, *_named(GRADIENTS, grads)) if x is not None])}
        kept = self._local.by_strides
        if len(kept) >= MOST_LAYOUTS:
            kept.clear()
        found = [
            _Launch(room, tuple([slots[x] for x in of_one]), len(floats))
            for room, of_one, (_, _, floats) in zip(rooms, pointers, launches, strict=True)
        ]
        kept[self._key(upstream)] = _Rooms(found, list(starts), call.scale)

    def program(self, call: Call, upstream: Upstream, in_order: Launches) -> Program | None:
        """See `backends.base.HasBackwardProgram`."""
        if self._problem.dtype == torch.float32:  # torch may be told to use TF32
            return None
        if any([x.data_ptr() % ALIGNMENT for x in (*[getattr(call, name) for name in self._names], *upstream[:3])]):
            return None
        total = self._pieces.total
        program = Program.of_backward(self._grads, total, aligned=(*self._names, *_UPSTREAM[:3]))
        pieces = self._pieces.cut(torch.empty(total, dtype=torch.uint8, device="meta"))
        grads = Gradients(*[None if make is None else make() for make in self._grads])
        program.add_all(*self._found(call, (*upstream[:3], None), pieces, grads, in_order))
        return program

    def _found(
        self, call: Call, upstream: Upstream, pieces: dict[str, Tensor], grads: Gradients, in_order: Launches
    ) -> tuple[list[Room], list[Prepared]]:
        """The launches of a call: with memory of their own for arguments, and with `Named` in the place of tensors."""
        rooms = rooms_of(in_order(call, upstream, pieces, grads))
        assert rooms is not None
        of_pieces = {name: Named("memory", start) for name, (start, _, _) in self._pieces.at.items()}
        return rooms, in_order(
            named(call), _named(_UPSTREAM, upstream), of_pieces, Gradients(*_named(GRADIENTS, grads))
        )

    def _key(self, upstream: Upstream) -> Any:
        out, lse, grad_out, grad_lse = upstream
        of_lse = None if grad_lse is None else grad_lse.stride()
        return out.stride(), lse.stride(), grad_out.stride(), of_lse, precision_of(self._problem)


def _named(names: Sequence[str], tensors: Sequence[Tensor | None]) -> list[Any]:
    """`Named` in the place of each tensor."""
    return [None if x is None else Named(name) for name, x in zip(names, tensors, strict=True)]


def floats_of(p: Problem, scale: float) -> tuple[float, float, float]:
    """What the kernels multiply scores by, before the softcap's tanh and after it, and dQ and dK."""
    return *exponent_factors(p, scale), scale
