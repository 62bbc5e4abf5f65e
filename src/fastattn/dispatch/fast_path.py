"""The fast path: a call of a kind that was served before goes straight to its kernel.

Two calls of the op are of one kind when they differ in data alone: then validation and routing would find what they
found before. That is most of the time that a small call costs the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import debug
from .._compat import sdpa as torchs
from .._compat import torch as torch_internals
from ..backends.base import OutOfMemory
from ..call import CALL, Call
from ..masks import Intervals, Segments
from ..shape_cache import Reason, shape_cache
from ..validation import FLOATING, PLAIN_SCALES
from . import eager, registry, routes, serve
from .eager import Bound
from .native import calls

#: `Bound`s by key
_cached = shape_cache.section("calls", 1 << 12, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])


class _NotPlain(Exception):
    """An argument that only the full path can judge."""


def key_of(arguments: tuple[Any, ...], scale: Any, backend: Any) -> Any:
    """Everything of a call of the op that is not data, hashable; None when it is to take the full path.

    arguments: those of `Arguments`, in order, as they came: nothing is known to be of the right type.
    """
    if torch.compiler.is_compiling() or debug.ENABLED or torch_internals.may_be_watched():
        return None
    if not (scale is None or (type(scale) is float and _LEAST <= scale <= _MOST)):
        return None
    rest: Any
    # One function without loops for the usual arguments: nothing else takes as much of the time of a fast call.
    q, k, v, mask, sinks, window, softcap, q_lengths, kv_lengths, return_lse = arguments
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN or type(return_lse) is not bool:
        return None
    if not (backend is None or type(backend) is str):
        return None
    try:
        dtype, device = q.dtype, q.device
        # What is cached is the call after promotion, and with a mask of four dims.
        if not (k.dtype is dtype is v.dtype and k.device == device == v.device):
            return None
        if q.is_neg() or k.is_neg() or v.is_neg():
            return None
        if sinks is window is softcap is q_lengths is kv_lengths is None and (mask is None or type(mask) is str):
            rest = mask
        else:
            if isinstance(mask, Tensor) and mask.dim() != 4:
                return None
            rest = tuple([None if x is None else _KINDS[type(x)](x) for x in arguments[3:9]])
        wanted = torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad)
        return (
            q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), dtype, device, rest, return_lse,
            wanted if wanted and True in wanted else None, backend, registry.allowed() if backend is None else None,
        )  # fmt: skip
    # KeyError: of another type. RuntimeError: a sparse or nested tensor. AttributeError: no tensor.
    except (_NotPlain, KeyError, RuntimeError, AttributeError):
        return None


def cast(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments as autocast wants them (and `validated` would make them), so that their like may be known; None
    where it wants nothing. (In a model under autocast rotary embeddings leave q and k in float32.)"""
    q, k, v = arguments[:3]
    if torch.compiler.is_compiling() or torch_internals.may_be_watched():
        return None
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return None
    dtypes, device = (q.dtype, k.dtype, v.dtype), q.device.type
    if torch.float64 in dtypes or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if all([x is dtype for x in dtypes]) or any([x not in FLOATING for x in dtypes]):
        return None
    return q.to(dtype), k.to(dtype), v.to(dtype), *arguments[3:]


def bound(key: Any) -> Bound | None:
    """What the calls of a key share, where one of them has been served."""
    found: Bound | None = _cached.get(key)
    return found


def attention(
    key: Any, arguments: tuple[Any, ...], scale: float | None, bound: Bound | None = None, place: Any = None
) -> tuple[Tensor, Tensor | None] | None:
    """The output and log-sum-exp of a call; None when it is to take the full path. bound: what was kept of `bound`.
    place: see `native.calls.place`; there the next call like this one is served without Python, if it can be."""
    if bound is None:
        bound = _cached.get(key)
        if bound is None:
            return None
    factor = bound.scale if scale is None else scale
    if bound.extras is None:
        call = CALL.of((arguments[0], arguments[1], arguments[2], *eager.NO_MORE, factor, *bound.static))
    else:
        call = _call(arguments, factor, bound.static)
    if bound.offers and calls.module is not None:
        calls.offer(bound, call, arguments, scale, place)
    device = bound.device_type
    if not torch.is_autocast_enabled(device):
        return _run(bound, call)
    if bound.dtype is not torch.float64 and torch.get_autocast_dtype(device) is not bound.dtype:
        return None  # it is to be cast
    # Inside, float32 must stay float32. (torch.autocast takes 4 us to say so.)
    torch.set_autocast_enabled(device, False)
    try:
        return _run(bound, call)
    finally:
        torch.set_autocast_enabled(device, True)


def _run(bound: Bound, call: Call) -> tuple[Tensor, Tensor | None] | None:
    if call.grads:
        return eager.attention(bound, bound.names, call)
    try:
        found = bound.kernel.forward(call)
    except Exception as error:
        if serve.refused(bound.route, error, but_for=(OutOfMemory,)):  # after one the full path tries it once more
            return None
        raise
    serve.count(bound.name)
    return found


def remember(key: Any, arguments: tuple[Any, ...], call: Call, names: tuple[str, ...]) -> None:
    """Caches what a call became that took the full path. key: what `key_of` said of it."""
    if torchs.traced_by_jit():  # to which sizes are tensors
        return
    again = _call(arguments, call.scale, CALL.static(call))
    if any(x is not y for x, y in zip(CALL.tensors(again), CALL.tensors(call), strict=True)):
        return  # validation made other tensors of these
    bound = Bound(call, names, routes.route(call, names))
    if bound.generation >= 0:
        _cached[key] = bound
        if bound.offers and calls.module is None and bound.device_type == "cuda":
            calls.start()


#: The order in which `_call` gives the fields of `Call`. (By keyword it would take twice as long.)
_ORDER = ("q", "k", "v", "mask", "lo", "hi", "sinks", "q_lengths", "kv_lengths", "segments", "scale")
if (*CALL.tensor_names, *CALL.DATA) != _ORDER:
    raise TypeError(f"Call has other fields than fast_path._call gives it: {CALL.names}")


def _call(arguments: tuple[Any, ...], scale: float, static: tuple[Any, ...]) -> Call:
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
    if x.is_neg():
        raise _NotPlain
    wanted = x.requires_grad and torch.is_grad_enabled()
    return x.shape, x.stride(), x.dtype, x.device, wanted


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
_LEAST, _MOST = PLAIN_SCALES
_PLAIN = frozenset([Tensor, Parameter])
#: What an argument is besides data, by its exact type.
_KINDS: dict[type, Callable[[Any], Any]] = {
    Tensor: _tensor,
    Parameter: _tensor,
    Intervals: _tensors,
    Segments: _segments,
    tuple: _window,
    float: _itself,
    str: _itself,
}
