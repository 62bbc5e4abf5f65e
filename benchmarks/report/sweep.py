"""The report of a sweep: its sections as lines over the length, bars against fastattn, stalls and tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from fastattn.bench.case import Case

from .data import Chart, Points, Section, Table, few_columns, number, title_of

Row = dict[str, Any]

#: What a section of a result file is about.
ABOUT = {
    "prefill": "A whole prompt at once, under a causal mask: what a model does before its first new token.",
    "chunks over a cache": "A part of a prompt against a cache that already holds the rest.",
    "decode": "One new token per sequence against a long cache: what a model does for every token it writes.",
    "few queries": "A few new tokens at once against a long cache, as speculative decoding needs.",
    "training": "Forward and backward together, batch of 2.",
    "masks": "Batches with left padding, sequences packed side by side, an additive mask (a random bias), and a decode "
    "step whose sequences differ in length.",
    "windows, sinks, softcap": "Sliding windows, attention sinks (a further logit per head in the softmax: gpt-oss), "
    "and scores that a tanh keeps within a cap (Gemma 2).",
    "fresh lengths": "Prompt lengths that the process had not seen: whatever a library builds for a length, its caller "
    "waits for in the first call.",
    "roof": "What this machine could do at most, measured in the same run: copying memory, and a large matrix product.",
    "causal forward": "A whole prompt at once, under a causal mask.",
    "causal backward": "Gradients of q, k and v, batch of 2.",
    "host": "What a call costs the host (Python and launches), not the GPU.",
    "first call": "The first calls of a new process, in milliseconds.",
    "one query": "One new token per sequence against a long cache: what a model does for every token it writes.",
    "forward": "The forward of a training step.",
    "backward": "The backward alone.",
}
_MEMORY = ("decode", "few queries", "one query")  #: bound by reading K and V: their rate is bytes
LEAST_POINTS = 3  #: of a line
MOST_ROWS = 1000  #: a section with more would take hours, and is none of ours


def fill(report: Section, data: dict[str, Any]) -> None:
    """Fills the section of a sweep's result file."""
    sections: dict[str, list[Row]] = data["sections"]
    roofs = dict(sections.get("roof", [{}])[0].get("figures", {}))
    reads = [row["read"] for rows in sections.values() for row in rows if "us" in row.get("read", {})]
    if reads and "copy GB/s" not in roofs:  # the decode sweep copies the bytes of K and V in every row
        roofs["copy GB/s"] = max(read["bytes"] / read["us"] / 1e3 for read in reads)
    for name, rows in sections.items():
        _add(report, name, rows, roofs)
    report.parts += _first_calls(row for rows in sections.values() for row in rows)
    for row in (row for row in sections.get("fresh lengths", []) if "calls" in row):
        figures = row["figures"]
        report.findings.append(
            f"a prompt length never seen before, {title_of(row['label'])}: first call "
            f"{figures['first median_ms']:.2f} ms (worst {figures['first worst_ms']:.2f}), second "
            f"{figures['second median_ms']:.2f} ms"
        )
    report.notes[:0] = [f"how ({key}): {text}" for key, text in data.get("method", {}).items()]
    if data.get("left_out"):
        report.notes.append(f"left out, they need a GPU: {', '.join(data['left_out'])}")
    peers = data.get("peers", {})
    there = [f"{title_of(name)} {version}" for name, version in peers.items() if version]
    absent = [title_of(name) for name, version in peers.items() if version is None]
    report.notes += [f"other packages that took part: {', '.join(there)}"] if there else []
    report.notes += [f"not installed, so not measured: {', '.join(absent)}"] if absent else []


def _add(report: Section, name: str, rows: list[Row], roofs: dict[str, float]) -> None:
    """The charts and the table of one section of a sweep."""
    about, slug = ABOUT.get(name, ""), f"{report.name}-{name.replace(',', '').replace(' ', '-')}"
    line, rest = lines_and_rest(rows)
    host = name == "host"
    if line:
        text, keys = f"{about} Lower is better.", "keys (tokens)"
        us = _over_length(line, lambda row, us: us)
        chart = Chart(f"{slug}-time", f"{name}: time of a call", text, "lines", keys, "µs per call", us, log=True)
        report.parts += [chart, _rate(f"{slug}-rate", name, line, roofs)]
    if rest and not host:
        report.parts.append(_bars(f"{slug}-bars", name, about, rest))
    if any("calls" in row for row in rows):
        report.parts.append(_stalls(f"{slug}-stalls", name, about, rows))
    report.parts.append(_table(name, rows, about, host))
    against = [x for x in map(_against_others, rows) if x is not None]
    if against and not host:
        span = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(against), max(against))))
        mine = title_of(_ours(key for row in rows for key in times(row)) or "")
        report.findings.append(f"{name}: {mine} takes {span} times what the best other takes")
    report.notes += [f"{name}: {text}" for text in _why_not(rows)]


# --- rows


def case_of(row: Row) -> Case:
    """The case that a row names; what it says beside is left out. Raises ValueError for what are no numbers."""
    names = {field.name for field in fields(Case)}
    given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in row["case"].items() if k in names}
    for key, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            if not isinstance(one, int | float | None):
                raise ValueError(f"case.{key}: expected numbers, got {one!r}")
    return Case(**given)


def times(row: Row) -> dict[str, float]:
    """Microseconds by implementation, of those that were measured."""
    return {name: entry["us"] for name, entry in row.get("implementations", {}).items() if "us" in entry}


def _ours(names: Iterable[str]) -> str | None:
    """The implementation that is compared with the others: fastattn as it runs by default, if it is there."""
    return min((name for name in names if name.startswith("fastattn")), default=None)


def _against_others(row: Row) -> float | None:
    """Our time over the best of the others, or None."""
    found = times(row)
    mine = _ours(found)
    others = [us for name, us in found.items() if not name.startswith("fastattn")]
    return found[mine] / min(others) if mine and others else None


def lines_and_rest(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that differ in length alone, if they are enough for a line, and the others."""
    if len(rows) > MOST_ROWS:
        raise ValueError(f"expected at most {MOST_ROWS} rows in a section, got {len(rows)}")
    families: dict[Any, list[Row]] = {}
    for row in rows:
        if not row.get("case") or not times(row):
            continue
        c, kind = case_of(row), str(row["case"].get("kind", "inference"))
        square = c.q_len == c.kv_len or c.q_len
        key = (square, c.batch, c.q_heads, c.kv_heads, c.dim, c.left, c.sinks, kind, c.additive, c.softcap)
        families.setdefault(id(row) if c.lengths or c.padding or c.packed else key, []).append(row)
    longest = max(families.values(), key=len, default=[])
    line = longest if len({row["case"]["kv_len"] for row in longest}) >= LEAST_POINTS else []
    return line, [row for row in rows if not any(row is other for other in line) and times(row)]


def short_labels(labels: Sequence[str]) -> tuple[list[str], str]:
    """Labels without the words that all of them have, and those words."""
    words = [label.split() for label in labels]
    common = [word for word in words[0] if all(word in other for other in words)] if len(labels) > 1 else []
    short = [" ".join(word for word in found if word not in common) for found in words]
    return (short, " ".join(common)) if all(short) else (list(labels), "")


def _why_not(rows: Iterable[Row]) -> list[str]:
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


# --- charts


def _over_length(rows: Sequence[Row], value: Callable[[Row, float], float]) -> Points:
    """A line for each implementation over the number of keys. value: what is drawn of a row's microseconds."""
    found: Points = {}
    for row in rows:
        for name, us in times(row).items():
            found.setdefault(name, []).append((row["case"]["kv_len"], value(row, us)))
    return {name: sorted(points) for name, points in found.items()}


def tflops(row: Row, us: float) -> float:
    """TFLOP/s of the pairs of query and key that see one another."""
    return case_of(row).useful_flops(str(row["case"].get("kind", "inference"))) / us / 1e6


def gigabytes(row: Row, us: float) -> float:
    """GB/s of the keys and values that are seen."""
    return case_of(row).kv_bytes / us / 1e3


def _rate(slug: str, name: str, line: list[Row], roofs: dict[str, float]) -> Chart:
    if name in _MEMORY:
        title, unit, value, key, roof = "memory rate", "GB/s of K and V", gigabytes, "copy GB/s", "copying memory"
        text = (
            "How fast the keys and values are read: the bytes that have to be read over the time. Higher is better; "
            "reading them cannot be faster than memory allows."
        )
    else:
        title, unit, value, key = "TFLOP/s", "TFLOP/s", tflops, "matmul TFLOP/s"
        roof = "a large matrix product"
        text = "Useful operations (pairs of query and key that see one another) per second. Higher is better."
    top, series = roofs.get(key), _over_length(line, value)
    ceiling = (roof, top) if top else None
    return Chart(slug, f"{name}: {title}", text, "lines", "keys (tokens)", unit, series, roof=ceiling)


def _bars(slug: str, name: str, about: str, rows: Sequence[Row]) -> Chart:
    """Times over ours, a group of bars for each row."""
    found: Points = {}
    for i, row in enumerate(rows):
        measured = times(row)
        base = measured[_ours(measured) or min(measured, key=lambda key: measured[key])]
        for key, us in measured.items():
            found.setdefault(key, []).append((i, us / base))
    labels, common = short_labels([str(row["label"]) for row in rows])
    text = (
        f"{about} Each bar is an implementation's time over fastattn's for the same call: longer than the dashed line "
        "is slower than fastattn."
    ).strip() + (f" All of them: {common}." if common else "")
    title, unit = f"{name}: time against fastattn", "time / fastattn's time"
    return Chart(slug, title, text, "bars", "", unit, found, tuple(labels), ("fastattn", 1.0))


def _stalls(slug: str, name: str, about: str, rows: list[Row]) -> Chart:
    series = {
        f"{row['label']}|{which}": sorted((call["length"], call[f"{which}_ms"]) for call in row["calls"])
        for row in rows
        if "calls" in row
        for which in ("first", "second")
    }
    text = f"{about} Filled: the first call at a length. Hollow: the second. The gap is the stall."
    return Chart(slug, f"{name}: first call against second", text, "pairs", "length (tokens)", "ms", series, log=True)


# --- tables


def _table(title: str, rows: list[Row], about: str, host: bool) -> Table:
    """Microseconds of a section: a row per call, a column per implementation; beside them figures, ratios, errors."""
    names, figures, ratios = (
        list(dict.fromkeys(key for row in rows for key in row.get(part, {})))
        for part in ("implementations", "figures", "ratios")
    )
    entries = [entry for row in rows for entry in row.get("implementations", {}).values()]
    head = ["call", *(f"{title_of(name)}, µs" for name in names), *figures]
    head += [f"time {key}" if key.startswith("/") else key for key in ratios]
    checked = any("relative_error" in entry for entry in entries)
    head += ["largest relative error"] if checked else []
    few_columns(head)
    lines = []
    for row in rows:
        best = min(times(row).values(), default=None)
        cells = [title_of(str(row["label"])), *(_time(row, name, best) for name in names)]
        cells += [number(row.get("figures", {}).get(key)) for key in figures]
        cells += [f"{value:.2f}x" if (value := row.get("ratios", {}).get(key)) else "-" for key in ratios]
        errors = [e["relative_error"] for e in row.get("implementations", {}).values() if e.get("relative_error")]
        cells += [f"{max(errors):.1e}" if errors else "-"] if checked else []
        lines.append(cells)
    if any(times(row) for row in rows):
        on_gpu = any(entry.get("method") in ("graph", "queue") for entry in entries)
        what = "Microseconds of the host" if host else "Microseconds of the GPU" if on_gpu else "Microseconds"
        about = f"{what} per call; the best of each row is bold."
        if "case" in rows[0]:
            about += " B: batch, Sq: queries, Skv: keys, a/b: query and K/V heads, D: head dim."
    return Table(title, head, lines, about)


def _time(row: Row, name: str, best: float | None) -> str:
    entry = row.get("implementations", {}).get(name)
    if entry is None:
        return "-"
    if "us" in entry:
        return ("*" if entry["us"] == best else "") + number(entry["us"])
    if "wrong result" in entry.get("error", ""):
        return "wrong"
    return "cannot" if "refused" in entry or "No available kernel" in entry.get("error", "") else "failed"


def _first_calls(rows: Iterable[Row]) -> list[Table]:
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
    return [Table("first calls", head, lines, text)] if lines else []
