"""Bad input: one clear error that starts with the argument's name, before anything is launched."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from op_arguments import BAD, FINE, HKV, SKV, SQ, Array, B, D, H, good
from torch import Tensor

import fastattn
from fastattn import Intervals

CASES = [pytest.param(name, value, id=f"{name}-{i}") for name, values in BAD.items() for i, value in enumerate(values)]


@pytest.mark.parametrize("entry", [fastattn.scaled_dot_product_attention, fastattn.explain])
@pytest.mark.parametrize("name, value", CASES)
def test_bad_argument(name: str, value: Any, entry: Callable[..., Any]) -> None:
    arguments = good() | {name: value}
    before = fastattn.stats()["calls"]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*expected"):
        entry(**arguments)
    assert fastattn.stats()["calls"] == before, "something was launched"


@pytest.mark.parametrize("heads, kv_heads", [(4, 3), (2, 4), (0, 1), (4, 0), (0, 0)], ids=str)
def test_heads_that_do_not_divide(heads: int, kv_heads: int) -> None:
    q, k = torch.randn(B, heads, SQ, D), torch.randn(B, kv_heads, SKV, D)
    with pytest.raises(ValueError, match=f"^k: expected .* divides q's {heads}.* got {kv_heads}"):
        fastattn.scaled_dot_product_attention(q, k, k)


def test_nested_tensors() -> None:
    q = torch.nested.nested_tensor([torch.randn(H, 5, D), torch.randn(H, 3, D)], layout=torch.jagged)
    with pytest.raises((ValueError, TypeError), match=r"^q: expected"):
        fastattn.scaled_dot_product_attention(q, q, q)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_old_kind() -> None:
    """Their layout says strided, and yet they have no shape."""
    q = torch.nested.nested_tensor([torch.randn(H, 5, D), torch.randn(H, 3, D)], layout=torch.strided)
    with pytest.raises((ValueError, TypeError), match=r"^q: expected"):
        fastattn.scaled_dot_product_attention(q, q, q)


def test_the_message_says_what_came() -> None:
    arguments = good() | {"mask": torch.ones(3, SQ, SKV + 1)}
    with pytest.raises(ValueError) as error:
        fastattn.scaled_dot_product_attention(**arguments)
    text = str(error.value)
    assert "\n" not in text
    assert f"[{B}, {H}, {SQ}, {SKV}]" in text
    assert f"3, {SQ}, {SKV + 1}]" in text


@pytest.mark.parametrize("side", [2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_huge_window_is_an_open_one(side: int, backend: str) -> None:
    """sys.maxsize and the like are written for "no limit"; positions are int32."""
    arguments = good() | {"backend": backend}
    for huge, same in (((side, side), (-1, -1)), ((side, 0), (-1, 0)), ((1, side), (1, -1))):
        got = fastattn.scaled_dot_product_attention(**arguments, window=huge)
        want = fastattn.scaled_dot_product_attention(**arguments, window=same)
        torch.testing.assert_close(got, want)


def test_lengths_of_any_value_are_clamped() -> None:
    """They are data: no value of theirs may raise, or read past the keys."""
    edges = [-(2**31), -1, 0, 1, SKV, SKV + 1, 2**31 - 1]
    for name in ("q_lengths", "kv_lengths"):
        for backend in ("torch", "reference"):
            for value in edges:
                for extra in ({}, {"mask": "causal"}, {"window": (1, 1)}):
                    lengths = torch.tensor([value, 3], dtype=torch.int32)
                    clamped = lengths.clamp(0, SQ if name == "q_lengths" else SKV)
                    arguments = good() | {"backend": backend} | extra
                    got = fastattn.scaled_dot_product_attention(**arguments, **{name: lengths})
                    want = fastattn.scaled_dot_product_attention(**arguments, **{name: clamped})
                    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_intervals_of_any_value_are_clamped(backend: str) -> None:
    edges = torch.tensor([-(2**31), -1, 0, 3, SKV, SKV + 1, 2**31 - 1], dtype=torch.int32)
    arguments = {
        "q": torch.randn(1, H, len(edges), D),
        "k": torch.randn(1, HKV, SKV, D),
        "v": torch.randn(1, HKV, SKV, D),
    }
    for turn in range(len(edges)):
        lo, hi = edges[None], edges.roll(turn)[None]
        got = fastattn.scaled_dot_product_attention(**arguments, mask=Intervals(lo, hi), backend=backend)
        keys = torch.arange(SKV)
        seen = (keys >= lo[..., None]) & (keys < hi[..., None])
        want = fastattn.scaled_dot_product_attention(**arguments, mask=seen[:, None], backend="reference")
        torch.testing.assert_close(got, want)


def _anything(rng: random.Random) -> Any:
    """Something that an argument might be by mistake, or by luck."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice([
            None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**400, 0.0, 0.5, -1.5, 1e300, torch.nan, torch.inf, 1j,
            "", "causal", "torch", "reference", b"x", [], {}, (), (1, 2), (0, -1), (-1, -1), (2**40, 3), [1, 2],
            object(), int, Array(), Intervals(None, None),
        ])  # fmt: skip
    sizes = [0, 1, 2, B, H, HKV, SQ, SKV, D]
    shape = [rng.choice(sizes) for _ in range(rng.randrange(6))]
    if rng.random() < 0.5:  # nearly right
        shape = list(rng.choice([(B, H, SQ, D), (B, HKV, SKV, D), (B, H, SQ, SKV), (B, SQ), (B,), (H,)]))
        if rng.random() < 0.5:
            shape[rng.randrange(len(shape))] = rng.choice(sizes)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int32, torch.int64]
    x = (torch.randn(shape) * 3).to(rng.choice(dtypes))
    if kind == 1:
        return Intervals(x, x if rng.random() < 0.7 else _anything(rng))
    if kind == 2 and x.is_floating_point():
        x = x.requires_grad_()
    if kind == 3 and x.dim() > 1:
        x = x.transpose(0, rng.randrange(1, x.dim()))
    return x.to(rng.choice(["meta", "cpu"])) if rng.random() < 0.1 else x


def test_random_mutations(seed: int) -> None:
    """Whatever an argument becomes: a ValueError or TypeError that names one, or a result of the right shape."""
    rng = random.Random(seed)
    names = list(BAD)
    results = 0
    for turn in range(300):
        arguments = good()
        changed = rng.sample(names, rng.choice([1, 1, 2, 3]))
        for name in changed:
            arguments[name] = rng.choice(FINE[name]) if rng.random() < 0.6 else _anything(rng)
        try:
            found = fastattn.scaled_dot_product_attention(**arguments)
        except (ValueError, TypeError) as error:
            text = str(error)
            refused = text.startswith("no allowed backend") and isinstance(error, fastattn.BackendError)
            assert refused or text.split(":")[0].split(".")[0] in names, (turn, changed, text)
        else:
            results += 1
            out = found[0] if isinstance(found, tuple) else found
            q, v = arguments["q"], arguments["v"]
            assert out.shape == (*q.shape[:3], v.shape[3]), (turn, changed)
    assert 60 < results < 240  # or the mutations say nothing, about right calls or about wrong ones


BEYOND = {"scale": (1e31, -1e31, 3e38, -1e300, 10**40), "softcap": (1e31, 3e38, 1e-31, 1e-39, 1e-300)}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BEYOND.items() for value in values])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_factor_beyond_float32_is_refused_where_scores_are_float32(
    name: str, value: float, dtype: torch.dtype
) -> None:
    arguments = {key: x.to(dtype) for key, x in good().items()}
    with pytest.raises(ValueError, match=f"{name}: expected .*as scores are float32"):
        fastattn.scaled_dot_product_attention(**arguments, **{name: value})
    if abs(value) <= 1e290 and abs(value) >= 1e-290:
        out = fastattn.scaled_dot_product_attention(**good() | {"v": good()["v"].double()}, **{name: value})
        assert isinstance(out, Tensor) and bool(out.isfinite().all())


def interpreted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the decode backend run through Triton's interpreter; skips its tests where it runs natively."""
    if backend == "decode":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("native on a GPU")
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")


def causal(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """The output in float32 of these scores under a causal mask, computed in float64."""
    weights = scores.masked_fill(~naive.visible(q, k, window=(-1, 0)), -torch.inf).softmax(-1)
    return (weights @ v.double().repeat_interleave(2, 1)).float()


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-39, 1e-32, 1e-30, 1e-20, -1e-300, -1e-39, 0, 5e-324])
@pytest.mark.parametrize("backend", ["reference", "torch", "decode"])
def test_a_scale_that_float32_knows_as_nothing(backend: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 0, masked ones still masked (0 * -inf is NaN); and scores that are not 0, of large numbers."""
    interpreted(backend, monkeypatch)
    arguments = good()
    q, k, v = arguments.values()
    for factor in (1.0, 2.0**60):
        q, k = q * factor, k * factor
        found = fastattn.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal", backend=backend)
        for _ in range(2):  # and by the fast path
            again = fastattn.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal", backend=backend)
            assert torch.equal(found, again)
        want = causal(q, k, v, (q.double() @ k.double().repeat_interleave(2, 1).mT) * scale)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [1e-30, 1e-6, 1e6, 1e20, 1e30])
@pytest.mark.parametrize("backend", ["reference", "decode"])
def test_softcaps_at_the_limits(backend: str, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(backend, monkeypatch)
    q, k, v = good().values()
    found = fastattn.scaled_dot_product_attention(q, k, v, softcap=softcap, mask="causal", backend=backend)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * D**-0.5
    want = causal(q, k, v, softcap * torch.tanh(scores / softcap))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_scales_at_the_limits_take_the_greatest_score(backend: str) -> None:
    q, k, v = good().values()
    for scale in (1e30, -1e30):
        found = fastattn.scaled_dot_product_attention(q, k, v, scale=scale, backend=backend)
        best = ((q @ k.repeat_interleave(2, 1).mT) * scale).argmax(-1)
        want = v.repeat_interleave(2, 1).gather(2, best[..., None].expand(-1, -1, -1, D))
        torch.testing.assert_close(found, want)
