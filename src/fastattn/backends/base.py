"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..call import Call, Gradients, Problem


class Refusal(RuntimeError):
    """A backend finds only when it is called that it cannot serve a problem. Another one does, from then on."""


class Setback(Refusal):
    """The same for the time being: what was in the way may go. Another one does until this one is tried again."""


class OutOfMemory(Setback):
    """Memory was in the way, and not torch's: its allocator could not give back what it holds unused, and try again."""


#: Runs a call. Returns the output and, when `problem.return_lse` or `problem.grads`, the log-sum-exp; else None may
#: stand for it, and also when only gradients need it and the backend's backward does not read it.
Runner = Callable[[Call], tuple[Tensor, Tensor | None]]


class Backend(Protocol):
    """One way of computing attention.

    All backends agree on what they return: `out` `[B,Hq,Sq,Dv]` in q's dtype, token-major in memory, 0 in rows that
    see nothing; `lse` `[B,Hq,Sq]` in any layout, natural logarithm, sinks included, float32 (float64 for float64
    inputs), -inf in rows that see nothing. Therefore the backward of one may follow the forward of another.
    """

    name: str
    reads_lse: bool  #: by its backward: the forward's has to be there, whichever backend ran it

    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot serve the problem, forward and (if it needs gradients) backward. Empty: it can.

        Looks at nothing but the problem and the machine, so it may be asked without data.
        """
        ...

    def bind(self, problem: Problem, call: Call) -> Runner:
        """The forward of every call that is like this one in its problem and in the strides and dtypes of its tensors.

        Looks at nothing else of the call: the runner that it returns serves others.
        """
        ...

    def backward(
        self, problem: Problem, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        """The gradients that `problem.grads` names. `grad_lse` is None unless the caller differentiated the lse."""
        ...
