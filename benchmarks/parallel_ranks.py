"""How `benchmarks.parallel` times what several ranks do together."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.bench import output
from fastattn.lm.parallel import start_group
from fastattn.parallel import ContextParallel
from fastattn.parallel.exchange import Transfer

from .command import parser_of, write


def rank_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command that runs under torchrun: see `under_torchrun`."""
    parser = parser_of(name, description, "torchrun")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda (NCCL) if there is a GPU, else cpu (gloo)")
    parser.add_argument("--timeout", type=int, default=120, metavar="S", help="seconds until a lost rank ends the run")
    return parser


def under_torchrun(
    name: str,
    arguments: argparse.Namespace,
    argv: Sequence[str],
    measure: Callable[[argparse.Namespace, torch.device], dict[str, Any]],
) -> int:
    """The command `torchrun -m benchmarks.NAME`, as one of its ranks. Returns the exit status.

    measure: by all ranks, on a device of each; rank 0 prints what it finds, and its report is kept.
    """
    if "RANK" not in os.environ:
        print(f"{name}: run it under torchrun: torchrun --nproc-per-node N -m benchmarks.{name}", file=sys.stderr)
        return 2
    output.check([arguments.json], inputs=[arguments.model] if getattr(arguments, "model", None) else [])
    if (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    start_group(device, timedelta(seconds=arguments.timeout))
    try:
        report = measure(arguments, device)
    finally:
        dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        program = f"torchrun --nproc-per-node {report['ranks']}"
        write(arguments.json, name, argv, device, {"benchmark": name.replace("_", "-")} | report, program)
    return 0


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    forward: int
    training: int
    decode: tuple[int, ...]
    heads: tuple[int, int]
    dim: int
    probe: int  #: bytes

    @staticmethod
    def on(device: torch.device) -> Sizes:
        if device.type == "cuda":
            return Sizes(131072, 65536, (131072, 1048576), (32, 8), 128, 1 << 27)
        return Sizes(256, 128, (512,), (8, 4), 16, 1 << 16)


def meet(device: torch.device) -> None:
    """Waits for all ranks, the host too."""
    flag = torch.zeros(1, device=device)
    dist.all_reduce(flag)
    flag.item()


class Bench:
    """One run: the rank, its device, and how to time what all ranks do together."""

    def __init__(self, device: torch.device, repeats: int, warmup: int) -> None:
        self.device, self.repeats, self.warmup = device, repeats, warmup
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def meet(self) -> None:
        meet(self.device)

    def together(self, call: Callable[[], Any]) -> float:
        """Seconds of a call that all ranks make: the median of the slowest rank's."""
        samples = []
        for i in range(self.warmup + self.repeats):
            self.meet()
            seconds = self._once(call)
            if i >= self.warmup:
                samples.append(seconds)
        slowest = torch.tensor(samples, dtype=torch.float64).to(self.device, torch.float32)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return statistics.median(slowest.tolist())

    def alone(self, call: Callable[[], Any]) -> float:
        """Seconds of a call that rank 0 makes while the others wait; every rank is told."""
        found = torch.zeros(1, device=self.device)
        if self.rank == 0:
            samples = [self._once(call) for _ in range(self.warmup + self.repeats)][self.warmup :]
            found.fill_(statistics.median(samples))
        self.meet()
        dist.broadcast(found, 0)
        return float(found)

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def random(self, *shape: int, seed: int) -> Tensor:
        """The same on every rank."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def error(self, cp: ContextParallel, found: Tensor, want: Tensor, rows: Tensor) -> float:
        """found: `[B, H, own tokens, D]`; want: `[B, H, rows, D]`, the same on every rank; rows: their positions."""
        own = cp.positions(self.length_of(cp, found), self.device)[0]
        place = torch.searchsorted(own, rows).clamp(max=own.shape[0] - 1)
        mine = own[place] == rows
        difference = (found[:, :, place[mine]].double() - want[:, :, mine].double()).square().sum()
        sums = torch.stack([difference, want[:, :, mine].double().square().sum()]).float()
        dist.all_reduce(sums)
        return float((sums[0] / sums[1]).sqrt())

    def length_of(self, cp: ContextParallel, x: Tensor) -> int:
        count = torch.tensor([x.shape[2]], device=self.device)
        dist.all_reduce(count)
        return int(count)


def link_rate(bench: Bench, probe: int) -> float:
    """Bytes per second that every rank sends to the next, and receives, at once."""
    sent = torch.empty(probe, dtype=torch.uint8, device=bench.device)
    received = torch.empty_like(sent)
    group, size = dist.group.WORLD, bench.size
    assert group is not None
    target, source = (bench.rank + 1) % size, (bench.rank - 1) % size
    seconds = bench.together(lambda: Transfer(sent, target, received, source, group).wait())
    return probe / seconds


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks events meanwhile
        call()
    return graph.replay
