"""What a call of the backward costs the host where nothing of it is new: addresses are written, kernels launched.

`backward.py` finds out about each call what its launches are, from tensors cut out of the call's memory. Of calls whose
tensors lie alike all of that is the same but the addresses. So a thread keeps the arguments of each launch (`Room`),
and which of a call's tensors each pointer is.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import Call, Gradients, Problem
from ...layout import ALIGNMENT, Fresh
from ...scratch import scratch
from ..arguments import exponent_factors
from ..binaries.launcher import BinaryLauncher, Room
from ..binaries.launcher import Launch as Prepared
from ..prefill.forward import precision_of
from ..program import Named, Program
from .before import FILLED
from .sizes import Sizes

#: What a backward is given besides the call: output, log-sum-exp, and their gradients (the last may be None).
Upstream = tuple[Tensor, Tensor, Tensor, Tensor | None]
#: Of a call, `Upstream`, pieces of the memory, gradients, and floats: the launches in order, see `Passes.in_order`.
Launches = Callable[[Call, Any, dict[str, Any], Gradients, tuple[float, ...]], list[Prepared]]

#: Tensors of a call that the kernels may read.
_OF_CALLS = "q", "k", "v", "mask", "lo", "hi", "sinks", "q_lengths", "kv_lengths"
MOST_LAYOUTS = 16  #: of output, log-sum-exp and their gradients, whose launches are kept


class _Slot:
    """Stands for a tensor: the number of its address among a call's."""

    __slots__ = ("i",)

    def __init__(self, i: int) -> None:
        self.i = i

    def view(self, dtype: torch.dtype) -> _Slot:
        return self


class _Launch(NamedTuple):
    room: Room
    slots: tuple[int, ...]  #: of its pointers
    floats: int  #: how many it takes


class _Rooms:
    """One thread's launches for tensors that lie alike. scale: of the floats that were put last."""

    __slots__ = ("launches", "scale")

    def __init__(self, launches: Sequence[_Launch]) -> None:
        self.launches, self.scale = launches, math.nan


class _Local(threading.local):
    def __init__(self) -> None:
        self.by_strides: dict[Any, _Rooms] = {}


class Quick:
    """Of one problem and one set of strides of the call's tensors, on a GPU."""

    __slots__ = ("_before", "_device", "_grads", "_local", "_names", "_problem", "_sizes", "_starts")

    def __init__(self, p: Problem, call: Call, sizes: Sizes, grads: Sequence[Fresh | None]) -> None:
        """grads: what makes each of `Gradients`."""
        self._problem, self._sizes, self._device = p, sizes, call.q.device
        self._local = _Local()
        self._grads = grads
        self._names = [name for name in _OF_CALLS if getattr(call, name) is not None]
        self._starts = {name: start for name, (start, _, _) in sizes.pieces.at.items()}
        #: What `Before` fills: name, first byte, one past the last, dtype.
        self._before = [(name, *sizes.pieces.at[name]) for name in FILLED if name in sizes.pieces.at]

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
        memory = scratch(self._device, self._sizes.pieces.total, stream)
        at = memory.data_ptr()
        addresses += [at + start for start in self._starts.values()]
        grads = [None if make is None else make.here() for make in self._grads]
        addresses += [x.data_ptr() for x in grads if x is not None]
        if call.scale != rooms.scale:
            floats = floats_of(self._problem, call.scale)
            for launch in rooms.launches:
                launch.room.put(floats[: launch.floats])
            rooms.scale = call.scale
        if self._before:
            self._sizes.before(call, {name: memory[a:b].view(dtype) for name, a, b, dtype in self._before})
        for room, slots, _ in rooms.launches:
            room.pack(room.values, 0, *[addresses[i] for i in slots])
            room.launch(stream)
        return Gradients(*grads)

    def remember(
        self, call: Call, upstream: Upstream, pieces: dict[str, Tensor], grads: Gradients, in_order: Launches
    ) -> None:
        """Keeps what a call has launched whose tensors the kernels read where they are. in_order: its passes'."""
        given = [getattr(call, name) for name in self._names] + [x for x in upstream if x is not None]
        given += [pieces[name] for name in self._starts] + [x for x in grads if x is not None]
        if any(x.data_ptr() % ALIGNMENT for x in given) or self._device.index != torch_internals.current_device():
            return
        found = self._launches(call, upstream, pieces, grads, in_order)
        kept = self._local.by_strides
        if len(kept) >= MOST_LAYOUTS:
            kept.clear()
        kept[self._key(upstream)] = rooms = _Rooms(found)
        rooms.scale = call.scale

    def _launches(
        self, call: Call, upstream: Upstream, pieces: dict[str, Tensor], grads: Gradients, in_order: Launches
    ) -> list[_Launch]:
        """Of a call, with memory of their own. A pointer's slot counts the tensors of the call, of `upstream`, the
        pieces and the gradients, as far as there are such."""
        floats = floats_of(self._problem, call.scale)
        numbers = itertools.count()

        def slot(x: Any) -> Any:
            return None if x is None else _Slot(next(numbers))

        of_call = {name: _Slot(next(numbers)) for name in self._names}
        of_upstream = [slot(x) for x in upstream]
        of_pieces = {name: slot(pieces[name]) for name in self._starts}
        of_grads = Gradients(*[slot(x) for x in grads])
        slots = in_order(call._replace(**of_call), of_upstream, of_pieces, of_grads, floats)  # type: ignore[arg-type]
        found = []
        for (launcher, tensors, own), (_, places, _) in zip(
            in_order(call, upstream, pieces, grads, floats), slots, strict=True
        ):
            assert isinstance(launcher, BinaryLauncher)
            room = launcher.room(tensors, own)
            found.append(_Launch(room, tuple([x.i for x in places if x is not None]), len(own)))  # type: ignore[attr-defined]
        return found

    def program(self, call: Call, upstream: Upstream, in_order: Launches) -> Program | None:
        """See `backends.base.HasBackwardProgram`. in_order: as `remember`."""
        names = [*self._names, "out", "lse", "grad_out"]
        if self._problem.dtype == torch.float32:  # torch may be told to use TF32
            return None
        if any([x.data_ptr() % ALIGNMENT for x in (*[getattr(call, name) for name in self._names], *upstream[:3])]):
            return None
        made = {f"grad_{name}": make for name, make in zip(Gradients._fields, self._grads, strict=True) if make}
        program = Program(made, self._sizes.pieces.total, aligned=names)
        memory = torch.empty(self._sizes.pieces.total, dtype=torch.uint8, device="meta")

        def launches(call: Call, upstream: Any, pieces: dict[str, Any], grads: Gradients) -> list[Prepared]:
            before = self._sizes.before.in_order(call, pieces)
            return before + in_order(call, upstream, pieces, grads, floats_of(self._problem, call.scale))

        grads = Gradients(*[None if make is None else make() for make in self._grads])
        own = launches(call, (*upstream[:3], None), self._sizes.pieces.cut(memory), grads)
        of_call = call._replace(**{name: Named(name) for name in self._names})  # type: ignore[arg-type]
        pieces = {name: Named("memory", start) for name, start in self._starts.items()}
        of_grads = [None if make is None else Named(f"grad_{x}") for x, make in zip(Gradients._fields, self._grads)]
        named = launches(of_call, (*map(Named, names[-3:]), None), pieces, Gradients(*of_grads))  # type: ignore[arg-type]
        for (launcher, tensors, floats), (_, pointers, _) in zip(own, named, strict=True):
            assert isinstance(launcher, BinaryLauncher)
            program.add(launcher.room(tensors, floats), pointers)  # type: ignore[arg-type]
        return program

    def _key(self, upstream: Upstream) -> Any:
        out, lse, grad_out, grad_lse = upstream
        of_lse = None if grad_lse is None else grad_lse.stride()
        return out.stride(), lse.stride(), grad_out.stride(), of_lse, precision_of(self._problem)


def floats_of(p: Problem, scale: float) -> tuple[float, float, float]:
    """What the kernels multiply scores by, before the softcap's tanh and after it, and dQ and dK."""
    return *exponent_factors(p, scale), scale
