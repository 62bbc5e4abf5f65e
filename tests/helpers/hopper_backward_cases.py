"""Random calls of the Hopper backward against float64, on a GPU: a program for test_backward.py, or to run by hand.

    python hopper_backward_cases.py [--json FILE] [--only PREFIX,...]
                                              every kind (whose name begins so), in processes of their own
    python hopper_backward_cases.py KIND [COUNT] [I]   one kind, in this process, from its case I on

As `hopper_cases.py`, whose drawing it shares. The truth are autograd's gradients of `naive.attention` in float64; the
output and the log-sum-exp that the backward is given are the truth's too, rounded as a forward rounds them, and what
that does to gradients counts as true: see `gradient_bounds.py`. What nobody sees is NaN, and so is all memory before it
is written.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]

import gradient_bounds  # noqa: E402
import hopper_cases  # noqa: E402
from gradient_bounds import CAPPED, ROW, WORST  # noqa: E402
from hopper_cases import (  # noqa: E402
    COUNT,
    DEVICE,
    OTHER_WORK,
    REPEATS,
    Kind,
    main,
    run_cases,
)

APART = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  #: between runs, whose sums have another order: as `WORST`
MOST = 3e7  #: scores of a case


@dataclass(frozen=True)
class BackwardKind(Kind):
    grad_lse: bool = False
    expanded: bool = False  #: dO is one row for all: its strides are 0
    split: int = 0  #: forced
    ordered: bool = False  #: bits have to repeat


_128, _64, _256 = ((128, 128),), ((64, 64),), ((256, 256),)
_KEYS = ("bool", "bias", "edge")
KINDS = {
    "causal": BackwardKind(_128, "causal"),
    "causal-fp16": BackwardKind(_128, "causal", torch.float16),
    "full": BackwardKind(_128, "full"),
    "chunk": BackwardKind(_128, "chunk"),
    "window": BackwardKind(_128, "window"),
    "left": BackwardKind(_128, "left", torch.float16),
    "right": BackwardKind(_128, "right"),
    "lse": BackwardKind(_128, "causal", grad_lse=True),
    "sinks": BackwardKind(_128, "window", sinks=torch.bfloat16, grad_lse=True),
    "sinks-float": BackwardKind(_128, "causal", sinks=torch.float32),
    "softcap": BackwardKind(_128, "causal", softcap=True),
    "softcap-chunk": BackwardKind(_128, "chunk", softcap=True),
    "expanded": BackwardKind(_128, "causal", expanded=True),
    "split-1": BackwardKind(_128, "causal", split=1),
    "split-2": BackwardKind(_128, "causal", split=2),
    "split-full": BackwardKind(_128, "full", split=2),
    "padded": BackwardKind(((72, 72), (80, 80), (96, 96), (104, 88), (128, 64), (40, 120)), "chunk"),
    "padded-full": BackwardKind(((72, 72), (80, 80), (96, 96)), "full"),
    "64": BackwardKind(_64, "causal"),
    "64-full": BackwardKind(((64, 64), (32, 32), (48, 8), (8, 56)), "full"),
    "64-window": BackwardKind(_64, "window", sinks=torch.bfloat16, grad_lse=True),
    "64-softcap": BackwardKind(_64, "chunk", softcap=True),
    "64-split": BackwardKind(_64, "causal", split=2),
    "keys": BackwardKind(_128, "full", kv_lengths=True),
    "both": BackwardKind(_128, "chunk", q_lengths=True, kv_lengths=True, grad_lse=True),
    "queries": BackwardKind(_128, "chunk", q_lengths=True),
    "everything": BackwardKind(
        _128, "window", torch.float16, q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True,
        grad_lse=True,
    ),
    "mask-packed": BackwardKind(_128, "any", masks=("packed",)),
    "mask-packed-fp16": BackwardKind(_128, "any", torch.float16, masks=("packed",)),
    "mask-left": BackwardKind(_128, "any", masks=("left",)),
    "mask-chunks": BackwardKind(_128, "chunk", masks=("chunks",), grad_lse=True),
    "mask-gaps": BackwardKind(_128, "any", masks=("gaps", "wild")),
    "mask-intervals": BackwardKind(_128, "any", masks=("intervals", "entry", "holes")),
    "mask-rooms": BackwardKind(_128, "full", masks=("rooms",), grad_lse=True),
    "mask-lengths": BackwardKind(_128, "any", q_lengths=True, kv_lengths=True, masks=("intervals", "entry", "holes")),
    "mask-everything": BackwardKind(
        _128, "any", sinks=torch.float32, softcap=True, masks=("packed", "left", "gaps", "holes"), grad_lse=True
    ),
    "mask-split": BackwardKind(_128, "any", masks=("packed", "left", "gaps", "holes"), split=2),
    "mask-64": BackwardKind(_64, "any", masks=("packed", "left", "gaps", "holes"), grad_lse=True),
    "mask-bool": BackwardKind(_128, "any", masks=("bool",)),
    "mask-bias": BackwardKind(_128, "any", masks=("bias",), grad_lse=True),
    "mask-bias-fp16": BackwardKind(_128, "any", torch.float16, masks=("bias",)),
    "mask-edge": BackwardKind(_128, "any", masks=("edge",), grad_lse=True),
    "mask-keys-lengths": BackwardKind(_128, "any", q_lengths=True, kv_lengths=True, masks=_KEYS, grad_lse=True),
    "mask-keys-sinks": BackwardKind(_128, "window", sinks=torch.bfloat16, masks=_KEYS, grad_lse=True),
    "mask-keys-everything": BackwardKind(
        _128, "any", torch.float16, q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True, masks=_KEYS,
        grad_lse=True,
    ),
    "mask-keys-split": BackwardKind(_128, "any", masks=_KEYS, split=2),
    "mask-keys-padded": BackwardKind(((72, 72), (96, 96), (104, 88)), "any", masks=_KEYS),
    "mask-keys-64": BackwardKind(((64, 64), (32, 32), (48, 8)), "any", masks=_KEYS, grad_lse=True),
    "mask-keys-64-full": BackwardKind(_64, "full", torch.float16, masks=_KEYS),
    "mask-keys-64-everything": BackwardKind(
        _64, "window", kv_lengths=True, sinks=torch.bfloat16, softcap=True, masks=_KEYS, split=2, grad_lse=True
    ),
    "256": BackwardKind(_256, "causal"),
    "256-full": BackwardKind(_256, "full", torch.float16),
    "256-softcap": BackwardKind(_256, "causal", softcap=True),
    "256-softcap-window": BackwardKind(_256, "window", softcap=True, sinks=torch.bfloat16, grad_lse=True),
    "256-chunk": BackwardKind(_256, "chunk", torch.float16, softcap=True, grad_lse=True),
    "256-right": BackwardKind(_256, "right"),
    "256-padded": BackwardKind(((184, 184), (192, 192), (200, 176), (256, 136), (240, 256)), "chunk"),
    "256-padded-full": BackwardKind(((184, 184), (192, 192), (224, 224)), "full"),
    "256-split-1": BackwardKind(_256, "causal", split=1, softcap=True),
    "256-split-2": BackwardKind(_256, "causal", split=2, softcap=True),
    "256-split-full": BackwardKind(_256, "full", split=2),
    "256-lengths": BackwardKind(_256, "chunk", q_lengths=True, kv_lengths=True, grad_lse=True),
    "256-everything": BackwardKind(
        _256, "window", torch.float16, q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True,
        grad_lse=True,
    ),
    "mask-256": BackwardKind(_256, "any", masks=("packed", "left", "gaps", "wild", "holes"), grad_lse=True),
    "mask-256-intervals": BackwardKind(_256, "any", masks=("intervals", "entry", "chunks", "rooms"), softcap=True),
    "mask-256-split": BackwardKind(_256, "any", torch.float16, masks=("packed", "left", "gaps", "holes"), split=2),
    "mask-keys-256": BackwardKind(_256, "any", masks=_KEYS, grad_lse=True),
    "mask-keys-256-everything": BackwardKind(
        _256, "window", torch.float16, kv_lengths=True, sinks=torch.bfloat16, softcap=True, masks=_KEYS, split=2,
        grad_lse=True,
    ),
    "ordered-256": BackwardKind(_256, "causal", ordered=True, softcap=True),
    "ordered-256-split": BackwardKind(_256, "full", torch.float16, ordered=True, split=2),
    "ordered-256-mask": BackwardKind(
        _256, "any", ordered=True, masks=("packed", "gaps", "wild", "rooms", *_KEYS), softcap=True, grad_lse=True
    ),
    "ordered-causal": BackwardKind(_128, "causal", ordered=True),
    "ordered-full": BackwardKind(_128, "full", torch.float16, ordered=True),
    "ordered-chunk": BackwardKind(_128, "chunk", ordered=True, grad_lse=True),
    "ordered-window": BackwardKind(_128, "window", ordered=True, sinks=torch.bfloat16),
    "ordered-softcap": BackwardKind(_128, "causal", ordered=True, softcap=True),
    "ordered-split-1": BackwardKind(_128, "causal", ordered=True, split=1),
    "ordered-split-2": BackwardKind(_128, "causal", ordered=True, split=2),
    "ordered-split-4": BackwardKind(_128, "full", ordered=True, split=4),
    "ordered-padded": BackwardKind(((72, 72), (96, 96), (104, 88), (40, 120)), "chunk", ordered=True),
    "ordered-64": BackwardKind(_64, "causal", ordered=True),
    "ordered-64-full": BackwardKind(((64, 64), (32, 32), (48, 8)), "full", ordered=True),
    "ordered-64-split": BackwardKind(_64, "window", ordered=True, split=2),
    "ordered-lengths": BackwardKind(_128, "chunk", ordered=True, q_lengths=True, kv_lengths=True, grad_lse=True),
    "ordered-mask": BackwardKind(_128, "any", ordered=True, masks=("packed", "left", "gaps", "wild", "holes", "rooms")),
    "ordered-mask-split": BackwardKind(_64, "any", ordered=True, masks=("packed", "chunks", "gaps", "wild"), split=2),
    "ordered-mask-keys": BackwardKind(_128, "any", ordered=True, masks=_KEYS),
    "ordered-mask-everything": BackwardKind(
        _128, "window", torch.float16, ordered=True, q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True,
        masks=_KEYS, split=2, grad_lse=True,
    ),
}  # fmt: skip
ORDERED_REPEATS = 10  #: of the kinds whose bits repeat


def draw(kind: BackwardKind, rng: random.Random, i: int) -> dict[str, Any]:
    """Shapes and numbers of one call."""
    while True:
        case = hopper_cases.draw(kind, rng, i)
        batch, kv_heads, group, q_len, kv_len = case["sizes"]
        fits = batch * kv_heads * group * q_len * kv_len < MOST
        if fits and (kind.split == 0 or group % kind.split == 0):
            return case


def problem_of(kind: BackwardKind, case: dict[str, Any]) -> Any:
    """Of a case, without its tensors: of masks only the kind."""
    from fastattn.call import Problem

    batch, kv_heads, group, q_len, kv_len = case["sizes"]
    what = case["mask"][0] if case["mask"] else ""
    mask = "none" if not what else "intervals" if what in ("intervals", "entry", "holes", "rooms") else "segments"
    if what in _KEYS:
        mask = "bool" if what == "bool" else "additive"
    keys = (batch, 1, 1, kv_len)
    shape = {"none": (), "intervals": (batch, q_len), "segments": (5, 9)}.get(mask, keys)
    dtype = {"none": None, "bool": torch.bool, "additive": torch.float32}.get(mask, torch.int32)
    return Problem(
        "cuda", 0, (9, 0), kind.dtype, batch, kv_heads * group, kv_heads, q_len, kv_len, *case["dims"], mask, shape,
        dtype, case["left"], case["right"], case["softcap"], kind.sinks is not None,
        kind.q_lengths, kind.kv_lengths, kind.grad_lse, "qkv" + ("s" if kind.sinks is not None else ""),
        deterministic=kind.ordered,
    )  # fmt: skip


def check(kind: BackwardKind, case: dict[str, Any], seed: int) -> tuple[bool, str]:
    """Whether the kernels compute the case right, and a line about it."""
    import hopper_masks
    import naive

    from fastattn.backends.triton.hopper_backward import launch, run, schedule
    from fastattn.call import Call, Problem

    torch.manual_seed(seed)
    rng = random.Random(seed)
    batch, kv_heads, group, q_len, kv_len = case["sizes"]
    dim, value_dim = case["dims"]
    heads, layout = kv_heads * group, case["layout"]
    make = hopper_cases.tensor
    q = make(layout, batch, heads, q_len, dim, kind.dtype)
    k = make(layout, batch, kv_heads, kv_len, dim, kind.dtype)
    v = make(layout, batch, kv_heads, kv_len, value_dim, kind.dtype)
    grad_out = make(rng.choice(("token", "head", "packed", "odd")), batch, heads, q_len, value_dim, kind.dtype)
    if kind.expanded:
        grad_out = torch.randn(batch, 1, 1, value_dim, device=DEVICE, dtype=kind.dtype).expand_as(grad_out)
    sinks = None if kind.sinks is None else 2 * torch.randn(heads, device=DEVICE, dtype=kind.sinks)
    found = {
        name: None if case[name] is None else torch.tensor(case[name], dtype=torch.int32, device=DEVICE)
        for name in ("q_lengths", "kv_lengths")
    }
    softcap, scale = case["softcap"], case["scale"] or dim**-0.5
    if softcap:
        q *= 8  # scores that the cap bends
    fields, mask, window = {}, None, (case["left"], case["right"])
    if case["mask"]:
        name, mask_seed = case["mask"]
        fields, mask, _ = hopper_masks.draw(name, random.Random(mask_seed), batch, heads, q_len, kv_len, DEVICE)
    grad_lse = torch.randn(batch, q_len, heads, device=DEVICE).transpose(1, 2) if kind.grad_lse else None
    leaves = [x.double().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    truth = naive.attention(
        *leaves[:3], scale=scale, mask=mask, window=window, sinks=None if sinks is None else leaves[3],
        softcap=softcap or None, **found,
    )  # fmt: skip
    what = {"window": window, **found}
    rows, keys = hopper_masks.unseen_by_head(naive.visible(q, k, mask=mask, **what), heads, kv_heads)
    bounds = None if isinstance(mask, torch.Tensor) else mask  # what a tensor hides is finite
    beyond_rows, beyond_keys = hopper_masks.unseen(naive.visible(q, k, mask=bounds, **what))
    there = ~rows[..., 0]
    # Of a row of nothing but finfo.min the log-sum-exp has no bits left for probabilities: it is padding.
    lost = (truth.lse < -1e30) & there
    grad_out = torch.where(lost[..., None], 0.0, grad_out) if lost.any() else grad_out
    if grad_lse is not None:
        grad_lse.masked_fill_(lost, 0.0)
    near = truth.lse[there & ~lost]
    coarse = near.abs().max().item() * 2**-22 if near.numel() else 0.0
    loss = (truth.out * (grad_out.double() * there[..., None])).sum()
    if grad_lse is not None:
        counted = grad_lse.double() if sinks is not None else torch.where(there, grad_lse.double(), 0.0)
        loss = loss + (torch.where(counted != 0, truth.lse, 0.0) * counted).sum()
    out = make(rng.choice(("token", "token", "head")), batch, heads, q_len, value_dim, kind.dtype)
    out.copy_(truth.out.detach())
    shift = gradient_bounds.shift(out, truth.out.detach(), grad_out, there)
    loss = loss - (torch.where(there, truth.lse, 0.0) * shift).sum()
    wanted = torch.autograd.grad(loss, leaves, allow_unused=True)
    wanted = [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(wanted, leaves, strict=True)]
    floors = gradient_bounds.floors(q, k, v, grad_out, there, scale)
    lse = truth.lse.detach().float()
    if rng.random() < 0.3:  # another layout
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    del loss, truth, leaves
    # What nobody sees.
    if not kind.expanded:
        grad_out.masked_fill_(rows, torch.nan)
    q.masked_fill_(beyond_rows, torch.inf if seed % 2 else torch.nan)
    for x in (k, v):
        x.masked_fill_(beyond_keys, torch.nan)
    if grad_lse is not None and sinks is None:
        grad_lse.masked_fill_(~there, torch.nan)
    call = Call(
        q, k, v, sinks=sinks, **fields, **found, scale=scale, left=case["left"], right=case["right"], softcap=softcap,
        return_lse=kind.grad_lse, grads="qkv" + ("s" if sinks is not None else ""),
    )  # fmt: skip
    problem = replace(Problem.of(call), deterministic=kind.ordered)
    assert not launch.reasons(problem), launch.reasons(problem)
    _poison(run, launch)
    with schedule.forced(split=kind.split):
        bound = launch.bind(problem, call)
    beside, stream = torch.randn(OTHER_WORK, OTHER_WORK, device=DEVICE), torch.cuda.Stream()
    results = []
    for i in range(ORDERED_REPEATS if kind.ordered else REPEATS):
        with torch.cuda.stream(stream):
            for _ in range(1 + i % 3 if kind.ordered else 1):  # now more, now less
                beside @ beside
        results.append(bound.backward(call, out, lse, grad_out, grad_lse))
        torch.cuda.synchronize()
    apart, texts, fine = 0.0, [], True
    for name, true, first in zip("qkvs", wanted, _named(results[0]), strict=False):
        fine &= first.shape == true.shape
        if name == "s":
            error = ((first.double() - true).norm() / true.norm().clamp(min=1e-2)).item()
            rounded = torch.bfloat16 if kind.sinks is torch.bfloat16 else kind.dtype
            fine &= error < WORST[rounded]
            texts.append(f"ds {error:.1e}")
        else:  # a row at a time too, so that a wrong one does not drown in many right ones
            error, row = gradient_bounds.errors(first, true, floors[name], kind.dtype)
            fine &= error < WORST[kind.dtype] + coarse
            fine &= row < ROW[kind.dtype] * (CAPPED if softcap else 1) + 4 * coarse
            texts.append(f"d{name} {error:.1e}, row {row:.1e}")
            hidden = rows if name == "q" else keys
            fine &= not first.masked_select(hidden.expand(first.shape)).any().item()  # exact zeros
    for other in results[1:]:
        for a, b in zip(_named(results[0]), _named(other), strict=True):
            apart = max(apart, ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-2)).item())
            fine &= not kind.ordered or torch.equal(a, b)
    fine &= apart < APART[kind.dtype]
    return bool(fine), ", ".join([*texts, f"apart {apart:.0e}", f"{bound.flags}, {bound._programs} programs"])


def _named(found: Any) -> list[torch.Tensor]:
    return [x for x in (found.q, found.k, found.v, found.sinks) if x is not None]


def _poison(run: Any, launch: Any) -> None:
    """What the kernels are given to write to holds NaN."""
    from fastattn.backends import layout, scratch

    def memory(device: torch.device, size: int, stream: int | None = None) -> torch.Tensor:
        found = scratch.scratch(device, size, stream)
        return found.fill_(0xFF)

    class Gradient(layout.TokenMajor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            make = self.here
            self.here = lambda: make().fill_(torch.nan)

    run.scratch, launch.TokenMajor = memory, Gradient


def run_kind(name: str, count: int, start: int) -> int:
    """One kind in this process. Returns how many cases were wrong."""
    return run_cases(name, KINDS[name], draw, check, range(start, count))


def needed(kinds: dict[str, BackwardKind]) -> list[Any]:
    """The binaries of the kinds' cases, as far as they do not depend on what is drawn."""
    from fastattn.backends.triton.hopper_backward import launch

    found: dict[Any, None] = {}
    for name, kind in kinds.items():
        for i in range(COUNT):
            problem = problem_of(kind, draw(kind, random.Random(f"{name} {i}"), i))
            found |= dict.fromkeys([launch.flags(problem, split) for split in (True, False)])
            if i < 2:
                found |= dict.fromkeys(launch.binaries(problem))
    return list(found)


if __name__ == "__main__":
    sys.exit(main(__doc__, __file__, KINDS, needed, run_kind))
