"""The grid on which every backend is compared with the float64 reference on a GPU.

Not a full product, which would take hours: each group sweeps one thing and lets layout and head counts rotate, so that
most pairs of features meet somewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cases import BF16, FP16, FP32, LAYOUTS, Case
from features import BROADCASTS

LENGTHS = (1, 7, 64, 127, 128, 129, 1000, 2049)
RECTANGLES = ((1, 1000), (7, 129), (129, 1000), (1000, 2049), (64, 7), (2049, 127))
HEAD_DIMS = (64, 72, 96, 128, 256)
HEADS = ((8, 8), (8, 2), (8, 1))

_BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16)
_MIXED = _BASE.but(q_len=65, kv_len=200, head_dim=64)  # multiples of nothing


def groups() -> dict[str, list[Case]]:
    """Group -> its cases."""
    layouts, heads = itertools.cycle(("bhsd", "bshd", "sliced")), itertools.cycle(HEADS)

    def turn(case: Case) -> Case:
        q_heads, kv_heads = next(heads)
        return case.but(layout=next(layouts), q_heads=q_heads, kv_heads=kv_heads)

    train = {"grads": "qkv"}
    square = [turn(_BASE.but(q_len=s, kv_len=s, mask=m, **train)) for m in ("none", "causal") for s in LENGTHS]
    rectangles = [
        turn(_BASE.but(q_len=q, kv_len=kv, mask=m, **train)) for m in ("none", "causal") for q, kv in RECTANGLES
    ]
    dims = [
        turn(_BASE.but(q_len=s, kv_len=s, head_dim=d, mask="causal", **train)) for d, s in _zip(HEAD_DIMS, LENGTHS[3:])
    ]
    dims += [turn(_MIXED.but(head_dim=d, **train)) for d in HEAD_DIMS]
    dims += [
        turn(_MIXED.but(head_dim=d, value_dim=v, mask="causal", **train)) for d, v in ((192, 128), (64, 128), (128, 64))
    ]
    layout = [_BASE.but(layout=name, mask=m, **train) for name in LAYOUTS for m in ("causal", "bool:b1qk")]
    mask = [turn(_MIXED.but(mask=f"bool:{s}", grads="qkv" * (n % 2))) for n, s in enumerate(BROADCASTS)]
    mask += [turn(_MIXED.but(mask=f"additive:{s}", grads="qkv" * (n % 2 == 0))) for n, s in enumerate(BROADCASTS)]
    mask += [turn(_BASE.but(mask=m, **train)) for m in ("bool:b1qk", "additive:1hqk", "finfo:b1qk")]
    mask += [
        _MIXED.but(mask="bool:b11k", keep=0.0, **train),
        _MIXED.but(mask="bool:", keep=0.0, **train),
        _MIXED.but(mask="bool:bhqk", keep=0.01, **train),  # most rows see one key or none
        _MIXED.but(mask="additive:b1qk", mask_dtype=FP32, **train),
        _MIXED.but(mask="additive:b1qk", mask_dtype=FP32, grads="qkvm"),
        _MIXED.but(mask="additive:1hqk", grads="m", q_len=64, kv_len=128),
        _MIXED.but(mask="finfo:b1qk", mask_dtype=FP32),
        _MIXED.but(mask="finfo:b11k", mask_dtype=FP32, **train),
        _MIXED.but(mask="bool:b1qk", window=(40, 3), layout="sliced", **train),
        _MIXED.but(mask="bool:b1qk", window=(-1, 0), q_len=200, **train),  # a causal band as well
        _MIXED.but(mask="bool:hqk", kv_lengths=(200, 31), **train),
        _MIXED.but(mask="additive:qk", q_lengths=(3, 65), kv_lengths=(150, 200), **train),
    ]
    window = [
        turn(_BASE.but(q_len=q, kv_len=kv, window=w, mask=m, **train))
        for q, kv, w, m in (
            (129, 129, (16, 0), "none"), (129, 129, (0, 0), "none"), (129, 1000, (64, -1), "causal"),
            (1000, 1000, (128, 0), "none"), (64, 1000, (-1, 7), "none"), (200, 65, (10, 3), "none"),
            (127, 127, (30, 30), "none"), (129, 300, (5000, 1), "none"),
        )
    ]  # fmt: skip
    sinks = [
        turn(case.but(sinks=dtype, grads=grads))
        for case, dtype, grads in (
            (_BASE, FP32, "qkvs"), (_BASE.but(mask="causal"), BF16, "qkvs"), (_BASE.but(mask="causal"), FP32, ""),
            (_BASE.but(window=(20, 0)), FP32, "qkvs"), (_MIXED.but(mask="bool:b1qk"), FP32, "qkvs"),
            (_MIXED.but(kv_lengths=(200, 3), mask="causal"), BF16, "qkvs"),
            (_MIXED.but(q_len=300, mask="causal"), FP32, "s"),
            (_MIXED.but(mask="additive:b11k"), FP32, "qkv"), (_BASE.but(kv_len=1), FP32, "qkvs"),
        )
    ]  # fmt: skip
    lengths = [
        turn(_MIXED.but(q_lengths=q, kv_lengths=kv, mask=m, window=w, **train))
        for q, kv, m, w in (
            (None, (200, 17), "none", None), (None, (0, 200), "none", None), (None, (200, 64), "causal", None),
            ((65, 3), None, "none", None), ((0, 65), (200, 200), "causal", None), ((65, 20), (128, 20), "causal", None),
            ((40, 65), (199, 90), "none", (30, 2)), (None, (-5, 999), "causal", None),
            ((33, 65), (20, 200), "causal", (9, 0)),
        )
    ]  # fmt: skip
    lengths += [turn(_BASE.but(batch=3, q_lengths=(129, 64, 1), kv_lengths=(129, 64, 1), mask="causal", **train))]
    interval = [
        turn(_MIXED.but(mask=f"intervals:{s}", window=w, kv_lengths=kv, grads=g))
        for s, w, kv, g in (
            ("bq", None, None, "qkv"), ("b1", None, None, "qkv"), ("1q", None, None, ""), ("11", None, None, "qkv"),
            ("bq", (40, 0), None, "qkv"), ("b1", (-1, 0), None, "qkv"), ("bq", None, (200, 77), ""),
            ("b1", None, (5, 200), "qkv"),
        )
    ]  # fmt: skip
    long = _BASE.but(q_len=1000, kv_len=1000)
    segments = [
        turn(c.but(mask=f"segments:{m}", window=w, sinks=s, grads=g))
        for c, m, w, s, g in (
            (_BASE, "3", None, None, "qkv"), (long, "3c", None, None, "qkv"), (_MIXED, "5", None, None, "qkv"),
            (_BASE.but(q_len=2049, kv_len=2049), "pc", None, None, "qkv"), (_MIXED, "5c", None, FP32, "qkvs"),
            (_MIXED, "pc", None, None, "qkv"), (long.but(batch=1, head_dim=64), "3c", (60, -1), BF16, "qkvs"),
            (_MIXED.but(q_len=200), "5c", (20, 0), None, "qkv"),
            (_BASE.but(batch=5, head_dim=72), "pc", None, None, "qkv"),
            (_MIXED.but(return_lse=True), "5c", None, None, "qkv"), (_MIXED, "5c", None, None, ""),
        )
    ]  # fmt: skip
    other = [
        _BASE.but(scale=0.0, **train),
        _BASE.but(scale=-0.05, mask="causal", **train),
        _BASE.but(return_lse=True, mask="causal"),
        _BASE.but(return_lse=True, mask="causal", **train),
        _MIXED.but(return_lse=True, sinks=FP32, kv_lengths=(200, 0), grads="qkvs"),
        _MIXED.but(return_lse=True, mask="bool:b1qk", grads="q"),
        _BASE.but(softcap=20.0, mask="causal", **train),
        _BASE.but(mask="causal", grads="k"),
        _BASE.but(mask="causal", grads="qv", layout="bshd"),
        _BASE.but(batch=1, q_heads=32, kv_heads=8, q_len=1000, kv_len=1000, mask="causal", **train),
        _BASE.but(batch=5, q_heads=6, kv_heads=3, mask="causal", **train),  # powers of two nowhere
        _BASE.but(kv_len=0, sinks=FP32),
        _BASE.but(q_len=0),
    ]
    half = [
        turn(c.but(dtype=FP16))
        for c in (*square[8::2], *rectangles[1::3], *dims[::3], *mask[:4], *window[:3], *sinks[:3])
    ]
    half += [turn(c.but(dtype=FP16)) for c in (*lengths[:4], *interval[:3])]
    single = [
        turn(c.but(dtype=FP32)) for c in (*square[9::3], *rectangles[::4], *mask[1:20:6], *window[:2], *sinks[:2])
    ]
    return {
        "square": square, "rectangles": rectangles, "dims": dims, "layouts": layout, "masks": mask, "windows": window,
        "sinks": sinks, "lengths": lengths, "intervals": interval,
        "segments": segments, "other": other, "decode": list(_decode()),
        "float16": half, "float32": single,
    }  # fmt: skip


def _decode() -> Iterator[Case]:
    """Few queries against many keys, no gradients."""
    base = _BASE.but(batch=3, q_len=1, mask="causal", layout="cache")
    for kv_len, q_len in _zip((1, 7, 129, 1000, 2049, 8192), (1, 1, 4, 2, 16, 1)):
        yield base.but(kv_len=kv_len, q_len=min(q_len, kv_len))
    for head_dim, (q_heads, kv_heads) in _zip(HEAD_DIMS, HEADS):
        yield base.but(kv_len=777, head_dim=head_dim, q_heads=q_heads, kv_heads=kv_heads)
    long = base.but(kv_len=1500, batch=2)
    yield from (
        long.but(q_heads=8, kv_heads=1, q_len=8),  # 64 rows
        long.but(q_heads=7, kv_heads=1),
        long.but(kv_lengths=(1500, 33)),
        long.but(kv_lengths=(0, 1), q_len=2),
        long.but(kv_lengths=(1400, 9), q_lengths=(2, 4), q_len=4),
        long.but(window=(128, 0), kv_lengths=(1500, 600)),
        long.but(window=(200, -1), sinks=FP32, q_len=3),
        long.but(sinks=BF16, kv_lengths=(1500, 0)),
        long.but(mask="intervals:b1", q_len=3),
        long.but(mask="intervals:bq", q_len=3, window=(900, 0)),
        long.but(mask="segments:pc", q_len=3),
        long.but(mask="segments:5c", q_len=8),
        long.but(mask="bool:b11k", layout="bhsd"),
        long.but(mask="additive:bhqk", q_len=2, layout="sliced"),
        long.but(mask="finfo:b11k", mask_dtype=FP32),
        long.but(softcap=30.0),
        long.but(return_lse=True, sinks=FP32),
        long.but(value_dim=64, layout="misaligned"),
        long.but(scale=-0.1, layout="strided"),
        long.but(dtype=FP16, kv_lengths=(1500, 257)),
        long.but(dtype=FP16, window=(100, 0), sinks=FP16, head_dim=64),
        long.but(dtype=FP32, kv_lengths=(1500, 257)),
        long.but(dtype=FP32, mask="bool:b1qk", q_len=4),
        long.but(q_heads=80, kv_heads=1, head_dim=64),  # more heads than a tile has rows
    )
    wide = long.but(q_heads=8, kv_heads=1, head_dim=512)
    yield from (
        wide,
        wide.but(head_dim=320, value_dim=256, q_heads=12, kv_heads=2),
        wide.but(head_dim=576, value_dim=512, kv_lengths=(1500, 33), q_len=3),
        wide.but(q_len=8, mask="intervals:b1", sinks=FP32),  # 64 rows
        wide.but(q_len=8, mask="intervals:bq", window=(900, 0)),
        wide.but(q_len=16, kv_lengths=(0, 1400), q_lengths=(16, 5), return_lse=True),
        wide.but(head_dim=576, value_dim=512, q_heads=128, dtype=FP16),
        wide.but(mask="additive:b1qk", softcap=30.0, layout="sliced"),
        wide.but(dtype=FP32, q_len=4),
        wide.but(dtype=FP32, mask="bool:b1qk", layout="misaligned"),
    )


def _zip(long: tuple, short: tuple) -> Iterator[tuple]:
    """As zip, the shorter one repeated."""
    return zip(long, itertools.cycle(short)) if len(long) >= len(short) else zip(itertools.cycle(long), short)


GROUPS = groups()
#: Every case once, in a fixed order.
GRID: list[Case] = list(dict.fromkeys(case for cases in GROUPS.values() for case in cases))


def must_serve(backend: str, case: Case) -> bool:
    """True when a refusal would be a defect: what each backend is for, on an H100."""
    c = case
    value_dim = c.head_dim if c.value_dim is None else c.value_dim
    empty = 0 in (c.batch, c.q_len, c.kv_len)
    if backend == "reference":
        return True
    if empty:
        return False
    if backend == "torch":
        return c.softcap is None and c.sinks is None and not c.return_lse and "m" not in c.grads
    if backend == "decode":
        group = c.q_heads // c.kv_heads
        few = c.q_len * group <= 64 or (c.q_len <= 16 and (group > 64 or max(c.head_dim, value_dim) > 256))
        return few and not c.grads and c.softcap is None and c.mask_kind in ("none", "causal", "intervals", "segments")
    trivial = c.q_len == c.kv_len == 1 and bool(c.grads)
    plain = c.softcap is None and "m" not in c.grads and not trivial
    return plain and c.dtype in (BF16, FP16) and max(c.head_dim, value_dim) <= 128
