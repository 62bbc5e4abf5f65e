"""Triton kernels: a GEMV with the norm, gate or residual around it, and the gate of many rows.

A GEMV is bound by reading its weight. cuBLAS reads it at 80 to 90% of the memory bandwidth, `gemv_kernel` at nearly all
of it. The kernel also does what surrounds a GEMM in a decoder layer: the normalisation before it, the gate or the
residual after it. A decode step then is GEMVs and attention, and little else.

With programmatic dependent launch the kernel loads the first piece of its weight before it waits for its input, so that
the memory is busy between two GEMVs. No earlier kernel may be writing the weight then.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def gemv_kernel(
    x_ptr,  # [1, K]
    w_ptr,  # [N, K]; GATED: [2 N, K], the gates first
    y_ptr,  # [1, N]
    gain_ptr,  # [K] or None: RMS norm of x before the GEMV, with this weight
    bias_ptr,  # [N] or None; not with GATED
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,  # y = silu(gate) * value
    ADD: tl.constexpr,  # y += instead of y =
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each of BLOCK_K columns has a sum of its own until the end, so that no step waits for another."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    rows = (n < N)[:, None]
    w = tl.load(w_ptr + at, mask=rows & (k < K)[None, :], other=0.0)
    if GATED:
        values_ptr = w_ptr + at + (N * K)
        u = tl.load(values_ptr, mask=rows & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_u = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + begin + k, mask=begin + k < K, other=0.0).to(tl.float32)
        if gain_ptr is not None:
            square += x * x
            x *= tl.load(gain_ptr + begin + k, mask=begin + k < K, other=0.0).to(tl.float32)
        more = rows & (begin + BLOCK_K + k < K)[None, :]
        w_next = tl.load(w_ptr + at + (begin + BLOCK_K), mask=more, other=0.0)
        acc += w.to(tl.float32) * x[None, :]
        w = w_next
        if GATED:
            u_next = tl.load(values_ptr + (begin + BLOCK_K), mask=more, other=0.0)
            acc_u += u.to(tl.float32) * x[None, :]
            u = u_next
    y = tl.sum(acc, 1)
    scale = 1.0
    if gain_ptr is not None:  # the root mean square is one number for the row, so it can be multiplied in here
        scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
        y *= scale
    if GATED:
        y = silu(y) * (tl.sum(acc_u, 1) * scale)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(y_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.debug_barrier()  # several threads hold a column: none may write it before all have read it
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["x_stride"])
def gate_kernel(
    x_ptr,  # [tokens, 2 N], the gates first
    y_ptr,  # [tokens, N]
    x_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = silu(gate) * value, for many rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + row * x_stride + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, (silu(gate) * value).to(y_ptr.dtype.element_ty), mask=n < N)
