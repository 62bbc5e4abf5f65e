"""The launches of the passes of the backward, and of the sums after them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ....call import Call, Gradients, Problem
from ..arguments import band, broadcast_strides, strides_in_units
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import launcher_of
from ..binaries.triton_kernel import NamedKernel
from ..prefill.forward import precision_of
from ..prefill.lists import mask_layout
from ..representative import stand_in
from ..sums import launcher_of_sum
from . import launch_config
from .sizes import Sizes

_PREPARE = NamedKernel(f"{__package__}.prepare", "prepare_kernel")
_COARSE, _KEYS, _QUERIES, _BIAS = (
    NamedKernel(f"{__package__}.{name}_kernel", f"{name}_kernel") for name in ("coarse", "keys", "queries", "bias")
)
_FLOATS = (1.0, 1.0, 1.0)  #: stand for the kernels' floats where only binaries are asked for
_Strides = tuple[int, ...]


class Layout(NamedTuple):
    """The integers that follow from the strides of a call's tensors."""

    unit: int
    strides: _Strides  #: of q, k, v
    mask_unit: int
    mask_strides: _Strides
    mask_adjacent: bool
    interval_strides: _Strides


class Passes:
    """The passes for one layout of all tensors."""

    __slots__ = ("_bias", "_coarse", "_keys", "_prepare", "_problem", "_queries", "_sizes", "_sums")

    def __init__(
        self,
        p: Problem,
        layout: Layout,
        sizes: Sizes,
        upstream: tuple[_Strides | None, ...],
        device: torch.device,
    ) -> None:
        """upstream: strides of the output and its gradient, and of the log-sum-exp and its gradient."""
        self._problem, self._sizes = p, sizes
        out, grad_out, lse, grad_lse = upstream
        assert out is not None and grad_out is not None and lse is not None
        launch, where = sizes.launch, (device, p.capability)
        dims = p.head_dim, p.value_dim
        head, value = launch_config.head_parts(p)
        heads = *head, *value
        biased, rows = p.mask == "additive", p.masked_rows
        precision = precision_of(p)
        if precision == "tf32x3":  # as exact as float32 is
            precision = launch.exact
        bounded = launch_config.bounded(p)
        ends = p.q_len, p.kv_len, *band(p)
        strides = *layout.strides, *grad_out, *layout.mask_strides
        units = layout.unit, layout.mask_unit
        by_head = launch_config.by_head(p)
        self._prepare = launcher_of(
            _PREPARE,
            (sizes.row_blocks * p.batch * p.q_heads,),
            *where,
            (*out, *grad_out, *lse, *(grad_lse or (0, 0, 0)), *layout.interval_strides, p.q_heads, sizes.row_blocks,
             *ends),
            (p.value_dim, *value, biased, p.dense_mask),
            num_warps=4,
        )  # fmt: skip
        self._coarse = self._keys = self._queries = self._bias = None
        before = sizes.before
        whole = sizes.walk is not None and sizes.walk.whole
        row_blocks = -(-p.q_len // launch.queries.block_m)
        list_strides = before.lists.strides if before.lists is not None else (0, 0, 0)
        if biased:
            tile = launch.queries
            self._coarse = launcher_of(
                _COARSE,
                (row_blocks * p.batch * p.q_heads,),
                *where,
                (*layout.strides[:6], *layout.mask_strides, *list_strides, p.batch, p.q_heads, p.group, row_blocks,
                 sizes.row_blocks, *ends),
                (p.head_dim, tile.block_m, tile.block_n, *head, *units, rows, layout.mask_adjacent,
                 p.softcap != 0, launch_config.coarse(p), precision),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        if any(name in p.grads for name in "kv") and not whole:
            tile = launch.keys
            key_blocks = -(-p.kv_len // tile.block_n)
            self._keys = launcher_of(
                _KEYS,
                (key_blocks * p.batch * p.kv_heads * sizes.group_parts,),
                *where,
                (*strides, *before.key_list_strides, *layout.interval_strides, p.batch, p.kv_heads, p.group,
                 p.group // sizes.group_parts, key_blocks, -(-p.q_len // tile.block_m), sizes.row_blocks, *ends),
                (*dims, tile.block_m, tile.block_n, *heads, *units, rows, layout.mask_adjacent,
                 p.dense_mask and p.mask_shape[1] > 1 and p.group > 1, bounded, biased, p.softcap != 0,
                 p.mask != "none", by_head, precision),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        if "q" in p.grads and not whole:
            tile = launch.queries
            gaps = p.mask == "intervals" and p.mask_shape[1] > 1
            self._queries = launcher_of(
                _QUERIES,
                (row_blocks * p.batch * p.q_heads,),
                *where,
                (*strides, *list_strides, *layout.interval_strides, p.batch, p.q_heads, p.group, row_blocks,
                 sizes.row_blocks, *ends),
                (*dims, tile.block_m, tile.block_n, *heads, *units, rows, layout.mask_adjacent, bounded, biased,
                 p.softcap != 0, gaps, by_head, precision),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        if sizes.walk is not None:
            tile, walk = launch.bias, sizes.walk
            batch, mask_heads = p.mask_shape[:2]
            self._bias = launcher_of(
                _BIAS,
                (batch * mask_heads * math.prod(walk.tiles), walk.parts),
                *where,
                (*strides, mask_heads, *walk.tiles, math.prod(walk.dims), *walk.dims[1:], walk.each, p.batch, p.q_heads,
                 p.group, sizes.row_blocks, *ends),
                (*dims, tile.block_m, tile.block_n, *heads, *units, rows, p.mask_shape[3] > 1, layout.mask_adjacent,
                 walk.entries, walk.whole, bounded, p.softcap != 0, precision),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        keys, parts_of_group = p.batch * p.kv_len * p.kv_heads, sizes.group_parts
        shared = {
            "k": (keys * p.head_dim, parts_of_group if "k" in p.grads else 1),
            "v": (keys * p.value_dim, parts_of_group if "v" in p.grads else 1),
            "mask": (math.prod(p.mask_shape), sizes.bias_parts),
        }
        self._sums = {name: launcher_of_sum(*each, *where) for name, each in shared.items() if each[1] > 1}
        if "s" in p.grads:
            self._sums["sinks"] = launcher_of_sum(p.q_heads, p.batch * sizes.row_blocks, *where)

    @staticmethod
    def layout(p: Problem, call: Call) -> Layout:
        """Of a call."""
        unit, strides = strides_in_units(call)
        mask_unit, mask_strides, adjacent = mask_layout(call.mask)
        return Layout(unit, strides, mask_unit, mask_strides, adjacent, broadcast_strides(call.lo, 2))

    def launches(self, call: Call, grad_lse: bool) -> list[Prepared]:
        """What a backward launches, as `binaries.launcher.prepare` takes it."""
        p = self._problem
        row, number = stand_in(p.dtype), stand_in(torch.float32)
        like = {name: stand_in(p.dtype) if name in p.grads else None for name in "qkv"}
        mask = stand_in(call.mask.dtype) if call.mask is not None and "m" in p.grads else None
        sinks = stand_in(call.sinks.dtype) if call.sinks is not None and "s" in p.grads else None
        grads = Gradients(like["q"], like["k"], like["v"], mask, sinks)
        upstream = row, number, row, number if grad_lse else None
        return self.in_order(
            call,
            upstream,
            {name: stand_in(dtype) for name, (_, _, dtype) in self._sizes.pieces.at.items()},
            grads,
            _FLOATS,
        )

    def in_order(
        self, call: Call, upstream: Any, pieces: dict[str, Any], grads: Gradients, floats: tuple[float, ...]
    ) -> list[Prepared]:
        """The launches that fill the gradients, in order. upstream: out, lse, grad_out, grad_lse. Takes `Named` in the
        place of tensors, too."""
        out, lse, grad_out, grad_lse = upstream
        stats = pieces["stats"]
        lengths = call.q_lengths, call.kv_lengths
        bounds = call.lo, call.hi, *lengths
        inputs = call.q, call.k, call.v, grad_out, stats
        dk, dv, dmask = (pieces.get(f"d{name}", getattr(grads, name)) for name in ("k", "v", "mask"))
        lists = pieces["lists"].view(torch.int32) if "lists" in pieces else None
        found: list[Prepared] = [
            (self._prepare, (out, grad_out, lse, grad_lse, call.sinks, stats, pieces.get("dsinks"), *bounds), ())
        ]
        if self._coarse is not None:
            found.append((self._coarse, (call.q, call.k, stats, call.mask, lists, call.sinks, *lengths), floats[:2]))
        if self._keys is not None:
            more = call.mask, pieces.get("key_lists"), pieces.get("ranges")
            found.append((self._keys, (*inputs, dk, dv, *more, *bounds), floats))
        if self._queries is not None:
            found.append((self._queries, (*inputs, grads.q, call.mask, lists, *bounds), floats))
        if self._bias is not None:
            walk = self._sizes.walk
            others = (grads.q, dk, dv) if walk is not None and walk.whole else (None, None, None)
            found.append((self._bias, (*inputs, dmask, *others, call.mask, *lengths), floats))
        for name, launcher in self._sums.items():
            found.append((launcher, (pieces[f"d{name}"], getattr(grads, name)), ()))
        return found
