"""What `benchmarks.parallel` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.common.table import ratio, table
from fastattn.parallel import cost


def show(section: dict[str, Any]) -> str:
    """A section of prefill or training as a table."""
    kind = "forward and backward" if section["backward"] else "forward"
    head = (f"causal {kind}, {section['length']} tokens", "ms", "speed-up", "predicted ms", "of it sent", "error")
    rows = [["one GPU", f"{section['one_ms']:.2f}", "1.00x", "-", "-", "-"]]
    for row in section["rows"]:
        if "refusal" in row:
            rows.append([row["strategy"], "-", "-", "-", "-", "refused"])
            continue
        name = row["strategy"] if row["chosen"] == row["strategy"] else f"{row['strategy']} ({row['chosen']})"
        speedup = ratio(section["one_ms"], row["ms"])
        sent, worst = row["prediction"]["exposed"] * 1e3, max(row["errors"].values())
        rows.append([name, f"{row['ms']:.2f}", speedup, f"{row['predicted_ms']:.2f}", f"{sent:.2f}", f"{worst:.1e}"])
    return table(head, rows)


def show_decode(rows: Sequence[dict[str, Any]]) -> str:
    head = ("decode, tokens in the cache", "one GPU us", "sharded us", "graph: one", "graph: sharded", "error")

    def us(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1f}" if name in row else "-"

    names = ("one_us", "us", "graph_one_us", "graph_us")
    return table(head, [[str(r["length"]), *(us(r, name) for name in names), f"{r['error']:.1e}"] for r in rows])


def markdown(report: dict[str, Any]) -> str:
    """Prediction beside measurement, from a result file's content: the table of docs/parallel.md."""
    rows = []
    for section in report["sections"]:
        kind = "forward + backward" if section["backward"] else "forward"
        rows.append([section["length"], kind, "one GPU", "", f"{section['one_ms']:.2f}", "1.00x", ""])
        for row in section["rows"]:
            if "refusal" not in row:
                name = row["strategy"] if row["chosen"] == row["strategy"] else f"{row['strategy']}: {row['chosen']}"
                figures = [f"{row['predicted_ms']:.2f}", f"{row['ms']:.2f}", f"{row['speedup']:.2f}x"]
                error = f"{max(row['errors'].values()):.1e}"
                rows.append([section["length"], kind, f"{name}, {report['ranks']} ranks", *figures, error])
    return _markdown_table(["tokens", "", "strategy", "predicted ms", "measured ms", "speed-up", "error"], rows)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in cells)


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
        rows.append([length, ranks, kind, _seconds(one), *cells, received])
    return _markdown_table(["tokens", "GPUs", "", "one GPU", *cost.STRATEGIES, "received per GPU, GB"], rows)


def _seconds(x: float) -> str:
    return f"{x * 1e3:.1f} ms" if x < 1 else f"{x:.2f} s"
