"""cuDNN plans that torch computes: all of the cuDNN backend but cuDNN itself, on a machine without a GPU.

A plan is run from its graph (what `graphs.build` says to the frontend) and the operands' addresses alone, as cuDNN
runs it: it believes dims, strides, offsets and lengths, reads and writes where they say, touches nothing beyond a
length, and notices nothing that is wrong. So a wrong offset, a stale length, a layout that was not copied or a row that
nobody cleared shows in the results.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import own_caches
from plan_stand_in import PlanStandIn
from torch import Tensor

from fastattn._compat import torch as torch_internals
from fastattn.backends import scratch
from fastattn.backends.cudnn import CudnnBackend, graphs, plans, ragged_offsets, support
from fastattn.backends.cudnn.graphs import KEY_SIDE, ROLES, PlanKey
from fastattn.call import Call, Problem

VERSION = 91900
ALIGNMENT = 16  #: bytes


class _Tensor:
    """A tensor of a graph."""

    def __init__(self, role: str = "", dim: Any = (), stride: Any = (), ragged_offset: Any = None, **rest: Any) -> None:
        self.role, self.dims, self.strides = role, tuple(dim), tuple(stride)
        self.ragged: _Tensor | None = ragged_offset

    def set_output(self, value: bool) -> _Tensor:
        return self

    set_data_type = set_output

    def set_uid(self, uid: int) -> _Tensor:
        self.role = next(role for role, number in ROLES.items() if number == uid)
        return self

    def set_dim(self, dims: list[int]) -> _Tensor:
        self.dims = tuple(dims)
        return self

    def set_stride(self, strides: list[int]) -> _Tensor:
        self.strides = tuple(strides)
        return self

    def set_ragged_offset(self, offset: _Tensor) -> _Tensor:
        self.ragged = offset
        return self


class EmulatedPlan:
    """One plan, and the graph that it is made from. See `plans.Plan` and `cudnn.pygraph`."""

    def __init__(self, key: PlanKey) -> None:
        self.key = key
        self.tensors: list[_Tensor] = []
        self.options: dict[str, Any] = {}
        names = SimpleNamespace(TOP_LEFT="upper left", BOTTOM_RIGHT="lower right")
        types = SimpleNamespace(**{name: name for name in ("FLOAT", "HALF", "BFLOAT16", "INT32", "INT64")})
        graphs.build(SimpleNamespace(pygraph=lambda **o: self, data_type=types, diagonal_alignment=names), key)
        self.by_role = {x.role: x for x in self.tensors if x.role}

    def tensor(self, *, uid: int, name: str, **options: Any) -> _Tensor:
        return self._made(_Tensor(**options).set_uid(uid))

    def sdpa(self, q: _Tensor, k: _Tensor, v: _Tensor, generate_stats: bool, **options: Any) -> list[_Tensor]:
        assert [x.role for x in (q, k, v)] == ["q", "k", "v"]
        self.options = options
        return [self._made(_Tensor()) for _ in range(2)]

    def sdpa_backward(self, *inputs: _Tensor, **options: Any) -> list[_Tensor]:
        assert [x.role for x in inputs] == ["q", "k", "v", "o", "do", "stats"]
        self.options = options
        return [self._made(_Tensor()) for _ in range(3)]

    def _made(self, x: _Tensor) -> _Tensor:
        self.tensors.append(x)
        return x

    def validate(self) -> None: ...

    build_operation_graph = validate

    def execute(self, operands: dict[str, Tensor]) -> None:
        for operand in self.key.operands:
            assert operand.dtype == operands[operand.role].dtype, operand
        rows, heads, q_dim, _ = self.by_role["q"].dims
        kv_dim = self.by_role["k"].dims[2]
        ragged = bool(self.options.get("use_padding_mask"))
        most = self.options.get("max_total_seq_len_q")
        if most:  # measured, 9.19: what is accumulated is looked for at the offsets of q and k, not of dq and dk
            for role in ("q", "k", "v"):
                assert torch.equal(operands[f"ragged_{role}"], operands[f"ragged_d{role}"]), role
                assert self.by_role[role].strides == self.by_role[f"d{role}"].strides
            assert int(operands["seq_q"].sum()) // operands["k"].shape[1] <= most
        ds: dict[int, Tensor] = {}
        for b in range(rows):
            m, n = (int(operands[role].flatten()[b]) for role in ("seq_q", "seq_kv")) if ragged else (q_dim, kv_dim)
            assert m <= q_dim and n <= kv_dim, "longer than declared"
            if m and n:
                ds[b] = self._run(_Entry(self, operands, b, m, n), operands)
        if "dbias" in self.by_role:
            dims = self.by_role["dbias"].dims
            whole = torch.stack([ds[b] for b in range(rows)])
            summed = [i for i in range(4) if dims[i] == 1 and whole.shape[i] > 1]
            operands["dbias"].copy_(whole.sum(summed, keepdim=True) if summed else whole)

    def _run(self, at: _Entry, operands: dict[str, Tensor]) -> Tensor:
        """One entry of the batch. Returns the scores' gradient, in a forward the scores."""
        scale, k = float(operands["scale"]), at.read("k")
        q, kv_heads = at.read("q"), k.shape[0]
        group = q.shape[0] // kv_heads
        k, v = (x.repeat_interleave(group, 0) for x in (k, at.read("v")))
        scores = q @ k.mT * scale
        if "bias" in self.options:
            bias = operands["bias"]
            assert tuple(bias.shape) == self.options["bias"].dims and bias.is_contiguous()
            scores = scores + bias[min(at.b, bias.shape[0] - 1)].double()
        scores = scores.masked_fill(~self._seen(at), -math.inf)
        if self.key.direction == "forward":
            lse = torch.logsumexp(scores, -1, keepdim=True)
            fully_masked = lse == -math.inf
            weights = torch.softmax(scores.masked_fill(fully_masked, 0.0), -1).masked_fill(fully_masked, 0.0)
            at.write("o", weights @ v)  # (0 * NaN is NaN here as it is there)
            if "stats" in self.by_role:
                at.write("stats", lse)
            return scores
        do = at.read("do")
        p = torch.exp(scores - at.read("stats"))
        ds = p * (do @ v.mT - (do * at.read("o")).sum(-1, keepdim=True))
        at.write("dq", ds @ k * scale)
        at.write("dk", (ds.mT @ q * scale).unflatten(0, (kv_heads, group)).sum(1))
        at.write("dv", (p.mT @ do).unflatten(0, (kv_heads, group)).sum(1))
        return ds

    def _seen(self, at: _Entry) -> Tensor:
        """The band as cuDNN counts it: its left bound is one more than the keys left of the diagonal."""
        lower = self.options["diagonal_alignment"] == "lower right"
        position = torch.arange(at.m)[:, None] + (at.n - at.m if lower else 0)
        j = torch.arange(at.n)
        left, right = (self.options.get(f"diagonal_band_{side}_bound") for side in ("left", "right"))
        seen = torch.ones(at.m, at.n, dtype=torch.bool)
        if left is not None:
            seen &= j > position - left
        if right is not None:
            seen &= j <= position + right
        return seen


class _Entry:
    """One entry of a plan's batch, of m queries and n keys: where each of its tensors lies."""

    def __init__(self, plan: EmulatedPlan, operands: dict[str, Tensor], b: int, m: int, n: int) -> None:
        self.plan, self.operands, self.b, self.m, self.n = plan, operands, b, m, n

    def read(self, role: str) -> Tensor:
        """`[H, length, D]` in float64."""
        return self._view(role).double()

    def write(self, role: str, x: Tensor) -> None:
        view = self._view(role)
        view.copy_(x.to(view.dtype))

    def _view(self, role: str) -> Tensor:
        x, known = self.operands[role], self.plan.by_role[role]
        _, heads, _, dim = known.dims
        start = self.b * known.strides[0]
        if known.ragged is not None:
            start = int(self.operands[known.ragged.role].flatten()[self.b])
        if role != "stats":  # cuDNN reads what lies otherwise, silently wrong
            size = x.element_size()
            assert x.data_ptr() % ALIGNMENT == 0 and start * size % ALIGNMENT == 0, f"{role} is not aligned"
            assert all(s * size % ALIGNMENT == 0 for s, n in zip(known.strides[1:3], known.dims[1:3]) if n > 1)
        length = self.n if role in KEY_SIDE else self.m
        # Beyond the memory behind x this raises: so would a GPU, with luck.
        return x.as_strided((heads, length, dim), known.strides[1:], x.storage_offset() + start)


class EmulatedPlans(PlanStandIn):
    """See `plans.PlanCache`. `exact` says whether exact plans are there, `larger` whether larger ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[PlanKey] = []

    def get(self, key: PlanKey) -> EmulatedPlan:
        self.asked.append(key)
        return EmulatedPlan(key)


def emulate(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> EmulatedPlans:
    """From now on the backend "cudnn" takes tensors of the CPU, as if they were on a GPU of that capability."""
    cache, problem_of = EmulatedPlans(), Problem.of

    def on_gpu(call: Call, backward: bool = False) -> Problem:
        return dataclasses.replace(problem_of(call, backward), device="cuda", index=0, capability=capability)

    set_ = monkeypatch.setattr
    set_(Problem, "of", staticmethod(on_gpu))
    own_caches(monkeypatch)
    set_(CudnnBackend, "reasons", lambda self, p: support.reasons(p, VERSION))
    set_(plans, "shared", cache)
    set_(torch_internals, "raw_stream", lambda index: 0)
    for module in (ragged_offsets, scratch):
        set_(module, "may_keep", lambda stream: True)
    return cache
