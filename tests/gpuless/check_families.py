"""Asks cuDNN about every kind of call that the backend can be asked for: `python check_families.py [--ours] 9.0 8.0`.

Prints one line of JSON for each GPU and question: what was asked, our table's refusals, which plans the backend wants,
and what cuDNN refuses of them. --ours: leaves cuDNN out, which need not be here then.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import stand_in
import torch
from families import Question, questions
from plan_stand_in import PlanStandIn
from torch import Tensor

from fastattn.backends.cudnn import CudnnKernel, backward, forward, graphs, plans, sinks, support
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.call import Problem

VERSION = 91900  #: of the cuDNN for which our table is asked when cuDNN is not


class Asker(PlanStandIn):
    """Stands in for the plans: asks cuDNN instead of building."""

    def __init__(self, cudnn: Any, capability: tuple[int, int]) -> None:
        super().__init__()
        self.cudnn = cudnn
        self.device = {} if cudnn is None else stand_in.device(cudnn, capability)
        self.answers: dict[PlanKey, str] = {}
        self.said: list[str] = []
        self.wanted: list[str] = []
        self.key: PlanKey | None = None

    def get(self, key: PlanKey) -> Asker:
        if key not in self.answers:
            self.answers[key] = self._ask(key)
        if self.answers[key]:
            self.said.append(f"{key.direction}: {self.answers[key]}")
        self.wanted.append(f"{key.direction}: {kind(key)}")
        self.key = key
        return self

    def _ask(self, key: PlanKey) -> str:
        if self.cudnn is None:
            return ""
        try:
            graph = graphs.build(self.cudnn, key, **self.device)
            graph.create_execution_plans([self.cudnn.heur_mode.A])
            graph.check_support()
            return ""
        except Exception as error:  # cuDNN's refusals are of several types
            return f"{type(error).__name__}: {error}".strip()[-300:]

    def best(self, static: PlanKey | None, dynamic: PlanKey, larger: Any = (), trained: bool = False) -> Asker:
        if static is not None:
            self.get(static)
        return self.get(dynamic)

    def execute(self, operands: dict[str, Tensor]) -> None: ...


def kind(key: PlanKey) -> str:
    if key.operand("bias") is not None:
        return "dense mask"
    return "static" if key.operand("seq_q") is None else "dynamic"


def answer(asker: Asker, question: Question, capability: tuple[int, int], version: int) -> dict[str, Any]:
    call = question.call()
    problem = dataclasses.replace(Problem.of(call), device="cuda", index=0, capability=capability)
    ours = support.reasons(problem, version)
    asker.said, asker.wanted = [], []
    # Without cuDNN nobody minds what is refused; with it, it is asked about that as well.
    if (asker.cudnn is not None and question.dtype != "float64") or not ours:
        torch.use_deterministic_algorithms(question.deterministic)
        with torch.no_grad():
            kernel = CudnnKernel(problem, call)
            out, lse = kernel.forward(call)
            if problem.grads and lse is not None:
                kernel.backward(call, out, lse, torch.zeros_like(out), None)
        torch.use_deterministic_algorithms(False)
    return {
        "question": dataclasses.asdict(question),
        "ours": ours,
        "plans": list(dict.fromkeys(asker.wanted)),
        "cudnn": asker.said,
    }


def main(*arguments: str) -> None:
    cudnn = None if "--ours" in arguments else stand_in.load_cudnn()
    version = VERSION if cudnn is None else cudnn.backend_version()
    for module in (forward, backward):
        module.RaggedOffsets = lambda *rest: lambda *rest: {}  # type: ignore[assignment, misc]
    sinks.add_sinks = lambda out, stats, sinks: stats.contiguous()  # type: ignore[assignment]
    sinks.sink_gradient = lambda out, grad, lse, sinks: sinks  # type: ignore[assignment]
    for name in arguments:
        if name == "--ours":
            continue
        major, minor = map(int, name.split("."))
        asker = Asker(cudnn, (major, minor))
        plans.shared = asker  # type: ignore[assignment]
        for question in questions():
            row = answer(asker, question, (major, minor), version)
            print(json.dumps({"gpu": name, "version": version, **row}))


if __name__ == "__main__":
    main(*sys.argv[1:])
