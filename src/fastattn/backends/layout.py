"""Layouts that fused kernels can read in place, and copies of those that they cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def copied(x: Tensor) -> Tensor:
    """A token-major copy."""
    return token_major(x, *x.shape).copy_(x)


@cached(1 << 14, "layouts")
def _fits(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    if shape[3] > 1 and strides[3] != 1:
        return False
    apart = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return not any(stride % step for stride in apart) and (shape[2] == 1 or strides[2] >= shape[3])


class TokenMajor:
    """Makes uninitialised token-major tensors of one shape for calls of one kind, the quickest way there is."""

    __slots__ = ("_as_like", "_shape", "_strides")

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        """like: as the tensors that are given to every call, which say dtype and device."""
        batch, heads, length, dim = self._shape = tuple(shape)
        self._strides = token_major(like.new_empty(0, device="meta"), batch, heads, length, dim).stride()
        self._as_like = (like.shape, like.stride()) == (self._shape, self._strides)  # empty_like is 2 us faster

    def __call__(self, like: Tensor) -> Tensor:
        if self._as_like:
            return torch.empty_like(like)
        return torch.empty_strided(self._shape, self._strides, dtype=like.dtype, device=like.device)


class Output(TokenMajor):
    """The same for the outputs of calls of one problem and one layout of q."""

    __slots__ = ()

    def __init__(self, p: Problem, q: Tensor) -> None:
        super().__init__((p.batch, p.q_heads, p.q_len, p.value_dim), q)
