"""`FusedOps`: liger-kernel's operations in the modules of one model, and how they are found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn

from ..._compat import liger
from ..._compat.transformers import CACHE_ARGUMENTS, cache_argument
from ...backends.triton.launcher import native
from ...common.notice import warn_once
from . import mlps, norms, rotary
from .trial import Signature, signature_of

_Found = tuple[Callable[..., Any], str] | None  #: a forward, and the name of what it replaces


class FusedOps:
    """Operations of one model that may be replaced. `apply` puts them in, `undo` takes them out; `with` does both.

    They are attributes of the model's modules. A module with a forward of its own (a hook of accelerate, a kernel from
    the hub) keeps that. A call that a kernel does not take (on a CPU, in float64, of mixed dtypes as under autocast, of
    tensor subclasses) is computed by the module itself.
    """

    def __init__(self, changes: tuple[tuple[nn.Module, MethodType], ...] = (), replaced: tuple[str, ...] = ()) -> None:
        self._changes = changes
        self.replaced = replaced  #: what is replaced, sorted: names of modules, "rope in ...", "loss of ..."

    def apply(self) -> FusedOps:
        """Puts the operations in. Returns itself."""
        for module, forward in self._changes:
            module.__dict__.setdefault("forward", forward)
        return self

    def undo(self) -> None:
        """Takes the operations out."""
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


def find_fused_ops(model: nn.Module, loss: bool = False, *, kernels: Any = None) -> FusedOps:
    """The operations that liger-kernel can replace in a transformers model. The model is not changed.

    Results differ from transformers' by rounding. Only one backward per forward is possible: liger-kernel overwrites
    what the forward saved, so that `retain_graph` gives wrong gradients.

    Args:
        model: of any kind. If nothing in it is known, the operations replace nothing.
        loss: also computes the loss from the last hidden states, a part of the logits at a time. While the model trains
            and is given labels, its outputs have no logits then.
        kernels: an object with liger-kernel's functions. Default: the module `liger_kernel.ops`.

    Raises:
        ImportError: liger-kernel is not installed, or does not work here.
        ValueError: `loss`, and liger-kernel has none for such a model.
    """
    kernels = liger.operations() if kernels is None else kernels
    known: dict[Signature, _Found] = {}
    changes: list[tuple[nn.Module, MethodType]] = []
    names: set[str] = set()
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        key = signature_of(module)
        if key not in known:
            known[key] = _replacement(module, kernels)
        found = known[key]
        if found is not None:
            changes.append((module, MethodType(found[0], module)))
            names.add(found[1])
    if loss:
        changes.append((model, _fused_loss(model)))
        names.add(f"loss of {type(model).__name__}")
    return FusedOps(tuple(changes), tuple(sorted(names)))


def choose_fused_ops(model: nn.Module, wish: bool | None) -> FusedOps:
    """As `find_fused_ops`. wish: True: they are required; False: none; None: on a GPU, if liger-kernel is installed."""
    device = next(model.parameters()).device
    if wish:
        check_fused_ops(device)
        return find_fused_ops(model)
    if wish is False or device.type != "cuda" or not liger.installed():
        return FusedOps()
    try:
        return find_fused_ops(model)
    except ImportError as error:
        warn_once(f"the model runs without liger-kernel's fused operations, which is slower: {error}", "liger")
        return FusedOps()


def check_fused_ops(device: torch.device) -> None:
    """Raises ImportError unless liger-kernel works here, ValueError unless its kernels run on the device."""
    liger.operations()
    if not native(device.type):
        raise ValueError(f"fused_ops: expected a model on a GPU, got one on {device}")


def _replacement(module: nn.Module, kernels: Any) -> _Found:
    """The forward for a module and the name of what it replaces; None if liger-kernel has nothing for it."""
    name = type(module).__name__
    norm = norms.recognise(module)
    if norm is not None:
        return norms.fused_norm(kernels.LigerRMSNormFunction, *norm), name
    gate = mlps.gate_function(kernels, module)
    if gate is not None:
        return mlps.fused_mlp(gate), name
    rope = rotary.recognise(module)
    if rope is not None:
        return rotary.fused_attention(kernels.LigerRopeFunction, type(module), rope), f"rope in {name}"
    return None


def _fused_loss(model: nn.Module) -> MethodType:
    """A causal model's forward with liger-kernel's loss, made by liger-kernel's own code."""
    apply = liger.patcher(getattr(getattr(model, "config", None), "model_type", None))
    options = signature(apply).parameters if apply is not None else {}
    if apply is not None and "fused_linear_cross_entropy" in options and "forward" not in model.__dict__:
        nothing_else = {name: False for name, option in options.items() if isinstance(option.default, bool)}
        with suppress(TypeError):  # liger-kernel knows the family, but not this head
            apply(model=model, **(nothing_else | {"fused_linear_cross_entropy": True}))
        made = model.__dict__.pop("forward", None)
        if isinstance(made, MethodType):
            return MethodType(_with_old_cache_name(made.__func__, model), model)
    raise ValueError(f"fused_loss: liger-kernel has none for {type(model).__name__}")


def _with_old_cache_name(forward: Any, model: nn.Module) -> Any:
    """liger-kernel's forward for models that call their cache `cache`: liger-kernel 0.8.5 knows only the old name."""
    new, old = cache_argument(model), CACHE_ARGUMENTS[-1]
    if new in (None, old) or new in signature(forward).parameters:
        return forward

    def renamed(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if new in options:
            options[old] = options.pop(new)
        if torch.compiler.is_compiling():
            return forward(self, *arguments, **options)
        with warnings.catch_warnings():  # liger-kernel calls the model with the old name
            warnings.filterwarnings("ignore", f"`{old}` is deprecated", FutureWarning)
            return forward(self, *arguments, **options)

    return renamed
