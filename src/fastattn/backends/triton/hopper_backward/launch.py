"""Which calls the Hopper backward serves, which binaries a call takes, and its launches.

Three launches, with bounds of rows five, with a mask of keys six; one more where sinks have a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....call import Call, Problem, token_major
from ...base import BackwardOnly
from ...layout import Contiguous, TokenMajor
from ..binaries import store
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import flag_sets, launcher_of, prepare
from ..binaries.triton_kernel import NamedKernel
from ..bounds import Bounds
from ..cuda_driver import Function
from ..hopper.arguments import Arguments, Mapped
from ..hopper.limits import DTYPES, MOST_KEYS, refusals, sides
from ..hopper.tensors import Layout, Row, layout_of
from ..limits import sm_count
from ..representative import representative
from ..sums import launcher_of_sum
from . import run
from .binary import BAND, CAUSAL, DIMS, FULL, HALF, INTERVALS, ROWS, Flags, key_columns, keys_of
from .memory import blocks_of, pieces_of, rows_of, tiles_of
from .room import Room
from .schedule import Sizes, choose

_PREPARE = NamedKernel(f"{__package__}.prepare", "prepare_kernel")
_EXTENTS = NamedKernel(f"{__package__}.extents", "extents_kernel")
_FINISH = NamedKernel(f"{__package__}.finish", "finish_kernel")
_INT32 = 1 << 31
#: See `work_of`. With less, such as 192 with 128 (0.65), the portable backward, which pads less, may be as fast.
_LEAST_WORK = 0.7


def reasons(problem: Problem) -> list[str]:
    """Why the kernel cannot serve a problem with gradients. Empty: it can."""
    p, why = problem, refusals(problem)
    if p.masked_rows:
        why.append(f"has no {p.mask} mask with a row for each query")
    elif "m" in p.grads:
        why.append("has no gradient of a mask")
    if not p.empty and dim_of(p) is None:
        why.append(
            f"head dim {p.head_dim} with value dim {p.value_dim}: both must be multiples of 8 up to {DIMS[-1]}, and "
            f"above {DIMS[-2]} padding must not be more than {1 - _LEAST_WORK:.0%} of the work"
        )
    padded = dim_of(p) or DIMS[0]
    keys = p.batch * p.kv_heads * blocks_of(p, padded) * keys_of(padded)
    biases = p.mask_shape[0] * p.mask_shape[1] * p.kv_len if p.masked_keys else 0
    if max(p.q_len, p.kv_len) <= MOST_KEYS and max(rows_of(p) * 2 * ROWS, keys, biases) >= _INT32:
        why.append("has more tokens than its integers count")
    return why


def dim_of(p: Problem) -> int | None:
    """The padded dims, or None."""
    if p.head_dim % 8 or p.value_dim % 8:
        return None
    found = min((d for d in DIMS if max(p.head_dim, p.value_dim) <= d), default=None)
    return None if found == DIMS[-1] and work_of(p) < _LEAST_WORK else found


def work_of(p: Problem) -> float:
    """How much of the work of wide heads is not padding: three of five GEMMs have the head dim, two the value dim."""
    return (3 * p.head_dim + 2 * p.value_dim) / (5 * DIMS[-1])


def mask_of(p: Problem) -> int:
    """What hides keys. INTERVALS wherever some query may see no key, or some key be seen by no query."""
    if p.mask != "none" or p.q_lengths or p.kv_lengths:
        return INTERVALS
    if not p.banded:
        return FULL
    if p.causal and p.left < 0 and p.q_len <= p.kv_len:
        return CAUSAL
    # The first query stands at `ahead`. Before 0 it may see nothing; keys before its window are seen by nobody.
    ahead = p.kv_len - p.q_len
    return BAND if (p.right < 0 or -ahead <= p.right) and (p.left < 0 or ahead <= p.left) else INTERVALS


def sizes(p: Problem, processors: int = 132) -> Sizes:
    """What the order of the work depends on."""
    dim = dim_of(p)
    assert dim is not None
    left = p.left if p.left >= 0 else -1
    return Sizes(
        p.batch, p.kv_heads, p.group, p.q_len, p.kv_len, dim, p.causal or p.mask == "segments", left, processors,
        p.deterministic, p.mask == "segments" or p.q_lengths or p.kv_lengths,
    )  # fmt: skip


def flags(p: Problem, split: bool) -> Flags:
    """Names the main kernel's binary."""
    dim = dim_of(p)
    assert dim is not None
    return Flags(DTYPES[p.dtype], dim, mask_of(p), p.softcap != 0, split, p.masked_keys, p.deterministic)


def binaries(problem: Problem) -> list[FlagSet]:
    """All that calls like this one need: its own main kernel first. At other lengths programs may share blocks of keys
    where they do not here, or the other way round."""
    call = representative(problem)
    own = Backward(problem, call, loads=False)
    kinds = [own]
    if problem.group > 1:
        kinds.append(Backward(problem, call, loads=False, split=1 if own.flags.split else problem.group))
    out = token_major(call.q, problem.batch, problem.q_heads, problem.q_len, problem.value_dim)
    found: list[FlagSet] = [kind.flags for kind in kinds]
    for kind in kinds:
        found += kind.others(call, out)
    return list(dict.fromkeys(found))


def bind(problem: Problem, call: Call) -> Backward:
    """The kernel for every call of the same kind. Raises what `Binaries.function` raises."""
    return Backward(problem, call)


def arguments(flags: Flags, integers: tuple[int, ...]) -> Arguments:
    """What the main kernel's binary is launched with."""
    bounds = flags.mask == INTERVALS
    ranks = 4, 4, 4, 4, 1, 4, 4, *((4, 4) if bounds else ())
    return Arguments(ranks, (True, flags.split, flags.ordered, bounds, bounds, flags.biased), integers, floats=3)


class Backward(BackwardOnly):
    """The kernels bound to calls of one kind: see `backends.base.Backend.bind`. Strides of the output, the log-sum-exp
    and their gradients may differ from call to call."""

    __slots__ = (
        *("_arguments", "_bounds", "_device", "_extents", "_finish", "_function", "_layouts", "_memory", "_prepares"),
        *("_problem", "_programs", "_split", "_sum", "backward", "backward_program", "flags"),
    )

    def __init__(self, problem: Problem, call: Call, loads: bool = True, split: int = 0) -> None:
        """loads: find the binaries. split: how many programs share a block of keys, if not as `schedule.choose` says;
        then only binaries are asked for."""
        p = self._problem = problem
        device = call.q.device
        self._device = device.index
        choice = choose(sizes(p, sm_count(device.index) if device.type == "cuda" else 132))
        choice = choice._replace(split=split or choice.split)
        self._split = choice.split > 1
        self.flags = flags(p, self._split)
        dim = self.flags.dim
        tiles, blocks, keys = tiles_of(p), blocks_of(p, dim), keys_of(dim)
        self._programs = blocks * p.batch * p.kv_heads * choice.split
        integers = (
            p.batch, p.q_heads, p.kv_heads, p.q_len, p.kv_len, *sides(p), tiles, blocks, p.group // choice.split,
            choice.split, choice.section, choice.sections,
        )  # fmt: skip
        self._bounds: Any = None
        self._extents: Any = None
        self._prepares: dict[Any, Any] = {}
        if self.flags.mask == INTERVALS:
            self._bounds = Bounds(p, call, ROWS)
            self._extents = launcher_of(
                _EXTENTS, (blocks, p.batch), device, p.capability, (p.kv_len, tiles), (ROWS, keys, 64),
                num_warps=4,
            )  # fmt: skip
            if self._bounds.keys is not None:
                integers += self._bounds.keys.strides
        self._arguments = arguments(self.flags, integers)
        self._memory = pieces_of(p, dim, self._split, 0 if self._bounds is None else self._bounds.size, p.deterministic)
        parts = 2 * (keys // 64) * p.batch * p.kv_heads * blocks if self._split else 0
        counts = (
            p.batch, p.q_heads, p.kv_heads, p.q_len, p.kv_len, tiles, blocks, p.head_dim // 8, p.value_dim // 8,
        )  # fmt: skip
        self._finish: Any = launcher_of(
            _FINISH, (rows_of(p) + parts,), device, p.capability, counts, (dim, keys), num_warps=4
        )
        self._sum, of_sinks = None, None
        if "s" in p.grads:
            assert call.sinks is not None
            self._sum = launcher_of_sum(p.q_heads, p.batch * tiles, device, p.capability)
            of_sinks = Contiguous(call.sinks)
        self._function: Function | None = None

        def with_inputs(other: Call) -> run.Backward:
            return Backward(p, other).backward

        grads = [TokenMajor(x.shape, x) for x in (call.q, call.k, call.v)]
        dtype = self.flags.dtype
        #: Of the main kernel's tensors that lie in one way at every call.
        self._layouts = {
            "q": layout_of(call.q, dtype, ROWS),
            "k": layout_of(call.k, dtype, keys, key_columns(dim)),
            "v": layout_of(call.v, dtype, keys),
            "dk": Layout(grads[1].shape, grads[1].strides, dtype, HALF),
            "dv": Layout(grads[2].shape, grads[2].strides, dtype, HALF),
        }
        #: See `backends.base.Kernel.backward`.
        self.backward: run.Backward
        running = run.Run(p, call, grads, of_sinks, self._memory, self._bounds, self._room, with_inputs)
        self.backward, self.backward_program = running, running.program
        if loads:
            if self._bounds is not None:
                prepare(self._bounds.launches(call))
            out = token_major(call.q.new_empty(0, device="meta"), p.batch, p.q_heads, p.q_len, p.value_dim)
            prepare(self._launches(call, out))
            self._function = store.shared.function(self.flags, device.index)

    def others(self, call: Call, out: Tensor) -> list[FlagSet]:
        """The binaries beside the main kernel's. out: as the forward returns it."""
        launches = self._launches(call, out)
        if self._bounds is not None:
            launches = [*self._bounds.launches(call), *launches]
        return flag_sets(launches)

    def _launches(self, call: Call, out: Tensor) -> list[Any]:
        """What `binaries.launcher.prepare` takes; all tensors but the call's on the meta device."""
        p = self._problem
        lse = torch.empty((p.batch, p.q_heads, p.q_len), dtype=torch.float32, device="meta")
        pieces = self._memory.cut(torch.empty(self._memory.total, dtype=torch.uint8, device="meta"))
        grads = [x.new_empty(0, device="meta") for x in (call.q, call.k, call.v)]
        found: list[Any] = []
        q = call.q.new_empty(0, device="meta")  # aligned, as it is when it is read
        for grad_lse in (None, lse) if p.return_lse else (None,):
            sinks = None if call.sinks is None else call.sinks.new_empty(0, device="meta")
            tensors = self._prepare_tensors(pieces, out, out, lse, grad_lse, sinks, q)
            found.append((self._prepare(out, out, lse, grad_lse, call.q), tensors, ()))
        if self._extents is not None:
            found.append((self._extents, _extents_tensors(pieces), ()))
        found.append((self._finish, _finish_tensors(pieces, *grads), (call.scale,)))
        if self._sum is not None:
            found.append((self._sum, _sum_tensors(pieces, call), ()))
        return found

    def _room(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Room:
        """This thread's, for tensors that lie as these."""
        p, dim, dtype = self._problem, self.flags.dim, self.flags.dtype
        assert self._function is not None
        pieces = self._memory.cut(torch.empty(self._memory.total, dtype=torch.uint8, device="meta"))
        sinks = None if call.sinks is None else call.sinks.new_empty(0, device="meta")
        before = self._prepare_tensors(pieces, out, grad_out, lse, grad_lse, sinks, call.q)
        after = _finish_tensors(pieces, *[x.new_empty(0, device="meta") for x in (call.q, call.k, call.v)])
        launcher = self._prepare(out, grad_out, lse, grad_lse, call.q)
        pointers = [(name, 0) for name in ("dq", "dkv", "counters", "bounds", "extents")]
        if self._bounds is not None and self._bounds.keys is not None:
            pointers.append(("bounds", 4 * self._bounds.keys.bias_at))
        extents = None
        layouts: dict[str, Mapped] = {
            **self._layouts, "grad_out": layout_of(grad_out, dtype, ROWS), "rows": Row(pieces["rows"].numel(), ROWS)
        }  # fmt: skip
        if self._extents is not None:
            shape = p.batch, p.q_heads, tiles_of(p) * ROWS, dim
            layouts["clean_q"] = layouts["clean_grad_out"] = Layout(shape, _contiguous(shape), dtype, ROWS)
            extents = self._extents.room(_extents_tensors(pieces)), _EXTENTS_OF
        mapped = [name for name in run.MAPPED if name in layouts]
        main = self._arguments.room(self._function, self._programs, self._device, [layouts[name] for name in mapped])
        return Room(
            main,
            (launcher.room(before), _present(_BEFORE, before)),
            extents,
            (self._finish.room(after, (call.scale,)), _present(_AFTER, after)),
            None if self._sum is None else (self._sum.room(_sum_tensors(pieces, call)), _SUM_OF),
            pointers,
            mapped,
            self._memory,
        )

    def _prepare(self, out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, q: Tensor) -> Any:
        """The launcher for tensors of these strides."""
        strides = [x.stride()[:3] for x in (out, grad_out, q, lse)]
        strides.append((0, 0, 0) if grad_lse is None else grad_lse.stride())
        key = *strides, grad_lse is None
        found = self._prepares.get(key)
        if found is None:
            p, dim = self._problem, self.flags.dim
            eighths = [stride // 8 for x in strides[:3] for stride in x]
            blocks, keys = blocks_of(p, dim), keys_of(dim)
            zeros = p.batch * p.kv_heads * blocks * (2 * keys * dim // 4096) if self._split else 0
            integers = (
                p.batch, p.q_heads, p.q_len, tiles_of(p), blocks, zeros, p.head_dim // 8, p.value_dim // 8,
                *eighths, *strides[3], *strides[4],
            )  # fmt: skip
            constants = dim, ROWS, self.flags.biased, keys
            device = torch.device(p.device, self._device) if self._device is not None else q.device
            found = launcher_of(_PREPARE, (rows_of(p),), device, p.capability, integers, constants, num_warps=4)
            if len(self._prepares) > 16:
                self._prepares.clear()
            self._prepares[key] = found
        return found

    def _prepare_tensors(
        self,
        pieces: dict[str, Tensor],
        out: Tensor,
        grad_out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        sinks: Tensor | None,
        q: Tensor,
    ) -> list[Tensor | None]:
        upstream = out, grad_out, lse, grad_lse, sinks, q if self._bounds is not None else None
        return [*upstream, *[pieces.get(name) for name in _BEFORE[len(upstream) :]]]


def _extents_tensors(pieces: dict[str, Tensor]) -> list[Tensor | None]:
    return [pieces[name] for name in _EXTENTS_OF]


def _finish_tensors(pieces: dict[str, Tensor], dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor | None]:
    rows = pieces["rows"] if "bounds" in pieces else None
    return [pieces["dq"], pieces.get("dkv"), rows, dq, dk, dv]


def _sum_tensors(pieces: dict[str, Tensor], call: Call) -> list[Tensor | None]:
    assert call.sinks is not None
    return [pieces["sinks"], call.sinks.new_empty(0, device="meta")]


#: What the tensors are, the pieces of the memory by their names.
_EXTENTS_OF = "bounds", "extents"
_SUM_OF = "sinks", "grad_sinks"
_BEFORE = (
    "out", "grad_out", "lse", "grad_lse", "given_sinks", "q", "bounds", "extents", "clean_q", "clean_grad_out", "rows",
    "dq", "dkv", "sinks", "counters",
)  # fmt: skip
_AFTER = "dq", "dkv", "rows", "grad_q", "grad_k", "grad_v"


def _present(names: Sequence[str], tensors: Sequence[Tensor | None]) -> list[str]:
    return [name for name, x in zip(names, tensors, strict=True) if x is not None]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1
