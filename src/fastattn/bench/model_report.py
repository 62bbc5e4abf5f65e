"""What the model benchmark found: the figures, the table that compares them, the JSON that keeps them."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

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


@dataclass(frozen=True)
class Run:
    """A finished run, whatever it measured."""

    arguments: dict[str, Any]  #: the settings, dtype and device as they turned out
    model: dict[str, Any]  #: name, parameters and what else identifies it
    results: list[Any]  #: an `Outcome` with `as_dict` for each implementation
    kind: ClassVar[str]

    def as_dict(self, command: str) -> dict[str, Any]:
        """All of it for a JSON file, with the environment of this process and the command that was run."""
        return header(self.kind, command, torch.device(self.arguments["device"])) | {
            "arguments": self.arguments,
            "model": self.model,
            "implementations": {result.attn: result.as_dict() for result in self.results},
        }

    @property
    def base(self) -> Any:
        """What the others are compared with: sdpa if it was measured, else the first one."""
        return next((r for r in self.results if r.attn == "sdpa" and r.error is None), self.results[0])


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


class Report(Run):
    """A finished run of `fastattn benchmark`."""

    kind = "model"

    def comparison(self) -> str:
        """A table of the implementations, with ratios to the base."""
        against = f"/ {self.base.attn}"
        head = ["attention", "prompt_tps", against, "generation_tps", against, "peak_memory", "new length"]
        rows = []
        for r in self.results:
            prompt, generation, memory = (r.average(key) for key in KEYS)
            rows.append([r.attn, figure(prompt), ratio(prompt, self.base.average("prompt_tps"))])
            rows[-1] += [figure(generation), ratio(generation, self.base.average("generation_tps")), figure(memory)]
            rows[-1].append("-" if r.fresh_ratio is None else f"{r.fresh_ratio:.2f}x")
        return table(head, rows)


def figure(value: float | None, digits: int = 3) -> str:
    """A number in a table, `-` for none."""
    return "-" if value is None else f"{value:.{digits}f}"
