"""A backend that computes nothing: what is left of a call's time is the host's way to a backend and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastattn.backends.base import Kernel
from fastattn.backends.layout import Output, RowNumbers, TokenMajor
from fastattn.call import Call, Gradients, Problem
from fastattn.dispatch import registry, serve
from fastattn.shape_cache import shape_cache


class NullBackend:
    """Serves everything with memory that nobody wrote to."""

    name = "null"
    gives_lse = True
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        return []

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return _NullKernel(problem, call)


class _NullKernel:
    """As few operators as a kernel can do with: one for each tensor that it gives back."""

    __slots__ = ("_gradients", "_lse", "_output", "_problem")

    def __init__(self, p: Problem, call: Call) -> None:
        self._problem = p
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if p.return_lse or p.grads else None
        self._gradients = [TokenMajor(x.shape, x) for x in (call.q, call.k, call.v)]

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._output(), None if self._lse is None else self._lse()

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        q, k, v = self._gradients
        mask = torch.empty_like(call.mask) if call.mask is not None and "m" in self._problem.grads else None
        sinks = torch.empty_like(call.sinks) if call.sinks is not None and "s" in self._problem.grads else None
        return Gradients(q(), k(), v(), mask, sinks)


@contextmanager
def null_backend() -> Iterator[None]:
    """Within the block it is the only backend, and nothing that is cached within it stays."""
    found = NullBackend()

    def backend(name: str) -> NullBackend:
        return found

    shape_cache.clear()
    try:
        with (
            mock.patch.object(registry, "NAMES", (found.name,)),
            mock.patch.object(registry, "backend", backend),
            mock.patch.dict(os.environ),
        ):
            for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN"):
                os.environ.pop(name, None)
            yield
    finally:
        shape_cache.clear()
        for calls in (serve._calls, serve._backwards):
            calls.pop(found.name, None)
