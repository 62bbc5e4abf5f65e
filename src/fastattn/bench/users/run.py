"""Runs the list of calls: rows go to processes of their own, what these find is kept and written as it comes in."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from .. import results
from . import contenders, summary
from .calls import Row
from .worker import MARK

ROW_SECONDS = {"check": 240.0, "time": 90.0}  #: after which a row's process is ended; the first calls compile
LOOK_SECONDS = 0.5  #: between two looks whether the run is cut
START_SECONDS = 120.0  #: of a process
WARM_SECONDS = 600.0  #: of the process that compiles first
FEW = 24  #: rows of a process that takes times: it starts for some seconds
MOST_PROCESSES = 12  #: that compile and compare at a time
ROUNDS, QUICK_ROUNDS = 9, 5
METHOD = {
    "inputs": "standard normal, token-major (decode: a cache's layout); as many sets in turn as exceed the L2 cache, "
    "64 at the most",
    "us": "GPU time of a call in a CUDA graph of many (on a CPU: the time that passes), median of the rounds, peers in "
    "turns; quarters_us: their quartiles",
    "eager": "the time that passes for a call as Python makes it, over many calls and one wait",
    "host": "the part of it until the host has launched the call",
    "error": "norm of the difference over norm, against attention in float64; gradient_error: the largest of the "
    "gradients'",
    "fastattn": "what dispatch picks, with the static plan where cuDNN serves; fastattn-dynamic: with the dynamic "
    "plan, where that differs",
    "peers": "torch: whatever kernel it picks. torch-efficient: K and V are repeated for its heads within the call. "
    "torch-varlen: torch.nn.attention.varlen. torch-plain: tensor operations, where torch's function cannot do it. "
    "torch-flash with sinks: its kernel, and the sinks applied through the log-sum-exp. "
    "flex: flex_attention under torch.compile, its block mask made before. "
    "flash-attn, flash-attn-4, flashinfer, xformers: where installed. "
    "mlx: where installed, in a process of its own, the time that passes over many calls",
    "training": "forward and backward of q, k and v (and of the mask where models learn it)",
    "ratio": "fastattn's time over that of the quickest peer that is right; ratio: in CUDA graphs, eager_ratio: as "
    "Python calls it",
}


@dataclass(frozen=True)
class Settings:
    """How the list is run."""

    device: torch.device
    quick: bool = False  #: fewer rounds
    check: bool = False  #: nothing is timed
    flex: bool = False  #: flex attention takes part: it compiles for seconds a row
    absent: tuple[str, ...] = ()  #: NAME=REASON of packages that could not be installed
    seconds: float | None = None  #: rows that would begin later are left out
    warm: bool = False  #: all kernels are compiled first, on all cores


def run(rows: Sequence[Row], settings: Settings, command: str, path: str | None) -> tuple[dict[str, Any], bool]:
    """Measures rows and prints each. Returns the result file's content, and whether fastattn failed in a row.

    path: where the result is written after each row, so that a run that is cut keeps what it has; None: nowhere.
    """
    begun = time.monotonic()
    reasons = dict(text.split("=", 1) for text in settings.absent)
    packages = contenders.versions()
    found = results.header("sweep users", command, settings.device) | {
        "arguments": {"quick": settings.quick, "check": settings.check, "flex": settings.flex}
        | {"rounds": rounds(settings), "device": str(settings.device), "rows": len(rows)},
        "method": METHOD,
        "peers": packages,
        "absent": {name: reasons.get(name, "not installed") for name, version in packages.items() if version is None}
        | reasons,
        "complete": False,
        **({"warm": _warm(rows, settings)} if settings.warm else {}),
        "rows": {row.name: about(row, settings.device) for row in rows},
    }
    lock = threading.Lock()

    def keep(name: str, entries: dict[str, Any]) -> None:
        with lock:
            row = found["rows"][name]
            if "failed" in entries or "left_out" in entries:
                row |= entries
            else:
                for who, entry in entries.items():
                    row["contenders"].setdefault(who, {}).update(entry)
            row |= summary.ratios(row)
            found["summary"] = summary.of(found["rows"])
            if path:
                results.write_json(path, found)

    def is_late() -> bool:
        return settings.seconds is not None and time.monotonic() - begun > settings.seconds

    for phase in ("check",) if settings.check else ("check", "time"):
        with closing(_phase(phase, rows, settings, is_late, keep)) as arriving:
            for name, entries in arriving:
                if phase == "time" or settings.check or "failed" in entries or "left_out" in entries:
                    print(summary.line(name, found["rows"][name]), flush=True)
        done = "compiled and compared" if phase == "check" else "timed"
        print(f"{done} after {time.monotonic() - begun:.0f} s", flush=True)
    found["seconds"] = round(time.monotonic() - begun, 1)
    found["complete"] = True
    found["summary"] = summary.of(found["rows"])
    if path:
        results.write_json(path, found)
    print(summary.sentence(found["summary"]))
    return found, found["summary"]["failed"] > 0


def _warm(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """What `warm` says of the kernels that it has compiled, or "failed": the rows then compile their own."""
    names = [row.name for row in rows]
    limit = WARM_SECONDS if settings.seconds is None else min(WARM_SECONDS, settings.seconds)
    try:
        found: dict[str, Any] = results.child("fastattn.bench.users.warm", str(settings.device), *names, seconds=limit)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        found = {"failed": [str(error)[:300]]}
    if "kernels" in found:
        print("{kernels} kernels, {compiled} of them compiled now, in {seconds} s".format(**found), flush=True)
    for text in found["failed"]:
        print(f"not compiled: {text}", flush=True)
    return found


def rounds(settings: Settings) -> int:
    return QUICK_ROUNDS if settings.quick else ROUNDS


def about(row: Row, device: torch.device) -> dict[str, Any]:
    """A row in a result file before anything was found."""
    row = row if device.type == "cuda" else row.reduced()
    said = asdict(row) | {"dtype": str(row.dtype).removeprefix("torch."), "mask": getattr(row.mask, "__name__", None)}
    plain = {key: value for key, value in said.items() if value not in (None, False, 0) and key not in ("name", "who")}
    return {"who": row.who, "call": plain, "contenders": {}}


def _phase(
    phase: str,
    rows: Sequence[Row],
    settings: Settings,
    is_late: Callable[[], bool],
    keep: Callable[[str, dict[str, Any]], None],
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """What the rows give, as it comes: (row, entries), kept. The first phase in several processes, times in one."""
    groups = [rows[i : i + FEW] for i in range(0, len(rows), FEW)]
    several = phase == "check" and settings.device.type == "cuda"
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1, len(groups))) if several else 1
    arrived: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
    cut = threading.Event()
    if several:
        groups = [rows[i::count] for i in range(count)]  # neighbours take alike long

    def work(group: Sequence[Row]) -> None:
        try:
            for name, entries in drive([row.name for row in group], phase, settings, is_late, cut):
                keep(name, entries)
                arrived.put((name, entries))
        finally:
            arrived.put(None)

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(work, group) for group in groups]
        try:
            for _ in groups:
                while (item := arrived.get()) is not None:
                    yield item
        except BaseException:  # Ctrl-C, say: no thread goes on
            cut.set()
            raise
        for job in jobs:
            job.result()


def drive(
    names: Sequence[str],
    phase: str,
    settings: Settings,
    is_late: Callable[[], bool] = lambda: False,
    cut: threading.Event | None = None,
    module: str = "fastattn.bench.users.worker",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What some rows give, in processes of their own: after a row that ends its process another one goes on.

    is_late: whether the rows that are left shall be left out; cut: set when all shall end at once."""
    cut = cut or threading.Event()
    asked: dict[str, Any] = {"device": str(settings.device), "phase": phase}
    asked |= {"rounds": rounds(settings), "flex": settings.flex, "skip": {}}
    environment = {"FASTATTN_COMPILE": "wait"} | os.environ  # for the kernels that are to be measured
    skipped: dict[str, dict[str, str]] = asked["skip"]
    left = list(names)
    while left and not cut.is_set():
        if is_late():
            yield from ((name, {"left_out": "no time"}) for name in left)
            return
        with subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(asked), *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        ) as process:
            reader = _Reader(process, cut)
            try:
                for found in _rows_of(reader, left, ROW_SECONDS[phase]):
                    if isinstance(found, _End) and cut.is_set():
                        return
                    if isinstance(found, _End) and found.peer is not None:  # the row is measured again without it
                        skipped.setdefault(found.row, {})[found.peer] = found.why
                        break
                    name, entries = (found.row, {"failed": found.why}) if isinstance(found, _End) else found
                    left.remove(name)
                    yield name, entries | {who: {"failed": why} for who, why in skipped.get(name, {}).items()}
                    if is_late():
                        break
            finally:
                process.kill()
                reader.finish()


@dataclass(frozen=True)
class _End:
    """A process that ended, or did not come to an end, in a row."""

    row: str
    why: str
    peer: str | None  #: whose first call it was, if it was a peer's


def _rows_of(reader: _Reader, names: Sequence[str], seconds: float) -> Iterator[tuple[str, dict[str, Any]] | _End]:
    """The rows of one process, (row, entries), until all are there or it ends."""
    current, peer, missing = names[0], None, list(names)
    limit = START_SECONDS + seconds
    while missing:
        begun = time.monotonic()
        try:
            message = reader.message(max(limit, 0.0))
        except TimeoutError:
            yield _End(current, f"no end after {seconds:.0f} s", peer)
            return
        limit -= time.monotonic() - begun
        if message is None:
            yield _End(current, reader.last_words(), peer)
            return
        if "begin" in message:
            current, peer, limit = message["begin"], None, seconds
        elif "trying" in message:
            peer = None if message["trying"] in contenders.OURS else message["trying"]
        else:
            missing.remove(message["row"])
            current, peer = missing[0] if missing else current, None
            yield message["row"], message["found"]


class _Reader:
    """Reads the messages of a process, with a limit of time for each; keeps the last lines of its errors."""

    def __init__(self, process: subprocess.Popen[str], cut: threading.Event) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process, self._cut = process, cut
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._keep_errors, args=(process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def message(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None: the process has ended. Raises TimeoutError, also when the run is cut."""
        end = time.monotonic() + seconds
        while not self._cut.is_set():
            try:
                return self._messages.get(timeout=max(0.0, min(LOOK_SECONDS, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= end:
                    break
        raise TimeoutError

    def last_words(self) -> str:
        """How the process ended: the last line of its errors, or its status."""
        status = self._process.wait()
        self._threads[1].join()
        return self._errors[-1][:300] if self._errors else f"its process ended with status {status}"

    def finish(self) -> None:
        """Waits until all that an ended process wrote is read: what it wrote into is closed next."""
        for thread in self._threads:
            thread.join()

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            _, mark, text = line.partition(MARK)  # a kernel's own print may stand before it
            if mark:
                self._messages.put(json.loads(text))
        self._messages.put(None)

    def _keep_errors(self, lines: TextIO) -> None:
        for line in lines:
            if line.strip():
                self._errors = [*self._errors[-9:], line.strip()]
