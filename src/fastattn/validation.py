"""Checks the arguments of the op and converts them to a `Call`.

Each error names the argument, what was expected and what was passed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._compat import torch as torch_internals
from .call import LETTERS, Call, work_dtype
from .common.checks import check_device as check_device
from .common.checks import check_flag as check_flag
from .common.checks import check_tensor as check_tensor
from .common.checks import is_count as is_count
from .masks import Intervals, Segments

LONGEST = 1 << 30  #: a window larger than any sequence, small enough to be added to int32 positions
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Mask = str | Tensor | Intervals | Segments | None


class Arguments(NamedTuple):
    """The arguments of `fastattn.scaled_dot_product_attention` as the caller passes them, unchecked.

    Without `scale`, which is data, and `backend`, which is not a property of the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask = None
    sinks: Tensor | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    q_lengths: Tensor | None = None
    kv_lengths: Tensor | None = None
    return_lse: bool = False


def validated(arguments: Arguments, scale: float | None = None) -> Call:
    """The `Call` of the arguments. Raises ValueError or TypeError, naming the argument, before any launch."""
    q, k, v, mask, sinks, window, softcap, q_lengths, kv_lengths, return_lse = arguments
    check_inputs(q, k, v)
    if not torch.compiler.is_compiling() and torch_internals.transforms_active():
        raise ValueError("q: expected a tensor outside of torch.func's transforms: vmap, grad, jvp are not supported")
    if not torch.compiler.is_compiling() and torch_internals.forward_ad_active():
        _check_not_dual(arguments)
    q, k, v = _one_dtype(q, k, v)
    left, right = (-1, -1) if window is None else check_window(window)
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask: expected None, "causal", a tensor, Intervals or Segments, got {mask!r}')
        right = 0 if right < 0 else min(right, 0)
        mask = None
    lo = hi = segments = None
    if isinstance(mask, Segments):
        segments = check_segments(mask, q, k)
        if q_lengths is not None or kv_lengths is not None:
            raise ValueError("mask: Segments say how long each sequence is: expected no q_lengths or kv_lengths beside")
        if mask.causal:
            right = 0
        mask = None
    if mask is not None:
        mask, lo, hi = check_mask(mask, q, k)
    if sinks is not None:
        check_sinks(sinks, q)
    if q_lengths is not None:
        check_lengths("q_lengths", q_lengths, q)
    if kv_lengths is not None:
        check_lengths("kv_lengths", kv_lengths, q)
    q, scale = _scaled(q, scale)
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=mask,
        lo=lo,
        hi=hi,
        sinks=sinks,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        segments=segments,
        scale=scale,
        left=left,
        right=right,
        softcap=0.0 if softcap is None else check_softcap(softcap, q.dtype),
        return_lse=check_flag("return_lse", return_lse),
    )
    return call._replace(grads=_wanted(call)) if torch.is_grad_enabled() else call


def _check_not_dual(arguments: Arguments) -> None:
    """No kernel has forward-mode gradients: what follows a dual tensor would be a constant without a word."""
    for name in ("q", "k", "v", "mask", "sinks"):
        x = getattr(arguments, name)
        if isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name}: expected no tangent of torch.autograd.forward_ad: there are no forward-mode gradients"
            )


def default_scale(q: Tensor) -> float:
    """1 / sqrt(D)."""
    return 1.0 / math.sqrt(q.shape[3] or 1)


def _scaled(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a positive scale that kernels can compute with, of the same product."""
    if scale is None:
        return q, default_scale(q)
    scale = check_scale(scale, q.dtype)
    if scale <= 0.0:  # kernels track the row's maximum before they scale, which needs a positive scale
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    least = LIMITS[work_dtype(q.dtype)][0]
    if scale < least:  # float32 would round it to 0, and 0 * -inf is NaN: q takes the rest of the factor
        q, scale = q * (scale / least), least
    return q, scale


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Promotes mixed dtypes; under autocast casts as torch's attention, which is on autocast's lower-precision list."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        dtype = torch.get_autocast_dtype(device)
    elif q.dtype == k.dtype == v.dtype:
        return q, k, v
    else:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _wanted(call: Call) -> str:
    """`Call.grads`: the inputs that require a gradient."""
    inputs = ((letter, getattr(call, name)) for name, letter in LETTERS.items())
    return "".join([letter for letter, x in inputs if x is not None and x.requires_grad])


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q `[B,Hq,Sq,D]`, k `[B,Hkv,Skv,D]`, v `[B,Hkv,Skv,Dv]` are floating, on a device, Hq % Hkv == 0."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dims [batch, heads, length, dim], got {_shape(x)}")
        if x.dtype not in FLOATING:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as of q, got {x.device}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected batch {q.shape[0]} as of q, got {x.shape[0]} (shape {_shape(x)})")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head dim {q.shape[3]} as of q, got {k.shape[3]} (shape {_shape(k)})")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected {k.shape[1]} heads as of k, got {v.shape[1]} (shape {_shape(v)})")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected length {k.shape[2]} as of k, got {v.shape[2]} (shape {_shape(v)})")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {q.shape[1]} (grouped-query attention), got {k.shape[1]}"
        )


#: Smallest and largest scale and softcap, by the dtype in which scores are computed. Beyond them finite scores would
#: become 0, infinite or NaN. (A score is a sum of products, and float32 ends at 3e38.)
LIMITS = {torch.float32: (1e-30, 1e30), torch.float64: (1e-290, 1e290)}
#: Smallest and largest scale (a float) that `validated` leaves unchanged for any dtype of q.
PLAIN_SCALES = LIMITS[torch.float32]


def is_plain_scale(scale: object) -> bool:
    """True for a scale that `validated` leaves unchanged for any dtype of q."""
    least, most = PLAIN_SCALES
    return type(scale) is float and least <= scale <= most


def check_scale(scale: float, dtype: torch.dtype) -> float:
    """The scale as a float. dtype: of q, after promotion. Raises ValueError."""
    value, most = _number("scale", scale), LIMITS[work_dtype(dtype)][1]
    if not -most <= value <= most:  # not math.isfinite: torch.compile cannot trace it for a symbolic float
        raise ValueError(
            f"scale: expected a finite number of at most {most:g}, as scores are {_work(dtype)}, got {value}"
        )
    return value


def check_softcap(softcap: float, dtype: torch.dtype) -> float:
    value, (least, most) = _number("softcap", softcap), LIMITS[work_dtype(dtype)]
    if not least <= value <= most:
        raise ValueError(
            f"softcap: expected None or a finite number > 0, from {least:g} to {most:g} as scores are {_work(dtype)}, "
            f"got {value}"
        )
    return value


def _work(dtype: torch.dtype) -> str:
    return str(work_dtype(dtype)).removeprefix("torch.")


def check_window(window: tuple[int, int]) -> tuple[int, int]:
    """(left, right), each -1 (open) or more."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {window!r}")
    for side, value in zip(("left", "right"), window, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < -1:
            raise ValueError(f"window: expected {side} to be an int >= 0, or -1 for open, got {value!r}")
    return min(window[0], LONGEST), min(window[1], LONGEST)


def check_mask(mask: object, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns (4-D mask tensor, None, None) or (None, lo, hi). mask: a tensor or Intervals."""
    if isinstance(mask, Intervals):
        check_interval("mask.lo", mask.lo, q)
        check_interval("mask.hi", mask.hi, q)
        if mask.lo.shape != mask.hi.shape:
            raise ValueError(f"mask.hi: expected the shape of mask.lo, {_shape(mask.lo)}, got {_shape(mask.hi)}")
        return None, mask.lo, mask.hi
    check_tensor("mask", mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise ValueError(f"mask: expected a bool (True = attend) or a floating tensor, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected device {q.device} as of q, got {mask.device}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() > 4:
        raise ValueError(f"mask: expected at most 4 dims, got {_shape(mask)}")
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    # Not `size not in (1, whole)`: torch.compile evaluates that wrongly for symbolic sizes.
    if any(size != 1 and size != whole for size, whole in zip(mask.shape, full, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(full)}, got {_shape(mask)}")
    return mask, None, None


def check_segments(segments: Segments, q: Tensor, k: Tensor) -> Tensor:
    """Returns the table."""
    table = segments.table
    check_tensor("mask.table", table)
    if table.dtype != torch.int32:
        raise ValueError(f"mask.table: expected int32, got {table.dtype}")
    if table.device != q.device:
        raise ValueError(f"mask.table: expected device {q.device} as of q, got {table.device}")
    if table.dim() != 2 or table.shape[0] not in (2, 3, 4, 5):
        raise ValueError(f"mask.table: expected [3, segments] or [5, segments], got {_shape(table)}")
    if table.shape[0] <= 3 and q.shape[2] != k.shape[2]:
        raise ValueError(
            "mask.table: expected [5, segments], queries and keys apart, where their numbers differ, got "
            f"{_shape(table)} for {q.shape[2]} queries and {k.shape[2]} keys"
        )
    check_flag("mask.causal", segments.causal)
    return table


def check_interval(name: str, x: Tensor, q: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype != torch.int32:
        raise ValueError(f"{name}: expected int32, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as of q, got {x.device}")
    if x.dim() != 2 or x.shape[0] not in (1, q.shape[0]) or x.shape[1] not in (1, q.shape[2]):
        raise ValueError(f"{name}: expected [{q.shape[0]} or 1, {q.shape[2]} or 1], got {_shape(x)}")


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    check_tensor("sinks", sinks)
    if sinks.dtype not in FLOATING:
        raise ValueError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
        raise ValueError(f"sinks: expected [{q.shape[1]}], one per query head, got {_shape(sinks)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected device {q.device} as of q, got {sinks.device}")


def check_lengths(name: str, lengths: Tensor, q: Tensor) -> None:
    check_tensor(name, lengths)
    if lengths.dtype != torch.int32:
        raise ValueError(f"{name}: expected int32, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: expected [{q.shape[0]}], one per batch entry, got {_shape(lengths)}")
    if lengths.device != q.device:
        raise ValueError(
            f"{name}: expected device {q.device} as of q (lengths are never read on the host), got {lengths.device}"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a Python number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of a float, got one beyond it") from None


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
