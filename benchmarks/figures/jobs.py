"""The table of result files: which command makes each, and what it needs.

Not in it: what `benchmarks.tune`, `tune_chunks` and `hopper_backward --tune` write. Constants in the code are chosen by
these files, and stay what they are until somebody measures again: they belong to the commit of their choice. Nor what
is kept of an H100 alone (`fastattn sweep decode` and `backward`, `benchmarks.plans`, `benchmarks.profile_model`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

WAIT = (("FASTATTN_COMPILE", "wait"),)  #: calls wait for their kernels: nothing else is to be measured
ELSEWHERE = "PYTHON"  #: in a command: the interpreter of an environment that has mlx and mlx-lm
PROGRAMS = {
    "fastattn": (sys.executable, "-m", "fastattn"),
    "python": (sys.executable,),
    # --standalone: a port of its own, so that two of them may run on one machine
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone"),
}


@dataclass(frozen=True)
class Job:
    """One result file."""

    name: str  #: the file's, without .json
    command: str  #: as a person types it, without --json FILE
    seconds: float  #: on one H200 (or as many as it needs), all kernels on disk, the start of Python included
    #: Whether `seconds` is what the kept file says itself (the times of its rows or of the run, and 20 seconds for the
    #: start); else it is an estimate, by the dates of files that one run wrote one after another, rounded up.
    recorded: bool = False
    quiet: bool = False  #: it measures times of the host: nothing may run beside it
    gpus: int = 1
    needs: tuple[str, ...] = ()  #: packages that may not be there; without one it is skipped
    environment: tuple[tuple[str, str], ...] = ()  #: variables

    def __post_init__(self) -> None:
        if shlex.split(self.command)[0] not in PROGRAMS:
            raise ValueError(f"{self.name}: expected a command of {', '.join(PROGRAMS)}, got {self.command!r}")

    @property
    def elsewhere(self) -> bool:
        """Whether it runs another environment's interpreter."""
        return ELSEWHERE in shlex.split(self.command)

    def typed(self, folder: str) -> str:
        """The command as result files name it. folder: of the file, as it is kept."""
        return f"{self.command} --json {shlex.quote(f'{folder}/{self.name}.json')}"

    def argv(self, file: str, python: str | None) -> list[str]:
        """What is started. file: the result file. python: see `ELSEWHERE`."""
        program, *rest = shlex.split(self.command)
        words = [python if word == ELSEWHERE and python else word for word in rest]
        return [*PROGRAMS[program], *words, "--json", file]


def _model(name: str, options: str, seconds: float) -> Job:
    return Job(name, f"fastattn benchmark --model {options}", seconds)


def _train(name: str, options: str, seconds: float, *environment: tuple[str, str], needs: tuple[str, ...] = ()) -> Job:
    return Job(name, f"python -m benchmarks.train --model {options}", seconds, needs=needs, environment=environment)


def _dropin(name: str, models: str, seconds: float, recorded: bool = True, needs: tuple[str, ...] = ()) -> Job:
    return Job(name, f"python -m benchmarks.drop_in {models}", seconds, recorded=recorded, needs=needs)


_FLASH_ATTN_4 = (
    "'causal 1000' 'causal 2048' 'causal 8192' 'causal 16384' 'B16 512' 'D64 2048' 'ViT B64' Flux packed 'train 8192' "
    "'train B2 2048'"
)
#: The limits of time (--seconds, --budget) that some of the kept files had are wider here, or not there: with kernels
#: to compile first they would leave rows out, and who runs the jobs has one limit for all.
JOBS = [
    Job("users", "fastattn sweep users --quick --warm --seconds 320", 175, recorded=True, quiet=True),
    Job("users-flash-attn-4", f"fastattn sweep users {_FLASH_ATTN_4} --quick --warm --seconds 150", 85, recorded=True,
        quiet=True, needs=("flash-attn-4",), environment=WAIT),
    Job("host", "python -m benchmarks.host", 75, quiet=True),
    Job("never_seen", "python -m benchmarks.never_seen", 160, recorded=True, quiet=True),  # compiles, whatever is there
    Job("hopper_forward", "python -m benchmarks.hopper_forward --quick", 70, environment=WAIT),
    Job("hopper_backward", "python -m benchmarks.hopper_backward --quick", 115, environment=WAIT),
    Job("hopper_backward-padded", "python -m benchmarks.hopper_backward --quick --only left-padded,packed", 30,
        environment=WAIT),
    Job("hopper_wide", "python -m benchmarks.hopper_wide", 60, environment=WAIT),
    Job("kernels", "python -m benchmarks.kernels", 50, environment=WAIT),
    Job("forward", "python -m benchmarks.forward --rounds 3", 150, environment=WAIT),
    Job("forward-masks", "python -m benchmarks.forward --time --rounds 3 BERT T5 ALiBi 'causal as' refix Swin fp32", 70,
        environment=WAIT),
    Job("backward-own", "python -m benchmarks.backward --time --seconds 240 --rounds 3", 130, environment=WAIT),
    _model("llama-3.1-8b-p2049", "llama-3.1-8b -p 2049 -g 128 -n 2 --fresh-lengths 10 --attn fastattn,sdpa", 75),
    _model("llama-3.1-8b-p32768", "llama-3.1-8b -p 32768 -g 128 -n 2 --attn fastattn,sdpa", 60),
    _model("llama-3.1-8b-p100", "llama-3.1-8b -p 100 -g 128 -n 2 --attn fastattn,sdpa", 40),
    _model("llama-3.1-8b-p8", "llama-3.1-8b -p 8 -g 128 -n 2 --attn fastattn,sdpa", 40),
    _model("llama-3.1-8b-b8", "llama-3.1-8b -b 8 --prompt-lengths 100,4000 -g 128 -n 2 --attn fastattn,sdpa", 75),
    _model("gemma-2-2b-p2049", "gemma-2-2b -p 2049 -g 128 -n 2 --attn fastattn,sdpa,eager", 60),
    _model("gemma-4-p2049", "gemma-4 -p 2049 -g 128 -n 2 --attn fastattn,sdpa,eager", 90),  # never run before
    Job("llama-3.1-8b-p2049-mlx", f"python -m benchmarks.mlx_model -p 2049 -g 32 -n 2 --python {ELSEWHERE}", 65),
    _train("llama-3.2-1b-train-p256", "llama-3.2-1b -p 256 -b 4 -n 16 --attn fastattn,sdpa", 30),
    _train("llama-3.2-1b-train-p2048", "llama-3.2-1b -p 2048 -b 4 -n 8 --attn fastattn,sdpa", 30),
    _train("llama-3.2-1b-train-p2048-liger",
           "llama-3.2-1b -p 2048 -b 4 -n 8 --attn fastattn,sdpa --fused-ops on --fused-loss", 40,
           needs=("liger-kernel",)),
    _train("llama-3.2-1b-train-variable",
           "llama-3.2-1b -b 4 -n 16 --variable-lengths 256,2048 --attn fastattn,sdpa", 35),
    _train("gpt2-train", "gpt2 -p 1024 -b 8 -n 12 --attn fastattn,sdpa", 25),
    _train("gemma-2-2b-train-p2048", "gemma-2-2b -p 2048 -b 1 -n 6 --warmup-steps 3 --attn fastattn,sdpa,eager", 40,
           *WAIT),
    _train("gemma-2-2b-train-p4096", "gemma-2-2b -p 4096 -b 1 -n 5 --warmup-steps 3 --attn fastattn,eager", 35, *WAIT),
    _dropin("dropin", "llama gpt2 sdxl t5-bias-padded bert --quick", 45),
    _dropin("dropin-more", "vit-l-224 vit-l-384 sd3 flux-padded t5-bias whisper t5 llama-fp32 tabpfn --quick", 110,
            recorded=False),
    _dropin("dropin-resolutions", "resolutions --quick", 60, recorded=False),
    _dropin("dropin-diffusers", "sdxl-diffusers --quick", 40, needs=("diffusers",)),
    Job("parallel-2", "torchrun --nproc-per-node 2 -m benchmarks.parallel --graphs --repeats 7 --warmup 3", 90, gpus=2),
    Job("parallel-model-2",
        "torchrun --nproc-per-node 2 -m benchmarks.parallel_model --model llama-3.1-8b -p 262144", 90, gpus=2),
    Job("llama-3.1-8b-tp2",
        "torchrun --nproc-per-node=2 -m fastattn benchmark --tp --model llama-3.1-8b -p 2049 -g 128 -n 2 "
        "--attn fastattn,sdpa", 70, gpus=2),
]  # fmt: skip
#: Kept files whose models are in others' commands now: they go when `dropin-more` is made anew.
SUPERSEDED = "dropin-images", "dropin-others", "dropin-t5"


def chosen(jobs: Iterable[Job], only: Sequence[str], skip: Sequence[str]) -> list[Job]:
    """Those that one of `only` names (all, where it is empty) and none of `skip`: names, or patterns such as `dropin*`.

    Raises ValueError for one that names nothing.
    """
    jobs = list(jobs)
    for option, words in (("--only", only), ("--skip", skip)):
        for word in words:
            if not any(fnmatchcase(job.name, word) for job in jobs):
                raise ValueError(f"{option}: expected names of jobs (--list shows them), got {word!r}")
    return [
        job
        for job in jobs
        if (not only or any(fnmatchcase(job.name, word) for word in only))
        and not any(fnmatchcase(job.name, word) for word in skip)
    ]


def ordered(jobs: Iterable[Job]) -> list[Job]:
    """As they are started: quiet ones first, then those of several GPUs, then the longest."""
    return sorted(jobs, key=lambda job: (not job.quiet, -job.gpus, -job.seconds))
