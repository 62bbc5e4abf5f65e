"""From a result file to a section of a report: what was measured, what came out, in charts and tables.

Each kind of file ("benchmark" in it) has a function here; one that is not known gives a table of its figures. A
stranger may have written the file: what it says is checked before anything is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import count as count_from
from pathlib import Path
from typing import Any, TypeVar

from fastattn.common.printable import printable

from .data import Chart, Section, Table, few_columns, number, title_of
from .reading import reading, shown
from .sweep import fill as _sweep
from .users import fill as _users

ABOUT = (
    "Attention is the part of a language model in which every new token looks at the tokens before it. fastattn is one "
    "attention call for PyTorch on NVIDIA GPUs. This page compares it with other implementations of the same call, on "
    "one machine, in one process, taking turns. Absolute times differ between machines and days: compare within a "
    "chart."
)
MOST_POINTS = 500  #: of a chart
MOST_LABEL = 200  #: characters in a chart


T = TypeVar("T")


def sections_of(found: Mapping[str, dict[str, Any]]) -> list[Section]:
    """The sections of result files by path. Files of one name are told apart by their folders."""
    sections = [section_of(name, data) for name, data in found.items()]
    count = Counter(section.name for section in sections)
    for i, (path, data) in enumerate(found.items()):
        if count[sections[i].name] > 1:
            sections[i] = section_of(f"{Path(path).parent.name}-{sections[i].name}", data)
    _tell_apart(sections)
    return sections


def _tell_apart(sections: Iterable[Section]) -> None:
    """No picture is written over another one's file, also where a disk does not tell a from A."""
    taken: set[str] = set()
    for section in sections:
        for i, part in enumerate(section.parts):
            if isinstance(part, Chart):
                slugs = (part.slug if n == 1 else f"{part.slug[:90]}-{n}" for n in count_from(1))
                slug = next(slug for slug in slugs if slug.lower() not in taken)
                taken.add(slug.lower())
                section.parts[i] = part if slug == part.slug else replace(part, slug=slug)


def section_of(name: str, data: dict[str, Any]) -> Section:
    """The section of one result file; name: where it is from. Raises ValueError for one that is not like ours."""
    with reading(name):
        data, kind = shown(data), str(data["benchmark"])
        title, about, fill = _KINDS.get(
            kind, (printable(kind), "Figures of a kind that this report has no pictures for.", _anything)
        )
        stem = Path(printable(name)).name.removesuffix(".json")  # (a name may have points in it: llama-3.1-8b)
        command, date = (str(data.get(key, "")) for key in ("command", "date"))
        section = Section(stem, title, about, command, date, dict(data["environment"]))
        fill(section, data)
        _check(section)
        return section


def _check(section: Section) -> None:
    """That every figure can be drawn, and every text is one. Raises ValueError or TypeError."""
    texts = [section.about, section.caption, *section.facts, *section.findings, *section.notes]
    for part in section.parts:
        texts += [part.title, part.sentence]
        if isinstance(part, Table):
            texts += [*part.head, *(cell for row in part.rows for cell in row)]
            continue
        labels = [part.title, *part.categories, *part.series]
        texts += labels
        if any(len(label) > MOST_LABEL for label in labels):
            raise ValueError(f"expected names of at most {MOST_LABEL} characters in a picture")
        points = [point for points in part.series.values() for point in points]
        values = [value for point in points for value in point] + ([part.roof[1]] if part.roof else [])
        if not 0 < len(points) <= MOST_POINTS:
            raise ValueError(f"{part.title}: expected 1 to {MOST_POINTS} figures, got {len(points)}")
        # (beyond a float's range the arithmetic of axes has no result)
        if not all(isinstance(value, int | float) and 0 <= value < 1e30 for value in values):
            raise ValueError(f"{part.title}: expected numbers from 0 to 1e30")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {text!r}")


def drawn(sections: Iterable[Section], draw: Callable[[Chart, Section], T]) -> dict[str, T]:
    """What a function makes of each chart, by slug. Raises ValueError naming the file that cannot be drawn."""
    found: dict[str, T] = {}
    for section in sections:
        with reading(section.name):
            found |= {chart.slug: draw(chart, section) for chart in section.charts}
    return found


# --- kinds of result files

_WORDS = {
    "prompt_tps": "prompt tokens/s",
    "generation_tps": "generated tokens/s",
    "peak_memory": "peak memory, 1e9 bytes",
    "tokens_per_second": "tokens/s",
    "median_step_tokens_per_second": "tokens/s of the median step",
    "last_loss": "last loss",
    "last_gradient_norm": "last gradient norm",
}


def _model(section: Section, data: dict[str, Any]) -> None:
    found: dict[str, dict[str, Any]] = data["implementations"]
    arguments, model = data.get("arguments", {}), data.get("model", {})
    size = f", {model['parameters'] / 1e9:.2f} billion parameters" if model.get("parameters") else ""
    weights = ", random weights" if model.get("random_weights") else ""
    section.about += (
        f" Here: {model.get('name', 'a model')}{size}{weights}, {arguments.get('dtype', '')}, batch "
        f"{arguments.get('batch_size', 1)}, {arguments.get('prompt_tokens', '?')} prompt tokens"
        + (f", {arguments['generation_tokens']} generated." if "generation_tokens" in arguments else ".")
    )
    averages = {name: entry.get("averages", {}) for name, entry in found.items()}
    keys = list(dict.fromkeys(key for entry in averages.values() for key in entry))
    head = few_columns(["implementation", *(_WORDS.get(key, key) for key in keys)])
    rows = [[title_of(name), *(number(entry.get(key)) for key in keys)] for name, entry in averages.items()]
    table = Table("averages", head, rows, "The mean over the trials; memory in 1e9 bytes.")
    for key, title in zip(keys, head[1:]):
        bars = {name: entry[key] for name, entry in averages.items() if entry.get(key)}
        if key.endswith(("_tps", "tokens_per_second")) and bars:
            text = f"{title}, tokens per second, the mean over the trials. Higher is better."
            section.parts.append(_one_group(f"{section.name}-{key.replace('_', '-')}", title, text, "tokens/s", bars))
    section.parts.append(table)
    fresh = {name: entry["fresh_lengths"] for name, entry in found.items() if entry.get("fresh_lengths")}
    if fresh:
        series = {
            f"{name}|{which}": sorted((x["length"], x[f"{which}_s"] * 1e3) for x in entry["lengths"])
            for name, entry in fresh.items()
            for which in ("first", "second")
        }
        section.findings += [
            f"a new prompt length, {title_of(name)}: the time to the first token is "
            f"{entry['median_ratio']:.2f} times that of the second prompt of that length (median)"
            for name, entry in fresh.items()
        ]
        text = (
            "Time to the first new token for prompt lengths that the process had not seen. Filled: the first prompt of "
            "a length. Hollow: the second. The gap is the stall."
        )
        slug = f"{section.name}-fresh-lengths"
        chart = Chart(slug, "new prompt lengths", text, "pairs", "length (tokens)", "ms", series, log=True)
        section.parts.append(chart)
    section.notes += [f"{title_of(name)}: {entry['error']}" for name, entry in found.items() if entry.get("error")]
    section.notes += [str(line) for line in data.get("disagreements", [])]


def _one_group(slug: str, title: str, sentence: str, unit: str, bars: dict[str, float]) -> Chart:
    return Chart(slug, title, sentence, "bars", "", unit, {name: [(0, value)] for name, value in bars.items()})


def _parallel(section: Section, data: dict[str, Any]) -> None:
    for index, part in enumerate(data["sections"], start=1):
        what = f"{'forward and backward' if part['backward'] else 'forward'}, {part['length']:,} tokens"
        measured = [row for row in part["rows"] if "ms" in row]
        bars = {"one GPU": part["one_ms"]} | {row["strategy"]: row["ms"] for row in measured}
        text = f"Milliseconds on {data['ranks']} GPUs by how the work is divided, and on one. Lower is better."
        section.parts.append(_one_group(f"{section.name}-{index}", f"causal {what}", text, "ms", bars))
        rows = [["one GPU", number(part["one_ms"]), "-", "-", "-"]]
        for row in measured:
            chosen = f" ({row['chosen']})" if row["chosen"] != row["strategy"] else ""
            figures = [number(row["ms"]), f"{part['one_ms'] / row['ms']:.2f}x", number(row["predicted_ms"])]
            rows.append([row["strategy"] + chosen, *figures, f"{max(row['errors'].values()):.1e}"])
        head = ["strategy", "ms", "speed-up", "predicted ms", "largest relative error"]
        section.parts.append(Table(f"causal {what}", head, rows))
        section.notes += [f"{what}: {row['strategy']}: {row['refusal']}" for row in part["rows"] if "refusal" in row]


def _parallel_model(section: Section, data: dict[str, Any]) -> None:
    peak = ", ".join(f"{x:.2f}" for x in data["peak_memory"])
    row = [f"{data['prompt_tokens']:,}", str(data["ranks"]), number(data["prompt_s"]), number(data["prompt_tps"])]
    head = ["prompt tokens", "GPUs", "seconds", "prompt tokens/s", "generated tokens/s", "peak memory, GB, of each"]
    section.parts.append(Table(data["model"]["name"], head, [[*row, number(data["generation_tps"]), peak]]))
    text = "Of {:,} tokens the last logits differ from one GPU's by {:.1e} of their norm."
    section.notes += [text.format(data["check_tokens"], data["error"]), *([data["note"]] if data["note"] else [])]


def _tuning(section: Section, data: dict[str, Any]) -> None:
    keys = ("splits", "block_m", "block_n", "warps", "stages")
    rows = []
    for row in data["rows"]:
        rule, best = row.get("rule") or {}, (row.get("best") or [{}])[0]
        cells = [", ".join(f"{key} {launch[key]}" for key in keys if key in launch) for launch in (rule, best)]
        rows.append([row["case"], number(rule.get("us")), number(best.get("us")), *cells])
    head = ["call", "the rule's, µs", "the best, µs", "the rule's launch", "the best launch"]
    text = "What the rules chose when this was measured, and the best of all launches tried."
    section.parts.append(Table("launches", head, rows, text))
    section.notes.append(f"how: {data.get('method', '')}")


def _anything(section: Section, data: dict[str, Any]) -> None:
    """Every number in it, by its path."""

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path} / {key}" if path else str(key), inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(f"{path} {i + 1}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append([path, number(value)])

    rows: list[list[str]] = []
    known = {"benchmark", "date", "command", "environment", "arguments", "seconds", "stats"}
    walk("", {key: value for key, value in data.items() if key not in known})
    section.parts.append(Table("figures", ["what", "figure"], rows))


_CALLS = (
    "Single attention calls, each implementation in turn in one process, and each result checked against an exact "
    "reference."
)
_Fill = Callable[[Section, dict[str, Any]], None]
#: "benchmark" of a result file -> title, what it is about, and the function that fills its section.
_KINDS: dict[str, tuple[str, str, _Fill]] = {
    "sweep op": ("The op, in every phase of a model's life", _CALLS, _sweep),
    "sweep decode": ("Few queries against a long cache", _CALLS, _sweep),
    "sweep backward": ("Training", _CALLS, _sweep),
    "sweep users": (
        "Calls as users make them",
        "Single attention calls of all kinds, training among them, each beside every peer that can make it, and each "
        "result checked against attention in float64.",
        _users,
    ),
    "sweep plans": (
        "Dynamic plans against static ones",
        "cuDNN compiles a plan for a call. A static plan, for exactly its lengths, is faster; a dynamic plan, for any "
        f"length, is there at once. {_CALLS}",
        _sweep,
    ),
    "model": (
        "A language model",
        "A whole model reads a prompt and writes new tokens; only the attention implementation differs.",
        _model,
    ),
    "train": ("Training a model", "Whole training steps; only the attention implementation differs.", _model),
    "parallel": ("Several GPUs", "One sequence's attention divided among GPUs, each strategy in turn.", _parallel),
    "parallel-model": (
        "A prompt too long for one GPU",
        "A whole model reads one prompt, its tokens spread over the GPUs.",
        _parallel_model,
    ),
    "tune_decode": (
        "Launches of the decode kernel",
        "Every launch configuration of the kernel that reads a long cache for a few queries.",
        _tuning,
    ),
}
