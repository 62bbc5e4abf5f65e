"""What a report shows of a result file, as data: charts and tables, from nothing but the file's own figures.

`plots.py` draws the charts, the templates show both.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..case import Case

Row = dict[str, Any]

#: Implementations as people know them.
TITLES = {
    "fastattn": "fastattn",
    "fastattn-any": "fastattn, dynamic plan",
    "fastattn-exact": "fastattn, static plan",
    "torch-cudnn": "torch cuDNN",
    "torch-flash": "torch flash",
    "torch-efficient": "torch efficient",
    "torch-math": "torch math",
    "flex": "torch flex_attention",
    "flash-attn": "flash-attn 2",
    "flash-attn-4": "flash-attn 4",
    "flashinfer": "FlashInfer",
    "xformers": "xFormers",
    "mlx": "MLX",
}
LEAST_POINTS = 3  #: of a line
MOST_ROWS, MOST_COLUMNS = 1000, 100  #: a file with more would take hours or all memory, and is none of ours
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def title_of(name: str) -> str:
    """How a report calls an implementation."""
    return TITLES.get(name, name)


@dataclass(frozen=True)
class Series:
    """One implementation in a chart."""

    name: str  #: as in the file: it fixes the colour
    points: list[tuple[float, float]]  #: (x, y); in bars x is the number of the category


@dataclass(frozen=True)
class Chart:
    """One picture."""

    slug: str  #: names its file: letters, digits, points, hyphens and underscores
    title: str
    sentence: str  #: what it shows, and which way is better
    kind: str  #: "lines", "bars", or "pairs" (the first call filled, the second hollow)
    x: str
    y: str
    series: list[Series]
    categories: list[str] = field(default_factory=list)  #: of bars
    roof: tuple[str, float] | None = None  #: a line that nothing can pass: what it is, and where
    log: bool = True  #: of y; x is logarithmic in lines

    def __post_init__(self) -> None:
        """What a result file calls its sections leads to no other folder, and ends no tag and no link."""
        object.__setattr__(self, "slug", _NO_NAME.sub("-", self.slug).strip(".-")[:100] or "chart")


@dataclass(frozen=True)
class Table:
    """Figures as text. A cell that starts with `*` is the best of its row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    sentence: str = ""


@dataclass
class Section:
    """What a report says of one file."""

    name: str  #: the file's
    title: str
    about: str  #: one paragraph for somebody who knows nothing of it
    command: str
    date: str
    environment: dict[str, Any]
    findings: list[str] = field(default_factory=list)  #: one line each, computed from the figures
    parts: list[Chart | Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  #: method, and what could not be measured and why

    @property
    def charts(self) -> list[Chart]:
        return [part for part in self.parts if isinstance(part, Chart)]

    @property
    def caption(self) -> str:
        """Machine, versions, commit and day, in one line."""
        e = self.environment
        versions = [
            f"{name} {e[key]}"
            for name, key in (("torch", "torch"), ("cuDNN", "cudnn"), ("Triton", "triton"))
            if e.get(key)
        ]
        commit, _, changed = str(e.get("commit") or "").partition("-")
        versions += [f"commit {commit[:10]}{' with changes' if changed else ''}"] if commit else []
        return f"{e.get('gpu') or e.get('cpu') or 'unknown machine'}, {', '.join(versions)}, {self.date[:10]}"

    @property
    def facts(self) -> dict[str, str]:
        """The environment in words, without what is not there."""
        facts: dict[str, Any] = {"date": self.date, "command": self.command, **self.environment}
        return {key.replace("_", " "): str(value) for key, value in facts.items() if value not in (None, {}, "")}


def few_columns(head: list[str]) -> list[str]:
    """The head of a table, if it is one that can be read. Raises ValueError."""
    if len(head) > MOST_COLUMNS:
        raise ValueError(f"expected at most {MOST_COLUMNS} columns, got {len(head)}")
    return head


def times(row: Row) -> dict[str, float]:
    """Microseconds by implementation, of those that were measured."""
    return {name: entry["us"] for name, entry in row.get("implementations", {}).items() if "us" in entry}


def ours(names: Iterable[str]) -> str | None:
    """The implementation that is held against the others: fastattn as it runs by default, if it is there."""
    found = sorted(name for name in names if name.startswith("fastattn"))
    return found[0] if found else None


def against_others(row: Row) -> float | None:
    """Our time over the best of the others, or None."""
    found = times(row)
    mine = ours(found)
    others = [us for name, us in found.items() if not name.startswith("fastattn")]
    return found[mine] / min(others) if mine and others else None


def case_of(row: Row) -> tuple[Case, str] | None:
    """A row's call and what was timed of it, or None where it is about something else."""
    found = row.get("case")
    return (Case.of(found), str(found.get("kind", "inference"))) if found else None


def lines_and_rest(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that differ in length alone, if they are enough for a line, and the others."""
    if len(rows) > MOST_ROWS:
        raise ValueError(f"expected at most {MOST_ROWS} rows in a section, got {len(rows)}")
    families: dict[Any, list[Row]] = {}
    for row in rows:
        found = case_of(row)
        if found is None or not times(row):
            continue
        case, kind = found
        square = case.q_len == case.kv_len
        plain = not (case.lengths or case.padding or case.packed)
        key = (square or case.q_len, case.batch, case.q_heads, case.kv_heads, case.dim, case.left, case.sinks, kind)
        families.setdefault((key, case.additive, case.softcap) if plain else id(row), []).append(row)
    longest = max(families.values(), key=len, default=[])
    line = longest if len({row["case"]["kv_len"] for row in longest}) >= LEAST_POINTS else []
    return line, [row for row in rows if not any(row is other for other in line) and times(row)]


def over_length(
    slug: str,
    title: str,
    sentence: str,
    y: str,
    rows: Sequence[Row],
    value: Callable[[Row, str], float],
    roof: tuple[str, float] | None = None,
    log: bool = True,
) -> Chart:
    """A line for each implementation over the number of keys."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in times(row):
            found.setdefault(name, []).append((row["case"]["kv_len"], value(row, name)))
    series = [Series(name, sorted(points)) for name, points in found.items()]
    return Chart(slug, title, sentence, "lines", "keys (tokens)", y, series, roof=roof, log=log)


def relative_bars(slug: str, title: str, sentence: str, rows: Sequence[Row]) -> Chart:
    """Times over ours, a group of bars for each row."""
    found: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(rows):
        measured = times(row)
        base = measured[ours(measured) or min(measured, key=lambda name: measured[name])]
        for name, us in measured.items():
            found.setdefault(name, []).append((i, us / base))
    series = [Series(name, points) for name, points in found.items()]
    labels, common = short_labels([str(row["label"]) for row in rows])
    sentence += f" All of them: {common}." if common else ""
    return Chart(slug, title, sentence, "bars", "", "time / fastattn's time", series, labels, ("fastattn", 1.0))


def short_labels(labels: Sequence[str]) -> tuple[list[str], str]:
    """Labels without the words that all of them have, and those words."""
    words = [label.split() for label in labels]
    common = [word for word in words[0] if all(word in other for other in words)] if len(labels) > 1 else []
    short = [" ".join(word for word in found if word not in common) for found in words]
    return (short, " ".join(common)) if all(short) else (list(labels), "")


def tflops(row: Row, name: str) -> float:
    """TFLOP/s of the pairs of query and key that see one another."""
    case, kind = case_of(row) or (None, "")
    assert case is not None
    return case.useful_flops(kind) / times(row)[name] / 1e6


def gigabytes(row: Row, name: str) -> float:
    """GB/s of the keys and values that are seen."""
    case, _ = case_of(row) or (None, "")
    assert case is not None
    return case.kv_bytes / times(row)[name] / 1e3


def times_table(title: str, rows: Sequence[Row], sentence: str) -> Table:
    """Microseconds of a section: a row per call, a column per implementation; beside them figures, ratios, errors."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("implementations", {})))
    keys = {
        part: list(dict.fromkeys(key for row in rows for key in row.get(part, {}))) for part in ("figures", "ratios")
    }
    checked = any("relative_error" in e for row in rows for e in row.get("implementations", {}).values())
    ratios = [f"time {key}" if key.startswith("/") else key for key in keys["ratios"]]
    head = few_columns(["call", *(f"{title_of(name)}, µs" for name in names), *keys["figures"], *ratios])
    lines = []
    for row in rows:
        found = times(row)
        best = min(found.values(), default=None)
        cells = [_time(row, name, best) for name in names]
        cells += [number(row.get("figures", {}).get(key)) for key in keys["figures"]]
        cells += [f"{value:.2f}x" if (value := row.get("ratios", {}).get(key)) else "-" for key in keys["ratios"]]
        errors = [e["relative_error"] for e in row.get("implementations", {}).values() if e.get("relative_error")]
        cells += [f"{max(errors):.1e}" if errors else "-"] if checked else []
        lines.append([title_of(str(row["label"])), *cells])
    return Table(title, [*head, *(["largest relative error"] if checked else [])], lines, sentence)


def _time(row: Row, name: str, best: float | None) -> str:
    entry = row.get("implementations", {}).get(name)
    if entry is None:
        return "-"
    if "us" in entry:
        return ("*" if entry["us"] == best else "") + number(entry["us"])
    if "wrong result" in entry.get("error", ""):
        return "wrong"
    return "cannot" if "refused" in entry or "No available kernel" in entry.get("error", "") else "failed"


def first_calls(rows: Iterable[Row]) -> Table | None:
    """How long each implementation's first call took, with all that it compiled or built."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for name, entry in row.get("implementations", {}).items():
            if "first_ms" in entry:
                found.setdefault(name, []).append((entry["first_ms"], str(row["label"])))
    lines = []
    for name, calls in found.items():
        worst, where = max(calls)
        middle = statistics.median(ms for ms, _ in calls)
        lines.append([title_of(name), number(len(calls)), number(middle), number(worst), where])
    text = "The first call of each row above, with all that is compiled or built in it; no other table has that in it."
    head = ["implementation", "rows", "median, ms", "worst, ms", "the worst at"]
    return Table("first calls", head, lines, text) if lines else None


def why_not(rows: Iterable[Row]) -> list[str]:
    """Each implementation that did not do some calls: the reason, and which calls."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            found.setdefault(str(row["error"]), []).append(row["label"])
        for name, entry in row.get("implementations", {}).items():
            if "us" not in entry:
                text = entry.get("refused") or entry.get("error", "")
                found.setdefault(f"{title_of(name)}: {text}", []).append(row["label"])
    return [f"{text} ({'; '.join(labels)})" for text, labels in found.items()]


def number(value: Any) -> str:
    """A figure in four digits at the most that say something; what is no number as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6 and not isinstance(value, int):
        return f"{value:.2e}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
