"""Where the time of a model's prefill and of its decode step goes, kernel by kernel:

    python -m benchmarks.profile_model --model llama-3.1-8b -p 2048 --json FILE

once for the engine's runner, its decode step in a CUDA graph, and once for transformers' loop with "sdpa". Kernels are
grouped by what they do. Times of kernels come from torch's profiler; "measured" is the same work without it. In the
engine's decode step kernels overlap (one loads its weight while the one before it still runs), so that their times add
up to more than the step takes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.bench import output
from fastattn.bench.loaded import clock, identity
from fastattn.cli.arguments import add_trust_remote_code
from fastattn.common.table import table
from fastattn.lm import Loaded, load, set_attention
from fastattn.lm.generation.decode_step import DecodeStep
from fastattn.lm.generation.greedy import generate_tokens
from fastattn.lm.runners.select import make_runner

from . import command
from .turns import kernel_times

#: What a kernel does -> parts of the names of those that do it; the first group that fits counts.
GROUPS: dict[str, tuple[str, ...]] = {
    "GEMMs": ("nvjet", "gemm", "gemv", "cutlass", "splitkreduce", "cublas"),
    "attention": (
        "attend_kernel",
        "combine_kernel",
        "combine_wide_kernel",
        "offsets_kernel",
        "sdpa",
        "flash",
        "fmha",
        "cudnn",
    ),
    "norms": ("layer_norm", "rms_norm", "reduce_kernel"),
    "positions and cache": ("rotary_kernel", "catarray", "sin", "cos"),
    "gate": ("gate_kernel", "silu"),
    "rest": ("",),
}
RUNS = 5  #: of which the median counts


def group_of(kernel: str) -> str:
    """See `GROUPS`."""
    name = kernel.lower()
    return next(group for group, parts in GROUPS.items() if any(part in name for part in parts))


def kernels_of(work: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The kernels that some work runs, the longest first: name, group, how many, microseconds of all of them. None on a
    CPU, which has no kernels to tell apart."""
    if device.type != "cuda":
        return []
    rows = [
        {"kernel": name, "group": group_of(name), "count": len(times), "us": sum(times)}
        for name, times in kernel_times(work).items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def measure(name: str, work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The median time of some work, and its kernels. Runs it once before."""
    work()
    times = []
    for _ in range(RUNS):
        begin = clock(device)
        work()
        times.append(clock(device) - begin)
    kernels = kernels_of(work, device)
    groups = {group: sum(row["us"] for row in kernels if row["group"] == group) for group in GROUPS}
    return {"name": name, "measured_us": statistics.median(times) * 1e6, "groups_us": groups, "kernels": kernels}


def profile_engine(loaded: Loaded, prompt: int) -> list[dict[str, Any]]:
    """The runner that the engine would take: a prompt, and a captured decode step after it."""
    device = loaded.model.device
    runner = make_runner(loaded, 1, prompt + 256)
    ids = torch.randint(loaded.config.vocab_size, (prompt,), device=device)
    step = DecodeStep(runner)
    step.prepare(1)

    def prefill() -> None:
        runner.clear(0)
        runner.prefill(0, ids)

    found = [measure("engine: prefill", prefill, device)]
    prefill()
    return [*found, measure("engine: decode step", lambda: step(1), device)]


def profile_loop(loaded: Loaded, prompt: int) -> list[dict[str, Any]]:
    """transformers' model in a plain loop."""
    device = loaded.model.device
    ids = torch.randint(loaded.config.vocab_size, (1, prompt), device=device)
    tokens = generate_tokens(loaded.model, ids)
    next(tokens)
    prefill = measure("sdpa: prefill", lambda: next(generate_tokens(loaded.model, ids)), device)
    return [prefill, measure("sdpa: decode step", lambda: next(tokens), device)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.parser_of("profile_model", __doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset or a model directory (%(default)s)")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=2048, metavar="N", help="(%(default)s)")
    add_trust_remote_code(parser)
    arguments = parser.parse_args(argv)
    output.check([arguments.json], inputs=[arguments.model])
    loaded = load(arguments.model, "fastattn", trust_remote_code=arguments.trust_remote_code)
    rows = profile_engine(loaded, arguments.prompt_tokens)
    set_attention(loaded.model, "sdpa")
    rows += profile_loop(loaded, arguments.prompt_tokens)
    head = ("us", "measured", *GROUPS)
    print(
        table(head, [[r["name"], *(f"{us:.0f}" for us in (r["measured_us"], *r["groups_us"].values()))] for r in rows])
    )
    found = {"model": identity(loaded), "rows": rows}
    command.write(arguments.json, "profile_model", argv, loaded.model.device, found)
    return 0


if __name__ == "__main__":
    command.end(main)
