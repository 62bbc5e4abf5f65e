"""The fast path: a call of a kind that was served before goes straight to its kernel.

Two calls of the op are of one kind when they differ in data alone: then validation and routing would find what they
found before. That is half of the time that a small call costs the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import debug
from .._compat import torch as torch_internals
from ..backends.base import OutOfMemory
from ..call import CALL, Call
from ..masks import Intervals, Segments
from ..shape_cache import Reason, shape_cache
from ..validation import Arguments, default_scale, is_plain_scale
from . import registry, routes, serve

#: `Cached` by key
_cached = shape_cache.section("calls", 1 << 12, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])


class Cached(NamedTuple):
    """What an earlier call of this kind became."""

    route: routes.Route
    static: tuple[Any, ...]  #: the static options of its `Call`
    default_scale: float


class _NotPlain(Exception):
    """An argument that only the full path can judge."""


def key_of(arguments: Arguments, scale: Any, backend: Any) -> Any:
    """Everything of a call of the op that is not data, hashable; None when it is to take the full path.

    Takes the arguments as they came: nothing is known to be of the right type.
    """
    if torch.compiler.is_compiling() or debug.ENABLED or torch_internals.may_be_watched():
        return None
    if not (scale is None or is_plain_scale(scale)) or not (backend is None or type(backend) is str):
        return None
    try:
        kinds = tuple([None if x is None else _KINDS[type(x)](x) for x in arguments])
        q, mask = arguments.q, arguments.mask
        # What is cached is the call after promotion and casts, and with a mask of four dims.
        if not q.dtype is arguments.k.dtype is arguments.v.dtype or torch.is_autocast_enabled(q.device.type):
            return None
        if isinstance(mask, Tensor) and mask.dim() != 4:
            return None
    # KeyError: of another type. RuntimeError: a sparse or nested tensor, a meta device. AttributeError: no tensor.
    except (_NotPlain, KeyError, RuntimeError, AttributeError):
        return None
    return kinds, backend, registry.allowed() if backend is None else None


def attention(key: Any, arguments: Arguments, scale: float | None) -> tuple[Tensor, Tensor | None] | None:
    """The output and log-sum-exp of a call; None when it is to take the full path."""
    cached: Cached | None = _cached.get(key)
    if cached is None:
        return None
    call = _call(arguments, cached.default_scale if scale is None else scale, cached.static)
    route = cached.route
    try:
        found = route.kernel.forward(call)
    except Exception as error:
        if serve.refused(route, error, but_for=(OutOfMemory,)):  # after one the full path tries it once more
            return None
        raise
    serve.count(route.backend.name)
    return found


def remember(key: Any, arguments: Arguments, call: Call, names: tuple[str, ...]) -> None:
    """Caches what a call became that took the full path. key: what `key_of` said of it."""
    again = _call(arguments, call.scale, CALL.static(call))
    if any(x is not y for x, y in zip(CALL.tensors(again), CALL.tensors(call), strict=True)):
        return  # validation made other tensors of these
    route = routes.route(call, names)
    if route.lasts:
        _cached[key] = Cached(route, CALL.static(call), default_scale(call.q))


#: The order in which `_call` gives the fields of `Call`. (By keyword it would take twice as long.)
_ORDER = ("q", "k", "v", "mask", "lo", "hi", "sinks", "q_lengths", "kv_lengths", "segments", "scale")
if (*CALL.tensor_names, *CALL.DATA) != _ORDER:
    raise TypeError(f"Call has other fields than fast_path._call gives it: {CALL.names}")


def _call(arguments: Any, scale: float, static: tuple[Any, ...]) -> Call:
    """The call of arguments that need no validation."""
    q, k, v, mask, sinks, _, _, q_lengths, kv_lengths, _ = arguments  # (to unpack them is faster than to name them)
    dense = lo = hi = segments = None
    kind = type(mask)
    if kind is Intervals:
        lo, hi = mask
    elif kind is Segments:
        segments = mask.table
    elif kind is not str:
        dense = mask
    return Call(q, k, v, dense, lo, hi, sinks, q_lengths, kv_lengths, segments, scale, *static)


def _tensor(x: Tensor) -> Any:
    if x.is_neg() or (x.requires_grad and torch.is_grad_enabled()):
        raise _NotPlain
    return x.shape, x.stride(), x.dtype, x.device


def _tensors(x: Intervals) -> Any:
    if not all(type(part) is Tensor for part in x):
        raise _NotPlain
    return tuple([_tensor(part) for part in x])


def _segments(x: Segments) -> Any:
    if type(x.table) is not Tensor or type(x.causal) is not bool:
        raise _NotPlain
    return _tensor(x.table), _FLAGS[x.causal]


def _window(x: tuple[Any, ...]) -> Any:
    if [type(side) for side in x] != [int, int]:
        raise _NotPlain
    return x


def _itself(x: Any) -> Any:
    return x


_FLAGS = {True: object(), False: object()}  # Python holds True and 1.0 to be equal; validation does not
#: What an argument is besides data, by its exact type.
_KINDS: dict[type, Callable[[Any], Any]] = {
    Tensor: _tensor,
    Parameter: _tensor,
    Intervals: _tensors,
    Segments: _segments,
    tuple: _window,
    bool: _FLAGS.__getitem__,
    float: _itself,
    str: _itself,
}
