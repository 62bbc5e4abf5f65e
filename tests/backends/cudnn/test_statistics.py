"""The log-sum-exp that a backward is given: cuDNN reads what begins elsewhere than at 16 bytes wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.backends.cudnn import backward
from fastattn.call import Call

H, S = 4, 6


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shift", range(5))
def test_statistics_that_begin_anywhere(static: bool, shift: int) -> None:
    """As hooks of saved tensors, or a share of the rows, may bring them."""
    q = torch.zeros(1, H, S, 8)
    given: Tensor = torch.randn(H * S + shift)[shift:].view(1, S, H).transpose(1, 2)
    if static:
        given = given.contiguous() if shift == 0 else torch.randn(H * S + shift)[shift:].view(1, H, S)
    seen: list[dict[str, Tensor]] = []
    plan: Any = SimpleNamespace(execute=seen.append)
    call = Call(q, q, q)
    if static:
        backward._execute_static(call, plan, {}, given)
    else:
        bound = backward._Bound.__new__(backward._Bound)
        choice: Any = SimpleNamespace(plan=lambda: (plan, False))
        offsets: Any = lambda tensors, call: {}  # noqa: E731
        bound._problem, bound._make, bound._choice, bound._offsets = Any, [], choice, offsets  # type: ignore[assignment]
        bound._gaps, bound._ragged_stats, bound._stats_strides = False, True, (H * S, 1, H)
        bound.run(call, q, q, q, q, q, given)
    (tensors,) = seen
    assert tensors["stats"].data_ptr() % 16 == 0
    assert torch.equal(tensors["stats"], given) and tensors["stats"].stride() == given.stride()
