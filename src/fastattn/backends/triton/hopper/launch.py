"""Which calls the Hopper forward serves, which binary a call takes, and its launch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ....call import Call, Problem
from ...layout import Output
from ...scratch import scratch
from ..binaries import store as binaries
from ..binaries.launcher import prepare
from ..bounds import Bounds
from ..cuda_driver import Function
from ..limits import sm_count
from ..prefill.launch_config import LISTED_KEYS
from ..prefill.lists import Lists
from .arguments import Arguments
from .binary import (
    ALIGNED,
    BAND,
    BLOCKS,
    FULL,
    INTERVALS,
    ROWS,
    SHORT,
    SHORT_BLOCKS,
    TILE,
    Flags,
)
from .limits import DTYPES, refusals, sides
from .tensors import describe_mask, described, once

_LOG2_E = math.log2(math.e)
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
    if p.mask != "none" and not rows:
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
        keys=p.dense_mask and not rows,
        tiles="" if not rows else "bool" if p.mask == "bool" else _BIASES[p.mask_dtype or p.dtype],
        listed=rows and p.kv_len >= LISTED_KEYS,
        q_lengths=p.q_lengths and mask != INTERVALS,  # there they are in the bounds, as all else
        kv_lengths=p.kv_lengths and mask != INTERVALS,
        sinks=_FLOATS[sinks_dtype or p.dtype] if p.sinks else "",
        softcap=p.softcap != 0,
        lse=p.return_lse or bool(p.grads),
        short=p.kv_len <= SHORT and not rows and found in SHORT_BLOCKS,
    )


def all_flags(p: Problem) -> list[Flags]:
    """The binaries of the problem and of problems that differ from it in lengths alone: its own first."""
    own = flags(p)
    lengths = [(p.q_len, p.kv_len), (1, SHORT), (SHORT, SHORT), (1, SHORT + 1), (SHORT + 1, SHORT + 1)]
    if p.masked_rows:
        lengths[1:] = [(2, LISTED_KEYS - 1), (2, LISTED_KEYS)]
    return list(dict.fromkeys([own, *(flags(replace(p, q_len=q, kv_len=kv)) for q, kv in lengths)]))


def function(name: Flags, device: int | None = None) -> Function:
    """The binary of that name, ready to be launched: see `Binaries.function`, also for what it raises."""
    return binaries.shared.function(name, device)


def arguments(flags: Flags, integers: tuple[int, ...]) -> Arguments:
    """What the binary is launched with."""
    described = 3 + flags.blocks.staged + bool(flags.tiles)
    bounds = flags.mask == INTERVALS or flags.listed
    present = True, flags.lse, bool(flags.sinks), flags.q_lengths, flags.kv_lengths, bounds, flags.keys
    return Arguments((4,) * described, present, integers, floats=2)


class Forward:
    """The kernel bound to one problem: see `backends.base.Backend.bind`. Strides of q, k and v may differ from call to
    call, those of masks may not. Strides of a mask with rows are `tiles_readable`."""

    __slots__ = (
        "_arguments", "_blocks", "_bounds", "_device", "_flags", "_function", "_lists", "_output", "_problem",
        "_programs",
    )  # fmt: skip

    def __init__(self, problem: Problem, call: Call) -> None:
        p = self._problem = problem
        self._flags = flags(p, None if call.sinks is None else call.sinks.dtype)
        self._blocks = self._flags.blocks
        self._function = function(self._flags, call.q.device.index)
        self._output = Output(p, call.q)
        self._device = call.q.device.index
        rows = -(-p.q_len // TILE)
        heads = p.batch * p.q_heads
        self._programs = min(rows * heads, sm_count(self._device))
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
        self._lists: Any = None
        list_strides: tuple[int, ...] = (0, 0, 0)
        if self._flags.tiles:
            mask_once = once(call.mask)
            bias_strides = tuple([int(size > 1) for size in mask_once.shape[:2]])
        if self._flags.listed:
            entries = replace(p, mask_shape=tuple(mask_once.shape))
            self._lists = Lists(entries, call._replace(mask=mask_once), TILE, self._blocks.keys)
            prepare(self._lists.launches(call))
            list_strides = self._lists.strides
            section = heads  # as with a band: the longest tiles first
        integers = (
            p.batch, p.q_heads, p.group, p.q_len, p.kv_len, *sides(p), rows, section, p.value_dim // 8, *bias_strides,
            *list_strides,
        )  # fmt: skip
        self._arguments = arguments(self._flags, integers)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if self._device != torch_internals.current_device():
            with torch.cuda.device(self._device):
                return self._launch(call)
        return self._launch(call)

    def _launch(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, flags = self._problem, self._flags
        q, k, v, scale = call.q, call.k, call.v, call.scale  # > 0: see `validation`
        out = self._output(call.q)
        lse = None
        if flags.lse:
            lse = torch.empty((p.batch, p.q_heads, p.q_len), dtype=torch.float32, device=q.device)
        inner, scale = (scale / p.softcap, p.softcap) if p.softcap else (1.0, scale)
        if not (flags.tiles and p.mask == "additive"):  # see `masking.with_tile`
            scale *= _LOG2_E
        dtype, keys = flags.dtype, self._blocks.keys
        q, q_described = described(q, dtype, ROWS)
        k, k_described = described(k, dtype, keys)
        v, v_described = described(v, dtype, keys)
        descriptions = [q_described, k_described, v_described]
        if self._blocks.staged:
            descriptions.append(described(out, dtype, ROWS)[1])
        if flags.tiles:
            _kept, mask_described = describe_mask(call.mask, flags)  # a copy lives until it is read
            descriptions.append(mask_described)
        kept = [None if x is None else x.contiguous() for x in (call.sinks, call.q_lengths, call.kv_lengths)]
        addresses = [0 if x is None else x.data_ptr() for x in (out, lse, *kept)]
        bounds = self._bounds
        if self._lists is not None:
            addresses += (self._lists(call, scratch(q.device, self._lists.size)).data_ptr(), 0)
        elif bounds is None:
            addresses += (0, 0)
        else:
            memory = scratch(q.device, bounds.size)
            bounds(call, memory)
            address = memory.data_ptr()
            addresses += (address, 0 if bounds.keys is None else address + 4 * bounds.keys.bias_at)
        self._arguments.launch(self._function, self._programs, self._device, descriptions, addresses, inner, scale)
        return out, lse
