"""Draws the charts of `charts.py` with matplotlib: SVG for pages, PNG for files."""

from __future__ import annotations

import io
import math
from importlib import import_module
from typing import Any

from .charts import Chart, number, title_of

#: Ours in strong colours, torch's in one family, others in others. Names that are not here get those left over.
COLOURS = {
    "fastattn": "#c2410c",
    "fastattn-dynamic": "#f59e0b",
    "fastattn-static": "#7c2d12",
    "torch-cudnn": "#1d4ed8",
    "sdpa": "#1d4ed8",
    "torch-flash": "#0891b2",
    "torch-efficient": "#60a5fa",
    "torch-math": "#94a3b8",
    "eager": "#94a3b8",
    "flex": "#7c3aed",
    "flash-attn": "#15803d",
    "flash-attn-4": "#4d7c0f",
    "flashinfer": "#be185d",
    "xformers": "#a16207",
    "mlx": "#334155",
}
SPARE = ("#0f766e", "#9f1239", "#3f6212", "#5b21b6", "#155e75")
INK, FAINT = "#1f2937", "#e5e7eb"
LONGEST_BAR = 6.0  #: times fastattn's: beyond that a bar is cut and labelled
#: Ours thick and below, the others thin and above: equal lines are both visible.
OURS = {"linewidth": 3.4, "markersize": 6.5, "zorder": 2}
OTHERS = {"linewidth": 1.3, "markersize": 3.5, "zorder": 3}
BOLD = {"fontsize": 11, "fontweight": "bold"}


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element whose text is text."""
    text = _saved(chart, None, format="svg", metadata={"Date": None, "Creator": None}).decode("utf-8")
    return text[text.index("<svg") :].strip()


def png(chart: Chart, caption: str) -> bytes:
    """The chart as a PNG file with its title and a caption in it."""
    return _saved(chart, caption, format="png", dpi=150, metadata={"Software": None})


def _saved(chart: Chart, caption: str | None, **options: Any) -> bytes:
    """The picture; with a caption it stands by itself, and has its title too."""
    style = {
        "text.parse_math": False,  # a result file's dollar signs are no formula
        "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and tested
        "svg.hashsalt": chart.slug,  # the same picture gives the same file, and pictures in one page share no ids
        "font.family": ["sans-serif"],
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with import_module("matplotlib").rc_context(style):
        height = 3.7
        if chart.kind == "bars":
            height = 1.3 + 0.19 * (sum(len(series.points) for series in chart.series) + 0.8 * len(chart.categories))
        figure = import_module("matplotlib.figure").Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.add_subplot()
        {"lines": _lines, "bars": _bars, "pairs": _pairs}[chart.kind](axes, chart)
        if caption:
            # Above the figure, where no layout makes room for them at the axes' expense.
            for text, points, style in ((caption, 4, {"fontsize": 7.5, "color": "#6b7280"}), (chart.title, 17, BOLD)):
                figure.text(0, 1 + points / 72 / height, text, **style)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1 or chart.roof:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        out = io.BytesIO()
        figure.savefig(out, bbox_inches="tight", **options)
    return out.getvalue()


def _colour(chart: Chart, name: str) -> str:
    name = name.partition("|")[0]
    if name in COLOURS:
        return COLOURS[name]
    others = sorted({series.name.partition("|")[0] for series in chart.series} - set(COLOURS))
    return SPARE[others.index(name) % len(SPARE)]


def _scales(axes: Any, chart: Chart) -> None:
    lengths = {x for series in chart.series for x, _ in series.points}
    axes.set_xscale("log", base=2)
    ticks = [2.0**n for n in range(40) if min(lengths) / 1.15 <= 2**n <= max(lengths) * 1.15]
    if len(ticks) < 3:
        ticks = sorted(x for x in lengths if not any(x < other <= 1.15 * x for other in lengths))
    ticks = ticks[:: math.ceil(len(ticks) / 10)]
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
        values = [y for series in chart.series for _, y in series.points]
        few = max(values) < 20 * min(values)  # less than two decades: the numbers between are needed
        axes.yaxis.set_minor_formatter((lambda y, _: f"{y:,.6g}" if f"{y:e}"[0] in "25" else "") if few else "")
        axes.yaxis.set_minor_locator(import_module("matplotlib.ticker").LogLocator(subs=range(2, 10)))
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(True)


def _lines(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        emphasis = OURS if series.name.startswith("fastattn") else OTHERS
        x, y = zip(*series.points, strict=True)
        colour = _colour(chart, series.name)
        axes.plot(x, y, marker="o", color=colour, label=title_of(series.name), **emphasis)
    if chart.roof:
        name, value = chart.roof
        axes.axhline(value, color=INK, linestyle="--", linewidth=1, label=f"{name}: {value:,.4g} (measured)")
    _scales(axes, chart)


def _pairs(axes: Any, chart: Chart) -> None:
    points = {series.name: dict(series.points) for series in chart.series}
    for series in chart.series:
        name, _, which = series.name.partition("|")
        colour = _colour(chart, name)
        style = {"color": colour, "markerfacecolor": colour if which == "first" else "white", "zorder": 3}
        x, y = zip(*series.points, strict=True)
        axes.plot(x, y, "o", markersize=5.5, label=f"{title_of(name)}, {which} call", **style)
        if which == "first":
            second = points.get(f"{name}|second", {})
            for length, ms in series.points:
                axes.plot([length, length], [second.get(length, ms), ms], color=colour, linewidth=1.2, alpha=0.6)
    _scales(axes, chart)


def _bars(axes: Any, chart: Chart) -> None:
    relative = chart.roof is not None
    top = max(y for series in chart.series for _, y in series.points)
    cut = min(top, LONGEST_BAR) if relative else top
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind text, so that no line goes through it
    ticks, place, named = [], 0.0, set()
    for i, _ in enumerate(chart.categories):
        group = [(series.name, y) for series in chart.series for x, y in series.points if x == i]
        for name, value in group:
            label = None if name in named else title_of(name)
            named.add(name)
            axes.barh(place, min(value, cut), height=0.86, color=_colour(chart, name), label=label)
            text = f"{value:.2f}x" if relative else number(value)
            axes.text(min(value, cut) + 0.01 * cut, place, text, va="center", fontsize=7.5, bbox=white)
            place += 1
        ticks.append(place - (len(group) + 1) / 2)
        place += 0.8
    axes.set_yticks(ticks, chart.categories)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, cut * 1.12)
    axes.set_xlabel(chart.y)
    axes.grid(True, axis="x")
    if relative:
        axes.axvline(1.0, color=INK, linestyle="--", linewidth=1)
