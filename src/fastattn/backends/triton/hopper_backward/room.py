"""One thread's launches of the Hopper backward: what of their arguments stays is written once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...scratch import Pieces
from ..binaries import launcher
from ..cuda_driver import MAP_WORDS
from ..hopper import arguments

#: Of a plain kernel: its arguments, and for each of its pointers what it is.
Plain = tuple[launcher.Room, Sequence[str]]


class Room:
    """Arguments of launches for calls whose tensors lie alike.

    A call writes the addresses of its tensors (`maps` of `main`, `values` of the others; `slots` says where), `move`
    those in its memory where that is not the last call's, `scale` the factors where they are others.
    """

    __slots__ = (
        "extents", "finish", "grads", "in_memory", "main", "memory", "prepare", "reads_more", "scale", "slots", "sums",
    )  # fmt: skip

    def __init__(
        self,
        main: arguments.Room,
        prepare: Plain,
        extents: Plain | None,
        finish: Plain,
        sums: Plain | None,
        pointers: Sequence[tuple[str, int]],
        mapped: Sequence[str],
        pieces: Pieces,
    ) -> None:
        """sums: of the gradient of sinks. pointers: of the main kernel, each the name of a piece of the memory and a
        place in it, in bytes. mapped: what has maps, in order."""
        self.main, self.prepare, self.finish = main, prepare[0], finish[0]
        self.extents: Any = None if extents is None else extents[0]
        self.sums: Any = None if sums is None else sums[0]
        starts = {name: place[0] for name, place in pieces.at.items()}
        #: For each pointer into the memory its array and place there, and where it points to.
        self.in_memory = [
            (main.pointers, i, starts[name] + more) for i, (name, more) in enumerate(pointers) if name in starts
        ]
        self.slots: dict[str, int] = {}  #: of the other pointers: in the kernels before, and after the main one
        for room, names in [x for x in (prepare, finish, extents, sums) if x is not None]:
            for i, name in enumerate(names):
                if name in starts:
                    self.in_memory.append((room.values, i, starts[name]))
                else:
                    self.slots[name] = i
        self.in_memory += [(main.maps, MAP_WORDS * i, starts[name]) for i, name in enumerate(mapped) if name in starts]
        self.grads = self.slots["grad_q"]  #: of the last kernel: the first of three gradients
        self.reads_more = bool({"grad_lse", "given_sinks", "q"} & self.slots.keys())
        self.memory, self.scale = 0, math.nan

    def move(self, memory: int) -> None:
        """Writes where the pieces of the memory are. memory: its address."""
        for array, i, start in self.in_memory:
            array[i] = memory + start
        self.memory = memory
