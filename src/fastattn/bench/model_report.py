"""What the model benchmark found: the figures, the table that compares them, the JSON that keeps them."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..common.table import ratio, table
from .results import header

KEYS = ("prompt_tps", "generation_tps", "peak_memory")  #: what is averaged over the trials


@dataclass(frozen=True)
class Trial:
    """One prompt and its generation."""

    prompt_tps: float
    generation_tps: float  #: 0 when only one token was generated
    peak_memory: float  #: 1e9 bytes
    total_time: float  #: seconds


@dataclass(frozen=True)
class FreshLength:
    """Seconds to the first new token for a prompt length that the process had not seen, and again after that."""

    length: int
    first: float
    second: float

    @property
    def ratio(self) -> float:
        return self.first / self.second


@dataclass
class Outcome:
    """One attention implementation in a benchmark, whatever was measured of it."""

    attn: str
    calls: dict[str, int] = field(default_factory=dict, kw_only=True)  #: by backend, where fastattn served them
    plans: dict[str, Any] = field(default_factory=dict, kw_only=True)  #: fastattn's plan counters when it was done
    error: str | None = field(default=None, kw_only=True)  #: why it was given up

    def rest(self) -> dict[str, Any]:
        """What a file keeps of it beside the figures."""
        found: dict[str, Any] = {"calls": self.calls, "plans": self.plans} if self.calls else {}
        return found | ({"error": self.error} if self.error else {})


def as_dict(kind: str, command: str, arguments: dict[str, Any], model: dict[str, Any], results: Any) -> dict[str, Any]:
    """A finished run for a JSON file, with the environment of this process and the command that was run."""
    return header(kind, command, torch.device(arguments["device"])) | {
        "arguments": arguments,
        "model": model,
        "implementations": {result.attn: result.as_dict() for result in results},
    }


@dataclass
class Result(Outcome):
    """What was measured for one attention implementation."""

    trials: list[Trial] = field(default_factory=list)
    fresh: list[FreshLength] = field(default_factory=list)
    fused_ops: tuple[str, ...] = ()  #: of the model's operations those that liger-kernel replaced

    def average(self, key: str) -> float | None:
        """The mean of a `Trial`'s field over the trials; None when it was given up."""
        return None if self.error or not self.trials else statistics.fmean(getattr(t, key) for t in self.trials)

    @property
    def fresh_ratio(self) -> float | None:
        """The median of first over second time; 1 means that a new prompt length costs nothing extra."""
        return statistics.median(f.ratio for f in self.fresh) if self.fresh else None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "trials": [asdict(trial) for trial in self.trials],
            "averages": {key: self.average(key) for key in KEYS},
        }
        if self.fresh:
            lengths = [
                {"length": f.length, "first_s": f.first, "second_s": f.second, "ratio": f.ratio} for f in self.fresh
            ]
            found["fresh_lengths"] = {"median_ratio": self.fresh_ratio, "lengths": lengths}
        return found | self.rest()


@dataclass(frozen=True)
class Report:
    """A finished run."""

    arguments: dict[str, Any]  #: the settings, dtype and device as they turned out
    model: dict[str, Any]  #: name, parameters and what else identifies it
    results: list[Result]

    def as_dict(self, command: str) -> dict[str, Any]:
        """All of it for a JSON file."""
        return as_dict("model", command, self.arguments, self.model, self.results)

    def comparison(self) -> str:
        """A table of the implementations, with ratios to sdpa if it was measured, else to the first one."""
        base = next((r for r in self.results if r.attn == "sdpa"), self.results[0])
        against = f"/ {base.attn}"
        head = ["attention", "prompt_tps", against, "generation_tps", against, "peak_memory", "new length"]
        rows = []
        for r in self.results:
            cells = [r.attn]
            for key in ("prompt_tps", "generation_tps"):
                value = r.average(key)
                cells += [_number(value), ratio(value, base.average(key))]
            cells += [_number(r.average("peak_memory")), "-" if r.fresh_ratio is None else f"{r.fresh_ratio:.2f}x"]
            rows.append(cells)
        return table(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
