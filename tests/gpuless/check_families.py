"""Asks cuDNN about every kind of graph that the backend can ask for: `python check_families.py MAJOR MINOR`.

Prints one line of JSON per problem: its description, our table's refusals, and what cuDNN says of the graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import stand_in
import torch
from torch import Tensor

import fastattn
from fastattn import api
from fastattn.backends.cudnn import backward, forward, graphs, plans, sinks, support
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.problem import Call, Problem

LENGTHS = ((1, 1), (1, 300), (7, 129), (64, 7), (128, 128), (300, 300))
DIMS = ((64, 64), (72, 72), (128, 128), (192, 128), (256, 256), (264, 264), (100, 100))


class Asker:
    """Stands in for the plan cache: asks cuDNN instead of building."""

    def __init__(self, cudnn: Any, capability: tuple[int, int]) -> None:
        self.cudnn, self.device = cudnn, stand_in.device(cudnn, capability)
        self.answers: dict[PlanKey, str] = {}
        self.said: list[str] = []
        self.key: PlanKey | None = None
        self.asked = 0

    def get(self, key: PlanKey) -> Asker:
        if key not in self.answers:
            try:
                graph = graphs.build(self.cudnn, key, **self.device)
                graph.create_execution_plans([self.cudnn.heur_mode.A])
                graph.check_support()
                self.answers[key] = ""
            except Exception as error:  # cuDNN's refusals are of several types
                self.answers[key] = f"{type(error).__name__}: {error}".strip()[-300:]
        if self.answers[key]:
            self.said.append(f"{key.direction}: {self.answers[key]}")
        self.key = key
        return self

    @property
    def generation(self) -> int:
        """Never twice the same: nobody may remember an answer."""
        self.asked += 1
        return self.asked

    def best(self, exact: PlanKey | None, general: PlanKey, larger: Any = ()) -> Asker:
        if exact is not None:
            self.get(exact)
        return self.get(general)

    def run(self, operands: dict[str, Tensor]) -> None: ...


def calls() -> Iterator[tuple[str, Call]]:
    def lengths(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for (q_len, kv_len), (dim, value_dim), grads in itertools.product(LENGTHS, DIMS, (False, True)):
        layout = itertools.cycle((True, False))

        def tensor(heads: int, length: int, dim: int, layout: Iterator[bool] = layout) -> Tensor:
            if next(layout):
                return torch.zeros(2, heads, length, dim, dtype=torch.bfloat16)
            return torch.zeros(2, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2)

        bounds = fastattn.Intervals(lengths(0, 0)[:, None], lengths(kv_len, kv_len)[:, None])
        rows = fastattn.Intervals(bounds.lo.expand(2, q_len), bounds.hi.expand(2, q_len))
        some: list[dict[str, Any]] = [
            {},
            {"mask": "causal"},
            {"mask": "causal", "window": (9, 0)},
            {"window": (9, 3)},
            {"window": (5, -1)},
            {"mask": torch.zeros(2, 1, q_len, kv_len, dtype=torch.bool)},
            {"mask": torch.zeros(kv_len, dtype=torch.bool), "window": (9, 0)},
            {"mask": torch.zeros(8, q_len, kv_len, requires_grad=grads)},
            {"mask": bounds},
            {"mask": rows, "window": (9, 0)},
            {"mask": "causal", "q_lengths": lengths(q_len, 0), "kv_lengths": lengths(kv_len, 1)},
            {"mask": torch.zeros(q_len, kv_len), "kv_lengths": lengths(kv_len, 1)},
            {"mask": "causal", "sinks": torch.zeros(8)},
            {"mask": fastattn.Segments(torch.zeros(5, 3, dtype=torch.int32), True)},
            {"mask": fastattn.Segments(torch.zeros(5, 100, dtype=torch.int32)), "window": (9, 0)},
        ]
        for options in some:
            q, k, v = tensor(8, q_len, dim), tensor(2, kv_len, dim), tensor(2, kv_len, value_dim)
            if grads:
                q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
            shown = {name: f"{tuple(x.shape)}" if isinstance(x, Tensor) else str(x)[:40] for name, x in options.items()}
            yield f"{q_len}x{kv_len} {dim}/{value_dim} grads={grads} {shown}", api.prepare(q, k, v, **options)


def main(major: int, minor: int) -> None:
    cudnn = stand_in.load_cudnn()
    asker = Asker(cudnn, (major, minor))
    for module in (forward, backward, plans):
        module.cache = asker  # type: ignore[assignment]
    for module in (forward, backward):
        module.Places = lambda *rest: lambda *rest: {}  # type: ignore[assignment, misc]
    sinks.add_sinks = lambda out, stats, sinks: stats.contiguous()  # type: ignore[assignment]
    sinks.sink_gradient = lambda out, grad, lse, sinks: sinks  # type: ignore[assignment]
    print(json.dumps({"cudnn": cudnn.backend_version()}))
    for name, call in calls():
        problem = dataclasses.replace(Problem.of(call), device="cuda", index=0, capability=(major, minor))
        asker.said = []
        with torch.no_grad():
            out, lse = forward.bind(problem, call)(call)
            if problem.grads and lse is not None:
                backward.backward(problem, call, out, lse, torch.zeros_like(out), None)
        ours = support.reasons(problem, cudnn.backend_version())
        print(json.dumps({"call": name, "ours": ours, "cudnn": asker.said}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
