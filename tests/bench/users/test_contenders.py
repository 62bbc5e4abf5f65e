"""Attention of other packages: every adapter hands over the right tensors and options, or says what it cannot do."""

from itertools import pairwise

import pytest
import torch

from fastattn.bench import peer_mlx, peers
from fastattn.bench.implementations import Refusal
from fastattn.bench.users import contenders, packages, truth, worker
from fastattn.bench.users.rows import BY_NAME, ROWS

CPU = torch.device("cpu")
IDS = [row.name for row in ROWS]


class Package:
    """A package whose functions compute attention with torch."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


def attention(q, k, v, causal=False, window=(-1, -1), softcap=None, sinks=None, bias=None):
    """[B, S, H, D] as the packages take it, differentiable."""
    group, kind = q.shape[2] // k.shape[2], q.dtype
    q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
    scores = q @ k.repeat_interleave(group, 1).mT / q.shape[3] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    offset, (left, right) = k.shape[2] - q.shape[2], (-1 if n is None else n for n in window)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
    right = 0 if causal else right
    keep = keep.tril(offset + right) if right >= 0 else keep
    keep = keep.triu(offset - left) if left >= 0 else keep
    scores = scores.masked_fill(~keep, -torch.inf)
    columns = k.shape[2]
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    out = scores.softmax(-1)[..., :columns] @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2).to(kind)


def varlen(q, k, v, starts, keys, **options):
    """The sequences one by one, `[tokens, heads, dim]`."""
    pairs = zip(pairwise(starts.tolist()), pairwise(keys.tolist()), strict=True)
    parts = [attention(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for (a, b), (c, d) in pairs]
    return torch.cat(parts)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size=(-1, -1)):
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, window=window_size)


def with_cache(q, k, v, cache_seqlens, causal, window_size, softcap=None):
    options = {"causal": causal, "window": window_size, "softcap": softcap}
    ends = enumerate(cache_seqlens.tolist())
    return torch.cat([attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], **options) for b, n in ends])


class Ragged:
    def __init__(self, memory, layout):
        assert memory.dtype == torch.uint8 and layout == "NHD"

    def plan(self, starts, keys, heads, kv_heads, dim, *, head_dim_vo, causal, window_left, logits_soft_cap, **kinds):
        assert kinds["q_data_type"] == kinds["kv_data_type"]
        self.starts, self.keys, self.sizes = starts, keys, (heads, kv_heads, dim, head_dim_vo)
        self.options = {"causal": causal, "window": (window_left, -1), "softcap": logits_soft_cap}

    def run(self, q, k, v):
        assert self.sizes == (q.shape[1], k.shape[1], k.shape[2], v.shape[2])
        return varlen(q, k, v, self.starts, self.keys, **self.options)


class Paged:
    def __init__(self, memory, layout, use_tensor_cores):
        assert layout == "HND" and use_tensor_cores

    def plan(self, pages, indices, last, heads, kv_heads, dim, page, *, window_left, logits_soft_cap, **kinds):
        assert pages.diff().eq(1).all() and indices.tolist() == list(range(len(last)))
        self.last, self.page = last, page
        self.options = {"window": (window_left, -1), "softcap": logits_soft_cap}

    def run(self, q, cache):
        k, v = cache
        assert k.shape[2] == self.page
        rows = []
        for b, n in enumerate(self.last.tolist()):
            one = [t[b, :, :n].transpose(0, 1)[None] for t in (k, v)]
            rows.append(attention(q[b][None, None], *one, **self.options)[0, 0])
        return torch.stack(rows)


def efficient(q, k, v, attn_bias):
    grouped = q.ndim == 5
    shape = q.shape[:4]
    q, k, v = (t.flatten(2, 3) if grouped else t for t in (q, k, v))
    if isinstance(attn_bias, torch.Tensor) or attn_bias is None:
        out = attention(q, k, v, bias=None if attn_bias is None else attn_bias.double())
    elif "lengths" in attn_bias:
        starts = torch.tensor([0, *attn_bias["lengths"]]).cumsum(0)
        out = varlen(q[0], k[0], v[0], starts, starts, causal=True)[None]
    else:
        out = attention(q, k, v, causal=True, window=(attn_bias.get("size", 0) - 1, -1))
    return out.unflatten(2, shape[2:]) if grouped else out


PACKAGES = {
    "flash_attn": Package(
        flash_attn_func=lambda q, k, v, causal, window_size, softcap=None: attention(
            q, k, v, causal, window_size, softcap
        ),
        flash_attn_varlen_func=flash_varlen,
        flash_attn_with_kvcache=with_cache,
    ),
    "flash_attn.cute": Package(
        flash_attn_func=lambda q, k, v, causal, window_size=(None, None), softcap=None, learnable_sink=None: (
            attention(q, k, v, causal, window_size, softcap, learnable_sink),
            "lse",
        ),
        flash_attn_varlen_func=lambda *args, **options: (flash_varlen(*args, **options), "lse"),
    ),
    "flashinfer": Package(BatchPrefillWithRaggedKVCacheWrapper=Ragged, BatchDecodeWithPagedKVCacheWrapper=Paged),
    "xformers.ops": Package(memory_efficient_attention=efficient),
    "xformers.ops.fmha.attn_bias": Package(
        LowerTriangularFromBottomRightMask=dict,
        LowerTriangularFromBottomRightLocalAttentionMask=lambda size: {"size": size},
        BlockDiagonalCausalMask=Package(from_seqlens=lambda lengths: {"lengths": lengths}),
    ),
}
#: How many rows each can make at the least: an adapter that refuses everything is none.
LEAST = {"flash-attn": 45, "flash-attn-4": 40, "flashinfer": 25, "xformers": 30}


@pytest.mark.parametrize("name", LEAST)
def test_adapters_hand_over_the_right_tensors(name, monkeypatch):
    monkeypatch.setattr(packages, "import_module", PACKAGES.__getitem__)
    monkeypatch.setattr(peers, "flashinfer_memory", lambda device: torch.empty(1, dtype=torch.uint8))
    done = []
    for row in map(lambda row: row.reduced(), ROWS):
        x = row.tensors(CPU)[0]
        try:
            with contenders.active(name, row):
                found = contenders.tensors_of(contenders.bind(name, row, x)(), row)
        except Refusal:
            continue
        assert max(truth.errors(row, x, found, truth.truth(row, x))) < 8e-3, row.name
        done.append(row.name)
    assert len(done) >= LEAST[name], done


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_flex_attention_is_asked_the_same(row, monkeypatch):
    """Without its compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(contenders, "compiled_flex", lambda: flex_attention)
    row = row.reduced()
    x = row.tensors(CPU)[0]
    if row.training:  # flex attention has no gradients on a CPU
        row = BY_NAME[row.name].reduced().__class__(**{**row.__dict__, "training": False, "mask_gradient": False})
    try:
        with contenders.active("flex", row):
            found = contenders.tensors_of(contenders.bind("flex", row, x)(), row)
    except Refusal:
        assert row.lengths and row.sizes[3] == 1
        return
    assert truth.errors(row, x, found, truth.truth(row, x)[:1])[0] < truth.LIMITS[row.dtype][0]


def test_mlx_is_handed_the_same_call(monkeypatch):
    def measure(q, k, v, mask, sinks, scale, sets):
        bias, causal = None, isinstance(mask, str)
        if isinstance(mask, torch.Tensor):
            bias = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert scale == pytest.approx(q.shape[3] ** -0.5) and mask in ("causal", None) if causal else True
        out = attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, sinks=sinks, bias=bias)
        return out.transpose(1, 2), {"us": 5.0, "min_us": 4.0, "max_us": 6.0, "first_ms": 1.0}

    monkeypatch.setattr(peer_mlx, "measure", measure)
    done = 0
    for row in map(lambda row: row.reduced(), ROWS):
        found = worker.checked(row, ["mlx"], CPU)["mlx"]
        assert ("refused" in found) == bool(row.training or row.softcap or row.return_lse), row.name
        if "refused" in found or row.left_padded:  # (padding has no softmax here)
            continue
        assert "failed" not in found, (row.name, found)
        done += 1
    assert done > 40
    timed = worker.timed(BY_NAME["causal 64"].reduced(), ["mlx"], CPU, 1)["mlx"]
    assert timed["us"] == timed["eager"]["us"] == 5.0


def test_errors_of_contenders(monkeypatch):
    """torch without a kernel refuses; no memory is waited for; what CUDA does not survive ends the process."""
    row = BY_NAME["causal 64"].reduced()

    def fails(error):
        def bind(name, row, x):
            raise error

        monkeypatch.setattr(contenders, "bind", bind)

    fails(RuntimeError("No available kernel. Aborting execution."))
    assert list(worker.checked(row, ["torch-flash"], CPU)["torch-flash"]) == ["refused"]
    assert list(worker.timed(row, ["torch-flash"], CPU, 1)["torch-flash"]) == ["refused"]
    fails(RuntimeError("something else"))
    assert worker.checked(row, ["torch-flash"], CPU)["torch-flash"] == {"failed": "RuntimeError: something else"}
    fails(torch.OutOfMemoryError("no memory"))
    assert "no memory" in worker.checked(row, ["torch"], CPU)["torch"]["failed"]
    fails(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        worker.checked(row, ["torch"], CPU)
