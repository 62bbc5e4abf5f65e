"""The prefill backend against the reference: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, a_problem, check, make, relative_error
from features import BROADCASTS, FEATURES
from portable_cases import SERVED, is_native, sized
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn.backends.triton import launcher as triton_launch
from fastattn.backends.triton.limits import usual_shared_memory
from fastattn.backends.triton.prefill import PrefillBackend, forward
from fastattn.backends.triton.prefill import launch_config as launch
from fastattn.call import Problem

pytestmark = pytest.mark.usefixtures("poison")

#: Several blocks of queries and keys, heads padded, lengths that are multiples of nothing.
CASE = Case(batch=2, q_heads=2, kv_heads=1, q_len=37, kv_len=75, head_dim=24, dtype=FP32, return_lse=True)


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """Several blocks of queries and keys in the shapes of this file, and lists for every mask. On a GPU the shapes are
    larger instead: see `sized`."""
    monkeypatch.setattr(launch, "LISTED_KEYS", 48)
    if is_native(request):
        return
    choose = launch.choose
    monkeypatch.setattr(forward, "choose", lambda p: dataclasses.replace(choose(p), block_m=16, block_n=16))


@pytest.mark.parametrize("name", SERVED)
def test_features(name: str, device: str) -> None:
    check(FEATURES[name].but(return_lse=True), "prefill", device)


BLOCKS = {
    "plain": CASE,
    "causal": CASE.but(mask="causal"),
    "causal-long-q": CASE.but(mask="causal", q_len=75, kv_len=37),
    "causal-square": CASE.but(mask="causal", q_len=75, sinks=BF16),
    "window": CASE.but(window=(37, 0)),
    "window-narrow": CASE.but(window=(3, 0)),
    "window-two-sided": CASE.but(window=(20, 3), q_len=75),
    "window-ahead": CASE.but(window=(-1, 9)),
    "lengths": CASE.but(kv_lengths=(19, 0), mask="causal"),
    "lengths-outside": CASE.but(kv_lengths=(-7, 1000), mask="causal"),
    "lengths-both": CASE.but(batch=3, kv_lengths=(33, 1, 75), q_lengths=(20, 37, 0), mask="causal", sinks=BF16),
    "lengths-window": CASE.but(kv_lengths=(50, 18), window=(20, 0)),
    "intervals": CASE.but(mask="intervals:bq"),
    "intervals-shared": CASE.but(mask="intervals:b1", kv_lengths=(60, 75)),
    "intervals-window": CASE.but(mask="intervals:1q", window=(30, 0)),
    "segments": CASE.but(mask="segments:5", sinks=FP32),
    "packed": CASE.but(mask="segments:3c", q_len=75),
    "left-padded": CASE.but(mask="segments:pc"),
    "sinks": CASE.but(sinks=FP32, mask="causal"),
    "sinks-nothing-seen": CASE.but(sinks=FP64, kv_lengths=(0, 0)),
    "softcap": CASE.but(softcap=3.0, mask="causal"),
    "softcap-bias": CASE.but(softcap=3.0, mask="additive:1hqk", sinks=FP32),
    "finfo": CASE.but(mask="finfo:b1qk"),
    "finfo-float64": CASE.but(mask="finfo:b1qk", mask_dtype=FP64, return_lse=False),
    "finfo-lengths": CASE.but(mask="finfo:b1qk", kv_lengths=(70, 20), mask_dtype=FP32),
    "additive-bf16": CASE.but(mask="additive:b1qk", mask_dtype=BF16, kv_lengths=(70, 20)),
    "additive-rare": CASE.but(mask="additive:b1qk", keep=0.02),  # hidden blocks
    "bool-rare": CASE.but(mask="bool:b1qk", keep=0.02),
    "bool-all": CASE.but(mask="bool:bhqk", keep=1.0, kv_lengths=(70, 33)),  # full blocks
    "bool-none": CASE.but(mask="bool:b1qk", keep=0.0, sinks=FP32),
    "keys": CASE.but(mask="bool:b11k", keep=0.1),
    "keys-all": CASE.but(mask="bool:b11k", keep=1.0, window=(20, 0)),
    "keys-lengths": CASE.but(mask="bool:111k", q_lengths=(37, 5), kv_lengths=(60, 75)),
    "key-bias": CASE.but(mask="additive:1h1k", window=(30, 3), kv_lengths=(60, 75)),
    "window-bool": CASE.but(mask="bool:1hqk", window=(20, 2)),
    "everything": CASE.but(
        mask="additive:b1qk", window=(50, 1), q_lengths=(30, 1), kv_lengths=(75, 40), sinks=FP32, softcap=4.0, scale=0.3
    ),
}


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, dtype: torch.dtype, device: str) -> None:
    """Several blocks of queries and of keys: full, partial and hidden ones."""
    if dtype == FP16 and device == "cpu" and len(name) % 3:
        pytest.skip("the interpreter takes its time")
    check(sized(BLOCKS[name].but(dtype=dtype), device), "prefill", device)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("shape", BROADCASTS)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_broadcast_masks(kind: str, shape: str, listed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without lists of blocks."""
    monkeypatch.setattr(forward, "listed", lambda p, _: listed and p.mask_shape[3] > 1)
    check(
        sized(CASE.but(mask=f"{kind}:{shape}", keep=0.3, q_len=20, kv_len=50, head_dim=16), device), "prefill", device
    )


@pytest.mark.parametrize(
    "dims", [(72, 72), (96, 96), (192, 128), (128, 192), (256, 256), (512, 512), (576, 512)], ids=str
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "choose", launch.choose)
    head, value = dims
    check(CASE.but(mask="causal", head_dim=head, value_dim=value, dtype=dtype, kv_len=41), "prefill", device)


@pytest.mark.parametrize("kv_lengths", [None, (33, 41)], ids=str)
@pytest.mark.parametrize("dims", [(576, 512), (192, 128), (24, 16)], ids=str)
def test_values_that_are_a_part_of_the_keys(dims: tuple[int, int], kv_lengths: Any, device: str) -> None:
    """As MLA with absorbed projections has them: read once. A call after it whose values are not is right, too."""
    head, value = dims
    case = CASE.but(
        q_heads=8, kv_heads=1, mask="causal", head_dim=head, value_dim=value, kv_len=41, kv_lengths=kv_lengths
    )
    x = make(case.but(value_dim=head), device)
    for v in (x.k[..., :value], x.v[..., :value], x.k[..., :value]):
        compare(x.q, x.k, v, **{name: x.options[name] for name in ("mask", "kv_lengths")}, tolerance=2e-5)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced", "cache", "expanded", "strided", "misaligned", "dmajor"])
@pytest.mark.parametrize("mask", ["causal", "additive:b1qk", "bool:1h1k"])
def test_layouts(layout: str, mask: str, device: str) -> None:
    check(CASE.but(layout=layout, mask=mask, dtype=FP16), "prefill", device)


def test_broadcast_memory(device: str) -> None:
    """Masks, lengths, intervals and sinks that torch.expand, a transposition or a slice made."""
    x = make(CASE, device)
    interval = torch.tensor([[3, 40], [0, 70]], dtype=torch.int32, device=device).repeat(19, 1)[None, :37]
    options = {
        "mask": Intervals(interval[..., 0], interval[..., 1]),
        "kv_lengths": torch.tensor([64], dtype=torch.int32, device=device).expand(2),
        "sinks": torch.randn(4, device=device)[::2],
    }
    compare(x.q, x.k, x.v, **options)
    compare(x.q, x.k, x.v, mask=torch.rand(75, 37, device=device).T[None, None].expand(2, 2, 37, 75) < 0.5)
    compare(x.q, x.k, x.v, mask=torch.rand(37, 80, device=device)[:, 3:78] < 0.5)
    compare(x.q, x.k, x.v, mask=torch.randn(2, 1, 1, 1, device=device).expand(2, 2, 37, 75))
    lo = torch.zeros(2, 37, dtype=torch.int32, device=device)  # two layouts
    compare(x.q, x.k, x.v, mask=Intervals(lo, torch.arange(74, dtype=torch.int32, device=device).view(37, 2).T))


def test_a_bias_of_whole_blocks(device: str) -> None:
    """ALiBi with a causal mask, 0 and -inf as models make it, and a prefix: hidden, full and partial blocks."""
    x = make(CASE.but(q_len=75, batch=1), device)
    i, j = torch.arange(75, device=device)[:, None], torch.arange(75, device=device)
    causal = torch.zeros(75, 75, device=device).masked_fill(j > i, -torch.inf)
    slopes = 2.0 ** -torch.arange(1, 3, device=device)
    compare(x.q, x.k, x.v, mask=causal)
    compare(x.q, x.k, x.v, mask=causal.to(torch.bfloat16)[None, None])
    compare(x.q, x.k, x.v, mask=(causal - slopes[:, None, None] * (i - j))[None])
    compare(x.q, x.k, x.v, mask=(j <= i) | (j < 33))
    compare(x.q, x.k, x.v, mask=torch.where((j <= i) | (j < 33), 0.0, torch.finfo(torch.float32).min))


@pytest.mark.parametrize("name", ["lengths", "intervals", "gap", "segments", "window"])
def test_nan_in_hidden_keys(name: str, device: str) -> None:
    x = make(CASE.but(q_len=75), device)
    j = torch.arange(75, device=device)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if name == "lengths":
        seen, options = j < 40, {"mask": "causal", "kv_lengths": ints(40, 40)}
    elif name == "intervals":
        seen, options = (j >= 21) & (j < 53), {"mask": Intervals(ints(21)[None], ints(53)[None])}
    elif name == "gap":
        seen = ((j >= 5) & (j < 9)) | ((j >= 50) & (j < 60))
        first = torch.arange(75, device=device) % 2 == 0
        bounds = torch.where(first[None], 5, 50).int(), torch.where(first[None], 9, 60).int()
        options = {"mask": Intervals(*bounds)}
    elif name == "segments":
        seen = ((j >= 7) & (j < 30)) | ((j >= 33) & (j < 70))
        table = torch.stack([ints(0, 0, 1, 1), ints(7, 33, 7, 33), ints(30, 70, 30, 70)])
        options = {"mask": Segments(table, causal=True)}
    else:
        seen, options = j >= 3, {"window": (-1, -1), "mask": Intervals(ints(3)[None], ints(75)[None])}
    k, v = (t.masked_fill(~seen[:, None], torch.nan) for t in (x.k, x.v))
    want = fastattn.scaled_dot_product_attention(*(t.double() for t in x.clean), **options, backend="reference")
    got = fastattn.scaled_dot_product_attention(x.q, k, v, **options, backend="prefill")
    assert relative_error(got, want) < 1e-5


def test_nan_in_a_visible_key_shows(device: str) -> None:
    x = make(CASE, device)
    x.k[0, :, 20, 3] = torch.nan
    x.v[1, :, 70, 5] = torch.nan
    out = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, backend="prefill")
    assert out[0].isnan().all()
    assert out[1, ..., 5].isnan().all()
    assert out[1, ..., :5].isfinite().all()


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_key_of_minus_infinity(dtype: torch.dtype, device: str) -> None:
    """Its score is -inf, not NaN, though D is padded; where it is the only key, the row sees nothing."""
    x = make(CASE.but(dtype=dtype), device)
    x.q[..., 0] = x.q[..., 0].abs() + 0.1
    x.k[:, :, 5, 0] = -torch.inf
    seen = torch.arange(75, device=device) != 5
    got = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, backend="prefill")
    want = fastattn.scaled_dot_product_attention(
        x.q.double(), x.clean[1].double(), x.clean[2].double(), mask=seen, backend="reference"
    )
    assert relative_error(got, want) < (1e-3 if dtype == FP16 else 1e-5)
    out, lse = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, mask=~seen, return_lse=True, backend="prefill")
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_sink_of_minus_infinity(device: str) -> None:
    x = make(CASE, device)
    lengths = torch.tensor([40, 0], dtype=torch.int32, device=device)
    sinks = torch.tensor([-torch.inf, 200.0], device=device)
    compare(x.q, x.k, x.v, sinks=sinks, kv_lengths=lengths)
    compare(
        x.q, x.k, x.v, sinks=sinks, mask=torch.randn(37, 75, device=device).masked_fill(lengths[0] > 50, -torch.inf)
    )


def test_large_scores(device: str) -> None:
    """The running maximum keeps every exponential at 1 or less; softcap saturates without overflow."""
    x = make(CASE, device)
    compare(x.q, x.k, x.v, scale=20.0, tolerance=1e-4)
    compare(x.q, x.k, x.v, scale=300.0, softcap=0.7, tolerance=1e-4)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float, device: str) -> None:
    x = make(CASE, device)
    compare(x.q, x.k, x.v, scale=scale, mask="causal")
    compare(x.q, x.k, x.v, scale=scale, mask=torch.randn(37, 75, device=device), softcap=2.0)


def test_output_layout(device: str) -> None:
    """Token-major, whatever the inputs' layout."""
    x = make(CASE.but(layout="bhsd"), device)
    out, lse = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, return_lse=True, backend="prefill")
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32


def test_the_interpreter_waits_for_no_binary(device: str) -> None:
    x = make(CASE, device)
    found = fastattn.explain(x.q, x.k, x.v, backend="prefill")
    assert device == "cuda" or found.chosen == "prefill", str(found)


def compare(q: Tensor, k: Tensor, v: Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    """Prefill against the float64 reference, log-sum-exp included."""
    options["return_lse"] = True
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, **options, backend="prefill")
    want, want_lse = fastattn.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), **options, backend="reference"
    )
    assert relative_error(out, want) < tolerance
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


# Without a kernel: what is refused, and how a launch is chosen.

PROBLEM = dataclasses.replace(a_problem(), q_len=300)


def but(**changes: Any) -> Problem:
    return dataclasses.replace(PROBLEM, **changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"capability": (7, 5)}, "compute capability 8.0 or newer, this GPU has 7.5"),
        ({"device": "cpu", "index": -1}, "needs an NVIDIA GPU"),
        ({"dtype": FP64}, "float64"),
        ({"kv_len": 0}, "no queries or no keys"),
        ({"kv_len": (1 << 28) + 1}, "up to 268435456 tokens"),
        ({"head_dim": 68}, "head dim 68"),
        ({"head_dim": 584}, "head dim 584"),
        ({"value_dim": 520}, "value dim 520"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "missing_on_a_gpu", list)
    why = PrefillBackend().reasons(but(**changes))
    assert len(why) == 1
    assert reason in why[0]
    assert PrefillBackend().reasons(PROBLEM) == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_every_launch_fits_the_shared_memory(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    limit = usual_shared_memory(capability)
    for head, value in (
        (8, 8),
        (64, 64),
        (72, 80),
        (128, 128),
        (192, 128),
        (256, 256),
        (512, 512),
        (576, 512),
        (576, 8),
    ):
        p = but(dtype=dtype, head_dim=head, value_dim=value, capability=capability)
        if dtype == FP32 and head + value > 1024 and limit == 99 << 10:
            assert "shared memory" in PrefillBackend().reasons(p)[-1]
            continue
        found = launch.choose(p)
        assert launch.shared(p, found) <= limit
        assert min(found.block_m, found.block_n) >= 16
