"""Chunks: several tiles of rows, or one of 128, whose keys are divided. On the CPU through Triton's interpreter, on a
GPU natively; then which calls are chunks, and how they are launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, a_problem, check, make, relative_error

import fastattn
from fastattn.backends.triton.decode import chunks, shapes
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.backends.triton.limits import usual_sm_count
from fastattn.call import Problem
from fastattn.dispatch import preference, registry

pytestmark = pytest.mark.usefixtures("poison")

#: 148 rows to a K/V head: two tiles of 128 or three of 64, the last one partly empty. Keys are multiples of nothing.
CASE = Case(batch=2, q_heads=4, kv_heads=1, q_len=37, kv_len=203, head_dim=24, dtype=FP32, return_lse=True)
FEATURES = {
    "plain": CASE,
    "causal": CASE.but(mask="causal"),
    "more-queries-than-keys": CASE.but(mask="causal", kv_len=20),  # the first rows see nothing
    "half": CASE.but(mask="causal", dtype=FP16, head_dim=64),
    "bfloat16": CASE.but(mask="causal", dtype=BF16, head_dim=64),
    "window": CASE.but(window=(50, 0)),
    "window-two-sided": CASE.but(window=(20, 3)),
    "lengths": CASE.but(mask="causal", kv_lengths=(203, 61), q_lengths=(37, 11), sinks=FP32),
    "lengths-none": CASE.but(mask="causal", kv_lengths=(0, 203), sinks=FP64),
    "lengths-window": CASE.but(window=(40, 0), kv_lengths=(90, 203)),
    "intervals": CASE.but(mask="intervals:bq"),
    "intervals-shared": CASE.but(mask="intervals:b1", dtype=FP16),
    "left-padding": CASE.but(mask="segments:pc"),
    "segments": CASE.but(mask="segments:5c"),
    "segments-window": CASE.but(mask="segments:5", window=(30, 1), sinks=FP32),
    "bool": CASE.but(mask="bool:b1qk", keep=0.3),
    "bool-keys": CASE.but(mask="bool:b11k"),
    "additive": CASE.but(mask="additive:1hqk", mask_dtype=BF16),
    "finfo": CASE.but(mask="finfo:b1qk"),
    "softcap": CASE.but(mask="causal", softcap=3.0, sinks=BF16),
    "groups-astride": CASE.but(mask="causal", q_heads=6, kv_heads=2, q_len=50),  # 128 is no multiple of 3 heads
    "no-groups": CASE.but(mask="causal", kv_heads=4, q_len=70),
    "unequal": CASE.but(mask="causal", head_dim=192, value_dim=128, batch=1, dtype=FP16),
    "padded-dims": CASE.but(mask="causal", head_dim=80, batch=1),
    "large": CASE.but(mask="causal", head_dim=256, batch=1, dtype=FP16),
    "everything": CASE.but(
        mask="additive:b1qk", window=(90, 1), q_lengths=(37, 20), kv_lengths=(203, 40), sinks=FP32, softcap=4.0,
        scale=0.3,
    ),
}  # fmt: skip


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls are chunks, and float32 is, on a GPU too."""
    monkeypatch.setattr(launch, "is_chunk", lambda p: shapes.rows(p) > shapes.MAX_ROWS and not shapes.many_heads(p))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", FEATURES)
def test_tiles_of_128_rows(name: str, device: str, force: Callable[..., None]) -> None:
    """As the rules launch them on Hopper, where there are no gaps. Every other one in one split; in three, some of
    which have nothing to do, the rest."""
    force(splits=1 + 2 * (list(FEATURES).index(name) % 2), block_m=128, block_n=32, warps=8, stages=2)
    check(FEATURES[name], "decode", device)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", FEATURES)
def test_tiles_of_64_rows(name: str, device: str, force: Callable[..., None]) -> None:
    force(splits=3 - 2 * (list(FEATURES).index(name) % 2), block_m=64)
    check(FEATURES[name], "decode", device)


@pytest.mark.usefixtures("always")
def test_wide_heads(device: str, force: Callable[..., None]) -> None:
    force()
    check(CASE.but(mask="causal", head_dim=320, value_dim=256, batch=1, dtype=FP16), "decode", device)


@pytest.mark.usefixtures("always")
def test_bits_repeat_and_rows_that_see_nothing_give_zero(device: str, force: Callable[..., None]) -> None:
    force(splits=3, block_m=128, block_n=32, warps=8, stages=2)
    x = make(CASE.but(dtype=FP16, head_dim=64), device)
    lengths = torch.tensor([20, 203], dtype=torch.int32, device=device)
    hidden = torch.arange(203, device=device) >= lengths[:, None]
    k, v = (t.masked_fill(hidden[:, None, :, None], torch.nan) for t in x.clean[1:])

    def attend() -> Any:
        options: dict[str, Any] = {"mask": "causal", "kv_lengths": lengths, "return_lse": True}
        return fastattn.scaled_dot_product_attention(x.clean[0], k, v, backend="decode", **options)

    out, lse = attend()
    again, lse_again = attend()
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    assert not out[0, :, :17].any() and (lse[0, :, :17] == -torch.inf).all()
    assert out[0, :, 17:].any() and out.isfinite().all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("splits", [1, 2])
def test_scores_of_any_size(splits: int, device: str, force: Callable[..., None]) -> None:
    """Exponents of 2: of huge scores as right as of small ones, and a negative scale."""
    force(splits=splits, block_m=128, block_n=32, warps=8, stages=2)
    x = make(CASE, device)
    for scale in (300.0, -0.4, 1e-8):
        options: dict[str, Any] = {"scale": scale, "return_lse": True}
        got = fastattn.scaled_dot_product_attention(*x.clean, **options, backend="decode")
        want = fastattn.scaled_dot_product_attention(*(t.double() for t in x.clean), **options, backend="reference")
        assert relative_error(got[0], want[0]) < 1e-4
        torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "lengths", "window", "left padding", "bool", "softcap"])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, q_len",
    [(32, 8, 128, 32), (32, 8, 128, 100), (64, 8, 64, 21), (32, 1, 128, 33), (32, 32, 128, 90), (16, 8, 256, 60),
     (8, 1, 512, 32)],
)  # fmt: skip
def test_measured_sizes(heads: int, kv_heads: int, dim: int, q_len: int, kind: str) -> None:
    """As they are routed, at sizes that are measured; what nobody sees is NaN."""
    kv_len = 4099
    q, k, v = (
        torch.randn(1, h, n, dim, device="cuda", dtype=BF16) for h, n in ((heads, q_len), *[(kv_heads, kv_len)] * 2)
    )
    hidden, options = torch.zeros(kv_len, dtype=torch.bool, device="cuda"), dict[str, Any](mask="causal")
    if kind == "lengths":
        options["kv_lengths"] = torch.tensor([3001], dtype=torch.int32, device="cuda")
        hidden[3001:] = True
    elif kind == "window":
        options["window"] = (2999, 0)
        hidden[: kv_len - q_len - 2999] = True
    elif kind == "left padding":
        padding = torch.tensor([777], dtype=torch.int32, device="cuda")
        options["mask"] = fastattn.Segments.left_padded(padding, q_len, kv_len)
        hidden[:777] = True
    elif kind == "bool":
        options["mask"] = torch.rand(1, 1, q_len, kv_len, device="cuda") < 0.5
    elif kind == "softcap":
        options["softcap"] = 20.0
    clean = [x.double() for x in (q, k, v)]
    k[:, :, hidden], v[:, :, hidden] = torch.nan, torch.nan
    options["return_lse"] = True
    p = fastattn.explain(q, k, v, **options).problem
    if not chunks.is_chunk(p):  # tiles of 64 rows are slower
        assert kind in ("left padding", "bool") and q_len > 64
        pytest.skip("is no chunk")
    got = [fastattn.scaled_dot_product_attention(q, k, v, **options, backend="decode") for _ in range(3)]
    wide = dim > 256 and kind not in ("left padding", "bool")  # the Hopper kernel for wide heads divides keys, too
    assert fastattn.explain(q, k, v, **options).chosen == ("hopper" if wide else "decode")
    want, lse = fastattn.scaled_dot_product_attention(*clean, **options, backend="reference")
    assert relative_error(got[0][0], want) < 4e-3
    torch.testing.assert_close(got[0][1].double(), lse, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(x, y) for other in got[1:] for x, y in zip(got[0], other, strict=True))


# Without a kernel: what is a chunk, and how it is launched.

CHUNK = a_problem(q_len=32, kv_len=4096)


def but(**changes: Any) -> Problem:
    return dataclasses.replace(CHUNK, **changes)


INT32 = torch.int32
HEADS = {
    "GQA": {},
    "MHA": {"kv_heads": 32, "q_len": 100},
    "MQA": {"kv_heads": 1},
    "D64": {"q_heads": 64, "head_dim": 64, "value_dim": 64},
    "D192": {"head_dim": 192},
    "D256": {"q_heads": 16, "head_dim": 256, "value_dim": 256, "q_len": 64},
    "D512": {"q_heads": 8, "kv_heads": 1, "head_dim": 512, "value_dim": 512},
    "batch": {"batch": 8},
    "large batch": {"batch": 32},
    "lengths": {"batch": 4, "kv_lengths": True, "q_lengths": True},
    "softcap": {"softcap": 30.0, "sinks": True},
    "window": {"left": 2047, "kv_len": 8192},
    "left padding": {"mask": "segments", "mask_shape": (3, 1), "mask_dtype": INT32},
    "mask of keys": {"mask": "bool", "mask_shape": (1, 1, 1, 4096), "mask_dtype": torch.bool},
    "mask with rows": {"mask": "additive", "mask_shape": (1, 1, 32, 4096), "mask_dtype": BF16},
}


@pytest.mark.parametrize("name", HEADS)
def test_decode_is_asked_first_and_explain_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastattn.backends.triton import launcher

    monkeypatch.setattr(launcher, "missing_on_a_gpu", list)
    p = but(**HEADS[name])
    assert chunks.is_chunk(p) and launch.fits(p)
    assert registry.backend("decode").reasons(p) == []
    wide = name == "D512"  # the Hopper kernel for wide heads divides keys, too
    assert preference.ordered(p, registry.NAMES)[0] == ("hopper" if wide else "decode")
    rule = preference.rule_for(p)
    assert rule is not None and ("head dims over 256" if wide else "do not divide the keys") in rule.why


@pytest.mark.parametrize(
    "changes",
    [
        {"q_len": 16},  # one tile
        {"q_len": 300},  # 96 of 132 multiprocessors work
        {"q_len": 2048},
        {"kv_len": 300},  # few keys
        {"batch": 8, "kv_heads": 32, "q_len": 100},  # enough programs elsewhere
        {"left": 255, "kv_len": 1 << 17},  # a window of few keys, however many there are
        {"dtype": FP32},
        {"q_len": 513, "q_heads": 1, "kv_heads": 1},
        {"q_len": 512, "q_heads": 32, "kv_heads": 1},  # as many rows as a prompt
    ],
    ids=str,
)
def test_what_is_no_chunk(changes: dict[str, Any]) -> None:
    p = but(**changes)
    assert not chunks.is_chunk(p)
    assert preference.rule_for(p) != preference._CHUNK
    assert launch.fits(p) == (shapes.rows(p) <= shapes.MAX_ROWS)


def test_gradients_go_elsewhere() -> None:
    p = but(grads="qkv")
    assert preference.rule_for(p) is None
    assert "has no gradients" in registry.backend("decode").reasons(p)


def test_multiprocessors_are_filled() -> None:
    """By programs of one tile of rows each, and none that has less than a few steps."""
    for heads, kv_heads in ((32, 8), (32, 32), (32, 1), (64, 8), (4, 1)):
        for batch in (1, 2, 8):
            for q_len in (17, 20, 32, 64, 100, 128, 200):
                for kv_len in (1024, 4096, 1 << 15):
                    p = but(q_heads=heads, kv_heads=kv_heads, batch=batch, q_len=q_len, kv_len=kv_len)
                    if not chunks.is_chunk(p):
                        continue
                    x = launch.choose(p, 132)
                    tiles = batch * kv_heads * -(-shapes.rows(p) // x.block_m)
                    programs = tiles * x.splits
                    assert x.near and x.block_m == chunks.MANY_ROWS
                    assert -(-kv_len // x.splits) >= x.block_n
                    waves = -(-programs // 132)
                    assert programs >= 0.6 * 132 * waves or kv_len / x.splits <= 128
                    assert programs * x.block_m * p.value_dim * 4 < 40 << 20  # what is exchanged stays in the L2 cache


def test_the_row_of_the_users_sweep() -> None:
    """32 queries over 4096 keys: 8 tiles, whose keys 16 programs divide: 128 of 132 multiprocessors."""
    x = launch.choose(CHUNK, 132)
    assert (x.splits, x.block_m, x.block_n, x.warps, x.near) == (16, 128, 64, 8, True)


def test_tiles_with_gaps_have_64_rows() -> None:
    """The masks of more rows, and values that are cleared, would not fit the registers."""
    for name in ("left padding", "mask of keys", "mask with rows"):
        x = launch.choose(but(**HEADS[name]), 132)
        assert x.block_m == 64 and x.near and x.splits > 1
    assert launch.choose(but(capability=(8, 0)), 108).block_m == 64


def test_a_growing_cache_needs_no_other_kernel() -> None:
    for changes in ({}, {"batch": 8}, {"batch": 32}, {"kv_heads": 1}, {"q_heads": 8, "kv_heads": 1, "head_dim": 512}):
        found = set()
        for kv_len in (*range(513, 6000, 97), 1 << 15, 10**5):
            p = but(**changes, kv_len=kv_len)
            if chunks.is_chunk(p):
                x = launch.choose(p, 132)
                found.add(dataclasses.replace(x, splits=min(x.splits, 2)))
        assert len(found) == 1, changes


def test_the_model_follows_its_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured: `python -m benchmarks.tune_chunks`."""
    assert usual_sm_count((9, 0)) == 132
    monkeypatch.setattr(chunks, "COSTS", dataclasses.replace(chunks.COSTS, many=30.0))
    assert not chunks._promising.__wrapped__(CHUNK)  # type: ignore[attr-defined]
