"""One attention call of a user, as data, and the tensors that it reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...masks import Segments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Mask = Callable[["Row", torch.device], Tensor]
MOST_TINY = 48, 13  #: tokens of a reduced row: the most, and the least that shorter sides keep


@dataclass(frozen=True)
class Row:
    """One kind of call. What masks is described here once; `ours` and `theirs` say it as fastattn and torch take it."""

    name: str
    who: str  #: whose call it is: the section of the table
    sizes: tuple[int, ...]  #: batch, query heads, K/V heads, queries, keys, head dim, value dim
    causal: bool = False  #: aligned to the lower right
    window: tuple[int, int] | None = None
    sinks: bool = False
    softcap: float | None = None
    lengths: bool = False  #: keys of each batch entry, on the device: from a quarter to all
    as_mask: bool = False  #: fastattn too is given the lengths as a bool tensor `[B, 1, 1, Skv]`
    left_padded: bool = False  #: tokens of each batch entry, at its right end: from a quarter to all
    packed: int = 0  #: sequences of different lengths side by side in one batch entry
    mask: Mask | None = None  #: a tensor, bool or additive, for everybody
    mask_gradient: bool = False
    return_lse: bool = False
    cached: bool = False  #: K/V's memory is `[B, Hkv, S, D]`, as a cache's
    shared: bool = False  #: the values are the first columns of the keys (absorbed MLA)
    training: bool = False  #: forward and backward
    dtype: torch.dtype = BF16

    @property
    def heads(self) -> tuple[int, int]:
        return self.sizes[1], self.sizes[2]

    @property
    def group(self) -> int:
        """Query heads of one K/V head."""
        return self.sizes[1] // self.sizes[2]

    def reduced(self) -> Row:
        """The same kind of call at a size for a CPU: few tokens, heads and batch entries, the head dims as they are."""
        batch, heads, kv_heads, q_len, kv_len, *dims = self.sizes
        most, least = MOST_TINY
        longest = max(q_len, kv_len)
        scale = min(1.0, most / longest)
        q_len, kv_len = (max(round(n * scale), min(n, least)) for n in (q_len, kv_len))
        kv_few = min(kv_heads, 2)
        group = min(heads // kv_heads, 4)
        window = self.window
        if window is not None:
            left, right = (n if n <= 0 else max(1, round(n * scale)) for n in window)
            window = left, right
        sizes = (min(batch, 2), kv_few * group, kv_few, q_len, kv_len, *dims)
        return replace(self, sizes=sizes, window=window, packed=min(self.packed, 5))

    def tensors(self, device: torch.device, count: int = 1) -> list[Tensors]:
        """`count` sets of random tensors, the same ones each time; what masks is the same in all sets."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        batch, heads, kv_heads, q_len, kv_len, dim, value_dim = self.sizes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype, generator=generator)

        def keys(dim: int) -> Tensor:
            if self.cached:
                return normal(batch, kv_heads, kv_len, dim)
            return normal(batch, kv_len, kv_heads, dim).transpose(1, 2)

        cuts = packed_cuts(self, device) if self.packed else None
        shared = Tensors(
            *(torch.empty(0),) * 4,
            mask=None if self.mask is None else self.mask(self, device),
            sinks=normal(heads) if self.sinks else None,
            lengths=lengths(self, device) if self.lengths or self.left_padded else None,
            starts=cuts,
        )
        found = []
        for _ in range(count):
            q = normal(batch, q_len, heads, dim).transpose(1, 2)
            k = keys(dim)
            v = k[..., :value_dim] if self.shared else keys(value_dim)
            x = shared._replace(q=q, k=k, v=v)
            if self.training:
                grad_out = normal(batch, q_len, heads, value_dim).transpose(1, 2)
                if self.left_padded:  # no loss looks at padding
                    grad_out = grad_out.masked_fill(~self.visible(x).any(-1)[:, None, :, None], 0)
                x = x._replace(grad_out=grad_out)
            found.append(x)
        return found

    def ours(self, x: Tensors) -> dict[str, Any]:
        """The arguments of `fastattn.scaled_dot_product_attention` beside q, k and v."""
        _, _, _, q_len, kv_len, *_ = self.sizes
        found: dict[str, Any] = {}
        if self.packed:
            assert x.starts is not None
            found["mask"] = Segments.packed(x.starts, causal=self.causal)
        elif self.left_padded:
            assert x.lengths is not None
            found["mask"] = Segments.left_padded(kv_len - x.lengths, q_len, kv_len, causal=self.causal)
        elif self.mask is not None:
            found["mask"] = x.mask
        elif self.as_mask:
            found["mask"] = padding(self, x)
        elif self.causal and (q_len > 1):
            found["mask"] = "causal"
        if self.lengths and not self.as_mask:
            found["kv_lengths"] = x.lengths
        if self.window is not None:
            found["window"] = self.window
        if x.sinks is not None:
            found["sinks"] = x.sinks
        if self.softcap is not None:
            found["softcap"] = self.softcap
        if self.return_lse:
            found["return_lse"] = True
        return found

    def theirs(self, x: Tensors) -> dict[str, Any] | None:
        """The arguments of torch's function beside q, k and v, without `enable_gqa`; None: it has no such call."""
        if self.sinks or self.softcap is not None or self.return_lse:
            return None
        if self.mask is not None:
            return {"attn_mask": x.mask}
        plain = self.window is None and not (self.lengths or self.left_padded or self.packed)
        if plain:
            _, _, _, q_len, kv_len, *_ = self.sizes
            if not self.causal or q_len == 1:
                return {}
            if q_len == kv_len:
                return {"is_causal": True}
        if self.lengths and self.window is None and not self.causal:
            return {"attn_mask": padding(self, x)}
        return {"attn_mask": self.visible(x)[:, None]}

    def visible(self, x: Tensors, start: int = 0, stop: int | None = None) -> Tensor:
        """Which keys the queries start:stop see by everything but a tensor mask: bool `[B|1, queries, Skv]`."""
        _, _, _, q_len, kv_len, *_ = self.sizes
        i = torch.arange(start, q_len if stop is None else stop, device=x.q.device)[:, None]
        j = torch.arange(kv_len, device=x.q.device)[None]
        seen = torch.ones(1, len(i), kv_len, dtype=torch.bool, device=x.q.device)
        position: Tensor = (i + kv_len - q_len)[None]
        if self.lengths and x.lengths is not None:
            seen = seen & (j < x.lengths[:, None])[:, None]
            position = i[None] + x.lengths[:, None, None] - q_len
        if self.causal:
            seen = seen & (j <= position)
        if self.window is not None:
            left, right = self.window
            seen = seen & (j >= position - left) if left >= 0 else seen
            seen = seen & (j <= position + right) if right >= 0 else seen
        if self.left_padded and x.lengths is not None:
            first = kv_len - x.lengths
            seen = seen & (j >= first[:, None])[:, None] & (position >= first[:, None, None])
        if x.starts is not None:
            document = documents(x.starts, kv_len)
            seen = seen & (document[i] == document[j])[None]
        return seen


class Tensors(NamedTuple):
    """What a call reads."""

    q: Tensor  #: [B, Hq, Sq, D], and so on as in the op; token-major in memory
    k: Tensor
    v: Tensor
    grad_out: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    lengths: Tensor | None = None  #: int32 [B]
    starts: Tensor | None = None  #: int32 [N + 1], of packed sequences

    def with_gradients(self, row: Row) -> Tensors:
        """The same as leaves of autograd's graph, if the row is training."""
        if not row.training:
            return self
        found = self._replace(**{name: getattr(self, name).detach().requires_grad_() for name in "qkv"})
        if row.mask_gradient and found.mask is not None:
            found = found._replace(mask=found.mask.detach().requires_grad_())
        return found

    def leaves(self, row: Row) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        mask = (self.mask,) if row.mask_gradient and self.mask is not None else ()
        return (self.q, self.k, self.v, *mask)


def lengths(row: Row, device: torch.device) -> Tensor:
    """From a quarter to all of the keys."""
    batch, kv_len = row.sizes[0], row.sizes[4]
    return torch.linspace(max(1, kv_len // 4), kv_len, batch, device=device).int()


def padding(row: Row, x: Tensors) -> Tensor:
    """The lengths as a bool tensor `[B, 1, 1, Skv]`."""
    assert x.lengths is not None
    return (torch.arange(row.sizes[4], device=x.q.device) < x.lengths[:, None])[:, None, None]


def packed_cuts(row: Row, device: torch.device) -> Tensor:
    """Where the packed sequences begin, and the end of the last one."""
    generator = torch.Generator().manual_seed(3)
    cuts = torch.randperm(row.sizes[3] - 1, generator=generator)[: row.packed - 1].sort().values + 1
    ends = [torch.zeros(1, dtype=torch.long), cuts, torch.tensor([row.sizes[3]])]
    return torch.cat(ends).int().to(device)


def documents(starts: Tensor, length: int) -> Tensor:
    """Which packed sequence each token is of."""
    return torch.searchsorted(starts[1:].long(), torch.arange(length, device=starts.device), right=True)


# --- masks as tensors


def _square(row: Row, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys."""
    return torch.arange(row.sizes[3], device=device)[:, None], torch.arange(row.sizes[4], device=device)[None]


def causal_bool(row: Row, device: torch.device) -> Tensor:
    i, j = _square(row, device)
    return j <= i


def causal_float(row: Row, device: torch.device) -> Tensor:
    """As models make it: 0 and the least number, one matrix for each batch entry."""
    hidden = ~causal_bool(row, device)
    mask = torch.zeros(hidden.shape, dtype=row.dtype, device=device)
    return mask.masked_fill(hidden, torch.finfo(row.dtype).min).expand(row.sizes[0], 1, -1, -1).contiguous()


def prefix(row: Row, device: torch.device) -> Tensor:
    """A quarter of the tokens is seen by all."""
    i, j = _square(row, device)
    return (j <= i) | (j < row.sizes[4] // 4)


def slopes(row: Row, device: torch.device) -> Tensor:
    """ALiBi's, `[Hq, 1, 1]`."""
    return (2.0 ** (-8.0 * torch.arange(1, row.sizes[1] + 1, device=device) / row.sizes[1]))[:, None, None]


def alibi(row: Row, device: torch.device) -> Tensor:
    i, j = _square(row, device)
    bias = -slopes(row, device) * (i - j)
    return bias.masked_fill(j > i, -torch.inf).to(row.dtype)[None]


def bias(row: Row, device: torch.device) -> Tensor:
    """Random, one matrix a head: T5's and Swin's."""
    generator = torch.Generator(device).manual_seed(7)
    shape = (1, row.sizes[1], row.sizes[3], row.sizes[4])
    return torch.randn(shape, device=device, dtype=row.dtype, generator=generator)
