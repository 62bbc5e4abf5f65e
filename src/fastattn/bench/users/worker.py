"""Measures some rows in a process of its own: `python -m fastattn.bench.users.worker SETTINGS ROW ...`.

SETTINGS is JSON: "device", "phase" ("check": each contender's first calls, which compile, and what they gave; "time":
the times), "rounds", "flex", "skip" (by row: contenders that ended a process before). What follows `MARK` in a line
says, as JSON, which row begins ("begin"), whose call is made for the first time ("trying"; None: nobody's) or what was
found ("row", "found"). A CUDA error leaves a process that can do nothing more: it ends, and who started it goes on with
another one.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import stats
from ...backends.cudnn import plans
from ...backends.triton.binaries.policy import waiting
from .. import timing
from ..implementations import Refusal
from ..peers import forget_compiled
from ..runner import build_static_plan
from ..timing import Contender, Timing, text_of
from . import contenders, packages
from .calls import Row, Tensors
from .rows import BY_NAME
from .truth import LIMITS, errors, truth

MARK = "\x1e"
ATTEMPTS, WAIT_SECONDS = 4, 5.0  #: to compare, where there is no memory
MOST_SETS = 64
MOST_BYTES = 16 << 30  #: of all input sets of a row
EAGER_CALLS = 20  #: at the most, between two waits: the launch queue must not fill
_WARM_ROUNDS = 2
EAGER_US = 8000.0  #: of time in a round of eager calls, at the least: the first one finds cold caches
FATAL = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure")
Say = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str], say: Say) -> None:
    """The process. Says what it does and finds, row by row."""
    settings = json.loads(argv[0])
    device = torch.device(settings["device"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    # Not on the default stream: that one cannot be captured, and a backward runs on the stream of its forward.
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reasons of torch's for a refusal, and that the reference is slow
        for name in argv[1:]:
            say({"begin": name})
            row = BY_NAME[name] if on_gpu else BY_NAME[name].reduced()
            names = [*contenders.OURS, *contenders.peers(settings["flex"], on_gpu)]
            names = [who for who in names if who not in settings["skip"].get(name, ())]
            measure = checked if settings["phase"] == "check" else partial(timed, rounds=settings["rounds"])
            if settings["flex"]:
                forget_compiled()
            with waiting():  # for the kernels that are to be measured
                found = measure(row, _told(names, say), device)
            say({"row": name, "found": found})
            if on_gpu:
                torch.cuda.empty_cache()


def _told(names: Sequence[str], say: Say) -> Iterator[str]:
    """The names, each said before it is tried."""
    for name in names:
        say({"trying": name})
        yield name
    say({"trying": None})


def checked(row: Row, names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Each contender's first call, and how far it is from the truth: name -> "error", "gradient_error", "first_ms",
    "served_by"; or "refused", or "failed"."""
    x = row.tensors(device)[0]
    expected = truth(row, x)
    found: dict[str, Any] = {}
    for name in names:
        for attempt in range(ATTEMPTS):
            try:
                entry = _entry(name, row, x, expected, device)
            except torch.OutOfMemoryError as error:  # other processes compare at the same time
                entry = {"failed": text_of(error)}
                if attempt + 1 < ATTEMPTS and device.type == "cuda":
                    torch.cuda.empty_cache()
                    time.sleep(WAIT_SECONDS)
                    continue
            break
        if name != "fastattn-dynamic" or _has_plans(entry):  # else it is the same kernel as fastattn's
            found[name] = entry
    return found


def _entry(name: str, row: Row, x: Tensors, expected: tuple[Tensor, ...], device: torch.device) -> dict[str, Any]:
    """What one contender's first calls say of it. Raises torch.OutOfMemoryError, and what CUDA does not survive."""
    entry: dict[str, Any] = {}
    try:
        if name == contenders.MLX:
            _compare(entry, row, x, (packages.measured_by_mlx(row, x, 1)[0],), expected)
            return entry
        with contenders.active(name, row):
            before = stats()["calls"]
            call = contenders.bind(name, row, x)
            result, entry["first_ms"] = timing.once(call, device)
            if name in contenders.OURS:
                entry["served_by"] = _served(before)
        _compare(entry, row, x, contenders.tensors_of(result, row), expected)
        if name == "fastattn" and _has_plans(entry):  # the static plan that serves in the long run
            with contenders.active(name, row):
                build_static_plan(call)
                _compare(entry, row, x, contenders.tensors_of(call(), row), expected)
    except Refusal as refusal:
        return {"refused": str(refusal)}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _raise_if_fatal(error)
        return _failure(error)
    return entry


def _compare(
    entry: dict[str, Any], row: Row, x: Tensors, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> None:
    """Enters the relative errors, the larger ones of several calls, and "failed" where they are too large."""
    limits = LIMITS[row.dtype]
    found = errors(row, x, result, expected)
    for key, error in zip(("error", "gradient_error") if row.training else ("error",), found):
        if math.isfinite(error):
            entry[key] = max(entry.get(key, 0.0), float(f"{error:.2e}"))
    if not (found[0] <= limits[0] and found[1] <= limits[1]):
        texts = [f"{error:.1e}" if math.isfinite(error) else "NaN" for error in found[: 2 if row.training else 1]]
        entry["failed"] = f"wrong result: relative error {', of gradients '.join(texts)}"


def _failure(error: Exception) -> dict[str, Any]:
    """An error of a contender: torch has no kernel for the call, or it failed."""
    return {"refused" if "No available kernel" in str(error) else "failed": text_of(error)}


def _served(before: dict[str, int]) -> list[str]:
    return [key for key, n in stats()["calls"].items() if n > before.get(key, 0)]


def timed(row: Row, names: Iterable[str], device: torch.device, rounds: int) -> dict[str, Any]:
    """The times of those that can make the call: name -> "us" and so on (of a CUDA graph: GPU time; on a CPU: the time
    that passes), "eager" (the time that passes for a call, as Python makes it) and "host" (of which the host is busy);
    or "failed"."""
    ready: list[Contender] = []
    found: dict[str, Any] = {}
    sets = row.tensors(device, set_count(row, device))
    for name in names:
        try:
            if name == contenders.MLX:
                found[name] = _by_mlx(row, sets)
                continue
            with contenders.active(name, row):
                calls = [contenders.bind(name, row, x) for x in sets]
                before = stats()["calls"]
                calls[0]()
                served = {"served_by": _served(before) if name in contenders.OURS else []}
                if name == "fastattn-dynamic" and not _has_plans(served):
                    continue
                if name == "fastattn" and _has_plans(served):
                    build_static_plan(calls[0])
                for call in calls[:2]:
                    call()
            ready.append(Contender(name, calls, partial(contenders.active, name, row)))
        except Refusal:
            continue
        except Exception as error:
            _raise_if_fatal(error)
            found[name] = _failure(error)
    plans.shared.wait()  # what is built in the background would disturb, and cannot be done during a capture
    measured = timing.race(ready, device, rounds=rounds)
    for name, figures in measured.items():
        if isinstance(figures, Timing):
            found[name] = rounded(figures)
        else:
            _raise_if_fatal(figures)
            found[name] = {"failed": text_of(figures)}
    for name, beside in eager([c for c in ready if isinstance(measured[c.name], Timing)], device, rounds).items():
        found[name] |= beside
    return found


def _by_mlx(row: Row, sets: Sequence[Tensors]) -> dict[str, Any]:
    """MLX's figures: the time that passes, of many calls in a row, is the only one that it has."""
    _, times = packages.measured_by_mlx(row, sets[0], len(sets))
    figures = {key: round(times[key], 2) for key in ("us", "min_us", "max_us")} | {"method": "own process"}
    return figures | {"eager": dict(figures)}


def set_count(row: Row, device: torch.device) -> int:
    """How many input sets it takes so that what a call reads is not in the L2 cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = row.sizes
    size = row.dtype.itemsize * batch * (heads * q_len * dim + kv_heads * kv_len * (dim + value_dim))
    wanted = -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // size)
    return int(max(1, min(wanted, MOST_SETS, MOST_BYTES // (4 * size))))


def eager(ready: Sequence[Contender], device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Calls as Python makes them, in turns: "eager", the time per call until all is done, and "host", the time per call
    until the host has launched them. Two rounds come before those that count: one says how many calls a round has, one
    makes them, so that each has seen its tensors' addresses, as a model's layers have after the first step."""
    samples: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in ready}
    counts: dict[str, int] = {}
    for i in range(rounds + _WARM_ROUNDS):
        for contender in ready:
            count = counts.setdefault(contender.name, 1)
            with contender.context():
                timing.synchronize(device)
                begin = time.perf_counter()
                for n in range(count):
                    contender.calls[n % len(contender.calls)]()
                launched = time.perf_counter()
                timing.synchronize(device)
                end = time.perf_counter()
            whole = (end - begin) * 1e6 / count
            if i >= _WARM_ROUNDS:
                samples[contender.name][0].append(whole)
                samples[contender.name][1].append((launched - begin) * 1e6 / count)
            elif i == 0:
                counts[contender.name] = max(1, min(EAGER_CALLS, int(EAGER_US / max(whole, 1.0))))
    return {
        name: {
            "eager": rounded(timing.timing_of(whole, "wall")),
            "host": rounded(timing.timing_of(host, "wall")),
        }
        for name, (whole, host) in samples.items()
    }


def rounded(figures: Timing) -> dict[str, Any]:
    """A timing for a result file, in hundredths of a microsecond."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 2)
        return [short(inner) for inner in value] if isinstance(value, tuple) else value

    return {key: short(value) for key, value in figures.as_dict().items()}


def _has_plans(entry: dict[str, Any]) -> bool:
    """Whether cuDNN served it, forward or backward: there alone dynamic and static plans differ."""
    return any(name.startswith("cudnn") for name in entry["served_by"])


def _raise_if_fatal(error: Exception) -> None:
    """Raises an error after which CUDA does nothing more in this process."""
    if any(text in str(error) for text in FATAL):
        raise error


def _say(message: dict[str, Any]) -> None:
    print(f"{MARK}{json.dumps(message)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:], _say)
