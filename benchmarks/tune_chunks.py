"""Launches of the decode kernel for chunks and for the decode rows of `fastattn sweep users`, tried on this GPU:
`python -m benchmarks.tune_chunks [ROW ...] [--seconds S] [--json FILE]`. ROW: a part of a row's name.

For each row the time of the launch that is chosen now, the best ones, and the time of the kernel that would serve the
call otherwise, beside what the model of both times says (`backends/triton/decode/chunks.py` holds its costs, that file
and `launch_config.py` the tiles, warps, stages and splits). First all tiles with as many splits as fill the GPU, then
the best two with other numbers of splits. The time is shared out evenly; a row that runs out of it says how many of its
launches were tried.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from fastattn import Intervals
from fastattn.api import scaled_dot_product_attention
from fastattn.backends.triton.binaries import store
from fastattn.backends.triton.binaries.flag_set import FlagSet
from fastattn.backends.triton.binaries.launcher import flag_sets
from fastattn.backends.triton.binaries.policy import waiting
from fastattn.backends.triton.decode import chunks, shapes
from fastattn.backends.triton.decode import launch_config as rules
from fastattn.backends.triton.decode.forward import DecodeKernel
from fastattn.backends.triton.decode.launch_config import Launch
from fastattn.backends.triton.limits import shared_memory, sm_count
from fastattn.bench import output
from fastattn.bench.case import Case
from fastattn.bench.inputs import Inputs, make_inputs
from fastattn.call import Problem
from fastattn.common.table import table
from fastattn.validation import Arguments, validated

from .command import end, parser_of, write
from .tune import best_first, inputs_of, microseconds

Found = dict[str, Any]
SECONDS = 95.0  #: all of it, compilation included
FINALISTS = 2


@dataclass(frozen=True)
class Row:
    """One call. gaps: with an interval of keys for each query (the causal one), as `Segments` become."""

    name: str
    case: Case
    gaps: bool = False


def _case(q_len: int, kv_len: int, batch: int = 1, heads: tuple[int, int] = (32, 8), dim: int = 128) -> Case:
    return Case(q_len, kv_len, batch, *heads, dim, head_major=True)


ROWS = (
    Row("chunk 32/4096", _case(32, 4096)),
    Row("chunk 20/1024", _case(20, 1024)),
    Row("chunk 64/4096", _case(64, 4096)),
    Row("chunk 128/4096", _case(128, 4096)),
    Row("chunk 160/16384", _case(160, 16384)),
    Row("chunk B8 20/4096", _case(20, 4096, 8)),
    Row("chunk B32 20/1024", _case(20, 1024, 32)),
    Row("chunk intervals 32/4096", _case(32, 4096), gaps=True),
    Row("chunk MHA 100/4096", _case(100, 4096, 1, (32, 32))),
    Row("chunk MQA 32/4096", _case(32, 4096, 1, (32, 1))),
    Row("chunk D64 32/4096", _case(32, 4096, 1, (64, 8), 64)),
    Row("chunk D256 64/4096", _case(64, 4096, 1, (16, 8), 256)),
    Row("chunk D512 32/4096", _case(32, 4096, 1, (8, 1), 512)),
    Row("Whisper cross decode 1500", _case(1, 1500, 8, (20, 20), 64)),
    Row("decode B1 2048", _case(1, 2048)),
    Row("decode B1 32768", _case(1, 32768)),
    Row("decode B8 8192", _case(1, 8192, 8)),
    Row("decode B17 2048", _case(1, 2048, 17)),
    Row("decode B32 2048", _case(1, 2048, 32)),
    Row("decode MHA B8 2048", _case(1, 2048, 8, (32, 32))),
)

#: Rows, keys, warps, stages of chunks; of few rows (which all rules give the same tile) keys, warps, stages.
_MANY = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3),
         (64, 32, 4, 4), (64, 64, 8, 3))  # fmt: skip
_GAPS = ((128, 32, 8, 4), (64, 64, 4, 3), (64, 32, 4, 4), (64, 32, 8, 3))
_WIDE = ((64, 32, 8, 2), (64, 32, 8, 3), (64, 16, 8, 3), (64, 64, 8, 2))
_FEW = ((32, 2, 3), (64, 2, 3), (64, 4, 3), (64, 4, 4), (128, 4, 3))
#: Programs for each multiprocessor, from which the splits follow.
_CHUNK_PROGRAMS, _PROGRAMS = (0.5, 1, 1.5, 2, 3, 4, 6), (0.5, 1, 1.5, 2, 3, 4, 6, 8)


class Bench:
    """One row with its inputs on the GPU."""

    def __init__(self, row: Row, device: torch.device, inputs: Sequence[Inputs]) -> None:
        self.row, self.device, self.inputs = row, device, inputs
        self.calls = [validated(Arguments(x.q, x.k, x.v, self.mask(x))) for x in self.inputs]
        self.problem = Problem.of(self.calls[0])
        self.sms = sm_count(self.problem.index)
        self.rule = rules.choose(self.problem, self.sms, shared_memory(self.problem.index))

    def mask(self, x: Inputs) -> Any:
        if not self.row.gaps:
            return "causal"
        case = self.row.case
        hi = torch.arange(case.kv_len - case.q_len + 1, case.kv_len + 1, dtype=torch.int32, device=self.device)
        hi = hi.expand(case.batch, case.q_len).contiguous()
        return Intervals(torch.zeros_like(hi), hi)

    def splits(self, block_m: int, programs: Iterable[float]) -> list[int]:
        """Numbers of splits that give so many programs for each multiprocessor."""
        p = self.problem
        tiles = p.batch * p.kv_heads * -(-shapes.rows(p) // block_m)
        most = min(-(-p.kv_len // 32), rules.MAX_SPLITS)
        return list(dict.fromkeys([max(1, min(most, int(x * self.sms) // tiles)) for x in programs]))

    def tiles(self) -> list[Launch]:
        """All tiles worth trying, each with as many splits as fill the GPU once."""
        p, rule = self.problem, self.rule
        if shapes.rows(p) <= shapes.MAX_ROWS:
            found = [replace(rule, block_n=n, warps=w, stages=s) for n, w, s in _FEW]
        else:
            some = _WIDE if shapes.is_wide(p) else _GAPS if self.row.gaps else _MANY
            found = [
                replace(rule, block_m=m, block_n=n, warps=w, stages=s, near=True, splits=self.splits(m, (1,))[0])
                for m, n, w, s in some
            ]
        return list(dict.fromkeys([rule, *found]))

    def finals(self, best: Sequence[Launch]) -> list[Launch]:
        """The best tiles with other numbers of splits."""
        programs = _PROGRAMS if shapes.rows(self.problem) <= shapes.MAX_ROWS else _CHUNK_PROGRAMS
        return [replace(one, splits=n) for one in best for n in self.splits(one.block_m, programs)]

    def flags(self) -> Iterator[FlagSet]:
        """The binaries of all launches."""
        for one, splits in product(self.tiles(), (1, 2)):
            kernel = DecodeKernel(self.problem, self.calls[0], replace(one, splits=splits))
            yield from flag_sets(kernel.launches(self.calls[0]))

    def time(self, one: Launch) -> float | None:
        """Microseconds, None where the launch does not run."""
        try:
            with waiting():
                kernel = DecodeKernel(self.problem, self.calls[0], one)
                kernel.forward(self.calls[0])
        except Exception as error:
            if "its shared memory" not in str(error):
                print(f"  {self.row.name}: {one}: {error}", file=sys.stderr)
            return None
        calls = [partial(DecodeKernel(self.problem, x, one).forward, x) for x in self.calls]
        return microseconds(calls, self.device, one)

    def elsewhere(self) -> tuple[str, float | None]:
        """The first of the other backends that takes the call, and its time."""
        for name in ("hopper", "prefill"):
            calls = [partial(self._by, name, x) for x in self.inputs]
            try:
                with waiting():
                    calls[0]()
            except ValueError:
                continue
            return name, microseconds(calls, self.device, name)
        return "none", None

    def _by(self, name: str, x: Inputs) -> Any:
        return scaled_dot_product_attention(x.q, x.k, x.v, mask=self.mask(x), backend=name)


def tried(bench: Bench, seconds: float) -> Found:
    """What a row's launches take. At least the chosen one is timed, and its tiles before its splits."""
    stop, times = time.perf_counter() + seconds, dict[Launch, float | None]()
    tiles = bench.tiles()
    count = 0

    def run(launches: Iterable[Launch]) -> None:
        nonlocal count
        for one in launches:
            count += one not in times
            if one not in times and (not times or time.perf_counter() < stop):
                times[one] = bench.time(one)

    run(tiles)
    name, other = bench.elsewhere()
    best = sorted((us, i) for i, one in enumerate(tiles) if (us := times.get(one)) is not None)
    run(bench.finals([tiles[i] for _, i in best[:FINALISTS]]))
    p = bench.problem
    found: Found = {"row": bench.row.name, "case": bench.row.case.label(), "tried": len(times), "launches": count}
    found |= {"rule": asdict(bench.rule) | {"us": times[bench.rule]}, "best": best_first(times, 6)}
    found |= {"elsewhere": name, "elsewhere_us": other, "chunk": chunks.is_chunk(p)}
    if shapes.rows(p) > shapes.MAX_ROWS:
        found["model"] = chunks.times(p, bench.sms)
    return found


def cells(row: Found) -> list[str]:
    """A row of the table."""

    def shown(one: Found) -> str:
        us = "-" if one["us"] is None else f"{one['us']:.1f}"
        tile = f"{one['block_m']} x {one['block_n']}"
        return f"{us} us: {one['splits']} splits, {tile}, {one['warps']} warps, {one['stages']} stages"

    us, rule, model = row["elsewhere_us"], row["rule"]["us"], row.get("model")
    ratio = f"{rule / row['best'][0]['us']:.2f}" if rule and row["best"] else "-"
    elsewhere = row["elsewhere"] if us is None else f"{row['elsewhere']} {us:.1f}"
    guessed = "-" if model is None else f"{model[0]:.0f} / {model[1]:.0f}{'' if row['chunk'] else ' (not routed)'}"
    best = [*map(shown, row["best"][:2]), "-", "-"][:2]
    return [row["row"], shown(row["rule"]), *best, ratio, elsewhere, guessed, f"{row['tried']}/{row['launches']}"]


HEAD = ("", "chosen", "best", "second", "chosen / best", "elsewhere, us", "model: here / there", "tried")
METHOD = (
    "GPU time of one call in a CUDA graph, K and V [B,Hkv,S,D] and not in the L2 cache, bfloat16, causal; chosen: what "
    "the rules choose now; best: of all launches tried; elsewhere: the kernel that would serve the call otherwise"
)


def measured(rows: Sequence[Row], device: torch.device, seconds: float) -> list[Found]:
    """All rows, in so many seconds. The current stream can be captured."""
    begin = time.perf_counter()
    flags: dict[FlagSet, None] = {}
    for row in rows:
        one = make_inputs(row.case, device, torch.Generator(device).manual_seed(0), 1)
        flags |= dict.fromkeys(Bench(row, device, one).flags())
        torch.cuda.empty_cache()
    failed = [why for _, why in store.shared.make_all(flags, device.index) if why]
    print(f"{len(flags)} kernels compiled in {time.perf_counter() - begin:.0f} s, {len(failed)} not", flush=True)
    found = []
    for i, row in enumerate(rows):
        left = seconds - (time.perf_counter() - begin)
        found.append(
            tried(Bench(row, device, inputs_of(row.case, device)), 0.85 * left / (len(rows) - i))
        )  # the rest is inputs
        torch.cuda.empty_cache()
        print(f"{row.name}: done", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("tune_chunks", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a part of a row's name (all rows)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (%(default)s)")
    arguments = parser.parse_args(argv)
    rows = [row for row in ROWS if not arguments.rows or any(word in row.name for word in arguments.rows)]
    if not rows:
        print(f"tune_chunks: ROW: expected a part of {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("tune_chunks: needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 2
    output.check([arguments.json])
    device, begin = torch.device("cuda", torch.cuda.current_device()), time.perf_counter()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        found = measured(rows, device, arguments.seconds)
    print(table(HEAD, [cells(row) for row in found]))
    result: Found = {"benchmark": "tune_chunks", "method": METHOD, "costs": asdict(chunks.COSTS)}
    result |= {"seconds": time.perf_counter() - begin, "rows": found}
    write(arguments.json, "tune_chunks", argv, device, result)
    return 0


if __name__ == "__main__":
    end(main)
