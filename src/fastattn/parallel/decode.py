"""Decode against a cache that is spread over ranks: each attends to its part, one small all-gather joins the parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import scaled_dot_product_attention
from . import exchange
from .exchange import Group
from .merge import merge_all


def decode(
    q: Tensor, k: Tensor, v: Tensor, group: Group, sinks: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The output `[B, Hq, Sq, Dv]` and log-sum-exp of all ranks' keys, the same on every rank. options: the op's."""
    found = scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    assert isinstance(found, tuple)
    out, lse = found
    # One message: the output in the precision of the sum, and the log-sum-exp as one more column of it.
    parts = exchange.all_gather(torch.cat([out, lse[..., None]], -1), group)
    return merge_all(parts, sinks, out.dtype)
