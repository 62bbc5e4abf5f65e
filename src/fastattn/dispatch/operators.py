"""The operators `torch.ops.fastattn.*`: schemas, shapes for tracing (fakes), and the link from forward to backward.

A traced graph (torch.compile, export, FakeTensor) sees two opaque operators. The backend is chosen inside them, when
they run: the graph holds no Python of ours, does not recompile when a length changes, and every stride that a backend
looks at is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import debug, reference
from .._compat import torch as torch_internals
from ..call import Call, Gradients, token_major, work_dtype
from . import routing as dispatch

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? lo, Tensor? hi, Tensor? sinks, Tensor? q_lengths, "
    "Tensor? kv_lengths, Tensor? segments, float scale, int left, int right, float softcap, bool return_lse, str grads"
)
_FIELDS = len(Call._fields)

_library = torch.library.Library("fastattn", "DEF")
_library.define(f"attention({_CALL}, str backends) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_CALL}, str backends)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(call: Call, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Runs a call on the first of the named backends that can. Returns the output and the log-sum-exp.

    The log-sum-exp means nothing unless `call.return_lse` asks for it.
    """
    if not plain(*[x for x in call[:10] if x is not None]):
        return torch.ops.fastattn.attention(*call, ",".join(names))
    if call.grads:
        return _Attention.apply(*call, names)
    with _no_autocast(call.q):
        return serve(call, names)[:2]


def plain(*tensors: Tensor) -> bool:
    """True when nobody but autograd watches what happens to the tensors: no tracing, no modes, no subclasses; and
    when their memory holds what they hold (a negative view's does not).

    Then torch's dispatcher need not see the call: its way to an operator in Python takes 8 us, and 60 more with
    gradients.
    """
    return (
        not torch.compiler.is_compiling()
        and all([(type(x) is Tensor or type(x) is Parameter) and not x.is_neg() for x in tensors])
        and not torch_internals.may_be_watched()
    )


class Served(NamedTuple):
    """A forward, and who ran it."""

    out: Tensor
    lse: Tensor | None
    route: dispatch.Route


def serve(call: Call, names: tuple[str, ...]) -> Served:
    """The forward, on the backend that `dispatch` picks."""

    def use(route: dispatch.Route) -> Served:
        if debug.ENABLED:
            debug.check_call(call)
        out, lse = route.run(call)
        if debug.ENABLED:
            debug.check_result(call, route.backend.name, out, lse)
        return Served(out, lse, route)

    found = dispatch.serve(call, names, use)
    dispatch.count(found.route.backend.name)
    return found


def _forward(call: Call, names: tuple[str, ...], compute_lse: bool = False) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The output, the log-sum-exp, and the backends that may run the backward.

    A backend whose own backward does not read the log-sum-exp may leave it out. Where it serves in place of one that
    has given up, that one may be back by the backward: it is left out there, or (`compute_lse`) finds what it reads.
    """
    out, lse, route = serve(call, names)
    if lse is None and call.grads and route.until:
        if compute_lse:
            lse = reference.forward(route.problem, call)[1]
        else:
            names = tuple(name for name in names if not dispatch.backend(name).reads_lse)
    if lse is None or not (call.return_lse or call.grads):  # one that needs it itself may return it unasked
        lse = torch.zeros(_lse_shape(call), dtype=work_dtype(call.q.dtype), device=call.q.device)
    return out, lse, names


def _gradients(
    call: Call, names: tuple[str, ...], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    def use(route: dispatch.Route) -> tuple[str, Gradients]:
        return route.backend.name, route.backend.backward(route.problem, call, out, lse, grad_out, grad_lse)

    name, found = dispatch.serve(call, names, use)
    dispatch.count(f"{name}.backward")
    return found


class _Attention(torch.autograd.Function):
    """The link from forward to backward when nothing traces the call. Arguments: a `Call`'s fields, and names."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = Call(*args[:_FIELDS])
        with _no_autocast(call.q):
            out, lse, names = _forward(call, args[_FIELDS])
        _setup_context(ctx, (*args[:_FIELDS], names), (out, lse))
        if not call.return_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, *grads)


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    with _inside(args[0]):
        out, lse, _ = _forward(*_unpack(args), compute_lse=True)  # a graph says already who may run the backward
        return out, lse.contiguous()  # as a tracer was told


def _attention_backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
    call, names = _unpack(args)
    with _inside(call.q):
        found = _gradients(call, names, out, lse, grad_out, grad_lse)
    return tuple(call.q.new_empty(0) if gradient is None else gradient for gradient in found)


def _unpack(args: tuple[Any, ...]) -> tuple[Call, tuple[str, ...]]:
    return Call(*args[:_FIELDS]), tuple(name for name in args[_FIELDS].split(",") if name)


@contextmanager
def _inside(like: Tensor) -> Iterator[None]:
    """The state of an operator's implementation: what it allocates may belong to a graph that a compiler captures."""
    token = dispatch.opaque.set(True)
    try:
        with _no_autocast(like):
            yield
    finally:
        dispatch.opaque.reset(token)


def _no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The inputs were cast already (`api.py`); the float32 inside must stay float32."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)


_NOTHING = nullcontext()


def _lse_shape(call: Call) -> tuple[int, ...]:
    return tuple(call.q.shape[:3]) if call.return_lse or call.grads else (0,)


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args[:_FIELDS])
    q, v = call.q, call.v
    out = token_major(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(_lse_shape(call), dtype=work_dtype(q.dtype))


def _attention_backward_fake(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
    call = Call(*args[:_FIELDS])
    return tuple(call.q.new_empty(0) if gradient is None else gradient for gradient in empty_gradients(call))


def empty_gradients(call: Call) -> Gradients:
    """Uninitialised gradients in the layout that every backend returns: token-major for q, k, v; contiguous else."""
    like = {name: x for name, x in zip("qkv", call[:3], strict=True) if name in call.grads}
    found = {name: token_major(x, *x.shape) for name, x in like.items()}
    if "m" in call.grads and call.mask is not None:
        found["mask"] = call.mask.new_empty(call.mask.shape)
    if "s" in call.grads and call.sinks is not None:
        found["sinks"] = call.sinks.new_empty(call.sinks.shape)
    return Gradients(**found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = Call(*inputs[:_FIELDS])
    ctx.save_for_backward(*output, *call[:10])
    ctx.rest = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    nothing = (None,) * (_FIELDS + 1)
    wanted = ctx.rest[-2]
    if not wanted or (grad_out is None and grad_lse is None):
        return nothing
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    names = ctx.rest[-1]
    batched = not torch_internals.same_dispatch(grad_out, out)  # by old vmap
    if isinstance(names, str) or torch.is_grad_enabled() or batched or not plain(grad_out, *tensors[:3]):
        # The operator: traced, or with create_graph=True, which it knows how to refuse.
        names = names if isinstance(names, str) else ",".join(names)
        found = torch.ops.fastattn.attention_backward(grad_out, grad_lse, out, lse, *tensors, *ctx.rest[:-1], names)
    else:
        with _no_autocast(grad_out):
            found = _gradients(Call(*tensors, *ctx.rest[:-1]), names, out, lse, grad_out, grad_lse)
    q, k, v, m, s = (x if name in wanted else None for name, x in zip("qkvms", found, strict=True))
    return (q, k, v, m, None, None, s, *nothing[7:])


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("fastattn: double backward is not supported: attention's gradients are not differentiable")


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention", _attention_fake, lib=_library)
torch.library.register_fake("fastattn::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd("fastattn::attention", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fastattn::attention_backward", _no_double_backward, lib=_library)
