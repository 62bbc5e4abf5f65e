"""`python -m benchmarks.report`: a page of result files, and what a browser makes of it; the picture of a sweep."""

import argparse
import html
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytest.importorskip("jinja2", reason="pages need jinja2")

from matplotlib import rc_context

from benchmarks.report import data as charts
from benchmarks.report import plots
from benchmarks.report import sweep as sweep_section
from benchmarks.report.__main__ import main, page
from benchmarks.report.data import Chart, Table
from benchmarks.report.reading import load
from benchmarks.report.sections import section_of, sections_of
from fastattn.bench import plot
from fastattn.cli import sweep

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/*.json"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ENVIRONMENT = {"gpu": "NVIDIA Test <GPU>", "torch": "2.11.0", "cudnn": "9.19.0", "driver": None, "switches": {}}


def command(*argv):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    sweep.add_command(commands)
    arguments = parser.parse_args([*map(str, argv)])
    arguments.argv = [*map(str, argv)]
    return arguments.run(arguments)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """What `fastattn sweep` writes on a CPU, made once: (folder, result, what it printed)."""
    folder, printed = tmp_path_factory.mktemp("report"), io.StringIO()
    with redirect_stdout(printed):
        assert command("sweep", "--device", "cpu", "--json", folder / "op.json", "--plot", folder / "op.svg") == 0
        assert main([str(folder / "op.json"), "--html", str(folder / "op.html")]) == 0
    return folder, json.loads((folder / "op.json").read_text()), printed.getvalue()


class Elements(html.parser.HTMLParser):
    """Counts elements, keeps ids and text."""

    def __init__(self, text):
        super().__init__()
        self.counts, self.ids, self.text, self.links = {}, [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        found = dict(attrs)
        if "id" in found and tag in ("article", "figure"):
            self.ids.append(found["id"])
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_the_sweep_without_a_name(swept):
    folder, found, printed = swept
    assert found["benchmark"] == "sweep op"
    assert list(found["sections"]) == [
        "roof", "prefill", "chunks over a cache", "decode", "few queries", "training", "masks",
        "windows, sinks, softcap", "fresh lengths",
    ]  # fmt: skip
    assert set(found["peers"]) == {"flash-attn", "flash-attn-4", "flashinfer", "xformers", "mlx"}
    for section, rows in found["sections"].items():
        for row in rows:
            assert "error" not in row, (section, row)
            if section not in ("roof", "fresh lengths"):
                mine = row["implementations"]["fastattn"]
                assert mine["us"] > 0 and mine["tflop_s"] > 0 and mine["gb_s"] > 0
                assert 0 < mine["relative_error"] < 1.6e-2
                assert row["check"].startswith("reference in float64")
    (fresh,) = found["sections"]["fresh lengths"]
    assert len(fresh["calls"]) == 4
    assert all(call["first_ms"] > 0 and call["second_ms"] > 0 for call in fresh["calls"])
    assert f"Wrote {folder / 'op.html'}" in printed and f"Wrote {folder / 'op.svg'}" in printed


def test_the_picture_of_a_sweep_has_a_bar_for_each_time(swept):
    """As many as there are times, each labelled with its implementation; a panel for each section with any."""
    folder, found, _ = swept
    with rc_context({"svg.fonttype": "none"}):
        text = plot.drawn(found, "x.svg").decode()
    assert ElementTree.parse(folder / "op.svg").getroot().tag.endswith("svg")
    measured = [
        (section, name, entry)
        for section, rows in found["sections"].items()
        for row in rows
        for name, entry in row.get("implementations", {}).items()
        if "us" in entry
    ]
    labels = re.findall(r">\s*(\S+) ([0-9.e+]+) µs</text>", text)
    assert sorted(labels) == sorted((name, f"{entry['us']:.4g}") for _, name, entry in measured)
    for section in {section for section, *_ in measured}:
        assert f">{section}</text>" in text
    for name, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert plot.drawn(found, f"x.{name}").startswith(start)
    assert plot.drawn({**found, "sections": {}}, "x.png").startswith(b"\x89PNG"), "a sweep that measured nothing"


def test_the_page_says_everything_by_itself(swept):
    folder, found, _ = swept
    text = (folder / "op.html").read_text()
    page = Elements(text)
    assert page.counts["svg"] == page.counts["figure"] >= 5
    assert page.counts["table"] >= len(found["sections"])
    assert "script" not in page.counts
    for link in page.links:  # nothing is fetched: every reference is into the page itself
        assert link.startswith("#"), link
    assert found["command"] in page.text and found["date"] in page.text and found["environment"]["torch"] in page.text
    assert "not installed, so not measured: " in page.text
    for row in (row for rows in found["sections"].values() for row in rows):
        assert row["label"] in page.text
    for figure in re.findall(r"<figure.*?</figure>", text, re.S):
        assert len(re.search(r"<figcaption><h3>.+?</h3>\s*<p>(.+?)</p>", figure, re.S)[1]) > 20


def test_a_report_is_remade_from_its_file(swept, tmp_path):
    folder, _, _ = swept
    argv = [str(folder / "op.json"), "--html", str(tmp_path / "op.html")]
    assert main([*argv, "--picture", "op-masks-bars", str(tmp_path / "masks.png")]) == 0
    assert (tmp_path / "op.html").read_text() == (folder / "op.html").read_text()
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_kept_result_has_a_section(path, tmp_path):
    found = load(path)
    section = section_of(str(path), found)
    assert any(isinstance(part, Table) and part.rows for part in section.parts)
    for part in section.parts:
        if isinstance(part, Chart):
            assert plots.svg(part).startswith("<svg")
            assert plots.svg(part) == plots.svg(part)
        else:
            assert all(len(row) == len(part.head) for row in part.rows)


def test_older_files_are_read_with_the_names_of_today(tmp_path):
    """No figure is lost."""
    entries = {"fastattn-any": {"us": 3.0}, "fastattn-exact": {"us": 2.0}, "torch-cudnn": {"us": 4.0}}
    ratios = {"any/exact": 1.5, "/ best torch": 0.5}
    old = result({"forward": [{"label": "S=2", "implementations": entries, "ratios": ratios}]})
    (tmp_path / "old.json").write_text(json.dumps(old))
    (row,) = load(tmp_path / "old.json")["sections"]["forward"]
    assert list(row["implementations"].items()) == [
        ("fastattn-dynamic", {"us": 3.0}), ("fastattn-static", {"us": 2.0}), ("torch-cudnn", {"us": 4.0}),
    ]  # fmt: skip
    assert row["ratios"] == {"dynamic/static": 1.5, "/ best other": 0.5}


def row_of(label, kind="inference", **more):
    case = {"q_len": 64, "kv_len": 64, "batch": 1, "q_heads": 4, "kv_heads": 2, "dim": 16, "kind": kind}
    entries = {"fastattn": {"us": 10.0, "method": "graph", "relative_error": 1e-3}, "torch-cudnn": {"us": 20.0}}
    return {"label": label, "case": case | more, "implementations": entries}


def result(sections, **more):
    head = {"benchmark": "sweep op", "environment": ENVIRONMENT, "command": "fastattn sweep", "date": "2026-01-02T03"}
    return head | {"sections": sections} | more


def test_what_failed_is_named_and_not_drawn():
    row = row_of("a")
    row["implementations"] |= {
        "torch-math": {"refused": "it has no such thing"},
        "torch-flash": {"error": "RuntimeError: No available kernel."},
        "torch-efficient": {"error": "ValueError: wrong result: relative error 1"},
        "flex": {"error": "RuntimeError: out of memory"},
    }
    section = section_of("x.json", result({"masks": [row]}))
    table = next(part for part in section.parts if isinstance(part, Table))
    assert table.rows[0][1:7] == ["*10", "20", "cannot", "cannot", "wrong", "failed"]
    chart = next(part for part in section.parts if isinstance(part, Chart))
    assert set(chart.series) == {"fastattn", "torch-cudnn"}
    assert "torch math: it has no such thing (a)" in "\n".join(section.notes)
    assert "masks: fastattn takes 0.50 times what the best other takes" in section.findings


def test_lengths_make_a_line_and_others_bars():
    rows = [row_of(f"S={n}", q_len=n, kv_len=n) for n in (16, 32, 64)]
    line, rest = sweep_section.lines_and_rest([*rows, row_of("other", dim=32), row_of("packed", packed=[30, 34])])
    assert [row["label"] for row in line] == ["S=16", "S=32", "S=64"]
    assert [row["label"] for row in rest] == ["other", "packed"]
    assert sweep_section.lines_and_rest(rows[:2]) == ([], rows[:2])


def test_rates_are_of_what_is_seen():
    row = row_of("a", q_len=4, kv_len=4)
    assert sweep_section.tflops(row, 10.0) == pytest.approx(4 * 10 * 4 * 16 / 10 / 1e6)  # 1 + 2 + 3 + 4 pairs
    assert sweep_section.gigabytes(row, 20.0) == pytest.approx(2 * 4 * 2 * 16 * 2 / 20 / 1e3)


def test_the_roof_is_drawn_where_it_belongs():
    roof = {"label": "this machine", "figures": {"copy GB/s": 3000.0, "matmul TFLOP/s": 700.0}}
    lines = [row_of(f"S={n}", q_len=1, kv_len=n) for n in (16, 32, 64)]
    section = section_of("x.json", result({"roof": [roof], "decode": lines, "prefill": lines}))
    roofs = {part.slug: part.roof for part in section.parts if isinstance(part, Chart) and part.kind == "lines"}
    assert roofs["x-decode-rate"] == ("copying memory", 3000.0)
    assert roofs["x-prefill-rate"] == ("a large matrix product", 700.0)
    assert roofs["x-decode-time"] is None


def test_text_from_a_file_is_no_markup():
    evil = "<script>alert(1)</script>"
    text = page([section_of("x.json", result({"masks": [row_of(evil)]}, command=evil))])
    assert evil not in text
    assert "script" not in Elements(text).counts
    assert "NVIDIA Test &lt;GPU&gt;" in text


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0"), (8192, "8,192"), (1234.5, "1,234"), (0.12345, "0.1235"), (1.5e-7, "1.50e-07"), ("x", "x")],
)
def test_numbers(value, text):
    assert charts.number(value) == text


def test_labels_lose_what_they_share():
    assert sweep_section.short_labels(["B=1 Sq=4 D=8", "B=2 Sq=4 D=8"]) == (["B=1", "B=2"], "Sq=4 D=8")
    assert sweep_section.short_labels(["a", "a"]) == (["a", "a"], "")
    assert sweep_section.short_labels(["only one"]) == (["only one"], "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("{}/good.json", "--html", "{}/x.html", "--picture", "x", "{}/x.png"), "expected the id of a figure"),
        (("no/such.json", "--html", "{}/x.html"), "cannot be read"),
        (("{}/bad.json", "--html", "{}/x.html"), "expected a JSON file"),
        (("{}/other.json", "--html", "{}/x.html"), "expected a result file of fastattn"),
        (("{}/other.json", "--html", "{}/no/x.html"), "there is no directory"),
    ],
)
def test_bad_arguments_are_refused(argv, message, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "good.json").write_text(json.dumps(result({})))
    assert main([text.format(tmp_path) for text in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_a_kind_that_is_not_known_gives_its_figures():
    data = {"benchmark": "new", "environment": ENVIRONMENT, "deep": {"a": [1, {"b": 2.5}], "flag": True}}
    (table,) = section_of("new.json", data).parts
    assert table.rows == [["deep / a 1", "1"], ["deep / a 2 / b", "2.5"]]


def test_files_of_one_name_are_told_apart():
    found = {f"results/{name}.json": result({}) for name in ("h100/decode", "h200/decode", "h200/llama-3.1-8b")}
    assert [c.name for c in sections_of(found)] == ["h100-decode", "h200-decode", "llama-3.1-8b"]


def test_several_gpus():
    row = {"strategy": "auto", "chosen": "ring", "ms": 5.0, "predicted_ms": 4.5, "errors": {"out": 2e-3}}
    refused = {"strategy": "ulysses", "chosen": "ulysses", "refusal": "3 heads among 2 ranks"}
    section = {"backward": False, "length": 4096, "one_ms": 8.0, "rows": [row, refused]}
    data = {"benchmark": "parallel", "environment": ENVIRONMENT, "ranks": 2, "sections": [section]}
    section = section_of("p.json", data)
    chart, table = section.parts
    assert chart.series == {"one GPU": [(0, 8.0)], "auto": [(0, 5.0)]}
    assert table.rows[1] == ["auto (ring)", "5", "1.60x", "4.5", "2.0e-03"]
    assert section.notes == ["forward, 4,096 tokens: ulysses: 3 heads among 2 ranks"]
    assert plots.svg(chart)


def test_without_matplotlib_a_sweep_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"--plot needs matplotlib: pip install 'fastattn\[bench\]'"):
        command("sweep", "--device", "cpu", "--plot", tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_a_picture_of_no_known_format_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"--plot: expected a file that ends in \.png, \.svg, \.pdf"):
        command("sweep", "--device", "cpu", "--plot", tmp_path / "x.html")


def test_each_table_says_machine_commit_and_command(swept):
    folder, found, _ = swept
    text = (folder / "op.html").read_text()
    captions = re.findall(r"<caption>(.*?)</caption>", text)
    assert len(captions) == text.count("<table>")
    section = section_of("op.json", found)
    for caption in captions:
        assert html.unescape(caption) == f"{section.caption}: <code>{found['command']}</code>"
    assert (found["environment"]["commit"] or "")[:10] in section.caption
    clean = section_of("x.json", result({}) | {"environment": {"gpu": "G", "torch": "2", "commit": "a" * 40}})
    assert clean.caption == "G, torch 2, commit aaaaaaaaaa, 2026-01-02"
    assert (
        "commit bbbbbbbbbb with changes"
        in section_of("x.json", result({}) | {"environment": {"commit": "b" * 40 + "-dirty"}}).caption
    )


# --- a browser


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a file in a headless browser with more arguments, and returns what it prints."""
    if BROWSER is None:
        pytest.skip("no browser here (chromium, chromium-browser or google-chrome): the page was not looked at")
    profile = tmp_path_factory.mktemp("profile")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # a browser refuses to run as root with one

    def run(path, *more):
        flags = ["--headless", *sandbox, "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        argv = [BROWSER, *flags, *more, f"file://{path}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def test_a_browser_shows_charts_and_tables(swept, browse):
    folder, found, _ = swept
    dom = browse(folder / "op.html", "--dump-dom")
    page = Elements(dom)
    assert page.counts["svg"] == page.counts["figure"] >= 5
    assert page.counts["table"] >= len(found["sections"])
    for figure in re.findall(r"<figure.*?</figure>", dom, re.S):
        assert "fastattn" in figure or "call" in figure  # the legend: text of the picture, not a drawing of it
        assert figure.count("<path") + figure.count("<use") > 10


def test_a_screenshot_has_the_colours_of_the_charts(swept, browse, tmp_path):
    """Pixels: our bars and lines are there, and in the width that is shown nothing is cut off."""
    Image = pytest.importorskip("PIL.Image")
    folder, _, _ = swept
    shot = tmp_path / "shot.png"
    browse(folder / "op.html", f"--screenshot={shot}", "--window-size=1200,6000", "--hide-scrollbars")
    with Image.open(shot) as image:
        picture = image.convert("RGB")
        assert picture.size == (1200, 6000)
        found = {colour: 0 for colour in ("#c2410c", "#94a3b8")}  # fastattn, torch math
        for count, (r, g, b) in picture.getcolors(1 << 24):
            if (name := f"#{r:02x}{g:02x}{b:02x}") in found:
                found[name] += count
        assert min(found.values()) > 1000, found
        margin = picture.crop((1180, 0, 1200, 6000)).getcolors(1 << 16)
        assert len(margin) == 1, "something reaches into the margin"
