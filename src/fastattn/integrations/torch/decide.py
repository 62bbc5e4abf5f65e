"""Who serves a call of torch's function: fastattn, or torch itself, and why.

Cheap questions come first, and what they leave is looked up by the kind of the call: everything of it but its data.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..._compat import sdpa as torchs
from ..._compat import torch as torch_internals
from ...call import Problem
from ...config import setting
from ...dispatch import preference, refusals, registry, routes
from ...shape_cache import Reason, shape_cache
from ...validation import is_plain_scale, validated
from .translate import Translated, translate

TRACED = "traced"
VMAP = "mapped by torch.func.vmap: the mapped dim becomes a leading one"
DEVICE = "a device that is neither a CPU nor CUDA: torch's kernels serve it"
ON_A_CPU = "on a CPU torch's kernels serve it"
KERNELS = "torch's kernels serve it: no backend before them can"
SLOWER = "torch's kernels are faster: measured, with a dense mask on cuDNN"
DROPOUT = "dropout: torch's kernels have it"
CHOSEN = "torch's kernels were chosen: sdpa_kernel(...) or torch.backends.cuda.enable_*_sdp(False)"
TRANSFORMS = "torch.func's grad, jvp and the like: torch's kernels have them"
FORWARD_MODE = "forward-mode gradients: torch's kernels have them"
MODE = "a mode wants to see torch's function"
NESTED = "nested or sparse tensors: torch's kernels have them"
CLASS = "arguments that are no plain tensors: their class, or torch, knows what to do"
TYPES = "arguments of other types than torch documents"

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD_DIM = 256  #: that a fused kernel may take


class Decision(NamedTuple):
    """Who serves a call."""

    why_torch: str = ""  #: "" where fastattn serves it
    as_it_is: bool = False  #: the tensors are arguments of the op already
    lasts: bool = True  #: whether it holds for all calls of the kind, from now on


_OURS, _OURS_AS_IT_IS, _TORCHS = Decision(), Decision(as_it_is=True), Decision(KERNELS)

#: `Decision`s by kind of call
_decisions = shape_cache.section("drop-in", 1 << 13, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])


def at_once(query: Any) -> str:
    """`TRACED` under torch.compile and torch.export; why torch, where one look tells; else ""."""
    if torch.compiler.is_compiling():
        return TRACED
    if type(query) is not Tensor and type(query) is not Parameter:
        return CLASS
    if torchs.watched_by_a_function_mode():  # asked first: it sees attributes of tensors too
        return MODE
    if query.is_cuda:
        return ""
    if not query.is_cpu:
        return DEVICE
    everything = registry.allowed() == registry.NAMES and not setting("FASTATTN_INTERPRET")
    return ON_A_CPU if everything else ""


def decision(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> Decision:
    """Who serves a call that nothing traces. Takes the arguments as they came: nothing is known to be right."""
    why = _beside_the_shapes(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    if why:
        return Decision(why, lasts=False)
    scale = scale if scale is None or type(scale) is float else float(scale)
    plain_scale = scale is None or is_plain_scale(scale)
    names = registry.allowed()
    grads = torch.is_grad_enabled()
    kind = (
        (query.shape, key.shape, value.shape),
        (query.dtype, key.dtype, value.dtype),
        (query.device, key.device, value.device),
        None if mask is None else (mask.shape, mask.dtype, mask.device, grads and mask.requires_grad),
        grads and (query.requires_grad, key.requires_grad, value.requires_grad),
        is_causal,
        enable_gqa,
        autocast_dtype(query),
        names,
    )
    known: Decision | None = _decisions.get(kind) if plain_scale else None
    if known is None:
        known, lasts = _decided(query, key, value, mask, is_causal, scale, enable_gqa, names)
        if lasts and plain_scale:
            _decisions[kind] = known
        else:
            known = known._replace(lasts=False)
    return known


def _beside_the_shapes(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> str:
    """Why torch serves a call, whatever its shapes are; `VMAP`; or ""."""
    for x in (query, key, value):
        if type(x) is not Tensor and type(x) is not Parameter:
            return CLASS
    if mask is not None and type(mask) is not Tensor and type(mask) is not Parameter:
        return CLASS
    if not isinstance(dropout_p, (float, int)):
        return TYPES
    if dropout_p != 0:
        return DROPOUT
    if type(is_causal) is not bool or type(enable_gqa) is not bool or not is_number(scale):
        return TYPES
    if torchs.insists_on_torch():
        return CHOSEN
    if torch_internals.may_be_watched():
        if not torch_internals.transforms_active():
            return FORWARD_MODE if torch_internals.forward_ad_active() else MODE
        return VMAP if torchs.innermost_is_vmap() else TRANSFORMS
    if torchs.traced_by_jit():
        return MODE
    for x in (query, key, value) if mask is None else (query, key, value, mask):
        if x.is_nested or x.layout is not torch.strided:
            return NESTED
    return ""


def is_number(scale: Any) -> bool:
    """True for None and for numbers that torch takes as a scale, NumPy's floats among them."""
    if scale is None or isinstance(scale, float):
        return True
    return isinstance(scale, int) and not isinstance(scale, bool) and abs(scale) < 1 << 53


def _before_torch(names: tuple[str, ...]) -> tuple[str, ...]:
    """The backends that come before torch's kernels. Where the list leaves these out, all of it."""
    return names[: names.index("torch")] if "torch" in names else names


def _decided(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: Any, enable_gqa: bool, names: Any
) -> tuple[Decision, bool]:
    """Who serves a call, and whether that holds for good."""
    if names[0] == "torch":
        return _TORCHS, True
    found = translated(q, k, v, mask, is_causal, enable_gqa)
    if isinstance(found, str):
        return Decision(f"{found}: torch takes it, or says what is wrong"), True
    try:
        call = validated(found.arguments, scale)
    except (ValueError, TypeError) as error:
        name = str(error).partition(":")[0]  # the whole text may hold data, of which there is no end
        return Decision(f"fastattn does not take this {name}"), False
    problem = Problem.of(call)
    candidates = _asked(problem, names)
    try:
        route = routes.route(call, candidates, waits="torch" not in names)  # else torch's kernels serve meanwhile
    except registry.BackendError:
        return _TORCHS, all(_refuses_for_good(name, problem) for name in candidates)
    if "torch" in names and _slower(route.backend.name, route.problem):
        return Decision(SLOWER), route.lasts
    a = found.arguments
    same = a.q is q and a.k is k and a.v is v and a.window is None and (is_causal or a.mask is mask)
    return (_OURS_AS_IT_IS if same and found.shape is None else _OURS), route.lasts


def _asked(problem: Problem, names: tuple[str, ...]) -> tuple[str, ...]:
    """The backends that are asked before torch's kernels.

    Those that `preference.py` brings before torch's are among them, but not for calls for which torch's function has a
    fast way of its own: with a mask that is a tensor, or "causal" with more queries than keys.
    """
    before = _before_torch(names)
    if problem.dense_mask or problem.left >= 0 or problem.right > 0:
        return before
    first = _before_torch(preference.ordered(problem, names))
    return tuple([name for name in names if name in before or name in first])


def _refuses_for_good(name: str, problem: Problem) -> bool:
    """A late refusal may be one for the time being."""
    late = refusals.late_refusal(name, problem)
    return bool(registry.backend(name).reasons(problem)) or (
        late is not None and late.until == math.inf and not late.coming
    )


def _slower(name: str, problem: Problem) -> bool:
    """Whether torch's kernels were measured to be faster than a backend that may serve a problem.

    With a dense mask torch's kernels took between a third and four fifths of the time of our cuDNN backend, which
    first makes a bias of the mask (H100). Before Hopper they have no fused kernel for a mask with grouped heads.
    """
    return name == "cudnn" and problem.dense_mask and (problem.group == 1 or problem.capability >= _HOPPER)


_HOPPER = (9, 0)


def autocast_dtype(q: Tensor) -> Any:
    """The dtype to which autocast casts a call's inputs; None without it."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def translated(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Translated | str:
    """The op's arguments, cast as autocast casts torch's: all but float64, an additive mask included."""
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (_cast(x, dtype) for x in (q, k, v))
        mask = None if mask is None else _cast(mask, dtype)
    return translate(q, k, v, mask, is_causal, enable_gqa)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


class _Allowed(NamedTuple):
    """What is allowed where a call is traced."""

    candidates: tuple[str, ...]  #: the backends before torch's kernels
    torch: bool  #: whether torch's kernels are


@torch_internals.constant_when_traced
def _allowed_when_traced() -> _Allowed:
    if torchs.insists_on_torch() or torch_internals.transforms_active() or torch_internals.forward_ad_active():
        return _Allowed((), True)
    names = registry.allowed()
    return _Allowed(_before_torch(names), "torch" in names)


@torch_internals.constant_when_traced
def _on_hopper_when_traced() -> bool:
    """Asked for calls on a GPU alone: it initialises CUDA."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= _HOPPER


def why_torch_when_traced(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> str:
    """Why a graph that is traced holds torch's function; "": it holds our operator, which finds its backend when it
    runs.

    Lengths need not be known here, so torch's kernels get what no fused kernel takes, whatever the length. An exported
    program holds torch's function: it is to run where fastattn is not installed.
    """
    allowed = _allowed_when_traced()
    if not allowed.candidates:
        return KERNELS
    if not torchs.plain_tensors(query, key, value) or not (mask is None or torchs.plain_tensors(mask)):
        return CLASS
    if query.is_nested or key.is_nested or value.is_nested:
        return NESTED
    if dropout_p != 0:
        return DROPOUT
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool) or isinstance(scale, Tensor):
        return TYPES
    if query.device.type not in ("cpu", "cuda"):
        return DEVICE
    if allowed.torch:
        if torch.compiler.is_exporting() or not query.is_cuda or query.shape[-1] > _LARGEST_HEAD_DIM:
            return KERNELS
        if query.dtype not in _HALF and autocast_dtype(query) not in _HALF:
            return KERNELS
        usual = set(allowed.candidates) <= set(_before_torch(registry.NAMES))  # of which cuDNN takes dense masks
        if mask is not None and usual and (not enable_gqa or _on_hopper_when_traced()):
            return SLOWER
    found = translated(query, key, value, mask, is_causal, enable_gqa)
    return found if isinstance(found, str) else ""
