"""One thread's launches of the Hopper backward: what of their arguments stays is written once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...scratch import Pieces
from ..binaries import launcher
from ..cuda_driver import Description
from ..hopper import arguments
from ..hopper.tensors import Layout, describe_row

#: Of a plain kernel: its arguments, and for each of its pointers what it is.
Plain = tuple[launcher.Room, Sequence[str]]


class Room:
    """Arguments of launches for calls whose tensors lie alike.

    A call writes the addresses of its tensors (`places` of `main`, `values` of the others; `slots` says where), `move`
    those in its memory where that is not the last call's, `scale` the factors where they are others.
    """

    __slots__ = (
        "_descriptions", "_held", "_in_memory", "extents", "finish", "grad_out", "grads", "main", "memory", "prepare",
        "reads_more", "scale", "slots",
    )  # fmt: skip

    def __init__(
        self,
        main: arguments.Room,
        prepare: Plain,
        extents: Plain | None,
        finish: Plain,
        pointers: Sequence[tuple[str, int]],
        rows: tuple[int, int],
        clean: Layout | None,
        pieces: Pieces,
        grad_out: Layout,
    ) -> None:
        """pointers: of the main kernel, each the name of a piece of the memory and a place in it, in bytes. rows: how
        many numbers "rows" holds, and of one box. clean: of "clean_q" and "clean_grad_out". grad_out: of dO."""
        self.main, self.prepare, self.finish, self.grad_out = main, prepare[0], finish[0], grad_out
        self.extents: Any = None if extents is None else extents[0]
        starts = {name: place[0] for name, place in pieces.at.items()}
        #: For each pointer into the memory its array and place there, and where it points to.
        self._in_memory = [
            (main.pointers, i, starts[name] + more) for i, (name, more) in enumerate(pointers) if name in starts
        ]
        self.slots: dict[str, int] = {}  #: of the other pointers: in the kernels before, and after the main one
        for room, names in (prepare, finish, *([] if extents is None else [extents])):
            for i, name in enumerate(names):
                if name in starts:
                    self._in_memory.append((room.values, i, starts[name]))
                else:
                    self.slots[name] = i
        at = main.described
        self._descriptions: list[tuple[int, int, Any]] = [(at[4], starts["rows"], rows)]
        if clean is not None:
            self._descriptions += [(at[7], starts["clean_q"], clean), (at[8], starts["clean_grad_out"], clean)]
        self.grads = self.slots["grad_q"]  #: of the last kernel: the first of three gradients
        self.reads_more = bool({"grad_lse", "given_sinks", "q"} & self.slots.keys())
        self.memory, self.scale = 0, math.nan
        self._held: list[Description] = []

    def move(self, memory: int) -> None:
        """Writes where the pieces of the memory are. memory: its address."""
        for array, i, start in self._in_memory:
            array[i] = memory + start
        held = []
        for i, start, what in self._descriptions:
            address = memory + start
            found = what.describe(address) if isinstance(what, Layout) else describe_row(address, *what)
            self.main.places[i] = found.address
            held.append(found)
        self._held = held  # the places hold their addresses
        self.memory = memory
