"""The source of the Hopper forward for wide heads in a model of the machine, against plain attention in float64."""

from __future__ import annotations

import os
import random

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

import naive

from fastattn.call import Call

pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")

#: Head dim, value dim, and whether the values are the keys' first columns.
DIMS = ((512, 512, False), (576, 512, True), (576, 512, False), (512, 512, True), (264, 320, False), (568, 440, True))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the second kernel runs natively")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")


def equals_the_truth(
    rng: random.Random, dims: tuple[int, int, bool], heads: tuple[int, int], q_len: int, kv_len: int, **changes: object
) -> None:
    """One call, with NaN in every query and key that lengths exclude."""
    import hopper_wide_model

    head_dim, value_dim, same = dims
    batch, dtype = rng.randint(1, 2), rng.choice((torch.bfloat16, torch.float16))
    q = torch.randn(batch, heads[0], q_len, head_dim).to(dtype)
    k = torch.randn(batch, heads[1], kv_len, head_dim).to(dtype)
    v = k[..., :value_dim] if same else torch.randn(batch, heads[1], kv_len, value_dim).to(dtype)
    options = {
        "left": rng.choice((-1, -1, 0, 70)), "right": rng.choice((-1, 0, 0, 40)), "softcap": rng.choice((0.0, 20.0)),
        "sinks": torch.randn(heads[0]) if rng.random() < 0.3 else None, "splits": rng.choice((1, 1, 2, 5)),
        "lengths": rng.random() < 0.5,
    } | changes  # fmt: skip
    lengths = {}
    if options["lengths"]:
        for name, most in ("q_lengths", q_len), ("kv_lengths", kv_len):
            lengths[name] = torch.tensor([rng.randint(-1, most + 2) for _ in range(batch)], dtype=torch.int32)
    left, right, softcap, sinks = (options[name] for name in ("left", "right", "softcap", "sinks"))
    expected = naive.attention(
        q.double(), k.double(), v.double(), window=(left, right), sinks=sinks, softcap=softcap or None, **lengths
    )
    for b in range(batch if lengths else 0):
        q[b, :, max(int(lengths["q_lengths"][b]), 0) :] = torch.nan
        k[b, :, max(int(lengths["kv_lengths"][b]), 0) :] = torch.nan
        v[b, :, max(int(lengths["kv_lengths"][b]), 0) :] = torch.nan
    call = Call(q, k, v, sinks=sinks, scale=head_dim**-0.5, left=left, right=right, softcap=softcap, **lengths)
    out, lse = hopper_wide_model.forward(call, rng, rng.choice((1, 3, 7)), same, options["splits"])
    assert not out.isnan().any() and not lse.isnan().any()
    torch.testing.assert_close(out.double(), expected.out, atol=0.02, rtol=0.02)
    fine = expected.lse.isinf()
    torch.testing.assert_close(lse.double()[~fine], expected.lse[~fine], atol=1e-3, rtol=1e-4)
    assert torch.equal(lse == -torch.inf, expected.lse == -torch.inf)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims: tuple[int, int, bool], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        equals_the_truth(
            rng, dims, rng.choice(((8, 1), (4, 2), (6, 1), (3, 3))), rng.randint(1, 70), rng.randint(1, 400)
        )


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_absorbed_mla(splits: int, seed: int) -> None:
    """128 heads to a K/V head: several tiles of each query; more splits than there are pairs of blocks, too."""
    rng = random.Random(seed)
    for q_len in 1, 3:
        equals_the_truth(rng, (576, 512, True), (128, 1), q_len, rng.randint(60, 600), splits=splits)


@pytest.mark.parametrize("right", [-1, 0], ids=["full", "causal"])
def test_prefill(right: int, seed: int) -> None:
    """8 heads to a K/V head, eight queries of each in a tile."""
    rng = random.Random(seed)
    plain = {"left": -1, "softcap": 0.0, "sinks": None, "splits": 1, "lengths": False}
    for q_len, kv_len in (100, 100), (40, 300), (90, 50):
        equals_the_truth(rng, (512, 512, False), (8, 1), q_len, kv_len, right=right, **plain)
