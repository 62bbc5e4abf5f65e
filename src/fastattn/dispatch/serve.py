"""Runs a call on the backend of its route; where that one cannot, on another one."""

from __future__ import annotations

import sys
import threading
import time
from typing import NamedTuple

import torch
from torch import Tensor

from .. import debug
from ..backends.base import OutOfMemory, Refusal, Setback
from ..backends.errors import failure_of, give_back
from ..call import Call, Gradients, Problem
from ..common.forks import after_fork, renew_lock
from .refusals import record
from .registry import BackendError
from .routes import Route, nobody, reasons, route

_calls: dict[str, int] = {}  #: forwards, by backend
_backwards: dict[str, int] = {}
_lock = threading.Lock()
after_fork(sys.modules[__name__], renew_lock)


class Served(NamedTuple):
    """A forward, and the route by which it was served."""

    out: Tensor
    lse: Tensor | None
    route: Route


def forward(call: Call, names: tuple[str, ...]) -> Served:
    """The forward of a call on the first of the named backends that can.

    Raises BackendError when none is left, but torch.OutOfMemoryError where that is for want of memory.
    """
    attempts = Attempts(call, names)
    if debug.ENABLED:
        debug.check_call(call)
    try:
        while True:
            found = attempts.route()
            try:
                out, lse = found.kernel.forward(call)
            except Exception as error:
                if attempts.goes_on(found, error):
                    continue
                raise
            if debug.ENABLED:
                debug.check_result(call, found.backend.name, out, lse)
            count(found.backend.name)
            return Served(out, lse, found)
    finally:
        del attempts  # see `Attempts`


def backward(
    call: Call, names: tuple[str, ...], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """The backward of a call on the first of the named backends that can, whichever served the forward.

    Raises what `forward` raises.
    """
    attempts = Attempts(call, names, backward=True)
    try:
        while True:
            found = attempts.route()
            try:
                gradients = found.kernel.backward(call, out, lse, grad_out, grad_lse)
            except Exception as error:
                if attempts.goes_on(found, error):
                    continue
                raise
            count(found.backend.name, backward=True)
            return gradients
    finally:
        del attempts  # see `Attempts`


class Attempts:
    """The routes of one call: the next one where a backend turns out not to be able to serve it.

    It holds the error of a setback, and with it the frames that the error went through. A frame that is left must not
    hold it in turn, nor an error: such a cycle keeps the call's tensors alive until the garbage collector runs, so that
    a caller who catches the error to try a smaller batch has no memory for that one.
    """

    __slots__ = ("_backward", "_call", "_gave_back", "_left", "_names", "_setback")

    def __init__(self, call: Call, names: tuple[str, ...], backward: bool = False) -> None:
        self._call = call
        self._backward = backward
        self._names = self._left = names
        self._gave_back = False
        self._setback: Setback | None = None

    def route(self) -> Route:
        """Raises BackendError when no backend is left, torch.OutOfMemoryError where that is for want of memory."""
        setback = self._setback
        try:
            found = route(self._call, self._left, backward=self._backward)
        except BackendError:
            if isinstance(setback, OutOfMemory):
                raise torch.OutOfMemoryError(str(setback)) from setback
            if setback is not None:
                raise nobody(reasons(Problem.of(self._call, self._backward), self._names)) from setback
            raise
        if setback is not None:  # the shortened list does not show that a backend was passed over
            found = found._replace(until=time.monotonic())
        return found

    def goes_on(self, found: Route, error: Exception) -> bool:
        """Takes what the backend of a route raised. False where the error is the caller's."""
        device = self._call.q.device
        failure = failure_of(error, device)
        if failure is None:
            return False
        if isinstance(failure, OutOfMemory) and not self._gave_back and give_back(device):
            self._gave_back = True
            return True
        name = found.backend.name
        record(name, found.problem, failure)
        if isinstance(failure, Setback):
            self._setback, self._left = failure, tuple(other for other in self._left if other != name)
        return True


def refused(found: Route, error: Exception, but_for: tuple[type[Refusal], ...] = ()) -> bool:
    """Takes what the backend of a route raised, and records what it says of the backend, but for these kinds of
    refusals. False where the error is the caller's."""
    problem = found.problem
    failure = failure_of(error, torch.device(problem.device, max(problem.index, 0)))
    if failure is not None and not isinstance(failure, but_for):
        record(found.backend.name, problem, failure)
    return failure is not None


def backward_by_lse(call: Call, names: tuple[str, ...], out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients | None:
    """The backward of a call from the rows' output and log-sum-exp over more keys than the call has: a share of the
    whole. None where the backend of the call's route does not read the log-sum-exp, or cannot serve the call."""
    found = route(call, names, backward=True)
    if not found.backend.reads_lse:
        return None
    try:
        gradients = found.kernel.backward(call, out, lse, grad_out, None)
    except Exception as error:
        if refused(found, error):
            return None
        raise
    count(found.backend.name, backward=True)
    return gradients


def count(name: str, backward: bool = False) -> None:
    """Counts a call that a backend served, for `calls_served`."""
    calls = _backwards if backward else _calls
    with _lock:
        calls[name] = calls.get(name, 0) + 1


def calls_served() -> dict[str, int]:
    """Calls served in this process by way of Python: forward calls by backend, backward calls as
    "<backend>.backward"."""
    with _lock:
        return _calls | {f"{name}.backward": calls for name, calls in _backwards.items()}
