"""Figures that README.md and the pages quote are those of the result files that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
H100, H200 = [ROOT / "benchmarks" / "results" / name for name in ("h100", "h200")]
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


def test_readme_never_seen() -> None:
    kept = json.loads((H200 / "never_seen.json").read_text(encoding="utf-8"))
    found = re.search(r"(\d+) calls and (\d+) training steps of shapes .*?: (\d+) of them waited", README, re.DOTALL)
    assert found is not None
    calls = kept["calls"]
    assert [int(x) for x in found.groups()] == [calls["count"], calls["steps"], calls["builds"] + calls["compiles"]]
    slowest = max(row["ours_ms"] for row in kept["first_call"])
    assert f"takes {slowest:.0f} ms, import of fastattn included" in README


def test_readme_users() -> None:
    summary = json.loads((H200 / "users.json").read_text(encoding="utf-8"))["summary"]
    near = [summary[way]["near"] for way in ("captured", "eager")]
    assert (
        f"Of {summary['rows']} calls of users fastattn is best or within 2% in {near[0]} in CUDA graphs, in {near[1]} "
        in README
    )


def test_the_cost_of_an_order() -> None:
    """The page quotes the deterministic backward and the one without an order, in microseconds."""
    measured = json.loads((H200 / "hopper_backward.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text = page.partition("The order costs")[2].partition("## Limits")[0]
    found = re.findall(r"(\d+) us\s+for (\d+)|(\d+) for (\d+)", text)
    shown = [tuple(int(x) for x in pair if x) for pair in found]
    rows_ = "B2 2048", "B1 2048", "full 24/24 4608"
    wanted = [tuple(round(measured[name][who]["hot"]) for who in ("deterministic", "ours")) for name in rows_]
    assert shown == wanted
    ratios = [row["deterministic"]["hot"] / row["ours"]["hot"] for row in measured.values() if "deterministic" in row]
    low, high = re.findall(r"([\d.]+) to ([\d.]+) times the time of the Hopper backward without", text)[0]
    assert float(low) - 0.01 <= min(ratios) and max(ratios) <= float(high) + 0.01, ratios


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
