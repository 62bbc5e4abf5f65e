"""What a report shows, as data: sections of charts and tables. `plots.py` draws the charts, the templates show all."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

#: Implementations as people know them, and their colours in pictures: ours strong, torch's in one family. Other names
#: are shown as they are, in the colours left over.
KNOWN = {
    "fastattn": ("fastattn", "#c2410c"),
    "fastattn-dynamic": ("fastattn, dynamic plan", "#f59e0b"),
    "fastattn-static": ("fastattn, static plan", "#7c2d12"),
    "torch": ("torch", "#2563eb"),
    "torch-varlen": ("torch varlen", "#0e7490"),
    "torch-plain": ("torch, plain operations", "#cbd5e1"),
    "torch-cudnn": ("torch cuDNN", "#1d4ed8"),
    "torch-flash": ("torch flash", "#0891b2"),
    "torch-efficient": ("torch efficient", "#60a5fa"),
    "torch-math": ("torch math", "#94a3b8"),
    "flex": ("torch flex_attention", "#7c3aed"),
    "flash-attn": ("flash-attn 2", "#15803d"),
    "flash-attn-4": ("flash-attn 4", "#4d7c0f"),
    "flashinfer": ("FlashInfer", "#be185d"),
    "xformers": ("xFormers", "#a16207"),
    "mlx": ("MLX", "#334155"),
    "sdpa": ("sdpa", "#1d4ed8"),
    "eager": ("eager", "#94a3b8"),
}
MOST_COLUMNS = 100  #: a file with more would take all memory, and is none of ours
Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Chart:
    """One picture."""

    slug: str  #: names its file: letters, digits, points, hyphens and underscores
    title: str
    sentence: str  #: what it shows, and which direction is better
    kind: str  #: "lines", "bars", or "pairs" (NAME|first filled, NAME|second hollow)
    x: str
    y: str
    series: Points  #: (x, y) by implementation; in bars x is the number of the category
    categories: tuple[str, ...] = ("",)  #: of bars
    roof: tuple[str, float] | None = None  #: a line that nothing can pass: what it is, and where
    log: bool = False  #: of y; x is logarithmic in lines and pairs

    def __post_init__(self) -> None:
        """What a result file calls its sections leads to no other folder, and ends no tag and no link."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", self.slug).strip(".-")[:100]
        object.__setattr__(self, "slug", slug or "chart")


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
    about: str  #: one paragraph for a reader who knows nothing of it
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
        known = (("torch", "torch"), ("cuDNN", "cudnn"), ("Triton", "triton"))
        versions = [f"{name} {e[key]}" for name, key in known if e.get(key)]
        commit, _, changed = str(e.get("commit") or "").partition("-")
        versions += [f"commit {commit[:10]}{' with changes' if changed else ''}"] if commit else []
        return f"{e.get('gpu') or e.get('cpu') or 'unknown machine'}, {', '.join(versions)}, {self.date[:10]}"

    @property
    def facts(self) -> dict[str, str]:
        """The environment in words, without what is not there."""
        facts: dict[str, Any] = {"date": self.date, "command": self.command, **self.environment}
        return {key.replace("_", " "): str(value) for key, value in facts.items() if value not in (None, {}, "")}


def title_of(name: str) -> str:
    """How a report calls an implementation."""
    return KNOWN[name][0] if name in KNOWN else name


def few_columns(head: list[str]) -> list[str]:
    """The head of a table, if it is one that can be read. Raises ValueError."""
    if len(head) > MOST_COLUMNS:
        raise ValueError(f"expected at most {MOST_COLUMNS} columns, got {len(head)}")
    return head


def number(value: Any) -> str:
    """A figure in four digits at the most that say something; what is no number as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6 and not isinstance(value, int):
        return f"{value:.2e}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
