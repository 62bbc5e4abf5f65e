"""From a result file to a chapter of a report: what was measured, what came out, in charts and tables.

Each kind of file ("benchmark" in it) has a function here; one that is not known gives a table of its figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count as count_from
from pathlib import Path
from typing import Any, TypeVar

from ..common.printable import printable
from .chapters_sweep import fill as _sweep
from .charts import Chart, Series, Table, few_columns, number, title_of
from .reading import reading, shown

ABOUT = (
    "Attention is the part of a language model in which every new token looks at the tokens before it. fastattn is one "
    "attention call for PyTorch on NVIDIA GPUs. This page holds it against other implementations of the same call, on "
    "one machine, in one process, taking turns. Absolute times differ between machines and days: compare within a "
    "chart."
)


@dataclass
class Chapter:
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


T = TypeVar("T")
MOST_POINTS = 500  #: of a chart
MOST_LABEL = 200  #: characters in a chart


def chapters_of(found: Mapping[str, dict[str, Any]]) -> list[Chapter]:
    """The chapters of result files by path. Files of one name are told apart by their folders."""
    chapters = [chapter_of(name, data) for name, data in found.items()]
    count = Counter(chapter.name for chapter in chapters)
    shared = [count[chapter.name] > 1 for chapter in chapters]
    chapters = [
        chapter_of(f"{path.parent.name}-{chapter.name}", data) if twice else chapter
        for (path, data), chapter, twice in zip(((Path(k), v) for k, v in found.items()), chapters, shared)
    ]
    _tell_apart(chapters)
    return chapters


def _tell_apart(chapters: Iterable[Chapter]) -> None:
    """No picture is written over another one's file, also where a disk does not tell a from A."""
    taken: set[str] = set()
    for chapter in chapters:
        for i, part in enumerate(chapter.parts):
            if isinstance(part, Chart):
                slugs = (part.slug if n == 1 else f"{part.slug[:90]}-{n}" for n in count_from(1))
                slug = next(slug for slug in slugs if slug.lower() not in taken)
                taken.add(slug.lower())
                chapter.parts[i] = part if slug == part.slug else replace(part, slug=slug)


def chapter_of(name: str, data: dict[str, Any]) -> Chapter:
    """The chapter of one result file; name: where it is from. Raises ValueError for one that is not like ours."""
    with reading(name):
        return _checked(_chapter_of(printable(name), shown(data)))


def _checked(chapter: Chapter) -> Chapter:
    """That every figure can be drawn, and every text is one. Raises ValueError or TypeError."""
    texts = [chapter.about, *chapter.findings, *chapter.notes]
    for part in chapter.parts:
        if isinstance(part, Table):
            texts += [part.title, part.sentence, *part.head, *(cell for row in part.rows for cell in row)]
            continue
        labels = [part.title, *part.categories, *(series.name for series in part.series)]
        texts += [part.sentence, *labels]
        if any(len(label) > MOST_LABEL for label in labels):
            raise ValueError(f"expected names of at most {MOST_LABEL} characters in a picture")
        points = [point for series in part.series for point in series.points]
        values = [value for point in points for value in point] + ([part.roof[1]] if part.roof else [])
        if not 0 < len(points) <= MOST_POINTS:
            raise ValueError(f"{part.title}: expected 1 to {MOST_POINTS} figures, got {len(points)}")
        # (beyond a float's range the arithmetic of axes has no result)
        if not all(isinstance(value, int | float) and 0 <= value < 1e30 for value in values):
            raise ValueError(f"{part.title}: expected numbers from 0 to 1e30")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {text!r}")
    return chapter


def _chapter_of(name: str, data: dict[str, Any]) -> Chapter:
    kind = str(data["benchmark"])
    title, about, fill = _KINDS.get(kind, (kind, "Figures of a kind that this report has no pictures for.", _anything))
    stem = Path(name).name.removesuffix(".json")  # (a name may have points in it: llama-3.1-8b)
    chapter = Chapter(
        stem, title, about, str(data.get("command", "")), str(data.get("date", "")), dict(data["environment"])
    )
    fill(chapter, data)
    return chapter


def caption_of(chapter: Chapter) -> str:
    """Where and when, in one line."""
    e = chapter.environment
    place = e.get("gpu") or e.get("cpu") or "unknown machine"
    versions = [
        f"{name} {e[key]}" for name, key in (("torch", "torch"), ("cuDNN", "cudnn"), ("Triton", "triton")) if e.get(key)
    ]
    return f"{place}, {', '.join(versions)}, {chapter.date[:10]}"


def drawn(chapters: Iterable[Chapter], draw: Callable[[Chart, Chapter], T]) -> dict[str, T]:
    """What a function makes of each chart, by slug. Raises ValueError naming the file that cannot be drawn."""
    found: dict[str, T] = {}
    for chapter in chapters:
        with reading(chapter.name):
            found |= {part.slug: draw(part, chapter) for part in chapter.parts if isinstance(part, Chart)}
    return found


# --- models


def _model(chapter: Chapter, data: dict[str, Any]) -> None:
    found: dict[str, dict[str, Any]] = data["implementations"]
    arguments, model = data.get("arguments", {}), data.get("model", {})
    parameters = model.get("parameters")
    size = f", {parameters / 1e9:.2f} billion parameters" if parameters else ""
    weights = ", random weights" if model.get("random_weights") else ""
    chapter.about += (
        f" Here: {model.get('name', 'a model')}{size}{weights}, {arguments.get('dtype', '')}, batch "
        f"{arguments.get('batch_size', 1)}, {arguments.get('prompt_tokens', '?')} prompt tokens"
        + (f", {arguments['generation_tokens']} generated." if "generation_tokens" in arguments else ".")
    )
    names = list(found)
    keys = list(dict.fromkeys(key for entry in found.values() for key in entry.get("averages", {})))
    head = few_columns(["implementation", *(_WORDS.get(key, key) for key in keys)])
    for key in (key for key in keys if key.endswith(("_tps", "tokens_per_second"))):
        values = [(name, found[name].get("averages", {}).get(key)) for name in names]
        series = [Series(name, [(0, value)]) for name, value in values if value]
        if series:
            text = f"{_WORDS.get(key, key)}, tokens per second, the mean over the trials. Higher is better."
            slug = f"{chapter.name}-{key.replace('_', '-')}"
            title = _WORDS.get(key, key)
            chapter.parts.append(Chart(slug, title, text, "bars", "", "tokens/s", series, [""], log=False))
    rows = [
        [title_of(name), *(number(entry.get("averages", {}).get(key)) for key in keys)] for name, entry in found.items()
    ]
    chapter.parts.append(Table("averages", head, rows, "The mean over the trials; memory in 1e9 bytes."))
    fresh = {name: entry["fresh_lengths"] for name, entry in found.items() if entry.get("fresh_lengths")}
    if fresh:
        series = []
        for name, entry in fresh.items():
            for which in ("first", "second"):
                points = sorted((x["length"], x[f"{which}_s"] * 1e3) for x in entry["lengths"])
                series.append(Series(f"{name}|{which}", points))
            chapter.findings.append(
                f"a new prompt length, {title_of(name)}: the time to the first token is "
                f"{entry['median_ratio']:.2f} times that of the second prompt of that length (median)"
            )
        text = (
            "Time to the first new token for prompt lengths that the process had not seen. Filled: the first prompt of "
            "a length. Hollow: the second. The gap is the stall."
        )
        slug = f"{chapter.name}-fresh-lengths"
        chapter.parts.append(Chart(slug, "new prompt lengths", text, "pairs", "length (tokens)", "ms", series))
    chapter.notes += [f"{title_of(name)}: {entry['error']}" for name, entry in found.items() if entry.get("error")]
    chapter.notes += [str(line) for line in data.get("disagreements", [])]


_WORDS = {
    "prompt_tps": "prompt tokens/s",
    "generation_tps": "generated tokens/s",
    "peak_memory": "peak memory, 1e9 bytes",
    "tokens_per_second": "tokens/s",
    "median_step_tokens_per_second": "tokens/s of the median step",
    "last_loss": "last loss",
    "last_gradient_norm": "last gradient norm",
}


# --- the rest


def _parallel(chapter: Chapter, data: dict[str, Any]) -> None:
    for number_of, section in enumerate(data["sections"]):
        what = f"{'forward and backward' if section['backward'] else 'forward'}, {section['length']:,} tokens"
        measured = [row for row in section["rows"] if "ms" in row]
        series = [Series("one GPU", [(0, section["one_ms"])])]
        series += [Series(row["strategy"], [(0, row["ms"])]) for row in measured]
        text = f"Milliseconds on {data['ranks']} GPUs by how the work is divided, and on one. Lower is better."
        slug = f"{chapter.name}-{number_of + 1}"
        chapter.parts.append(Chart(slug, f"causal {what}", text, "bars", "", "ms", series, [""], log=False))
        rows = [["one GPU", number(section["one_ms"]), "-", "-", "-"]]
        for row in measured:
            chosen = f" ({row['chosen']})" if row["chosen"] != row["strategy"] else ""
            speedup = f"{section['one_ms'] / row['ms']:.2f}x"
            figures = [number(row["ms"]), speedup, number(row["predicted_ms"]), f"{max(row['errors'].values()):.1e}"]
            rows.append([row["strategy"] + chosen, *figures])
        head = ["strategy", "ms", "speed-up", "predicted ms", "largest relative error"]
        chapter.parts.append(Table(f"causal {what}", head, rows))
        refused = [row for row in section["rows"] if "refusal" in row]
        chapter.notes += [f"{what}: {row['strategy']}: {row['refusal']}" for row in refused]


def _parallel_model(chapter: Chapter, data: dict[str, Any]) -> None:
    peak = ", ".join(f"{x:.2f}" for x in data["peak_memory"])
    row = [f"{data['prompt_tokens']:,}", str(data["ranks"]), number(data["prompt_s"]), number(data["prompt_tps"])]
    head = ["prompt tokens", "GPUs", "seconds", "prompt tokens/s", "generated tokens/s", "peak memory, GB, of each"]
    chapter.parts.append(Table(data["model"]["name"], head, [[*row, number(data["generation_tps"]), peak]]))
    chapter.notes.append(
        f"Of {data['check_tokens']:,} tokens the last logits differ from one GPU's by {data['error']:.1e} of "
        "their norm."
    )
    if data["note"]:
        chapter.notes.append(data["note"])


def _tuning(chapter: Chapter, data: dict[str, Any]) -> None:
    keys = ("splits", "block_m", "block_n", "warps", "stages")
    rows = []
    for row in data["rows"]:
        rule, best = row.get("rule") or {}, (row.get("best") or [{}])[0]
        cells = [", ".join(f"{key} {launch[key]}" for key in keys if key in launch) for launch in (rule, best)]
        rows.append([row["case"], number(rule.get("us")), number(best.get("us")), *cells])
    head = ["call", "the rule's, µs", "the best, µs", "the rule's launch", "the best launch"]
    text = (
        "What the rules in backends/decode/launch.py chose when this was measured, and the best of all launches tried."
    )
    chapter.parts.append(Table("launches", head, rows, text))
    chapter.notes.append(f"how: {data.get('method', '')}")


def _anything(chapter: Chapter, data: dict[str, Any]) -> None:
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
    chapter.parts.append(Table("figures", ["what", "figure"], rows))


_CALLS = (
    "Single attention calls, each implementation in turn in one process, and each result checked against an exact "
    "reference."
)
_Fill = Callable[[Chapter, dict[str, Any]], None]
_KINDS: dict[str, tuple[str, str, _Fill]] = {
    "sweep op": ("The op, in every phase of a model's life", _CALLS, _sweep),
    "sweep decode": ("Few queries against a long cache", _CALLS, _sweep),
    "sweep backward": ("Training", _CALLS, _sweep),
    "sweep plans": (
        "Plans for any length against exact ones",
        "cuDNN compiles a plan for a call. One for exactly its lengths is faster; one for any length is there at once. "
        + _CALLS,
        _sweep,
    ),
    "model": (
        "A language model",
        "A whole model reads a prompt and writes new tokens; only the attention implementation differs.",
        _model,
    ),
    "train": ("Training a model", "Whole training steps; only the attention implementation differs.", _model),
    "parallel": ("Several GPUs", "One sequence's attention divided among GPUs, each way in turn.", _parallel),
    "parallel-model": (
        "A prompt too long for one GPU",
        "A whole model reads one prompt, its tokens spread over the GPUs.",
        _parallel_model,
    ),
    "tune_decode": (
        "Launches of the decode kernel",
        "Every way of launching the kernel that reads a long cache for a few queries.",
        _tuning,
    ),
}
