"""Puts fastattn in the place of `torch.nn.functional.scaled_dot_product_attention`, and torch's function back.

What is put there serves calls while the patch is there, or within the forward of a model that was named;
where code still holds it after that, it is torch's function.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..._compat import sdpa as torchs
from ...common.forks import after_fork, renew_lock
from ...common.notice import warn_once
from . import sdpa

_NAME = "scaled_dot_product_attention"


class _Models(threading.local):
    """How many forwards of models that were named are under way in this thread."""

    depth: int = 0


class _Patch:
    """What is patched, and for whom. One in a process; it outlives that this module is loaded again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = False  #: by `patch()`
        self.blocks = 0  #: of `patched()` that are open
        self.models = 0  #: of `patched(model)` that are open
        self.everywhere = False  #: whether calls outside of these models are served
        self.function: Any = None  #: what is in the place of torch's function
        self.records: list[tuple[weakref.ref[ModuleType], str]] = []  #: modules' names that held torch's function
        after_fork(self, renew_lock)

    def change(self, asked: bool | None = None, blocks: int = 0, models: int = 0) -> None:
        """Counts who wants the patch, and puts it there or takes it away."""
        with self._lock:
            if (asked or blocks > 0 or models > 0) and self.function is None:
                self.install()
            self.asked = self.asked if asked is None else asked
            self.blocks += blocks
            self.models += models
            self.everywhere = self.asked or self.blocks > 0
            if not self.everywhere and not self.models and self.function is not None:
                self.remove()

    def install(self) -> None:
        there = getattr(functional, _NAME)
        if there is not torchs.scaled_dot_product_attention:
            raise RuntimeError(
                f"torch.nn.functional.{_NAME} is not torch's own function but {_called(there)}: undo that first, or "
                "patch before it"
            )
        self.function = scaled_dot_product_attention
        torchs.script_as_torchs(self.function)
        setattr(functional, _NAME, self.function)
        for module, name in _holders(torchs.scaled_dot_product_attention):
            with contextlib.suppress(Exception):  # a module of a class of its own may take no attributes
                setattr(module, name, self.function)
                self.records.append((weakref.ref(module), name))

    def remove(self) -> None:
        there = getattr(functional, _NAME)
        if there is not self.function:  # it calls ours perhaps, which is torch's function from now on
            warn_once(
                f"fastattn: torch.nn.functional.{_NAME} was replaced by {_called(there)} after patch(): it stays there"
            )
        else:
            setattr(functional, _NAME, torchs.scaled_dot_product_attention)
        known = [(module, name) for reference, name in self.records if (module := reference()) is not None]
        for module, name in [*known, *_holders(self.function)]:  # the second: imported since, too
            if vars(module).get(name) is self.function:
                setattr(module, name, torchs.scaled_dot_product_attention)
        self.function, self.records = None, []


def _called(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def _holders(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """The modules, and the names in them, that hold a function. Not torch's own, which compare with it, but for
    `torch.nn.functional`, which is seen to apart; and not ours."""
    for home, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and home.partition(".")[0] not in ("torch", "fastattn"):
            for name, value in list(vars(module).items()):
                if value is function and "orig" not in name.lower():  # who keeps the original means it
                    yield module, name


_patch: _Patch = globals().get("_patch") or _Patch()
_models: _Models = globals().get("_models") or _Models()


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
    """`fastattn.drop_in.scaled_dot_product_attention` while it is patched in, torch's function before and after."""
    serves = sdpa if _patch.everywhere or _models.depth else torchs
    return serves.scaled_dot_product_attention(  # type: ignore[no-any-return, attr-defined]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def patch() -> None:
    """Puts fastattn under all code of this process that calls torch's `scaled_dot_product_attention`: as
    `torch.nn.functional.scaled_dot_product_attention`, also within torch's modules, or by a name that a module
    imported. Done twice it is done once; `unpatch` undoes it.

    Not reached: a function that code holds elsewhere (a default argument, a partial, a table), `torch._C._nn`, and the
    path of `nn.MultiheadAttention` and `nn.TransformerEncoder` in C++.

    Raises RuntimeError where someone else has replaced torch's function before.
    """
    _patch.change(asked=True)


def unpatch() -> None:
    """Undoes `patch`: torch's function is back in all places, those that were imported since included. Within a block
    of `patched` the patch stays until the block ends. Does nothing where nothing is patched."""
    _patch.change(asked=False)


@contextmanager
def patched(model: nn.Module | None = None) -> Iterator[None]:
    """Within the block, torch's `scaled_dot_product_attention` is fastattn's, as after `patch`: in the whole process,
    or with a model only within the forward of that model and its submodules.

    Blocks may be nested. Where activations are checkpointed, the backward belongs into the block too.

    Raises ValueError for a model that is none, RuntimeError as `patch`.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model: expected None or a torch.nn.Module, got {type(model).__name__}")
    if model is None:
        _patch.change(blocks=1)
        try:
            yield
        finally:
            _patch.change(blocks=-1)
        return
    _patch.change(models=1)
    try:
        with _marked(model):
            yield
    finally:
        _patch.change(models=-1)


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Within the block, the forwards of a model count in `_models`.

    Its submodules' too: a checkpoint calls them again in the backward, from outside of the model's forward.
    """
    own: list[tuple[nn.Module, Any, Any]] = []
    try:
        for module in list(model.modules()):
            if module is model or not (type(module).__module__.startswith("torch.nn.") and _is_leaf(module)):
                marked = _within(module.forward)
                own.append((module, vars(module).get("forward"), marked))
                module.forward = marked
        yield
    finally:
        for module, forward, marked in reversed(own):
            if vars(module).get("forward") is not marked:
                continue  # someone else's by now
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _within(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        _models.depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            _models.depth -= 1

    return marked
