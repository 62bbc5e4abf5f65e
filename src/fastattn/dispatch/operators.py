"""The operators `torch.ops.fastattn.*`: schemas, shapes for tracing (fakes), and their link from forward to backward.

A traced graph (torch.compile, export, FakeTensor) sees two opaque operators. The backend is chosen inside them, when
they run: the graph holds no Python of ours, does not recompile when a length changes, and every stride that a backend
reads is real. The operators' arguments are the fields of `Call`, in order, and the names of the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._compat import sdpa as torchs
from ..backends.scratch import inside_operator
from ..call import CALL, LETTERS, Call, Gradients, dtypes_of, in_dtypes, token_major, work_dtype
from . import double_backward, eager, routes, serve
from .native import calls, graphs

_GRADIENTS = ", ".join(["Tensor"] * len(Gradients._fields))

_library = torch.library.Library("fastattn", "DEF")
_library.define(f"attention({CALL.schema}, str backends) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {CALL.schema}, str backends)"
    f" -> ({_GRADIENTS})"
)


def attention(call: Call, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Runs a call on the first of the named backends that can. Returns the output and the log-sum-exp.

    The log-sum-exp means nothing unless `call.return_lse` asks for it.
    """
    if torchs.traced_by_jit() or not eager.plain(*[x for x in CALL.tensors(call) if x is not None]):
        return torch.ops.fastattn.attention(*call, ",".join(names))
    with eager.no_autocast(call.q):
        if call.grads:
            return eager.attention(None, names, call)
        found = serve.forward(call, names)
    return found.out, found.lse


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, names = _unpack(arguments)
    with inside_operator(), eager.no_autocast(call.q):
        out, lse, route = serve.forward(call, names)
        if lse is None and call.grads and route.until:
            # A backend may leave it out. Here it serves in place of the first choice, which gives it, and by which
            # `_attention_backward` goes.
            lse = reference.forward(route.problem, call)[1]
        if lse is None or not (call.return_lse or call.grads):  # one that needs it itself may return it unasked
            lse = call.q.new_zeros(_lse_shape(call), dtype=work_dtype(call.q.dtype))
        results = out, lse.contiguous()  # as a tracer was told
        if calls.module is not None:
            graphs.offer(graphs.FORWARD, arguments, call, names, results)
        elif call.q.is_cuda and not calls.builder.begun:
            calls.start()
    return results


def _attention_backward(*arguments: Any) -> Any:
    grad_out, grad_lse, out, lse, *rest = arguments
    call, names = _unpack(rest)
    names = routes.names_for_a_graph(call, names)
    with inside_operator(), eager.no_autocast(call.q):
        found = serve.backward(call, names, out, lse, grad_out, grad_lse)
        results = tuple([call.q.new_empty(0) if gradient is None else gradient for gradient in found])
        if calls.module is not None:
            graphs.offer(graphs.BACKWARD, arguments, call, names, results)
    return results


def _unpack(arguments: Sequence[Any]) -> tuple[Call, tuple[str, ...]]:
    call, (names,) = CALL.unpack(arguments)
    return call, tuple(names.split(",")) if names else ()


def _lse_shape(call: Call) -> tuple[int, ...]:
    return tuple(call.q.shape[:3]) if call.return_lse or call.grads else (0,)


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = CALL.unpack(arguments)
    q, v = call.q, call.v
    out = token_major(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(_lse_shape(call), dtype=work_dtype(q.dtype))


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> Any:
    call, _ = CALL.unpack(arguments)
    return tuple(call.q.new_empty(0) if gradient is None else gradient for gradient in empty_gradients(call))


def empty_gradients(call: Call) -> Gradients:
    """Uninitialised gradients in the layout that every backend returns: token-major for q, k, v; contiguous else."""
    wanted = CALL.gradients(Gradients(*(getattr(call, name) for name in Gradients._fields)), call.grads)
    inputs = {name: x for name, x in zip(CALL.names, wanted, strict=True) if x is not None}
    return Gradients(
        **{name: token_major(x, *x.shape) if name in "qkv" else x.new_empty(x.shape) for name, x in inputs.items()}
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call, (ctx.names,) = CALL.unpack(inputs)
    saved = *output, *CALL.tensors(call)
    ctx.save_for_backward(*saved)
    ctx.dtypes = dtypes_of(saved)
    ctx.options = CALL.options(call)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = in_dtypes(ctx.saved_tensors, ctx.dtypes)
    call: Call = CALL.join(tensors, ctx.options)
    needed = [name for name, wanted in zip(CALL.names, ctx.needs_input_grad) if wanted]  # (backends come after these)
    untraced = [name for name in needed if LETTERS.get(name, "-") not in call.grads]
    if untraced:
        raise RuntimeError(
            f"fastattn: {', '.join(untraced)}: expected no gradient to be asked for: the graph was traced without"
        )
    if not call.grads or (grad_out is None and grad_lse is None):
        return (*CALL.gradients(Gradients(), ""), None)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = Gradients(*torch.ops.fastattn.attention_backward(grad_out, grad_lse, out, lse, *call, ctx.names))
    return (*CALL.gradients(found, call.grads), None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_out, grad_lse, _, _, *rest = inputs
    call, _ = CALL.unpack(rest)
    saved = grad_out, *CALL.tensors(call)
    ctx.save_for_backward(*saved)
    ctx.dtypes = dtypes_of(saved)
    ctx.options = CALL.options(call)
    ctx.of_lse = grad_lse is not None
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if ctx.of_lse:
        raise RuntimeError("fastattn: double backward is not supported for the log-sum-exp, but for the output alone")
    grad_out, *tensors = in_dtypes(ctx.saved_tensors, ctx.dtypes)
    call: Call = CALL.join(tensors, ctx.options)
    with eager.no_autocast(call.q):
        of_grad_out, found = double_backward.gradients(call, grad_out, Gradients(*grads))
    # out and lse follow from the call: what flows through them is in the gradients of its tensors.
    return (of_grad_out, None, None, None, *CALL.gradients(found, call.grads), None)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention", _attention_fake, lib=_library)
torch.library.register_fake("fastattn::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd("fastattn::attention", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "fastattn::attention_backward", _double_backward, setup_context=_save_backward, lib=_library
)
