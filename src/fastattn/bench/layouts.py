"""The layouts that other packages want q, k and v in, and what they give back."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Operands(Protocol):
    """What an adapter reads of a call's tensors, whichever list of calls it is from."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor | None: ...  #: int32 [B]
    @property
    def starts(self) -> Tensor | None: ...  #: int32 [N + 1], of packed sequences


def token_major(x: Operands) -> tuple[Tensor, ...]:
    """`[B, S, H, D]`."""
    return tuple(t.transpose(1, 2) for t in (x.q, x.k, x.v))


def to_packed(x: Operands) -> tuple[Tensor, ...]:
    """`[tokens, heads, dim]` of the one batch entry."""
    return tuple(t[0].transpose(0, 1) for t in (x.q, x.k, x.v))


def from_packed(out: Tensor) -> Tensor:
    """The way back."""
    return out.transpose(0, 1)[None]


def first(found: Any) -> Any:
    """The output, which some calls give with the log-sum-exp behind it."""
    return found[0] if isinstance(found, tuple) else found
