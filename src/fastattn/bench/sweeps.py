"""The sweeps of `fastattn sweep`, as lists of rows for the runner: op (every phase of a model), decode, backward.

What their figures mean is in `Sweep.method`, which a result file repeats.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import stats
from .._compat import torch as torch_internals
from ..common.table import ratio, table
from . import results, timing
from .case import Case
from .inputs import make_inputs
from .peers import PEERS, forget_compiled, present
from .runner import Comparison, Figures, Row, Runner, find
from .timing import Contender, Timing, spread, text_of


@dataclass(frozen=True)
class Sweep:
    """What is measured under one name."""

    name: str
    rows: Callable[[Runner], Iterator[Comparison | Figures]]
    method: dict[str, str]
    about: Callable[[], dict[str, Any]] = field(default=dict)  #: what its result file says beside


def run(sweep: Sweep, command: str, device: torch.device, quick: bool, seed: int) -> tuple[dict[str, Any], bool]:
    """Measures a sweep and prints its tables. Returns the result file's content, and whether a row of ours failed."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    runner = Runner(device, quick, seed, partial(print, flush=True))  # a pipe gets each line when it is true
    begin = time.perf_counter()
    if device.type == "cuda":
        # Not on the default stream: that one cannot be captured, and a backward runs on the stream of its forward.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            runner.run(sweep.rows(runner))
    else:
        runner.run(sweep.rows(runner))
    seconds = time.perf_counter() - begin
    for name, rows in runner.sections.items():
        print(f"\n{name}\n{section_table(rows)}", flush=True)
    if runner.left_out:
        print(f"\nLeft out, they need a GPU: {', '.join(sorted(runner.left_out))}")
    arguments = {"name": sweep.name, "quick": quick, "device": str(device), "seed": seed, "dtype": "bfloat16"}
    found = results.header(f"sweep {sweep.name}", command, device) | sweep.about()
    found |= {"arguments": arguments, "method": sweep.method, "left_out": sorted(runner.left_out)}
    return found | {"seconds": seconds, "stats": stats(), "sections": runner.sections}, runner.failed


def section_table(rows: list[Row]) -> str:
    """The rows under the implementations' names (microseconds), the figures' and the ratios'."""
    parts = ("implementations", "figures", "ratios")
    keys = {part: list(dict.fromkeys(key for row in rows for key in row.get(part, {}))) for part in parts}
    head = ["", *keys["implementations"], *keys["figures"], *keys["ratios"]]
    lines = []
    for row in rows:
        times = [row.get("implementations", {}).get(name, {}).get("us") for name in keys["implementations"]]
        cells = ["-" if us is None else f"{us:.1f}" for us in times]
        figures = [row.get("figures", {}).get(key) for key in keys["figures"]]
        cells += ["-" if value is None else f"{value:.4g}" for value in figures]
        cells += [ratio(row.get("ratios", {}).get(key), 1.0) for key in keys["ratios"]]
        lines.append([row["label"], *cells])
    return table(head, lines)


# --- op

TORCH = ("torch-cudnn", "torch-flash", "torch-efficient", "torch-math")
MOST_FEW = 16  #: queries at once of the rows of few
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
ROOF = "a copy reads and writes every byte once: 2 x its bytes over its time; matrix product: 2 x n^3 over its time"


def op_rows(runner: Runner) -> Iterator[Comparison | Figures]:
    """Every phase, against torch's attention and whatever else is installed."""
    yield Figures("roof", "this machine", partial(roof, runner.device, runner.generator))
    peers = [name for name, version in present().items() if version is not None and name != "flex"]
    for section, cases in op_cases(runner).items():
        kind = "step" if section == "training" else "inference"
        compiled = runner.pick(FLEX, FLEX_QUICK, {}).get(section, ())
        for i, case in enumerate(cases):
            # Few queries go to a kernel without plans; a training step meets its static plan or not as a prefill does.
            ours = ("fastattn", "fastattn-dynamic") if case.q_len > MOST_FEW and kind == "inference" else ("fastattn",)
            names = [*ours, *TORCH, *(["flex"] if i in compiled else []), *peers]
            forget_compiled()
            yield Comparison(section, case, names, kind, settle=True, exact=True)
    for name in filter(runner.can_run, ("fastattn", "torch-cudnn", "torch-flash", *runner.pick(("flex",), (), ()))):
        yield Figures("fresh lengths", name, partial(fresh_lengths, runner, name))


def op_cases(runner: Runner) -> dict[str, list[Case]]:
    """The calls of the op sweep, by section."""
    pick, rng = runner.pick, random.Random(runner.seed)
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
    long, window, narrow = pick(8192, 8192, 40), pick(1023, 1023, 9), pick(127, 127, 7)
    gpt_oss: dict[str, Any] = {"q_heads": 64, "kv_heads": 8, "dim": 64, "sinks": True}
    return {
        "prefill": [Case(s, s) for s in lengths],
        "chunks over a cache": [_cached(kv_len, q_len=q_len) for q_len, kv_len in chunks],
        "decode": [_cached(kv_len, batch=batch) for batch, kv_len in decode],
        "few queries": [_cached(kv_len, q_len=q_len) for q_len, kv_len in few],
        "training": [Case(s, s, batch=2) for s in training],
        "masks": [
            Case(n, n, len(padding), padding=padding),
            Case(sum(packed), sum(packed), packed=packed),
            Case(n, n, additive=True),
            _cached(keys[1], batch=keys[0], lengths=there),
        ],
        "windows, sinks, softcap": [
            Case(long, long, left=window),
            Case(n, n, left=narrow, **gpt_oss),
            Case(n, n, **gpt_oss),
            _cached(long, left=narrow, **gpt_oss),
            Case(n, n, softcap=50.0),
            Case(n, n, q_heads=8, kv_heads=4, dim=256, softcap=50.0),
        ],
    }


def _cached(kv_len: int, q_len: int = 1, **more: Any) -> Case:
    return Case(q_len, kv_len, head_major=True, **more)


def roof(device: torch.device, generator: torch.Generator) -> Row:
    """What the machine could do at most: GB/s of copying memory, TFLOP/s of a bfloat16 matrix product."""
    count, n = (1 << 29, 8192) if device.type == "cuda" else (1 << 21, 256)
    source = torch.empty(count, dtype=torch.bfloat16, device=device).fill_(1)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(2))
    contenders = [
        Contender("copy", [partial(torch.empty_like(source).copy_, source)]),
        Contender("matmul", [partial(torch.mm, a, b, out=torch.empty_like(a))]),
    ]
    with torch.inference_mode():
        found = timing.race(contenders, device)
    copy, matmul = found["copy"], found["matmul"]
    row: Row = {"figures": {}, "how": ROOF, "bytes": 2 * count, "n": n}
    if isinstance(copy, Timing):
        row["figures"]["copy GB/s"] = 2 * 2 * count / copy.us / 1e3
    if isinstance(matmul, Timing):
        row["figures"]["matmul TFLOP/s"] = 2.0 * n**3 / matmul.us / 1e6
    errors = [f"{name}: {text_of(error)}" for name, error in found.items() if not isinstance(error, Timing)]
    return row | ({"error": "; ".join(errors)} if errors else {})


def fresh_lengths(runner: Runner, name: str) -> Row:
    """Milliseconds of the first and the second call at lengths that the process has not seen."""
    longest, count = runner.pick((8192, 6 if name == "flex" else 16), (8192, 8), (64, 4))
    rng = random.Random(runner.seed)
    implementation = find(name)
    found = []
    forget_compiled()
    # Beyond its limit torch.compile gives up and runs what it would have compiled: something else would be measured.
    with implementation.active(), torch_internals.allow_recompiling(1000):
        for length in (longest, *rng.sample(range(longest // 32, longest), count)):
            case = Case(length, length)
            (x,) = make_inputs(case, runner.device, runner.generator, 1)
            call = implementation.bind(case, x)
            first, second = (timing.once(call, runner.device)[1] for _ in range(2))
            found.append({"length": length, "first_ms": first, "second_ms": second})
    fresh = found[1:]
    figures = {
        f"{which} {key}": value
        for which in ("first", "second")
        for key, value in spread([call[f"{which}_ms"] for call in fresh]).items()
    }
    figures["worst first / second"] = max(call["first_ms"] / call["second_ms"] for call in fresh)
    return {"warm": found[0], "calls": fresh, "figures": figures}


def about_peers() -> dict[str, Any]:
    """Which packages beside torch were there, by name, with their versions; None: not installed."""
    return {"peers": {name: version for name, version in present().items() if PEERS[name].package is not None}}


# --- decode: few queries against a long cache, compared with torch's attention and with the memory's rate


#: DeepSeek's attention with its projections absorbed: each key holds its value.
MLA: dict[str, Any] = {"q_heads": 128, "kv_heads": 1, "dim": 576, "values": 512}


def decode_rows(runner: Runner) -> Iterator[Comparison]:
    """The least that a decode step can take is the time to read K and V once: it is measured in the same turns."""
    pick = runner.pick
    long = pick(8192, 8192, 48)
    one = pick(
        ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (8, 8192), (32, 2048), (64, 4096)),
        ((1, 512), (1, 8192), (8, 8192)),
        ((1, 32), (2, 48)),
    )
    few = pick(((4, 8192), (16, 4096)), ((4, 8192),), ((4, 48),))
    heads = pick(((32, 32), (32, 8), (64, 8), (64, 4)), ((64, 8),), ((8, 8),))
    gpt_oss: dict[str, Any] = {"q_heads": 64, "kv_heads": 8, "dim": 64, "left": min(127, long // 2), "sinks": True}
    sections = {
        "one query": [_cached(kv_len, batch=batch) for batch, kv_len in one],
        "few queries": [_cached(kv_len, q_len=q_len) for q_len, kv_len in few],
        "head dims": [_cached(long, dim=dim) for dim in pick((64, 256), (64,), (64,))],
        "heads": [_cached(long, q_heads=q_heads, kv_heads=kv_heads) for q_heads, kv_heads in heads],
        "wide heads": [
            _cached(long, q_heads=8, kv_heads=1, dim=512),
            *(_cached(kv_len, batch=batch, **MLA) for batch, kv_len in pick(((1, 4096), (64, 4096)), ((1, 4096),), ())),
        ],
        "window and sinks": [_cached(long, batch=batch, **gpt_oss) for batch in pick((1, 8), (1,), (1,))],
        "ragged": ragged(*pick((32, 8192), (32, 8192), (3, 48)), runner.seed),
    }
    for section, cases in sections.items():
        for case in cases:
            peers: tuple[str, ...] = ("torch-cudnn", "torch-flash", "torch-efficient")
            if case.sinks:
                peers = ("torch-flash", "torch-math")
            elif case.dim > 256:
                peers = ("torch-math",)
            yield Comparison(section, case, ("fastattn", *peers), settle=True, read=True)


def ragged(batch: int, capacity: int, seed: int) -> list[Case]:
    """A batch of lengths drawn evenly from 1/64 of the capacity to all of it, and one of equal lengths as large."""
    rng = random.Random(seed)
    lengths = tuple(rng.randint(max(1, capacity // 64), capacity) for _ in range(batch))
    return [_cached(capacity, batch=batch, lengths=lengths), _cached(round(sum(lengths) / batch), batch=batch)]


# --- backward: training's forward and backward at causal self-attention


def backward_rows(runner: Runner) -> Iterator[Comparison]:
    names = ("fastattn", "fastattn-dynamic", "fastattn-static", "torch-cudnn", "torch-flash")
    for n in runner.pick((1000, 2048, 2049, 4096, 8192), (2049,), (20, 33)):
        for section, kind in (("forward", "training"), ("backward", "backward")):
            yield Comparison(section, Case(n, n, batch=2), names, kind)


_GRAPH = (
    "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 cache, replayed in turns; the "
    "median of 9"
)
SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "op",
            op_rows,
            {
                "all": f"bfloat16, causal to the lower right. {_GRAPH}. fastattn is called until it has the plan that "
                "it will stay with; fastattn-dynamic is fastattn at a length that does not come back (its dynamic "
                "plan, whose offsets a graph computes in each call). relative_error: norm of the difference over norm, "
                "against the reference in float64, on one K/V head of one batch entry. TFLOP/s: of the pairs of query "
                "and key that see one another, 2 matrix products in a forward, 7 in a forward and backward. GB/s: the "
                "bytes of K and V that are seen. first_ms: the first call, with all that it compiles",
                "peers": "torch-efficient: K and V are repeated for its heads within the call, as its user has to. "
                "torch-math: torch without a kernel of its own. torch-flash of packed sequences: "
                "torch.nn.attention.varlen; with sinks: its kernel, and the sinks applied through the log-sum-exp. "
                "flex: flex_attention under torch.compile, its block mask made before. mlx: a process of its own, "
                "tensors [B,H,S,D] in memory, wall time of many calls",
                "training": "forward and backward of q, k and v in one graph",
                "fresh lengths": "prefill at lengths that the process has not seen, after one call at 8192 tokens: "
                "each called twice, synchronized before and after, masks made before (flex: a block mask per length, "
                "not counted)",
            },
            about_peers,
        ),
        Sweep(
            "decode",
            decode_rows,
            {
                "all": f"{_GRAPH} (a call of more than the L2 cache has one input set); K and V are [B,Hkv,S,D] in "
                "memory; fastattn is called until it has the plan that it will stay with",
                "read": "half of the time of copying the bytes of K and V that are seen, in the same turns",
                "ragged": "lengths on the device; fastattn's K and V hold NaN past them, torch's are ordinary numbers "
                "and a bool mask; TB/s and read are of the keys that are there. equal: the same number of keys in rows "
                "of one length",
                "heads": "torch-efficient has no grouped heads: K and V are repeated for it within the call, as its "
                "user has to",
                "wide heads": "torch has no fused kernel for head dims above 256. D=576/512: absorbed MLA, the values "
                "are 512 columns of the keys, and are counted and read once",
                "window": "torch gets just the keys of the window; torch-flash is its kernel with the sinks applied "
                "through the log-sum-exp, torch-math plain tensor operations",
            },
        ),
        Sweep(
            "backward",
            backward_rows,
            {
                "all": f"{_GRAPH}. Of the backward alone: torch.autograd.grad of q, k and v with retain_graph. Of a "
                "forward whose inputs require gradients. fastattn has every plan by then that the others had built: "
                "it runs as in the long run",
            },
        ),
    )
}
