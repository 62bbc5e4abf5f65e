"""`LazyMask`: eager attention's additive mask, allocated only when an operation computes with it.

transformers passes a mask from the mask function, through the model's own code, to the attention function. Most models
pass it on untouched. Some compute with it: they add a bias, append columns, slice, or compute attention themselves.
Which ones do changes with every release, so a list of models cannot decide; the tensor itself does:

- A `LazyMask` has the shape, dtype and values of the mask that eager attention gets, but no memory. It holds the
  visible keys in a compact form (`Compact`), O(S) numbers. The first operation on it allocates the dense mask, and the
  model continues with that one. The attention function reads the compact form of a mask that nothing has written to.
- Where a graph is traced (torch.compile, export), a tensor subclass would break the graph. The mask is dense there, and
  carries the compact form as an attribute. Whatever computes with it makes another tensor, without the attribute;
  where nothing does, the compiler drops the dense mask as dead code. (In-place writes are not noticed there. No model
  of transformers makes them.)

`make_mask` and `compact_of` are the only functions that set and read either form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat.hf import is_tracing
from ..._compat.torch import NO_TORCH_FUNCTION, arguments_of, tree_map_only, wrapper_subclass
from ...cache.lengths import capturing
from ...masks import Intervals, Segments

_ATTRIBUTE = "_fastattn_compact"


class Band(NamedTuple):
    """A window over the first `keys` keys, its numbers known on the host: the last query stands on the last of these
    keys, and the query at position p sees `[p - left, p + right]` (-1 = open)."""

    keys: int
    left: int
    right: int


class CausalSegments(NamedTuple):
    """Causal segments, within a window, for all queries that are no padding. Queries that are padding see nothing."""

    segments: Segments
    left: int  #: -1 = open


class LiveKeys(NamedTuple):
    """One query per row, which sees the first `lengths[b]` keys, or those of them that the dense mask lets it see.

    Lengths on the device, right at every replay of a captured graph."""

    lengths: Tensor  #: int32 [B]


class Compact(NamedTuple):
    """Which keys each query sees."""

    visible: Intervals | Tensor  #: lo and hi int32 `[B, Sq | 1]`, or bool `[B, 1, Sq, Skv]`
    hint: Band | CausalSegments | LiveKeys | None = None  #: the same in the form that the fastest kernels take
    captured: bool = False  #: made while a CUDA graph was captured: the host's numbers hold for that graph

    def dense(self, keys: int) -> Tensor:
        """bool, broadcastable to `[B, 1, Sq, keys]`."""
        return self.visible if isinstance(self.visible, Tensor) else dense_intervals(self.visible, keys)

    def to(self, device: torch.device) -> Compact:
        """The same on another device."""

        def move(x: Any) -> Any:
            if isinstance(x, Segments):
                return Segments(x.table.to(device), x.causal)
            return x.to(device) if isinstance(x, Tensor) else x

        visible = self.visible
        visible = visible.to(device) if isinstance(visible, Tensor) else Intervals(*map(move, visible))
        hint = self.hint if self.hint is None else type(self.hint)(*map(move, self.hint))
        return Compact(visible, hint, self.captured)


def dense_intervals(intervals: Intervals, keys: int) -> Tensor:
    """bool `[B, 1, Sq | 1, keys]`."""
    key = torch.arange(keys, device=intervals.lo.device, dtype=torch.int32)
    return ((key >= intervals.lo[..., None]) & (key < intervals.hi[..., None]))[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, the dtype's lowest number elsewhere: what eager attention adds to the scores."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


class _State:
    """The state that a mask and its aliases share."""

    def __init__(self, compact: Compact) -> None:
        self.compact = compact
        self.dense: Tensor | None = None
        self.written = False  #: or a view of the dense mask exists, into which a write would not be noticed


class LazyMask(Tensor):
    """An additive mask `[B, 1, Sq, Skv]` that takes no memory until an operation computes with it.

    Every operation gets the dense mask in its place and returns plain tensors. Aliases, slices of everything and copies
    to another device stay lazy.
    """

    _state: _State

    @staticmethod
    def __new__(cls, compact: Compact, shape: tuple[int, ...], dtype: torch.dtype) -> LazyMask:
        visible = compact.visible
        device = visible.device if isinstance(visible, Tensor) else visible.lo.device
        with torch.inference_mode(False):  # else only inference mode could write into it
            return wrapper_subclass(cls, shape, dtype, device)

    def __init__(self, compact: Compact, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._state = _State(compact)

    __torch_function__ = NO_TORCH_FUNCTION

    @property
    def compact(self) -> Compact | None:
        """The visible keys; None once something has written into the mask, or may have."""
        return None if self._state.written else self._state.compact

    @property
    def band(self) -> Band | None:
        """The mask as a Band, where it is one and `compact` is there."""
        hint = self.compact.hint if self.compact is not None else None
        return hint if isinstance(hint, Band) else None

    def dense(self) -> Tensor:
        """The dense mask. The same tensor each time, so that writes into it persist."""
        state = self._state
        if state.dense is None:
            with torch.inference_mode(False):
                mask = additive(state.compact.dense(self.shape[-1]), self.dtype)
                state.dense = mask.expand(self.shape).contiguous()
        return state.dense

    def _share(self) -> Tensor:
        self._state.written = True
        return self.dense()

    def _another(self, compact: Compact) -> LazyMask:
        return type(self)(compact, tuple(self.shape), self.dtype)

    def _alias(self) -> LazyMask:
        alias = self._another(self._state.compact)
        alias._state = self._state
        return alias

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        mask = args[0] if args and isinstance(args[0], LazyMask) else None
        if mask is not None:
            if func in _SAME or (func is _SLICE and _is_whole(mask, *args[1:], **kwargs)):
                return mask._alias()
            device, compact = kwargs.get("device"), mask.compact
            same_dtype = kwargs.get("dtype", mask.dtype) in (None, mask.dtype)
            if func is _TO_COPY and device is not None and same_dtype and compact is not None:
                return mask._another(compact.to(torch.device(device)))
        for argument, given in _arguments(func, args, kwargs):
            if argument.alias_info is not None:  # written to, or a view of it is returned
                tree_map_only(LazyMask, LazyMask._share, given)
        given, options = tree_map_only(LazyMask, LazyMask.dense, (args, kwargs))
        out = func(*given, **options)
        for x in (*args, *kwargs.values()):
            if isinstance(x, LazyMask):
                if out is x._state.dense:
                    return x  # an operation in place returns its argument
                for part in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(part, Tensor) and _same_memory(part, x.dense()):
                        x._share()  # a view that the schema does not declare
        return out

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self._share().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._share().__reduce_ex__(protocol)  # a shallow copy is a view

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._share().__dlpack__(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyMask({list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_SLICE = torch.ops.aten.slice.Tensor
_TO_COPY = torch.ops.aten._to_copy.default


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """An operation's arguments as its schema has them, each with the value given for it."""
    for position, argument in enumerate(arguments_of(func)):
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]
        elif position < len(args):
            yield argument, args[position]


def _is_whole(mask: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return (start or 0) == 0 and step == 1 and (end is None or end >= mask.shape[dim])


def make_mask(
    visible: Intervals | Tensor, hint: Any, batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype
) -> Tensor:
    """The mask `[B, 1, Sq, Skv]` of these visible keys: lazy, or, where a graph is traced, dense with an attribute."""
    some = visible if isinstance(visible, Tensor) else visible.lo
    captured = capturing(some)
    compact = Compact(visible, hint, captured)
    shape = (batch_size, 1, q_length, kv_length)
    if captured or not is_tracing(some):
        return LazyMask(compact, shape, dtype)
    mask = additive(compact.dense(kv_length), dtype).expand(shape)
    setattr(mask, _ATTRIBUTE, compact)
    return mask


def compact_of(mask: Tensor) -> Compact | None:
    """The visible keys of a mask made here that nothing has written to; None for every other tensor."""
    if isinstance(mask, LazyMask):
        return mask.compact
    found: Compact | None = getattr(mask, _ATTRIBUTE, None)
    return found
