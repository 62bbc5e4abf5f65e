"""`fastattn sweep backward`: training's forward and backward at causal self-attention, against torch's attention."""

from __future__ import annotations

from functools import partial

from .calls import Case
from .rows import Row, Sweep, best_peer, quotient, time_of

NAMES = ("fastattn", "fastattn-any", "fastattn-exact", "torch-cudnn", "torch-flash")
METHOD = {
    "all": "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 cache, replayed in turns. "
    "Of the backward alone: torch.autograd.grad of q, k and v with retain_graph. Of a forward whose inputs require "
    "gradients. fastattn has every plan by then that the others had built: it runs as in the long run",
}


def run(sweep: Sweep) -> None:
    """Measures all rows."""
    for n in sweep.pick((1000, 2048, 2049, 4096, 8192), (2049,), (20, 33)):
        for section, kind in (("forward", "training"), ("backward", "backward")):
            sweep.add(section, f"B=2 S={n}", partial(_measure, sweep, Case(n, n, batch=2), kind))


def _measure(sweep: Sweep, case: Case, kind: str) -> Row:
    row = sweep.compare(case, NAMES, kind=kind)
    peer = best_peer(row)
    row["best_peer"] = peer[0] if peer else None
    best = quotient(time_of(row, "fastattn"), peer[1] if peer else None)
    any_length = quotient(time_of(row, "fastattn-any"), time_of(row, "fastattn-exact"))
    row["ratios"] = {"/ best torch": best, "any/exact": any_length}
    return row
