"""docs/families.md, from the reports."""

from __future__ import annotations

import collections
from typing import Any

#: Results that nobody may be left with.
BAD = ("differs", "crashes", "not done", "falls back in silence")

_MEANING = {
    "differs": "another result than eager's: a fault",
    "crashes": "an error where eager has none: a fault",
    "not done": "not done within the time limit",
    "falls back in silence": "runs attention of its own, and no warning says so",
    "refused": "a `ValueError` that says why",
    "equal": "eager's result, with fastattn's attention",
    "falls back": "eager's result, by the model's own attention, with a warning",
    "no attention": "has no attention that fastattn could run",
    "not built": "could not be built tiny; the reason is given",
}

_HEAD = """# Model families

Every model family of transformers, swept by `make families`: a tiny model with random weights, run with eager attention
and with `attn_implementation="fastattn"` in float32. Which families there are is read from transformers' auto classes.
Compared are, wherever the model can do it: a forward without a mask, with a mask of ones, with padding on the left, on
the right and with holes; one row alone; tokens over a cache, 8, 1 and 5 at a time; greedy generation; the gradients of
all parameters, without and with padding; image, audio and video towers, alone and amid text.

"Equal" means that no output differs by more than {tolerance:g} of its largest value (real positions only), gradients by
their norm; where more than that is lost to eager's own rounding, that rounding is the measure.

Versions: {versions}.
"""


def page(versions: dict[str, str], reports: list[dict[str, Any]], tolerance: float = 1e-4) -> str:
    lines = [_HEAD.format(tolerance=tolerance, versions=", ".join(f"{k} {v}" for k, v in versions.items()))]
    counts = collections.Counter(report["result"] for report in reports)
    lines += ["| result | models | meaning |", "|---|---|---|"]
    lines += [
        f"| {name} | {counts[name]} | {text} |" for name, text in _MEANING.items() if counts[name] or name in BAD[:2]
    ]
    built = [report for report in reports if report["result"] != "not built"]
    lines += ["", "## Swept", "", "| family | kind | result | note |", "|---|---|---|---|"]
    order = list(_MEANING)
    for report in sorted(built, key=lambda r: (order.index(r["result"]) if r["result"] in BAD else 9, r["family"])):
        lines.append(f"| {report['family']} | {report['kind']} | {report['result']} | {_note(report)} |")
    lines += ["", "## Not built", "", "| family | kind | reason |", "|---|---|---|"]
    for report in reports:
        if report["result"] == "not built":
            lines.append(f"| {report['family']} | {report['kind']} | {_cell(report.get('why', ''), 160)} |")
    return "\n".join(lines) + "\n"


def _note(report: dict[str, Any]) -> str:
    by_result = collections.defaultdict(list)
    for name, check in report["checks"].items():
        by_result[check["result"]].append(name)
    parts = [f"{bad}: {', '.join(by_result[bad])}" for bad in ("differs", "crashes", "refused") if by_result[bad]]
    if report.get("why"):
        parts.append(report["why"])
    if (report["result"] == "equal" and report["warnings"]) or report["result"] == "falls back":
        parts += report["warnings"][:1]
    return _cell("; ".join(parts), 200)


def _cell(text: str, limit: int) -> str:
    text = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
