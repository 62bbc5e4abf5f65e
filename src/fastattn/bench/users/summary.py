"""What the list came to: the ratio of a row, its line, and one sentence about all rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import contenders

NEAR = 1.02  #: a ratio up to which fastattn counts as best
Entry = dict[str, Any]
KINDS = {"ratio": "captured", "eager_ratio": "eager"}


def us_of(entry: Entry, kind: str) -> float | None:
    """Microseconds of a contender, or None without a time or when it is wrong; kind: a key of `KINDS`."""
    if "failed" in entry or "refused" in entry:
        return None
    return entry.get("us") if kind == "ratio" else entry.get("eager", {}).get("us")


def best_peer(row: Entry, kind: str) -> tuple[str, float] | None:
    """The quickest peer that is right, and its microseconds."""
    times = {
        name: us
        for name, entry in row["contenders"].items()
        if name not in contenders.OURS and (us := us_of(entry, kind)) is not None
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def ratios(row: Entry) -> Entry:
    """What follows from a row's times: "best_peer" and "ratio" (None without a peer), and the same of eager calls."""
    found: Entry = {}
    ours = row["contenders"].get("fastattn", {})
    for kind, text in KINDS.items():
        us, peer = us_of(ours, kind), best_peer(row, kind)
        found["best_peer" if kind == "ratio" else f"best_peer_{text}"] = peer[0] if peer else None
        found[kind] = round(us / peer[1], 4) if us and peer else None
    return found


def has_failed(row: Entry) -> bool:
    """Whether fastattn gave no right result, or none at all."""
    ours = row["contenders"].get("fastattn", {})
    return "failed" in row or "failed" in ours or "refused" in ours


def of(rows: Mapping[str, Entry]) -> Entry:
    """Of all rows that were measured: how many there are, in how many fastattn is best or near it, and the worst."""
    measured = {name: row for name, row in rows.items() if row["contenders"] or "failed" in row}
    found: Entry = {"rows": len(measured), "failed": sum(map(has_failed, measured.values()))}
    for kind, text in KINDS.items():
        timed = {
            name: row
            for name, row in measured.items()
            if not has_failed(row) and us_of(row["contenders"].get("fastattn", {}), kind) is not None
        }
        compared = {name: row[kind] for name, row in timed.items() if row.get(kind) is not None}
        worst = max(compared, key=lambda name: compared[name], default=None)
        found[text] = {
            "timed": len(timed),
            "alone": len(timed) - len(compared),  # no peer can do it
            "near": len(timed) - sum(ratio > NEAR for ratio in compared.values()),
            "worst": None if worst is None else {"row": worst, "ratio": compared[worst]},
        }
    return found


def sentence(summary: Entry) -> str:
    """The one line at the end."""
    parts = [f"{summary['rows']} rows"]
    for text in KINDS.values():
        figures = summary[text]
        if not figures["timed"]:
            continue
        worst = figures["worst"]
        part = f"{text}: best or within {NEAR - 1:.0%} in {figures['near']} of {figures['timed']}"
        part += f" ({figures['alone']} without a peer)" if figures["alone"] else ""
        parts.append(part + (f", worst {worst['ratio']:.2f} ({worst['row']})" if worst else ""))
    return "; ".join([*parts, f"{summary['failed']} failed"])


def line(name: str, row: Entry) -> str:
    """A row: microseconds captured/eager/host and the error of each contender, the ratios last."""
    for word in ("failed", "left_out"):
        if word in row:
            return f"{name:28} {word.replace('_', ' ')}: {row[word]}"
    cells = []
    for who, entry in row["contenders"].items():
        if "refused" in entry:
            continue
        if "failed" in entry:
            cells.append(f"{who} {entry['failed'][:60]}")
            continue
        times = [entry.get("us"), entry.get("eager", {}).get("us"), entry.get("host", {}).get("us")]
        figures = "/".join(number(us) for us in times if us is not None)
        worst = max(entry.get("error", 0.0), entry.get("gradient_error", 0.0))
        cells.append(f"{who} {figures} ({worst:.0e})".replace("  ", " "))
    shown = [f"{text} {row[kind]:.2f}" for kind, text in KINDS.items() if row.get(kind) is not None]
    return f"{name:28} " + ", ".join(cells) + (f": {', '.join(shown)}" if shown else "")


def number(us: float) -> str:
    """Microseconds in three digits."""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"
