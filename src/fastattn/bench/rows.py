"""A sweep at work: rows in sections, each a call that several implementations make, or a few figures."""

from __future__ import annotations

import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .. import stats
from ..backends.cudnn import plans
from . import calls, timing
from .calls import IMPLEMENTATIONS, Case, Implementation, Inputs, Part, Refusal
from .peers import PEERS
from .timing import Contender, Timing, Timings, text_of

Row = dict[str, Any]
T = TypeVar("T")

#: The forward without and with gradients asked for; the backward alone; forward and backward.
KINDS = ("inference", "training", "backward", "step")


class Sweep:
    """Where the rows go, and what all of them share.

    A row is a dict: "label"; "implementations": name -> "us" (median), "min_us", "max_us", "method", "relative_error",
    "first_ms" (the very first call, with all that it compiles), "served_by", or "error", or "refused" (it cannot do
    such calls at all); "ratios"; "figures". A row that could not be measured or is wrong has "error".
    """

    def __init__(self, device: torch.device, quick: bool, seed: int, say: Callable[[str], None]) -> None:
        self.device = device
        self.seed = seed
        self.sections: dict[str, list[Row]] = {}
        self.left_out: set[str] = set()  #: implementations that need CUDA, on a machine without
        self._quick = quick
        self._say = say
        self.generator = torch.Generator(device).manual_seed(seed)
        on_gpu = device.type == "cuda"
        self._l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0

    @property
    def failed(self) -> bool:
        """True when a row could not be measured, or one of ours could not in some row."""
        rows = [row for section in self.sections.values() for row in section]
        ours = [e for row in rows for n, e in row.get("implementations", {}).items() if find(n).ours]
        return any("error" in found for found in (*rows, *ours))

    def pick(self, full: T, quick: T, tiny: T) -> T:
        """What suits the machine and the time: `tiny` on a CPU."""
        if self.device.type != "cuda":
            return tiny
        return quick if self._quick else full

    def add(self, section: str, label: str, measure: Callable[[], Row]) -> None:
        """Measures a row, shows it and keeps it. Whatever it raises becomes the row's error."""
        try:
            row = {"label": label, **measure()}
        except Exception as error:
            row = {"label": label, "error": text_of(error)}
        self.sections.setdefault(section, []).append(row)
        self._say(f"{section}: {label}: {summary(row)}")

    def compare(
        self,
        case: Case,
        names: Sequence[str],
        *,
        kind: str = "inference",
        eager: bool = False,
        host: bool = False,
        settle: bool = False,
        read: bool = False,
        exact: bool = False,
    ) -> Row:
        """The named implementations at one call, checked and timed in turns.

        kind: one of `KINDS`. eager: also without a CUDA graph, as "eager". host: the host's time and not the GPU's.
        settle: "fastattn" comes back to the call until it has its exact plan. read: also the time that it takes to read
        the K and V that are seen, as "read". exact: held against the reference in float64 on one K/V head of one batch
        entry, drawn at random, and not in float32 on all of the call.
        """
        backward = kind == "backward"
        count = 1 if host else calls.set_count(case, self._l2_bytes)
        sets = calls.make_inputs(case, self.device, self.generator, count)
        for_ours = sets if case.lengths is None else [calls.poisoned(case, x) for x in sets]
        flops = case.flops(backward)
        known = exact or flops <= calls.MOST_FLOPS
        truth = _Truth.of(case, sets[0], kind, self._drawn(case) if exact else None) if known else None
        entries: dict[str, Any] = {}
        contenders = []
        for name in names:
            implementation = find(name)
            if implementation.cuda_only and self.device.type != "cuda":
                self.left_out.add(name)
                continue
            own = for_ours if implementation.ours else sets
            entries[name], contender = self._enter(implementation, case, own, truth, kind, settle)
            contenders += [] if contender is None else [contender]
        if read:
            contenders.append(self._reader(case, sets))
        plans.shared.wait()  # what is built in the background would disturb, and cannot be done during a capture
        measured = (timing.host_cost if host else timing.race)(contenders, self.device)
        again = timing.race(contenders, self.device, eager=True) if eager else {}
        reading = measured.pop("read", None)
        _enter_timings(entries, measured, again)
        row: Row = {
            "case": asdict(case) | {"kind": kind},
            "input_sets": count,
            "check": truth.how if truth else f"skipped: the reference would take {flops:.1e} operations",
            "implementations": entries,
        }
        if reading is not None:
            row["read"] = _read_time(case, reading)
        return row

    def _drawn(self, case: Case) -> Part:
        rng = random.Random(f"{self.seed} {case}")
        return Part(rng.randrange(case.batch), rng.randrange(case.kv_heads))

    def _enter(
        self,
        implementation: Implementation,
        case: Case,
        sets: Sequence[Inputs],
        truth: _Truth | None,
        kind: str,
        settle: bool,
    ) -> tuple[dict[str, Any], Contender | None]:
        """Calls an implementation for the first time and checks what it gives. None if it cannot be timed."""
        entry: dict[str, Any] = {}
        contender = None
        gradients, backward = kind != "inference", kind == "backward"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with implementation.active(gradients):
                    if gradients:
                        sets = [x._replace(**{n: getattr(x, n).detach().requires_grad_() for n in "qkv"}) for x in sets]
                    if implementation.measure is not None:
                        result, times = implementation.measure(case, sets)
                        self._check(entry, truth, (result,))
                        return entry | times, None
                    before = stats()["calls"]
                    bound: list[Callable[[], Any]] = [implementation.bind(case, x) for x in sets]
                    if backward:
                        bound = [_gradients_of(call(), x) for call, x in zip(bound, sets, strict=True)]
                    if kind == "step":
                        bound = [partial(_step, call, x) for call, x in zip(bound, sets, strict=True)]
                    result, entry["first_ms"] = timing.once(bound[0], self.device)
                    served = [name for name, n in stats()["calls"].items() if n > before.get(name, 0)]
                    if implementation.ours:
                        entry["served_by"] = next(n for n in served if n.endswith(".backward") == backward)
                    self._check(entry, truth, result if backward or kind == "step" else (result,))
                    if settle and entry.get("served_by") == "cudnn":
                        _come_back(bound[0])
                contender = Contender(implementation.name, bound, partial(implementation.active, gradients))
            except Refusal as refusal:
                entry["refused"] = str(refusal)
            except Exception as error:
                entry["error"] = text_of(error)
        if caught:  # torch's reasons for a refusal among them
            said = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message), flags=re.S) for w in caught]
            entry["warnings"] = list(dict.fromkeys(said))
        return entry, contender

    def _check(self, entry: dict[str, Any], truth: _Truth | None, result: tuple[torch.Tensor, ...]) -> None:
        if truth is None:
            return
        error = truth.error(result)
        entry["relative_error"] = error if math.isfinite(error) else None
        calls.check_error(error, truth.limit)

    def _reader(self, case: Case, sets: Sequence[Inputs]) -> Contender:
        count = case.kv_bytes // calls.DTYPE.itemsize
        copies = [partial(torch.empty_like(x.memory[:count]).copy_, x.memory[:count]) for x in sets]
        return Contender("read", copies)


def find(name: str) -> Implementation:
    """An implementation by its name: fastattn's and torch's, or a package that may be installed beside them."""
    return IMPLEMENTATIONS[name] if name in IMPLEMENTATIONS else PEERS[name]


@dataclass(frozen=True)
class _Truth:
    """What the result of a call has to be."""

    case: Case
    expected: tuple[torch.Tensor, ...]
    part: Part | None  #: which part of the result is held against it; None: all
    limit: float
    how: str

    @staticmethod
    def of(case: Case, x: Inputs, kind: str, part: Part | None) -> _Truth:
        gradients = kind in ("backward", "step")
        if part is None:
            found, how = calls.truth(case, x, gradients), "reference"
        else:
            found = calls.truth(*part.of(case, x), gradients, torch.float64)
            how = f"reference in float64, batch entry {part.entry}, K/V head {part.head}"
        limit = calls.GRADIENT_LIMIT if gradients else calls.OUTPUT_LIMIT
        return _Truth(case, found[1:] if kind == "backward" else found, part, limit, how)

    def error(self, result: tuple[torch.Tensor, ...]) -> float:
        """The largest relative error of the tensors of a result."""
        result = tuple(calls.without_padding(self.case, x) for x in result)
        return calls.relative_error(self.part.cut(self.case, result) if self.part else result, self.expected)


def time_of(row: Row, name: str, key: str | None = None) -> float | None:
    """Microseconds of an implementation; with key="eager" of its calls outside of a graph. None if it failed."""
    entry = row.get("implementations", {}).get(name, {})
    us = (entry if key is None else entry.get(key, {})).get("us")
    return us if isinstance(us, float) else None


def quotient(value: float | None, base: float | None) -> float | None:
    """value / base, None where one is missing."""
    return value / base if value is not None and base else None


def best_peer(row: Row) -> tuple[str, float] | None:
    """The fastest implementation that is not ours, and its microseconds."""
    times = {name: time_of(row, name) for name in row.get("implementations", {}) if not name.startswith("fastattn")}
    found = {name: us for name, us in times.items() if us is not None}
    return min(found.items(), key=lambda item: item[1]) if found else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of some milliseconds the median and the worst."""
    return {"median_ms": statistics.median(values), "worst_ms": max(values)}


def summary(row: Row) -> str:
    """A row in one line."""
    parts = [str(row["error"])] if "error" in row else []
    for name, entry in row.get("implementations", {}).items():
        if "us" in entry:
            parts.append(f"{name} {entry['us']:.1f} us")
        else:
            parts.append(f"{name} failed ({entry['error'][:60]})" if "error" in entry else f"{name} refuses")
    parts += [f"{name} {value:.4g}" for name, value in row.get("figures", {}).items() if value is not None]
    parts += [f"{name} {value:.2f}x" for name, value in row.get("ratios", {}).items() if value is not None]
    return ", ".join(parts)


def _step(call: Callable[[], torch.Tensor], x: Inputs) -> tuple[torch.Tensor, ...]:
    out = call()
    return out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad_out)


def _gradients_of(out: torch.Tensor, x: Inputs) -> Callable[[], Any]:
    return partial(torch.autograd.grad, out, (x.q, x.k, x.v), x.grad_out, retain_graph=True)


def _come_back(call: Callable[[], Any]) -> None:
    """Makes the exact plan that the call would get if it came back often enough."""
    with calls.variable("FASTATTN_PLANS", "exact"):
        call()


def _enter_timings(entries: dict[str, Any], measured: Timings, again: Timings) -> None:
    for name, found in measured.items():
        entries[name] |= found.as_dict() if isinstance(found, Timing) else {"error": text_of(found)}
    for name, found in again.items():
        if "error" not in entries[name]:
            entries[name]["eager"] = found.as_dict() if isinstance(found, Timing) else {"error": text_of(found)}


def _read_time(case: Case, copied: Timing | Exception) -> Row:
    """A copy reads every byte once and writes it once: half of its time is what reading takes at that bandwidth."""
    if not isinstance(copied, Timing):
        return {"error": text_of(copied)}
    how = "half of the time of copying these bytes, which reads and writes each of them once"
    return {"us": copied.us / 2, "bytes": case.kv_bytes, "copy": copied.as_dict(), "how": how}
