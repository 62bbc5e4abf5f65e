"""What tests of the portable forward and backward share: small calls for the interpreter, longer ones for a GPU."""

from __future__ import annotations

import pytest
from cases import Case
from features import FEATURES

#: Of `FEATURES` those that the kernels serve.
SERVED = [
    name
    for name, case in FEATURES.items()
    if case.head_dim % 8 == 0 and (case.value_dim or 8) % 8 == 0 and case.batch * case.q_len * case.kv_len
]


def is_native(request: pytest.FixtureRequest) -> bool:
    """Whether a test runs on a GPU, by its parameters."""
    return "cuda" in getattr(getattr(request.node, "callspec", None), "params", {}).values()


def sized(case: Case, device: str) -> Case:
    """The case with lengths that make as many of the GPU's blocks."""
    if device == "cpu":
        return case

    def longer(x: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if x is None else tuple(5 * n for n in x)

    longer_lengths = {name: longer(getattr(case, name)) for name in ("q_lengths", "kv_lengths")}
    return case.but(q_len=5 * case.q_len, kv_len=5 * case.kv_len, **longer_lengths)
