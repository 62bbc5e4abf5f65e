"""Figures that README.md and the pages quote are those of the result files that they name."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
H100 = ROOT / "benchmarks" / "results" / "h100"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(name: str) -> Any:
    return json.loads((H100 / name).read_text(encoding="utf-8"))


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading of a page."""
    section = re.split(rf"^##+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^##+ ", section, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def number(text: str) -> float:
    return float(re.findall(r"[\d.]+", text)[0])


def is_rounded(text: str, value: float) -> bool:
    """True when the text is the value, rounded as the text shows it."""
    digits = len(text.partition(".")[2])
    return abs(number(text) - value) <= 0.5001 * 10.0**-digits


def test_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


def test_readme_speed() -> None:
    implementations: dict[str, Any] = {}
    checked = 0
    for cells in rows(README, "Speed"):
        link = re.search(r"\]\((\S+?\.json)\)", cells[0])
        if link:
            implementations = json.loads((ROOT / link[1]).read_text(encoding="utf-8"))["implementations"]
            cells = cells[1:]
        name = cells[0].strip("*| ").partition(",")[0]
        if name not in implementations:
            continue
        for cell, figure in zip(cells[1:], ("prompt_tps", "generation_tps", "peak_memory"), strict=True):
            assert is_rounded(cell, implementations[name]["averages"][figure]), (name, figure, cell)
            checked += 1
    assert checked == 21


def test_readme_new_lengths() -> None:
    calls = {row["label"]: row["calls"] for row in result("op.json")["sections"]["fresh lengths"]}
    found = re.search(
        r"(\d+) lengths that the process had not seen: ([\d.]+) ms and ([\d.]+) ms \(medians\), "
        r"torch's cuDNN ([\d.]+) ms and\s+([\d.]+) ms",
        README,
    )
    assert found is not None
    for label, texts in (("fastattn", found.group(2, 3)), ("torch-cudnn", found.group(4, 5))):
        assert len(calls[label]) == int(found[1])
        for text, which in zip(texts, ("first_ms", "second_ms"), strict=True):
            assert is_rounded(text, statistics.median(call[which] for call in calls[label])), (label, which)


def test_readme_not_the_fastest() -> None:
    sections = result("op.json")["sections"]

    def ratio(section: str, label: str, other: str, ours: str = "fastattn") -> float:
        row = next(row for row in sections[section] if row["label"] == label)["implementations"]
        return float(row[ours]["us"] / row[other]["us"])

    shape = "B=1 Sq=2048 Skv=2048 32/8 D=128"
    wanted = (
        ratio("masks", f"{shape} additive mask", "torch-cudnn"),
        ratio("masks", f"{shape} additive mask", "flex"),
        ratio("windows, sinks, softcap", f"{shape} softcap 50", "flex"),
        ratio("decode", "B=1 Sq=1 Skv=2048 32/8 D=128", "torch-cudnn"),
        ratio("prefill", shape, "torch-cudnn", "fastattn-any"),
    )
    text = README.partition("slower than the fastest there")[2].partition("All figures")[0]
    shown = re.findall(r"([\d.]+) times", text)
    assert len(shown) == len(wanted)
    assert all(is_rounded(cell, value) for cell, value in zip(shown, wanted, strict=True)), (shown, wanted)


def test_plans_figures() -> None:
    sections = result("plans.json")["sections"]
    page = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    names = ("fastattn-any", "fastattn-exact", "torch-cudnn", "torch-flash")
    section, checked = "", 0
    for label, *cells in rows(page, "Figures"):
        direction = re.match(r"forward|backward", label)
        section = f"causal {direction[0]}" if direction else section
        length = re.search(r"S = (\d+)", label)
        if length is None:
            continue
        row = next(row for row in sections[section] if row["label"].endswith(f"S={length[1]}"))
        for cell, name in zip(cells, names, strict=True):
            assert is_rounded(cell, row["implementations"][name]["us"]), (label, name)
            checked += 1
    assert checked == 28


def test_hopper_figures() -> None:
    """The page's rows are in the file's order: hot, its ratio to cuDNN, cold, its ratio, the host's time."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    measured = list(result("hopper_forward.json")["rows"].items())
    shown = rows(page, "Figures")[1:]
    assert len(shown) == len(measured)
    for (name, figures), (_, *cells) in zip(measured, shown, strict=True):
        ours, cudnn = figures["ours"], figures.get("cudnn")
        for cell, which in ((cells[0], "hot"), (cells[2], "cold"), (cells[4], "host")):
            assert is_rounded(cell, ours[which]), (name, which)
        for cell, which in ((cells[1], "hot"), (cells[3], "cold")):
            assert cell == "-" or is_rounded(cell, ours[which] / cudnn[which]), (name, which)
