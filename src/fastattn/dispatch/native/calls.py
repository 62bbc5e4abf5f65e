"""What `attention.cpp` is told: which calls run which programs, and the way through Python of a backward without one.

A call that Python has served before, by a kernel whose launches differ in addresses alone, is offered: its program
serves the next one. So does the program of a backward, for gradients that lie alike.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import debug
from ..._compat import torch as torch_internals
from ...backends.base import HasBackwardProgram
from ...backends.layout import aligned
from ...backends.scratch import may_keep
from ...backends.triton import cuda_driver
from ...backends.triton.binaries.policy import mode
from ...backends.triton.program import SOURCES, Program
from ...call import CALL, Call, Gradients
from ...common.forks import after_fork
from ...config import is_on, setting
from ...masks import Intervals, Segments
from ...shape_cache import Reason, Size, shape_cache
from .. import eager, registry, routes, serve
from ..eager import Bound
from . import library

module: Any = None  #: `attention.cpp`, once it is there
builder = library.Builder()

_names: dict[Any, Any] = {}  #: lists of backends, and arguments `backend`, each by itself
_MOST = 1 << 12  #: kinds of calls; where there are more, all are forgotten
_MOST_OFFERS = 16  #: of one kind: scales, and layouts of gradients
_MOST_TIMES = 8  #: of one of these

_log = logging.getLogger("fastattn")


def place(backend: Any, kind: Any = None) -> tuple[Any, Any] | None:
    """What decides about a call besides its arguments: which backends may serve it, and which function was called (an
    object that lives for ever). None where only Python may serve it; else `module.attention(arguments, scale, *place)`
    is what a call returns that is known, or None."""
    if torch.compiler.is_compiling() or module is None or debug.ENABLED:
        return None
    names: Any = backend
    if backend is None:
        names = registry.allowed()
    elif type(backend) is not str or backend not in registry.NAMES:  # a tuple is none, whatever it holds
        return None
    if names is not registry.NAMES:  # equal ones have to be one object
        names = _names.setdefault(names, names)
    return names, kind


def start() -> None:
    """Has the module made, or found on disk, in the background. It is waited for with FASTATTN_COMPILE=wait alone."""
    if is_on("FASTATTN_NATIVE", True) and mode() != "off":
        builder.start(_take)
        if setting("FASTATTN_COMPILE").strip().lower() == "wait":
            wait()


def wait(timeout: float = 600.0) -> bool:
    """Waits until the module is there, or will not be. False if that takes longer than `timeout` seconds."""
    return builder.wait(timeout)


def state() -> tuple[str, str]:
    """What is to be said of the module: "ok", "off" or "none", and a sentence. `fastattn doctor` shows it."""
    if not is_on("FASTATTN_NATIVE", True):
        return "off", "FASTATTN_NATIVE"
    why = "" if module is not None else builder.why or library.hindrance()
    if why:
        return "none", f"each call goes through Python: {why}"
    return "ok", "on disk" if library.FILES.load(library.label()) else "compiled with the first calls on a GPU"


def _take(made: Any) -> None:
    global module
    made.setup(*cuda_driver.functions(), _gradients, Intervals, Segments)
    shape_cache.register(_holder)  # later than the routes, which are dropped before it: see `_holds`
    module = made


def _forked(_: Any) -> None:
    """A forked child goes through Python: the GPU is not its own, and a thread that it does not have may hold a
    program, or the table of an operator."""
    global module
    if module is not None:
        module.renew()
        module = None


after_fork(sys.modules[__name__], _forked)


class _Holder:
    """The table, as a holder of `shape_cache`."""

    name = "native calls"
    dropped_for = frozenset([Reason.BACKEND_REFUSED, Reason.BINARY_READY])
    forgotten = 0  #: how often it was full: what came before may be offered again

    def forget(self) -> None:
        """For want of room."""
        self.forgotten += 1
        self.clear()

    def clear(self) -> None:
        if module is not None:
            module.clear()

    def size(self) -> Size:
        return Size(0 if module is None else module.size(), 0, _MOST)


_holder = _Holder()


def make_room() -> None:
    """For one more kind of calls: forgets all where there are too many."""
    if module.size() >= _MOST:
        _holder.forget()


def times_forgotten() -> int:
    """What was offered before another number was here may be offered again."""
    return _holder.forgotten


def calls_served() -> dict[str, int]:
    """Calls served in this process: forward calls by backend, backward calls as "<backend>.backward"."""
    found = serve.calls_served()
    for name, served in () if module is None else module.served().items():
        found[name] = found.get(name, 0) + served
    return {name: served for name, served in found.items() if served}


def _may_make(device: torch.device) -> bool:
    """Whether programs may be made here and now: what kernels allocate and clear for them stays, so it must be no
    graph's that is being captured; and contexts and binaries are those of the current device."""
    if device.type != "cuda":
        return True
    index = device.index
    return index == torch_internals.current_device() and may_keep(torch_internals.raw_stream(index))


def serves(call: Call, *upstream: Tensor) -> bool:
    """Whether a program could run for tensors where these lie. Made for others it would be none, or have binaries that
    no other call takes, and its kind would not be offered again."""
    return aligned(call.q, call.k, call.v, *upstream)


def _holds(bound: Bound) -> bool:
    """Whether the routes are those by which it was bound. Whoever drops them clears the table after that; so what is
    added to it while this is true is dropped with them."""
    return bound.generation == routes.generation()


def offer(bound: Bound, call: Call, arguments: tuple[Any, ...], scale: Any, where: tuple[Any, Any] | None) -> None:
    """The next call like this one is served by a program, if the kernel has one. arguments, scale: as they came."""
    if where is None or (call.return_lse and call.grads) or torch.are_deterministic_algorithms_enabled():
        return
    # More than once: what torch dispatches otherwise (an inference tensor) is another kind of call there.
    programs, offered = bound.programs, (*where, scale)
    times, forgotten = programs.get(offered, (0, 0))
    if forgotten != _holder.forgotten:
        times = 0
    if times >= _MOST_TIMES or (offered not in programs and len(programs) >= _MOST_OFFERS):
        return
    if not _holds(bound) or not _may_make(bound.device) or not serves(call):
        return
    programs[offered] = times + 1, _holder.forgotten
    try:
        # (What counts is for one thread and one stream.)
        stream = torch_internals.raw_stream(bound.device.index) if bound.device_type == "cuda" else 0
        own = "forward", call.scale, threading.get_ident(), stream
        made = programs.get(own)
        if made is None:
            program = bound.kernel.program(call)
            if program is None or (call.return_lse and "lse" not in program.made):
                bound.offers = False
                return
            if len(programs) >= 3 * _MOST_OFFERS:
                bound.offers = False
                return
            given = [(name, None) for name, x in zip(CALL.tensor_names, CALL.tensors(call)) if x is not None]
            made = programs[own] = packed(program, bound.name, given, call.q)
        make_room()
        module.remember(arguments, scale, *where, made, bound, call.scale)
        if not _holds(bound):  # dropped since we asked: the table may have been cleared before this was in it
            module.clear()
    except Exception as error:  # Python serves such calls
        bound.offers = False
        _log.debug("no program: %s", error)


def packed(program: Program, name: str, given: Sequence[tuple[str, Tensor | None]], q: Tensor) -> Any:
    """The program as the module keeps it. name: what its calls count as. given: what a call comes with, and tensors
    that lie as those, where the module is to compare them."""
    index = SOURCES.index
    return module.program(
        name,
        cuda_driver.context() if q.is_cuda else 0,
        program.memory,
        program.apart,
        program.counters is not None,
        torch_internals.raw_stream(q.device.index) if q.is_cuda else 0,
        tuple([(index(name), name in program.aligned, x) for name, x in given]),
        tuple(
            [
                (index(name), make.shape, make.strides, torch.empty(0, dtype=make.dtype, device=q.device))
                for name, make in program.made.items()
            ]
        ),
        tuple(program.writes),
        tuple([launch.parts for launch in program.launches]),
        program,
    )


def _gradients(
    bound: Bound, scale: float, inputs: tuple[Any, ...], out: Tensor, lse: Tensor | None, grad_out: Tensor, link: Any
) -> Gradients:
    """The gradients of a call that a program served, for a backward that none can. link: what the call shares with
    others like it."""
    call: Call = CALL.join(inputs, (scale, *bound.static))
    found = eager.gradients_of(bound, call, (out, lse, grad_out, None))
    if module is None:  # in a forked child
        return found
    if module.backwards(link) < _MOST_OFFERS and not torch.are_deterministic_algorithms_enabled():
        try:
            _offer_backward(bound, call, out, lse, grad_out, link)
        except Exception as error:
            _log.debug("no program of a backward: %s", error)
    return found


def _offer_backward(bound: Bound, call: Call, out: Tensor, lse: Tensor | None, grad_out: Tensor, link: Any) -> None:
    route = bound.backward
    if route is None or lse is None or not isinstance(route.kernel, HasBackwardProgram):
        return
    programs, offered = bound.programs, ("backward", out.stride(), lse.stride(), grad_out.stride(), call.scale)
    if offered not in programs:
        if len(programs) >= 3 * _MOST_OFFERS or not eager.still_holds(bound, call, grad_out, out, lse):
            return
        if not _may_make(bound.device) or not serves(call, out, lse, grad_out):
            return
        programs[offered] = None
        program = route.kernel.backward_program(call, out, lse, grad_out)
        if program is None:
            return
        given = [(name, x) for name, x in zip(CALL.tensor_names, CALL.tensors(call)) if x is not None]
        given += [("out", out), ("lse", lse), ("grad_out", grad_out)]
        programs[offered] = packed(program, f"{route.backend.name}.backward", given, call.q)
    if programs[offered] is not None:
        module.remember_backward(link, programs[offered])
