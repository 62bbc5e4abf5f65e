"""Finds how the decode kernel is best launched on this GPU: `python -m benchmarks.tune_decode [--json FILE]`.

What it finds is what `backends/triton/decode/launch_config.py` holds as data. For each kind of tile (head dim, rows)
it first tries all block sizes, warps and stages on two shapes, then the best few of them with all numbers of splits on
every shape.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from fastattn.backends.triton.decode import launch_config as rules
from fastattn.backends.triton.decode.forward import DecodeKernel
from fastattn.backends.triton.decode.launch_config import Launch
from fastattn.bench.case import Case
from fastattn.bench.inputs import Inputs, make_inputs, set_count
from fastattn.bench.timing import Contender, Timing, race, text_of
from fastattn.call import Call, Problem
from fastattn.validation import Arguments, validated

from . import command

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (2, 3, 4)
PROGRAMS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  #: programs per multiprocessor, from which splits follow
FINALISTS = 4  #: launches that go into the second round
ROUNDS = 3
METHOD = "GPU time of one call in a CUDA graph, K and V [B,Hkv,S,D] and not in the L2 cache, bfloat16, causal; " + (
    "rule: what launch_config.py chooses now; best: of all launches tried"
)


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
    lengths = tuple(500 + 241 * i % 7692 for i in range(0, 32 * 37, 37))
    ragged = Case(1, 8192, 32, head_major=True, lengths=lengths)
    return [
        Tile("D=128, 4 rows", (*(case(*shape) for shape in shapes), ragged), (1, 4)),
        Tile("D=128, 16 rows", (case(1, 2048, 4), case(1, 8192, 4), case(1, 8192, 1, (64, 4))), (1,)),
        Tile("D=128, 64 rows", (case(1, 4096, 16), case(8, 4096, 16)), (0,)),
        Tile("D=128, 1 row", (case(1, 2048, 1, (32, 32)), case(1, 8192, 1, (32, 32))), (1,)),
        Tile("D=64, 8 rows", tuple(case(b, s, 1, (64, 8), 64) for b, s in ((1, 2048), (1, 8192), (8, 8192))), (1,)),
        Tile("D=256, 2 rows", tuple(case(b, s, 1, (16, 8), 256) for b, s in ((1, 2048), (1, 8192), (8, 2048))), (1,)),
    ]


class Bench:
    """One case with its inputs on the GPU."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        count = set_count(case, torch.cuda.get_device_properties(device).L2_cache_size)
        self.calls = [_call(x) for x in make_inputs(case, device, generator, count)]
        self.problem = Problem.of(self.calls[0])

    def rule(self) -> Launch:
        return rules.choose(self.problem, rules.sm_count(self.problem.index))

    def splits(self) -> list[int]:
        """All numbers of splits worth trying."""
        p, sms = self.problem, rules.sm_count(self.problem.index)
        steps = -(-p.kv_len // 16)
        wanted = {max(1, round(x * sms / (p.batch * p.kv_heads))) for x in PROGRAMS} | {self.rule().splits}
        return sorted(x for x in wanted if x <= min(steps, rules.MAX_SPLITS))

    def time(self, launches: Iterable[Launch]) -> dict[Launch, float]:
        """Microseconds; launches that this GPU cannot do are left out."""
        contenders = {
            str(one): Contender(str(one), [self._bound(one, call) for call in self.calls]) for one in launches
        }
        found = {}
        by_name = {str(one): one for one in launches}
        for name, contender in contenders.items():  # one graph at a time: each holds the launches of many calls
            timing = race([contender], self.device, rounds=ROUNDS)[name]
            if isinstance(timing, Timing) and timing.note is None:
                found[by_name[name]] = timing.us
        return found

    def compile(self, launches: Sequence[Launch]) -> list[Launch]:
        """Compiles the kernel for each launch, several at a time. Returns those that work."""
        stream = torch.cuda.current_stream(self.device)

        def works(one: Launch) -> bool:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                try:
                    DecodeKernel(self.problem, self.calls[0], one).forward(self.calls[0])
                except Exception as error:  # too much shared memory, mostly
                    if "out of resource" not in str(error):
                        print(f"  {one}: {text_of(error)}", file=sys.stderr)
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            return [one for one, good in zip(launches, pool.map(works, launches), strict=True) if good]

    def _bound(self, one: Launch, call: Call) -> Any:
        return partial(DecodeKernel(self.problem, call, one).forward, call)


def _call(x: Inputs) -> Call:
    mask = None if x.lengths is not None else "causal"
    return validated(Arguments(x.q, x.k, x.v, mask, kv_lengths=x.lengths))


def tune(tile: Tile, device: torch.device) -> list[dict[str, Any]]:
    """The best launch of each of a tile's shapes, and what the rule's costs."""
    benches = {case: Bench(case, device) for case in tile.cases}
    totals: dict[tuple[int, int, int], float] = {}
    for index in tile.anchors:
        bench = benches[tile.cases[index]]
        rule = bench.rule()
        tried = [
            replace(rule, block_n=n, warps=w, stages=s)
            for n, w, s in product(BLOCKS, WARPS, STAGES)
            if n * rule.block_m <= rules.MAX_SCORES
        ]
        times = bench.time(bench.compile(tried))
        for one, us in times.items():
            key = (one.block_n, one.warps, one.stages)
            totals[key] = totals.get(key, 0.0) + math.log(us)
    finalists = sorted(totals, key=lambda key: totals[key])[:FINALISTS]
    rows = []
    for case, bench in benches.items():
        rule = bench.rule()
        tried = [
            replace(rule, block_n=n, warps=w, stages=s, splits=splits)
            for (n, w, s), splits in product(finalists, bench.splits())
        ]
        times = bench.time(bench.compile(list(dict.fromkeys([rule, *tried]))))
        ranked = sorted(times, key=lambda one: times[one])
        rows.append(
            {
                "tile": tile.name,
                "case": case.label(),
                "rule": asdict(rule) | {"us": times.get(rule)},
                "best": [asdict(one) | {"us": times[one]} for one in ranked[:6]],
            }
        )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def shown(one: dict[str, Any]) -> str:
        us = "-" if one["us"] is None else f"{one['us']:.1f}"
        return f"{us} us: {one['splits']} x {one['block_n']} keys, {one['warps']} warps, {one['stages']} stages"

    return [f"{row['tile']}: {row['case']}", shown(row["rule"]), *map(shown, row["best"][:3])]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def measure(device: torch.device) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for tile in tiles():
            rows += tune(tile, device)
            print(f"{tile.name}: done", flush=True)
            torch.cuda.empty_cache()
        return rows

    head = ("", "rule", "best", "second", "third")
    return command.tune("tune_decode", __doc__, METHOD, head, measure, cells, argv)


if __name__ == "__main__":
    command.end(main)
