"""torch's function with fastattn below it: `scaled_dot_product_attention`, `explain`.

A call is handed to torch's own function, with the arguments as they came, where its kernels would serve it anyway,
where fastattn takes no such call, and where someone wants to see torch's function or chose among its kernels. Every
other call is translated (`translate.py`) and takes the op's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ... import api
from ..._compat import sdpa as torchs
from ..._compat import torch as torch_internals
from ...call import Problem
from ...config import setting
from ...dispatch import handed_over, registry, routes
from ...shape_cache import Reason, shape_cache
from ...validation import is_plain_scale, validated
from .translate import Translated, translate

#: "" where fastattn serves calls of a kind, else why torch does; by everything of the call but its data.
_decisions = shape_cache.section("drop-in", 1 << 13, dropped_for=[Reason.BACKEND_REFUSED])

_KERNELS = "torch's kernels serve it: no backend before them can"
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD_DIM = 256  #: when traced: of what a fused kernel may serve


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, on fastattn's backends where they are faster.

    Args:
        query: `[..., Hq, Sq, D]`, any number of leading dims, which broadcast.
        key: `[..., H, Skv, D]`.
        value: `[..., H, Skv, Dv]`.
        attn_mask: bool (True = attend), or additive in query's dtype or float32; broadcastable to `[..., Hq, Sq, Skv]`.
        dropout_p: other than 0: torch's own kernels compute the call.
        is_causal: query i sees the keys up to i (aligned to the **upper left**, as torch has it).
        scale: default `1 / sqrt(D)`.
        enable_gqa: Hq may be a multiple of H.

    Returns:
        `[..., Hq, Sq, Dv]` in query's dtype; contiguous where the inputs have not four dims, else token-major or
        contiguous. A row that may see nothing gives 0.

    Raises:
        What torch raises: a call that is not as described is handed to torch's own function.
    """
    mode = _mode(query)
    if mode == "":
        why = _why_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    elif mode == _TRACED:
        why = _why_torch_traced(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    else:
        why = mode
    if not why:
        return _ours(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if why == _VMAP:
        return _Folded.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)  # type: ignore[no-any-return]
    if mode != _TRACED:
        handed_over.count(why)
    return torchs.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


_TRACED = "traced"
_VMAP = "vmap"
_CPU = "on a CPU torch's kernels serve it"


def _mode(query: Any) -> str:
    """`_TRACED` under torch.compile; `_CPU` where it is known at once that torch serves the call; else ""."""
    if torch.compiler.is_compiling():
        return _TRACED
    if _all_allowed() and getattr(query, "is_cpu", True) and not setting("FASTATTN_INTERPRET"):
        return _CPU
    return ""


def _all_allowed() -> bool:
    return registry.allowed() == registry.NAMES


def _before_torch(names: tuple[str, ...]) -> tuple[str, ...]:
    """The backends that come before torch's kernels. Where the list leaves these out, all of it."""
    return names[: names.index("torch")] if "torch" in names else names


def _why_torch(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> str:
    """Why torch's own function serves a call; "": it does not. Takes the arguments as they came."""
    for x in (query, key, value):
        if type(x) is not Tensor and type(x) is not Parameter:
            return _NO_TENSOR
    if mask is not None and type(mask) is not Tensor and type(mask) is not Parameter:
        return _NO_TENSOR
    if dropout_p.__class__ not in (float, int) or dropout_p != 0:
        return "dropout: torch's kernels have it"
    if is_causal.__class__ is not bool or enable_gqa.__class__ is not bool or scale.__class__ not in _SCALES:
        return "arguments of other types"
    if torchs.insists_on_torch():
        return "torch's kernels were chosen: sdpa_kernel(...) or torch.backends.cuda.enable_*_sdp(False)"
    if torch_internals.may_be_watched():
        if not torch_internals.transforms_active():
            return "a mode sees what operators do"
        return _VMAP if torchs.innermost_is_vmap() else "torch.func: grad, jvp and the like go through torch's kernels"
    if torchs.forward_ad_active():
        return "forward-mode gradients: torch's kernels have them"
    if torchs.watched_by_a_function_mode() or torchs.traced_by_jit():
        return "a mode sees torch's functions"
    if query.is_nested or key.is_nested or value.is_nested or (mask is not None and mask.is_nested):
        return "nested tensors: torch's kernels have them"
    names = registry.allowed()
    grads = torch.is_grad_enabled()
    kind = (
        (query.shape, key.shape, value.shape),
        (query.dtype, key.dtype, value.dtype),
        (query.device, key.device, value.device),
        None if mask is None else (mask.shape, mask.dtype, mask.device, grads and mask.requires_grad),
        grads and (query.requires_grad, key.requires_grad, value.requires_grad),
        (is_causal, enable_gqa, scale is None or is_plain_scale(scale)),
        _autocast(query),
        names,
    )
    why: str | None = _decisions.get(kind)
    if why is None:
        why, lasts = _decided(query, key, value, mask, is_causal, scale, enable_gqa, names)
        if lasts and (scale is None or is_plain_scale(scale)):
            _decisions[kind] = why
    return why


_NO_TENSOR = "not a plain torch.Tensor: its class, or torch, has its own way"
_SCALES = (float, int, type(None))


def _decided(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: Any, enable_gqa: bool, names: Any
) -> tuple[str, bool]:
    """Why torch's own function serves a call, "" if it does not; and whether that holds for good."""
    candidates = _before_torch(names)
    if not candidates:
        return _KERNELS, True
    found = _translated(q, k, v, mask, is_causal, enable_gqa)
    if isinstance(found, str):
        return f"{found}: torch takes it, or says what is wrong", True
    try:
        call = validated(found.arguments, None if scale is None else float(scale))
    except (ValueError, TypeError) as error:
        return f"fastattn does not take it: {error}", False
    try:
        return "", routes.route(call, candidates).lasts
    except registry.BackendError:
        # A refusal for the time being is asked again: what said no by itself says so for good.
        problem = Problem.of(call)
        return _KERNELS, all(registry.backend(name).reasons(problem) for name in candidates)


def _autocast(q: Tensor) -> Any:
    """The dtype to which autocast casts a call's inputs; None without it."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _translated(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Translated | str:
    """The op's arguments, cast as autocast casts torch's: all but float64, the mask included."""
    dtype = _autocast(q)
    if dtype is not None:
        q, k, v = (_cast(x, dtype) for x in (q, k, v))
        mask = None if mask is None else _cast(mask, dtype)
    return translate(q, k, v, mask, is_causal, enable_gqa)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _ours(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: Any, enable_gqa: bool
) -> Tensor:
    """The output of a call that fastattn serves."""
    found = _translated(q, k, v, mask, is_causal, enable_gqa)
    assert not isinstance(found, str)
    a, shape = found
    scale = float(scale) if scale.__class__ is int else scale
    out = api.scaled_dot_product_attention(a.q, a.k, a.v, mask=a.mask, window=a.window, scale=scale)
    assert isinstance(out, Tensor)
    return out if shape is None else out.contiguous().reshape(shape)


@torchs.constant_when_traced
def _candidates_when_traced() -> tuple[str, ...]:
    """The backends that are asked before torch's kernels, () when someone chose among these."""
    return () if torchs.insists_on_torch() else _before_torch(registry.allowed())


@torchs.constant_when_traced
def _default_when_traced() -> bool:
    return "torch" in registry.allowed()


def _why_torch_traced(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> str:
    """The same while torch.compile or torch.export traces the call, when lengths need not be known.

    A graph holds our operator, which finds its backend when it runs, where a fused kernel may serve the call. An
    exported program holds torch's: it is to run where fastattn is not installed.
    """
    if not _candidates_when_traced():
        return _KERNELS
    if dropout_p != 0:
        return "dropout"
    if _default_when_traced():
        if torch.compiler.is_exporting() or not query.is_cuda or query.shape[-1] > _LARGEST_HEAD_DIM:
            return _KERNELS
        if query.dtype not in _HALF and _autocast(query) not in _HALF:
            return _KERNELS
    elif query.device.type == "meta":
        return _KERNELS
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        return "arguments of other types"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors"
    found = _translated(query, key, value, mask, is_causal, enable_gqa)
    return found if isinstance(found, str) else ""


class _Folded(torch.autograd.Function):
    """A call within `torch.func.vmap`: the mapped dim becomes one more leading dim of a call outside of it."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, mask: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Any:
        return torchs.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Any, k: Any, v: Any, mask: Any, *options: Any) -> Any:
        rank = max(x.dim() - (dim is not None) for x, dim in zip((q, k, v), in_dims))
        q, k, v, mask = (_leading(x, dim, rank) for x, dim in zip((q, k, v, mask), in_dims))
        q = q.expand(info.batch_size, *q.shape[1:])  # also where the mask alone is mapped
        is_causal, scale, enable_gqa = options
        out = scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out, 0


def _leading(x: Tensor | None, dim: int | None, rank: int) -> Tensor | None:
    """x with the mapped dim, or one of 1, before `rank` others."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x[(slice(None), *(None,) * (rank + 1 - x.dim()))]


@dataclass(frozen=True)
class Served:
    """Who serves a call of torch's function. Printing it gives a few lines."""

    chosen: str  #: a backend of fastattn, or "torch" for torch's own function with the arguments as they came
    reason: str  #: why torch's own function, "" for a backend
    explanation: api.Explanation | None  #: what fastattn's backends say, where the call can be said in the op's words

    def __str__(self) -> str:
        head = f"torch's own function: {self.reason}" if self.reason else f"fastattn's backend {self.chosen}"
        return head if self.explanation is None else f"{head}\n{self.explanation}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Served:
    """Who would serve `scaled_dot_product_attention` with these arguments here and now, and why. Computes nothing.

    Takes the function's arguments. A call that torch refuses is explained as one that torch serves.
    """
    why = _why_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    explanation = None
    if torchs.plain_tensors(*[x for x in (query, key, value, attn_mask) if x is not None]) and why != _VMAP:
        found = _translated(query, key, value, attn_mask, bool(is_causal), bool(enable_gqa))
        if isinstance(found, Translated):
            a = found.arguments
            try:
                explanation = api.explain(a.q, a.k, a.v, mask=a.mask, window=a.window, scale=scale)
            except (ValueError, TypeError):
                explanation = None
    chosen = "torch" if why or explanation is None or explanation.chosen is None else explanation.chosen
    return Served(chosen, why, explanation)
