"""flash-attn's arguments: how they become the op's, what is refused, and the names that errors give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.checks import check_flag, check_tensor
from ...dispatch.registry import BackendError
from ...validation import FLOATING

#: What flash-attn has and fastattn has not. Each is refused when it is given.
REFUSED = {
    "qv": "scores of latent attention's values: concatenate q and qv, k and v along their last dim",
    "q_descale": "FP8 inputs",
    "k_descale": "FP8 inputs",
    "v_descale": "FP8 inputs",
    "cu_seqlens_k_new": "new keys of different numbers: store them in the cache before the call",
}


class Options(NamedTuple):
    """What all of the functions share, in the op's terms."""

    scale: float | None
    left: int  #: keys before a query's position that it sees, -1: all
    right: int  #: keys behind it, -1: all; 0 where the call is causal
    softcap: float | None
    sinks: Tensor | None

    @property
    def window(self) -> tuple[int, int] | None:
        return None if self.left < 0 and self.right < 0 else (self.left, self.right)


def options(
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, learnable_sink: Tensor | None = None
) -> Options:
    """The op's options. Raises ValueError, naming flash-attn's argument."""
    left, right = _window(window_size)
    if check_flag("causal", causal):
        right = 0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise ValueError(f"softcap: expected a Python number, 0 for none, got {type(softcap).__name__}")
    return Options(softmax_scale, left, right, None if softcap <= 0 else softcap, learnable_sink)


def _window(window_size: Any) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: expected a pair (left, right), got {window_size!r}")
    found = []
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise ValueError(f"window_size: expected ints, below 0 or None for open, got {window_size!r}")
        found.append(-1 if side is None or side < 0 else side)
    return found[0], found[1]


def refuse(**arguments: Any) -> None:
    """Raises ValueError for an argument of `REFUSED` that is given, and for an attention_chunk."""
    for name, value in arguments.items():
        if name == "attention_chunk":
            if value:
                raise ValueError(f"attention_chunk: expected 0, got {value!r}: the op's Intervals describe chunks")
        elif value is not None:
            raise ValueError(f"{name}: expected None, fastattn does not offer it ({REFUSED[name]})")


def check_hints(num_splits: Any = 0, pack_gqa: Any = None, sm_margin: Any = 0) -> None:
    """Checks what says how a kernel is launched, not what it computes: fastattn chooses that itself."""
    for name, value in (("num_splits", num_splits), ("sm_margin", sm_margin)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an int >= 0, got {value!r}")
    if pack_gqa is not None:
        check_flag("pack_gqa", pack_gqa)


def check_dropout(dropout_p: Any) -> float:
    """dropout_p as a float. Raises ValueError."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p!r}")
    return float(dropout_p)


def check_dims(dims: str, **tensors: Any) -> None:
    """Raises unless each is a tensor of as many dims as `dims` names, such as "batch, length, heads, dim"."""
    count = len(dims.split(","))
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dim() != count:
            raise ValueError(f"{name}: expected {count} dims [{dims}], got {list(x.shape)}")


def check_packed(name: str, x: Any, count: int, dims: str) -> None:
    """Raises unless x is a tensor with the dims that are named, of which the third to last has `count` entries."""
    check_dims(dims, **{name: x})
    if x.shape[-3] != count:
        raise ValueError(f"{name}: expected {count} tensors in its dim {x.dim() - 3} of [{dims}], got {list(x.shape)}")


def check_ints(name: str, x: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises unless x is int32 of that shape, on the device of `like`, which is q."""
    check_tensor(name, x)
    if x.dtype != torch.int32 or x.shape != shape:
        raise ValueError(f"{name}: expected int32 {list(shape)}, got {x.dtype} {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as of q, got {x.device}")


def check_length(name: str, value: Any) -> int:
    """A greatest length: an int, or a tensor that holds one, which is read on the host then."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise ValueError(f"{name}: expected the greatest length, an int >= 0, got {value!r}")
    return value  # type: ignore[return-value]


#: The op's names for what the functions call otherwise.
OTHER_NAMES = {"scale": "softmax_scale", "sinks": "learnable_sink", "cu_seqlens_kv": "cu_seqlens_k"}


def renamed(error: Exception, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> Exception:
    """What the op raised, about flash-attn's argument. names: how the caller knows q, k and v."""
    if isinstance(error, BackendError):
        return error
    check_inputs(q, k, v, names)
    name, colon, rest = str(error).partition(":")
    other = {**OTHER_NAMES, **dict(zip("qkv", names))}.get(name, name)
    return error if other == name else type(error)(f"{other}{colon}{rest}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """Raises ValueError where dtypes, devices or shapes of q `[..., Hq, D]`, k and v do not fit each other.

    Only called when something is wrong: the op's own check says the same of the transposed shapes.
    """
    _, key, value = names
    for name, x in zip(names, (q, k, v)):
        if x.dtype not in FLOATING:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as of q, got {x.device}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if k.dim() == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{key}: expected batch {q.shape[0]} as of q, got {k.shape[0]} (shape {list(k.shape)})")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{key}: expected head dim {q.shape[-1]} as of q, got {k.shape[-1]} (shape {list(k.shape)})")
    if not kv_heads or not heads or heads % kv_heads:
        raise ValueError(f"{key}: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{value}: expected {list(k.shape[:-1])} before its last dim, as {key} has, got {list(v.shape)}"
        )
