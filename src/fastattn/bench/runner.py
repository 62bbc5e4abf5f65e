"""The runner of every sweep: takes rows, times their implementations in turns, checks them, and keeps the figures.

A row of a sweep is a `Comparison` (one call, several implementations) or `Figures` (a function that measures
something else). What it gives is a dict for a result file: "label"; "case"; "implementations": name -> "us" (median),
"min_us", "max_us", "method", "tflop_s", "gb_s", "relative_error", "first_ms" (the very first call, with all that it
compiles), "served_by", or "error", or "refused" (it cannot do such calls at all); "ratios"; "figures". A row that could
not be measured or is wrong has "error".
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .. import stats
from ..backends.cudnn import plans
from ..backends.triton.binaries.policy import waiting
from . import check, inputs, timing
from .case import Case
from .check import Expected
from .implementations import IMPLEMENTATIONS, Implementation, Refusal, variable
from .inputs import Inputs
from .peers import PEERS
from .timing import Contender, Timing, Timings, text_of

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """A row: the named implementations at one call, checked and timed in turns."""

    section: str
    case: Case
    names: Sequence[str]
    #: "inference", "training" (forwards, without and with gradients), "backward" alone, "step": forward and backward
    kind: str = "inference"
    eager: bool = False  #: also without a CUDA graph, as "eager"
    timer: Callable[[Sequence[Contender], torch.device], Timings] = timing.race
    derive: bool = True  #: rates and ratios from the times; False also: one input set is enough
    settle: bool = False  #: "fastattn" repeats the call until it has its static plan
    read: bool = False  #: also the time that reading the K and V that are seen takes, as "read"
    exact: bool = False  #: checked in float64 on one K/V head of one batch entry, not in float32 on the whole call


@dataclass(frozen=True)
class Figures:
    """A row that a function measures: it returns a dict with "figures"."""

    section: str
    label: str
    measure: Callable[[], Row]


class Runner:
    """Measures rows, by sections."""

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

    def can_run(self, name: str) -> bool:
        """Whether this device can run an implementation; notes those that need a GPU where there is none."""
        if not find(name).cuda_only or self.device.type == "cuda":
            return True
        self.left_out.add(name)
        return False

    def run(self, rows: Iterable[Comparison | Figures]) -> None:
        """Measures rows, prints each and keeps it. What one raises becomes its error."""
        for row in rows:
            label = row.label if isinstance(row, Figures) else row.case.label()
            try:
                if isinstance(row, Figures):
                    found = {"label": label, **row.measure()}
                else:
                    with waiting():  # for the kernels that are to be measured
                        found = {"label": label, **self.compare(row)}
            except Exception as error:
                found = {"label": label, "error": text_of(error)}
            self.sections.setdefault(row.section, []).append(found)
            self._say(f"{row.section}: {label}: {summary(found)}")

    def compare(self, row: Comparison) -> Row:
        """The figures of a comparison."""
        case, kind = row.case, row.kind
        sets = inputs.make_inputs(
            case, self.device, self.generator, inputs.set_count(case, self._l2_bytes) if row.derive else 1
        )
        for_ours = sets if case.lengths is None else [inputs.poisoned(case, x) for x in sets]
        flops = case.flops(kind == "backward")
        part = check.drawn_part(case, self.seed) if row.exact else None
        expected = Expected.of(case, sets[0], kind, part) if row.exact or flops <= check.MOST_FLOPS else None
        entries: dict[str, Any] = {}
        contenders = []
        for name in filter(self.can_run, row.names):
            implementation = find(name)
            own = for_ours if implementation.ours else sets
            entries[name], contender = self._enter(implementation, row, own, expected)
            contenders += [] if contender is None else [contender]
        if row.read:
            contenders.append(_reader(case, sets))
        plans.shared.wait()  # what is built in the background would disturb, and cannot be done during a capture
        measured = row.timer(contenders, self.device)
        again = timing.race(contenders, self.device, eager=True) if row.eager else {}
        reading = measured.pop("read", None)
        _enter_timings(entries, measured, again)
        found: Row = {
            "case": asdict(case) | {"kind": kind},
            "input_sets": len(sets),
            "check": expected.how if expected else f"skipped: the reference would take {flops:.1e} operations",
            "implementations": entries,
        }
        if reading is not None:
            found["read"] = _read_time(case, reading)
        return found | derived(found, case, kind) if row.derive else found

    def _enter(
        self, implementation: Implementation, row: Comparison, sets: Sequence[Inputs], expected: Expected | None
    ) -> tuple[dict[str, Any], Contender | None]:
        """Calls an implementation for the first time and checks what it gives. None if it cannot be timed."""
        entry: dict[str, Any] = {}
        contender = None
        case, gradients, backward = row.case, row.kind != "inference", row.kind == "backward"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with implementation.active(gradients):
                    if gradients:
                        sets = [inputs.with_gradients(x) for x in sets]
                    if implementation.measure is not None:
                        result, times = implementation.measure(case, sets)
                        _check(entry, expected, (result,))
                        return entry | times, None
                    before = stats()["calls"]
                    bound: list[Callable[[], Any]] = [implementation.bind(case, x) for x in sets]
                    if backward:
                        bound = [_gradients_of(call(), x) for call, x in zip(bound, sets, strict=True)]
                    if row.kind == "step":
                        bound = [partial(_step, call, x) for call, x in zip(bound, sets, strict=True)]
                    result, entry["first_ms"] = timing.once(bound[0], self.device)
                    served = [name for name, n in stats()["calls"].items() if n > before.get(name, 0)]
                    if implementation.ours:
                        entry["served_by"] = next(n for n in served if n.endswith(".backward") == backward)
                    _check(entry, expected, result if backward or row.kind == "step" else (result,))
                    if row.settle and entry.get("served_by") == "cudnn":
                        build_static_plan(bound[0])
                contender = Contender(implementation.name, bound, partial(implementation.active, gradients))
            except Refusal as refusal:
                entry["refused"] = str(refusal)
            except Exception as error:
                entry["error"] = text_of(error)
        if caught:  # torch's reasons for a refusal among them
            texts = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message), flags=re.S) for w in caught]
            entry["warnings"] = list(dict.fromkeys(texts))
        return entry, contender


def find(name: str) -> Implementation:
    """An implementation by its name: fastattn's and torch's, or a package that may be installed beside them."""
    return IMPLEMENTATIONS[name] if name in IMPLEMENTATIONS else PEERS[name]


def derived(row: Row, case: Case, kind: str) -> Row:
    """What follows from the times of a row: "best_peer", "ratios" and "figures". Adds rates to its implementations."""
    for entry in row["implementations"].values():
        if "us" in entry:
            entry["tflop_s"] = case.useful_flops(kind) / entry["us"] / 1e6
            entry["gb_s"] = case.kv_bytes / entry["us"] / 1e3
    ours, peer, read = time_of(row, "fastattn"), best_peer(row), row.get("read", {}).get("us")
    ratios, names = {}, row["implementations"]
    if "fastattn" in names:
        ratios["/ best other"] = quotient(ours, peer[1] if peer else None)
    if {"fastattn-dynamic", "fastattn-static"} <= set(names):
        ratios["dynamic/static"] = quotient(time_of(row, "fastattn-dynamic"), time_of(row, "fastattn-static"))
        if any("eager" in entry for entry in names.values()):
            eager = (time_of(row, name, "eager") for name in ("fastattn-dynamic", "fastattn-static"))
            ratios["dynamic/static eager"] = quotient(*eager)
    found: Row = {"best_peer": peer[0] if peer else None, "ratios": ratios}
    if "read" in row:
        ratios["/ read"] = quotient(ours, read)
        found["figures"] = {"read us": read, "TB/s": None if ours is None else case.kv_bytes / ours / 1e6}
    return found


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


def build_static_plan(call: Callable[[], Any]) -> None:
    """Builds the static plan that the call would get if it were repeated often enough."""
    with variable("FASTATTN_PLANS", "static"):
        call()


def _check(entry: dict[str, Any], expected: Expected | None, result: tuple[torch.Tensor, ...]) -> None:
    if expected is None:
        return
    error = expected.error(result)
    entry["relative_error"] = error if math.isfinite(error) else None
    check.check_error(error, expected.limit)


def _step(call: Callable[[], torch.Tensor], x: Inputs) -> tuple[torch.Tensor, ...]:
    out = call()
    return out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad_out)


def _gradients_of(out: torch.Tensor, x: Inputs) -> Callable[[], Any]:
    return partial(torch.autograd.grad, out, (x.q, x.k, x.v), x.grad_out, retain_graph=True)


def _reader(case: Case, sets: Sequence[Inputs]) -> Contender:
    count = case.kv_bytes // inputs.DTYPE.itemsize
    copies = [partial(torch.empty_like(x.memory[:count]).copy_, x.memory[:count]) for x in sets]
    return Contender("read", copies)


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
