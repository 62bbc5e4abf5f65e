"""The report of `fastattn sweep users`: a table for each kind of user, and the page that says what to choose."""

from __future__ import annotations

from typing import Any

from fastattn.bench.users.summary import NEAR, has_failed, of, sentence, us_of

from .data import Section, Table, few_columns, number, title_of

Row = dict[str, Any]
HEAD = ("call", "best peer", "fastattn, eager, µs", "its host, µs", "best peer, eager, µs", "its host, µs")


def fill(report: Section, data: dict[str, Any]) -> None:
    """Fills the section of a result file."""
    rows: dict[str, Row] = data["rows"]
    report.findings.append(f"{sentence(of(rows))}.")
    for who, found in sections(rows).items():
        report.parts.append(_captured(who, found))
        report.parts.append(_eager(f"{who}, as Python calls it", found))
    report.notes += [f"how ({key}): {text}" for key, text in data.get("method", {}).items()]
    report.notes += [f"{title_of(name)} was not measured: {why}" for name, why in data.get("absent", {}).items()]
    if data.get("complete") is False:
        report.notes.append("The run was cut: rows are missing.")
    for name, row in rows.items():
        report.notes += [f"{name}: {row['failed']}"] if "failed" in row else []
        for who, entry in row["contenders"].items():
            why = entry.get("failed")
            report.notes += [f"{name}, {title_of(who)}: {why}"] if why else []


def sections(rows: dict[str, Row]) -> dict[str, dict[str, Row]]:
    """The rows by whose calls they are."""
    found: dict[str, dict[str, Row]] = {}
    for name, row in rows.items():
        found.setdefault(str(row["who"]), {})[name] = row
    return found


def _captured(title: str, rows: dict[str, Row]) -> Table:
    names = list(dict.fromkeys(who for row in rows.values() for who in row["contenders"]))
    names = [who for who in names if any(us_of(row["contenders"].get(who, {}), "ratio") for row in rows.values())]
    lines = []
    for name, row in rows.items():
        times = {who: us_of(row["contenders"].get(who, {}), "ratio") for who in names}
        best = min((us for us in times.values() if us), default=None)
        cells = [_time(row["contenders"].get(who, {}), us, best) for who, us in times.items()]
        lines.append([name, *cells, ratio(row.get("ratio"))])
    head = few_columns(["call", *(f"{title_of(who)}, µs" for who in names), "ratio"])
    text = (
        "Microseconds of the GPU per call in a CUDA graph, in brackets the relative error (of training rows the "
        "largest one of output and gradients); the best of each row is bold. Ratio: fastattn's time over that of the "
        "best peer."
    )
    return Table(title, head, lines, text)


def _time(entry: Row, us: float | None, best: float | None) -> str:
    if us is None:
        return "cannot" if "refused" in entry else "failed" if "failed" in entry else "-"
    error = max(entry.get("error", 0.0), entry.get("gradient_error", 0.0))
    return f"{'*' if us == best else ''}{number(us)} ({error:.0e})"


def _eager(title: str, rows: dict[str, Row]) -> Table:
    lines = [[name, *eager_cells(row), ratio(row.get("eager_ratio"))] for name, row in rows.items()]
    text = "Microseconds until the call is done, and of them those in which the host launches it; no CUDA graph."
    return Table(title, [*HEAD, "ratio"], lines, text)


def eager_cells(row: Row) -> list[str]:
    """The best peer, and the eager and the host's microseconds of fastattn and of that peer."""
    peer = row.get("best_peer_eager")
    cells = [title_of(peer) if peer else "none"]
    for who in ("fastattn", peer):
        entry = row["contenders"].get(who, {})
        cells += [number(entry.get(key, {}).get("us")) for key in ("eager", "host")]
    return cells


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def is_slower(row: Row, kind: str) -> bool:
    """Whether a peer is quicker by more than what counts as near; kind: "ratio" or "eager_ratio"."""
    return not has_failed(row) and (row.get(kind) or 0.0) > NEAR
