"""FASTATTN_DEBUG=1: the ranks compare their calls before anything is exchanged."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from .exchange import Group, together


def check_agreement(call: dict[str, Any], group: Group) -> None:
    """Raises ValueError on every rank, naming the arguments and what each rank has, where ranks differ.

    call: what must be the same everywhere, by argument. A rank whose own arguments are invalid puts the message
    under "error", and may leave out the rest. Costs a collective of pickled objects and, on a GPU, a wait for it.
    """
    found: list[dict[str, Any]] = [{} for _ in range(group.size())]
    with together("the comparison of the ranks' calls", group):
        dist.all_gather_object(found, call, group=group)
    lines = []
    for name in call:
        values = {rank: each[name] for rank, each in enumerate(found) if name in each}
        if len(set(values.values())) > 1 or (name == "error" and call["error"]):
            lines.append(f"{name}: " + ", ".join(f"rank {rank}: {value or 'none'}" for rank, value in values.items()))
    if lines:
        raise ValueError("fastattn.parallel: the ranks of the group do not make the same call. " + "; ".join(lines))


def outline(x: Tensor) -> str:
    """What must be the same of a tensor `[B, H, tokens, D]` on every rank: all but the number of its tokens."""
    dtype = str(x.dtype).removeprefix("torch.")
    return f"[{x.shape[0]}, {x.shape[1]}, tokens, {x.shape[3]}] {dtype} on {x.device.type}"
