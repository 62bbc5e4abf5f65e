"""Which binaries there are. Of one that is not, the disk is asked at once; then it is compiled in the background."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ....common.forks import after_fork, renew_lock
from ....shape_cache import Reason, shape_cache
from ...base import NotReady, Refusal, Setback
from ...errors import says_memory
from ..cuda_driver import Function, use_device
from .compilers import Compile, Compilers
from .flag_set import Binary, FlagSet
from .label import FILES, label
from .policy import hindrance, mode
from .process import CompileError, NoCompiler

#: Seconds until a binary whose compiler did not start, or died, is tried again, doubled each time; how many times.
FIRST_RETRY, LAST_RETRY, TRIES = 10.0, 600.0, 4
MOST = 4096  #: binaries held, and failures remembered; where there are more, all are looked for anew
COUNTERS = (
    *("compiles", "compile_ms", "background_compiles", "background_compile_ms", "failures"),
    *("disk_loads", "disk_load_ms"),
)

_log = logging.getLogger("fastattn")


@dataclass(slots=True)
class _Failure:
    why: str
    for_now: bool
    retry_at: float = math.inf  #: by the clock
    wait: float = FIRST_RETRY
    tries: int = 1

    @property
    def final(self) -> bool:
        return not self.for_now or self.tries >= TRIES


@dataclass(slots=True, eq=False)
class _Job:
    """A binary that is to be made, once however many ask for it."""

    flags: FlagSet
    device: int | None
    awaited: bool
    taken: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Binaries:
    """Binaries by flag set. Thread-safe; each is made once however many threads ask."""

    def __init__(self, compilers: Compilers | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.compilers = compilers or Compilers()
        self._clock = clock
        self._ready: dict[FlagSet, Function] = {}
        self._failed: dict[FlagSet, _Failure] = {}
        self._jobs: dict[FlagSet, _Job] = {}
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._lock = threading.Lock()
        after_fork(self, Binaries._forked)

    def _forked(self) -> None:
        """In a forked child: who was to make them is not there."""
        renew_lock(self)
        self._jobs.clear()

    def ready(self, flags: FlagSet) -> Function | None:
        """The binary, if it is there: one look into a dict."""
        return self._ready.get(flags)

    def failed(self, flags: FlagSet) -> str | None:
        """Why there is none, and there will be none for now."""
        with self._lock:
            found = self._failed.get(flags)
            return found.why if found is not None and self._clock() < found.retry_at else None

    def find(self, flags: FlagSet) -> Function | None:
        """The binary, if it is there or on disk: milliseconds, the first time."""
        found = self._ready.get(flags)
        if found is None and flags not in self._jobs:
            found = self._load(flags)
        return found

    def ask(self, flags: FlagSet, device: int | None = None) -> Function | None:
        """The binary, if it is there or on disk. If not, it is compiled in the background, once.

        device: the index of the GPU that it is loaded on then, so that no launch has to.
        """
        found = self.find(flags)
        if found is None and self.failed(flags) is None and not hindrance():
            self._submit(flags, device, awaited=False)
        return found

    def make(self, flags: FlagSet, device: int | None = None) -> Function:
        """The binary, compiled now if it is not there. Raises Refusal where that cannot be done, Setback for now."""
        found = self.find(flags)
        if found is not None:
            return found
        why = hindrance()
        if why:
            raise Refusal(f"its kernel is not compiled: {why}")
        failure = self._failed.get(flags)
        if failure is None or not failure.final:
            job = self._submit(flags, device, awaited=True)
            if job is not None:
                job.done.wait()
            found = self._ready.get(flags)
            if found is not None:
                return found
            failure = self._failed.get(flags)
        final = failure is not None and failure.final
        text = failure.why if failure is not None else "there is nobody to do it"
        raise (Refusal if final else Setback)(f"its kernel could not be compiled: {text}")

    def missing(self, every: Iterable[FlagSet]) -> list[FlagSet]:
        """Those that are neither there nor on disk, each once."""
        return [flags for flags in dict.fromkeys(every) if self.find(flags) is None]

    def make_all(self, every: Iterable[FlagSet], device: int | None = None) -> Iterator[tuple[FlagSet, str]]:
        """Makes all that are not there, in several processes. Yields each, and why it could not be made or ""."""
        missing = self.missing(every)
        with self.compilers.widened():
            why = hindrance()
            jobs = [None if why else self._submit(flags, device, awaited=True) for flags in missing]
            for flags, job in zip(missing, jobs, strict=True):
                if job is not None:
                    job.done.wait()
                made = flags in self._ready
                yield flags, "" if made else why or self.failed(flags) or "there is nobody to do it"

    def function(self, flags: FlagSet, device: int | None = None) -> Function:
        """The binary, for a call that is being bound.

        Raises NotReady where the call is not to wait for it, Refusal where there will be none, and Setback where the
        call has waited and there is none for now.
        """
        found = self._ready.get(flags)
        if found is not None:
            return found
        seen = shape_cache.drops(Reason.BINARY_READY)
        if mode() == "wait":
            return self.make(flags, device)
        found = self.ask(flags, device)
        if found is not None:
            return found
        why, coming, until = self.state(flags)
        if not why:
            raise Refusal(f"its kernel could not be compiled: {self.failed(flags)}")
        raise NotReady(why, coming, lambda: self.make(flags, device), seen, until)

    def state(self, flags: FlagSet) -> tuple[str, bool, float]:
        """Of a binary that is not there: what is to be said of it, whether it is coming, and when to ask again (by
        time.monotonic()). Nothing is to be said of one that will never be there."""
        with self._lock:
            failure, coming = self._failed.get(flags), flags in self._jobs
        if coming:
            return "its kernel is being compiled: another backend serves such calls until it is ready", True, math.inf
        if failure is not None and failure.final:
            return "", False, math.inf
        if failure is not None:
            left = max(0.0, failure.retry_at - self._clock())
            why = f"its kernel could not be compiled, and will be tried again: {failure.why}"
            return why, False, time.monotonic() + left
        why = hindrance()
        if why:
            return f"its kernel is not compiled: {why}", False, math.inf
        return "its kernel is compiled after the first such call, which another backend serves", True, math.inf

    def wait(self, timeout: float = 600.0) -> bool:
        """Waits until nothing is being compiled. False if that takes longer than `timeout` seconds."""
        return self.compilers.wait(timeout)

    def stats(self) -> dict[str, float]:
        """Counters.

        binaries: held now. compiles, compile_ms: compiled while a caller waited, and the milliseconds that it took.
        background_compiles, background_compile_ms: the same where nobody did. failures: attempts that gave none.
        disk_loads, disk_load_ms: read from disk instead.
        """
        with self._lock:
            return {"binaries": len(self._ready), **self._counters}

    def _submit(self, flags: FlagSet, device: int | None, awaited: bool) -> _Job | None:
        """None: it is there meanwhile, or there is nobody to make it."""
        with self._lock:
            if flags in self._ready:
                return None
            job = self._jobs.get(flags)
            again = job is not None and awaited and not job.awaited and not job.taken
            if job is None:
                job = self._jobs[flags] = _Job(flags, device, awaited)
            elif not again:
                return job
            job.awaited |= awaited

        def task(compile: Compile) -> None:
            self._do(job, compile)

        if not self.compilers.submit(task, waiting=awaited) and not again:
            self._finish(job, failure="no thread or no process could be started", for_now=True)
        return job

    def _do(self, job: _Job, compile: Compile) -> None:
        """By a thread of the compilers'."""
        with self._lock:
            if job.taken:  # it was in the queue twice
                return
            job.taken = True
        failure, for_now = "", False
        try:
            text = label(job.flags)
            with FILES.claimed(text, lambda: self.compilers.stopped):
                if self._load(job.flags, job.device) is None:  # another process may have compiled it
                    self._compile(job, text, compile)
        except CompileError as error:
            failure = str(error)
        except NoCompiler as error:
            failure, for_now = str(error), True
        except Exception as error:  # the driver does not take it, or something unknown
            failure, for_now = f"{type(error).__name__}: {error}", says_memory(error)
        finally:
            self._finish(job, failure, for_now)

    def _compile(self, job: _Job, text: bytes, compile: Compile) -> None:
        start = time.perf_counter()
        binary = compile(job.flags)
        taken = (time.perf_counter() - start) * 1e3
        function = _function(binary, job.device)
        FILES.store(text, binary.packed())  # what the driver has loaded
        self._add(job.flags, function, "compile" if job.awaited else "background_compile", taken)

    def _load(self, flags: FlagSet, device: int | None = None) -> Function | None:
        """From the disk."""
        start = time.perf_counter()
        text = label(flags)
        data = FILES.load(text)
        if data is None:
            return None
        try:
            function = _function(Binary.unpacked(data), device)
        except ValueError as error:
            _log.debug("binary from disk discarded: %s", error)
            FILES.discard(text)
            return None
        self._add(flags, function, "disk_load", (time.perf_counter() - start) * 1e3)
        return function

    def _add(self, flags: FlagSet, function: Function, counter: str, milliseconds: float) -> None:
        """Publishes a binary, and then drops what would pass it over."""
        with self._lock:
            if flags in self._ready:
                return
            if len(self._ready) >= MOST:
                self._ready.clear()  # (what is bound keeps its own)
            self._ready[flags] = function
            self._failed.pop(flags, None)
            self._counters[f"{counter}s"] += 1
            self._counters[f"{counter}_ms"] += milliseconds
        shape_cache.invalidate(Reason.BINARY_READY)

    def _finish(self, job: _Job, failure: str, for_now: bool) -> None:
        with self._lock:
            self._jobs.pop(job.flags, None)
            if failure and not self.compilers.stopped:
                self._counters["failures"] += 1
                last = self._failed.get(job.flags)
                if len(self._failed) >= MOST:
                    self._failed.clear()
                found = self._failed[job.flags] = _Failure(failure, for_now)
                if for_now:
                    if last is not None:
                        found.tries, found.wait = last.tries + 1, min(2 * last.wait, LAST_RETRY)
                    found.retry_at = math.inf if found.final else self._clock() + found.wait
        job.done.set()
        if failure:
            _log.debug("not compiled: %s: %s", job.flags, failure)
            shape_cache.invalidate(Reason.BINARY_READY)  # what waits for it is to be told


def _function(binary: Binary, device: int | None) -> Function:
    function = Function(binary.cubin, binary.name, binary.shared, binary.threads)
    if device is not None:
        use_device(device)
        function.load(device)
    return function


shared = Binaries()  #: the process's
