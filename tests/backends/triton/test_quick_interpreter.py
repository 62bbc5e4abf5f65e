"""The interpreter that the tests of Triton kernels run on computes what Triton's own does, with less work."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported
pytest.importorskip("triton")
import quick_interpreter
import triton
import triton.language as tl
from triton.language import core

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run natively")
N, BLOCK = 50, 16


@triton.jit
def scaled(x, y, BLOCK: core.constexpr):  # type: ignore[no-untyped-def]
    return core.where(tl.abs(x) > 1, x, y.to(tl.float32)) * 0.5 + tl.cdiv(BLOCK, 3)


@triton.jit
def kernel(x, y, out, counts, n, BLOCK: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        inside = (rows[:, None] < n) & (start + columns[None, :] < n)
        at = rows[:, None] * n + start + columns[None, :]
        a = tl.load(x + at, mask=inside, other=0)
        b = scaled(a, tl.load(y + at, mask=inside, other=0), BLOCK)
        if KIND == "dot":
            total = tl.dot(a, tl.trans(b).to(a.dtype), total)
        else:
            total += tl.exp(tl.minimum(b, 3.0)) + tl.sigmoid(b)
        most = tl.maximum(most, tl.max(b, 1))
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], total + most[:, None], mask=inside)
    tl.atomic_add(counts + rows % 4, tl.sum((total > most[:, None]).to(tl.int32), 1), mask=rows < n)


def launched(dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(N, N, generator=generator).to(dtype) for _ in range(2))
    out, counts = torch.full((N, N), torch.nan), torch.zeros(4, dtype=torch.int32)
    kernel[(triton.cdiv(N, BLOCK),)](x, y, out, counts, N, BLOCK, kind)
    return out, counts


@pytest.mark.parametrize("kind", ["dot", "sums"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits(dtype: torch.dtype, kind: str) -> None:
    assert quick_interpreter.install()
    found = launched(dtype, kind)
    with quick_interpreter.as_triton_has_it():
        expected = launched(dtype, kind)
    again = launched(dtype, kind)
    assert found[0][:, :BLOCK].isfinite().all() and found[1].sum() > 0
    for one, other, third in zip(found, expected, again):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        assert torch.equal(one.view(torch.int32), third.view(torch.int32))


def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the kernels of modules that name `triton.language.core` as well: and afterwards it is as it was."""
    assert quick_interpreter.install()
    searched: list[Any] = []
    own = inspect.getmembers

    def counted(what: Any, *rest: Any) -> Any:
        searched.append(what)
        return own(what, *rest)

    launched(torch.float32, "dot")
    before = dict(vars(tl)), dict(vars(tl.tensor))
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getmembers", counted)
        launched(torch.float32, "dot")
        few = len(searched)
        with quick_interpreter.as_triton_has_it():
            launched(torch.float32, "dot")
        many = len(searched) - few
    assert 0 < few <= 12 < 100 < many
    assert before == (dict(vars(tl)), dict(vars(tl.tensor)))
