"""The Hopper forward beside torch's cuDNN and FlashAttention, in one process, in turns; needs an H100.

    python -m benchmarks.hopper_forward [--json FILE] [--quick]

Times are medians in microseconds of GPU work, captured in CUDA graphs: "cold" with the L2 cache flushed before each
call, "hot" over many calls in a row. "host" is what one call costs the CPU. Takes 4 minutes at most: rows that would
begin later are left out, with a line.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastattn.bench import output
from fastattn.call import Call, Problem

from .command import captured, end, parser_of, write

BUDGET = 230.0  #: seconds
FLUSHED = 256 << 20  #: bytes written to flush the L2 cache

# name: batch, query heads, K/V heads, queries, keys, head dim, value dim, and what else
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    f"causal {n}": ((1, 32, 8, n, n, 128, 128), {"causal": True})
    for n in (128, 256, 512, 1000, 2048, 2049, 4096, 8192, 16384)
} | {
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
        mask, causal = causal_lower_right(q.shape[2], k.shape[2]), False

    def call(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped)

        return run

    return {near + "cudnn": call(SDPBackend.CUDNN_ATTENTION), near + "flash": call(SDPBackend.FLASH_ATTENTION)}


def between(replay: Callable[[], None], times: int = 1) -> float:
    """Microseconds of one replay of a graph."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def measure(runs: dict[str, Callable[[], Any]], flush: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Cold, hot and host microseconds of each, in turns."""
    graphs: dict[str, Callable[[], None]] = {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run)
        except (RuntimeError, NotImplementedError) as error:
            if "out of memory" in str(error) or name == "ours":
                raise
            torch.cuda.synchronize()
    samples: dict[str, dict[str, list[float]]] = {name: {"cold": [], "hot": [], "host": []} for name in graphs}
    times = {name: max(1, min(20, int(2000 / between(graph, 2)))) for name, graph in graphs.items()}
    for _ in range(rounds):
        for name, graph in graphs.items():
            flush.zero_()
            samples[name]["cold"].append(between(graph))
            samples[name]["hot"].append(between(graph, times[name]))
    for name in graphs:
        for _ in range(20):
            start = time.perf_counter()
            runs[name]()
            samples[name]["host"].append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
    return {name: {what: round(statistics.median(x), 1) for what, x in own.items()} for name, own in samples.items()}


def prepared(name: str) -> Any:
    """What our kernel needs for a row: its call and its problem, and torch's mask for the same lengths."""
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
    from fastattn.backends.triton.binaries.store import shared
    from fastattn.backends.triton.hopper.launch import Forward, flags

    begun = time.monotonic()
    torch.manual_seed(0)
    # The binaries first, side by side.
    wanted = set()
    for name in ROWS:
        call, problem, _, _ = prepared(name)
        wanted.add(flags(problem, None if call.sinks is None else call.sinks.dtype))
        del call
    for flags_of_one, why in shared.make_all(wanted, torch.cuda.current_device()):
        if why:
            raise RuntimeError(f"{flags_of_one}: {why}")
    print(f"{len(wanted)} binaries after {time.monotonic() - begun:.0f} s", flush=True)
    found: dict[str, Any] = {"benchmark": "hopper forward", "unit": "us", "rows": {}}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    print(f"{'':24}" + "".join(f"{x:>22}" for x in ("ours cold/hot/host", "cudnn", "flash")) + "  to the best")
    try:
        for name in ROWS:
            if time.monotonic() - begun > BUDGET:
                print(f"{name:24} left out: no time")
                found["rows"][name] = None
                continue
            call, problem, what, mask = prepared(name)
            runs: dict[str, Callable[[], Any]] = {"ours": partial(Forward(problem, call), call)}
            runs |= peers(call.q, call.k, call.v, what, mask)
            found["rows"][name] = measure(runs, flush, 5 if arguments.quick else 15)
            print(line_of(name, found["rows"][name]), flush=True)
            del call, runs
    finally:  # what there is, should a row fail
        write(arguments.json, "hopper_forward", argv, torch.device("cuda"), found)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


def line_of(name: str, row: dict[str, dict[str, float]]) -> str:
    """A row of the table that is printed."""
    cells = []
    for peer in ("ours", "cudnn", "flash"):
        near, times = ("", row[peer]) if peer in row else ("~", row.get("~" + peer, {}))
        three = "/".join(f"{times[x]:.0f}" if times[x] >= 100 else f"{times[x]:.1f}" for x in times)
        cells.append(f"{near + three if three else '-':>22}")
    best = min((row[x]["cold"] for x in row if x != "ours"), default=float("nan"))
    return f"{name:24}{''.join(cells)}  {row['ours']['cold'] / best:.2f}"


if __name__ == "__main__":
    end(main)
