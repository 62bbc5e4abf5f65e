"""What the training benchmark found: the figures, whether the implementations agree, the table and the JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.bench.model_report import Outcome, Run, figure
from fastattn.common.table import ratio, table

#: How far losses and norms of gradients of two implementations may lie apart, relatively, by the weights' dtype. All
#: had the same weights and tokens: what is left is rounding, and a loss is the mean over all tokens.
TOLERANCES = {"float32": (1e-4, 1e-3), "float16": (1e-3, 2e-2), "bfloat16": (2e-3, 5e-2)}


@dataclass(frozen=True)
class Step:
    """One step of training."""

    length: int  #: tokens of each sequence
    tokens_per_second: float
    seconds: float
    loss: float
    peak_memory: float  #: 1e9 bytes
    gradient_norm: float | None = None  #: of the last step only

    def __str__(self) -> str:
        return (
            f"length={self.length}, tokens_per_second={self.tokens_per_second:.3f}, loss={self.loss:.4f}, "
            f"peak_memory={self.peak_memory:.3f}, seconds={self.seconds:.3f}"
        )


@dataclass
class Result(Outcome):
    """What was measured for one attention implementation."""

    steps: list[Step] = field(default_factory=list)  #: without the warmup

    @property
    def done(self) -> bool:
        """True when it has figures."""
        return self.error is None and bool(self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens over all time."""
        if not self.done:
            return None
        return sum(s.tokens_per_second * s.seconds for s in self.steps) / sum(s.seconds for s in self.steps)

    @property
    def median(self) -> float | None:
        """Tokens per second of the median step: a few slow steps do not show here."""
        return statistics.median(s.tokens_per_second for s in self.steps) if self.done else None

    @property
    def peak_memory(self) -> float | None:
        """Of the step that needed most, 1e9 bytes."""
        return max(s.peak_memory for s in self.steps) if self.done else None

    def averages(self) -> dict[str, float | None]:
        last = self.steps[-1] if self.done else None
        return {
            "tokens_per_second": self.tokens_per_second,
            "median_step_tokens_per_second": self.median,
            "peak_memory": self.peak_memory,
            "last_loss": _finite(last.loss if last else None),
            "last_gradient_norm": _finite(last.gradient_norm if last else None),
        }

    def summary(self) -> str:
        """In one line; only of a result that is done."""
        last = self.steps[-1]
        return (
            f"tokens_per_second={self.tokens_per_second:.3f}, median_step={self.median:.3f}, "
            f"peak_memory={self.peak_memory:.3f}, last_loss={last.loss:.4f}, "
            f"last_gradient_norm={figure(last.gradient_norm, 4)}"
        )

    def as_dict(self) -> dict[str, Any]:
        steps = [asdict(s) | {"loss": _finite(s.loss), "gradient_norm": _finite(s.gradient_norm)} for s in self.steps]
        return {"steps": steps, "averages": self.averages()} | self.rest()


class Report(Run):
    """A finished run."""

    kind = "train"

    def as_dict(self, command: str) -> dict[str, Any]:
        return super().as_dict(command) | {"disagreements": self.disagreements()}

    def disagreements(self) -> list[str]:
        """A line for each implementation whose losses or last gradients are not the base's, or not finite."""
        loss_tolerance, norm_tolerance = TOLERANCES[self.arguments["dtype"]]
        base = self.base
        lines: list[str] = []
        for result in (result for result in self.results if result.done and base.done):
            losses = [(s.loss, b.loss) for s, b in zip(result.steps, base.steps)]
            last, base_last = result.steps[-1], base.steps[-1]
            norms = [(last.gradient_norm, base_last.gradient_norm)] if last.gradient_norm is not None else []
            for what, pairs, tolerance in (("loss", losses, loss_tolerance), ("gradient", norms, norm_tolerance)):
                lines += _apart(result.attn, base.attn, what, pairs, tolerance)
        return lines

    def comparison(self) -> str:
        """A table of the implementations, with ratios to the base."""
        against = f"/ {self.base.attn}"
        head = ["attention", "tokens/s", against, "median step", against, "peak_memory", "last loss", "gradient norm"]
        rows = []
        for r in self.results:
            speed, median, memory, loss, norm = r.averages().values()
            rows.append([r.attn, figure(speed), ratio(speed, self.base.tokens_per_second), figure(median)])
            rows[-1] += [ratio(median, self.base.median), figure(memory), figure(loss, 4), figure(norm, 4)]
        return table(head, rows)


def _apart(name: str, base: str, what: str, pairs: list[tuple[float, Any]], tolerance: float) -> Iterator[str]:
    wrong = next((found for found, _ in pairs if not math.isfinite(found)), None)
    if wrong is not None:
        yield f"{what} of {name} is {wrong}"
        return
    far = max((abs(found - expected) / max(abs(expected), 1e-12) for found, expected in pairs), default=0.0)
    if not far <= tolerance:
        yield f"{what} of {name} and of {base} lie {far:.1e} apart, expected at most {tolerance:.0e}"


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None
