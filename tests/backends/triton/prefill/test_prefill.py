"""The prefill backend against the reference: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

from cases import BF16, FP16, FP32, FP64, Case, a_problem, check, make, relative_error
from features import BROADCASTS, FEATURES

import fastattn
from fastattn import Intervals
from fastattn.backends.triton import launcher as triton_launch
from fastattn.backends.triton.prefill import PrefillBackend
from fastattn.backends.triton.prefill import forward
from fastattn.backends.triton.prefill import launch_config as launch
from fastattn.call import Problem

#: Several blocks of queries and keys, heads padded, lengths that are multiples of nothing.
CASE = Case(batch=2, q_heads=4, kv_heads=2, q_len=37, kv_len=75, head_dim=24, dtype=FP32, return_lse=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels run natively")
        triton = pytest.importorskip("triton")
        from triton.runtime.interpreter import InterpretedFunction

        assert isinstance(triton.language.max, InterpretedFunction), (
            "triton was imported before TRITON_INTERPRET was set"
        )
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    return request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What is not written is NaN: torch fills outputs and scratch with it under this setting."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and keys in the shapes of this file, and lists for every mask."""
    choose = launch.choose
    monkeypatch.setattr(forward, "choose", lambda p: dataclasses.replace(choose(p), block_m=16, block_n=16))
    monkeypatch.setattr(launch, "_LISTED_KEYS", 48)


SERVED = [
    name
    for name, case in FEATURES.items()
    if case.head_dim % 8 == 0 and (case.value_dim or 8) % 8 == 0 and case.batch * case.q_len * case.kv_len
]


@pytest.mark.parametrize("name", SERVED)
def test_features(name: str, device: str) -> None:
    check(FEATURES[name].but(return_lse=True), "prefill", device)
