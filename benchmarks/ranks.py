"""What the commands under torchrun share: their ranks, and how what several ranks do together is timed."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.bench import output
from fastattn.lm.parallel import start_group

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
    device = torch.device("cpu")
    if (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    else:
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


def meet(device: torch.device) -> None:
    """Waits for all ranks, the host too."""
    flag = torch.zeros(1, device=device)
    dist.all_reduce(flag)
    flag.item()


def relative_error(found: Tensor, want: Tensor) -> Tensor:
    """Norm of the difference over the norm."""
    return (found.double() - want.double()).norm() / want.double().norm()


class Bench:
    """One run: the rank, its device, and how to time what all ranks do together."""

    def __init__(self, device: torch.device, repeats: int, warmup: int) -> None:
        self.device, self.repeats, self.warmup = device, repeats, warmup
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def together(self, call: Callable[[], Any]) -> float:
        """Seconds of a call that all ranks make: the median of the slowest rank's."""
        samples = []
        for _ in range(self.warmup + self.repeats):
            meet(self.device)
            samples.append(self._once(call))
        slowest = torch.tensor(samples[self.warmup :], dtype=torch.float32, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return statistics.median(slowest.tolist())

    def alone(self, call: Callable[[], Any]) -> float:
        """Seconds of a call that rank 0 makes while the others wait; every rank is told."""
        found = torch.zeros(1, device=self.device)
        if self.rank == 0:
            samples = [self._once(call) for _ in range(self.warmup + self.repeats)][self.warmup :]
            found.fill_(statistics.median(samples))
        meet(self.device)
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
