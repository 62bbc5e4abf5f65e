"""Layouts that fused kernels can read in place, and copies of those that they cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .._compat import torch as torch_internals
from ..call import Problem, token_major
from ..shape_cache import cached

ALIGNMENT = 16  #: bytes; cuDNN reads tensors that start or stride otherwise, silently wrong (measured, 9.19)


def readable(x: Tensor) -> Tensor:
    """`x` `[B,H,S,D]` if kernels can read it in 16-byte pieces where it lies, else a token-major copy."""
    return x if x.data_ptr() % ALIGNMENT == 0 and fits(x) else copied(x)


def fits(x: Tensor) -> bool:
    """True when the strides of `x` allow that, wherever it lies."""
    return _fits(tuple(x.shape), x.stride(), ALIGNMENT // x.element_size())


def aligned(*tensors: Tensor) -> bool:
    """True when all of them begin where 16-byte pieces do."""
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    return not addresses % ALIGNMENT


def realigned(x: Tensor) -> Tensor:
    """`x`, or a copy of it that begins where 16-byte pieces do: of the same strides where these leave no gaps."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def copied(x: Tensor) -> Tensor:
    """A token-major copy."""
    return token_major(x, *x.shape).copy_(x)


@cached(1 << 14, "layouts")
def _fits(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    if shape[3] > 1 and strides[3] != 1:
        return False
    apart = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return not any(stride % step for stride in apart) and (shape[2] == 1 or strides[2] >= shape[3])


class Fresh:
    """Uninitialised tensors of one shape, one layout and one dtype, on one device: the quickest way to them.

    here: makes one; a GPU must be the current one.
    """

    __slots__ = ("_index", "dtype", "here", "shape", "strides")

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), dtype
        self._index = device.index if device.type == "cuda" else None
        self.here: Callable[[], Tensor] = partial(torch_internals.allocator(device), self.shape, self.strides, dtype)

    def __call__(self) -> Tensor:
        """Makes one, whichever GPU is the current one."""
        if self._index is not None and self._index != torch_internals.current_device():
            with torch.cuda.device(self._index):
                return self.here()
        return self.here()


class TokenMajor(Fresh):
    """The same for token-major tensors."""

    __slots__ = ()

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        """like: says dtype and device."""
        batch, heads, length, dim = shape
        strides = token_major(like.new_empty(0, device="meta"), batch, heads, length, dim).stride()
        super().__init__(shape, strides, like.dtype, like.device)


class Contiguous(Fresh):
    """The same for contiguous tensors."""

    __slots__ = ()

    def __init__(self, like: Tensor) -> None:
        """like: says shape, dtype and device."""
        strides = torch.empty(like.shape, device="meta").stride()
        super().__init__(like.shape, strides, like.dtype, like.device)


class Output(TokenMajor):
    """The same for the outputs of calls of one problem."""

    __slots__ = ()

    def __init__(self, p: Problem, q: Tensor) -> None:
        super().__init__((p.batch, p.q_heads, p.q_len, p.value_dim), q)


class RowNumbers(Fresh):
    """The same for the log-sum-exps: float32 `[B, Hq, Sq]`."""

    __slots__ = ()

    def __init__(self, p: Problem, q: Tensor) -> None:
        shape = p.batch, p.q_heads, p.q_len
        super().__init__(shape, (p.q_heads * p.q_len, p.q_len, 1), torch.float32, q.device)
