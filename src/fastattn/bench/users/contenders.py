"""Who can make a row's call: fastattn's routes, torch's kernels, and other packages where they are installed.

`bind(name, row, x)` gives the call, its arguments looked up; it raises `Refusal` where one cannot do such calls at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._compat.sdpa import scaled_dot_product_attention as torch_attention
from ...api import scaled_dot_product_attention
from ...common.machine import version_of
from ..implementations import Refusal, flash_with_sinks, mask_by_shape, repeated, variable, varlen
from ..peers import compiled_flex, flex_with_sinks
from . import packages
from .calls import Row, Tensors, documents

Call = Callable[[], Any]

OURS = {"fastattn": "auto", "fastattn-dynamic": "dynamic"}  #: each with its FASTATTN_PLANS
TORCHS = {
    "torch": None,  #: whatever torch picks
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Other packages: by their names on PyPI.
PACKAGES = {
    "flash-attn": "flash-attn",
    "flash-attn-4": "flash-attn-4",
    "flashinfer": "flashinfer-python",
    "xformers": "xformers",
    "mlx": "mlx",
}
FLEX, VARLEN, PLAIN, MLX = "flex", "torch-varlen", "torch-plain", "mlx"
MOST_SCORES = 4 << 30  #: bytes of the largest matrix of scores that torch-plain may make


def peers(flex: bool, on_gpu: bool) -> list[str]:
    """The names of the peers that may take part here."""
    if not on_gpu:
        return ["torch", PLAIN]
    installed = [name for name, package in PACKAGES.items() if version_of(package) is not None]
    return [*TORCHS, VARLEN, PLAIN, *installed, *([FLEX] if flex else [])]


def versions() -> dict[str, str | None]:
    """The other packages with their versions; None: not installed."""
    return {name: version_of(package) for name, package in PACKAGES.items()}


def bind(name: str, row: Row, x: Tensors) -> Call:
    """The call of a row. Of a training row it gives the output and all gradients. Raises `Refusal`."""
    x = x.with_gradients(row)
    if name in OURS:
        forward: Call = partial(scaled_dot_product_attention, x.q, x.k, x.v, **row.ours(x))
    elif name in TORCHS:
        forward = _torch(name, row, x)
    else:
        forward = _BINDERS[name](row, x)
    return partial(_step, forward, x.leaves(row), x.grad_out) if row.training else forward


@contextmanager
def active(name: str, row: Row) -> Iterator[None]:
    """What has to be in force while it is called."""
    with ExitStack() as stack:
        if not row.training:
            stack.enter_context(torch.inference_mode())
        if name in OURS:
            stack.enter_context(variable("FASTATTN_PLANS", OURS[name]))
        kernel = TORCHS.get(name)
        if kernel is not None:
            stack.enter_context(sdpa_kernel(kernel))
        yield


def tensors_of(found: Any, row: Row) -> tuple[Tensor, ...]:
    """What a call gave that is compared: the output, or the output and the gradients."""
    if not row.training and isinstance(found, tuple):
        found = found[0]  # beside the log-sum-exp
    return found if isinstance(found, tuple) else (found,)


def _step(forward: Call, leaves: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    out = forward()
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


# --- torch


def _torch(name: str, row: Row, x: Tensors) -> Call:
    given = row.theirs(x)
    whole = row.causal and row.sizes[3] == row.sizes[4] and row.window is None
    if name == "torch-flash" and x.sinks is not None and whole and not row.training and row.softcap is None:
        return partial(flash_with_sinks, x.q, x.k, x.v, x.sinks)
    if given is None:
        raise Refusal("torch's function has no sinks, no softcap and no log-sum-exp")
    q_len, kv_len = row.sizes[3:5]
    mask = given.get("attn_mask")
    if mask is not None and mask.is_floating_point() and mask.dtype != x.q.dtype:
        given["attn_mask"] = mask.to(x.q.dtype)
    plain = row.mask is None and row.window is None and not (row.lengths or row.left_padded or row.packed)
    if name in ("torch", "torch-flash") and plain and row.causal and 1 < q_len != kv_len:
        given["attn_mask"] = mask_by_shape(q_len, kv_len)
    if row.group > 1:
        if name == "torch-efficient":  # it has no groups: what its user does about it is part of the call
            return partial(repeated, row.group, x.q, x.k, x.v, **given)
        given["enable_gqa"] = True
    return partial(torch_attention, x.q, x.k, x.v, **given)


def _varlen(row: Row, x: Tensors) -> Call:
    """torch's own call for packed sequences."""
    if not row.packed:
        raise Refusal("it is for packed sequences")
    return varlen(x, packages.longest(x))


def _plain(row: Row, x: Tensors) -> Call:
    """Plain tensor operations, as models write them where torch's function cannot do it."""
    if row.theirs(x) is not None:
        raise Refusal("torch's function can do it")
    batch, heads, _, q_len, kv_len, dim, _ = row.sizes
    if batch * heads * q_len * kv_len * x.q.dtype.itemsize > MOST_SCORES:
        raise Refusal("its matrix of scores would take more than 4 GiB")
    hidden = ~row.visible(x)[:, None]
    bias = torch.zeros(hidden.shape, dtype=x.q.dtype, device=x.q.device) if bool(hidden.any()) else None
    if bias is not None:
        bias = bias.masked_fill(hidden, torch.finfo(x.q.dtype).min)
    return partial(_plainly, row, x, bias, dim**-0.5)


def _plainly(row: Row, x: Tensors, bias: Tensor | None, scale: float) -> Any:
    k, v = (t.repeat_interleave(row.group, 1) if row.group > 1 else t for t in (x.k, x.v))
    scores = x.q @ k.mT * scale
    if row.softcap is not None:
        scores = torch.tanh(scores / row.softcap) * row.softcap
    if bias is not None:
        scores = scores + bias
    if x.sinks is not None:
        sinks = x.sinks[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(x.q.dtype)
    weights = weights[..., :-1] if x.sinks is not None else weights
    out: Tensor = weights @ v
    return (out, scores.float().logsumexp(-1)) if row.return_lse else out


# --- flex attention


def _flex(row: Row, x: Tensors) -> Call:
    """Its block mask is made before: a model makes one for all of its layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    if row.lengths and row.sizes[3] == 1:
        raise Refusal("a block mask of lengths on the device would have to be made anew for each token")
    batch, _, _, q_len, kv_len, *_ = row.sizes
    dense = x.mask is not None and x.mask.dtype == torch.bool
    options: dict[str, Any] = {"enable_gqa": row.group > 1}
    sees = _flex_predicate(row, x, kv_len - q_len)
    if sees is not None:
        entries = batch if row.lengths or row.left_padded else None
        options["block_mask"] = create_block_mask(sees, entries, None, q_len, kv_len, device=x.q.device)
    if row.softcap is not None:
        cap = row.softcap
        options["score_mod"] = lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    elif x.mask is not None and not dense:
        mask = x.mask
        one_entry, one_head = mask.shape[0] == 1, mask.shape[1] == 1
        options["score_mod"] = lambda score, b, h, i, j: score + mask[0 if one_entry else b, 0 if one_head else h, i, j]
    compiled = compiled_flex()
    if x.sinks is None:
        if row.return_lse:
            options["return_lse"] = True
        return partial(compiled, x.q, x.k, x.v, **options)
    return partial(flex_with_sinks, compiled, x.sinks, x.q, x.k, x.v, **options)


def _flex_predicate(row: Row, x: Tensors, offset: int) -> Callable[..., Tensor] | None:
    """Which keys are seen, as flex attention asks it; None: all."""
    tests: list[Callable[..., Tensor]] = []
    left, right = row.window or (-1, -1)
    if (row.causal and row.sizes[3] > 1) or right == 0:
        tests.append(lambda b, i, j: j <= i + offset)
    if left >= 0:
        tests.append(lambda b, i, j: j >= i + offset - left)
    if x.lengths is not None and row.lengths:
        ends = x.lengths
        tests.append(lambda b, i, j: j < ends[b])
    if x.lengths is not None and row.left_padded:
        first = row.sizes[4] - x.lengths
        tests.append(lambda b, i, j: j >= first[b])
    if x.starts is not None:
        document = documents(x.starts, row.sizes[4])
        tests.append(lambda b, i, j: document[i] == document[j])
    if x.mask is not None and x.mask.dtype == torch.bool:
        mask = x.mask
        tests.append(lambda b, i, j: mask[i, j])
    if not tests:
        return None

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = tests[0](b, i, j)
        for test in tests[1:]:
            seen = seen & test(b, i, j)
        return seen

    return sees


_BINDERS: dict[str, Callable[[Row, Tensors], Call]] = {VARLEN: _varlen, PLAIN: _plain, FLEX: _flex, **packages.BINDERS}
