"""`fastattn sweep`: the op in every phase of a model's life, against torch's attention and whatever else is installed.

Prefill, prefill in chunks over a cache, decode, few queries, training, masks, windows, sinks and a softcap, and lengths
that the process has not seen. Each row is checked against the reference in float64.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from .._compat import torch as torch_internals
from . import roof, timing
from .calls import Case, make_inputs
from .peers import PEERS, forget_compiled, present
from .rows import Row, Sweep, best_peer, find, quotient, spread, time_of

TORCH = ("torch-cudnn", "torch-flash", "torch-efficient", "torch-math")
METHOD = {
    "all": "bfloat16, causal to the lower right. GPU time: a CUDA graph of many calls on input sets that together "
    "exceed the L2 cache, replayed in turns; the median of 9. fastattn is called until it has what it will stay with; "
    "fastattn-any is fastattn at a length that does not come back (its plan for any length; in a graph it computes its "
    "offsets in every call). relative_error: norm of the difference over norm, against the reference in float64, on "
    "one K/V head of one batch entry. TFLOP/s: of the pairs of query and key that see one another, 2 matrix products "
    "in a forward, 7 in a forward and backward. GB/s: the bytes of K and V that are seen. first_ms: the first call, "
    "with all that it compiles",
    "peers": "torch-efficient: K and V are repeated for its heads within the call, as its user has to. torch-math: "
    "torch without a kernel of its own. torch-flash of packed sequences: torch.nn.attention.varlen; with sinks: its "
    "kernel, and the sinks applied through the log-sum-exp. flex: flex_attention under torch.compile, its block mask "
    "made before. mlx: a process of its own, tensors [B,H,S,D] in memory, wall time of many calls",
    "training": "forward and backward of q, k and v in one graph",
    "fresh lengths": "prefill at lengths that the process has not seen, after one call at 8192 tokens: each called "
    "twice, synchronized before and after, masks made before (flex: a block mask per length, not counted)",
}


def run(sweep: Sweep) -> None:
    """Measures all rows."""
    sweep.add("roof", "this machine", partial(roof.measure, sweep.device, sweep.generator))
    peers = [name for name, version in present().items() if version is not None and name != "flex"]
    for section, cases in sections(sweep).items():
        kind = "step" if section == "training" else "inference"
        compiled = sweep.pick(FLEX, FLEX_QUICK, {}).get(section, ())
        for i, case in enumerate(cases):
            # Few queries go to a kernel without plans; a training step meets its exact plan or not as a prefill does.
            ours = ("fastattn", "fastattn-any") if case.q_len > MOST_FEW and kind == "inference" else ("fastattn",)
            names = [*ours, *TORCH, *(["flex"] if i in compiled else []), *peers]
            sweep.add(section, case.label(), partial(_measure, sweep, case, names, kind))
    for name in ("fastattn", "torch-cudnn", "torch-flash", *sweep.pick(("flex",), (), ())):
        if find(name).cuda_only and sweep.device.type != "cuda":
            sweep.left_out.add(name)
        else:
            sweep.add("fresh lengths", name, partial(_fresh, sweep, name))


#: The rows of each section that flex takes part in: compiling one costs it seconds.
FLEX: dict[str, tuple[int, ...]] = {
    "prefill": (3, 4),
    "chunks over a cache": (2,),
    "decode": (2,),
    "training": (1,),
    "masks": (0, 1, 2),
    "windows, sinks, softcap": (0, 1, 4, 5),
}
FLEX_QUICK: dict[str, tuple[int, ...]] = {"prefill": (0,)}


MOST_FEW = 16  #: queries at once of the rows of few


def sections(sweep: Sweep) -> dict[str, list[Case]]:
    """What is measured, by section."""
    pick, rng = sweep.pick, random.Random(sweep.seed)

    def cached(kv_len: int, q_len: int = 1, batch: int = 1, **more: Any) -> Case:
        return Case(q_len, kv_len, batch, head_major=True, **more)

    lengths = pick((512, 1024, 2048, 2049, 4096, 8192, 16384), (2048, 2049, 8192), (16, 33))
    chunks = pick(((512, 2048), (512, 8192), (2048, 8192), (2048, 16384), (1999, 5000)), ((2048, 8192),), ((8, 24),))
    decode = pick(
        ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 8192), (64, 4096)),
        ((1, 2048), (1, 8192), (1, 32768)),
        ((1, 32), (2, 48)),
    )
    few = pick(((2, 8192), (4, 8192), (8, 8192), (16, 8192)), ((4, 8192),), ((4, 48),))
    training = pick((1024, 2048, 2049, 4096, 8192), (2048,), (20,))
    n = pick(2048, 2048, 24)
    padding = (0, *(rng.randrange(n // 2) for _ in range(3)))
    packed = tuple(rng.randint(n // 8, n // 2) for _ in range(16))
    keys = pick((32, 8192), (8, 8192), (3, 48))
    there = tuple(rng.randint(max(1, keys[1] // 64), keys[1]) for _ in range(keys[0]))
    long, window = pick(8192, 8192, 40), pick(1023, 1023, 9)
    oss: dict[str, Any] = {"q_heads": 64, "kv_heads": 8, "dim": 64, "sinks": True}
    narrow = pick(127, 127, 7)
    return {
        "prefill": [Case(s, s) for s in lengths],
        "chunks over a cache": [cached(kv_len, q_len) for q_len, kv_len in chunks],
        "decode": [cached(kv_len, batch=batch) for batch, kv_len in decode],
        "few queries": [cached(kv_len, q_len) for q_len, kv_len in few],
        "training": [Case(s, s, batch=2) for s in training],
        "masks": [
            Case(n, n, len(padding), padding=padding),
            Case(sum(packed), sum(packed), packed=packed),
            Case(n, n, additive=True),
            cached(keys[1], batch=keys[0], lengths=there),
        ],
        "windows, sinks, softcap": [
            Case(long, long, left=window),
            Case(n, n, left=narrow, **oss),
            Case(n, n, **oss),
            cached(long, left=narrow, **oss),
            Case(n, n, softcap=50.0),
            Case(n, n, q_heads=8, kv_heads=4, dim=256, softcap=50.0),
        ],
    }


def _measure(sweep: Sweep, case: Case, names: Sequence[str], kind: str) -> Row:
    forget_compiled()
    row = sweep.compare(case, names, kind=kind, settle=True, exact=True)
    for entry in row["implementations"].values():
        if "us" in entry:
            entry["tflop_s"] = case.useful_flops(kind) / entry["us"] / 1e6
            entry["gb_s"] = case.kv_bytes / entry["us"] / 1e3
    ours, peer = time_of(row, "fastattn"), best_peer(row)
    row["best_peer"] = peer[0] if peer else None
    row["ratios"] = {"/ best other": quotient(ours, peer[1] if peer else None)}
    return row


def _fresh(sweep: Sweep, name: str) -> Row:
    """Milliseconds of the first and the second call at lengths that were not there before."""
    longest, count = sweep.pick((8192, 6 if name == "flex" else 16), (8192, 8), (64, 4))
    rng = random.Random(sweep.seed)
    implementation = find(name)
    found = []
    forget_compiled()
    # Beyond its limit torch.compile gives up and runs what it would have compiled: something else would be measured.
    with implementation.active(), torch_internals.allow_recompiling(1000):
        for length in (longest, *rng.sample(range(longest // 32, longest), count)):
            case = Case(length, length)
            (x,) = make_inputs(case, sweep.device, sweep.generator, 1)
            call = implementation.bind(case, x)
            first, second = (timing.once(call, sweep.device)[1] for _ in range(2))
            found.append({"length": length, "first_ms": first, "second_ms": second})
    fresh = found[1:]
    figures = {
        f"{which} {key}": value
        for which in ("first", "second")
        for key, value in spread([call[f"{which}_ms"] for call in fresh]).items()
    }
    figures["worst first / second"] = max(call["first_ms"] / call["second_ms"] for call in fresh)
    return {"warm": found[0], "calls": fresh, "figures": figures}


def about_peers() -> dict[str, str | None]:
    """For a result file: which packages beside torch were there, by name, with their versions; None: not installed."""
    return {name: version for name, version in present().items() if PEERS[name].package is not None}
