"""One attention call as a sweep measures it: its shape, its inputs, everybody who can compute it, and the truth."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from ..api import scaled_dot_product_attention

DTYPE = torch.bfloat16
MOST_BYTES = 8 << 30  #: of all input sets of a call
MOST_SETS = 512
#: A sanity check, not the test suite: relative error (norm of difference over norm) against the reference in float32.
OUTPUT_LIMIT = 8e-3
GRADIENT_LIMIT = 1.6e-2
MOST_FLOPS = 2e12  #: that the reference may take; larger calls are not checked


@dataclass(frozen=True)
class Case:
    """An attention call, causal (lower right), bfloat16."""

    q_len: int
    kv_len: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    head_major: bool = False  #: K/V's memory is [B,Hkv,S,D], as a cache's, and not [B,S,Hkv,D], as projections write
    left: int = -1  #: of a sliding window: keys before its own that a query sees; -1 for all
    sinks: bool = False
    lengths: tuple[int, ...] | None = None  #: keys that are there, for each batch entry; then Sq is 1

    def __post_init__(self) -> None:
        if self.lengths is not None and (self.q_len != 1 or len(self.lengths) != self.batch):
            raise ValueError("lengths: expected one for each batch entry, and one query")

    def label(self) -> str:
        parts = [f"B={self.batch} Sq={self.q_len} Skv={self.kv_len} {self.q_heads}/{self.kv_heads} D={self.dim}"]
        parts += [f"window {self.left}"] if self.left >= 0 else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"lengths {min(self.lengths)}..{max(self.lengths)}"] if self.lengths else []
        return " ".join(parts)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that some query sees."""
        lengths = self.lengths or (self.kv_len,) * self.batch
        seen = sum(lengths) if self.left < 0 else sum(min(n, self.left + self.q_len) for n in lengths)
        return 2 * seen * self.kv_heads * self.dim * DTYPE.itemsize

    def flops(self, backward: bool = False) -> float:
        """Of both matrix products over every pair of query and key, as the reference takes them."""
        forward = 4.0 * self.batch * self.q_heads * self.q_len * self.kv_len * self.dim
        return 3.5 * forward if backward else forward


class Inputs(NamedTuple):
    """What a call reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: Tensor  #: k's and v's, flat, one after the other
    mask: Tensor | None  #: bool: what lengths and the lower-right alignment mean to torch's attention
    sinks: Tensor | None
    lengths: Tensor | None  #: int32 [B]
    grad_out: Tensor


def make_inputs(case: Case, device: torch.device, generator: torch.Generator, count: int) -> list[Inputs]:
    """`count` sets of standard normal inputs; mask, sinks and lengths are the same ones in all."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device, generator=generator)

    c = case
    mask = None
    if c.lengths is not None:
        ends = torch.tensor(c.lengths, device=device)
        mask = (torch.arange(c.kv_len, device=device) < ends[:, None])[:, None, None].expand(-1, 1, c.q_len, -1)
        mask = mask.contiguous()  # some of torch's kernels misread others
    elif 1 < c.q_len != c.kv_len:
        mask = torch.ones(c.q_len, c.kv_len, dtype=torch.bool, device=device).tril(c.kv_len - c.q_len)[None, None]
    lengths = None if c.lengths is None else torch.tensor(c.lengths, dtype=torch.int32, device=device)
    sinks = normal(c.q_heads) if c.sinks else None
    found = []
    for _ in range(count):
        if c.head_major:
            both = normal(2, c.batch, c.kv_heads, c.kv_len, c.dim)
            k, v = both
        else:
            both = normal(2, c.batch, c.kv_len, c.kv_heads, c.dim)
            k, v = both.transpose(2, 3)
        q, grad_out = (normal(c.batch, c.q_len, c.q_heads, c.dim).transpose(1, 2) for _ in range(2))
        found.append(Inputs(q, k, v, both.view(-1), mask, sinks, lengths, grad_out))
    return found


def set_count(case: Case, l2_bytes: int) -> int:
    """How many input sets it takes so that what a call reads is not in the L2 cache when its turn comes again."""
    q_bytes = case.batch * case.q_heads * case.q_len * case.dim * DTYPE.itemsize
    whole = 2 * q_bytes + 2 * case.batch * case.kv_heads * case.kv_len * case.dim * DTYPE.itemsize
    wanted = math.ceil(4 * l2_bytes / (q_bytes + case.kv_bytes))
    return max(1, min(wanted, MOST_BYTES // whole, MOST_SETS))


def poisoned(case: Case, x: Inputs) -> Inputs:
    """The same with NaN in the keys and values past the lengths."""
    k, v = x.k.clone(), x.v.clone()
    for b, length in enumerate(case.lengths or ()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    return x._replace(k=k, v=v)


def truth(case: Case, x: Inputs, backward: bool) -> tuple[Tensor, ...]:
    """The reference's output on float32 copies; with `backward` also the gradients of q, k and v."""
    q, k, v = (tensor.detach().float().requires_grad_(backward) for tensor in (x.q, x.k, x.v))
    with warnings.catch_warnings(), torch.set_grad_enabled(backward):
        warnings.simplefilter("ignore")  # that the reference is slow
        out = _bind_fastattn(case, x._replace(q=q, k=k, v=v), backend="reference")()
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), x.grad_out.float())) if backward else (out,)


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the tensors' relative errors; NaN if one is."""
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def check_error(error: float, limit: float) -> None:
    """Raises ValueError unless the error is below the limit."""
    if not error < limit:
        raise ValueError(f"wrong result: relative error {error:.2e} against the reference, expected below {limit:.1e}")


@dataclass(frozen=True)
class Implementation:
    """Somebody who computes attention."""

    name: str
    bind: Callable[[Case, Inputs], Callable[[], Tensor]]  #: the call, its arguments looked up; may raise ValueError
    plans: str | None = None  #: FASTATTN_PLANS while it is called
    backend: SDPBackend | None = None  #: of torch's, while it is called

    @property
    def ours(self) -> bool:
        return self.plans is not None

    @property
    def cuda_only(self) -> bool:
        return self.backend is not None

    @contextmanager
    def active(self, gradients: bool = False) -> Iterator[None]:
        """What has to be in force while it is called. Without `gradients`: inference mode."""
        with ExitStack() as stack:
            if not gradients:
                stack.enter_context(torch.inference_mode())
            if self.plans is not None:
                stack.enter_context(_variable("FASTATTN_PLANS", self.plans))
            if self.backend is not None:
                stack.enter_context(sdpa_kernel(self.backend))
            yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def _bind_fastattn(case: Case, x: Inputs, **more: Any) -> Callable[[], Any]:
    options: dict[str, Any] = dict(more)
    if case.q_len > 1:
        options["mask"] = "causal"
    if case.left >= 0:
        options["window"] = case.left, 0
    if x.sinks is not None:
        options["sinks"] = x.sinks
    if x.lengths is not None:
        options["kv_lengths"] = x.lengths
    return partial(scaled_dot_product_attention, x.q, x.k, x.v, **options)


def _bind_torch(case: Case, x: Inputs, lower_right: bool = False) -> Callable[[], Tensor]:
    """torch's attention. lower_right: its own kind of mask for that instead of a tensor."""
    if case.sinks or case.left >= 0:
        raise ValueError("torch's attention has neither sinks nor windows")
    options: dict[str, Any] = {"enable_gqa": True} if case.q_heads != case.kv_heads else {}
    if x.mask is not None:
        by_shape = lower_right and x.lengths is None
        options["attn_mask"] = causal_lower_right(case.q_len, case.kv_len) if by_shape else x.mask
    elif case.q_len > 1:
        options["is_causal"] = True
    return partial(torch_attention, x.q, x.k, x.v, **options)


def _bind_flash(case: Case, x: Inputs) -> Callable[[], Tensor]:
    if case.sinks or case.left >= 0:
        return partial(_flash_with_sinks, x.q, *_window(case, x), _some_sinks(x))
    return _bind_torch(case, x, lower_right=True)


def _flash_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """The log-sum-exp, which torch's public function does not give, says how much the sink takes off."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)


def _bind_math(case: Case, x: Inputs) -> Callable[[], Tensor]:
    return partial(_plain_with_sinks, x.q, *_window(case, x), _some_sinks(x))


def _plain_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Plain torch, for one query: the heads of a group are rows of one product, the sinks one more column."""
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    scores = (rows @ k.mT).float().view(batch, heads, 1, -1) / math.sqrt(dim)
    column = sinks.float()[None, :, None, None].expand(batch, heads, 1, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(q.dtype)
    return (weights.reshape(batch, k.shape[1], rows.shape[2], -1) @ v).view(batch, heads, 1, dim)


def _window(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The keys and values that one query sees: the best that torch can do with a window."""
    if case.q_len > 1 or case.lengths is not None:
        raise ValueError("expected one query and no lengths")
    first = max(0, case.kv_len - 1 - case.left) if case.left >= 0 else 0
    return x.k[:, :, first:], x.v[:, :, first:]


def _some_sinks(x: Inputs) -> Tensor:
    return x.q.new_full((x.q.shape[1],), -torch.inf) if x.sinks is None else x.sinks


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("fastattn", _bind_fastattn, plans="auto"),
        Implementation("fastattn-any", _bind_fastattn, plans="any"),
        Implementation("fastattn-exact", _bind_fastattn, plans="exact"),
        Implementation("torch-cudnn", _bind_torch, backend=SDPBackend.CUDNN_ATTENTION),
        Implementation("torch-flash", _bind_flash, backend=SDPBackend.FLASH_ATTENTION),
        Implementation("torch-efficient", _bind_torch, backend=SDPBackend.EFFICIENT_ATTENTION),
        Implementation("torch-math", _bind_math),
    )
}
