"""Which of the backends that can serve a call is asked first: by measurement, as data per GPU.

`registry.NAMES` is the order where nothing else is known. A rule brings backends to its front, for the calls that it
holds for, and says by which measurement or for which reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..call import Problem
from .registry import NAMES


class Rule(NamedTuple):
    """Backends that are asked first."""

    holds: Callable[[Problem], bool]
    first: tuple[str, ...]  #: in this order
    why: str  #: for `fastattn.explain`


#: Scores times head and value dim. Of 7e9 (32 x 12 heads, 384 tokens, D=64) hopper takes 38 us without a mask of keys
#: and 63 with one, prefill 54 and 59; both grow in proportion.
_FEW_SCORES = 1e10


def _large(p: Problem) -> bool:
    return max(p.head_dim, p.value_dim) > 256


def _large_with_many_rows(p: Problem) -> bool:
    """A tile of 64 rows is full."""
    return not p.backward and _large(p) and p.q_len * p.group >= 64


def _grouped_float(p: Problem) -> bool:
    return p.dtype == torch.float32 and p.group > 1


def _needs_dense_mask(p: Problem) -> bool:
    """Whether torch's kernels would have to be given a mask that is not a tensor of the call."""
    return p.mask in ("intervals", "segments") or p.q_lengths or p.kv_lengths or p.left >= 0 or p.right > 0


def _many_rows_with_a_softcap(p: Problem) -> bool:
    """More queries than one tile of the decode kernel has room for."""
    return p.softcap != 0 and p.q_len * p.group > 64


def _many_rows_with_a_mask(p: Problem) -> bool:
    """A mask with a row for each of more queries than the decode kernel is quick for."""
    return p.dense_mask and p.mask_shape[2] > 16


def _few_scores_with_masked_keys(p: Problem) -> bool:
    """A mask of keys, and so few scores that the three small kernels which hopper runs before its own (25 us) take more
    than it gains on prefill."""
    return p.masked_keys and p.batch * p.q_heads * p.q_len * p.kv_len * (p.head_dim + p.value_dim) <= _FEW_SCORES


def _chunk(p: Problem) -> bool:
    """More queries than one tile of the decode kernel has room for, and many keys to divide."""
    from ..backends.triton.decode.chunks import is_chunk

    return not p.grads and is_chunk(p)


def _gradients_with_a_bias(p: Problem) -> bool:
    return p.backward and p.mask == "additive"


def _gradients_with_a_mask(p: Problem) -> bool:
    return p.backward and p.dense_mask


def _padded_gradients(p: Problem) -> bool:
    """Gradients of head dims that the Hopper backward pads to 256, where cuDNN, which does not, is the quicker one by
    estimate: hopper takes 0.88 of its time with 256 dims."""
    from ..backends.triton.hopper_backward.launch import work_of

    return p.backward and p.softcap == 0 and 128 < max(p.head_dim, p.value_dim) <= 256 and work_of(p) < 0.88


_CHUNK = Rule(
    _chunk,
    ("decode", "hopper", "cudnn", "prefill"),
    "kernels that do not divide the keys among programs leave most of the GPU idle where queries are few: with 32 "
    "queries over 4096 keys hopper takes 50 us, torch's kernels 26 (on SM 9.0)",
)
#: By compute capability; those under None hold on every GPU. The first rule that holds counts. Times of (9, 0):
#: benchmarks/results/h200/forward.json, forward-masks.json, hopper_wide.json and users.json.
RULES: dict[tuple[int, int] | None, tuple[Rule, ...]] = {
    (9, 0): (
        Rule(
            _large_with_many_rows,
            ("hopper", "decode", "prefill"),
            "for head dims over 256 prefill takes 191 us for 2048 tokens where hopper takes 80, and decode 300 for 64 "
            "sequences of absorbed MLA where hopper takes 132",
        ),
        _CHUNK,
        Rule(
            _gradients_with_a_mask,
            ("hopper", "prefill", "torch"),
            "cuDNN's backward takes a tensor mask only through passes over all scores, and a plan for each shape",
        ),
        Rule(
            lambda p: _padded_gradients(p) and _needs_dense_mask(p),
            ("cudnn", "hopper", "prefill"),
            "hopper pads such head dims to 256, torch would need a mask of all queries and keys",
        ),
        Rule(_padded_gradients, ("cudnn", "hopper"), "hopper pads such head dims to 256"),
        Rule(
            _few_scores_with_masked_keys,
            ("decode", "prefill", "hopper", "torch"),
            "for a mask of keys prefill takes 59 us where hopper takes 63; cuDNN builds a plan for each shape",
        ),
        Rule(
            lambda p: p.masked_keys,
            ("decode", "hopper", "prefill", "torch"),
            "for many tokens hopper takes 0.5 to 0.8 of prefill's time; cuDNN builds a plan for each shape of a mask",
        ),
        Rule(
            _many_rows_with_a_mask,
            ("hopper", "prefill", "decode", "torch"),
            "for windows of 49 queries with a bias decode takes 230 us where prefill takes 47; cuDNN builds a plan for "
            "each shape",
        ),
    ),
    None: (
        _CHUNK,
        Rule(
            _gradients_with_a_bias,
            ("prefill",),
            "of rows of nothing but finfo.min the others' gradients are as many times too large as there are keys",
        ),
        Rule(
            _many_rows_with_a_softcap,
            ("hopper", "prefill", "decode"),
            "with a softcap decode takes 224 us for many queries, prefill 142 and hopper 69 (on SM 9.0)",
        ),
        Rule(
            _large,
            ("decode", "hopper", "prefill"),
            "for head dims over 256 prefill takes 188 us where torch's kernels take 383 (on SM 9.0)",
        ),
        Rule(_grouped_float, ("decode", "hopper", "prefill"), "torch has no fused float32 kernel for grouped heads"),
        Rule(
            _needs_dense_mask,
            ("decode", "hopper", "cudnn", "prefill"),
            "torch would need a mask of all queries and keys",
        ),
    ),
}


def rule_for(problem: Problem) -> Rule | None:
    """The rule that counts for a problem, if there is one."""
    if problem.device != "cuda":
        return None
    rules = (*RULES.get(problem.capability, ()), *RULES[None])
    return next((rule for rule in rules if rule.holds(problem)), None)


def ordered(problem: Problem, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names in the order in which the backends are asked. A list that is not in the order of `NAMES` is somebody's
    own, and stays as it is."""
    if names != tuple(name for name in NAMES if name in names):
        return names
    rule = rule_for(problem)
    if rule is None:
        return names
    first = tuple(name for name in rule.first if name in names)
    return (*first, *(name for name in names if name not in first))
