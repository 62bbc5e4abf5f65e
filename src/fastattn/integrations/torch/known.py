"""Kinds of calls of torch's function that were decided before: one key, one look-up, and the call is at its kernel.

The key is the op's own (`dispatch/fast_path.py`) with what torch's function has besides; so what has no such key takes
the long way (`decide.py`), as does the first call of a kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..._compat import sdpa as torchs
from ...dispatch import fast_path, routes
from ...dispatch.eager import Bound
from ...dispatch.native import calls
from ...shape_cache import Reason, shape_cache
from .decide import Decision, autocast_dtype

#: By kind of call: what the op's calls of its key share; or, where torch serves it, why.
_known = shape_cache.section("drop-in calls", 1 << 12, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])


def kind_of(arguments: tuple[Any, ...], scale: Any, enable_gqa: bool) -> tuple[Any, bool] | None:
    """Everything of a usual call but its data; None for one that is to take the long way. arguments: of the op, in its
    order, if the call is to mean the same to it."""
    key = fast_path.key_of(arguments, scale, None)
    return None if key is None else (key, enable_gqa)


def place(enable_gqa: bool) -> tuple[Any, Any] | None:
    """See `native.calls.place`: of a usual call."""
    return calls.place(None, _GROUPED if enable_gqa else _NOT_GROUPED)


_GROUPED, _NOT_GROUPED = "torch's function, grouped", "torch's function"


def is_usual(mask: Any, dropout_p: Any, is_causal: Any, enable_gqa: Any) -> bool:
    """Whether a call may be known, as far as its tensors do not matter."""
    if is_causal.__class__ is not bool or enable_gqa.__class__ is not bool or (is_causal and mask is not None):
        return False
    if mask is not None and mask.__class__ is not Tensor and mask.__class__ is not Parameter:
        return False  # what else the op takes as a mask is none for torch
    if dropout_p.__class__ not in _NUMBERS or dropout_p:
        return False
    return not (torchs.insists_on_torch() or torchs.traced_by_jit())


_NUMBERS = frozenset([float, int])


def find(kind: tuple[Any, bool], query: Tensor) -> Bound | str | None:
    """What calls of this kind share, or why torch serves them; None: it is not known."""
    found: Bound | str | None = _known.get(kind)
    # (Who has kept a `Bound` compares its dtype with autocast's.)
    return None if found.__class__ is str and torch.is_autocast_enabled(query.device.type) else found


def remember(kind: tuple[Any, bool], found: Decision, query: Tensor, mask: Any, generation: int) -> None:
    """Remembers what a call of this kind has led to. generation: of the routes, before that was found."""
    if found.why_torch:
        if not found.lasts or autocast_dtype(query) is not None:
            return
        _known[kind] = found.why_torch
    else:
        bound = fast_path.bound(kind[0]) if found.as_it_is else None
        if bound is None or (mask is not None and mask.dtype not in (torch.bool, query.dtype)):
            return  # autocast would round such a mask
        _known[kind] = bound
    # Whoever drops entries drops the routes first: what was found before that is not to stay behind it.
    if routes.generation() != generation:
        _known.pop(kind, None)
