"""The op. Read this first.

A call goes down one layer at a time: `validation.py` brings the arguments into one form, a `Call`; `dispatch/` finds
the backend that serves it (`routes.py`) and runs it (`serve.py`, through torch's dispatcher where torch must see it:
`operators.py`); the backend computes. A call of a kind that was served before skips all but the last step
(`fast_path.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .call import Problem
from .dispatch import fast_path, operators, preference, registry, routes
from .dispatch.native import calls
from .validation import Arguments, Mask, validated


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = None,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, on the fastest backend that can do it exactly. `explain` says which.

    Args:
        q: queries `[B, Hq, Sq, D]`.
        k: keys `[B, Hkv, Skv, D]`; Hq must be a multiple of Hkv (grouped-query attention, nothing is repeated).
        v: values `[B, Hkv, Skv, Dv]`. q, k, v: float16, bfloat16, float32 or float64, any strides; mixed dtypes
            promote as torch promotes; under autocast they are cast as torch's own attention casts them.
        scale: factor on the scores, default `1 / sqrt(D)`; at most 1e30 (1e290 for float64), of any sign.
        mask: None; "causal"; a bool tensor (True = attend) or an additive floating tensor, broadcastable to
            `[B, Hq, Sq, Skv]`; `Intervals`; or `Segments` (left padding, packing). "causal" is aligned to the **lower
            right**: query i sees key j when `j <= i + Skv - Sq`, what prefill in chunks and decode need. (torch's
            `is_causal` is aligned to the upper left; the two agree when Sq == Skv.)
        sinks: `[Hq]`, any floating dtype: one extra logit per head in the softmax's denominator, not scaled, without a
            value (attention sinks as in gpt-oss).
        window: `(left, right)`: the query at position p sees the keys `[p - left, p + right]`, -1 meaning open;
            p = i + Skv - Sq. Combines with any mask.
        softcap: cap > 0: scores become `cap * tanh(score / cap)` before masking (Gemma 2); 1e-30 to 1e30 (1e-290 to
            1e290 for float64).
        q_lengths, kv_lengths: int32 `[B]` on q's device: queries and keys past them are not there, and the causal
            alignment is by them: p = i + kv_lengths[b] - q_lengths[b]. Never read on the host. Values outside of
            0..S are clamped.
        return_lse: also return the log-sum-exp of each row, `[B, Hq, Sq]` (float32; float64 for float64 inputs;
            natural logarithm, sinks included; -inf in rows that see nothing).
        backend: "decode", "hopper", "cudnn", "torch", "prefill" or "reference" to insist on one.

    Returns:
        `[B, Hq, Sq, Dv]` in the promoted dtype, laid out in memory as `[B, Sq, Hq, Dv]`; with return_lse a pair. A row
        that may see nothing gives 0, and so do its gradients. What the keys hold that lengths, Intervals or Segments
        exclude (NaN included) reaches nothing; keys that a tensor mask hides must be finite. Softmax and accumulation
        are float32 (float64 for float64). Gradients exist for q, k, v, sinks and an additive mask.

    Raises:
        ValueError: an argument is not as described; the message names it. Also when the backend asked for, or every
            allowed backend, refuses the call.
        TypeError: an argument that must be a tensor is none.
    """
    arguments = q, k, v, mask, sinks, window, softcap, q_lengths, kv_lengths, return_lse
    place = calls.place(backend)
    if place is not None and (served := calls.module.attention(arguments, scale, *place)) is not None:
        return served  # type: ignore[no-any-return]
    key = fast_path.key_of(arguments, scale, backend)
    found = None if key is None else fast_path.attention(key, arguments, scale, place=place)
    if found is None and (cast := fast_path.cast(arguments)) is not None:
        arguments = cast
        key = fast_path.key_of(arguments, scale, backend)
        found = None if key is None else fast_path.attention(key, arguments, scale)
    if found is None:
        call = validated(Arguments(*arguments), scale)
        names = registry.names_for(backend)
        found = operators.attention(call, names)
        if key is not None:
            fast_path.remember(key, arguments, call, names)
    out, lse = found
    return (out, lse) if return_lse and lse is not None else out


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the others do not. Printing it gives a table."""

    problem: Problem
    chosen: str | None  #: None when every allowed backend refuses
    reasons: dict[str, list[str]]  #: backend -> refusals, empty when it can serve the call
    preference: str = ""  #: why the backends are asked in another order than for most calls; "": they are not
    backward: Explanation | None = None  #: the same of the backward, where the call has gradients

    def __str__(self) -> str:
        width = max(len(name) for name in registry.NAMES)
        lines = []
        what = "the backward" if self.problem.backward else "this call"
        for name, why in self.reasons.items():
            state = f"serves {what}" if name == self.chosen else "could serve it, comes later in the list"
            lines.append(f"{'->' if name == self.chosen else '  '} {name:<{width}}  {'; '.join(why) or state}")
        absent = "not allowed here (use_backend, backend=, FASTATTN_BACKENDS or FASTATTN_CUDNN)"
        if not self.problem.backward:
            lines += [f"   {name:<{width}}  {absent}" for name in registry.NAMES if name not in self.reasons]
        lines += [f"   in this order because {self.preference}"] if self.preference else []
        return "\n".join([*lines, *(["backward:", str(self.backward)] if self.backward else [])])


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None, **arguments: Any
) -> Explanation:
    """Which backend would serve `scaled_dot_product_attention` with these arguments, and why not the others.

    Takes the op's arguments, computes nothing. Raises what the op would raise on bad arguments; a call that no allowed
    backend can serve is explained rather than raised (`chosen` is None).
    """
    call = validated(Arguments(q, k, v, **arguments), scale)
    names = registry.names_for(backend)
    after = _explained(Problem.of(call, backward=True), names) if call.grads else None
    return replace(_explained(Problem.of(call), names), backward=after)


def _explained(problem: Problem, names: tuple[str, ...]) -> Explanation:
    refusals = routes.reasons(problem, names)
    chosen = next((name for name, why in refusals.items() if not why), None)
    rule = preference.rule_for(problem) if tuple(refusals) != names else None
    return Explanation(problem, chosen, refusals, rule.why if rule else "")
