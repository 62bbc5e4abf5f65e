"""Which calls of wide heads the Hopper forward takes, how their work is cut, and what the driver is told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hopper_launches import HopperGpu, pretend
from torch import Tensor

import fastattn
from fastattn.backends.triton.hopper import HopperBackend
from fastattn.backends.triton.hopper_wide import launch
from fastattn.backends.triton.hopper_wide.binary import Flags
from fastattn.backends.triton.hopper_wide.schedule import Grid, grid_of
from fastattn.call import Call, Problem
from fastattn.dispatch.preference import ordered, rule_for
from fastattn.dispatch.registry import NAMES

pytest.importorskip("triton")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    return pretend(monkeypatch)


def problem(**changes: object) -> Problem:
    q = torch.empty(2, 8, 300, 512, dtype=BF16, device="meta")
    k = torch.empty(2, 2, 500, 512, dtype=BF16, device="meta")
    plain = dataclasses.replace(Problem.of(Call(q, k, k)), device="cuda", index=0, capability=(9, 0))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def mla(batch: int, q_len: int = 1, kv_len: int = 4096, **changes: object) -> Problem:
    """Absorbed: 128 heads that share one K/V head."""
    shape = {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "batch": batch, "q_len": q_len}
    return problem(kv_len=kv_len, **shape | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 576, "dtype": torch.float16, "left": 5, "right": 3, "softcap": 30.0, "sinks": True},
        {"head_dim": 264, "value_dim": 8, "q_lengths": True, "kv_lengths": True, "return_lse": True},
        {"head_dim": 64, "q_heads": 6, "kv_heads": 6},
    ],
)
def test_takes_what_it_is_made_for(changes: dict[str, object]) -> None:
    assert launch.reasons(problem(**changes)) == HopperBackend().reasons(problem(**changes)) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"capability": (10, 0)}, "compute capability 9.0, this device is 10.0"),
        ({"dtype": torch.float32}, "not float32"),
        ({"head_dim": 584}, "head dim 584"),
        ({"value_dim": 520}, "value dim 520"),
        ({"head_dim": 500}, "multiples of 8"),
        ({"mask": "segments", "mask_shape": (5, 9)}, "without tensor masks"),
        ({"mask": "bool", "mask_shape": (1, 1, 300, 500), "mask_dtype": torch.bool}, "without tensor masks"),
        ({"kv_len": 0}, "no queries or no keys"),
    ],
)
def test_says_why_not(changes: dict[str, object], words: str) -> None:
    why = HopperBackend().reasons(problem(**changes))
    assert len(why) == 1 and words in why[0]


def test_narrow_heads_are_the_others() -> None:
    plain = problem(head_dim=256, value_dim=256)
    assert all(not isinstance(name, Flags) for name in HopperBackend().binaries(plain))


def test_tiles_hold_heads_that_share_their_keys() -> None:
    for heads, kv_heads, together in (8, 1, 8), (128, 1, 64), (12, 2, 2), (7, 7, 1), (96, 1, 32), (64, 1, 64):
        grid = grid_of(problem(q_heads=heads, kv_heads=kv_heads, q_len=1000), 132, False)
        assert grid.queries * together == 64 and grid.blocks * together == heads // kv_heads
        assert (grid.rows - 1) * grid.queries < 1000 <= grid.rows * grid.queries


def test_few_tiles_share_their_keys() -> None:
    """Enough to keep the multiprocessors busy, and none where tiles do that by themselves."""
    found = {batch: grid_of(mla(batch), 132, True) for batch in (1, 2, 8, 16, 32, 64)}
    assert found[64] == Grid(queries=1, rows=1, blocks=2, splits=1, items=128)
    assert [found[batch].splits for batch in (8, 16, 32)] == [8, 4, 2]
    assert all(grid.items <= 132 for grid in found.values()) and found[1].splits > 20
    assert grid_of(mla(67), 132, True).splits > 1  # 134 tiles: two rounds, of which one is empty
    assert grid_of(mla(1, 2048, 2048, right=0), 132, True).splits == 1
    assert grid_of(mla(1, kv_len=100), 132, True).splits == 1


def test_no_binary_depends_on_a_length() -> None:
    for same in False, True:
        sizes = [(batch, q_len, kv_len) for batch in (1, 64) for q_len in (3, 700) for kv_len in (5, 9000)]
        names = {launch.flags(mla(*size, right=0), False, same) for size in sizes}
        assert names == {Flags("bf16", rest=True, same=same, band=True)}
    assert launch.flags(problem(sinks=True, return_lse=True), True, False) == Flags("bf16", split=True)
    assert launch.flags(problem(sinks=True, grads="q"), False, False, torch.float32).sinks == "fp32"


def test_warmup_names_all_binaries(gpu: HopperGpu) -> None:
    for p in problem(right=0), mla(1), mla(64), mla(3, 5, right=0, sinks=True, return_lse=True):
        found = HopperBackend().binaries(p)
        same = p.head_dim == 576
        own = launch.flags(p, grid_of(p, 132, same).splits > 1, same)
        assert found[0] == own
        one = dataclasses.replace(p, q_len=1)
        wanted = {launch.flags(x, split, kind) for x in (p, one) for split in (False, True) for kind in (False, same)}
        assert {x for x in found if isinstance(x, Flags)} == wanted
        assert [x.kernel.rpartition(":")[2] for x in found if not isinstance(x, Flags)] == ["combine_kernel"]


def test_is_asked_first_where_there_are_many_rows() -> None:
    for p in problem(), mla(1), mla(8), mla(1, 64), mla(64):
        assert ordered(p, NAMES)[0] == "hopper"
        rule = rule_for(p)
        assert rule is not None and "256" in rule.why
    for p in problem(q_len=1), problem(backward=True), dataclasses.replace(mla(8), capability=(10, 0)):
        assert ordered(p, NAMES)[0] == "decode"


def made(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, backend="hopper", **options)


def test_what_the_driver_is_told(gpu: HopperGpu) -> None:
    for turn in range(3):
        q, k, v = made(2, 8, 90, 512), made(2, 2, 130, 512), made(2, 2, 130, 320)
        gpu.stream, scale = 70 + turn, 0.1 * (turn + 1)
        lengths = torch.tensor([50, 130], dtype=torch.int32)
        sinks = torch.randn(8)
        out, lse = attend(
            q, k, v, mask="causal", scale=scale, kv_lengths=lengths, sinks=sinks, softcap=20.0, return_lse=True
        )
        launched, *rest = gpu.taken()
        assert not rest and launched.stream == 70 + turn
        a = launched.arguments
        assert launched.flags == Flags("bf16", band=True, kv_lengths=True, sinks="fp32", softcap=True, lse=True)
        for name, x, box in (
            ("q_desc", q, (64, 16, 4, 1)),  # four heads to a K/V head, each with sixteen queries
            ("k_desc", k, (64, 64, 1, 1)),
            ("v_desc", v, (64, 64, 1, 1)),
        ):
            assert a[name].tells(x) and a[name].box == box
        pointers = [a[name] for name in ("out_ptr", "lse_ptr", "sinks_ptr", "kv_lengths_ptr")]
        assert pointers == [x.data_ptr() for x in (out, lse, sinks, lengths)]
        assert a["inner"] == np.float32(scale / 20.0) and a["scale"] == np.float32(20.0 * math.log2(math.e))
        names = "batch", "kv_heads", "group", "q_len", "kv_len", "right", "rows", "queries", "blocks", "splits", "dv8"
        assert [a[name] for name in names] == [2, 2, 4, 90, 130, 0, 6, 16, 1, 1, 40]
        assert launched.programs == (24, 1, 1)
        assert out.shape == (2, 8, 90, 320) and (lse.shape, lse.dtype) == ((2, 8, 90), torch.float32)


def test_values_in_the_keys_are_read_once(gpu: HopperGpu) -> None:
    """Where they lie is looked at in every call; splits leave their parts to the second kernel."""
    latent, q, other = made(1, 1, 2000, 576), made(1, 128, 1, 576), made(1, 1, 2000, 576)
    for k, v, same in (
        (latent, latent[..., :512], True),
        (latent, other[..., :512], False),
        (other, other[..., :512], True),
    ):
        out = attend(q, k, v)
        first, second = gpu.taken()
        assert first.flags == Flags("bf16", rest=True, same=same, split=True)
        assert first.arguments["q_desc"].tells(q) and first.arguments["q_desc"].box == (64, 1, 64, 1)
        assert first.arguments["q_rest_desc"] == first.arguments["q_desc"]
        assert first.arguments["k_rest_desc"] == first.arguments["k_desc"]
        assert first.arguments["k_desc"].tells(k) and first.arguments["splits"] > 1
        assert same or first.arguments["v_desc"].tells(v)
        assert second.arguments["scratch_ptr"] == first.arguments["scratch_ptr"]
        assert second.arguments["out_ptr"] == first.arguments["out_ptr"] == out.data_ptr()
        assert second.arguments["splits"] == first.arguments["splits"]


def test_what_the_copy_engine_cannot_read_is_copied(gpu: HopperGpu) -> None:
    memory = torch.randn(1, 2000, 1, 580).to(BF16).transpose(1, 2)
    q, odd = made(1, 128, 1, 576), memory[..., 2:578]  # begins at an odd address, and so do its rows
    kept = []

    def after(launched: Any) -> None:  # before the copy is gone
        kept.extend(x.values(BF16) for name, x in launched.arguments.items() if name == "k_desc")

    gpu.driver.after = after
    attend(q, odd, odd[..., :512])
    first, _ = gpu.taken()
    assert first.flags.same and first.arguments["k_desc"].address % 16 == 0
    assert len(kept) == 1 and torch.equal(kept[0], odd)
