"""A plan's key and what stands for a plan on disk."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.backends.cudnn.graphs import Operand, PlanKey

PAYLOAD = bytes(range(256)) * 3


def key(length: int = 7, **changes: Any) -> PlanKey:
    operands = (Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16),)
    return PlanKey(**({"direction": "forward", "device": 0, "operands": operands} | changes))
