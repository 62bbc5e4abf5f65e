"""Draws the charts of `data.py` with matplotlib: SVG for pages, any format for a file."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .data import KNOWN, Chart, number, title_of

SPARE = ("#0f766e", "#9f1239", "#3f6212", "#5b21b6", "#155e75")
LONGEST_BAR = 6.0  #: times fastattn's: beyond that a bar is cut and labelled
#: Ours thick and below, the others thin and above: equal lines are both visible.
OURS = {"linewidth": 3.4, "markersize": 6.5, "zorder": 2}
OTHERS = {"linewidth": 1.3, "markersize": 3.5, "zorder": 3}
STYLE: Any = {
    "text.parse_math": False,  # a result file's dollar signs are no formula
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and tested
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element whose text is text."""
    text = picture(chart, format="svg", metadata={"Date": None, "Creator": None}).decode("utf-8")
    return text[text.index("<svg") :].strip()


def picture(chart: Chart, caption: str | None = None, **options: Any) -> bytes:
    """The chart as a file. With a caption it stands by itself, and has its title too. options: of savefig."""
    # The same picture gives the same file, and pictures in one page share no ids.
    with rc_context(STYLE | {"svg.hashsalt": chart.slug}):
        height = 3.7
        if chart.kind == "bars":
            height = 1.3 + 0.19 * (sum(map(len, chart.series.values())) + 0.8 * len(chart.categories))
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.add_subplot()
        (_bars if chart.kind == "bars" else _lines)(axes, chart)
        if caption:  # above the figure, where no layout makes room for it at the axes' expense
            figure.text(0, 1 + 4 / 72 / height, caption, fontsize=7.5, color="#6b7280")
            figure.text(0, 1 + 17 / 72 / height, chart.title, fontsize=11, fontweight="bold")
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1 or chart.roof:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        out = io.BytesIO()
        figure.savefig(out, bbox_inches="tight", **options)
    return out.getvalue()


def _colour(chart: Chart, name: str) -> str:
    name = name.partition("|")[0]
    if name in KNOWN:
        return KNOWN[name][1]
    others = sorted({series.partition("|")[0] for series in chart.series} - set(KNOWN))
    return SPARE[others.index(name) % len(SPARE)]


def _lines(axes: Any, chart: Chart) -> None:
    for key, points in chart.series.items():
        name, _, which = key.rpartition("|") if chart.kind == "pairs" else (key, "", "")
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": _colour(chart, name), "marker": "o", "label": title_of(name)}
        if chart.kind == "lines":
            axes.plot(x, y, **style, **(OURS if name.startswith("fastattn") else OTHERS))
            continue
        style |= {"label": f"{title_of(name)}, {which} call", "linestyle": "", "zorder": 3}
        axes.plot(x, y, markerfacecolor=style["color"] if which == "first" else "white", **style)
        second = dict(chart.series.get(f"{name}|second", []))
        for length, ms in points if which == "first" else ():
            axes.plot([length, length], [second.get(length, ms), ms], color=style["color"], alpha=0.6)
    if chart.roof:
        name, value = chart.roof
        axes.axhline(value, color="black", linestyle="--", linewidth=1, label=f"{name}: {value:,.4g} (measured)")
    _scales(axes, chart)


def _scales(axes: Any, chart: Chart) -> None:
    lengths = {x for points in chart.series.values() for x, _ in points}
    ticks = sorted(x for x in lengths if not any(x < other <= 1.15 * x for other in lengths))
    ticks = ticks[:: math.ceil(len(ticks) / 10)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
        values = [y for points in chart.series.values() for _, y in points]
        few = max(values) < 20 * min(values)  # less than two decades: the numbers between are needed
        axes.yaxis.set_minor_formatter((lambda y, _: f"{y:,.6g}" if f"{y:e}"[0] in "25" else "") if few else "")
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.grid(True)


def _bars(axes: Any, chart: Chart) -> None:
    top = max(y for points in chart.series.values() for _, y in points)
    cut = min(top, LONGEST_BAR) if chart.roof else top
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind text, so that no line goes through it
    ticks, place, named = [], 0.0, set()
    for i, _ in enumerate(chart.categories):
        group = [(name, y) for name, points in chart.series.items() for x, y in points if x == i]
        for name, value in group:
            label = None if name in named else title_of(name)
            named.add(name)
            axes.barh(place, min(value, cut), height=0.86, color=_colour(chart, name), label=label)
            text = f"{value:.2f}x" if chart.roof else number(value)
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
    if chart.roof:
        axes.axvline(chart.roof[1], color="black", linestyle="--", linewidth=1)
