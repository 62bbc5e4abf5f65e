"""Context parallel attention against one GPU doing all of it. Run under torchrun:

    torchrun --nproc-per-node 8 -m benchmarks.parallel --json FILE

A causal forward, a forward and backward, and decode against a sharded cache: every strategy and "auto", each beside
the whole on rank 0 in the same run, the cost model's prediction, and the error against rank 0's result. Without GPUs it
runs tiny sizes on gloo, to try the command out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.api import scaled_dot_product_attention
from fastattn.parallel import ContextParallel, cost
from fastattn.parallel.exchange import Transfer

from .command import captured, end
from .parallel_report import markdown, paper, show, show_decode
from .ranks import Bench, rank_parser, relative_error, under_torchrun
from .report.reading import load, reading

METHOD = {
    "times": "per iteration: all ranks meet at a barrier, then the time until the slowest rank is done (CUDA events "
    "around the call on each rank; the clock on a CPU); the median of the iterations",
    "one": "rank 0 computes the whole sequence by itself while the other ranks wait at a barrier",
    "error": "norm of the difference from rank 0's result over its norm, on a random subset of rows",
    "decode": "calls in a row, the time of all over their number: what the host costs is part of it; 'graph' rows "
    "replay a CUDA graph of one call",
    "prediction": "fastattn.parallel.predict with this run's rates: those of the attention kernels from rank 0's "
    "whole, that of the link from a shift of --probe-bytes by one rank",
}
ROWS = 512  #: compared with one GPU's result


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    forward: int = 131072
    training: int = 65536
    decode: tuple[int, ...] = (131072, 1048576)
    heads: tuple[int, int] = (32, 8)
    dim: int = 128
    probe: int = 1 << 27  #: bytes


TINY = Sizes(256, 128, (512,), (8, 4), 16, 1 << 16)


def prefill(bench: Bench, sizes: Sizes, length: int, backward: bool, link: float | None) -> dict[str, Any]:
    """One section: the whole on rank 0, then every strategy."""
    (q_heads, kv_heads), dim = sizes.heads, sizes.dim
    heads = (q_heads, kv_heads, kv_heads)
    whole = [bench.random(1, h, length, dim, seed=i).requires_grad_(backward) for i, h in enumerate(heads)]
    grad = bench.random(1, q_heads, length, dim, seed=3)
    rows = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values.to(bench.device)
    names = ("out", "dq", "dk", "dv") if backward else ("out",)

    def run(attend: Callable[[], Any], inputs: Sequence[Tensor], do: Tensor) -> list[Tensor]:
        out = attend()
        return [out.detach(), *torch.autograd.grad(out, inputs, do)] if backward else [out]

    def alone() -> list[Tensor]:
        return run(lambda: scaled_dot_product_attention(*whole, mask="causal"), whole, grad)

    one = bench.alone(alone)
    want = [torch.empty(1, h, len(rows), dim, dtype=bench.dtype, device=bench.device) for h in (q_heads, *heads)]
    if bench.rank == 0:
        want = [x[:, :, rows].contiguous() for x in alone()]
    for x in want[: len(names)]:
        dist.broadcast(x, 0)

    shape: dict[str, Any] = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
    work = cost.Work.of(length, bench.size, itemsize=bench.dtype.itemsize, backward=backward, **shape)
    hardware = cost.HOPPER if link is None else replace(cost.HOPPER, link=link)
    scale = cost.single(work, hardware) / one  # the default rates with those that this run has shown
    hardware = replace(hardware, flops=hardware.flops * scale, backward_flops=hardware.backward_flops * scale)
    found: dict[str, Any] = {"length": length, "backward": backward, **shape}
    found |= {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "one_ms": one * 1e3,
        "one_tflops": work.flops * (1 + cost.BACKWARD * backward) / one / 1e12,
        "rates": asdict(hardware),
        "rows": [],
    }
    for strategy in (*cost.STRATEGIES, "auto"):
        cp = ContextParallel(strategy=strategy, hardware=hardware)
        try:
            local = [cp.shard(x.detach(), 2).requires_grad_(backward) for x in whole]
            chosen = cp.chosen(*local, length=length, mask="causal")
            attend = partial(cp.attention, *local, length=length, mask="causal")
            call = partial(run, attend, local, cp.shard(grad, 2))
            positions = cp.positions(length, bench.device)[0]
            errors = {name: error(x, y, positions, rows) for name, x, y in zip(names, call(), want)}
            seconds = bench.together(call)
        except ValueError as refusal:  # heads that do not divide: the same on every rank, before anything is sent
            found["rows"].append({"strategy": strategy, "refusal": str(refusal)})
            continue
        predicted = cost.predict(work, bench.size, chosen, hardware, cp.ranks_per_host)
        row = {"strategy": strategy, "chosen": chosen, "ms": seconds * 1e3, "speedup": one / seconds}
        row |= {"predicted_ms": predicted.total * 1e3, "prediction": asdict(predicted), "errors": errors}
        found["rows"].append(row)
    return found


def error(found: Tensor, want: Tensor, own: Tensor, rows: Tensor) -> float:
    """found: `[B, H, own tokens, D]`, own: their positions; want: `[B, H, rows, D]`, the same on every rank."""
    place = torch.searchsorted(own, rows).clamp(max=own.shape[0] - 1)
    mine = own[place] == rows
    difference = (found[:, :, place[mine]].double() - want[:, :, mine].double()).square().sum()
    sums = torch.stack([difference, want[:, :, mine].double().square().sum()]).float()
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def decode(bench: Bench, sizes: Sizes, length: int, graphs: bool, calls: int) -> dict[str, Any]:
    """One token against a long cache, whole on rank 0 and in shares on all ranks."""
    q_heads, kv_heads = sizes.heads
    q, cp = bench.random(1, q_heads, 1, sizes.dim, seed=0), ContextParallel()

    def cache(seed: int) -> Tensor:
        return bench.random(1, kv_heads, length, sizes.dim, seed=seed)

    whole = [cache(1), cache(2)] if bench.rank == 0 else []
    shares = [cp.shard(cache(i), 2) for i in (1, 2)]  # one after the other: only rank 0 needs both whole at a time
    lengths = torch.tensor([cp.layout(length).size(bench.rank)], dtype=torch.int32, device=bench.device)

    def one() -> Any:
        return scaled_dot_product_attention(q, *whole)

    def all_ranks() -> Any:
        return cp.decode(q, *shares, kv_lengths=lengths)

    def many(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    with torch.inference_mode():
        out, off = all_ranks(), torch.zeros(1, device=bench.device)
        if bench.rank == 0:
            off += relative_error(out, one())
        dist.broadcast(off, 0)
        found: dict[str, Any] = {"length": length, "calls": calls, "error": float(off)}
        found["one_us"] = bench.alone(many(one)) / calls * 1e6
        found["us"] = bench.together(many(all_ranks)) / calls * 1e6
        if graphs and bench.device.type == "cuda":
            replay = captured(one) if bench.rank == 0 else one
            found["graph_one_us"] = bench.alone(many(replay)) / calls * 1e6
            found["graph_us"] = bench.together(many(captured(all_ranks))) / calls * 1e6
    return found


def link_rate(bench: Bench, probe: int) -> float:
    """Bytes per second that every rank sends to the next, and receives, at once."""
    sent = torch.empty(probe, dtype=torch.uint8, device=bench.device)
    received = torch.empty_like(sent)
    group, size = dist.group.WORLD, bench.size
    assert group is not None
    target, source = (bench.rank + 1) % size, (bench.rank - 1) % size
    return probe / bench.together(lambda: Transfer(sent, target, received, source, group).wait())


def _parser() -> argparse.ArgumentParser:
    parser = rank_parser("parallel", __doc__)
    parser.add_argument("--tokens", type=int, metavar="N", help="of the forward (131072)")
    parser.add_argument("--training-tokens", type=int, metavar="N", help="of the forward and backward (65536)")
    parser.add_argument("--repeats", type=int, default=10, help="iterations that count (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="iterations before them (%(default)s)")
    parser.add_argument("--calls", type=int, default=50, help="decode calls per iteration (%(default)s)")
    parser.add_argument("--graphs", action="store_true", help="decode in CUDA graphs as well")
    parser.add_argument("--markdown", metavar="FILE", help="print a result file's table and measure nothing")
    parser.add_argument(
        "--paper", action="store_true", help="print what the model predicts for 64 GPUs; measure nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    if arguments.markdown:
        found = load(arguments.markdown)
        with reading(arguments.markdown):
            text = markdown(found)
        print(text)
        return 0
    if arguments.paper:
        print(paper())
        return 0
    return under_torchrun("parallel", arguments, argv, measure)


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All sections; rank 0 prints each when it is there."""
    bench, sizes = Bench(device, arguments.repeats, arguments.warmup), Sizes() if device.type == "cuda" else TINY
    forward, training = arguments.tokens or sizes.forward, arguments.training_tokens or sizes.training
    link = link_rate(bench, sizes.probe) if bench.size > 1 else None
    report: dict[str, Any] = {"ranks": bench.size, "method": METHOD, "link_bytes_per_second": link}
    report |= {"nccl_nvls_enable": os.environ.get("NCCL_NVLS_ENABLE"), "sections": [], "decode": []}

    def say(text: str) -> None:
        if bench.rank == 0:
            print(f"\n{text}", flush=True)

    say(f"{bench.size} ranks on {device.type}" + (f", {link / 1e9:.1f} GB/s to the next rank" if link else ""))
    for length, backward in ((forward, False), (training, True)):
        report["sections"].append(prefill(bench, sizes, length, backward, link))
        say(show(report["sections"][-1], bench.size))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["decode"] = [decode(bench, sizes, n, arguments.graphs, arguments.calls) for n in sizes.decode]
    say(show_decode(report["decode"]))
    return report


if __name__ == "__main__":
    end(main)
