"""All figures that are kept, made anew on the commit that is checked out:

    python -m benchmarks.figures --list
    python -m benchmarks.figures [--only NAME,...] [--skip NAME,...] [--missing] [--gpus 0,1] [--seconds N] [--out DIR]

Each job of the table (`jobs.py`) is a command that writes one result file. Those that measure times of the host run
first, each alone; the others side by side, one on each GPU. A job that fails is named, with the end of its log, and the
others go on. Where the time is limited, call it again with `--missing`: it goes on with the files that are not of this
commit. All of them name one commit, the one at the beginning: files in benchmarks/results may have changed, what else
is tracked may not (without --dirty). Commands name the folder where results are kept, wherever --out is.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastattn.bench import results
from fastattn.cli.arguments import path_of
from fastattn.common import machine
from fastattn.common.printable import printable

from ..command import end
from .jobs import JOBS, Job, chosen, ordered
from .running import FAILED, MADE, ROOT, SKIPPED, Outcome, Settings, commit_of, run

KEPT = "benchmarks/results"


def main(argv: Sequence[str] | None = None, jobs: Sequence[Job] = JOBS) -> int:
    """The command. Returns 0, or 1 where a job failed or was ended. Raises ValueError for bad arguments, and for a tree
    that is not as some commit left it."""
    asked = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    if asked.seconds is not None and not 0 < asked.seconds < math.inf:
        raise ValueError(f"--seconds: expected a number of seconds over 0, got {asked.seconds}")
    if len(set(asked.gpus)) < len(asked.gpus):
        raise ValueError(f"--gpus: expected each GPU once, got {','.join(asked.gpus)}")
    wanted = ordered(chosen(jobs, asked.only, asked.skip))
    folder = folder_of(machine.ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"))
    outcomes: list[Outcome] = []
    if asked.list and not asked.missing:
        print(listing(wanted, len(asked.gpus)))
        return 0
    if folder is None and asked.out is None:
        raise ValueError(f"--out: expected a folder, nvidia-smi finds no GPU whose folder in {KEPT} it could be")
    out = (asked.out or ROOT / KEPT / str(folder)).resolve()
    commit = commit_here(asked.dirty)
    if asked.missing:
        there = [job for job in wanted if commit_of(out / f"{job.name}.json") == commit]
        outcomes = [Outcome(job, SKIPPED, "its file is of this commit") for job in there]
        wanted = [job for job in wanted if job not in there]
    if asked.list:
        print(listing(wanted, len(asked.gpus)))
        return 0
    logs = (asked.logs or out.parent / "logs").resolve()
    for path in (out, logs):
        path.mkdir(parents=True, exist_ok=True)
    place = str(out) if folder is None else f"{KEPT}/{folder}"
    settings = Settings(out, logs, place, commit, asked.gpus, asked.seconds, asked.mlx_python)
    say: Callable[[str], None] = partial(print, flush=True)
    say(printable(f"{len(wanted)} jobs at {commit}, results in {out}, logs in {logs}"))
    outcomes += run(wanted, settings, lambda text: say("\n".join(map(printable, text.splitlines()))))
    print(f"\n{summary(outcomes)}")
    return int(any(outcome.state == FAILED for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the table of jobs and run nothing")
    add("--only", type=words, default=(), metavar="NAME,...", help="these jobs; dropin* for all such names")
    add("--skip", type=words, default=(), metavar="NAME,...", help="not these")
    add("--missing", action="store_true", help="only those whose file is not of this commit")
    add("--gpus", type=words, default=("0",), metavar="N,...", help="as CUDA_VISIBLE_DEVICES names them (default: 0)")
    text = "no job is begun that takes more than what is left, and all are ended then; killing one takes 5 more"
    add("--seconds", type=float, metavar="N", help=text)
    add("--out", type=folder_in, metavar="DIR", help=f"where result files go (default: {KEPT}/<the GPU's folder>)")
    add("--logs", type=folder_in, metavar="DIR", help="where the jobs' output goes (default: DIR/../logs)")
    text = "the interpreter of an environment with mlx and mlx-lm (without: its job is skipped)"
    add("--mlx-python", type=path_of, metavar="PYTHON", help=text)
    add("--dirty", action="store_true", help="with changes that are not committed, too: files then say -dirty")
    return parser


def words(text: str) -> tuple[str, ...]:
    """An argparse type: words separated by commas."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def folder_in(text: str) -> Path:
    """An argparse type: a folder, which need not be there yet."""
    return Path(path_of(text))


def folder_of(gpu: str | None) -> str | None:
    """The folder in benchmarks/results of a GPU's figures: "NVIDIA H100 80GB HBM3" -> "h100". None without a GPU."""
    found = re.search(r"\b[A-Z]*\d+\w*", (gpu or "").removeprefix("NVIDIA "))
    return found[0].lower() if found else None


def commit_here(dirty: bool) -> str:
    """The commit that all files are to name: FASTATTN_COMMIT, or git's. Raises ValueError where there is none, or,
    unless dirty, where tracked files other than results are not as in it."""
    named = os.environ.get(results.COMMIT)
    found = named or machine.ask("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not found:
        raise ValueError(f"expected a git checkout, or its commit in {results.COMMIT}")
    changes = [] if named else changed()
    if changes:
        found += "-dirty"
    if found.endswith("-dirty") and not dirty:
        what = f" ({', '.join(changes[:5])})" if changes else ""
        raise ValueError(f"expected a tree without changes{what}: commit them, or allow them with --dirty")
    return found


def changed() -> list[str]:
    """Tracked files that are not as in the commit; those of results aside, which this command writes."""
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "HEAD", "--", ".", f":(exclude){KEPT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git says: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
    return done.stdout.splitlines()


def listing(jobs: Sequence[Job], gpus: int) -> str:
    """The table, in the order in which jobs are begun, and the seconds of all of them."""
    rows = []
    for job in jobs:
        variables = [f"{name}={value}" for name, value in job.environment]
        seconds = f"{job.seconds:.0f}" if job.recorded else f"~{job.seconds:.0f}"
        needs = ", ".join([*job.needs, *(["mlx"] if job.elsewhere else [])])
        rows.append([job.name, seconds, str(job.gpus), "quiet" if job.quiet else "", needs, " ".join(variables)])
        rows[-1].append(job.command)
    alone = sum(job.seconds for job in jobs if job.quiet or job.gpus > 1)
    beside = sum(job.seconds for job in jobs) - alone
    head = ("job", "seconds", "GPUs", "", "needs", "environment", "command")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in (head, *rows)]
    total = alone + beside / gpus
    lines.append(f"{len(jobs)} jobs, about {total:.0f} s on {gpus} GPU{'s' * (gpus > 1)} (~: an estimate)")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line for each job: what became of it, how long it took, and why it is not there."""
    states = [MADE, FAILED, SKIPPED]
    rows = [
        (x.job.name, x.state, f"{x.seconds:.0f} s" if x.seconds else "-", (x.why.splitlines() or [""])[0])
        for x in sorted(outcomes, key=lambda x: states.index(x.state))
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        printable(f"{name:{widths[0]}}  {state:{widths[1]}}  {took:>{widths[2]}}  {why}".rstrip())
        for name, state, took, why in rows
    ]
    counts = ", ".join(f"{sum(x.state == state for x in outcomes)} {state}" for state in states)
    return "\n".join([*lines, counts])


if __name__ == "__main__":
    end(main)
