"""What moved between two result files by more than the noise of their trials:

    python -m benchmarks.compare OLD.json NEW.json [--least RATIO]

For files of `fastattn sweep`, `fastattn benchmark`, `benchmarks.forward`, `benchmarks.train` and others with trials. A
figure moved when its middle trials do not meet (first to third quartile; all trials where they are fewer than five),
and its median changed by more than RATIO. A file without trials says so: its figures count as exact.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.bench.timing import quartiles
from fastattn.cli.arguments import path_of
from fastattn.common.printable import printable
from fastattn.common.table import table

from .command import end
from .report.reading import load, reading

LEAST = 0.02  #: a change up to which a figure counts as the same, whatever its trials say
FEW = 5  #: trials below which all of them are its noise
TIMES = ("us", "cold", "hot", "host")  #: keys of figures in microseconds
RATES = ("tps", "tokens_per_second")  #: ends of the names of figures of which more is better


@dataclass(frozen=True)
class Figure:
    """A figure with its noise."""

    value: float
    low: float
    high: float
    more_is_better: bool = False
    has_trials: bool = True

    @staticmethod
    def of(trials: Sequence[float], more_is_better: bool = False) -> Figure:
        """The median of some trials, with their quartiles or, of few, the whole range."""
        middle = statistics.median(trials)
        if len(trials) < FEW:
            return Figure(middle, min(trials), max(trials), more_is_better, len(trials) > 1)
        return Figure(middle, *quartiles(trials), more_is_better)

    def moved(self, new: Figure, least: float) -> bool:
        """Whether another run's figure differs by more than both runs' noise."""
        apart = new.low > self.high or new.high < self.low
        return apart and abs(new.value - self.value) > least * min(abs(self.value), abs(new.value))


@dataclass(frozen=True)
class Comparison:
    """What two result files say of the same figures."""

    moved: list[tuple[str, Figure, Figure]]  #: the largest change first
    same: int
    only_old: list[str]
    only_new: list[str]
    without_trials: int  #: figures of either file

    @property
    def worse(self) -> int:
        return sum(is_worse(old, new) for _, old, new in self.moved)


def is_worse(old: Figure, new: Figure) -> bool:
    return (new.value < old.value) == old.more_is_better


def compare(old: dict[str, Any], new: dict[str, Any], least: float = LEAST) -> Comparison:
    """Compares two result files of one kind. Raises ValueError for two kinds."""
    check_kinds(old, new)
    before, after = dict(figures(old)), dict(figures(new))
    both = [name for name in before if name in after]
    moved = [(name, before[name], after[name]) for name in both if before[name].moved(after[name], least)]
    moved.sort(key=lambda item: -_change(item[1], item[2]))
    bare = sum(not x.has_trials for found in (before, after) for x in found.values())
    only_old, only_new = [name for name in before if name not in after], [name for name in after if name not in before]
    return Comparison(moved, len(both) - len(moved), only_old, only_new, bare)


def check_kinds(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ValueError for files of two kinds."""
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(f"NEW.json: expected a file of {old['benchmark']!r} as OLD.json, got {new['benchmark']!r}")


def _change(old: Figure, new: Figure) -> float:
    """How many times one is the other, from 1 upwards."""
    low, high = sorted((abs(old.value), abs(new.value)))
    return high / low if low else float("inf")


def figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every figure of a result file, by a name: wherever there are microseconds, and the trials of models."""
    for name, entry in data.get("implementations", {}).items():  # a model: trials, or steps in training
        runs = entry.get("trials") or entry.get("steps") or []
        for key in runs[0] if runs else ():
            values = [run[key] for run in runs if isinstance(run.get(key), int | float)]
            if values and (key.endswith(RATES) or key == "peak_memory"):
                yield f"{name}, {key}", Figure.of(values, key.endswith(RATES))
    for section, rows in _sections(data):
        for label, row in rows:
            yield from _times(f"{section}{label}", row, {})


def _sections(data: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(section, its rows by label), of both forms of result files."""
    rows = data.get("rows")
    if isinstance(rows, dict):
        yield "", [(name, row) for name, row in rows.items() if isinstance(row, dict)]
    sections = data.get("sections")
    if isinstance(sections, dict):
        for name, found in sections.items():
            yield f"{name}: ", [(str(row.get("label", i)), row) for i, row in enumerate(found) if isinstance(row, dict)]


_SILENT = ("contenders", "implementations", "times")  #: keys that say nothing in a figure's name


def _times(name: str, value: dict[str, Any], quarters: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Microseconds below a row. quarters: the quartiles of the figures beside, where a file keeps them apart."""
    beside = value.get("quarters", {})
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in ("quarters", "checks", "case", "call"):
            below = name if key in _SILENT else f"{name}, {key}"
            found = beside if key in _SILENT else quarters.get(key, {})
            yield from _times(below, inner, found if isinstance(found, dict) else {})
        elif key in TIMES and isinstance(inner, int | float):
            whole = (value.get("min_us"), value.get("max_us")) if key == "us" else (None, None)
            ends: Any = value.get("quarters_us") or quarters.get(key) or whole
            bare = ends[0] is None or ends[1] is None
            figure = Figure(inner, inner, inner, False, False) if bare else Figure(inner, *ends)
            yield name if key == "us" else f"{name}, {key}", figure


def text_of(found: Comparison) -> str:
    """A comparison for a terminal."""
    lines = []
    if found.moved:
        rows = [
            [name, _shown(old), _shown(new), f"{new.value / old.value:.2f}x" if old.value else "-",
             "worse" if is_worse(old, new) else "better"]
            for name, old, new in found.moved
        ]  # fmt: skip
        lines.append(table(["", "old", "new", "new/old", ""], rows))
    better = len(found.moved) - found.worse
    lines.append(f"{found.worse} worse, {better} better, {found.same} the same")
    for text, names in (("only in OLD", found.only_old), ("only in NEW", found.only_new)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{text}: {'; '.join(names[:5])}{more}")
    if found.without_trials:
        lines.append(f"{found.without_trials} figures have no trials: they count as exact")
    return "\n".join(lines)


def _shown(figure: Figure) -> str:
    middle = f"{figure.value:.4g}"
    return f"{middle} ({figure.low:.4g}..{figure.high:.4g})" if figure.has_trials else middle


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=path_of, metavar="OLD.json")
    parser.add_argument("new", type=path_of, metavar="NEW.json")
    parser.add_argument("--least", type=float, default=LEAST, metavar="RATIO", help="a smaller change is none (0.02)")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not 0 <= arguments.least < math.inf:
        raise ValueError(f"--least: expected a number of 0 or more, got {arguments.least}")
    old, new = load(arguments.old), load(arguments.new)
    check_kinds(old, new)
    for key in ("gpu", "driver", "torch", "cudnn", "triton", "commit"):
        was, now = old["environment"].get(key), new["environment"].get(key)
        if was != now:
            print(printable(f"{key}: {was} -> {now}"))
    with reading(f"{arguments.old}, {arguments.new}"):
        found = compare(old, new, arguments.least)
    print(text_of(found))  # of texts that `load` has made printable
    return 0


if __name__ == "__main__":
    end(main)
