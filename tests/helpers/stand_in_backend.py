"""What stands for a backend with kernels of our own, and for the store of its binaries."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_compiler import Flags, command

from fastattn.backends.reference import ReferenceBackend
from fastattn.backends.triton.binaries import policy, store
from fastattn.backends.triton.binaries.compilers import Compilers
from fastattn.backends.triton.binaries.store import Binaries
from fastattn.call import Call, Problem
from fastattn.dispatch import registry


def stand_in_binaries(folder: Path, monkeypatch: pytest.MonkeyPatch, most: int = 1) -> Binaries:
    """In place of the process's, with the stand-in compiler, whose log is `folder / "log"`."""
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(folder / "kept"))
    for name in ("FASTATTN_COMPILE", "FASTATTN_UNTESTED_TRITON", "FASTATTN_BACKENDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested=""))
    found = Binaries(Compilers(command(folder / "log"), most=most))
    monkeypatch.setattr(store, "shared", found)
    return found


class StandIn:
    """In place of decode: what it computes the reference computes, once its binary is there."""

    name = "decode"
    gives_lse = True
    reads_lse = True

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.late = False  #: it notices only when it is called
        self.bound = 0
        self.told: list[torch.Tensor] = []  #: log-sum-exps, by backwards

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> StandIn:
        others = registry.backend
        monkeypatch.setattr(registry, "backend", lambda name: self if name == "decode" else others(name))
        return self

    def flags_of(self, problem: Problem) -> Any:
        return self.flags

    def reasons(self, problem: Problem) -> list[str]:
        return []

    def binaries(self, problem: Problem) -> list[Flags]:
        return [self.flags_of(problem)]

    def bind(self, problem: Problem, call: Call) -> Any:
        kernel = ReferenceBackend().bind(problem, call)
        if self.late:
            return SimpleNamespace(forward=partial(self.forward, problem, kernel), backward=kernel.backward)
        store.shared.function(self.flags_of(problem))
        self.bound += 1

        def backward(call: Call, out: torch.Tensor, lse: torch.Tensor, *rest: Any) -> Any:
            self.told.append(lse)
            return kernel.backward(call, out, lse, *rest)

        return SimpleNamespace(forward=kernel.forward, backward=backward)

    def forward(self, problem: Problem, kernel: Any, call: Call) -> Any:
        store.shared.function(self.flags_of(problem))
        return kernel.forward(call)
