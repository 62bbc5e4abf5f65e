"""Runs jobs in processes of their own, side by side on several GPUs, within a limit of time.

A job writes its result beside its log; only what a job that ended well has written goes to the folder of results, so
that there is never half a file, or one of another commit, in it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fastattn.bench import output, results
from fastattn.common import machine

from .jobs import ELSEWHERE, Job, ordered

ROOT = Path(__file__).parents[2]
PATIENCE = 3.0  #: a job may take so many times its seconds: on a fresh machine it compiles
GRACE = 5.0  #: seconds from SIGTERM to SIGKILL
POLL = 0.1  #: seconds
LAST_LINES, LAST_BYTES = 5, 4096  #: of the log of a job that failed
MADE, FAILED, SKIPPED = "made", "failed", "skipped"


@dataclass(frozen=True)
class Settings:
    """How jobs are run."""

    out: Path  #: where result files go
    logs: Path  #: where the output goes, and the results of jobs that failed: NAME.log, NAME.json.part
    place: str  #: the folder that result files name in their commands
    commit: str  #: that all of them are of
    gpus: tuple[str, ...] = ("0",)  #: as CUDA_VISIBLE_DEVICES names them
    seconds: float | None = None  #: for all jobs; None: no limit
    python: str | None = None  #: the interpreter of an environment with mlx and mlx-lm


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    state: str  #: MADE, FAILED or SKIPPED
    why: str = ""  #: why not; of one that was made, what it left out
    seconds: float = 0.0

    def __str__(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.job.name}: {self.state}{took}{': ' if self.why else ''}{self.why}"


def obstacle(job: Job, settings: Settings) -> str:
    """Why a job cannot be run here, "" where it can."""
    absent = [package for package in job.needs if machine.version_of(package) is None]
    if absent:
        return f"{', '.join(absent)}: not installed"
    if job.elsewhere and settings.python is None:
        return f"needs an environment with mlx and mlx-lm: --mlx-python {ELSEWHERE}"
    if job.gpus > len(settings.gpus):
        return f"needs {job.gpus} GPUs, --gpus names {len(settings.gpus)}"
    return ""


def commit_of(file: Path) -> str | None:
    """The commit that a result file is of; None where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["environment"]["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def run(jobs: Iterable[Job], settings: Settings, say: Callable[[str], None]) -> list[Outcome]:
    """Runs the jobs and says what becomes of each. Returns that, in the order in which it came.

    A quiet job runs alone. No job is begun whose seconds are more than what is left of the limit. One that takes
    `PATIENCE` times its seconds is ended, and so are all at the limit, which takes up to `GRACE` seconds more.
    """
    end = float("inf") if settings.seconds is None else time.monotonic() + settings.seconds
    waiting, outcomes = ordered(jobs), []
    running: list[_Running] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        say(str(outcome))

    for job in list(waiting):
        if why := obstacle(job, settings):
            waiting.remove(job)
            done(Outcome(job, SKIPPED, why))
    try:
        while waiting or running:
            for one in list(running):
                if (outcome := one.look(time.monotonic())) is not None:
                    running.remove(one)
                    done(outcome)
            for job in list(waiting):
                free = [gpu for gpu in settings.gpus if not any(gpu in one.gpus for one in running)]
                left = end - time.monotonic()
                if job.seconds > left:  # less is left later
                    waiting.remove(job)
                    done(Outcome(job, SKIPPED, f"no time: it takes {job.seconds:.0f} s, {max(left, 0):.0f} are left"))
                elif job.gpus <= len(free) and not (running and (job.quiet or running[0].job.quiet)):
                    waiting.remove(job)
                    gpus = free[: job.gpus]
                    say(f"{job.name}: begins on GPU {','.join(gpus)}, about {job.seconds:.0f} s")
                    try:
                        running.append(_Running(job, gpus, settings, end))
                    except OSError as error:
                        done(Outcome(job, FAILED, f"it cannot be started: {error}"))
            time.sleep(POLL)
    finally:  # Ctrl-C, SIGTERM: nothing is left behind
        try:
            for one in running:
                one.signal(signal.SIGTERM)
            stop = time.monotonic() + GRACE
            while any(one.process.poll() is None for one in running) and time.monotonic() < stop:
                time.sleep(POLL)
        finally:  # Ctrl-C once more: at once
            for one in running:
                one.signal(signal.SIGKILL)
            for one in running:
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(GRACE)
    return outcomes


@dataclass
class _Running:
    """A job that has begun, in a process group of its own."""

    job: Job
    gpus: Sequence[str]
    settings: Settings
    end: float  #: of all jobs
    begun: float = field(default_factory=time.monotonic)
    cut: str = ""  #: why it is being ended
    killed_at: float = float("inf")

    def __post_init__(self) -> None:
        self.log, self.part = (self.settings.logs / f"{self.job.name}{end}" for end in (".log", ".json.part"))
        self.part.unlink(missing_ok=True)
        argv = self.job.argv(str(self.part), self.settings.python)
        own = {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            results.COMMIT: self.settings.commit,
            results.COMMAND: self.job.typed(self.settings.place),
        }
        with self.log.open("w", encoding="utf-8") as log:
            _print_head(log, argv, {**own, **dict(self.job.environment)})
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**os.environ, **own, **dict(self.job.environment)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def look(self, now: float) -> Outcome | None:
        """What became of it, once it has ended. Ends it where it takes too long."""
        status = self.process.poll()
        if status is not None:
            self.signal(signal.SIGKILL)  # what it has left behind
            state, why = self._result(status)
            return Outcome(self.job, state, why, now - self.begun)
        longest = PATIENCE * self.job.seconds
        if not self.cut and (now >= self.end or now - self.begun >= longest):
            self.cut = "ended: the time is up" if now >= self.end else f"ended: it took more than {longest:.0f} s"
            self.killed_at = now + GRACE
            self.signal(signal.SIGTERM)
        if now >= self.killed_at:
            self.signal(signal.SIGKILL)
        return None

    def signal(self, number: int) -> None:
        """To all of its processes."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _result(self, status: int) -> tuple[str, str]:
        """Takes over what it has written: (state, why)."""
        if self.cut:
            return FAILED, f"{self.cut}, see {self.log}"
        if status:
            return FAILED, f"exit status {status}, see {self.log}\n{_last_lines(self.log)}"
        try:
            data = json.loads(self.part.read_text(encoding="utf-8"))
            commit = data["environment"]["commit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return FAILED, f"it wrote no result file: {type(error).__name__}: {error}"
        if commit != self.settings.commit:
            return FAILED, f"its result file is of commit {commit}, not of {self.settings.commit}: {self.part}"
        try:
            output.write(self.settings.out / f"{self.job.name}.json", self.part.read_bytes())
            self.part.unlink()
        except OSError as error:
            return FAILED, f"its result file cannot be taken over: {error}"
        left_out = left_out_of(data)
        return MADE, f"left out: {', '.join(left_out)}" if left_out else ""


def left_out_of(data: dict[str, Any]) -> list[str]:
    """What a result file names as left out, for lack of time or of a package: rows of `sweep users`, models of
    `benchmarks.drop_in`, cases of `benchmarks.host`."""
    found = [str(name) for name in data.get("left_out") or ()]
    rows = data.get("rows")
    named = rows.items() if isinstance(rows, dict) else ()
    return found + [name for name, row in named if isinstance(row, dict) and "left_out" in row]


def _print_head(log: TextIO, argv: Sequence[str], variables: dict[str, str]) -> None:
    """What is run, as a line for a shell."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    print(f"$ {settings} {shlex.join(argv)}", file=log, flush=True)


def _last_lines(log: Path) -> str:
    """Of a log, indented."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
