"""Calls that nothing traces: what all calls of one kind share, and the link from forward to backward for autograd.

Where torch's dispatcher need not see a call, an `autograd.Function` stands in for the operator of `operators.py`. The
less goes into it and the less it saves, the less a training step costs the host: it takes the call as one object and
hands over no tensors but those that may have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._compat import torch as torch_internals
from .._compat.torch import plain as plain
from ..backends.base import HasProgram, KeepsGraph, OutOfMemory
from ..call import CALL, Call, Gradients, in_dtypes, work_dtype
from ..validation import default_scale
from . import routes, serve

_TENSORS = len(CALL.tensor_names)
NO_MORE = (None,) * (_TENSORS - 3)  #: tensors of a call that has but q, k and v


class Bound:
    """What all calls of one kind share, found once: where they go, and what their `Call` has besides data."""

    __slots__ = (
        "alike", "backward", "device", "device_type", "dtype", "extras", "generation", "keeps", "kernel", "lse_dtype",
        "name", "names", "names_for_backward", "offers", "programs", "route", "scale", "static", "strides",
    )  # fmt: skip

    def __init__(self, call: Call, names: tuple[str, ...], route: routes.Route) -> None:
        """names: the backends that may serve the calls. route: of the call, which has served it or is going to."""
        q, k, v = call.q, call.k, call.v
        self.route = route
        self.kernel: Any = route.kernel
        self.keeps = isinstance(route.kernel, KeepsGraph)
        self.name = route.backend.name
        self.names = names
        self.names_for_backward = routes.names_for_backward(route.backend, names)
        self.backward: routes.Route | None = None  #: of the backward, found with the first one, if it holds for good
        self.static: tuple[Any, ...] = CALL.static(call)  #: the options of the call that are not data
        self.scale = default_scale(q)
        self.dtype, self.device, self.device_type = q.dtype, q.device, q.device.type
        self.lse_dtype = work_dtype(q.dtype)
        self.strides = q.stride(), k.stride(), v.stride()
        #: of the tensors besides q, k and v; None: there are none
        self.extras = CALL.layouts(call)[3:] if any(x is not None for x in call[3:_TENSORS]) else None
        #: of the routes, when this one held; -1: it is for now alone, and is looked up again for the backward. (There
        #: is no autocast to ask for on the device "meta".)
        self.generation = routes.generation() if route.lasts and self.device_type != "meta" else -1
        self.alike: int | None = None  #: how torch dispatches a gradient that has nothing unusual about it
        #: Whether `native` can serve calls like this one, and the programs that it has of them: see `native/calls.py`.
        self.offers, self.programs = self.generation >= 0 and isinstance(route.kernel, HasProgram), dict[Any, Any]()


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The inputs were cast already (`validation.py`); the float32 inside must stay float32."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)


_NOTHING = nullcontext()


def attention(bound: Bound | None, names: tuple[str, ...], call: Call) -> tuple[Tensor, Tensor | None]:
    """The output and the log-sum-exp (None unless it was asked for) of a call that has gradients.

    bound: of the call's kind, of which a refusal is not known; None: the route is to be found. names: the backends that
    may serve it. Autocast must be off.
    """
    if call.grads in _FEW:
        found = _apply((bound, names, call), call.q, call.k, call.v)
    else:
        found = _apply((bound, names, call), call.q, call.k, call.v, call.mask, call.sinks)
    return found if call.return_lse else (found, None)


#: Values of `Call.grads` without the mask and the sinks.
_FEW = frozenset(["q", "k", "v", "qk", "qv", "kv", "qkv"])


class _Attention(torch.autograd.Function):
    """The link. Arguments: those of `attention` as one, and the tensors of the call that may have a gradient."""

    @staticmethod
    def forward(ctx: Any, of: tuple[Bound | None, tuple[str, ...], Call], *inputs: Any) -> Any:
        bound, names, call = of
        out = lse = gradients = None
        if bound is not None:
            try:
                if bound.keeps and not torch_internals.saved_tensors_are_hooked():
                    out, gradients = bound.kernel.forward_for_backward(call)
                else:
                    out, lse = bound.kernel.forward(call)
            except Exception as error:
                if not serve.refused(bound.route, error, but_for=(OutOfMemory,)):  # `serve` tries once more after one
                    raise
            else:
                serve.count(bound.name)
        if out is None:
            out, lse, route = serve.forward(call, names)
            bound = Bound(call, names, route)
        assert bound is not None
        if bound.extras is None:
            ctx.save_for_backward(call.q, call.k, call.v, out, lse)
        else:
            ctx.save_for_backward(*call[:_TENSORS], out, lse)  # (to save None costs little)
        ctx.of = bound, call.scale, gradients
        ctx.set_materialize_grads(False)
        return (out, lse) if call.return_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        bound, scale, gradients = ctx.of
        if gradients is not None:
            ctx.of = bound, scale, None  # its memory is for the first backward
        if bound.extras is None:
            q, k, v, out, lse = ctx.saved_tensors
            call = CALL.of((q, k, v, *NO_MORE, scale, *bound.static))
        else:
            *tensors, out, lse = ctx.saved_tensors
            call = CALL.join(tensors, (scale, *bound.static))
        found = gradients_of(bound, call, (out, lse, grad_out, grad_lse), gradients)
        if call.grads in _FEW:
            return None, found.q, found.k, found.v
        return None, *found


_apply: Any = torch_internals.quick_apply(_Attention)


def gradients_of(
    bound: Bound,
    call: Call,
    upstream: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    kept: Callable[[Call, Tensor], Gradients] | None = None,
) -> Gradients:
    """The gradients of a call of a bound kind. upstream: the output and the log-sum-exp as they were saved, and their
    gradients. kept: see `KeepsGraph`."""
    out, lse, grad_out, grad_lse = upstream
    if grad_out is None and grad_lse is None:
        return Gradients()
    if grad_out is None or not still_holds(bound, call, grad_out, out, lse):
        return _backward(bound, call, out, lse, grad_out, grad_lse)
    given = out.new_empty(0) if lse is None else lse  # where there is none the kernel does not read it
    route = bound.backward
    if route is None or route.problem.deterministic != torch.are_deterministic_algorithms_enabled():
        route = _backward_route(bound, call)
    found = None
    autocast = torch.is_autocast_enabled(bound.device_type)
    try:
        if autocast:  # (torch.autocast takes 4 us to say so)
            torch.set_autocast_enabled(bound.device_type, False)
        if kept is not None and route.backend is bound.route.backend:
            found = kept(call, grad_out)
        else:
            found = route.kernel.backward(call, out, given, grad_out, grad_lse)
    except Exception as error:
        if not serve.refused(route, error, but_for=(OutOfMemory,)):
            raise
    else:
        serve.count(route.backend.name, backward=True)
    finally:
        if autocast:
            torch.set_autocast_enabled(bound.device_type, True)
    return _backward(bound, call, out, lse, grad_out, grad_lse) if found is None else found


def still_holds(bound: Bound, call: Call, grad_out: Tensor, out: Tensor, lse: Tensor | None) -> bool:
    """Whether what was bound in the forward may run the backward as it is: no backend has refused anything since,
    nobody watches or wants a graph of the gradients, and what was saved came back as it was (hooks may change its
    layout and its dtype)."""
    q, k, v, dtype, device = call.q, call.k, call.v, bound.dtype, bound.device
    if bound.generation != routes.generation() or torch.is_grad_enabled() or not plain(q, k, v):
        return False
    if not (
        (q.stride(), k.stride(), v.stride()) == bound.strides
        and q.dtype is dtype and k.dtype is dtype and v.dtype is dtype and out.dtype is dtype
        and (lse is None or lse.dtype is bound.lse_dtype)
        and q.device == device and k.device == device and v.device == device
        and (bound.extras is None or bound.extras == CALL.layouts(call)[3:])
    ):  # fmt: skip
        return False
    # What torch dispatches alike (no batch of old vmap's, not negative, not sparse) need not be looked at again.
    alike = torch_internals.dispatch_of(grad_out)
    if type(grad_out) is not Tensor or alike is None or alike != bound.alike:
        if not (plain(grad_out) and torch_internals.same_dispatch(grad_out, out)):
            return False
        bound.alike = alike
    return True


def _backward_route(bound: Bound, call: Call) -> routes.Route:
    found = routes.route(call, bound.names_for_backward, backward=True)
    if found.lasts:
        bound.backward = found
    return found


def _as_saved(bound: Bound, call: Call, out: Tensor, lse: Tensor | None) -> tuple[Call, Tensor, Tensor | None]:
    """What was saved, in the dtypes in which it was."""
    layouts = [None] * (_TENSORS - 3) if bound.extras is None else bound.extras
    extras = [None if x is None else x[2] for x in layouts]
    dtypes = [bound.dtype] * 3 + extras + [bound.dtype, bound.lse_dtype]
    *tensors, out, lse = in_dtypes((*CALL.tensors(call), out, lse), dtypes)
    return CALL.join(tensors, CALL.options(call)), out, lse


def _backward(
    bound: Bound, call: Call, out: Tensor, lse: Tensor | None, grad_out: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """The backward of a call whose route is to be found again."""
    names = bound.names_for_backward
    call, out, lse = _as_saved(bound, call, out, lse)
    if lse is None:
        lse = out.new_empty(0)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    batched = not torch_internals.same_dispatch(grad_out, out)
    if torch.is_grad_enabled() or batched or not plain(grad_out, call.q, call.k, call.v):
        # The operator: traced, or with create_graph=True, which it knows how to refuse.
        operator = torch.ops.fastattn.attention_backward
        found = operator(grad_out, grad_lse, out, lse, *call, ",".join(names))
        return Gradients(
            *[x if name[0] in call.grads else None for name, x in zip(Gradients._fields, found, strict=True)]
        )
    with no_autocast(grad_out):
        return serve.backward(call, names, out, lse, grad_out, grad_lse)
