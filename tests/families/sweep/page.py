"""docs/families.md, from the reports."""

from __future__ import annotations

import collections
from typing import Any

#: Results that must not remain.
BAD = ("differs", "crashes", "not done", "falls back in silence")

_MEANING = {
    "differs": "another result than eager's: a fault",
    "crashes": "an error where eager has none: a fault",
    "not done": "not done within the time limit",
    "falls back in silence": "runs attention of its own, and no warning says so",
    "refused": "a `ValueError` that says why",
    "bool mask": "the model makes a bool mask of its own: eager adds it to the scores as 0 and 1, fastattn reads it as "
    "sdpa does; when it is added, the result is eager's",
    "equal": "eager's result, with fastattn's attention",
    "falls back": "eager's result, by the model's own attention, with a warning",
    "no attention": "has no attention that fastattn could run",
    "not built": "could not be built tiny; the reason is given",
}

_HEAD = """# Model families

Which models of transformers give eager attention's result? `make families` builds a tiny model with random weights of
every family in transformers' auto classes, and runs it in float32 with eager attention and with
`attn_implementation="fastattn"`. Where a model can do it, these are compared:

- a forward without a mask, with a mask of ones, with padding on the left, on the right and with holes, and of one row;
- tokens over a cache, 8, 1 and 5 at a time, and greedy generation;
- the gradients of all parameters, without and with padding;
- image, audio and video towers, alone and amid text.

"Equal" means that no output differs by more than {tolerance:g} of its largest value (without positions of padding), and
no gradient by more than that of its norm. Where eager attention's own rounding error is larger, it is the tolerance.

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
    for report in sorted(
        built, key=lambda r: (order.index(r["result"]) if r["result"] in BAD else len(order), r["family"])
    ):
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
    named = [name for name in ("differs", "crashes", "refused", "bool mask") if by_result[name]]
    parts = [f"{name}: {', '.join(by_result[name])}" for name in named]
    if report.get("why"):
        parts.append(report["why"])
    if report["result"] in ("equal", "falls back"):
        parts += report["warnings"][:1]
    return _cell("; ".join(parts), 200)


def _cell(text: str, limit: int) -> str:
    text = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
