"""Hooks of torch modules, by the names of the dicts that store them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def without_hooks(module: nn.Module) -> Any:
    """A copy of a module, and of all modules in it, that has no hooks and shares all parameters and buffers."""
    found = copy.copy(module)
    for name in HOOKS:
        found.__dict__[name] = {}
    found.__dict__["_modules"] = {name: child and without_hooks(child) for name, child in module._modules.items()}
    return found
