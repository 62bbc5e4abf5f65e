"""What is baked into a cuDNN graph is in its key; what is data is not. (No GPU: graphs are recorded, not built.)"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plan_stand_in import PlanStandIn
from prepared import prepared
from recorder import cudnn

import fastattn
from fastattn.backends.cudnn import CudnnKernel, backward, forward, graphs, operands, plans
from fastattn.backends.cudnn.graphs import OUTPUTS, RAGGED, ROLES, Operand, PlanKey
from fastattn.call import Problem


def a_key(direction: str, ragged: bool = True) -> PlanKey:
    """A key that uses every role of its direction."""
    roles = ["q", "k", "v", "o", "stats", "scale", "bias", "seq_q", "seq_kv"]
    roles += ["do", "dq", "dk", "dv", "dbias"] if direction == "backward" else []
    roles += [f"ragged_{role}" for role in RAGGED if role in roles] if ragged else []
    operands = tuple(Operand(role, (2, 4, 16, 8), (512, 128, 8, 1), torch.bfloat16) for role in roles)
    return PlanKey(direction, 0, operands)


def recorded(key: PlanKey) -> list[Any]:
    return graphs.build(cudnn, key).log


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_field_of_every_operand_reaches_the_graph_and_the_key(direction: str) -> None:
    key = a_key(direction)
    changes = {
        "dims": (2, 4, 16, 16),
        "strides": (1024, 256, 16, 1),
        "dtype": torch.float16,
    }
    assert {f.name for f in dataclasses.fields(Operand)} == {"role", *changes}
    for i, operand in enumerate(key.operands):
        for name, value in changes.items():
            operands = list(key.operands)
            operands[i] = dataclasses.replace(operand, **{name: value})
            other = dataclasses.replace(key, operands=tuple(operands))
            assert other != key and hash(other) != hash(key), (operand.role, name)
            assert recorded(other) != recorded(key), (operand.role, name)
        without = dataclasses.replace(key, operands=tuple(o for o in key.operands if o is not operand))
        if operand.role not in ("q", "k", "v", "o", "do", "stats", "scale", "seq_q", "seq_kv"):
            assert recorded(without) != recorded(key), operand.role


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_other_field_of_the_key_reaches_the_graph(direction: str) -> None:
    key = a_key(direction)
    changes = {"left": 7, "right": 3, "lower_right": True, "deterministic": True, "total": 4097}
    assert {f.name for f in dataclasses.fields(PlanKey)} == {"direction", "device", "operands", *changes}
    for name, value in changes.items():
        other = dataclasses.replace(key, **{name: value})
        assert other != key and hash(other) != hash(key), name
        if name not in ("deterministic", "total") or direction == "backward":
            assert recorded(other) != recorded(key), name
    # The device reaches the graph through its handle, which the key chooses (`Plan.build`).
    assert dataclasses.replace(key, device=1) != key
    assert a_key("forward") != a_key("backward")


def test_equal_keys_are_found_again() -> None:
    assert a_key("forward") == a_key("forward") and hash(a_key("forward")) == hash(a_key("forward"))


def test_roles_have_distinct_ids_and_offsets_are_named_after_what_lies_at_them() -> None:
    assert len(set(ROLES.values())) == len(ROLES)
    assert all(f"ragged_{role}" in ROLES for role in RAGGED)
    assert all(role in ROLES for roles in OUTPUTS.values() for role in roles)


class Recorder(PlanStandIn):
    """Stands in for the plans: keeps the keys it is asked for, runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[PlanKey] = []
        self.roles: list[set[str]] = []

    def get(self, key: PlanKey) -> Recorder:
        self.keys.append(key)
        return self

    @property
    def key(self) -> PlanKey:
        return self.keys[-1]

    def execute(self, operands: dict[str, torch.Tensor]) -> None:
        self.roles.append(set(operands))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()

    def offsets(tensors: dict[str, torch.Tensor], call: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1) for name in ("seq_q", "seq_kv", *(f"ragged_{role}" for role in tensors))}

    monkeypatch.setattr(plans, "shared", found)
    for module in (forward, backward):
        monkeypatch.setattr(module, "RaggedOffsets", lambda *rest: offsets)
    return found


def keys_of(
    recorder: Recorder, q_len: int, kv_len: int, grads: bool = False, batch: int = 2, **options: Any
) -> list[PlanKey]:
    """The keys that a call on token-major tensors asks for."""
    make = lambda heads, length: torch.randn(batch, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    q, k, v = make(8, q_len), make(2, kv_len), make(2, kv_len)
    for x in (q, k, v) if grads else ():
        x.requires_grad_()
    call = prepared(q, k, v, **options)
    problem = dataclasses.replace(Problem.of(call), device="cuda", index=0, capability=(9, 0))
    recorder.keys.clear()
    with torch.no_grad():
        kernel = CudnnKernel(problem, call)
        out, lse = kernel.forward(call)
        if grads:
            assert lse is not None
            kernel.backward(call, out, lse, torch.zeros_like(out), None)
    return list(recorder.keys)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("grads", [False, True])
def test_what_is_data_does_not_reach_the_key(recorder: Recorder, grads: bool) -> None:
    base = keys_of(recorder, 100, 100, grads, mask="causal")
    assert len(base) == 1 + grads
    assert keys_of(recorder, 477, 477, grads, mask="causal") == base, "lengths"
    assert keys_of(recorder, 9000, 9000, mask="causal") == keys_of(recorder, 2, 2, mask="causal"), "of a forward: all"
    assert keys_of(recorder, 100, 100, grads, mask="causal", scale=0.5) == base, "scale"
    assert keys_of(recorder, 33, 33, grads, mask="causal") == base, "pointers"
    other = keys_of(recorder, 100, 300, grads, mask="causal", kv_lengths=lengths(3, 4))
    assert keys_of(recorder, 100, 200, grads, mask="causal", kv_lengths=lengths(70, 1)) == other, "device lengths"
    assert keys_of(recorder, 100, 300, grads, mask="causal") == other, "with lengths or without: one family"


@pytest.mark.parametrize("grads", [False, True])
def test_what_is_baked_reaches_the_key(recorder: Recorder, grads: bool) -> None:
    base = keys_of(recorder, 100, 100, grads, mask="causal")
    assert keys_of(recorder, 100, 100, grads) != base
    assert keys_of(recorder, 100, 100, grads, window=(5, 0)) != base
    assert keys_of(recorder, 100, 120, grads, mask="causal") != base, "upper left or lower right"
    assert keys_of(recorder, 100, 100, grads, mask="causal", batch=3) != base, "another power of two"
    mask = torch.ones(100, 100, dtype=torch.bool)
    static = keys_of(recorder, 100, 100, grads, mask=mask)
    assert static != base
    assert keys_of(recorder, 101, 101, grads, mask=torch.ones(101, 101, dtype=torch.bool)) != static
    assert keys_of(recorder, 100, 100, grads, mask=mask.float()) != static, "the mask's dtype"


def test_every_key_is_given_a_tensor_for_each_of_its_operands(recorder: Recorder) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"mask": "causal", "sinks": torch.zeros(8)},
        {"mask": torch.zeros(1, 1, 50, 60), "q_lengths": lengths(3, 50)},
        {"mask": fastattn.Intervals(lengths(0, 5)[:, None], lengths(60, 50)[:, None])},
        {"window": (3, 4), "kv_lengths": lengths(0, 60)},
    ]
    for option in options:
        if "sinks" in option:
            continue  # the sinks' own kernels need a GPU or the interpreter: test_cudnn_sinks.py
        recorder.roles.clear()
        keys = keys_of(recorder, 50, 60, True, **option)
        for key, roles in zip(keys, recorder.roles, strict=True):
            assert {operand.role for operand in key.operands} <= roles


@pytest.mark.parametrize("grads", [False, True])
def test_a_static_plan_names_its_shape(recorder: Recorder, grads: bool) -> None:
    recorder.static = True
    static = keys_of(recorder, 100, 100, grads, mask="causal")
    assert all(key.operand("ragged_q") is None and key.operand("seq_q") is None for key in static)
    assert all(key.operand("q").dims == (2, 8, 100, 64) for key in static)  # type: ignore[union-attr]
    assert keys_of(recorder, 101, 101, grads, mask="causal") != static
    assert keys_of(recorder, 100, 100, grads, mask="causal", scale=0.5) == static
    # What is data, or what cuDNN refuses for a shape, has no static plan.
    for options in ({"kv_lengths": lengths(3, 4)}, {"q_lengths": lengths(3, 4)}):
        assert keys_of(recorder, 100, 100, grads, mask="causal", **options)[0].operand("ragged_q") is not None
    assert keys_of(recorder, 100, 50, grads, mask="causal")[0].operand("ragged_q") is not None


def test_the_gradient_of_an_expanded_mask_has_the_shape_of_what_was_given() -> None:
    """Autograd sums it itself, over the expansion."""
    mask = torch.zeros(1, 8, 30, 40, requires_grad=True).expand(2, -1, -1, -1)
    q, k, v = (torch.zeros(2, heads, n, 64, dtype=torch.bfloat16) for heads, n in ((8, 30), (2, 40), (2, 40)))
    call = prepared(q, k, v, mask=mask)
    problem = dataclasses.replace(Problem.of(call), device="cuda", index=0, capability=(9, 0))
    assert "m" in problem.grads
    assert operands.masked(problem, call, whole=True).bias.shape == (2, 8, 30, 40)
    without = dataclasses.replace(problem, grads="")
    assert operands.masked(without, call, whole=False).bias.shape == (1, 8, 30, 40), "cuDNN broadcasts"


def test_head_major_queries_fold_every_head_so_that_their_stride_stays_out_of_the_key(recorder: Recorder) -> None:
    found = []
    for length in (100, 333):
        q, k, v = (torch.randn(1, heads, length, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
        call = prepared(q, k, v, mask="causal")
        problem = dataclasses.replace(Problem.of(call), device="cuda", index=0, capability=(9, 0))
        recorder.keys.clear()
        CudnnKernel(problem, call).forward(call)
        found.append(recorder.keys[0])
    assert found[0] == found[1]
    assert found[0].operand("q").dims[:2] == (8, 1)  # type: ignore[union-attr]
