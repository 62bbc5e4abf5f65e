"""What the model benchmark found: the figures, the table that compares them, the JSON that keeps them."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .results import header
from .table import ratio, table

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
class Result:
    """What was measured for one attention implementation."""

    attn: str
    trials: list[Trial] = field(default_factory=list)
    fresh: list[FreshLength] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)  #: by backend, where fastattn served them
    plans: dict[str, Any] = field(default_factory=dict)  #: fastattn's plan counters when it was done
    error: str | None = None  #: why it was given up

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
        if self.calls:
            found["calls"], found["plans"] = self.calls, self.plans
        if self.error:
            found["error"] = self.error
        return found


@dataclass(frozen=True)
class Report:
    """A finished run."""

    arguments: dict[str, Any]  #: the settings, dtype and device as they turned out
    model: dict[str, Any]  #: name, parameters and what else identifies it
    results: list[Result]

    def as_dict(self, command: str) -> dict[str, Any]:
        """All of it for a JSON file, with the environment of this process and the command that was run."""
        return header("model", command, torch.device(self.arguments["device"])) | {
            "arguments": self.arguments,
            "model": self.model,
            "implementations": {result.attn: result.as_dict() for result in self.results},
        }

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
