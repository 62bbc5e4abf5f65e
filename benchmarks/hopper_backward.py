"""The Hopper backward beside torch's cuDNN and FlashAttention, in one process, in turns; needs an H100 or H200.

    python -m benchmarks.hopper_backward [--json FILE] [--quick] [--only TEXT,...] [--tune]

Times are medians in microseconds of GPU work of the backward alone, captured in CUDA graphs: "cold" with the L2 cache
flushed before each call, "hot" over many calls in a row; "host" is what one call costs the CPU. Beside a call with a
mask "dense" is a call with as many scores to compute and no mask; "deterministic" is the backward that serves under
torch.use_deterministic_algorithms, and "portable" the one that did before it, and for head dims over 128 (`prefill`).
With --tune each row of a grid of lengths is timed with every choice of split and sections (`schedule.py`), beside the
choice that the kernel makes by itself. Rows that would begin after four minutes (with --tune eight) are left out, with
a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.bench import output
from fastattn.call import Call, Problem

from .command import end, parser_of, write
from .hopper_rows import LENGTH, asked, drawn, of_lengths, tensors
from .torchs_backward import torchs
from .turns import FLUSHED, measure

BUDGET, TUNE_BUDGET = 240.0, 480.0  #: seconds

# name: batch, query heads, K/V heads, queries, keys, head dim, and what else
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    f"B{b} {n}": ((b, 32, 8, n, n, 128), {"causal": True})
    for b, n in (
        *((1, n) for n in (512, 1000, 2048, 4096, 8192)),
        *((2, n) for n in (512, 887, 1000, 1586, 2048, 2049, 2791, 2887, 3000, 3177, 3300, 3460, 3600, 4096, 8192)),
        *((4, n) for n in (700, 1500, 2600, 3300, 4100)),
        *((16, n) for n in (300, 512, 700)),
    )
} | {
    f"B2 16/16 {n}": ((2, 16, 16, n, n, 128), {"causal": True}) for n in (700, 2048, 3300, 5000)
} | {
    "full 24/24 4608": ((1, 24, 24, 4608, 4608, 128), {}),
    "full B2 1000": ((2, 24, 24, 1000, 1000, 128), {}),
    "ViT B64 257 D64": ((64, 16, 16, 257, 257, 64), {}),
    "SDXL B2 4096 D64": ((2, 10, 10, 4096, 4096, 64), {}),
    "D64 causal B2 2048": ((2, 32, 8, 2048, 2048, 64), {"causal": True}),
    "D96 causal B1 2048": ((1, 32, 32, 2048, 2048, 96), {"causal": True}),
    "softcap B2 2048": ((2, 32, 8, 2048, 2048, 128), {"causal": True, "softcap": 50.0}),
    "window 1024 B1 8192": ((1, 32, 8, 8192, 8192, 128), {"causal": True, "left": 1023}),
    "window 127 D64 sinks 4096": ((1, 64, 8, 4096, 4096, 64), {"causal": True, "left": 127, "sinks": True}),
    "packed 50 in 8192": ((1, 32, 8, 8192, 8192, 128), {"causal": True, "mask": "packed"}),
    "left-padded B8 2048": ((8, 32, 8, 2048, 2048, 128), {"causal": True, "mask": "left"}),
    "BERT B32 384 lengths D64": ((32, 12, 12, 384, 384, 64), {"lengths": "k"}),
    "BERT B32 384 mask D64": ((32, 12, 12, 384, 384, 64), {"mask": "bool"}),
    "BERT B32 384 bias D64": ((32, 12, 12, 384, 384, 64), {"mask": "bias"}),
    "keys bias B2 2048": ((2, 32, 8, 2048, 2048, 128), {"mask": "bias"}),
}  # fmt: skip
ROWS |= {
    f"{LENGTH} B{b} {heads}/{kv_heads} {n}": ((b, heads, kv_heads, n, n, 128), {"causal": True})
    for b in (1, 2, 4)
    for i, n in enumerate(drawn(20, 300, 8192, seed=b))
    for heads, kv_heads in [((32, 8), (16, 16))[i % 2]]
}
#: Head dims over 128.
WIDE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "256 causal B1 4096": ((1, 16, 8, 4096, 4096, 256), {"causal": True}),
    "256 softcap B1 4096": ((1, 8, 4, 4096, 4096, 256), {"causal": True, "softcap": 50.0}),
    "256 softcap B1 2048": ((1, 8, 4, 2048, 2048, 256), {"causal": True, "softcap": 50.0}),
    "256 softcap window 4096 B1 8192": ((1, 8, 4, 8192, 8192, 256), {"causal": True, "softcap": 50.0, "left": 4095}),
    "256 window 1024 B1 4096": ((1, 8, 4, 4096, 4096, 256), {"causal": True, "left": 1023}),
    "256 full B2 2048": ((2, 16, 8, 2048, 2048, 256), {}),
}
ROWS |= WIDE
DETERMINISTIC = "B1 2048", "B2 2048", "B1 8192", "full 24/24 4608", "D64 causal B2 2048"
#: Of --tune: batch, query heads, K/V heads, lengths.
GRID = [
    (b, heads, kv_heads, n)
    for b, heads, kv_heads in ((1, 32, 8), (2, 32, 8), (4, 32, 8), (16, 32, 8), (2, 16, 16))
    for n in (300, 512, 700, 1000, 1400, 2048, 2600, 3000, 3177, 3460, 4096, 6000)
    if b * n <= 16384
]


def call_of(sizes: tuple[int, ...], what: dict[str, Any]) -> tuple[Call, Call | None]:
    """A call with gradients; where it has a mask, a dense call with as many scores."""
    call, same_sizes = asked((*sizes, sizes[-1]), what)
    same = None
    if same_sizes is not None and what["mask"] != "bias":
        q, k, v = tensors(same_sizes)
        same = Call(q, k, v, scale=call.scale, right=0 if what.get("causal") else -1, grads="qkv")
    return call._replace(grads="qkv" + "s" * (call.sinks is not None)), same


def forward_of(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by the Hopper forward."""
    from fastattn.backends.triton.hopper.launch import Forward

    out, lse = Forward(Problem.of(call), call)(call)
    assert lse is not None
    return out, lse


def ours(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Callable[[], Any]:
    """Our backward of a call."""
    from fastattn.backends.triton.hopper_backward import launch

    bound = launch.bind(Problem.of(call), call)
    return partial(bound.backward, call, out, lse, grad_out, None)


def deterministic(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Callable[[], Any]:
    """The same where bits must repeat."""
    from fastattn.backends.triton.hopper_backward import launch

    bound = launch.bind(replace(Problem.of(call), deterministic=True), call)
    return partial(bound.backward, call, out, lse, grad_out, None)


def portable(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Callable[[], Any]:
    """The portable backward, whose bits repeat in any case."""
    from fastattn.backends.triton.backward import launch

    bound = launch.bind(Problem.of(call), call)
    return partial(bound.backward, call, out, lse, grad_out, None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("hopper_backward", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="rows whose name contains one of these")
    parser.add_argument("--tune", action="store_true", help="every choice of a schedule, on a grid of lengths")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper_backward: needs a GPU of compute capability 9.0, torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    found: dict[str, Any] = {"benchmark": "hopper backward", "unit": "us", "rows": {}}
    if arguments.tune:
        found["tune"] = {}
    rounds = 5 if arguments.quick else 15
    try:
        (_tune if arguments.tune else _rows)(found, arguments.only.split(","), rounds)
    finally:  # what there is, should a row fail
        found["lengths"] = of_lengths(found["rows"])
        write(arguments.json, "hopper_backward", argv, torch.device("cuda"), found)
    print(f"drawn lengths, hot, to cudnn: {found['lengths']}")
    return 0


def _rows(found: dict[str, Any], only: list[str], rounds: int) -> None:
    begun = time.monotonic()
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    print(f"{'':26}" + "".join(f"{x:>22}" for x in ("ours cold/hot/host", "cudnn", "flash")) + "  to cudnn (hot)")
    for name, (sizes, what) in ROWS.items():
        if not any(text in name for text in only):
            continue
        if time.monotonic() - begun > BUDGET:
            print(f"{name:26} left out: no time")
            found["rows"][name] = None
            continue
        call, same = call_of(sizes, what)
        out, lse = forward_of(call)
        grad_out = torch.randn_like(out)
        runs = {"ours": ours(call, out, lse, grad_out)}
        if name in DETERMINISTIC:
            runs["deterministic"] = deterministic(call, out, lse, grad_out)
        if name in DETERMINISTIC or name in WIDE:
            runs["portable"] = portable(call, out, lse, grad_out)
        if same is not None:
            same_out, same_lse = forward_of(same)
            runs["dense"] = ours(same, same_out, same_lse, torch.randn_like(same_out))
        runs |= {peer: backward for peer, (_, backward) in torchs(_PEERS[1:], call, grad_out).items()}
        found["rows"][name] = measure(runs, flush, rounds, ("ours",))
        print(line_of(name, found["rows"][name]), flush=True)
        del call, out, lse, grad_out, runs


def line_of(name: str, row: dict[str, dict[str, float]]) -> str:
    """A row of the table that is printed."""
    cells = ["/".join(f"{x:.0f}" for x in row[peer].values()) if peer in row else "-" for peer in _PEERS]
    best = row.get("cudnn", {}).get("hot", float("nan"))
    others = "".join(f", {x} {row[x]['hot']:.0f}" for x in ("dense", "deterministic", "portable") if x in row)
    return f"{name:26}{''.join(f'{cell:>22}' for cell in cells)}  {row['ours']['hot'] / best:.2f}{others}"


_PEERS = ("ours", "cudnn", "flash")


def _tune(found: dict[str, Any], only: list[str], rounds: int) -> None:
    from fastattn.backends.triton.hopper_backward import launch, schedule

    begun = time.monotonic()
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    for batch, heads, kv_heads, n in GRID:
        name = f"B{batch} {heads}/{kv_heads} {n}"
        if not any(text in name for text in only):
            continue
        if time.monotonic() - begun > TUNE_BUDGET:
            print(f"{name:26} left out: no time")
            found["tune"][name] = None
            continue
        call, _ = call_of((batch, heads, kv_heads, n, n, 128), {"causal": True})
        out, lse = forward_of(call)
        grad_out = torch.randn_like(out)
        s = launch.sizes(Problem.of(call), torch.cuda.get_device_properties(0).multi_processor_count)
        own = schedule.choose(s)
        runs = {"own": ours(call, out, lse, grad_out)}
        for choice in schedule.candidates(s, schedule.splits(s)):
            with schedule.forced(*choice):
                runs[" ".join(str(x) for x in choice)] = ours(call, out, lse, grad_out)
        times = {x: y["hot"] for x, y in measure(runs, flush, max(3, rounds // 3), runs).items()}
        estimates = {" ".join(str(x) for x in c): round(schedule.estimate(s, c), 1) for c in
                     schedule.candidates(s, schedule.splits(s))}  # fmt: skip
        found["tune"][name] = {"choice": list(own), "hot": times, "estimates": estimates}
        best = min(times, key=lambda x: times[x])
        ratio = times["own"] / times[best]
        print(f"{name:20} own {tuple(own)!s:12} {times['own']:.0f}, best {best}: {times[best]:.0f} ({ratio:.2f})")
        del call, out, lse, grad_out, runs


if __name__ == "__main__":
    end(main)
