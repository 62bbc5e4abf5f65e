"""The Hopper forward for wide heads on a GPU: every case of its benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks import hopper_wide
from fastattn.backends.triton.binaries.policy import waiting

_on_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


@pytest.mark.gpu
@_on_hopper
@pytest.mark.parametrize("name", hopper_wide.CASES)
def test_equals_the_truth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    sizes, what = hopper_wide.CASES[name]
    with waiting():
        error, equal = hopper_wide.checked(sizes, what)
    assert error < hopper_wide.WORST[what.get("dtype", "bf16")]
    assert equal, "three runs do not agree in every bit"
