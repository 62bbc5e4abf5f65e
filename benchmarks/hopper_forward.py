"""The Hopper forward beside torch's cuDNN and FlashAttention, in one process, in turns; needs an H100.

    python -m benchmarks.hopper_forward [--json FILE] [--quick]

Times are medians in microseconds of GPU work, captured in CUDA graphs: "cold" with the L2 cache flushed before each
call, "hot" over many calls in a row. "host" is what one call costs the CPU. Takes 4 minutes at most: rows that would
begin later are left out, with a line.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastattn.bench import output, results

from .command import end, parser_of

BUDGET = 230.0  #: seconds
FLUSHED = 256 << 20  #: bytes written to flush the L2 cache

# name: batch, query heads, K/V heads, queries, keys, head dim, value dim, and what else
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal 128": ((1, 32, 8, 128, 128, 128, 128), {"causal": True}),
    "causal 256": ((1, 32, 8, 256, 256, 128, 128), {"causal": True}),
    "causal 512": ((1, 32, 8, 512, 512, 128, 128), {"causal": True}),
    "causal 1000": ((1, 32, 8, 1000, 1000, 128, 128), {"causal": True}),
    "causal 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True}),
    "causal 2049": ((1, 32, 8, 2049, 2049, 128, 128), {"causal": True}),
    "causal 4096": ((1, 32, 8, 4096, 4096, 128, 128), {"causal": True}),
    "causal 8192": ((1, 32, 8, 8192, 8192, 128, 128), {"causal": True}),
    "causal 16384": ((1, 32, 8, 16384, 16384, 128, 128), {"causal": True}),
    "lse 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "lse": True}),
    "sinks 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "sinks": True}),
    "softcap 2048": ((1, 32, 8, 2048, 2048, 128, 128), {"causal": True, "softcap": 50.0}),
    "window 1024 8192": ((1, 32, 8, 8192, 8192, 128, 128), {"causal": True, "left": 1023}),
    "chunk 512/4096": ((1, 32, 8, 512, 4096, 128, 128), {"causal": True}),
    "chunk 2048/8192": ((1, 32, 8, 2048, 8192, 128, 128), {"causal": True}),
    "B16 512": ((16, 32, 8, 512, 512, 128, 128), {"causal": True}),
    "full 700": ((1, 24, 24, 700, 700, 128, 128), {}),
    "full 1024": ((1, 24, 24, 1024, 1024, 128, 128), {}),
    "Flux 4608": ((1, 24, 24, 4608, 4608, 128, 128), {}),
    "video 16384": ((1, 12, 12, 16384, 16384, 128, 128), {}),
    "SDXL self 4096": ((2, 10, 10, 4096, 4096, 64, 64), {}),
    "ViT B64 257": ((64, 16, 16, 257, 257, 64, 64), {}),
    "Whisper cross 448/1500": ((8, 20, 20, 448, 1500, 64, 64), {}),
    "SAM B25 196": ((25, 16, 16, 196, 196, 80, 80), {}),
    "gpt-oss window 4096": ((1, 64, 8, 4096, 4096, 64, 64), {"causal": True, "left": 127, "sinks": True}),
    "gpt-oss 4096": ((1, 64, 8, 4096, 4096, 64, 64), {"causal": True, "sinks": True}),
    "BERT B32 384 keys": ((32, 12, 12, 384, 384, 64, 64), {"lengths": "k"}),
    "ragged B8 2048": ((8, 32, 8, 2048, 2048, 128, 128), {"causal": True, "lengths": "qk"}),
    "192/128 4096": ((1, 32, 32, 4096, 4096, 192, 128), {"causal": True}),
    "256 4096": ((1, 16, 8, 4096, 4096, 256, 256), {"causal": True}),
    "96 2048": ((1, 32, 32, 2048, 2048, 96, 96), {"causal": True}),
}


def peers(q: Tensor, k: Tensor, v: Tensor, what: dict[str, Any], mask: Tensor | None) -> dict[str, Callable[[], Any]]:
    """torch's kernels that compute the same, or, where none does, the nearest plain call (named so)."""
    causal, grouped = what.get("causal", False), q.shape[1] != k.shape[1]
    plain = not any(x in what for x in ("left", "softcap", "sinks", "lengths"))
    near = "" if plain or mask is not None else "~"
    if q.shape[2] != k.shape[2] and causal:
        from torch.nn.attention.bias import causal_lower_right

        mask, causal = causal_lower_right(q.shape[2], k.shape[2]), False

    def call(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped)

        return run

    return {near + "cudnn": call(SDPBackend.CUDNN_ATTENTION), near + "flash": call(SDPBackend.FLASH_ATTENTION)}


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.synchronize()
    return graph


def between(graph: torch.cuda.CUDAGraph, times: int = 1) -> float:
    """Microseconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def measure(runs: dict[str, Callable[[], Any]], flush: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Cold, hot and host microseconds of each, in turns."""
    graphs, found = {}, {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run)
        except (RuntimeError, NotImplementedError) as error:
            if "out of memory" in str(error) or name == "ours":
                raise
            torch.cuda.synchronize()
    cold: dict[str, list[float]] = {name: [] for name in graphs}
    hot: dict[str, list[float]] = {name: [] for name in graphs}
    times = {name: max(1, min(20, int(2000 / between(graph, 2)))) for name, graph in graphs.items()}
    for _ in range(rounds):
        for name, graph in graphs.items():
            flush.zero_()
            cold[name].append(between(graph))
            hot[name].append(between(graph, times[name]))
    for name in graphs:
        host = []
        for _ in range(20):
            start = time.perf_counter()
            runs[name]()
            host.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
        medians = {"cold": statistics.median(cold[name]), "hot": statistics.median(hot[name])}
        found[name] = {n: round(x, 1) for n, x in (medians | {"host": statistics.median(host)}).items()}
    return found


def prepared(name: str) -> Any:
    """What our kernel needs for a row: its call and its problem, and torch's mask for the same lengths."""
    from fastattn.call import Call, Problem

    (batch, heads, kv_heads, q_len, kv_len, dim, value_dim), what = ROWS[name]

    def made(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = made(heads, q_len, dim), made(kv_heads, kv_len, dim), made(kv_heads, kv_len, value_dim)
    sinks = torch.randn(heads, device="cuda", dtype=torch.bfloat16) if what.get("sinks") else None
    lengths, mask = None, None
    if "lengths" in what:
        lengths = torch.linspace(kv_len // 4, kv_len, batch, device="cuda").int()
        if what["lengths"] == "k":
            mask = torch.arange(kv_len, device="cuda")[None, None, None] < lengths[:, None, None, None]
    call = Call(
        q, k, v, None, None, None, sinks, lengths if "q" in what.get("lengths", "") else None, lengths,
        scale=dim**-0.5, left=what.get("left", -1), right=0 if what.get("causal") else -1,
        softcap=what.get("softcap", 0.0), return_lse=what.get("lse", False),
    )  # fmt: skip
    return call, Problem.of(call), what, mask


def _compile(flags: Any) -> None:
    from fastattn.backends.triton.hopper.binary import compile_binary

    compile_binary(flags)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("hopper_forward", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper_forward: needs a GPU of compute capability 9.0, torch sees none", file=sys.stderr)
        return 2
    from fastattn.backends.triton.hopper.launch import Forward, flags

    begun = time.monotonic()
    torch.manual_seed(0)
    # The binaries first, side by side.
    wanted = set()
    for name in ROWS:
        call, problem, _, _ = prepared(name)
        wanted.add(flags(problem, None if call.sinks is None else call.sinks.dtype))
        del call
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(_compile, wanted))
    print(f"{len(wanted)} binaries after {time.monotonic() - begun:.0f} s", flush=True)
    command = f"python -m benchmarks.hopper_forward {shlex.join(argv)}".rstrip()
    result: dict[str, Any] = results.header("hopper forward", command, torch.device("cuda"))
    result |= {"unit": "us", "rows": {}}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    print(f"{'':24}" + "".join(f"{x:>22}" for x in ("ours cold/hot/host", "cudnn", "flash")) + "  to the best")
    for name in ROWS:
        if time.monotonic() - begun > BUDGET:
            print(f"{name:24} left out: no time")
            result["rows"][name] = None
            continue
        call, problem, what, mask = prepared(name)
        forward = Forward(problem, call)
        runs: dict[str, Callable[[], Any]] = {
            "ours": partial(forward, call),
            **peers(call.q, call.k, call.v, what, mask),
        }
        row = measure(runs, flush, 5 if arguments.quick else 15)
        result["rows"][name] = row
        cells = []
        for peer in ("ours", "cudnn", "flash"):
            near, times = ("", row[peer]) if peer in row else ("~", row.get("~" + peer))
            three = [] if times is None else [times[x] for x in ("cold", "hot", "host")]
            cells.append(near + "/".join(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in three) if three else "-")
        best = min((row[x]["cold"] for x in row if x != "ours"), default=float("nan"))
        print(f"{name:24}" + "".join(f"{x:>22}" for x in cells) + f"  {row['ours']['cold'] / best:.2f}", flush=True)
        del call, forward, runs
        if arguments.json:  # what there is, should the next row fail
            results.write_json(arguments.json, result)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    end(main)
