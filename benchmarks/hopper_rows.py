"""The calls that `hopper_forward` measures, and what torch has for each; `hopper_backward` makes its own alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastattn import Segments, masks
from fastattn.call import Call

LENGTH = "length"  #: begins the names of rows whose lengths are drawn


def drawn(count: int, low: int, high: int, seed: int = 0) -> list[int]:
    """Lengths, in order; as many between 200 and 400 as between 2000 and 4000."""
    rng = random.Random(seed)
    return sorted(round(low * (high / low) ** rng.random()) for _ in range(count))


def of_lengths(rows: dict[str, Any]) -> dict[str, Any]:
    """How the rows compare with torch's cuDNN whose lengths are drawn: hot times of ours over its."""
    ratios = {
        name: row["ours"]["hot"] / row["cudnn"]["hot"]
        for name, row in rows.items()
        if name.startswith(LENGTH) and row and "cudnn" in row
    }
    if not ratios:
        return {}
    worst = max(ratios, key=lambda name: ratios[name])
    median = round(statistics.median(ratios.values()), 3)
    return {"rows": len(ratios), "median": median, "worst": round(ratios[worst], 3), "worst row": worst}


# name: batch, query heads, K/V heads, queries, keys, head dim, value dim, and what else
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    f"causal {n}": ((1, 32, 8, n, n, 128, 128), {"causal": True})
    for n in (128, 256, 512, 1000, 2048, 2049, 4096, 8192, 16384)
} | {
    "lse 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "lse": True}),
    "sinks 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "sinks": True}),
    "softcap 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "softcap": 50.0}),
    "window 1024 8192": ((1, 32, 8, 8192, 8192, 128, 128), {"causal": True, "left": 1023}),
    "chunk 512/4096": ((1, 32, 8, 512, 4096, 128, 128), {"causal": True}),
    "chunk 2048/8192": ((1, 32, 8, 2048, 8192, 128, 128), {"causal": True}),
    "B16 512": ((16, 32, 8, 512, 512, 128, 128), {"causal": True}),
    "full 700": ((1, 24, 24, 700, 700, 128, 128), {}),
    "full 1024": ((1, 24, 24, 1024, 1024, 128, 128), {}),
    "Flux 4608": ((1, 24, 24, 4608, 4608, 128, 128), {}),
    "video 16384": ((1, 12, 12, 16384, 16384, 128, 128), {}),
    "SDXL self 4096": ((2, 10, 10, 4096, 4096, 64, 64), {}),
    "ViT B64 257": ((64, 16, 16, 257, 257, 64, 64), {}),
    "Whisper cross 448/1500": ((8, 20, 20, 448, 1500, 64, 64), {}),
    "SAM B25 196": ((25, 16, 16, 196, 196, 80, 80), {}),
    "gpt-oss window 4096": ((1, 64, 8, 4096, 4096, 64, 64), {"causal": True, "left": 127, "sinks": True}),
    "gpt-oss 4096": ((1, 64, 8, 4096, 4096, 64, 64), {"causal": True, "sinks": True}),
    "BERT B32 384 keys": ((32, 12, 12, 384, 384, 64, 64), {"lengths": "k"}),
    "ragged B8 2048": ((8, 32, 8, 2048, 2048, 128, 128), {"causal": True, "lengths": "qk"}),
    "192/128 4096": ((1, 32, 32, 4096, 4096, 192, 128), {"causal": True}),
    "256 4096": ((1, 16, 8, 4096, 4096, 256, 256), {"causal": True}),
    "96 2048": ((1, 32, 32, 2048, 2048, 96, 96), {"causal": True}),
    "left-padded B8 2048": ((8, 32, 8, 2048, 2048, 128, 128), {"causal": True, "mask": "left"}),
    "packed 50 in 8192": ((1, 32, 8, 8192, 8192, 128, 128), {"causal": True, "mask": "packed"}),
    "chunks B8 512/4096": ((8, 32, 8, 512, 4096, 128, 128), {"causal": True, "mask": "chunks"}),
    "intervals 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"mask": "intervals"}),
    "BERT B32 384 mask": ((32, 12, 12, 384, 384, 64, 64), {"mask": "bool"}),
    "BERT B32 384 bias": ((32, 12, 12, 384, 384, 64, 64), {"mask": "bias"}),
}
ROWS |= {f"{LENGTH} {n}": ((1, 32, 8, n, n, 128, 128), {"causal": True}) for n in drawn(30, 128, 16384)}


def calls_of(name: str) -> tuple[Call, Call | None, Tensor | None]:
    """A row's call; where it has a mask, a dense call with as many scores; torch's mask for the same."""
    sizes, what = ROWS[name]
    call, same_sizes = asked(sizes, what)
    mask, same = None, None
    if what.get("lengths") == "k":
        assert call.kv_lengths is not None
        mask = torch.arange(sizes[4], device="cuda")[None, None, None] < call.kv_lengths[:, None, None, None]
    if same_sizes is not None:
        q, k, v = tensors(same_sizes)
        same = Call(q, k, v, scale=call.scale, right=0 if what.get("causal") or what["mask"] == "intervals" else -1)
        seen = masks.visibility(call)
        mask = seen if call.mask is None or call.mask.dtype == torch.bool else call.mask
    return call, same, mask


def asked(sizes: tuple[int, ...], what: dict[str, Any]) -> tuple[Call, tuple[int, ...] | None]:
    """A call, and where it has a mask, the sizes of a dense call with as many scores."""
    batch, heads, _, _, kv_len, dim, _ = sizes
    q, k, v = tensors(sizes)
    sinks = torch.randn(heads, device="cuda", dtype=torch.bfloat16) if what.get("sinks") else None
    call = Call(
        q, k, v, sinks=sinks, scale=dim**-0.5, left=what.get("left", -1), right=0 if what.get("causal") else -1,
        softcap=what.get("softcap", 0.0), return_lse=what.get("lse", False),
    )  # fmt: skip
    if "lengths" in what:
        lengths = torch.linspace(kv_len // 4, kv_len, batch, device="cuda").int()
        call = call._replace(q_lengths=lengths if "q" in what["lengths"] else None, kv_lengths=lengths)
    if "mask" not in what:
        return call, None
    fields, same_sizes = masked(what["mask"], sizes)
    return call._replace(**fields), same_sizes


def tensors(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as projections leave them."""
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = sizes

    def made(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return made(heads, q_len, dim), made(kv_heads, kv_len, dim), made(kv_heads, kv_len, value_dim)


def masked(kind: str, sizes: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What a call has of a mask, and the sizes of a dense call with as many scores to compute."""
    batch, heads, kv_heads, q_len, kv_len, *dims = sizes

    def numbers(x: Any) -> Tensor:
        return torch.tensor(x, dtype=torch.int32, device="cuda")

    if kind == "packed":
        cuts = [0, *sorted(random.Random(0).sample(range(1, q_len), 49)), q_len]
        lengths = [b - a for a, b in pairwise(cuts)]
        same = round((sum(n * n for n in lengths) / len(lengths)) ** 0.5)
        return {"segments": Segments.packed(numbers(cuts)).table}, (50, heads, kv_heads, same, same, *dims)
    lengths = torch.linspace(kv_len // 4, kv_len, batch).int().tolist()
    mean = round(sum(lengths) / batch)
    if kind == "left":
        same = round((sum(n * n for n in lengths) / batch) ** 0.5)
        padding = numbers([kv_len - n for n in lengths])
        segments = Segments.left_padded(padding, q_len, kv_len)
        return {"segments": segments.table}, (batch, heads, kv_heads, same, same, *dims)
    if kind == "chunks":
        table = numbers([[b, 0, q_len, 0, n] for b, n in enumerate(lengths)]).mT
        return {"segments": table}, (batch, heads, kv_heads, q_len, mean, *dims)
    if kind == "intervals":  # causal
        hi = torch.arange(1, q_len + 1, dtype=torch.int32, device="cuda")[None]
        return {"lo": torch.zeros_like(hi), "hi": hi}, sizes
    seen = torch.arange(kv_len, device="cuda") < numbers(lengths)[:, None, None, None]
    if kind == "bool":
        return {"mask": seen}, (batch, heads, kv_heads, q_len, mean, *dims)
    bias = torch.randn(seen.shape, device="cuda").bfloat16()
    return {"mask": bias}, sizes


def peers(asked: Call, what: dict[str, Any], mask: Tensor | None) -> dict[str, Callable[[], Any]]:
    """torch's kernels that compute the same, or, where none does, the nearest plain call (named so)."""
    q, k, v = asked.q, asked.k, asked.v
    causal, grouped = what.get("causal", False), q.shape[1] != k.shape[1]
    plain = not any(x in what for x in ("left", "softcap", "sinks", "lengths", "mask"))
    near = "" if plain or mask is not None else "~"
    if mask is None and q.shape[2] != k.shape[2] and causal:
        mask, causal = causal_lower_right(q.shape[2], k.shape[2]), False

    def call(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped)

        return run

    return {near + "cudnn": call(SDPBackend.CUDNN_ATTENTION), near + "flash": call(SDPBackend.FLASH_ATTENTION)}
