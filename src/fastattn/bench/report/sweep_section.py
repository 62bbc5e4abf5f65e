"""The report of a sweep: its sections as lines over the length, bars against fastattn, stalls and tables."""

from __future__ import annotations

from typing import Any

from .charts import (
    Chart,
    Row,
    Section,
    Series,
    against_others,
    first_calls,
    gigabytes,
    lines_and_rest,
    ours,
    over_length,
    relative_bars,
    tflops,
    times,
    times_table,
    title_of,
    why_not,
)

#: What a section of a result file is about.
ABOUT = {
    "prefill": "A whole prompt at once, under a causal mask: what a model does before its first new token.",
    "chunks over a cache": "A part of a prompt against a cache that already holds the rest.",
    "decode": "One new token per sequence against a long cache: what a model does for every token it writes.",
    "few queries": "A few new tokens at once against a long cache, as speculative decoding asks for.",
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


def fill(report: Section, data: dict[str, Any]) -> None:
    sections: dict[str, list[Row]] = data["sections"]
    roofs = dict(sections.get("roof", [{}])[0].get("figures", {}))
    reads = [row["read"] for rows in sections.values() for row in rows if "us" in row.get("read", {})]
    if reads and "copy GB/s" not in roofs:  # the decode sweep copies the bytes of K and V in every row
        roofs["copy GB/s"] = max(read["bytes"] / read["us"] / 1e3 for read in reads)
    for name, rows in sections.items():
        about = ABOUT.get(name, "")
        slug = f"{report.name}-{name.replace(',', '').replace(' ', '-')}"
        line, rest = lines_and_rest(rows)
        host = name == "host"
        if line:
            sentence = f"{about} Lower is better."
            report.parts.append(
                over_length(
                    f"{slug}-time", f"{name}: time of a call", sentence, "µs per call", line, lambda r, n: times(r)[n]
                )
            )
            report.parts.append(_rate(name, slug, line, roofs))
        if rest and not host:
            sentence = (
                f"{about} Each bar is an implementation's time over fastattn's for the same call: longer than the "
                "dashed line is slower than fastattn."
            )
            report.parts.append(relative_bars(f"{slug}-bars", f"{name}: time against fastattn", sentence, rest))
        if any("calls" in row for row in rows):
            report.parts.append(_stalls(slug, name, about, rows))
        report.parts.append(times_table(name, rows, _table_sentence(rows, about, host)))
        found = [x for x in map(against_others, rows) if x is not None]
        if found and not host:
            span = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(found), max(found))))
            mine = title_of(ours(key for row in rows for key in times(row)) or "")
            report.findings.append(f"{name}: {mine} takes {span} times what the best other takes")
        report.notes += [f"{name}: {text}" for text in why_not(rows)]
    if first := first_calls(row for rows in sections.values() for row in rows):
        report.parts.append(first)
    for row in sections.get("fresh lengths", []):
        if "calls" in row:
            figures = row["figures"]
            report.findings.append(
                f"a prompt length never seen before, {title_of(row['label'])}: first call "
                f"{figures['first median_ms']:.2f} ms (worst {figures['first worst_ms']:.2f}), second "
                f"{figures['second median_ms']:.2f} ms"
            )
    report.notes[:0] = [f"how ({key}): {text}" for key, text in data.get("method", {}).items()]
    if data.get("left_out"):
        report.notes.append(f"left out, they need a GPU: {', '.join(data['left_out'])}")
    absent = [title_of(name) for name, version in data.get("peers", {}).items() if version is None]
    there = [f"{title_of(name)} {version}" for name, version in data.get("peers", {}).items() if version]
    report.notes += [f"other packages that took part: {', '.join(there)}"] if there else []
    report.notes += [f"not installed, so not measured: {', '.join(absent)}"] if absent else []


def _table_sentence(rows: list[Row], about: str, host: bool) -> str:
    if not any(times(row) for row in rows):
        return about
    what = "Microseconds of the host" if host else "Microseconds of the GPU" if _on_gpu(rows) else "Microseconds"
    shapes = "B: batch, Sq: queries, Skv: keys, a/b: query and K/V heads, D: head dim. " if "case" in rows[0] else ""
    return f"{what} per call; the best of each row is bold. {shapes}".rstrip()


def _on_gpu(rows: list[Row]) -> bool:
    return any(e.get("method") in ("graph", "queue") for row in rows for e in row.get("implementations", {}).values())


def _rate(name: str, slug: str, line: list[Row], roofs: dict[str, float]) -> Chart:
    if name in _MEMORY:
        top = roofs.get("copy GB/s")
        sentence = (
            "How fast the keys and values are read: the bytes that have to be read over the time. Higher is better; "
            "reading them cannot be faster than memory allows."
        )
        roof = ("copying memory", top) if top else None
        return over_length(
            f"{slug}-rate", f"{name}: memory rate", sentence, "GB/s of K and V", line, gigabytes, roof, log=False
        )
    top = roofs.get("matmul TFLOP/s")
    sentence = "Useful operations (pairs of query and key that see one another) per second. Higher is better."
    roof = ("a large matrix product", top) if top else None
    return over_length(f"{slug}-rate", f"{name}: TFLOP/s", sentence, "TFLOP/s", line, tflops, roof, log=False)


def _stalls(slug: str, name: str, about: str, rows: list[Row]) -> Chart:
    series = []
    for row in (row for row in rows if "calls" in row):
        for which in ("first", "second"):
            points = sorted((call["length"], call[f"{which}_ms"]) for call in row["calls"])
            series.append(Series(f"{row['label']}|{which}", points))
    sentence = f"{about} Filled: the first call at a length. Hollow: the second. The gap is the stall."
    return Chart(
        f"{slug}-stalls", f"{name}: first call against second", sentence, "pairs", "length (tokens)", "ms", series
    )
