"""transformers' mask functions: which one a function is, and the values that it was made with.

transformers describes a mask by a function of (batch, head, query, key) indices, composed of a few closures
(`masking_utils.py`), and passes no other description of it to `AttentionMaskInterface`. Without reading the closures, a
mask could only be evaluated for every query and key. This module alone reads them; a function is read only if

- it was made by one of the factories below, which, in the installed version, make functions that give the expected
  answers on two rows of six positions (`understood`, once at import);
- its closure has the variables that are expected.

Any other function is not read (`read` returns None), and the caller evaluates it: slower, as right. Imports
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .versions import need

_masking: Any = need("transformers", "transformers.masking_utils")
causal_mask_function = need("transformers", "transformers.masking_utils.causal_mask_function")
bidirectional_mask_function = need("transformers", "transformers.masking_utils.bidirectional_mask_function")

_IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]], device="cpu")
_POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]], device="cpu")
_PADDING = torch.tensor([0, 1], device="cpu")


class _Kind(NamedTuple):
    """One of transformers' mask functions."""

    variables: tuple[str, ...]  #: of its closure, in alphabetical order, as Python keeps them
    make: Callable[[Any], Any]  #: makes one of a masking_utils module
    expected: Callable[..., Any]  #: what that one has to answer for (row, query, key)


#: By qualified name.
_KINDS: dict[str, _Kind] = {
    "causal_mask_function": _Kind((), lambda m: m.causal_mask_function, lambda b, q, k: k <= q),
    "bidirectional_mask_function": _Kind(
        (), lambda m: m.bidirectional_mask_function, lambda b, q, k: (k == k) & (q == q)
    ),
    "and_masks.<locals>.and_mask": _Kind(
        ("mask_functions",),
        lambda m: m.and_masks(m.causal_mask_function, m.sliding_window_overlay(2)),
        lambda b, q, k: (k <= q) & (k > q - 2),
    ),
    "sliding_window_overlay.<locals>.inner_mask": _Kind(
        ("sliding_window",),
        lambda m: m.sliding_window_overlay(2),
        lambda b, q, k: (k > q - 2) & (q == q),
    ),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": _Kind(
        ("sliding_window",),
        lambda m: m.sliding_window_bidirectional_overlay(2),
        lambda b, q, k: (q - k <= 2) & (k - q <= 2),
    ),
    "chunked_overlay.<locals>.inner_mask": _Kind(
        ("chunk_size", "left_padding"),
        lambda m: m.chunked_overlay(2, _PADDING),
        lambda b, q, k: (
            (q - _PADDING[b]).div(2, rounding_mode="floor") == (k - _PADDING[b]).div(2, rounding_mode="floor")
        ),
    ),
    "packed_sequence_mask_function.<locals>.inner_mask": _Kind(
        ("packed_sequence_mask",),
        lambda m: m.packed_sequence_mask_function(_IDS),
        lambda b, q, k: _IDS[b, q] == _IDS[b, k],
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _Kind(
        ("mask_function", "position_ids"),
        lambda m: m.remap_positions_for_packed_sequence(m.causal_mask_function, _POSITIONS),
        lambda b, q, k: _POSITIONS[b, k] <= _POSITIONS[b, q],
    ),
}


def _answers_as_expected(module: Any, name: str) -> bool:
    row = torch.arange(2, device="cpu")[:, None, None]
    query, key = torch.arange(6, device="cpu")[:, None], torch.arange(6, device="cpu")
    try:
        function = _KINDS[name].make(module)
        if function.__qualname__ != name:
            return False
        found = torch.as_tensor(function(row, torch.zeros_like(row), query, key))
        return torch.equal(found.expand(2, 6, 6), _KINDS[name].expected(row, query, key).expand(2, 6, 6))
    except Exception:  # another version's function may take anything
        return False


def understood(module: Any) -> frozenset[str]:
    """The qualified names of a module's mask functions that answer as expected."""
    return frozenset(name for name in _KINDS if _answers_as_expected(module, name))


UNDERSTOOD = understood(_masking)


def read(function: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """The qualified name of a mask function and the variables of its closure; None for a function not understood."""
    for plain, name in (
        (causal_mask_function, "causal_mask_function"),
        (bidirectional_mask_function, "bidirectional_mask_function"),
    ):
        if function is plain:
            return (name, {}) if name in UNDERSTOOD else None
    if torch.compiler.is_compiling():
        return None  # torch.compile cannot trace the reading of a closure
    name = getattr(function, "__qualname__", "")
    if name not in UNDERSTOOD or getattr(function, "__module__", "") != causal_mask_function.__module__:
        return None
    code, variables = getattr(function, "__code__", None), _KINDS[name].variables
    if code is None or code.co_freevars != variables:
        return None
    cells = getattr(function, "__closure__", None) or ()
    return name, dict(zip(variables, (cell.cell_contents for cell in cells), strict=True))
