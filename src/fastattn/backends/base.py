"""What a backend is: which calls it refuses, and the kernel that it binds to the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..call import Call, Gradients, Problem
from ..shape_cache import Reason, shape_cache
from .triton.binaries.flag_set import FlagSet
from .triton.program import Program


class Refusal(RuntimeError):
    """A backend cannot serve a problem, and found that only when it was called. Another backend serves it from then
    on."""


class Setback(Refusal):
    """A backend cannot serve a problem for the time being. Another one does until this one is tried again."""


class OutOfMemory(Setback):
    """An allocation failed outside of torch's allocator, which could not give back unused memory and try again."""


class NotReady(Refusal):
    """The binary that a call needs is not there. Another backend serves calls like it until it is; nobody is warned.

    coming: it is being compiled, and `Reason.BINARY_READY` drops what passes over this backend as soon as it is there.
    until: when the backend is asked again at the latest, by time.monotonic(). make: has it compiled and waits for it,
    for a call that no other backend can serve; raises Refusal where that cannot be done. seen: `shape_cache.drops` of
    that reason, read before the binary was looked for.
    """

    def __init__(
        self, why: str, coming: bool, make: Callable[[], object], seen: int | None = None, until: float = math.inf
    ) -> None:
        super().__init__(why)
        self.coming, self.make, self.until = coming, make, until
        self.seen = shape_cache.drops(Reason.BINARY_READY) if seen is None else seen


class Kernel(Protocol):
    """A backend's computation for all calls of one kind: the same problem, the same strides and dtypes of the tensors.

    All backends agree on what they return, so that the backward of one may follow the forward of another.
    """

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The output and the log-sum-exp of a call.

        The output: `[B,Hq,Sq,Dv]` in q's dtype, token-major in memory, 0 in fully masked rows. The log-sum-exp:
        `[B,Hq,Sq]` in any layout, natural logarithm, sinks included, float32 (float64 for float64 inputs), -inf in
        fully masked rows. It is there when `problem.return_lse` or `problem.grads`; None may stand for it otherwise,
        and when only gradients need it and the backend's backward does not read it.
        """
        ...

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The gradients that `problem.grads` names. grad_lse: None unless the caller differentiated the log-sum-exp."""
        ...


@runtime_checkable
class KeepsGraph(Protocol):
    """A kernel whose backward would run its forward again, but for what the forward of an eager call keeps."""

    def forward_for_backward(self, call: Call) -> tuple[Tensor, Callable[[Call, Tensor], Gradients]]:
        """The output, as `Kernel.forward`, and a function for one use: the gradients for that of the output. It is
        given the call anew, as saved. Not where hooks see what is saved: a checkpoint computes all of its function
        again for each graph that asks for a saved tensor."""
        ...


@runtime_checkable
class HasProgram(Protocol):
    """A kernel for the forward whose launches differ in addresses alone, for calls of one kind and of one scale."""

    def program(self, call: Call) -> Program | None:
        """The launches as data; None where there is more to calls like this one, of which the kernel has served
        one."""
        ...


@runtime_checkable
class HasBackwardProgram(Protocol):
    """The same for the backward."""

    def backward_program(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Program | None:
        """As `HasProgram.program`, for tensors that lie as these."""
        ...


class ForwardOnly:
    """A kernel for the forward: another one that `Backend.bind` gives, of this or of another backend, has the
    backward."""

    __slots__ = ()

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Not to be called."""
        raise AssertionError("unreachable: it was bound to a forward")


class BackwardOnly:
    """A kernel for the backward."""

    __slots__ = ()

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Not to be called."""
        raise AssertionError("unreachable: it was bound to a backward")


class Backend(Protocol):
    """One way of computing attention."""

    name: str
    gives_lse: bool  #: its forward hands on the log-sum-exp where there are gradients
    reads_lse: bool  #: its backward needs it

    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot serve the problem, the forward of a call or (`problem.backward`) its backward. Empty:
        it can. The two may be served by different backends.

        Depends on the problem and the machine alone, so it needs no data.
        """
        ...

    def bind(self, problem: Problem, call: Call) -> Kernel:
        """The kernel for every call of the same kind as this one: with the method that `problem.backward` says. Reads
        nothing of the call that is data."""
        ...


@runtime_checkable
class Compiled(Protocol):
    """A backend whose kernels are binaries of ours: see `triton/binaries/`."""

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        """The flag sets that calls like this one need: the problem's own first, then those of other lengths and
        strides."""
        ...
