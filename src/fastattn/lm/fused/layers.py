"""The steps of a decoder layer, each in few kernels, for any number of tokens: `Product`, `Rotary`, `gate`.

On a GPU the products of one token go through our own kernel, those of more through cuBLAS, which is as fast there;
elsewhere torch does all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...backends.triton.launcher import Launcher, native, overlaps
from ...shape_cache import shape_cache
from .rules import MANY_TOKENS, Launch, choose


class Product:
    """y = act(norm(x) weight^T + bias), or with `add` y += that.

    weight: `[N, K]`; gated: `[2 N, K]`, and y = silu(first half) * second half. bias: `[N]` or None; not if gated.
    gain: `[K]`: x is divided by its root mean square (eps under the root) and multiplied by it; None: it is not.
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
        self.launcher: Launcher | None = None  #: of one row

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: `[T, K]`, last stride 1. out: `[T, N]` to add to, and what is returned then; else a new one."""
        if native(x.device.type) and x.shape[0] == 1 and self.weight.is_contiguous():
            if out is None:
                out = x.new_empty((x.shape[0], self.size))
            return self._row(x, out)
        if self.gain is not None:
            x = functional.rms_norm(x, x.shape[-1:], self.gain, self.eps)
        if self.add:
            assert out is not None
            out.addmm_(x, self.weight.t())
            return out if self.bias is None else out.add_(self.bias)
        y = functional.linear(x, self.weight, self.bias)
        return gate(y) if self.gated else y

    def _row(self, x: Tensor, out: Tensor) -> Tensor:
        if self.launcher is None:
            bind(self, choose(self.size, self.weight.shape[1], self.gated, self.weight.dtype))
            assert self.launcher is not None
        self.launcher((x, self.weight, out, self.gain, self.bias), (self.eps,))
        return out


def bind(p: Product, launch: Launch) -> None:
    """Has a product of one row launched like that."""
    from .gemm_kernels import row_kernel

    constants = (p.size, p.weight.shape[1], p.gated, p.add, launch.block_n, launch.block_k)
    grid = (-(-p.size // launch.block_n),)
    absent = p.gain is None, p.bias is None
    p.launcher = _launcher(row_kernel, p.weight, grid, (), constants, absent, launch.warps)


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half, of the last dim of `[T, 2 N]`."""
    tokens, size = x.shape[0], x.shape[1] // 2
    if not native(x.device.type):
        return functional.silu(x[:, :size]) * x[:, size:]
    from .gemm_kernels import gate_kernel

    out, block = x.new_empty((tokens, size)), 1024
    _launcher(gate_kernel, x, (tokens, -(-size // block)), (x.stride(0),), (size, block))((x, out))
    return out


class Rotary:
    """Turns queries and keys by their positions, after the norms of their heads, and stores keys and values.

    cos, sin: `[P, D]`, of each position. q_gain, k_gain: `[D]` or None, of the norms.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, cos: Tensor, sin: Tensor,
        q_gain: Tensor | None = None, k_gain: Tensor | None = None, eps: float = 0.0,
    ) -> None:  # fmt: skip
        self.q_heads, self.kv_heads, self.dim = q_heads, kv_heads, cos.shape[1]
        self.cos, self.sin, self.q_gain, self.k_gain, self.eps = cos, sin, q_gain, k_gain, eps

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """The turned queries `[rows, Hq, tokens, D]`, token-major.

        x: `[rows * tokens, (Hq + 2 Hkv) D]`, contiguous: queries, keys and values of each token. keys, values: the
        cache `[rows, Hkv, C, D]`, last stride 1, written at each row's `lengths` (int32 `[rows]`) and after; tokens
        beyond C are dropped.
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
        # One token is spread over many programs, as nothing else fills the GPU; many tokens want larger loads.
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
        place = position.clamp(max=keys.shape[2] - 1)
        cos, sin = self.cos[place][:, :, None], self.sin[place][:, :, None]
        half = dim // 2
        queries, new_keys = (
            y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (queries, new_keys)
        )
        q.copy_(queries.flatten(2).view(q.shape))
        row = torch.arange(rows, device=x.device)[:, None].expand_as(position)
        fits = position < keys.shape[2]
        row, place = row[fits], place[fits]
        keys[row, :, place] = new_keys[fits].to(keys.dtype)
        values[row, :, place] = new_values[fits].to(values.dtype)


_launchers = shape_cache.section("launches", 1 << 10)


def _launcher(
    kernel: Any, like: Tensor, grid: tuple[int, ...], integers: tuple[int, ...], constants: tuple[Any, ...],
    absent: tuple[bool, ...] = (), warps: int = 4,
) -> Launcher:  # fmt: skip
    """The launcher of one of these kernels, whose last constant is whether it overlaps with the kernel before it. Made
    once for all layers.

    like: says the device and the dtype of the tensors. absent: which of those that may be None are.
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
