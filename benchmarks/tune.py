"""Measures, on this GPU, what the package keeps as data: `python -m benchmarks.tune NAME [--json FILE]`. NAME:

- decode: launches of the decode kernel (`backends/triton/decode/launch_config.py` holds the best). First all tiles and
  warps at a few anchor shapes, then the best of them with every number of splits at every shape.
- gemms: launches of the GEMM of one row (`lm/runners/fused/launch_config.py`), with the weights of Llama-3.1-8B. Beside
  each: cuBLAS for the GEMM alone, without the norm, gate or residual that our kernel adds to it.
- routing: where decode ends and cuDNN begins. Both backends take the same calls of few queries.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn.functional import linear

from fastattn.api import scaled_dot_product_attention
from fastattn.backends.triton.binaries.policy import waiting
from fastattn.backends.triton.decode import launch_config as rules
from fastattn.backends.triton.decode.forward import DecodeKernel
from fastattn.backends.triton.decode.launch_config import Launch
from fastattn.backends.triton.limits import sm_count
from fastattn.bench import output
from fastattn.bench.case import Case
from fastattn.bench.inputs import DTYPE, Inputs, make_inputs, set_count
from fastattn.bench.timing import Contender, Timing, race, text_of
from fastattn.call import Problem
from fastattn.common.table import table
from fastattn.lm.runners.fused import launch_config as gemm_rules
from fastattn.lm.runners.fused import layers
from fastattn.validation import Arguments, validated

from .command import end, parser_of, write

Row = dict[str, Any]


def inputs_of(case: Case, device: torch.device) -> list[Inputs]:
    """As many sets as it takes for the L2 cache to hold none of them when its turn comes."""
    count = set_count(case, torch.cuda.get_device_properties(device).L2_cache_size)
    return make_inputs(case, device, torch.Generator(device).manual_seed(0), count)


def microseconds(calls: Sequence[Any], device: torch.device, label: object) -> float | None:
    """Of a call, or None for a launch that this GPU cannot do. One graph at a time: each holds many launches."""
    found = race([Contender("", calls)], device, rounds=3)[""]
    if isinstance(found, Timing):
        return found.us if found.note is None else None
    print(f"  {label}: {text_of(found)}", file=sys.stderr)
    return None


def best_first(times: dict[Any, float | None], count: int) -> list[Row]:
    """The fastest launches, as a result file has them."""
    found = sorted((us, i, one) for i, (one, us) in enumerate(times.items()) if us is not None)
    return [asdict(one) | {"us": us} for us, _, one in found[:count]]


# --- decode

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (2, 3, 4)
PROGRAMS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  #: programs per multiprocessor, from which splits follow
FINALISTS = 4  #: launches that go into the second round


@dataclass(frozen=True)
class Tile:
    """Shapes that fill a tile alike."""

    name: str
    cases: tuple[Case, ...]
    anchors: tuple[int, ...]  #: of the cases, those on which all launches are tried


def tiles() -> list[Tile]:
    """What is measured."""

    def case(batch: int, kv_len: int, q_len: int = 1, heads: tuple[int, int] = (32, 8), dim: int = 128) -> Case:
        return Case(q_len, kv_len, batch, *heads, dim, head_major=True)

    shapes = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 2048), (8, 8192), (32, 2048), (64, 4096))
    ragged = Case(1, 8192, 32, head_major=True, lengths=tuple(500 + 241 * i % 7692 for i in range(0, 32 * 37, 37)))
    return [
        Tile("D=128, 4 rows", (*(case(*shape) for shape in shapes), ragged), (1, 4)),
        Tile("D=128, 16 rows", (case(1, 2048, 4), case(1, 8192, 4), case(1, 8192, 1, (64, 4))), (1,)),
        Tile("D=128, 64 rows", (case(1, 4096, 16), case(8, 4096, 16)), (0,)),
        Tile("D=128, 1 row", (case(1, 2048, 1, (32, 32)), case(1, 8192, 1, (32, 32))), (1,)),
        Tile("D=64, 8 rows", tuple(case(b, s, 1, (64, 8), 64) for b, s in ((1, 2048), (1, 8192), (8, 8192))), (1,)),
        Tile("D=256, 2 rows", tuple(case(b, s, 1, (16, 8), 256) for b, s in ((1, 2048), (1, 8192), (8, 2048))), (1,)),
        Tile("D=512, 8 rows", tuple(case(b, s, 1, (8, 1), 512) for b, s in ((1, 8192), (1, 1 << 17), (8, 8192))), (0,)),
    ]


class DecodeBench:
    """One case with its inputs on the GPU."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.device = device
        masked = [(x, None if x.lengths is not None else "causal") for x in inputs_of(case, device)]
        self.calls = [validated(Arguments(x.q, x.k, x.v, mask, kv_lengths=x.lengths)) for x, mask in masked]
        self.problem = Problem.of(self.calls[0])
        self.sms = sm_count(self.problem.index)
        self.rule = rules.choose(self.problem, self.sms)

    def splits(self) -> list[int]:
        """All numbers of splits worth trying."""
        p = self.problem
        wanted = {max(1, round(x * self.sms / (p.batch * p.kv_heads))) for x in PROGRAMS} | {self.rule.splits}
        return sorted(x for x in wanted if x <= min(-(-p.kv_len // 16), rules.MAX_SPLITS))

    def times(self, launches: Iterable[Launch]) -> dict[Launch, float | None]:
        """Microseconds. The kernels are compiled before, several at a time; what does not compile is left out."""
        stream, launches = torch.cuda.current_stream(self.device), list(dict.fromkeys(launches))

        def works(one: Launch) -> bool:
            with torch.cuda.device(self.device), torch.cuda.stream(stream), waiting():
                try:
                    DecodeKernel(self.problem, self.calls[0], one).forward(self.calls[0])
                except Exception as error:  # too much shared memory, mostly
                    if "its shared memory" not in str(error):
                        print(f"  {one}: {text_of(error)}", file=sys.stderr)
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            good = [one for one, fine in zip(launches, pool.map(works, launches), strict=True) if fine]
        bound = {one: [partial(DecodeKernel(self.problem, x, one).forward, x) for x in self.calls] for one in good}
        return {one: microseconds(calls, self.device, one) for one, calls in bound.items()}


def tune_decode(tile: Tile, device: torch.device) -> list[Row]:
    """The best launches of each of a tile's shapes, and what the rule's costs."""
    benches = {case: DecodeBench(case, device) for case in tile.cases}
    totals: dict[tuple[int, int, int], float] = {}
    for bench in (benches[tile.cases[index]] for index in tile.anchors):
        tried = [
            replace(bench.rule, block_n=n, warps=w, stages=s)
            for n, w, s in product(BLOCKS, WARPS, STAGES)
            if n * bench.rule.block_m <= rules.MAX_SCORES
        ]
        for one, us in bench.times(tried).items():
            if us is not None:
                key = (one.block_n, one.warps, one.stages)
                totals[key] = totals.get(key, 0.0) + math.log(us)
    finalists = sorted(totals, key=lambda key: totals[key])[:FINALISTS]
    rows = []
    for case, bench in benches.items():
        pairs = product(finalists, bench.splits())
        tried = [replace(bench.rule, block_n=n, warps=w, stages=s, splits=splits) for (n, w, s), splits in pairs]
        times = bench.times([bench.rule, *tried])
        rule = asdict(bench.rule) | {"us": times.get(bench.rule)}
        rows.append({"tile": tile.name, "case": case.label(), "rule": rule, "best": best_first(times, 6)})
    torch.cuda.empty_cache()
    return rows


def decode_cells(row: Row) -> list[str]:
    def shown(one: Row) -> str:
        us = "-" if one["us"] is None else f"{one['us']:.1f}"
        return f"{us} us: {one['splits']} x {one['block_n']} keys, {one['warps']} warps, {one['stages']} stages"

    return [f"{row['tile']}: {row['case']}", shown(row["rule"]), *map(shown, row["best"][:3])]


# --- gemms

SET_BYTES = 400_000_000  #: of weights that take turns: more than any L2 cache


@dataclass(frozen=True)
class Shape:
    """A weight `[size, inner]`, twice as many rows if gated, and what is done along with its GEMM."""

    name: str
    size: int
    inner: int
    norm: bool = False
    gated: bool = False
    add: bool = False

    @property
    def nbytes(self) -> int:
        return self.size * (1 + self.gated) * self.inner * DTYPE.itemsize


SHAPES = (
    Shape("q, k, v", 6144, 4096, norm=True),
    Shape("out", 4096, 4096, add=True),
    Shape("gate and values", 14336, 4096, norm=True, gated=True),
    Shape("down", 4096, 14336, add=True),
    Shape("logits", 128256, 4096, norm=True),
)


def gemm_launches(shape: Shape) -> Iterator[gemm_rules.Launch]:
    """All that is worth trying: 16 to 128 numbers of the weight for each thread in a step."""
    for block_n, block_k, warps in product((1, 2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8)):
        if 8 <= block_n * block_k * (1 + shape.gated) // (32 * warps) <= 128:
            yield gemm_rules.Launch(block_n, block_k, warps)


def tune_gemms(shape: Shape, device: torch.device) -> list[Row]:
    """Microseconds of cuBLAS, of the rule and of the best launches."""
    rule = gemm_rules.choose_launch(shape.size, shape.inner, shape.gated, DTYPE)
    count = max(1, min(8, SET_BYTES // shape.nbytes))
    options: dict[str, Any] = {"device": device, "dtype": DTYPE}
    weights = [torch.randn(shape.size * (1 + shape.gated), shape.inner, **options) for _ in range(count)]
    x, out = torch.randn(1, shape.inner, **options), torch.zeros(1, shape.size, **options)
    gain = torch.rand(shape.inner, **options) if shape.norm else None

    def bound(launch: gemm_rules.Launch) -> list[Any]:
        gemms = [layers.FusedGemm(w, gain=gain, eps=1e-5, gated=shape.gated, add=shape.add) for w in weights]
        for one in gemms:
            layers.set_launch(one, launch)
        return [partial(one, x, out) for one in gemms]

    cublas = microseconds([partial(linear, x, weight) for weight in weights], device, "cublas")
    times = {one: microseconds(bound(one), device, one) for one in dict.fromkeys([rule, *gemm_launches(shape)])}
    found = {"shape": asdict(shape), "bytes": shape.nbytes, "cublas_us": cublas}
    return [found | {"rule": asdict(rule) | {"us": times[rule]}, "best": best_first(times, 5)}]


def gemm_cells(row: Row) -> list[str]:
    def time(us: float | None) -> str:
        return "-" if us is None else f"{us:.1f} us, {row['bytes'] / us / 1e6:.2f} TB/s"

    def launch(one: Row) -> str:
        return f"{time(one['us'])}: {one['block_n']} x {one['block_k']}, {one['warps']} warps"

    return [row["shape"]["name"], time(row["cublas_us"]), launch(row["rule"]), *map(launch, row["best"][:2])]


# --- routing

BACKENDS = ("decode", "cudnn")


def routing_cases() -> list[Case]:
    """By queries, rows of the tile, keys and batch: up to the rows that a tile has, 4 or 8 heads to a K/V head."""
    found = [
        Case(q_len, kv_len, batch, 32, 8, 128, head_major=True)
        for batch, q_len, kv_len in product((1, 8, 32), (1, 4, 8, 16), (256, 2048, 16384))
        if batch * kv_len <= 1 << 17
    ]
    return [*found, *(Case(8, n, 1, 64, 8, 64, head_major=True) for n in (256, 2048, 16384))]


def compare_backends(case: Case, device: torch.device) -> list[Row]:
    """Microseconds by backend, or why there are none."""
    inputs = inputs_of(case, device)

    def call(x: Inputs, backend: str) -> Any:
        return scaled_dot_product_attention(x.q, x.k, x.v, mask="causal", backend=backend)

    contenders = [Contender(name, [partial(call, x, name) for x in inputs]) for name in BACKENDS]
    found = race(contenders, device, rounds=5)
    times = {name: found[name].us if isinstance(found[name], Timing) else text_of(found[name]) for name in BACKENDS}  # type: ignore[union-attr, arg-type]
    return [{"case": case.label(), "rows": case.q_len * case.q_heads // case.kv_heads} | times]


def routing_cells(row: Row) -> list[str]:
    times = [row[name] for name in BACKENDS]
    found = [f"{us:.1f}" if isinstance(us, float) else str(us)[:60] for us in times]
    good = all(isinstance(us, float) for us in times)
    return [row["case"], str(row["rows"]), *found, f"{times[0] / times[1]:.2f}x" if good else "-"]


# --- the command


@dataclass(frozen=True)
class Tuning:
    """What is measured under one name."""

    method: str
    cases: Callable[[], Sequence[Any]]
    measure: Callable[[Any, torch.device], list[Row]]  #: the rows of a case; the current stream can be captured
    head: tuple[str, ...]
    cells: Callable[[Row], list[str]]


_CACHE = "GPU time of one call in a CUDA graph, K and V [B,Hkv,S,D] and not in the L2 cache, bfloat16, causal; "
TUNINGS = {
    "decode": Tuning(
        _CACHE + "rule: what launch_config.py chooses now; best: of all launches tried",
        tiles,
        tune_decode,
        ("", "rule", "best", "second", "third"),
        decode_cells,
    ),
    "gemms": Tuning(
        "GPU time of one call in a CUDA graph, weights not in the L2 cache, bfloat16; TB/s of the weight's bytes",
        lambda: SHAPES,
        tune_gemms,
        ("", "cuBLAS", "rule", "best", "second"),
        gemm_cells,
    ),
    "routing": Tuning(
        _CACHE + "cudnn: with its dynamic plan, as a call that was not seen before gets it",
        routing_cases,
        compare_backends,
        ("", "rows", "decode, us", "cudnn, us", "decode / cudnn"),
        routing_cells,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("tune", __doc__)
    parser.add_argument("name", choices=TUNINGS, metavar="NAME", help=", ".join(TUNINGS))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 2
    output.check([arguments.json])
    tuning, device = TUNINGS[arguments.name], torch.device("cuda", torch.cuda.current_device())
    begin, rows = time.perf_counter(), []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        for case in tuning.cases():
            rows += tuning.measure(case, device)
            print(f"{getattr(case, 'name', case)}: done", flush=True)
    print(table(tuning.head, [tuning.cells(row) for row in rows]))
    found = {"method": tuning.method, "seconds": time.perf_counter() - begin, "rows": rows}
    write(arguments.json, "tune", argv, device, {"benchmark": f"tune_{arguments.name}"} | found)
    return 0


if __name__ == "__main__":
    end(main)
