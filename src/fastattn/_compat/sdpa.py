"""torch's `scaled_dot_product_attention`: the function itself, and what decides how a call of it is to be served.

Used as a module, so that a test can put something else in a name's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .versions import need

#: torch's own function, whatever `torch.nn.functional` holds in its place at the moment.
scaled_dot_product_attention: Callable[..., Tensor] = need("torch", "torch._C._nn.scaled_dot_product_attention")


def _private(name: str) -> Any:
    return getattr(torch._C, name, None)


_SWITCHES = tuple(
    found
    for name in ("flash", "mem_efficient", "math", "cudnn")
    if (found := _private(f"_get_{name}_sdp_enabled")) is not None
)
_order: Callable[[], list[int]] | None = _private("_get_sdp_priority_order")
_USUAL_ORDER = None if _order is None else _order()
_kinds: tuple[Any, ...] = tuple(
    getattr(_private("_SDPBackend"), name, None)
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
)
#: How that order begins after torch's first call on an H100 or a B200 (`priority_order` of its sdp_utils.cpp).
_ORDER_ON_HOPPER = None if None in _kinds else [int(kind) for kind in _kinds]
_function_modes: Callable[[], int] | None = _private("_len_torch_function_stack")
_function_mode: Callable[[int], Any] | None = _private("_get_function_stack_at")
_tracing: Callable[[], Any] | None = _private("_get_tracing_state")


def insists_on_torch() -> bool:
    """Whether someone chose among torch's kernels: `sdpa_kernel(...)`, `torch.backends.cuda.enable_*_sdp(False)`."""
    for enabled in _SWITCHES:
        if not enabled():
            return True
    if _order is None:
        return False
    order = _order()
    return order != _USUAL_ORDER and order[: len(_kinds)] != _ORDER_ON_HOPPER


def watched_by_a_function_mode() -> bool:
    """Whether a mode may want to see torch's function: all but the one of `torch.set_default_device`, which looks at
    functions that make tensors. False where torch does not tell."""
    count = 0 if _function_modes is None else _function_modes()
    if not count:
        return False
    if _function_mode is None:
        return True
    return any(type(_function_mode(i)).__name__ != "DeviceContext" for i in range(count))


def traced_by_jit() -> bool:
    """Whether `torch.jit.trace` records what operators do. False where torch does not tell."""
    return _tracing is not None and _tracing() is not None


def innermost_is_vmap() -> bool:
    """Whether the innermost of torch.func's transforms around this call is `vmap`. False where torch does not tell."""
    stack = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    top = None if stack is None else stack()
    return top is not None and getattr(top.key(), "name", "") == "Vmap"


def script_as_torchs(function: Callable[..., Any]) -> None:
    """Lets `torch.jit.script` write torch's operator where code calls this function. Without torch's table of
    functions it compiles the function, and fails."""
    try:
        from torch.jit._builtins import _register_builtin
    except ImportError:
        return
    _register_builtin(function, "aten::scaled_dot_product_attention")


def plain_tensors(*tensors: Any) -> bool:
    """True when all are tensors that no subclass stands behind."""
    return all([type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors])


def is_bias_class(mask: Any) -> bool:
    """True for a mask of `torch.nn.attention.bias`, which stands for itself in calls of torch's function."""
    return type(mask).__module__ == "torch.nn.attention.bias"
