"""Puts fastattn in the place of `torch.nn.functional.scaled_dot_product_attention`, and torch's function back.

What is put there serves calls while the patch is there, or within the forward of a model that was named;
where code still holds it after that, it is torch's function.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from types import ModuleType
from typing import Any

import torch
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


class _Within:
    """A module's forward that counts in `_models`. An object, so that a copy of the module gets a copy of it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        update_wrapper(self, forward)
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _models.depth += 1
        try:
            return self._forward(*args, **kwargs)
        finally:
            _models.depth -= 1


@dataclass(eq=False)
class _Mark:
    """A module whose forward is wrapped."""

    forward: _Within
    own: Any  #: what the module itself, not its class, had as its forward; None: nothing
    blocks: int = 0  #: that are open for it


class _Patch:
    """What is patched, and for whom. One in a process; it outlives that this module is loaded again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = False  #: by `patch()`
        self.blocks = 0  #: of `patched()` that are open
        self.models = 0  #: of `patched(model)` that are open
        self.everywhere = False  #: whether calls outside of these models are served
        self.function: Any = None  #: what is in the place of torch's function
        self.scripted: list[Any] = []  #: what torch.jit knows by its address: never freed
        self.records: list[tuple[weakref.ref[ModuleType], str]] = []  #: modules' names that held torch's function
        self.marks: weakref.WeakKeyDictionary[nn.Module, _Mark] = weakref.WeakKeyDictionary()
        after_fork(self, renew_lock)

    def change(self, asked: bool | None = None, blocks: int = 0, models: int = 0) -> None:
        """Counts who wants the patch, and puts it there or takes it away."""
        with self._lock:
            if (asked or blocks > 0 or models > 0) and self.function is None:
                try:
                    self.install()
                except BaseException:
                    if self.function is not None:
                        self.remove()
                    raise
            self.asked = self.asked if asked is None else asked
            self.blocks += blocks
            self.models += models
            self.everywhere = self.asked or self.blocks > 0
            if not self.everywhere and not self.models and self.function is not None:
                self.remove()

    def mark(self, module: nn.Module, blocks: int) -> None:
        """Counts the blocks that are open for a module, of all threads, and wraps its forward while there is one."""
        with self._lock:
            known = self.marks.get(module)
            if known is None:
                if blocks < 0 or isinstance(module, torch.jit.ScriptModule):  # which holds torch's operator for good
                    return
                known = self.marks[module] = _Mark(_Within(module.forward), vars(module).get("forward"))
                module.forward = known.forward  # type: ignore[method-assign, assignment]
            known.blocks += blocks
            if known.blocks:
                return
            del self.marks[module]
            if vars(module).get("forward") is not known.forward:
                return  # it is someone else's by now
            if known.own is None:
                del module.forward
            else:
                module.forward = known.own

    def install(self) -> None:
        there = getattr(functional, _NAME)
        if there is not torchs.scaled_dot_product_attention:
            raise RuntimeError(
                f"torch.nn.functional.{_NAME} is not torch's own function but {_called(there)}: undo that first, or "
                "patch before it"
            )
        self.function = scaled_dot_product_attention
        if self.function not in self.scripted:
            torchs.script_as_torchs(self.function)
            self.scripted.append(self.function)
        setattr(functional, _NAME, self.function)
        for module, name in _holders(torchs.scaled_dot_product_attention):
            with contextlib.suppress(Exception):  # a module of a class of its own may take no attributes
                setattr(module, name, self.function)
                self.records.append((weakref.ref(module), name))

    def remove(self) -> None:
        there = getattr(functional, _NAME)
        theirs = there is not self.function  # it calls ours perhaps, which is torch's function from now on
        if not theirs:
            setattr(functional, _NAME, torchs.scaled_dot_product_attention)
        known = [(module, name) for reference, name in self.records if (module := reference()) is not None]
        for module, name in [*known, *_holders(self.function)]:  # the second: imported since, too
            if vars(module).get(name) is self.function:
                setattr(module, name, torchs.scaled_dot_product_attention)
        self.function, self.records = None, []
        if theirs:  # last: a warning may be an error
            warn_once(
                f"fastattn: torch.nn.functional.{_NAME} was replaced by {_called(there)} after patch(): it stays there"
            )


def _called(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def _holders(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """The modules that imported torch's function by name, and the names, where they hold `function` now.

    Not torch's own modules, which compare with it (`torch.nn.functional` is seen to apart), and not ours. A name that
    an assignment gave it may be there to keep the original: it is left alone.
    """
    for home, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and home.partition(".")[0] not in ("torch", "fastattn"):
            names = [name for name, value in list(vars(module).items()) if value is function]
            for name in names:
                if name == _NAME or name in _imported_as(module):
                    yield module, name


def _imported_as(module: ModuleType) -> set[str]:
    """The names that a module's import statements give torch's function; none where its source is not there."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError, ValueError):
        return set()
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name for node in imports for alias in node.names if alias.name == _NAME}


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
    # That of the drop-in while it is patched in, torch's before and after.
    serves = sdpa if _patch.everywhere or _models.depth else torchs
    return serves.scaled_dot_product_attention(  # type: ignore[no-any-return, attr-defined]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


scaled_dot_product_attention.__doc__ = torchs.scaled_dot_product_attention.__doc__  # some code looks for a word in it


def patch() -> None:
    """Puts fastattn under all code of this process that calls torch's `scaled_dot_product_attention`: as
    `torch.nn.functional.scaled_dot_product_attention`, also within torch's modules, or by a name that a module
    imported. Done twice it is done once; `unpatch` undoes it.

    Not reached: a function that code holds otherwise (a variable of another name, a default argument, a partial, a
    table), `torch._C._nn`, and the path of `nn.MultiheadAttention` and `nn.TransformerEncoder` in C++.

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
    if model is not None and any(isinstance(x, nn.DataParallel) for x in model.modules()):
        raise ValueError("model: expected no torch.nn.DataParallel, whose copies call the original: use patched()")
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
    marked = [x for x in model.modules() if _has_forward(x) and (x is model or not (_is_torchs(x) and _is_leaf(x)))]
    try:
        for module in marked:
            _patch.mark(module, 1)
        yield
    finally:
        for module in marked:
            _patch.mark(module, -1)


def _has_forward(module: nn.Module) -> bool:
    """Lists of modules have none, and what stands in its place cannot be pickled."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
