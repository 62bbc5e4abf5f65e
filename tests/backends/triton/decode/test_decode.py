"""The decode backend against the reference: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, a_problem, check, make, relative_error
from features import BROADCASTS, FEATURES

import fastattn
from fastattn import Intervals
from fastattn.backends.triton import launcher as triton_launch
from fastattn.backends.triton.decode import DecodeBackend, shapes
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.call import Problem

pytestmark = pytest.mark.usefixtures("poison")

#: Several steps and splits with few keys: 8 queries to a tile, heads padded, lengths that are multiples of nothing.
CASE = Case(batch=2, q_heads=4, kv_heads=1, q_len=2, kv_len=75, head_dim=24, dtype=FP32, return_lse=True)


DIMS = ((64, None), (72, None), (192, 128), (256, None), (8, 40))
GRID = [
    CASE.but(batch=1, q_heads=2 * group, kv_heads=2, q_len=q_len, head_dim=dim, value_dim=value_dim, dtype=dtype)
    for dtype in (FP16, BF16, FP32)
    for group, q_len in ((1, 1), (1, 16), (4, 1), (4, 3), (4, 16), (8, 1), (8, 3))
    for dim, value_dim in DIMS
    if dtype == FP16 or (group, q_len) == (4, 3)
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_shapes(case: Case, device: str) -> None:
    check(case.but(mask="causal"), "decode", device)


SERVED = [
    name
    for name, case in FEATURES.items()
    if case.head_dim % 8 == 0 and (case.value_dim or 8) % 8 == 0 and case.batch * case.q_len * case.kv_len
]


@pytest.mark.parametrize("name", SERVED)
def test_features(name: str, device: str) -> None:
    check(FEATURES[name].but(return_lse=True), "decode", device)


SPLIT = {
    "plain": CASE,
    "causal": CASE.but(mask="causal"),
    "causal-long-q": CASE.but(mask="causal", q_len=7, kv_len=5),
    "window": CASE.but(window=(37, 0)),
    "window-two-sided": CASE.but(window=(20, 3), q_len=4),
    "lengths": CASE.but(kv_lengths=(19, 0), mask="causal"),
    "lengths-outside": CASE.but(kv_lengths=(-7, 1000), mask="causal"),
    "lengths-both": CASE.but(batch=3, kv_lengths=(33, 1, 75), q_lengths=(1, 2, 0), mask="causal", sinks=BF16),
    "lengths-window": CASE.but(kv_lengths=(50, 18), window=(20, 0), q_len=3),
    "intervals": CASE.but(mask="intervals:bq", q_len=6),
    "intervals-shared": CASE.but(mask="intervals:b1", kv_lengths=(60, 75)),
    "intervals-window": CASE.but(mask="intervals:1q", window=(30, 0)),
    "sinks": CASE.but(sinks=FP32, mask="causal"),
    "sinks-nothing-seen": CASE.but(sinks=FP64, kv_lengths=(0, 0)),
    "softcap": CASE.but(softcap=3.0),
    "finfo": CASE.but(mask="finfo:b1qk", q_len=5),
    "finfo-float64": CASE.but(mask="finfo:b1qk", mask_dtype=FP64, q_len=5, return_lse=False),
    "additive-bf16": CASE.but(mask="additive:b1qk", mask_dtype=BF16, q_len=5, kv_lengths=(70, 20)),
    "everything": CASE.but(
        mask="additive:b1qk", window=(50, 1), q_lengths=(2, 1), kv_lengths=(75, 40), sinks=FP32, softcap=4.0, scale=0.3
    ),
}


@pytest.mark.parametrize("splits, apart", [(1, False), (2, False), (2, True), (9, False), (9, True)])
@pytest.mark.parametrize("name", SPLIT)
def test_splits(
    name: str, splits: int, apart: bool, device: str, force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One split, some, and more than there are steps; steps of 16 keys, so that there are up to 5. Combined by the last
    program of a tile, or by a second kernel."""
    force(splits=splits, block_n=16)
    monkeypatch.setattr("fastattn.backends.triton.decode.forward.combines", lambda p, launch: not apart)
    check(SPLIT[name], "decode", device)


MANY = CASE.but(q_len=37, softcap=4.0, mask="causal")  #: 148 rows to a K/V head: two or three blocks
MANY_QUERIES = {
    "causal": MANY,
    "half": MANY.but(dtype=FP16),
    "more-queries-than-keys": MANY.but(q_len=60, kv_len=33),
    "window": MANY.but(window=(9, 0), q_len=70),
    "lengths": MANY.but(q_lengths=(37, 11), kv_lengths=(75, 12), sinks=FP32),
    "intervals": MANY.but(mask="intervals:bq"),
    "additive": MANY.but(mask="additive:b1qk"),
    "groups-astride": MANY.but(q_heads=6, kv_heads=2, q_len=50),  # 128 is no multiple of 3 heads
    "wide": MANY.but(head_dim=256, batch=1, dtype=BF16),
    "unequal": MANY.but(head_dim=192, value_dim=128, batch=1),
}


@pytest.mark.parametrize("name", MANY_QUERIES)
def test_many_queries_with_a_softcap(name: str, device: str) -> None:
    """More than a tile holds, which only this kernel can do."""
    check(MANY_QUERIES[name], "decode", device)


@pytest.mark.parametrize("shape", BROADCASTS)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_broadcast_masks(kind: str, shape: str, device: str, force: Callable[..., None]) -> None:
    force(splits=2, block_n=16)
    check(CASE.but(mask=f"{kind}:{shape}", keep=0.3), "decode", device)


def test_many_splits(device: str, force: Callable[..., None]) -> None:
    """More than the combine kernel reads at a time, and more than the last program would."""
    force(splits=70, block_n=16)
    check(CASE.but(batch=1, q_len=1, kv_len=1100, head_dim=128, sinks=FP32), "decode", device)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced", "cache", "expanded", "strided", "misaligned", "dmajor"])
@pytest.mark.parametrize("mask", ["causal", "additive:b1qk"])
def test_layouts(layout: str, mask: str, device: str) -> None:
    check(CASE.but(layout=layout, mask=mask, dtype=FP16, kv_heads=2), "decode", device)


def test_broadcast_memory(device: str) -> None:
    """Masks, lengths, intervals and sinks that torch.expand or a slice made."""
    x = make(CASE, device)
    interval = torch.tensor([[[3, 40], [0, 70]]], dtype=torch.int32, device=device)  # [1, 2, 2]: lo and hi interleaved
    options = {
        "mask": Intervals(interval[..., 0], interval[..., 1]),
        "kv_lengths": torch.tensor([64], dtype=torch.int32, device=device).expand(2),
        "sinks": torch.randn(8, device=device)[::2],
    }
    compare(x.q, x.k, x.v, **options)
    compare(x.q, x.k, x.v, mask=torch.rand(75, 2, device=device).T[None, None].expand(2, 4, 2, 75) < 0.5)
    compare(x.q, x.k, x.v, mask=torch.randn(2, 1, 1, 1, device=device).expand(2, 4, 2, 75))
    lo = torch.zeros(2, 2, dtype=torch.int32, device=device)  # two layouts
    compare(x.q, x.k, x.v, mask=Intervals(lo, torch.tensor([[9, 80], [1, 5]], dtype=torch.int32, device=device).T))


@pytest.mark.parametrize("block_n", [16, 32])
@pytest.mark.parametrize("name", ["window", "causal", "intervals", "bool", "additive"])
def test_nan_in_hidden_keys(name: str, block_n: int, device: str, force: Callable[..., None]) -> None:
    force(splits=2, block_n=block_n)
    x = make(CASE.but(q_len=2), device)
    j = torch.arange(75, device=device)
    if name == "window":
        seen, options = j >= 63, {"window": (10, 0)}
    elif name == "causal":
        seen, options = j < 40, {"mask": "causal", "kv_lengths": torch.full((2,), 40, dtype=torch.int32, device=device)}
    elif name == "intervals":  # and in the gap between them
        seen = ((j >= 5) & (j < 9)) | ((j >= 50) & (j < 60))
        bounds = torch.tensor([[5, 50], [9, 60]], dtype=torch.int32, device=device)
        options = {"mask": Intervals(bounds[:1], bounds[1:])}
    else:
        seen = j % 7 == 3
        options = {"mask": seen if name == "bool" else torch.where(seen, 0.5, -torch.inf)}
    k, v = (t.masked_fill(~seen[:, None], torch.nan) for t in (x.k, x.v))
    want = fastattn.scaled_dot_product_attention(*(t.double() for t in x.clean), **options, backend="reference")
    got = fastattn.scaled_dot_product_attention(x.q, k, v, **options, backend="decode")
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("splits, apart", [(1, False), (3, False), (3, True)])
def test_nan_in_a_visible_key_shows(
    splits: int, apart: bool, device: str, force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(splits=splits, block_n=16)
    monkeypatch.setattr("fastattn.backends.triton.decode.forward.combines", lambda p, launch: not apart)
    x = make(CASE, device)
    x.k[0, :, 20, 3] = torch.nan
    x.v[1, :, 70, 5] = torch.nan
    out = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, backend="decode")
    assert out[0].isnan().all()
    assert out[1, ..., 5].isnan().all()
    assert out[1, ..., :5].isfinite().all()


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_key_of_minus_infinity(dtype: torch.dtype, device: str, force: Callable[..., None]) -> None:
    """Its score is -inf, not NaN, though D is padded; where it is the only key, the row sees nothing."""
    force(splits=2, block_n=16)
    x = make(CASE.but(dtype=dtype), device)
    x.q[..., 0] = x.q[..., 0].abs() + 0.1
    x.k[:, :, 5, 0] = -torch.inf
    seen = torch.arange(75, device=device) != 5
    got = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, backend="decode")
    want = fastattn.scaled_dot_product_attention(
        x.q.double(), x.clean[1].double(), x.clean[2].double(), mask=seen, backend="reference"
    )
    assert relative_error(got, want) < (1e-3 if dtype == FP16 else 1e-5)
    out, lse = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, mask=~seen, return_lse=True, backend="decode")
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("splits, apart", [(1, False), (3, False), (3, True)])
def test_sink_of_minus_infinity(
    splits: int, apart: bool, device: str, force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(splits=splits, block_n=16)
    monkeypatch.setattr("fastattn.backends.triton.decode.forward.combines", lambda p, launch: not apart)
    x = make(CASE, device)
    lengths = torch.tensor([40, 0], dtype=torch.int32, device=device)
    sinks = torch.tensor([-torch.inf, 0.0, 200.0, -200.0], device=device)
    compare(x.q, x.k, x.v, sinks=sinks, kv_lengths=lengths)


def test_large_scores(device: str) -> None:
    """The running maximum keeps every exponential at 1 or less; softcap saturates without overflow."""
    x = make(CASE, device)
    compare(x.q, x.k, x.v, scale=20.0, tolerance=1e-4)
    compare(x.q, x.k, x.v, scale=300.0, softcap=0.7, tolerance=1e-4)


def test_output_layout(device: str) -> None:
    """Token-major, whatever the inputs' layout and the number of splits."""
    x = make(CASE.but(layout="bshd", kv_len=300), device)
    out, lse = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, return_lse=True, backend="decode")
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32


def compare(q, k, v, tolerance: float = 1e-5, **options) -> None:
    """Decode against the float64 reference, log-sum-exp included."""
    options["return_lse"] = True
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, **options, backend="decode")
    want, want_lse = fastattn.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), **options, backend="reference"
    )
    assert relative_error(out, want) < tolerance
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


# Without a kernel: what is refused, and how a launch is chosen.

PROBLEM = a_problem()


def but(**changes) -> Problem:
    return dataclasses.replace(PROBLEM, **changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"capability": (7, 5)}, "compute capability 8.0 or newer, this GPU has 7.5"),
        ({"device": "cpu", "index": -1}, "needs an NVIDIA GPU"),
        ({"device": "mps"}, "needs an NVIDIA GPU"),
        ({"grads": "qk"}, "no gradients"),
        ({"dtype": FP64}, "float64"),
        ({"kv_len": 0}, "no queries or no keys"),
        ({"q_len": 17, "kv_len": 300}, "too many queries: 17 x 4"),
        ({"q_len": 17, "q_heads": 1024, "kv_len": 300}, "too many queries: 17 x 128"),
        ({"q_len": 17, "kv_len": 300, "head_dim": 512, "value_dim": 512}, "too many queries: 17 x 4"),
        ({"q_len": 9, "q_heads": 64, "kv_len": 300}, "too many queries: 9 x 8"),
        ({"q_len": 1 << 20, "softcap": 1.0}, "too many queries: 1048576 x 4"),
        ({"head_dim": 68}, "head dim 68"),
        ({"head_dim": 584}, "head dim 584"),
        ({"value_dim": 4}, "value dim 4"),
        ({"value_dim": 520}, "value dim 520"),
    ],
)
def test_refusals(changes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "missing_on_a_gpu", list)
    why = DecodeBackend().reasons(but(**changes))
    assert len(why) == 1
    assert reason in why[0]
    assert DecodeBackend().reasons(but(q_len=16)) == []
    assert DecodeBackend().reasons(but(q_len=1 << 19, softcap=1.0)) == []
    for group, q_len, head_dim, value_dim in ((128, 1, 128, 128), (128, 16, 576, 512), (8, 16, 512, 512)):
        large = but(q_heads=8 * group, q_len=q_len, head_dim=head_dim, value_dim=value_dim)
        assert DecodeBackend().reasons(large) == []


@pytest.mark.parametrize(
    "lost, remedy", [("triton", "pip install fastattn[cuda]"), ("compiler", "install gcc, or name one in CC")]
)
def test_machine_lacks(lost: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("missing_on_a_gpu", "has_triton"):  # not what this machine said before
        monkeypatch.setattr(triton_launch, name, getattr(triton_launch, name).__wrapped__)
    find = importlib.util.find_spec
    monkeypatch.setattr(triton_launch, "find_spec", lambda name: None if lost == name else find(name))
    monkeypatch.setattr(triton_launch.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    if lost == "compiler":
        pytest.importorskip("triton")
    why = DecodeBackend().reasons(PROBLEM)
    assert len(why) == 1
    assert remedy in why[0]


def test_the_interpreter_serves_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    problem = but(device="cpu", index=-1, capability=(0, 0))
    monkeypatch.delenv("FASTATTN_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert DecodeBackend().reasons(problem) == ["needs an NVIDIA GPU"]
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    assert DecodeBackend().reasons(problem) == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1 as well" in DecodeBackend().reasons(problem)[0]


def test_launch_covers_the_problem() -> None:
    dims = ((8, 8), (64, 64), (72, 72), (72, 128), (96, 96), (192, 128), (256, 256), (320, 256), (512, 512), (576, 512))
    for capability in [*launch.RULES, (8, 9), (12, 1)]:
        for dtype in (BF16, FP32):
            for head_dim, value_dim in dims:
                for q_len in (1, 4, 5, 16):
                    p = but(capability=capability, dtype=dtype, head_dim=head_dim, value_dim=value_dim, q_len=q_len)
                    chosen = launch.choose(p, 132)
                    parts = (*chosen.head, *chosen.value)
                    assert all(x == 0 or (x >= launch.MIN_DOT and x & (x - 1) == 0) for x in parts)
                    blocks = (chosen.block_m, chosen.block_n, chosen.head[0], chosen.value[0])
                    assert all(block >= launch.MIN_DOT and block & (block - 1) == 0 for block in blocks)
                    assert chosen.block_m >= shapes.rows(p) or chosen.near
                    assert sum(chosen.head) >= head_dim
                    assert sum(chosen.value) >= value_dim
                    assert chosen.stages >= 1
                    assert 1 <= chosen.splits <= launch.MAX_SPLITS


def test_splits_fill_the_gpu() -> None:
    programs = 132 * launch.RULES[9, 0].programs_per_sm
    assert launch.splits(PROBLEM, 132) == programs // 8
    assert launch.splits(but(batch=64), 132) == 1
    assert launch.splits(but(kv_len=100), 132) == 2  # no more than there are steps
    assert launch.splits(but(left=255), 132) == 2  # a window of two steps
    assert launch.splits(but(left=127), 132) == 1  # and of one
    assert launch.splits(but(q_heads=1, kv_heads=1, kv_len=1 << 20), 10_000) == launch.MAX_SPLITS
    # Rows of different lengths are cut finer, so that the SMs even out; a single row needs no evening out.
    assert launch.splits(but(batch=32, kv_lengths=True), 132) > launch.splits(but(batch=32), 132)
    assert launch.splits(but(kv_lengths=True), 132) == launch.splits(PROBLEM, 132)


def test_tiles_of_few_rows() -> None:
    """As measured on an H200 (benchmarks/results/h200/tune-chunks.json): keys of a step, and warps."""

    def tile(**changes: object) -> tuple[int, int]:
        found = launch.choose(but(**changes), 132)
        return found.block_n, found.warps

    assert tile() == tile(batch=8) == tile(kv_len=1 << 15) == (128, 4)  # a program has an SM to itself
    assert tile(batch=32) == tile(batch=8, kv_heads=32) == (64, 4)  # more heads than SMs, undivided
    assert tile(batch=17) == (32, 2)  # and divided, to even out
    assert tile(batch=32, kv_lengths=True) == (64, 4)  # rows of different lengths: several programs an SM
    # As before, not measured: head dims of 64 and 256, other GPUs.
    assert tile(head_dim=64, value_dim=64) == (64, 4) and tile(head_dim=256, value_dim=256) == (32, 4)
    assert tile(capability=(10, 0)) == (64, 4)


def test_splits_even_out_the_gpu() -> None:
    """Of a few more tiles than multiprocessors some of these have two, of a few more than half as many most have none:
    then each is divided. Not where that gives the busiest hardly less to do."""
    whisper = but(batch=8, q_heads=20, kv_heads=20, head_dim=64, value_dim=64, kv_len=1500)
    assert launch.splits(whisper, 132) == 3
    found = {batch: launch.splits(but(batch=batch), 132) for batch in (8, 9, 11, 12, 16, 17, 20, 22, 23, 32, 64)}
    assert found == {8: 2, 9: 3, 11: 3, 12: 1, 16: 1, 17: 3, 20: 3, 22: 3, 23: 1, 32: 1, 64: 1}
    for tiles in range(1, 1000):
        n = launch._evened(tiles, 132)
        assert n == 1 or -(-tiles * n // 132) / n <= 0.7 * -(-tiles // 132)


# Only natively.


@pytest.mark.gpu
def test_one_graph_serves_every_length() -> None:
    b, capacity = 4, 1000
    q = torch.randn(b, 8, 1, 128, device="cuda", dtype=BF16)
    k, v = (torch.randn(b, 2, capacity, 128, device="cuda", dtype=BF16) for _ in range(2))
    lengths = torch.full((b,), capacity, dtype=torch.int32, device="cuda")

    def attend() -> torch.Tensor:
        return fastattn.scaled_dot_product_attention(q, k, v, mask="causal", kv_lengths=lengths, backend="decode")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for entries in ([1, 1000, 17, 640], [0, 3, 999, 64], [1000] * 4):
        lengths.copy_(torch.tensor(entries, dtype=torch.int32))
        graph.replay()
        hidden = torch.arange(capacity, device="cuda") >= lengths[:, None]
        clean = [x.double().masked_fill(hidden[:, None, :, None], 0.0) for x in (k, v)]
        want = fastattn.scaled_dot_product_attention(
            q.double(), *clean, mask="causal", kv_lengths=lengths, backend="reference"
        )
        assert relative_error(out, want) < 4e-3


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A cache whose second batch entry begins past 2^31 elements."""
    heads, capacity, dim = 8, 1 << 21, 128
    cache = torch.zeros(2, heads, capacity, dim, device="cuda", dtype=FP16)[:, :, : capacity - 1]
    tail = torch.randn(2, heads, 100, dim, device="cuda", dtype=FP16)
    cache[:, :, -100:] = tail
    q = torch.randn(2, 16, 1, dim, device="cuda", dtype=FP16)
    out = fastattn.scaled_dot_product_attention(q, cache, cache, window=(99, 0), backend="decode")
    want = fastattn.scaled_dot_product_attention(q.double(), tail.double(), tail.double(), backend="reference")
    assert relative_error(out, want) < 1e-3


@pytest.mark.parametrize("head_dim, left, batch", [(128, -1, 1), (64, -1, 1), (64, 127, 1), (128, -1, 40)])
def test_a_growing_cache_needs_no_other_kernel(head_dim: int, left: int, batch: int) -> None:
    for capability in ((9, 0), (8, 0), (8, 6), (10, 0)):
        compiled = set()
        for length in (*range(1, 300), 500, 2000, 4095, 4096, 5000, 10**5):
            problem = a_problem(
                batch=batch, kv_len=length, head_dim=head_dim, value_dim=head_dim, left=left, capability=capability
            )
            found = launch.choose(problem, 132)
            compiled.add((found.splits > 1, found.block_n, found.warps, found.stages))
        assert len(compiled) == 1, capability
