"""The kernel that walks over batch entries under one tile of a mask: which calls it takes, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, check, make, relative_error

import fastattn
from fastattn.backends.triton.prefill import batch
from fastattn.backends.triton.prefill.batch import BatchKernel
from fastattn.backends.triton.prefill.launch_config import BATCH
from fastattn.call import Call

pytestmark = pytest.mark.usefixtures("poison", "fresh_caches")

#: A window of 49 tokens; several entries for each program, and one program with fewer. (bfloat16 is float32 in the
#: interpreter.)
CASE = Case(batch=19, q_heads=2, kv_heads=2, q_len=49, kv_len=49, head_dim=32, dtype=FP16, mask="additive:1hqk")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that the kernel computed."""
    found: list[Call] = []
    run = BatchKernel.forward

    def noted(self: BatchKernel, call: Call) -> Any:
        found.append(call)
        return run(self, call)

    monkeypatch.setattr(BatchKernel, "forward", noted)
    monkeypatch.setattr(batch, "_PROGRAMS", 3)  # for each of the interpreter's four processors
    return found


CASES = {
    "swin": CASE.but(mask_dtype=BF16),
    "lse": CASE.but(return_lse=True, mask_dtype=FP32),
    "groups": CASE.but(q_heads=4, head_dim=64, value_dim=32, mask_dtype=FP16),
    "one-mask": CASE.but(mask="additive:11qk", mask_dtype=FP64, return_lse=True, head_dim=24),
    "bool": CASE.but(mask="bool:1hqk", keep=0.3, return_lse=True),
    "bool-rare": CASE.but(mask="bool:1hqk", keep=0.02, return_lse=True),  # rows without a key
    "finfo": CASE.but(mask="finfo:11qk", mask_dtype=BF16, return_lse=True),
    "whole": CASE.but(q_len=64, kv_len=64, mask="bool:1hqk"),
    "causal": CASE.but(window=(-1, 0), q_len=70, kv_len=33, return_lse=True),  # rows that the band leaves nothing
    "window": CASE.but(window=(9, 4), q_len=70),
    "few": CASE.but(q_len=2, kv_len=17),
    "one-entry": CASE.but(batch=BATCH, q_heads=8, kv_heads=4),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, device: str, taken: list[Call]) -> None:
    check(CASES[name], "prefill", device)
    assert taken


@pytest.mark.parametrize("layout", ["bshd", "sliced", "strided", "misaligned"])
def test_layouts(layout: str, device: str, taken: list[Call]) -> None:
    check(CASE.but(layout=layout), "prefill", device)
    assert taken


def test_masks_in_other_layouts(device: str, taken: list[Call]) -> None:
    x = make(CASE, device)
    mask = torch.randn(2, 49, 60, device=device, dtype=BF16)
    masks = (
        mask[..., :49].expand(19, -1, -1, -1),
        mask[..., 3:52][None],
        mask.transpose(1, 2)[:, :49, :49].contiguous().transpose(1, 2)[None],
        mask[:1, :1, :49].expand(1, 49, 49),
    )
    for one in masks:
        got = fastattn.scaled_dot_product_attention(x.q, x.k, x.v, mask=one, backend="prefill")
        wide = [t.double() for t in x.clean]
        want = fastattn.scaled_dot_product_attention(*wide, mask=one.double(), backend="reference")
        assert relative_error(got, want) < 4e-3
    assert len(taken) == len(masks)


def test_nan_in_keys(device: str, taken: list[Call]) -> None:
    """A key reaches the rows that see it, and no other ones. One that the window hides from all is not even read."""
    x = make(CASE, device)
    i, j = torch.arange(49, device=device)[:, None], torch.arange(49, device=device)
    mask = torch.randn(49, 49, device=device).masked_fill((j == 20) & (i < 30), -torch.inf)

    def outputs(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        return fastattn.scaled_dot_product_attention(q, k, v, mask=mask, backend="prefill", **options)

    k, v = x.k.clone(), x.v.clone()
    k[:, :, 20] = torch.nan
    got, want = outputs(x.q, k, x.v, mask), outputs(x.q, x.k, x.v, mask)
    assert torch.equal(got[:, :, :30], want[:, :, :30]) and got[:, :, 30:].isnan().all()
    k[:, :, :20] = v[:, :, :20] = torch.nan
    q, mask = x.q[:, :, :9], mask[40:]  # the first of 9 rows is at position 40 and sees keys 36 to 49
    got, want = outputs(q, k, v, mask, window=(4, 2)), outputs(q, x.k, x.v, mask, window=(4, 2))
    assert torch.equal(got, want) and not got.isnan().any()
    assert len(taken) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": BATCH - 1},
        {"kv_len": 65},
        {"dtype": FP32},
        {"mask": "additive:bhqk"},
        {"mask": "additive:1h1k"},
        {"mask": "none"},
        {"head_dim": 72},
        {"head_dim": 40},
        {"value_dim": 96},
        {"softcap": 3.0},
        {"sinks": FP32},
        {"kv_lengths": (30,) * 19},
        {"q_lengths": (30,) * 19, "kv_lengths": (40,) * 19},
    ],
    ids=str,
)
def test_calls_that_it_does_not_take(changes: dict[str, Any], device: str, taken: list[Call]) -> None:
    x = make(CASE.but(**changes), device)
    fastattn.scaled_dot_product_attention(x.q, x.k, x.v, **x.options, backend="prefill")
    assert not taken
