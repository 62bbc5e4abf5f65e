"""docs/support.md: which call cuDNN serves on which GPU, from our table and from what cuDNN answered.

python tests/gpuless/support_page.py        writes it anew (after `make gpuless`)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import stand_in
from families import DIMS, FAMILIES, LENGTHS, MORE_DIMS

from fastattn.backends.cudnn import support
from fastattn.backends.cudnn.runtime import version_text

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "support.md"
GPUS = {
    f"{major}.{minor}": facts.get("deviceName", "NVIDIA H100") for (major, minor), facts in stand_in.DEVICES.items()
}
ANSWERED = "## What cuDNN answered"  #: heads the one section that cannot be written without cuDNN
#: Refusals of ours that cuDNN does not share: it would serve the call, only not well or not right.
OUR_OWN = {
    "above 256 have no fast kernel": "it would serve them, but by none of its fast kernels",
    "one query is wrong in this cuDNN": "its release notes: wrong for few K/V heads",
    "the backward needs more than one query or key": "dynamic plans would do, unproven so far",
    "float32 would be computed in TF32": "the op promises true float32",
    "softcap is not offered": "never asked: no graph of ours has one",
}
Row = dict[str, Any]


@cache
def answers(gpu: str) -> tuple[Row, ...]:
    """What cuDNN and our table say to every question, for one GPU."""
    return tuple(_ask(gpu))


@cache
def ours() -> dict[str, tuple[Row, ...]]:
    """What our table says and which plans it wants, by GPU; needs no cuDNN."""
    rows = _ask("--ours", *GPUS)
    return {gpu: tuple(row for row in rows if row["gpu"] == gpu) for gpu in GPUS}


def _ask(*arguments: str) -> list[Row]:
    command = [sys.executable, str(HERE / "check_families.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"check_families.py failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def too_weak(rows: tuple[Row, ...]) -> list[Row]:
    """What passes our table and not cuDNN."""
    return [row for row in rows if row["cudnn"] and not row["ours"]]


def too_strict(rows: tuple[Row, ...]) -> list[Row]:
    """What passes cuDNN and not our table, without a reason of our own."""
    return [row for row in own(rows) if not any(reason in text for text in row["ours"] for reason in OUR_OWN)]


def own(rows: tuple[Row, ...]) -> list[Row]:
    """What passes cuDNN and not our table."""
    return [row for row in rows if row["ours"] and not row["cudnn"] and row["plans"]]


def page(rows: dict[str, tuple[Row, ...]], answered: bool) -> str:
    """The page's text. answered: the rows hold cuDNN's answers."""
    version = next(iter(rows.values()))[0]["version"]
    gpus = " | ".join(f"{gpu}<br>{name.removeprefix('NVIDIA ').split('-')[0]}" for gpu, name in GPUS.items())
    head = f" | {gpus} |\n|{'---|' * (len(GPUS) + 1)}"
    sections = [
        f"# What cuDNN serves\n\nWhich calls does cuDNN {version_text(version)} serve on which GPU? A call that is "
        "refused here runs on another backend, which\n`fastattn.explain` names. **both**: forward and backward; "
        "**forward**: without gradients. One query against one key is\nnever served with gradients, and left out "
        "below. (`python tests/gpuless/support_page.py` writes this page.)\n",
        f"## Kinds of calls\n\nbfloat16, head dim 128, 8 query heads on 2 K/V heads, batch 2;\n{_sizes()}.\n\n"
        f"| call{head}\n" + _lines(FAMILIES, lambda name: lambda q: q["family"] == name and _is_plain(q), rows),
        f"## Head dims\n\nCausal, bfloat16; of queries and keys / of values.\n\n| dims{head}\n"
        + _lines(_dims(), lambda name: lambda q: f"{q['head_dim']}/{q['value_dim']}" == name and _is_causal(q), rows),
        f"## Dtypes\n\nCausal, head dim 64.\n\n| dtype{head}\n"
        + _lines(
            ("bfloat16", "float16", "float32", "float64"),
            lambda name: (
                lambda q: q["dtype"] == name and q["head_dim"] == 64 == q["value_dim"] and q["family"] == "causal"
            ),
            rows,
        ),
        "## Plans\n\nWhich [plans](plans.md) the same calls use, forward and backward. Where both kinds are named, the "
        f"static plan serves as\nsoon as it is built.\n\n| call{head}\n" + _plan_lines(rows),
        "## Refusals\n\nThe rows of `backends/cudnn/support.py`.\n\n| refusal | GPUs | cuDNN |\n|---|---|---|\n"
        + "".join(_limit(limit) for limit in support.LIMITS),
    ]
    if answered:
        sections.append(_answered(rows, head))
    return "\n".join(sections)


def without_answers(text: str) -> str:
    """A page without what cuDNN answered."""
    return text.partition(ANSWERED)[0].rstrip() + "\n"


def _sizes() -> str:
    return "queries x keys: " + ", ".join(f"{q} x {kv}" for q, kv in LENGTHS if (q, kv) != (1, 1))


def _dims() -> list[str]:
    return [f"{d}/{dv}" for d, dv in sorted({*DIMS, *MORE_DIMS})]


def _is_plain(q: dict[str, Any]) -> bool:
    usual = q["dtype"] == "bfloat16" and not q["deterministic"] and q["heads"] == [8, 2]
    return bool(usual and (q["head_dim"], q["value_dim"]) == (128, 128))


def _is_causal(q: dict[str, Any]) -> bool:
    usual = q["dtype"] == "bfloat16" and not q["deterministic"] and q["heads"] == [8, 2]
    return bool(usual and q["family"] == "causal")


def _lines(
    names: Any, chosen: Callable[[str], Callable[[dict[str, Any]], bool]], rows: dict[str, tuple[Row, ...]]
) -> str:
    def cell(name: str, gpu: str) -> str:
        return _served([row for row in rows[gpu] if chosen(name)(row["question"])])

    return "".join(f"| {name} | {' | '.join(cell(name, gpu) for gpu in GPUS)} |\n" for name in names)


def _served(rows: list[Row]) -> str:
    """ "both", "forward" or "no", and for which lengths not."""
    rows = [row for row in rows if _lengths(row) != "1 x 1"]
    served = {grads: [row for row in rows if row["question"]["grads"] == grads and not row["ours"]] for grads in (0, 1)}
    asked = {grads: [row for row in rows if row["question"]["grads"] == grads] for grads in (0, 1)}
    assert asked[0] and asked[1]
    if not served[0]:
        return "no"
    text = "both" if served[1] else "forward"
    refused = [row for grads in (0, 1) if served[grads] for row in asked[grads] if row["ours"]]
    left_out = dict.fromkeys(_lengths(row) for row in refused)
    return text + (f", not {', '.join(left_out)}" if left_out else "")


def _lengths(row: Row) -> str:
    return f"{row['question']['q_len']} x {row['question']['kv_len']}"


def _plan_lines(rows: dict[str, tuple[Row, ...]]) -> str:
    def cell(name: str, gpu: str) -> str:
        found: dict[str, set[str]] = {"forward": set(), "backward": set()}
        for row in rows[gpu]:
            if row["question"]["family"] == name and _is_plain(row["question"]) and not row["ours"]:
                for plan in row["plans"]:
                    direction, kind = plan.split(": ")
                    found[direction].add(kind)
        texts = [", ".join(sorted(kinds)) for kinds in found.values() if kinds]
        return "; ".join(dict.fromkeys(texts)) or "none"

    return "".join(f"| {name} | {' | '.join(cell(name, gpu) for gpu in GPUS)} |\n" for name in FAMILIES)


def _limit(limit: support.Limit) -> str:
    gpus = ", ".join(f"{major}.{minor}" for major, minor in limit.capabilities) or "all"
    since = f"{version_text(limit.since)} and later" if limit.since else "all"
    versions = (
        since if limit.below == support.ANY else f"{version_text(limit.since)} to below {version_text(limit.below)}"
    )
    return f"| {limit.text} | {gpus} | {versions} |\n"


def _answered(rows: dict[str, tuple[Row, ...]], head: str) -> str:
    counted: dict[str, Callable[[tuple[Row, ...]], int]] = {
        "kinds of calls": len,
        "served by our table and by cuDNN": lambda x: sum(not row["ours"] and not row["cudnn"] for row in x),
        "refused by both": lambda x: sum(bool(row["ours"]) and (bool(row["cudnn"]) or not row["plans"]) for row in x),
        "**served by our table, refused by cuDNN**": lambda x: len(too_weak(x)),
        "refused by our table alone, for a reason given below": lambda x: len(own(x)) - len(too_strict(x)),
        "**refused by our table alone, for no reason given**": lambda x: len(too_strict(x)),
    }
    lines = "".join(f"| {name} | {' | '.join(str(f(rows[gpu])) for gpu in GPUS)} |\n" for name, f in counted.items())
    reasons = Counter(r for gpu in GPUS for row in own(rows[gpu]) for r in OUR_OWN if any(r in t for t in row["ours"]))
    why = "".join(f'- "{reason}" ({reasons[reason]}): {text}\n' for reason, text in OUR_OWN.items() if reasons[reason])
    return (
        f"{ANSWERED}\n\nFor described devices cuDNN's `check_support` was asked about every plan of each kind of call, "
        "also in float16, with other\nnumbers of heads, and under torch's deterministic algorithms.\n\n"
        f"| {head}\n{lines}\nRefused by our table alone:\n\n{why}"
    )


def main() -> int:
    if stand_in.library() is None:
        print("no cuDNN library here: make gpuless brings one", file=sys.stderr)
        return 2
    PAGE.write_text(page({gpu: answers(gpu) for gpu in GPUS}, answered=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
