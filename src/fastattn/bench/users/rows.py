"""The list of calls, as data. `sizes`: batch, query heads, K/V heads, queries, keys, head dim, value dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .calls import FP16, FP32, Row, alibi, bias, causal_bool, causal_float, prefix

_LLM = (32, 8)  #: query heads and K/V heads of Llama-3.1-8B


def _square(batch: int, heads: tuple[int, int], length: int, dim: int, values: int | None = None) -> tuple[int, ...]:
    return batch, *heads, length, length, dim, dim if values is None else values


def _cache(batch: int, keys: int, queries: int = 1, heads: tuple[int, int] = _LLM, dim: int = 128) -> tuple[int, ...]:
    return batch, *heads, queries, keys, dim, dim


def _mla(batch: int) -> tuple[int, ...]:
    return batch, 128, 1, 1, 4096, 576, 512


_PREFILL: dict[str, Any] = {"who": "LLM prefill", "causal": True}
_HEADS: dict[str, Any] = {"who": "other heads and head dims", "causal": True}
_DECODE: dict[str, Any] = {"who": "LLM decode", "causal": True, "cached": True}
_TRAIN: dict[str, Any] = {"who": "training", "training": True}
_LENGTHS = (64, 100, 128, 256, 512, 1000, 2048, 2049, 4096, 8192, 16384, 32768)
_2048 = _square(1, _LLM, 2048, 128)
_BERT, _T5, _WHISPER = _square(32, (12, 12), 384, 64), _square(8, (12, 12), 512, 64), _square(8, (20, 20), 1500, 64)
_VIT, _SDXL, _SWIN = _square(64, (16, 16), 257, 64), _square(2, (10, 10), 4096, 64), _square(1024, (8, 8), 49, 32)

ROWS = [
    *(Row(f"causal {n}", sizes=_square(1, _LLM, n, 128), **_PREFILL) for n in _LENGTHS),
    Row("B16 512", sizes=_square(16, _LLM, 512, 128), **_PREFILL),
    Row("fp16 2048", sizes=_2048, dtype=FP16, **_PREFILL),
    Row("lse 2048", sizes=_2048, return_lse=True, **_PREFILL),
    Row("chunk 512/4096", sizes=_cache(1, 4096, 512), **_PREFILL),
    Row("chunk 32/4096", sizes=_cache(1, 4096, 32), **_PREFILL),
    Row("MHA 2048", sizes=_square(1, (32, 32), 2048, 128), **_HEADS),
    Row("MQA 2048", sizes=_square(1, (32, 1), 2048, 128), **_HEADS),
    Row("D64 2048", sizes=_square(1, _LLM, 2048, 64), **_HEADS),
    Row("D80 2048", sizes=_square(1, (32, 32), 2048, 80), **_HEADS),
    Row("D96 2048", sizes=_square(1, (32, 32), 2048, 96), **_HEADS),
    Row("192/128 4096", sizes=_square(1, (32, 32), 4096, 192, 128), **_HEADS),
    Row("256 4096", sizes=_square(1, (16, 8), 4096, 256), **_HEADS),
    *(Row(f"512 {n}", sizes=_square(1, (8, 1), n, 512), **_HEADS) for n in (2048, 8192)),
    *(Row(f"decode B{b} {n}", sizes=_cache(b, n), **_DECODE) for b, n in ((1, 512), (1, 2048), (1, 8192), (1, 32768))),
    *(Row(f"decode B{b} {n}", sizes=_cache(b, n), **_DECODE) for b, n in ((8, 8192), (32, 2048))),
    Row("decode lengths B32 8192", sizes=_cache(32, 8192), lengths=True, **_DECODE),
    Row("decode MHA B8 2048", sizes=_cache(8, 2048, heads=(32, 32)), **_DECODE),
    Row("decode MQA B8 8192", sizes=_cache(8, 8192, heads=(32, 1)), **_DECODE),
    Row("decode gpt-oss B8 8192", sizes=_cache(8, 8192, 1, (64, 8), 64), window=(127, 0), sinks=True, **_DECODE),
    Row("speculative 4/8192", sizes=_cache(1, 8192, 4), **_DECODE),
    Row("decode 512 B1 8192", sizes=_cache(1, 8192, 1, (8, 1), 512), **_DECODE),
    *(Row(f"MLA absorbed B{b} 4096", sizes=_mla(b), shared=True, **_DECODE) for b in (1, 32, 64)),
    Row("sinks 2048", "windows, sinks, softcap", _2048, causal=True, sinks=True),
    Row("softcap 2048", "windows, sinks, softcap", _2048, causal=True, softcap=50.0),
    Row("window 1024 8192", "windows, sinks, softcap", _square(1, _LLM, 8192, 128), window=(1023, 0)),
    Row("gpt-oss window 4096", "windows, sinks, softcap", _square(1, (64, 8), 4096, 64), window=(127, 0), sinks=True),
    Row("Gemma 2 window softcap 8192", "windows, sinks, softcap", _square(1, (16, 8), 8192, 256),
        window=(4095, 0), softcap=50.0),
    Row("left-padded 8x2048", "batches and packing", _square(8, _LLM, 2048, 128), causal=True, left_padded=True),
    Row("packed 50 in 8192", "batches and packing", _square(1, _LLM, 8192, 128), causal=True, packed=50),
    Row("ALiBi 2048", "masks as tensors", _2048, mask=alibi),
    Row("causal as bool 2048", "masks as tensors", _2048, mask=causal_bool),
    Row("causal as bf16 2048", "masks as tensors", _square(2, _LLM, 2048, 128), mask=causal_float),
    Row("prefix 2048", "masks as tensors", _2048, mask=prefix),
    Row("ViT B64 257", "vision", _VIT),
    Row("SAM B25 196", "vision", _square(25, (16, 16), 196, 80)),
    Row("Swin B1024 49", "vision", _SWIN, mask=bias),
    Row("full 1024", "vision", _square(1, (24, 24), 1024, 128)),
    Row("SDXL self 4096", "image and video generation", _SDXL),
    Row("SDXL cross 4096/77", "image and video generation", (2, 10, 10, 4096, 77, 64, 64)),
    Row("SDXL fp16 4096", "image and video generation", _SDXL, dtype=FP16),
    Row("Flux 4608", "image and video generation", _square(1, (24, 24), 4608, 128)),
    Row("video 16384", "image and video generation", _square(1, (24, 24), 16384, 128)),
    Row("BERT lengths B32 384", "encoders", _BERT, lengths=True),
    Row("BERT padding B32 384", "encoders", _BERT, lengths=True, as_mask=True),
    Row("T5 bias B8 512", "encoders", _T5, mask=bias),
    Row("Whisper 1500", "encoders", _WHISPER),
    Row("Whisper padding 1500", "encoders", _WHISPER, lengths=True, as_mask=True),
    Row("Whisper cross decode 1500", "encoders", _cache(8, 1500, 1, (20, 20), 64), cached=True),
    Row("fp32 2048", "fp32", _2048, causal=True, dtype=FP32),
    Row("fp32 full 1024", "fp32", _square(4, (12, 12), 1024, 64), dtype=FP32),
    Row("train B2 2048", sizes=_square(2, _LLM, 2048, 128), causal=True, **_TRAIN),
    Row("train B2 2049", sizes=_square(2, _LLM, 2049, 128), causal=True, **_TRAIN),
    Row("train 8192", sizes=_square(1, _LLM, 8192, 128), causal=True, **_TRAIN),
    Row("train GPT-2 B8 1024", sizes=_square(8, (12, 12), 1024, 64), causal=True, **_TRAIN),
    Row("train MQA 2048", sizes=_square(1, (32, 1), 2048, 128), causal=True, **_TRAIN),
    Row("train D96 2048", sizes=_square(1, (32, 32), 2048, 96), causal=True, **_TRAIN),
    Row("train 192/128 2048", sizes=_square(1, (32, 32), 2048, 192, 128), causal=True, **_TRAIN),
    Row("train 256 2048", sizes=_square(1, (16, 8), 2048, 256), causal=True, **_TRAIN),
    Row("train fp16 2048", sizes=_2048, causal=True, dtype=FP16, **_TRAIN),
    Row("train fp32 1024", sizes=_square(4, (12, 12), 1024, 64), causal=True, dtype=FP32, **_TRAIN),
    Row("train window 1024 8192", sizes=_square(1, _LLM, 8192, 128), window=(1023, 0), **_TRAIN),
    Row("train sinks 2048", sizes=_2048, causal=True, sinks=True, **_TRAIN),
    Row("train softcap 2048", sizes=_2048, causal=True, softcap=50.0, **_TRAIN),
    Row("train left-padded 4x2048", sizes=_square(4, _LLM, 2048, 128), causal=True, left_padded=True, **_TRAIN),
    Row("train packed 50 in 8192", sizes=_square(1, _LLM, 8192, 128), causal=True, packed=50, **_TRAIN),
    Row("train ALiBi 2048", sizes=_2048, mask=alibi, **_TRAIN),
    Row("train causal as bool 2048", sizes=_2048, mask=causal_bool, **_TRAIN),
    Row("train prefix 2048", sizes=_2048, mask=prefix, **_TRAIN),
    Row("train ViT B64 257", sizes=_VIT, **_TRAIN),
    Row("train Swin B1024 49", sizes=_SWIN, mask=bias, mask_gradient=True, **_TRAIN),
    Row("train SDXL self 4096", sizes=_SDXL, **_TRAIN),
    Row("train SDXL cross 4096/77", sizes=(2, 10, 10, 4096, 77, 64, 64), **_TRAIN),
    Row("train Flux 4608", sizes=_square(1, (24, 24), 4608, 128), **_TRAIN),
    Row("train BERT padding B32 384", sizes=_BERT, lengths=True, as_mask=True, **_TRAIN),
    Row("train Whisper 1500", sizes=_WHISPER, **_TRAIN),
    Row("train T5 bias B8 512", sizes=_T5, mask=bias, mask_gradient=True, **_TRAIN),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


def chosen(words: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows in whose names one of the words is; all rows without words. Raises ValueError for a word of none."""
    for word in words:
        if not any(word in row.name for row in rows):
            raise ValueError(f"ROW: expected a part of a row's name, such as decode or 'causal 2048', got {word!r}")
    return [row for row in rows if not words or any(word in row.name for word in words)]
