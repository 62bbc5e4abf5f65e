"""Which cuDNN can do what on which GPU: one table of data. Each row is a refusal.

Sources: cuDNN's own answers for described devices (`check_support`, 9.19 and 9.28), runs on an H100 with 9.19, and the
defects named in the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...call import Problem
from .operands import needs_bias
from .runtime import version_text

ANY = 1 << 30
DATACENTER_BLACKWELL = ((10, 0), (10, 3))
GENERIC = ((8, 0), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  #: Ampere, Ada, consumer Blackwell: one set of kernels


@dataclass(frozen=True)
class Limit:
    """Problems for which `when` holds are refused, on these GPUs, by cuDNN versions in [since, below)."""

    text: str
    when: Callable[[Problem], bool]
    capabilities: tuple[tuple[int, int], ...] = ()  #: () = every GPU
    since: int = 0
    below: int = ANY

    def applies(self, problem: Problem, version: int) -> bool:
        return (
            self.since <= version < self.below
            and (not self.capabilities or problem.capability in self.capabilities)
            and self.when(problem)
        )


def is_packed(p: Problem) -> bool:
    """True for segments whose number is not the batch's: another one in each call, of which most are short."""
    return p.mask == "segments" and p.mask_shape[1] != p.batch


def sums_lengths(p: Problem) -> bool:
    """True when the backward's workspace can be made for so many tokens, whatever rows they are in."""
    return p.capability not in GENERIC and not (p.head_dim % 16 or p.value_dim % 16)


def segments_fit(p: Problem) -> bool:
    """False when segments have to become Intervals, and those a dense bias."""
    if p.mask != "segments" or not p.grads:
        return True
    return p.capability not in GENERIC and (not is_packed(p) or sums_lengths(p))


def _has_bias(p: Problem) -> bool:
    return needs_bias(p) or (not segments_fit(p) and p.q_len > 1)


def _backward_above(limit: int) -> Callable[[Problem], bool]:
    return lambda p: bool(p.grads) and max(p.head_dim, p.value_dim) > limit


LIMITS = (
    Limit("cuDNN attention needs compute capability 8.0", lambda p: p.capability < (8, 0)),
    Limit(
        "cuDNN attention is for float16 and bfloat16 (float32 would be computed in TF32)",
        lambda p: p.dtype not in (torch.float16, torch.bfloat16),
    ),
    Limit("no queries or no keys", lambda p: p.empty),
    Limit("no segments", lambda p: p.mask == "segments" and not p.mask_shape[1]),
    Limit("softcap is not offered", lambda p: p.softcap > 0),
    Limit("head dims must be multiples of 8", lambda p: bool(p.head_dim % 8 or p.value_dim % 8)),
    Limit("head dims above 256 have no fast kernel", lambda p: max(p.head_dim, p.value_dim) > 256),
    Limit("the backward is limited to head dims of 128 on this GPU", _backward_above(128), GENERIC),
    Limit(
        "without a dense mask the backward needs values of the keys' head dim on this GPU",
        lambda p: bool(p.grads) and p.head_dim != p.value_dim and not _has_bias(p),
        GENERIC,
    ),
    Limit(
        "the backward is limited to head dims of 128, or 192 with values of 128, on this GPU",
        lambda p: _backward_above(128)(p) and (p.head_dim, p.value_dim) != (192, 128),
        DATACENTER_BLACKWELL,
    ),
    Limit(
        "no gradient of the mask with head dims of 192 and 128 on this GPU",
        lambda p: "m" in p.grads and (p.head_dim, p.value_dim) == (192, 128),
        DATACENTER_BLACKWELL,
    ),
    Limit("the backward needs more than one query or key", lambda p: bool(p.grads) and p.q_len == p.kv_len == 1),
    # Wrong for few K/V heads: cuDNN release notes, fixed in 9.25.1.
    Limit("one query is wrong in this cuDNN", lambda p: p.q_len == 1, DATACENTER_BLACKWELL, since=91900, below=92501),
    Limit(
        "one interval per query would become a dense mask of more than 2^28 numbers",
        lambda p: (
            ((p.mask == "intervals" and needs_bias(p)) or not segments_fit(p))
            and p.batch * p.q_len * p.kv_len > 1 << 28
        ),
    ),
    Limit("float64 masks have no cuDNN type", lambda p: p.mask_dtype == torch.float64),
)


def reasons(problem: Problem, version: int) -> list[str]:
    """Every limit of this cuDNN that the problem hits."""
    return [f"{limit.text}{_range(limit, version)}" for limit in LIMITS if limit.applies(problem, version)]


def deterministic_refusal(problem: Problem, bias_gradient: bool, ragged: bool) -> str | None:
    """Why the backward cannot be deterministic bit by bit on this GPU, or None."""
    if bias_gradient and problem.capability in DATACENTER_BLACKWELL:
        return "no deterministic mask gradient on this GPU"
    if ragged and problem.capability in GENERIC:
        return "no deterministic backward with lengths as data on this GPU"
    return None


def _range(limit: Limit, version: int) -> str:
    return "" if limit.below == ANY else f" (cuDNN {version_text(version)}, fixed in {version_text(limit.below)})"
