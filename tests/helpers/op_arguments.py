"""Arguments of the op, good and bad, with which its entries are tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn import Intervals

B, H, HKV, SQ, SKV, D = 2, 4, 2, 5, 7, 8


def good() -> dict[str, Any]:
    """Arguments without a fault."""
    return {"q": torch.randn(B, H, SQ, D), "k": torch.randn(B, HKV, SKV, D), "v": torch.randn(B, HKV, SKV, D)}


def ints(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


class Array:
    """Looks like a tensor, is none."""

    shape = (B, H, SQ, D)
    dtype = torch.float32


# argument -> values that it must not have
BAD: dict[str, list[Any]] = {
    "q": [
        None, 3, [1.0], Array(), torch.randn(H, SQ, D), torch.randn(1, B, H, SQ, D), torch.tensor(1.0),
        torch.ones(B, H, SQ, D, dtype=torch.int32), torch.ones(B, H, SQ, D, dtype=torch.bool),
        torch.ones(B, H, SQ, D, dtype=torch.complex64), torch.randn(B, H, SQ, D).to_sparse(),
        torch.ones(B, H, SQ, D).to(torch.float8_e4m3fn),
    ],
    "k": [
        None, "k", torch.randn(HKV, SKV, D), torch.randn(B + 1, HKV, SKV, D), torch.randn(1, HKV, SKV, D),
        torch.randn(B, HKV, SKV, D + 1), torch.randn(B, HKV, SKV, D).int(), torch.randn(B, HKV, SKV, D, device="meta"),
    ],
    "v": [
        None, torch.randn(B, HKV, SKV), torch.randn(B, HKV, SKV + 1, D), torch.randn(B, HKV + 1, SKV, D),
        torch.randn(B, H, SKV, D), torch.randn(B + 1, HKV, SKV, D), torch.randn(B, HKV, SKV, D, device="meta"),
    ],
    "scale": [
        torch.nan, torch.inf, -torch.inf, "1", True, 1j, torch.tensor(1.0), [1.0], 10**400, 1e300, -1e300,
        np.float32(1.0), np.int64(1), np.array(1.0),
    ],
    "softcap": [
        torch.nan, torch.inf, 0.0, -1.0, "5", True, torch.tensor(5.0), 1e300, 1e-300, 5e-324,
        np.float32(5.0),
    ],
    "window": [3, (3,), (1, 2, 3), (-2, 0), (0, -5), (1.0, 2), (True, 1), "ab", torch.tensor([1, 2]), (None, 1)],
    "mask": [
        "causality", "", "Causal", 1, True, [[True]], Array(), torch.ones(SQ, SKV, dtype=torch.int32),
        torch.ones(SQ, SKV, dtype=torch.uint8), torch.ones(SKV, SQ), torch.ones(SQ, SKV + 1), torch.ones(SQ, SKV - 1),
        torch.ones(HKV, SQ, SKV), torch.ones(1, B, H, SQ, SKV), torch.ones(B + 1, 1, 1, 1), torch.ones(0),
        torch.ones(SQ, SKV, device="meta"), torch.ones(SQ, SKV).to_sparse(), torch.ones(SQ, SKV, dtype=torch.complex64),
        Intervals(ints(B, SQ).long(), ints(B, SQ)), Intervals(ints(B, SQ), ints(B, SQ).float()),
        Intervals(ints(B, SQ), ints(B, 1)), Intervals(ints(B, SKV), ints(B, SKV)), Intervals(ints(SQ), ints(SQ)),
        Intervals(ints(B + 1, SQ), ints(B + 1, SQ)), Intervals(ints(B, 1, SQ, 1), ints(B, 1, SQ, 1)),
        Intervals(None, ints(B, SQ)), Intervals(ints(B, SQ), 7), Intervals(ints(B, SQ).to("meta"), ints(B, SQ)),
    ],
    "sinks": [
        1.0, [0.0] * H, torch.zeros(H + 1), torch.zeros(HKV), torch.zeros(1), torch.zeros(1, H), torch.tensor(0.0),
        torch.zeros(H, dtype=torch.int32), torch.zeros(H, dtype=torch.bool), torch.zeros(H, device="meta"),
    ],
    **{
        name: [
            5, [1, 2], ints(B).long(), ints(B).float(), ints(B).bool(), ints(B + 1), ints(1), ints(B, 1),
            torch.tensor(1, dtype=torch.int32), ints(B).to("meta"),
        ]
        for name in ("q_lengths", "kv_lengths")
    },
    "return_lse": [None, "yes", 1, torch.ones(3), torch.tensor(True)],
    "backend": ["flash", "", "Torch", 5, ["torch"], ("torch", "reference"), b"torch"],
}  # fmt: skip

# argument -> values that it may have
FINE: dict[str, list[Any]] = {
    "q": [torch.randn(B, SQ, H, D).transpose(1, 2), torch.randn(B, H, SQ, D).bfloat16(), torch.randn(B, H, 0, D)],
    "k": [torch.randn(1, HKV, SKV, D).expand(B, -1, -1, -1), torch.randn(B, HKV, SKV, D, requires_grad=True)],
    "v": [torch.randn(B, HKV, SKV, 3), torch.randn(B, HKV, SKV, D).double(), torch.randn(B, HKV, SKV, 0)],
    "scale": [None, 1, 0.1, -2.0, 0, 1e-300, -1e-39, 1e-45, 5e-324, np.float64(0.5)],
    "softcap": [None, 1, 30.0, 1e6, 1e-6, np.float64(2.0)],
    "window": [None, (0, 0), [3, -1], (-1, 2**40), (2**31, 2**31 - 1), (10**30, -1)],
    "mask": [
        None, "causal", torch.tensor(True), torch.ones(SKV).bool(), torch.ones(SQ, SKV).half(), torch.ones(1, H, 1, 1),
        Intervals(ints(B, SQ), 4 * ints(B, SQ)), Intervals(ints(1, 1), ints(1, 1)),
    ],
    "sinks": [None, torch.zeros(H), torch.zeros(H, dtype=torch.bfloat16)],
    "q_lengths": [None, ints(B)],
    "kv_lengths": [None, 9 * ints(B)],
    "return_lse": [False, True],
    "backend": [None, "torch", "reference"],
}  # fmt: skip
