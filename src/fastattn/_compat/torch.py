"""torch: what only its private names tell. Where one of them is gone, a slower way is taken that is as right.

Used as a module (`torch_internals.raw_stream(0)`), so that a test can put something else in a name's place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from . import sdpa
from .versions import Gone, gone, need

F = TypeVar("F", bound=Callable[..., Any])


def _private(name: str) -> Any:
    return getattr(torch._C, name, None)


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


#: The address of torch's current stream of a device. The public way takes 8 us.
raw_stream: Callable[[int], int] = _private("_cuda_getCurrentRawStream") or _raw_stream
#: The index of the current device. The public way looks first whether CUDA is initialised.
current_device: Callable[[], int] = _private("_cuda_getDevice") or torch.cuda.current_device

_transforms: Callable[[], bool] | None = _private("_are_functorch_transforms_active")
_modes: Callable[[], int] | None = _private("_len_torch_dispatch_stack")
_keys: Callable[[Tensor], Any] | None = _private("_dispatch_keys")
_hooks: Callable[[bool], Any] | None = getattr(_private("_autograd"), "_top_saved_tensors_default_hooks", None)
_keeps: Callable[[], bool] | None = getattr(_private("_autograd"), "_get_current_graph_task_keep_graph", None)
_guards: Any = getattr(_private("_dynamo"), "guards", None)  #: functions of code that torch's own compiler generates
#: Its `_current_level` is 0 or more where tensors may be dual numbers. A torch that does not tell has none here.
_forward_ad: Any = torch.autograd.forward_ad
if not hasattr(_forward_ad, "_current_level"):
    _forward_ad = SimpleNamespace(_current_level=-1)


_Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def allocator(device: torch.device) -> _Allocate:
    """What makes an uninitialised tensor of a shape, strides (both plain tuples) and a dtype on the current device of
    that type.

    As code that torch's own compiler generates does it: past the dispatcher, at less than half of what torch's
    functions take. Nobody who watches operators sees it.
    """
    found: _Allocate | None = getattr(_guards, f"_empty_strided_{device.type}", None)
    if found is not None and device.type in ("cpu", "cuda"):
        return found
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _strided_view(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    with torch.no_grad():
        return x.as_strided(shape, strides, x.storage_offset() + offset)


#: `strided_view(x, shape, strides, offset)`: a tensor over x's memory, so many elements after where x begins. Autograd
#: knows nothing of it: it has no gradient, and its own count of changes. As `allocator`: past the dispatcher, at less
#: than a half.
strided_view: Callable[[Tensor, tuple[int, ...], tuple[int, ...], int], Tensor] = (
    getattr(_guards, "_reinterpret_tensor", None) or _strided_view
)


def transforms_active() -> bool:
    """Whether torch.func's transforms are at work around this call. False where torch does not tell: the operators
    refuse them too, later and less clearly."""
    return _transforms is not None and _transforms()


def forward_ad_active() -> bool:
    """Whether tensors may be dual numbers of `torch.autograd.forward_ad`. False where torch does not tell."""
    return _forward_ad._current_level >= 0  # type: ignore[no-any-return]


def may_be_watched() -> bool:
    """Whether a mode, a transform or forward-mode gradients may see what operators do. True where torch does not tell
    of the first two."""
    if _forward_ad._current_level >= 0:  # (to call `forward_ad_active` would take as long as all the rest)
        return True
    return _modes is None or _transforms is None or bool(_modes()) or _transforms()


def plain(*tensors: Tensor) -> bool:
    """True when nobody but autograd watches what happens to the tensors: no tracing, no modes, no subclasses; and
    when their memory holds their values (a negative view's does not).

    Then torch's dispatcher need not see the call: its way to an operator in Python takes 8 us, and 60 more with
    gradients.
    """
    if torch.compiler.is_compiling() or may_be_watched():
        return False
    for x in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if type(x) not in _PLAIN or x.is_neg():
            return False
    return True


_PLAIN = frozenset([Tensor, Parameter])


def unrecorded(*tensors: Tensor) -> bool:
    """True when what is done to the tensors past the dispatcher is missed by nobody: they are `plain`, lie on a CPU or
    a CUDA GPU, and no program is being traced."""
    tracing = sdpa._tracing  # (to call `traced_by_jit` would take twice as long)
    if not plain(*tensors) or (tracing is not None and tracing() is not None):
        return False
    for x in tensors:  # noqa: SIM110 (as above)
        if not (x.is_cuda or x.is_cpu):
            return False
    return True


def same_dispatch(one: Tensor, other: Tensor) -> bool:
    """Whether torch's dispatcher treats two tensors alike. False where torch does not tell."""
    return _keys is not None and _keys(one).raw_repr() == _keys(other).raw_repr()


def dispatch_of(x: Tensor) -> int | None:
    """How torch's dispatcher treats a tensor, as a number; None where torch does not tell."""
    return None if _keys is None else _keys(x).raw_repr()  # type: ignore[no-any-return]


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without what it does for torch.func in Python, 1 us: for calls outside of its transforms."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


@cache
def driver_version() -> int:
    """Of the CUDA driver (13000 for 13.0), 0 without one. torch does not tell."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


#: What `autograd_within` needs. Without it torch's kernels serve no gradients, and others do.
HAS_AUTOGRAD_WITHIN = all(
    _private(name) is not None
    for name in (
        "DispatchKey",
        "_dispatch_tls_local_exclude_set",
        "_dispatch_tls_local_include_set",
        "_ForceDispatchKeyGuard",
    )
)


def autograd_within() -> AbstractContextManager[None]:
    """Autograd, inside an operator's implementation, where torch's dispatcher has switched it off."""
    if not HAS_AUTOGRAD_WITHIN:
        raise Gone(gone("torch", "torch._C._ForceDispatchKeyGuard"))
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.AutogradFunctionality):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def saved_tensors_are_hooked() -> bool:
    """Whether hooks see what autograd saves now: checkpoints, `saved_tensors_hooks`. True where torch does not tell."""
    return _hooks is None or _hooks(False) is not None


def graph_is_retained() -> bool:
    """Within a backward: whether its graph may be used once more (retain_graph=True). True where torch does not
    tell."""
    return _keeps is None or _keeps()


def constant_when_traced(function: F) -> F:
    """Marks a function whose result torch.compile takes for a constant.

    As torch.compiler.assume_constant_result does, which imports all of torch._dynamo (0.9 s) to do it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def allow_recompiling(times: int) -> AbstractContextManager[Any]:
    """Within the block torch.compile compiles a function anew as often as that, before it gives it up."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    found: AbstractContextManager[Any] = config.patch(name, times)
    return found


def spin(cycles: int) -> None:
    """Keeps the GPU busy for so many of its cycles, on the current stream."""
    if not hasattr(torch.cuda, "_sleep"):
        raise Gone(gone("torch", "torch.cuda._sleep"))
    torch.cuda._sleep(cycles)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's own kernel, and its log-sum-exp, which the public function keeps to itself. Causal: upper left."""
    options = (0.0, True) if causal else ()
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, *options)[:2]
    return found


#: What a subclass of Tensor sets `__torch_function__` to that wants to see operations in `__torch_dispatch__` alone.
NO_TORCH_FUNCTION: Any = need("torch", "torch._C._disabled_torch_function_impl")
#: Applies a function to all instances of a class within tuples, lists and dicts.
tree_map_only: Callable[..., Any] = need("torch", "torch.utils._pytree.tree_map_only")


def wrapper_subclass(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """An instance of a subclass of Tensor that has a shape, a dtype and a device, but no memory."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def arguments_of(operator: Any) -> Sequence[Any]:
    """An operator's arguments as its schema has them: `name`, and `alias_info` of those that it writes to or views."""
    found: Sequence[Any] = operator._schema.arguments
    return found
