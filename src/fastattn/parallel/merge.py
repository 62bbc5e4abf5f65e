"""Two outputs of attention over different keys become one: in place, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.triton.launcher import native
from ..call import token_major


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """out, other: `[B, H, S, D]`; lse, other_lse: `[B, H, S]`, natural logarithm, -inf where nothing was seen.

    out and lse (float32, float64) become those of both sets of keys.
    """
    if out.is_cuda and out.stride(3) == other.stride(3) == 1 and native("cuda"):
        from .merge_kernel import launch

        launch(out, lse, other, other_lse)
        return
    weight = torch.sigmoid(other_lse - lse).nan_to_num_(0.0)  # both -inf: nothing seen yet, whatever the weight
    out.lerp_(other.to(out.dtype), weight[..., None])
    torch.logaddexp(lse, other_lse, out=lse)


def merge_all(parts: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of N: parts `[N, B, H, S, D + 1]` (float32, float64), the last column each row's log-sum-exp.

    Returns the output `[B, H, S, D]` in that dtype, token-major, and the log-sum-exp `[B, H, S]`. sinks, `[H]`, are
    counted here. Rows that see nothing give 0 and -inf.
    """
    _, batch, heads, rows, columns = parts.shape
    out = token_major(parts, batch, heads, rows, columns - 1, dtype)
    if parts.is_cuda and native("cuda"):
        from .merge_kernel import launch_all

        lse = parts.new_empty((batch, heads, rows))
        launch_all(parts, sinks, out, lse)
        return out, lse
    every = parts[..., -1]
    if sinks is not None:
        every = torch.cat([every, sinks.to(parts.dtype)[:, None].expand(1, batch, heads, rows)])
    lse = torch.logsumexp(every, 0)
    weights = torch.exp(parts[..., -1:] - lse[..., None]).nan_to_num_(0.0)
    return out.copy_((parts[..., :-1] * weights).sum(0)), lse
