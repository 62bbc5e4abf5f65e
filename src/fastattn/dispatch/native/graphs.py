"""What `operators.h` is told: which calls of the operators, in compiled graphs, run which programs.

Graphs keep nothing of a call but its arguments: the kernels' programs are made as for calls outside of graphs, without
what would stay allocated (a graph may be captured, and its memory is its own).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import debug
from ..._compat import sdpa as torchs
from ..._compat import torch as torch_internals
from ...backends.triton.program import SOURCES, Program
from ...call import CALL, Call, Gradients
from ...shape_cache import Reason, shape_cache
from .. import routes
from ..routes import Route
from . import calls

FORWARD, BACKWARD = 0, 1  #: the operators, as the module numbers them
_RESULTS = ("out", "lse"), tuple([f"grad_{name}" for name in Gradients._fields])
_MOST_TIMES = 4  #: that calls of one kind are offered: what torch dispatches otherwise is another kind to the module
_MOST_SCALES = 16  #: of one kind: a program is for one scale, and graphs may compute theirs

#: How often calls of a kind were offered, by their scales.
_offered = shape_cache.section("operators", 1 << 12, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])
_log = logging.getLogger("fastattn")


def offer(
    number: int, arguments: tuple[Any, ...], call: Call, names: tuple[str, ...], results: Sequence[Tensor]
) -> None:
    """The next call of an operator like this one, which Python has just served, is served by a program, if the kernel
    has one.

    number: FORWARD or BACKWARD. arguments: all of the operator's. names: the backends that may serve the call. results:
    what the operator returns.
    """
    if debug.ENABLED or torch.are_deterministic_algorithms_enabled() or torchs.traced_by_jit():
        return
    upstream = arguments[:4] if number == BACKWARD else ()
    if number == BACKWARD and upstream[1] is not None:  # a gradient of the log-sum-exp
        return
    kind = *[x.stride() for x in upstream if x is not None], CALL.kind(call), names, calls.times_forgotten()
    times = _offered.get(kind) or {}
    so_far = times.get(call.scale, 0)
    if so_far >= _MOST_TIMES or (not so_far and len(times) >= _MOST_SCALES) or not _may_make(call.q.device):
        return
    if not calls.serves(call, *[x for x in upstream if x is not None]):
        return
    generation = routes.generation()
    route = routes.route(call, names, backward=number == BACKWARD)
    if not route.lasts:
        return
    _offered[kind] = times
    times[call.scale] = so_far + 1
    try:
        program = _program(route, call, upstream)
        by_name = dict(zip(_RESULTS[number], results, strict=True))
        if program is None or not _gives(program, by_name):
            times[call.scale] = _MOST_TIMES
            return
        given = [name for name, x in zip(CALL.tensor_names, CALL.tensors(call)) if x is not None]
        given += ["grad_out", "out", "lse"] if upstream else []
        name = route.backend.name + (".backward" if upstream else "")
        empty = tuple([(SOURCES.index(name), x) for name, x in by_name.items() if not x.numel()])
        made = calls.packed(program, name, [(x, None) for x in given], call.q)
        calls.make_room()
        calls.module.remember_operator(number, arguments, made, empty)
        if generation != routes.generation():  # dropped since: the table may have been cleared before this was in it
            calls.module.clear()
    except Exception as error:  # Python serves such calls
        times[call.scale] = _MOST_TIMES
        _log.debug("no program for an operator: %s", error)


def _may_make(device: torch.device) -> bool:
    """Contexts and binaries are those of the current device; in a capture nothing new is begun."""
    if device.type != "cuda":
        return True
    return device.index == torch_internals.current_device() and not torch.cuda.is_current_stream_capturing()


def _program(route: Route, call: Call, upstream: tuple[Any, ...]) -> Program | None:
    make: Callable[..., Program | None] | None = getattr(
        route.kernel, "backward_program" if upstream else "program", None
    )
    if make is None:
        return None
    if not upstream:
        return make(call)
    grad_out, _, out, lse = upstream
    return make(call, out, lse, grad_out)


def _gives(program: Program, results: dict[str, Tensor]) -> bool:
    """Whether it makes what the operator has just returned, as tracers were told: all that has elements."""
    return program.counters is None and all(
        [
            (make := program.made.get(name)) is not None
            and (make.shape, make.strides, make.dtype) == (tuple(x.shape), x.stride(), x.dtype)
            for name, x in results.items()
            if x.numel()
        ]
    )
