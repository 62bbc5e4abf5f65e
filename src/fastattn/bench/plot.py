"""The picture of `fastattn sweep --plot FILE`: a panel per section, a group of bars per call, as long as its times."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg", "pdf")


def check(path: str) -> None:
    """Raises ValueError for a file that is no picture, ImportError without matplotlib: before a long run."""
    if Path(path).suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"--plot: expected a file that ends in .{', .'.join(FORMATS)}, got {path}")
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'fastattn[bench]'") from error


def drawn(found: dict[str, Any], path: str) -> bytes:
    """A sweep's times as a picture, in the format that the path's suffix names."""
    sections = {
        name: [row for row in rows if any("us" in entry for entry in row.get("implementations", {}).values())]
        for name, rows in found["sections"].items()
    }
    sections = {name: rows for name, rows in sections.items() if rows}
    names = list(dict.fromkeys(n for rows in sections.values() for row in rows for n in row["implementations"]))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure = import_module("matplotlib.figure").Figure(layout="constrained")
    bars = [sum(len(row["implementations"]) + 1 for row in rows) for rows in sections.values()]
    figure.set_size_inches(9, 1.5 + 0.2 * sum(bars) + 0.6 * len(bars))
    panels = figure.subplots(max(1, len(bars)), squeeze=False, height_ratios=bars or None)[:, 0]
    for axes, (section, rows) in zip(panels, sections.items()):
        place = 0
        for row in rows:
            axes.text(0, place, f" {row['label']}", va="center", fontsize=7)
            longest = max(entry.get("us", 0.0) for entry in row["implementations"].values())
            for name, entry in row["implementations"].items():
                place += 1
                if "us" in entry:
                    bar = axes.barh(place, entry["us"] / longest, color=colours[name], height=0.9)
                    axes.bar_label(bar, fmt=f" {name} {entry['us']:.4g} µs", fontsize=6)
            place += 1
        axes.set(title=section, xticks=[], yticks=[], xlim=(0, 1.25), ylim=(place, -1))
    figure.suptitle(f"{found['command']}: {found['environment']['gpu'] or 'CPU'}")
    out = io.BytesIO()
    figure.savefig(out, format=Path(path).suffix[1:], dpi=120)
    return out.getvalue()
