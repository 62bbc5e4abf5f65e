"""The operations of a decoder layer, each in few kernels, for any number of tokens: `FusedGemm`, `Rotary`, `gate`.

On a GPU the GEMMs of one token run in our own kernel, and those of more tokens in cuBLAS, which is as fast there. On
other devices torch computes everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....backends.triton.launcher import Launcher, native, overlaps
from ....shape_cache import shape_cache
from .launch_config import MANY_TOKENS, Launch, choose_launch


class FusedGemm:
    """y = act(norm(x) weight^T + bias), or with `add` y += that.

    Args:
        weight: `[N, K]`; gated: `[2 N, K]`, and y = silu(first half) * second half.
        bias: `[N]` or None; not if gated.
        gain: `[K]`, the weight of an RMS norm of x; None: no norm.
        eps: of the norm.
        gated: see weight.
        add: adds to the output, the residual, instead of overwriting it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gain: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        add: bool = False,
    ) -> None:
        self.weight, self.bias, self.gain, self.eps = weight.detach(), bias, gain, eps
        self.gated, self.add = gated, add
        self.size: int = weight.shape[0] // (1 + gated)  #: N
        self.launcher: Launcher | None = None  #: of the GEMV kernel

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: `[T, K]`, last stride 1. out: `[T, N]`, which is added to and returned; default: a new tensor."""
        if native(x.device.type) and x.shape[0] == 1 and self.weight.is_contiguous():
            if out is None:
                out = x.new_empty((x.shape[0], self.size))
            return self._gemv(x, out)
        if self.gain is not None:
            x = functional.rms_norm(x, x.shape[-1:], self.gain, self.eps)
        if self.add:
            assert out is not None
            out.addmm_(x, self.weight.t())
            return out if self.bias is None else out.add_(self.bias)
        y = functional.linear(x, self.weight, self.bias)
        return gate(y) if self.gated else y

    def _gemv(self, x: Tensor, out: Tensor) -> Tensor:
        if self.launcher is None:
            set_launch(self, choose_launch(self.size, self.weight.shape[1], self.gated, self.weight.dtype))
            assert self.launcher is not None
        self.launcher((x, self.weight, out, self.gain, self.bias), (self.eps,))
        return out


def set_launch(p: FusedGemm, launch: Launch) -> None:
    """Sets how the GEMV kernel is launched for one row."""
    from .gemm_kernels import gemv_kernel

    constants = (p.size, p.weight.shape[1], p.gated, p.add, launch.block_n, launch.block_k)
    grid = (-(-p.size // launch.block_n),)
    absent = p.gain is None, p.bias is None
    p.launcher = _launcher(gemv_kernel, p.weight, grid, (), constants, absent, launch.warps)


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dim: `[T, 2 N]` to `[T, N]`."""
    tokens, size = x.shape[0], x.shape[1] // 2
    if not native(x.device.type):
        return functional.silu(x[:, :size]) * x[:, size:]
    from .gemm_kernels import gate_kernel

    out, block = x.new_empty((tokens, size)), 1024
    _launcher(gate_kernel, x, (tokens, -(-size // block)), (x.stride(0),), (size, block))((x, out))
    return out


class Rotary:
    """Normalises the heads of queries and keys, applies their rotary positions, and writes keys and values to the
    cache.

    cos, sin: `[P, D]`, of each position. q_gain, k_gain: `[D]`, the weights of the norms, or None; eps: of the norms.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, cos: Tensor, sin: Tensor,
        q_gain: Tensor | None = None, k_gain: Tensor | None = None, eps: float = 0.0,
    ) -> None:  # fmt: skip
        self.q_heads, self.kv_heads, self.dim = q_heads, kv_heads, cos.shape[1]
        self.cos, self.sin, self.q_gain, self.k_gain, self.eps = cos, sin, q_gain, k_gain, eps

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Returns the rotated queries `[rows, Hq, tokens, D]`, token-major.

        x: `[rows * tokens, (Hq + 2 Hkv) D]`, contiguous: queries, keys and values of each token. keys, values: the
        cache `[rows, Hkv, C, D]`, last stride 1, written from each row's `lengths` (int32 `[rows]`) on; tokens beyond
        C are dropped.
        """
        rows = keys.shape[0]
        tokens = x.shape[0] // rows
        q = x.new_empty((x.shape[0], self.q_heads * self.dim))
        if native(x.device.type):
            self._launch(x, q, keys, values, lengths, tokens)
        else:
            self._compute(x, q, keys, values, lengths, tokens)
        return q.view(rows, tokens, self.q_heads, self.dim).transpose(1, 2)

    def _launch(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tokens: int) -> None:
        from .rotary_kernel import rotary_kernel

        half = 1 << (self.dim // 2 - 1).bit_length()
        # One token is distributed over many programs, because nothing else fills the GPU; many tokens use larger loads.
        block_h = max(1, (512 if x.shape[0] < MANY_TOKENS else 2048) // (2 * half))
        strides = (*keys.stride()[:3], *values.stride()[:3])
        unit = 1 if any(stride % 8 for stride in strides) else 8
        launch = _launcher(
            rotary_kernel,
            x,
            (x.shape[0], -(-(self.q_heads + 2 * self.kv_heads) // block_h)),
            (tokens, keys.shape[2], *(stride // unit for stride in strides)),
            (self.q_heads, self.kv_heads, self.dim, block_h, half, unit),
            (self.q_gain is None,),
        )
        launch((x, q, keys, values, self.cos, self.sin, lengths, self.q_gain, self.k_gain), (self.eps,))

    def _compute(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tokens: int) -> None:
        rows, dim = keys.shape[0], self.dim
        heads = x.view(rows, tokens, -1, dim)
        queries, new_keys, new_values = heads.split([self.q_heads, self.kv_heads, self.kv_heads], 2)
        if self.q_gain is not None:
            queries = functional.rms_norm(queries, (dim,), self.q_gain, self.eps)
            new_keys = functional.rms_norm(new_keys, (dim,), self.k_gain, self.eps)
        position = lengths[:, None].long() + torch.arange(tokens, device=x.device)
        index = position.clamp(max=keys.shape[2] - 1)
        cos, sin = self.cos[index][:, :, None], self.sin[index][:, :, None]
        half = dim // 2
        queries, new_keys = (
            y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (queries, new_keys)
        )
        q.copy_(queries.flatten(2).view(q.shape))
        row = torch.arange(rows, device=x.device)[:, None].expand_as(position)
        fits = position < keys.shape[2]
        row, index = row[fits], index[fits]
        keys[row, :, index] = new_keys[fits].to(keys.dtype)
        values[row, :, index] = new_values[fits].to(values.dtype)


_launchers = shape_cache.section("launches", 1 << 10)


def _launcher(
    kernel: Any, like: Tensor, grid: tuple[int, ...], integers: tuple[int, ...], constants: tuple[Any, ...],
    absent: tuple[bool, ...] = (), warps: int = 4,
) -> Launcher:  # fmt: skip
    """The launcher of a kernel, shared by all layers. The last constant of these kernels is whether they overlap with
    the kernel before them.

    like: a tensor of the device and dtype. absent: which of the tensors that may be None are None.
    """
    device = like.device
    name = kernel, device, like.dtype, grid, integers, constants, absent, warps
    found = _launchers.get(name)
    if found is None:
        pdl = device.type == "cuda" and overlaps(torch.cuda.get_device_capability(device))
        options = {"launch_pdl": True} if pdl else {}
        found = Launcher(kernel, grid, device, integers, (*constants, pdl), num_warps=warps, **options)
        _launchers[name] = found
    return found
