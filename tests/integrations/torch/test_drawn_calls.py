"""Calls drawn at random, right ones and wrong ones: the op's answer is torch's, or torch's error in its words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import Served
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_calls import BF16, FP32, FP64, TORCHS, assert_right, default_backends

import fastattn
from fastattn import drop_in

pytestmark = pytest.mark.usefixtures("default_backends")
__all__ = ["default_backends"]
DRAWS = 60  #: of one seed


def some_ones(rng: random.Random, sizes: list[int], share: float) -> list[int]:
    return [1 if rng.random() < share else size for size in sizes]


def drawn(rng: random.Random) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and the options of a call; about one in ten is wrong."""
    rank = rng.choice([2, 3, 4, 4, 4, 5, 6])
    lead = [rng.choice([1, 1, 2, 3]) for _ in range(rank - 2)]
    rows, keys, dim, values = (rng.choice(sizes) for sizes in ([1, 2, 5, 8], [1, 2, 5, 8], [1, 4, 8], [1, 4, 8]))
    q_lead, k_lead = list(lead), some_ones(rng, lead, 0.25 if rng.random() < 0.4 else 0.0)
    v_lead = some_ones(rng, k_lead, 0.1 if rng.random() < 0.3 else 0.0)
    enable_gqa = rng.random() < 0.25
    if enable_gqa and lead:
        k_lead[-1] = v_lead[-1] = rng.choice([1, 2])
        q_lead[-1] = k_lead[-1] * rng.choice([1, 2, 3]) if rng.random() < 0.9 else 3
    if rng.random() < 0.1:
        k_lead = k_lead[1:]
    if rng.random() < 0.1:
        q_lead = q_lead[1:]
    wrong = rng.random() < 0.03
    dtype = rng.choice([FP32, FP32, FP32, FP64, BF16])
    shapes = ((*q_lead, rows, dim), (*k_lead, keys, dim + wrong), (*v_lead, keys, values))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    mask = None
    if rng.random() < 0.5:
        heads = [q_lead[-1]] if q_lead and enable_gqa else lead[-1:]
        full = some_ones(rng, [*lead[:-1], *heads, rows, keys], 0.3)
        shape = full[rng.choice([0, 0, 1, max(len(full) - 2, 0)]) :] or [keys]
        seen = torch.rand(shape) < 0.6
        mask = seen
        if rng.random() < 0.5:
            mask = torch.randn(shape).to(rng.choice([dtype, dtype, dtype, FP32])).masked_fill(~seen, -torch.inf)
    options = {
        "attn_mask": mask,
        "is_causal": rng.random() < (0.3 if mask is None else 0.05),
        "scale": rng.choice([None, None, 0.5, 2, -0.3]),
        "enable_gqa": enable_gqa,
    }
    return [q, k, v], options


def answer(function: Callable[..., Tensor], inputs: list[Tensor], options: dict[str, Any]) -> Tensor | str:
    """The output; or the error, as text."""
    try:
        return function(*inputs, **options)
    except Exception as error:
        text = re.sub(r" \(position \d\)", "", str(error))
        return f"{type(error)}: {text}"


def truth(inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    mask = options["attn_mask"]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return TORCHS(*(x.double() for x in inputs), **{**options, "attn_mask": mask})


@pytest.mark.parametrize("number", range(20))
def test_drawn_calls(number: int, seed: int) -> None:
    rng = random.Random(seed + number)
    counts = {"op": 0, "error": 0}
    for _ in range(DRAWS):
        inputs, options = drawn(rng)
        what = ([tuple(x.shape) for x in inputs], {n: getattr(x, "shape", x) for n, x in options.items()})
        want = answer(TORCHS, inputs, options)
        served = Served()
        with fastattn.use_backend("reference"):
            found = answer(drop_in.scaled_dot_product_attention, inputs, options)
        if isinstance(want, str) or isinstance(found, str):
            assert found == want, what
            counts["error"] += 1
            continue
        assert found.shape == want.shape and found.dtype == want.dtype, what
        if served():
            counts["op"] += 1
            assert_right(found, truth(inputs, options), found.dtype)
        else:  # torch's own answer, NaN where that is NaN
            assert torch.equal(found.nan_to_num(), want.nan_to_num()), what
    assert counts["op"] > DRAWS / 2 and counts["error"] > 0
