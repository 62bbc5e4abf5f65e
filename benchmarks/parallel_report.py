"""What `benchmarks.parallel` found, as tables: of a terminal, and those of docs/parallel.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.common.table import table
from fastattn.parallel import cost

HEAD = ("tokens", "", "strategy", "predicted ms", "measured ms", "speed-up", "error")


def section_rows(section: dict[str, Any], ranks: int) -> list[list[str]]:
    """Prediction beside measurement."""
    kind = "forward + backward" if section["backward"] else "forward"
    rows = [["one GPU", "", f"{section['one_ms']:.2f}", "1.00x", ""]]
    for row in section["rows"]:
        if "refusal" not in row:
            name = row["strategy"] if row["chosen"] == row["strategy"] else f"{row['strategy']}: {row['chosen']}"
            figures = [f"{row['predicted_ms']:.2f}", f"{row['ms']:.2f}", f"{row['speedup']:.2f}x"]
            rows.append([f"{name}, {ranks} ranks", *figures, f"{max(row['errors'].values()):.1e}"])
    return [[str(section["length"]), kind, *row] for row in rows]


def show(section: dict[str, Any], ranks: int) -> str:
    """A section of prefill or training, as a table for a terminal."""
    refused = [f"\n{row['strategy']}: {row['refusal']}" for row in section["rows"] if "refusal" in row]
    return table(HEAD, section_rows(section, ranks)) + "".join(refused)


def show_decode(rows: Sequence[dict[str, Any]]) -> str:
    head = ("decode, tokens in the cache", "one GPU us", "sharded us", "graph: one", "graph: sharded", "error")
    times = [[f"{r[n]:.1f}" if n in r else "-" for n in ("one_us", "us", "graph_one_us", "graph_us")] for r in rows]
    return table(head, [[str(r["length"]), *us, f"{r['error']:.1e}"] for r, us in zip(rows, times)])


def markdown(report: dict[str, Any]) -> str:
    """The sections of a result file's content: the table of docs/parallel.md."""
    rows = [row for section in report["sections"] for row in section_rows(section, report["ranks"])]
    return _markdown_table(HEAD, rows)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)
    return text.replace("| --- ", "|---")


#: What docs/parallel.md carries the model to: tokens, GPUs in hosts of eight, backward, window.
PAPER = (
    (131072, 8, False, None),
    (65536, 8, True, None),
    (1 << 20, 8, False, None),
    (1 << 20, 64, False, None),
    (1 << 20, 8, True, None),
    (1 << 20, 64, True, None),
    (1 << 20, 64, False, 4096),
)


def paper() -> str:
    """The model's predictions for 32/8 heads of 128 in bf16, causal, on H100s, as Markdown."""
    rows = []
    for length, ranks, backward, window in PAPER:
        work = cost.Work.of(length, ranks, q_heads=32, kv_heads=8, backward=backward, window=window)
        found, one = [cost.predict(work, ranks, name, ranks_per_host=8) for name in cost.STRATEGIES], cost.single(work)
        kind = ("forward + backward" if backward else "forward") + (f", window {window}" if window else "")
        cells = [f"{_seconds(p.total)} ({one / p.total:.1f}x)" for p in found]
        received = ", ".join(f"{p.received / 1e9:.2f}" for p in found)
        rows.append([str(length), str(ranks), kind, _seconds(one), *cells, received])
    return _markdown_table(["tokens", "GPUs", "", "one GPU", *cost.STRATEGIES, "received per GPU, GB"], rows)


def _seconds(x: float) -> str:
    return f"{x * 1e3:.1f} ms" if x < 1 else f"{x:.2f} s"
