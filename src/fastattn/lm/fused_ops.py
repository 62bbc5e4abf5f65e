"""liger-kernel's fused operations in a model that runs through transformers' own modules.

transformers writes a norm, a rotary embedding or a gated activation as several small kernels; liger-kernel has one for
each, with a backward. Here they are put into one model, and taken out again: no class and no module of transformers is
changed, so other models of the process stay as they are, and so does this one once `undo` was called.

What can be replaced is recognised by its code: a module whose `forward` is, instruction for instruction, that of a
module listed below computes the same, whatever it is called. transformers generates most of its models from a few, so
these few stand for many; a model that computes differently in any place is left alone there.

Not replaced, on purpose:

- a merged gate and up projection (Phi3, GLM): liger-kernel would copy both halves, which costs more than it gains;
- experts: liger-kernel's wait for the device, and tune themselves anew for other numbers of tokens;
- cross entropy, unless asked for: `find_fused_ops`, `loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import FunctionType, MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .._compat.functions import copied, innermost, same, uses
from .._compat.liger import installed, patcher
from .._compat.liger import operations as _kernels
from .._compat.transformers import activation as known_activation
from .._compat.transformers import cache_argument, modeling
from ..backends.triton.launcher import native
from ..common.notice import warn_once

ROPE = "apply_rotary_pos_emb"  #: what it is called in every modeling module of transformers
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LONGEST = 1 << 16  #: entries of a row that one program of liger-kernel's takes


@dataclass(frozen=True)
class _Norm:
    like: str  #: the module of transformers that computes it, as family.Class
    methods: tuple[str, ...]  #: that make up its forward
    eps: str  #: its attribute
    offset: float  #: added to the weight
    casting: str  #: liger-kernel's word for where it rounds: "llama" before the weight, "gemma" after it


@dataclass(frozen=True)
class _Rope:
    like: str  #: the family whose `apply_rotary_pos_emb` it is
    helper: str  #: the function of the same module that it calls
    half: bool  #: cos and sin hold each angle once, not twice


NORMS = (
    _Norm("llama.LlamaRMSNorm", ("forward",), "variance_epsilon", 0.0, "llama"),
    _Norm("olmo2.Olmo2RMSNorm", ("forward",), "variance_epsilon", 0.0, "gemma"),  # gpt-oss too
    _Norm("gemma2.Gemma2RMSNorm", ("forward", "_norm"), "eps", 1.0, "gemma"),
)
MLPS = ("llama.LlamaMLP",)  #: down(act(gate(x)) * up(x))
ROPES = (
    _Rope("llama", "rotate_half", False),
    _Rope("phi3", "rotate_half", False),
    _Rope("gpt_oss", "_apply_rotary_emb", True),
)
#: Attention modules that use q and k for nothing else before they are rotated: liger-kernel may rotate them in place.
ATTENTIONS = (
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
    "gemma2.Gemma2Attention",
    "gemma3.Gemma3Attention",
    "phi3.Phi3Attention",
    "gpt_oss.GptOssAttention",
)


class FusedOps:
    """Operations of one model that may be replaced. `apply` puts them in, `undo` takes them out; `with` does both.

    They hang on the instances of the model's modules. A module that has a forward of its own (a hook of accelerate's, a
    kernel from the hub) keeps that. A call that a kernel cannot take (on a CPU, in float64, of mixed dtypes as under
    autocast, of tensor subclasses) is computed as before.
    """

    def __init__(self, changes: tuple[tuple[nn.Module, MethodType], ...] = (), replaced: tuple[str, ...] = ()) -> None:
        self._changes = changes
        self.replaced = replaced  #: what is replaced, sorted: names of modules, "rope in ...", "loss of ..."

    def apply(self) -> FusedOps:
        for module, forward in self._changes:
            module.__dict__.setdefault("forward", forward)
        return self

    def undo(self) -> None:
        for module, forward in self._changes:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]

    def __enter__(self) -> FusedOps:
        return self.apply()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def use_fused_ops(model: nn.Module, loss: bool = False) -> FusedOps:
    """Puts liger-kernel's operations into a model, for inference or training. See `find_fused_ops`."""
    return find_fused_ops(model, loss).apply()


def find_fused_ops(model: nn.Module, loss: bool = False) -> FusedOps:
    """What liger-kernel can replace in a transformers model; nothing is changed yet.

    Numbers differ from transformers' own by rounding. Gradients go through one backward per forward: liger-kernel
    writes them over what the forward kept, so `retain_graph` gives wrong ones.

    Args:
        model: of any kind. One in which nothing is known gives operations that replace nothing.
        loss: also compute the loss from the last hidden states, a part of the logits at a time. While the model trains
            and is given labels, its outputs hold no logits then.

    Raises:
        ImportError: liger-kernel is not installed, or does not work here.
        ValueError: `loss`, and liger-kernel has none for such a model.
    """
    kernels = _kernels()
    ropes: dict[type, tuple[FunctionType, str] | None] = {}
    changes: list[tuple[nn.Module, MethodType]] = []
    names: set[str] = set()
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        for forward, name in _replacements(module, kernels, ropes):
            changes.append((module, MethodType(forward, module)))
            names.add(name)
    if loss:
        changes.append((model, _loss(model)))
        names.add(f"loss of {type(model).__name__}")
    return FusedOps(tuple(changes), tuple(sorted(names)))


def choose_fused_ops(model: nn.Module, wish: bool | None) -> FusedOps:
    """As `find_fused_ops`, for a wish: True: they are required. False: none. None: where they run and are installed."""
    device = next(model.parameters()).device
    if wish:
        check_fused_ops(device)
        return find_fused_ops(model)
    if wish is False or device.type != "cuda" or not installed():
        return FusedOps()
    try:
        return find_fused_ops(model)
    except (ImportError, TypeError) as error:  # TypeError: a forward is decorated in a way that `copied` does not know
        warn_once(f"the model runs without liger-kernel's fused operations, which is slower: {error}", "liger")
        return FusedOps()


def check_fused_ops(device: torch.device) -> None:
    """Raises ImportError unless liger-kernel works here, ValueError unless its kernels run on the device."""
    _kernels()
    if not native(device.type):
        raise ValueError(f"fused_ops: expected a model on a GPU, got one on {device}")


def _replacements(
    module: nn.Module, kernels: Any, ropes: dict[type, tuple[FunctionType, str] | None]
) -> Iterator[tuple[Callable[..., Any], str]]:
    """The forward that a module is given and what to call it, or nothing."""
    kind: Any = type(module)
    for norm in NORMS:
        if isinstance(getattr(module, "weight", None), nn.Parameter) and _is_like(kind, norm.like, norm.methods):
            yield _norm(kernels.LigerRMSNormFunction, norm), kind.__name__
            return
    if any(_is_like(kind, like, ("forward",)) for like in MLPS):
        function = _gate(kernels, module.act_fn)
        if function is not None:
            yield _mlp(function), kind.__name__
        return
    if any(_is_like(kind, like, ("forward",)) for like in ATTENTIONS):
        if kind not in ropes:
            ropes[kind] = _attention(kernels.LigerRopeFunction, kind)
        found = ropes[kind]
        if found is not None:
            yield found


def _norm(function: Any, norm: _Norm) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight: Any = self.weight
        if not _fit(hidden_states, weight):
            return type(self).forward(self, hidden_states)
        # Not in place: behind a residual connection the incoming gradient belongs to others as well.
        found: Tensor = function.apply(hidden_states, weight, getattr(self, norm.eps), norm.offset, norm.casting, False)
        return found

    return forward


def _gate(kernels: Any, activation: Any) -> Any:
    """liger-kernel's product with an activation of transformers', or None."""
    if type(activation) is type(known_activation("silu")):
        return kernels.LigerSiLUMulFunction
    if type(activation) is type(known_activation("gelu_pytorch_tanh")):
        return kernels.LigerGELUMulFunction
    return None


def _mlp(function: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        found: Tensor = self.down_proj(function.apply(gate, up) if _fit(gate, up) else self.act_fn(gate) * up)
        return found

    return forward


def _attention(function: Any, kind: type) -> tuple[FunctionType, str] | None:
    """An attention module's forward that finds another `apply_rotary_pos_emb` among its globals, if it has a known one.
    Only a copy of the function sees them: the global itself belongs to every model of the family."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    scope = innermost(forward).__globals__
    for rope in ROPES:
        reference = modeling(rope.like)
        if reference is not None and all(
            same(scope.get(name), getattr(reference, name, None)) for name in (ROPE, rope.helper)
        ):
            break
    else:
        return None
    made = _with_globals(forward, {ROPE: _rope(function, scope[ROPE], rope.half)})
    return made, f"rope in {kind.__name__}"


def _with_globals(function: FunctionType, changes: dict[str, Any]) -> FunctionType:
    """A copy of a function that finds other values for some of its globals."""
    own = innermost(function).__globals__ | changes
    # torch.compile looks for the globals of a function with a __name__ in the module of that name.
    own.pop("__name__", None)
    return copied(function, own)


def _rope(function: Any, original: Callable[..., Any], half: bool) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim != 1 or not _fit(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim)
        if q.shape[2] == 1:
            # liger-kernel takes the step from one token to the next for that from row to row as well. A dim of one
            # token may have any stride: here the one that holds for both.
            q, k = (x.flatten(1).unflatten(1, (1, *x.shape[1::2])).transpose(1, 2) for x in (q, k))
        if half:
            return function.apply(q, k, cos, sin, None, 1, q.shape[-1])
        return function.apply(q, k, cos, sin)

    return apply_rotary_pos_emb


def _loss(model: nn.Module) -> MethodType:
    """A causal model's forward with liger-kernel's loss. Its own code makes it, told to leave all else alone."""
    apply = patcher(getattr(getattr(model, "config", None), "model_type", None))
    options = signature(apply).parameters if apply is not None else {}
    if apply is not None and "fused_linear_cross_entropy" in options and "forward" not in model.__dict__:
        nothing = {name: False for name, option in options.items() if isinstance(option.default, bool)}
        with suppress(TypeError):  # it knows the family, but not with such a head
            apply(model=model, **(nothing | {"fused_linear_cross_entropy": True}))
        made = model.__dict__.pop("forward", None)
        if isinstance(made, MethodType):
            return MethodType(_with_its_cache(made.__func__, model), model)
    raise ValueError(f"fused_loss: liger-kernel has none for {type(model).__name__}")


def _with_its_cache(forward: Any, model: nn.Module) -> Any:
    """liger-kernel's forward with the name that the model has for its cache: liger-kernel 0.8.5 knows the old one."""
    new, old = cache_argument(model), "past_key_values"
    return copied(forward, names={old: new}) if new and new != old and uses(forward, old) else forward


def _fit(*tensors: Tensor) -> bool:
    """Whether liger-kernel takes them as they are: asked in each call, as a model may be moved, cast, autocast."""
    first = tensors[0]
    if first.dtype not in _DTYPES or not native(first.device.type):
        return False
    return all(
        type(x) in (Tensor, nn.Parameter) and x.dtype == first.dtype and x.device == first.device for x in tensors
    ) and (first.shape[-1] <= _LONGEST)


@cache
def _is_like(kind: type, like: str, methods: tuple[str, ...]) -> bool:
    family, name = like.split(".")
    reference = getattr(modeling(family), name, None)
    return reference is not None and all(
        same(getattr(kind, method, None), getattr(reference, method, None)) for method in methods
    )
