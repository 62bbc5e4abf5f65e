"""A GPU for tests that have none: calls are routed and keyed as on an H100, and nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import own_caches
from plan_stand_in import PlanStandIn
from torch import Tensor

from fastattn import masks
from fastattn.backends import cudnn
from fastattn.backends.cudnn import backward, forward, plans, sinks, support
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.backends.triton import binding, decode, hopper, limits, prefill
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.backends.triton.decode.chunks import is_chunk
from fastattn.backends.triton.decode.family import family
from fastattn.call import Call, Problem, token_major
from fastattn.warming import run


class PretendedGpu(PlanStandIn):
    """What was asked of it. Stands in for the plans."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: set[PlanKey] = set()
        self.kernels: set[Any] = set()  #: all that a decode kernel is compiled for
        self.problems: list[Problem] = []

    def clear(self) -> None:
        self.plans, self.kernels, self.problems = set(), set(), []

    def get(self, key: PlanKey) -> Any:
        self.plans.add(key)
        return _Plan(key)

    def stats(self) -> dict[str, float]:
        return {"builds": len(self.plans), "background_builds": 0, "disk_loads": 0}


@dataclasses.dataclass
class _Plan:
    key: PlanKey

    def execute(self, operands: dict[str, Tensor]) -> None:
        assert {operand.role for operand in self.key.operands} <= set(operands)


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    gpu = PretendedGpu()
    problem_of = Problem.of

    def on_gpu(call: Call, backward: bool = False) -> Problem:
        found = dataclasses.replace(problem_of(call, backward), device="cuda", index=0, capability=(9, 0))
        gpu.problems.append(found)
        return found

    @functools.cache
    def at_most(x: launch.Launch) -> launch.Launch:
        return dataclasses.replace(x, splits=min(x.splits, 2))  # all numbers from 2 on take one binary

    def kernel(p: Problem) -> Any:
        chosen = launch.choose(p, 132)
        features = (p.sinks, p.q_lengths, p.kv_lengths, p.mask, p.mask_shape[1:] == (1,), p.softcap > 0, p.return_lse)
        of_heads = p.q_heads, p.kv_heads, p.head_dim, p.value_dim, p.dtype
        return *of_heads, at_most(chosen), features

    @functools.cache
    def of_family(p: Problem) -> frozenset[Any]:
        found = set()
        for other in dict.fromkeys(family(p, 132)):
            one = kernel(binding.with_intervals(other) if other.mask == "segments" else other)
            found.add(one)
            if is_chunk(other):  # of a larger batch, or of a smaller one
                found.update((*one[:-2], at_most(dataclasses.replace(one[-2], splits=n)), one[-1]) for n in (1, 2))
        return frozenset(found)

    def compiled(self: Any, p: Problem) -> list[Any]:
        gpu.kernels |= of_family(p)
        return []

    def decoded(self: Any, p: Problem, call: Call) -> Any:
        if call.segments is not None:
            p, call = masks.as_intervals(p, call)
        gpu.kernels.add(kernel(p))
        return SimpleNamespace(forward=lambda c: (token_major(c.q, *c.q.shape[:3], c.v.shape[3]).zero_(), None))

    def offsets(tensors: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
        return {name: torch.zeros(1) for name in ("seq_q", "seq_kv", *(f"ragged_{role}" for role in tensors))}

    set_ = monkeypatch.setattr
    set_(Problem, "of", staticmethod(on_gpu))
    own_caches(monkeypatch)
    set_(cudnn.CudnnBackend, "reasons", lambda self, p: support.reasons(p, 91900))
    for ours in (hopper.HopperBackend, prefill.PrefillBackend):  # plans are what is looked at
        set_(ours, "reasons", lambda self, p: ["is not pretended"])
    set_(limits, "missing", lambda device_type: [])
    set_(decode.DecodeBackend, "bind", decoded)
    set_(decode.DecodeBackend, "binaries", compiled)
    set_(plans, "shared", gpu)
    for module in (forward, backward):
        set_(module, "RaggedOffsets", lambda *rest: offsets)
    set_(sinks, "add_sinks", lambda out, lse, given: lse.contiguous())
    set_(sinks, "sink_gradient", lambda out, grad, lse, given: torch.zeros_like(given))
    set_(run, "_has_plans", lambda device: True)
    return gpu
