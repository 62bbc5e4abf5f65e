"""The kernel of `batch_kernel.py` bound to one kind of call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....call import Call, Problem
from ...base import ForwardOnly
from ...layout import Output, RowNumbers, aligned
from ..arguments import band, broadcast_strides, strides_in_units
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import launcher_of, prepare, rooms_of
from ..binaries.triton_kernel import NamedKernel
from ..limits import sm_count
from ..program import Program, named
from ..representative import stand_in
from ..tile_parts import parts
from .launch_config import Launch, walking_options, walks_batch
from .lists import mask_layout

_BATCH = NamedKernel(f"{__package__}.batch_kernel", "batch_kernel")
_PROGRAMS = 4  #: of a multiprocessor, that walk over batch entries


def serves(p: Problem, call: Call, launch: Launch) -> bool:
    """Whether the kernel takes a call: see `launch_config.walks_batch`. Its mask may have been expanded along the
    batch."""
    return walks_batch(p, launch) and broadcast_strides(call.mask, 4)[0] == 0


class BatchKernel(ForwardOnly):
    """The kernel bound to one problem and one set of strides."""

    __slots__ = ("_forward", "_lse", "_output")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if p.return_lse or p.grads else None
        unit, strides = strides_in_units(call)
        mask_unit, mask_strides, adjacent = mask_layout(call.mask)
        row_blocks = -(-p.q_len // launch.block_m)
        tiles = row_blocks * p.q_heads
        index = call.q.device.index
        programs = _PROGRAMS * sm_count(-1 if index is None else index)
        entries = -(-p.batch // max(1, min(p.batch, programs // tiles)))
        integers = (
            *strides, *mask_strides[1:], p.q_heads, p.group, row_blocks, p.batch, entries, p.q_len, p.kv_len, *band(p)
        )  # fmt: skip
        blocks = launch.block_m, launch.block_n, parts(p.head_dim)[0], parts(p.value_dim)[0]
        self._forward = launcher_of(
            _BATCH,
            (tiles * -(-p.batch // entries),),
            call.q.device,
            p.capability,
            integers,
            (p.head_dim, p.value_dim, *blocks, unit, mask_unit, adjacent, launch.stages),
            num_warps=launch.warps,
            **walking_options(p),
        )
        prepare(self.launches(call))

    def launches(self, call: Call) -> list[Prepared]:
        """What a call launches."""
        return self._in_order(call, stand_in(call.q.dtype), stand_in(torch.float32) if self._lse else None)

    def _in_order(self, call: Call, out: Any, lse: Any) -> list[Prepared]:
        return [(self._forward, (call.q, call.k, call.v, out, lse, call.mask), (call.scale,))]

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        out = self._output()
        lse = None if self._lse is None else self._lse()
        self._forward((call.q, call.k, call.v, out, lse, call.mask), (call.scale,))
        return out, lse

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`."""
        given = {name: x for name in ("q", "k", "v", "mask") if (x := getattr(call, name)) is not None}
        rooms = rooms_of(self.launches(call)) if aligned(*given.values()) else None
        if rooms is None:
            return None
        program = Program.of_forward(self._output, self._lse, aligned=given)
        program.add_all(rooms, self._in_order(named(call), program.own("out"), program.own("lse")))
        return program
