"""Tiles of two parts: how dims are cut, and that every column is loaded, multiplied and stored once."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

triton = pytest.importorskip("triton")
tl = triton.language

from fastattn.backends.triton.head_dims import dot_rows, load_rows, store_rows  # noqa: E402
from fastattn.backends.triton.tile_parts import MIN_PART, parts  # noqa: E402

CUT = {
    8: (16, 0), 16: (16, 0), 24: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32),
    104: (128, 0), 120: (128, 0), 128: (128, 0), 192: (128, 64), 256: (256, 0), 320: (256, 64), 504: (512, 0),
    512: (512, 0), 576: (512, 64),
}  # fmt: skip


def test_parts() -> None:
    assert {dim: parts(dim) for dim in CUT} == CUT
    assert [parts(dim, 32) for dim in (72, 80, 96, 192, 512)] == [(64, 32), (64, 32), (64, 32), (128, 64), (512, 0)]
    assert [parts(dim, 64) for dim in (72, 96, 192)] == [(128, 0), (128, 0), (128, 64)]
    for dim in range(1, 600):
        first, rest = parts(dim)
        whole = max(MIN_PART, 1 << (dim - 1).bit_length())
        assert dim <= first + rest <= whole
        assert all(x & (x - 1) == 0 and x >= MIN_PART for x in (first, rest or MIN_PART))
        assert rest == 0 or (first < dim and first + rest < whole), dim


@triton.jit
def _kernel(
    a_ptr,
    b_ptr,
    product_ptr,
    copy_ptr,
    n,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)
    a, a_rest = load_rows(a_ptr, rows * DIM, rows < n, DIM, FIRST, REST)
    b, b_rest = load_rows(b_ptr, rows * DIM, rows < n, DIM, FIRST, REST)
    product = dot_rows(a, a_rest, b, b_rest, REST, "ieee")
    tl.store(product_ptr + rows[:, None] * BLOCK + rows[None, :], product)
    store_rows(copy_ptr, rows * DIM, rows < n, a, a_rest, DIM, FIRST, REST)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dim", [8, 40, 72, 96, 104, 128, 192])
def test_every_column_counts_once(dim: int, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run natively")
    n, block = 13, 16
    # Beside the rows lies NaN: what is not wanted is not read, or ends as 0.
    a, b = (torch.full((block, dim), torch.nan, device=device) for _ in range(2))
    a[:n], b[:n] = torch.randn(n, dim, device=device), torch.randn(n, dim, device=device)
    product, copy = torch.empty(block, block, device=device), torch.full((block, dim), 7.0, device=device)
    _kernel[(1,)](a, b, product, copy, n, dim, *parts(dim), block)
    want = torch.zeros(block, block, device=device, dtype=torch.float64)
    want[:n, :n] = a[:n].double() @ b[:n].double().T
    torch.testing.assert_close(product.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy[:n], a[:n], rtol=0, atol=0)
    assert (copy[n:] == 7.0).all()
