"""The short way for a call like one that was made before: validated, routed and bound to its kernels once.

A call is like another when everything about it is the same that is not data. Then validation would find what it found
before, and all that is left to do is to run: half of the time that a small call costs the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import debug
from ..backends.base import OutOfMemory
from ..backends.errors import failure_of
from ..call import Call
from ..masks import Intervals, Segments
from ..validation import LIMITS
from . import operators as ops
from . import routing as dispatch


class Known(NamedTuple):
    """What an earlier call became."""

    route: dispatch.Route
    rest: tuple[Any, ...]  #: its fields from `left` on
    default_scale: float


def name_of(
    q: Any, k: Any, v: Any, scale: Any, mask: Any, sinks: Any, window: Any, softcap: Any, q_lengths: Any,
    kv_lengths: Any, return_lse: Any, backend: Any,
) -> Any:  # fmt: skip
    """All that is not data of a call of the op, hashable; None when the call is to go the long way.

    Takes the arguments as they came: nothing is known to be of the right type. Python holds 1, 1.0 and True to be
    equal, validation does not, hence the looks at types.
    """
    if debug.ENABLED or not ops.plain(q, k, v):
        return None
    if not q.dtype is k.dtype is v.dtype:  # what was remembered is the call after promotion
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if scale is not None and not (type(scale) is float and _LEAST <= scale <= _MOST):
        return None
    if return_lse is not False and return_lse is not True:
        return None
    if backend is not None and type(backend) is not str:
        return None
    if mask is not None and type(mask) is not str:
        if type(mask) is Intervals:
            mask = _tensor(mask.lo), _tensor(mask.hi)
        elif type(mask) is Segments and (mask.causal is True or mask.causal is False):
            mask = _tensor(mask.table), mask.causal
        else:
            return None
        if _ODD in mask:
            return None
    options: Any = None
    if not (window is softcap is sinks is q_lengths is kv_lengths is None):
        if window is not None and not (type(window) is tuple and [type(x) for x in window] == [int, int]):
            return None
        if softcap is not None and type(softcap) is not float:
            return None
        if sinks is not None and torch.is_grad_enabled() and getattr(sinks, "requires_grad", False):
            return None
        options = window, softcap, _tensor(sinks), _tensor(q_lengths), _tensor(kv_lengths)
        if _ODD in options:
            return None
    device = q.device
    if device.type == "meta" or torch.is_autocast_enabled(device.type):
        return None
    try:
        tensors = (
            q.shape, q.stride(), q.dtype, device,
            k.shape, k.stride(), k.dtype, k.device,
            v.shape, v.stride(), v.dtype, v.device,
        )  # fmt: skip
    except RuntimeError:  # sparse or nested
        return None
    return tensors, mask, options, return_lse, backend, dispatch.allowed() if backend is None else None


_ODD = "no plain tensor"
_LEAST, _MOST = LIMITS[torch.float32]  #: scales beyond it validation changes or refuses


def _tensor(x: Any) -> Any:
    """All that is not data of a plain dense tensor, `_ODD` for anything else but None."""
    if x is None:
        return None
    if not (type(x) is Tensor or type(x) is Parameter) or x.layout != torch.strided or x.is_nested or x.is_neg():
        return _ODD
    return x.shape, x.stride(), x.dtype, x.device


def run(
    name: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Any, sinks: Tensor | None, window: Any,
    softcap: Any, q_lengths: Tensor | None, kv_lengths: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """The result of a call whose like was remembered; None when none was."""
    known: Known | None = dispatch.fast_path.get(name)
    if known is None:
        return None
    lo, hi = mask if type(mask) is Intervals else (None, None)
    segments = mask.table if type(mask) is Segments else None
    scale = known.default_scale if scale is None else scale
    call = Call(q, k, v, None, lo, hi, sinks, q_lengths, kv_lengths, segments, scale, *known.rest)
    route = known.route
    try:
        found = route.run(call)
    except Exception as error:
        failure = failure_of(error, q.device)
        if failure is None:
            raise
        if not isinstance(failure, OutOfMemory):  # else the long way tries it once more
            dispatch.refuse(route.backend.name, route.problem, failure)
        return None
    dispatch.count(route.backend.name)
    return found


def remember(name: Any, call: Call, names: tuple[str, ...]) -> None:
    """Takes a call that was served the long way, and what `name_of` said of it."""
    default = 1.0 / math.sqrt(call.q.shape[3] or 1)
    route = dispatch.route(call, names)
    if route.lasts:
        dispatch.fast_path[name] = Known(route, call[11:], default)
