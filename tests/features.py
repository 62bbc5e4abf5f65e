"""Every feature of the op once, small: the cases that the CPU tests share."""

from __future__ import annotations

from cases import BF16, FP32, LAYOUTS, Case

_TINY = Case(batch=2, q_heads=4, kv_heads=2, q_len=9, kv_len=13, head_dim=16)
_SQUARE = _TINY.but(kv_len=9)
#: The broadcast forms of a mask, 0-d to 4-d.
BROADCASTS = ("bhqk", "b1qk", "1h1k", "b11k", "11q1", "1hq1", "hqk", "1qk", "h11", "qk", "q1", "1k", "k", "1", "")

FEATURES: dict[str, Case] = {
    "plain": _TINY,
    "plain-square": _SQUARE,
    "causal": _SQUARE.but(mask="causal"),
    "causal-short-q": _TINY.but(mask="causal"),
    "causal-long-q": _TINY.but(mask="causal", q_len=13, kv_len=5),  # the first rows see nothing
    "causal-one-blind": _TINY.but(mask="causal", q_len=14),  # only the very first row
    "window": _TINY.but(window=(3, 2)),
    "window-left": _TINY.but(window=(4, -1)),
    "window-right": _TINY.but(window=(-1, 1)),
    "window-self": _SQUARE.but(window=(0, 0)),
    "window-wide": _TINY.but(window=(100, 100)),
    "window-causal": _TINY.but(window=(3, 5), mask="causal"),
    "window-long-q": _TINY.but(window=(2, 1), q_len=13, kv_len=5),
    "window-bool": _TINY.but(window=(5, 0), mask="bool:b1qk"),
    "window-additive": _TINY.but(window=(6, -1), mask="additive:1hqk"),
    **{f"bool-{s or '0d'}": _TINY.but(mask=f"bool:{s}") for s in BROADCASTS},
    "bool-none": _TINY.but(mask="bool:b1qk", keep=0.0),
    "bool-none-0d": _TINY.but(mask="bool:", keep=0.0),
    "bool-all": _TINY.but(mask="bool:b11k", keep=1.0),
    "bool-one-key": _TINY.but(mask="bool:bhqk", keep=0.1),
    **{f"additive-{s or '0d'}": _TINY.but(mask=f"additive:{s}") for s in BROADCASTS},
    "additive-none": _TINY.but(mask="additive:b1qk", keep=0.0),
    "additive-float": _TINY.but(mask="additive:b1qk", mask_dtype=FP32),
    "additive-bf16": _TINY.but(mask="additive:1hqk", mask_dtype=BF16),
    "additive-sliced": _TINY.but(mask="additive:b1qk", layout="sliced"),
    "bool-sliced": _TINY.but(mask="bool:b1qk", layout="sliced"),
    "finfo": _TINY.but(mask="finfo:b1qk", mask_dtype=FP32),
    "finfo-keys": _TINY.but(mask="finfo:b11k", mask_dtype=BF16),
    "intervals-bq": _TINY.but(mask="intervals:bq"),
    "intervals-b1": _TINY.but(mask="intervals:b1"),
    "intervals-1q": _TINY.but(mask="intervals:1q"),
    "intervals-11": _TINY.but(mask="intervals:11"),
    "intervals-window": _TINY.but(mask="intervals:bq", window=(5, 1)),
    "intervals-lengths": _TINY.but(mask="intervals:bq", kv_lengths=(13, 6)),
    "sinks": _TINY.but(sinks=FP32),
    "sinks-bf16": _TINY.but(sinks=BF16, mask="causal"),
    "sinks-long-q": _TINY.but(sinks=FP32, mask="causal", q_len=13, kv_len=5),
    "sinks-window": _TINY.but(sinks=FP32, window=(3, 0)),
    "sinks-bool": _TINY.but(sinks=FP32, mask="bool:b1qk"),
    "softcap": _TINY.but(softcap=2.0),
    "softcap-causal": _TINY.but(softcap=5.0, mask="causal"),
    "softcap-additive": _TINY.but(softcap=1.5, mask="additive:b1qk", sinks=FP32),
    "kv-lengths": _TINY.but(kv_lengths=(13, 4)),
    "kv-lengths-zero": _TINY.but(kv_lengths=(0, 7)),
    "kv-lengths-outside": _TINY.but(kv_lengths=(-3, 99)),
    "kv-lengths-causal": _TINY.but(kv_lengths=(12, 5), mask="causal"),
    "q-lengths": _TINY.but(q_lengths=(9, 2)),
    "q-lengths-causal": _TINY.but(q_lengths=(4, 0), mask="causal"),
    "lengths-causal": _TINY.but(q_lengths=(7, 9), kv_lengths=(11, 6), mask="causal"),
    "lengths-window": _TINY.but(q_lengths=(9, 5), kv_lengths=(13, 9), window=(4, 1)),
    "lengths-sinks": _TINY.but(q_lengths=(3, 9), kv_lengths=(13, 0), sinks=FP32),
    "lengths-bool": _TINY.but(q_lengths=(3, 9), kv_lengths=(13, 6), mask="bool:bhqk"),
    "lengths-additive": _TINY.but(q_lengths=(3, 9), kv_lengths=(13, 6), mask="additive:1h1k"),
    "scale": _TINY.but(scale=0.3),
    "scale-negative": _TINY.but(scale=-0.2, mask="causal"),
    "scale-zero": _TINY.but(scale=0.0),
    "heads-equal": _TINY.but(kv_heads=4, mask="causal"),
    "heads-one": _TINY.but(kv_heads=1, mask="causal"),
    "heads-three": _TINY.but(q_heads=6, kv_heads=2, mask="bool:bhqk"),
    "value-dim-larger": _TINY.but(value_dim=24, mask="causal"),
    "value-dim-smaller": _TINY.but(value_dim=5, window=(4, 4)),
    "dim-odd": _TINY.but(head_dim=7, mask="causal"),
    "one-query": _TINY.but(q_len=1, mask="causal"),
    "one-key": _TINY.but(kv_len=1),
    "one-key-sinks": _TINY.but(kv_len=1, sinks=FP32),
    "no-keys": _TINY.but(kv_len=0),
    "no-keys-sinks": _TINY.but(kv_len=0, sinks=FP32),
    "no-queries": _TINY.but(q_len=0, mask="causal"),
    "no-batch": _TINY.but(batch=0),
    **{f"layout-{name}": _SQUARE.but(layout=name, mask="causal") for name in LAYOUTS},
    "everything": _TINY.but(
        q_lengths=(9, 6), kv_lengths=(10, 13), mask="additive:b1qk", window=(6, 1), sinks=FP32, softcap=3.0, scale=0.4
    ),
}
