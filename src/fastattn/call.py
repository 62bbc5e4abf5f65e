"""What a call is: the types that pass between the layers.

`Call` is one attention call with its tensors. `CALL` is what follows from its fields: the operators' schemas, the keys
of caches, what autograd saves. `Problem` is everything about a call that is not data: backends accept or refuse a call
by its problem alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Call(NamedTuple):
    """One validated attention call. Shapes as in `fastattn.scaled_dot_product_attention`.

    The causal mask and the window are one thing here, a band: a query at position p sees the keys
    `[p - left, p + right]`, -1 meaning open; "causal" is `right = 0`. With segments p is counted within the segment.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None  #: bool or additive, 4-D, every dim 1 or full
    lo: Tensor | None = None  #: int32 [B|1, Sq|1], first visible key
    hi: Tensor | None = None  #: int32 [B|1, Sq|1], one past the last visible key
    sinks: Tensor | None = None  #: [Hq]
    q_lengths: Tensor | None = None  #: int32 [B]
    kv_lengths: Tensor | None = None  #: int32 [B]
    segments: Tensor | None = None  #: int32 [2|3|4|5, N]: `masks.Segments.table`
    scale: float = 1.0
    left: int = -1
    right: int = -1
    softcap: float = 0.0  #: 0 = off
    return_lse: bool = False  #: the caller wants the log-sum-exp
    grads: str = ""  #: which inputs need a gradient, a subset of "qkvms" (m: mask, s: sinks) in this order


class Gradients(NamedTuple):
    """Gradients of a `Call`'s inputs; None where none was asked for. `mask` and `sinks` have their input's shape."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None


#: For each tensor that may have a gradient its letter in `Call.grads`.
LETTERS = {name: name[0] for name in Gradients._fields}


_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}


class Fields:
    """What follows from the fields of a call's type, in one place: to add a field to `Call` is enough.

    Tensors come first, then options; of these first the ones that are data. A field's type gives its type in the
    schema of an operator.
    """

    #: Options that are data: what is cached serves every value of them.
    DATA = ("scale",)

    def __init__(self, call_type: Any) -> None:
        """call_type: a NamedTuple. Raises TypeError where a field's type has none in a schema, or is out of order."""
        types = {name: kind for name, kind in get_type_hints(call_type).items() if name in call_type._fields}
        for name, kind in types.items():
            if kind not in _SCHEMA:
                raise TypeError(f"{name}: {kind} has no type in the schema of an operator")
        self.type = call_type
        #: The call of all fields' values, in order, as one tuple: the type itself takes half as long again.
        self.of: Callable[[tuple[Any, ...]], Any] = partial(tuple.__new__, call_type)
        self.names: tuple[str, ...] = call_type._fields
        self.tensor_names = tuple([name for name, kind in types.items() if kind in (Tensor, Tensor | None)])
        self.static_names = tuple([name for name in self.names if name not in (*self.tensor_names, *self.DATA)])
        if self.names != (*self.tensor_names, *self.DATA, *self.static_names):
            raise TypeError(f"{call_type.__name__}: expected tensors, then {self.DATA}, then other options")
        #: The arguments of an operator that takes the call.
        self.schema = ", ".join(f"{_SCHEMA[kind]} {name}" for name, kind in types.items())
        self._tensors = slice(len(self.tensor_names))
        self._options = slice(len(self.tensor_names), None)
        self._static = slice(len(self.names) - len(self.static_names), None)

    def tensors(self, call: Any) -> tuple[Tensor | None, ...]:
        """The values of the tensor fields, in order."""
        return call[self._tensors]  # type: ignore[no-any-return]

    def options(self, call: Any) -> tuple[Any, ...]:
        """The values of the other fields, in order."""
        return call[self._options]  # type: ignore[no-any-return]

    def static(self, call: Any) -> tuple[Any, ...]:
        """The values of the options that are not data, in order."""
        return call[self._static]  # type: ignore[no-any-return]

    def join(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        """The call of which `tensors` and `options` are the parts."""
        return self.of((*tensors, *options))

    def unpack(self, arguments: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """The call that an operator's arguments begin with, and the arguments after it."""
        count = len(self.names)
        return self.type(*arguments[:count]), arguments[count:]

    def kind(self, call: Any) -> Any:
        """Everything of a call that is not data, hashable: calls of one kind have one route and one bound kernel."""
        return tuple(self.layouts(call)), call[self._static]

    def layouts(self, call: Any) -> list[Any]:
        """Everything of the tensors that is not data."""
        return [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in call[self._tensors]]

    def gradients(self, found: Gradients, wanted: str) -> list[Tensor | None]:
        """For each field in order its gradient; None where it has none, or `wanted` (as `Call.grads`) names it not."""
        return [getattr(found, name) if LETTERS.get(name, "-") in wanted else None for name in self.names]


CALL = Fields(Call)


@dataclass(frozen=True, slots=True)
class Problem:
    """A call without its data: shapes, dtypes, features, device. Hashable; never holds strides, scale or lengths."""

    device: str  #: torch device type
    index: int  #: device index, -1 on the CPU
    capability: tuple[int, int]  #: compute capability, (0, 0) without a GPU
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    mask: str  #: "none", "bool", "additive", "intervals" or "segments"
    mask_shape: tuple[int, ...]  #: of the tensor, broadcast dims 1; of lo for intervals; of the table for segments
    mask_dtype: torch.dtype | None
    left: int
    right: int
    softcap: float
    sinks: bool
    q_lengths: bool
    kv_lengths: bool
    return_lse: bool
    grads: str
    backward: bool = False  #: what is to be computed: the gradients, from what the forward gave; else the forward
    deterministic: bool = False  #: of a backward: under torch's deterministic algorithms

    @property
    def group(self) -> int:
        """Query heads per K/V head."""
        return self.q_heads // self.kv_heads

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def banded(self) -> bool:
        return self.left >= 0 or self.right >= 0

    @property
    def dense_mask(self) -> bool:
        """True when the call holds a bool or additive tensor."""
        return self.mask in ("bool", "additive")

    @property
    def masked_rows(self) -> bool:
        """True when the call holds a bool or additive tensor with a row for each query."""
        return self.dense_mask and self.mask_shape[2] > 1

    @property
    def masked_keys(self) -> bool:
        """True when the call holds a bool or additive tensor that is the same for all queries."""
        return self.dense_mask and self.mask_shape[2] == 1

    @property
    def may_have_empty_rows(self) -> bool:
        """True unless shapes alone prove that every query sees a key. (Lengths and masks are data: they may not.)"""
        if self.mask != "none" or self.q_lengths or self.kv_lengths:
            return True
        # The first query stands at kv_len - q_len, the last at kv_len - 1.
        return (0 <= self.right < self.q_len - self.kv_len) or self.kv_len == 0

    @property
    def empty(self) -> bool:
        """True when there is nothing to compute: no query or no key."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.kv_len, self.head_dim, self.value_dim)

    @staticmethod
    def of(call: Call, backward: bool = False) -> Problem:
        q, k, v, mask, lo = call.q, call.k, call.v, call.mask, call.lo
        batch, q_heads, q_len, head_dim = q.shape
        kind: str = "none"
        shape: tuple[int, ...] = ()
        dtype = None
        if mask is not None:
            kind, shape, dtype = ("bool" if mask.dtype == torch.bool else "additive"), tuple(mask.shape), mask.dtype
        elif lo is not None:
            kind, shape, dtype = "intervals", tuple(lo.shape), lo.dtype
        elif call.segments is not None:
            kind, shape, dtype = "segments", tuple(call.segments.shape), call.segments.dtype
        device = q.device
        index = -1 if device.index is None else device.index
        return Problem(
            device=device.type,
            index=index,
            capability=_capability(index) if device.type == "cuda" else (0, 0),
            dtype=q.dtype,
            batch=batch,
            q_heads=q_heads,
            kv_heads=k.shape[1],
            q_len=q_len,
            kv_len=k.shape[2],
            head_dim=head_dim,
            value_dim=v.shape[3],
            mask=kind,
            mask_shape=shape,
            mask_dtype=dtype,
            left=call.left,
            right=call.right,
            softcap=call.softcap,
            sinks=call.sinks is not None,
            q_lengths=call.q_lengths is not None,
            kv_lengths=call.kv_lengths is not None,
            return_lse=call.return_lse,
            grads=call.grads,
            backward=backward,
            deterministic=backward and torch.are_deterministic_algorithms_enabled(),
        )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def token_major(
    like: Tensor, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised `[batch, heads, length, dim]` tensor whose memory runs `[batch, length, heads, dim]`.

    The one layout of every output and gradient: it is what a model's projections read and write, and, unlike a layout
    that follows the inputs', it is known when a graph is traced.
    """
    return like.new_empty((batch, length, heads, dim), dtype=dtype or like.dtype).transpose(1, 2)


def as_token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[B,H,S,D]` in that dtype and in the layout of every output and gradient."""
    batch, heads, length, dim = x.shape
    found = token_major(x, batch, heads, length, dim, dtype)
    return x if x.dtype == dtype and x.stride() == found.stride() else found.copy_(x)


def dtypes_of(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    """Of each its dtype."""
    return [None if x is None else x.dtype for x in tensors]


def in_dtypes(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Any]:
    """What autograd saved, in the dtypes that it had (`dtypes_of`): hooks of saved tensors may bring back others, which
    a kernel that gets addresses would misread."""
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, accumulation and log-sum-exp: float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
