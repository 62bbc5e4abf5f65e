"""Result files that a stranger wrote: what they say is shown as text, does nothing, and fails in one line."""

import copy
import html.parser
import json
import os
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytest.importorskip("jinja2", reason="pages need jinja2")

from benchmarks.report import plots
from benchmarks.report.__main__ import main, render
from benchmarks.report.reading import load
from benchmarks.report.sections import drawn, sections_of
from fastattn.bench import case
from fastattn.common.printable import printable

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/*.json"))

#: What would do something where it is not shown as text.
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>", "--><script>alert(1)</script><!--", "--!><b>x</b>", "]]><script>1</script>",
    "&lt;script&gt;", "[x](javascript:alert(1))", "![x](http://evil/x.png)", "`<b>`", "``` <b>", "a | b | <b>c</b>",
    "{: onclick=alert(1) }", "text { onclick=alert(1) }", "# head\n\n<b>x</b>", "\n\n- [x]: http://evil",
    "\x1b[31mred\x1b]0;title\x07", "\x9b31m", "a\rb\x08\x08c\x00d\x7f", "\u202egnp.exe\u2066", "\ud800", "\ufeff",
    r"$\frac{$", "$x$ $$", r"\input{/etc/passwd}", "%s %n {0} {x.__class__}", "*" * 50,
)  # fmt: skip


#: A few at a time: to draw pictures takes long.
SOME = [" ".join(HOSTILE[i : i + 6]) for i in range(0, len(HOSTILE), 6)]


def report(tmp_path, data, name="r.json"):
    """The command. Returns its status."""
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return main([str(path), "--html", f"{out}/x.html"])


def row(label="a", **more):
    entries = {"fastattn": {"us": 10.0, "relative_error": 1e-3, "first_ms": 3.0}, "other": {"us": 20.0}}
    shape = {"q_len": 64, "kv_len": 64, "batch": 1, "q_heads": 4, "kv_heads": 2, "dim": 16, "kind": "inference"}
    return {"label": label, "case": shape, "implementations": entries} | more


def sweep(sections, **more):
    head = {"benchmark": "sweep op", "environment": {"gpu": "G"}, "command": "fastattn sweep", "date": "2026-01-02"}
    return head | {"sections": sections} | more


def with_text(value, text, key=None):
    """A result file with every text in it replaced, and the keys that are names of something as well."""
    if isinstance(value, dict):
        return {
            (
                f"{text}{i}{'_tps' * (key == 'averages')}"
                if key in ("implementations", "figures", "sections", "averages")
                else name
            ): with_text(inner, text, name)
            for i, (name, inner) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [with_text(inner, text, key) for inner in value]
    return text if isinstance(value, str) and key not in ("benchmark", "kind") else value


class Elements(html.parser.HTMLParser):
    """Elements, attributes and comments of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.comments, self.links = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]

    def handle_comment(self, data):
        self.comments.append(data)


EXAMPLES = {
    "sweep": sweep({"masks": [row("x"), row("y")], "decode": [row(f"S={n}") for n in (1, 2, 3)]}, method={"a": "b"}),
    "other": {"benchmark": "x", "environment": {"gpu": "G"}, "command": "c", "date": "d", "averages": {"a": 1}},
    "model": {
        "benchmark": "model",
        "environment": {"gpu": "G"},
        "command": "c",
        "date": "d",
        "arguments": {"dtype": "bfloat16", "prompt_tokens": 100},
        "model": {"name": "m", "parameters": 10**9, "random_weights": True},
        "implementations": {
            "fastattn": {
                "averages": {"prompt_tps": 1.0, "generation_tps": 2.0},
                "fresh_lengths": {
                    "median_ratio": 1.5,
                    "lengths": [{"length": n, "first_s": 0.2, "second_s": 0.1} for n in (10, 20)],
                },
            },
            "sdpa": {"averages": {}, "error": "e"},
        },
    },
}


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """The elements and attributes that a page of ours has."""
    found = set(), set()
    for name, data in EXAMPLES.items():
        folder = tmp_path_factory.mktemp(name)
        assert report(folder, data) == 0
        made = Elements((folder / "out" / "x.html").read_text())
        found[0].update(made.tags)
        found[1].update(made.attributes)
    return found


@pytest.mark.parametrize("text", [*SOME, "x" * 100_000], ids=range(len(SOME) + 1))
@pytest.mark.parametrize("name", EXAMPLES)
def test_texts_are_shown_and_do_nothing(name, text, tmp_path, harmless, capsys):
    status = report(tmp_path, with_text(copy.deepcopy(EXAMPLES[name]), text))
    captured = capsys.readouterr()
    assert status == (2 if len(text) > 1000 and name == "sweep" else 0), "in a picture a name has a limit"
    assert captured.err.count("\n") == (status == 2)
    assert all(part.isprintable() for part in (captured.out + captured.err).split("\n"))
    if status:
        assert sorted(os.listdir(tmp_path / "out")) == []
        return
    text = (tmp_path / "out" / "x.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", text)
    found = Elements(text)
    assert found.tags <= harmless[0] and found.attributes <= harmless[1]
    assert all(link.startswith("#") for link in found.links)
    pictures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(pictures) == text.count("<figure ")
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        assert not [e for e in tree.iter() if e.tag.rpartition("}")[2] in ("script", "image", "a", "foreignObject")]
        assert not [key for e in tree.iter() for key in e.attrib if key.lower().startswith("on")]


# --- names of files


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "..", ".", "", "a/b", "a\\b", "a\x00b", "x" * 150, "é", "con", "-rf", "a\nb"]
)
def test_sections_name_no_files_elsewhere(name, tmp_path):
    """A picture's file is named by its slug: in docs/benchmarks, of the site."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(sweep({name: [row()], f"{name}!": [row()], name.upper() + "?": [row()]})))
    (section,) = sections_of({str(path): load(path)})
    slugs = [chart.slug for chart in section.charts]
    assert len(slugs) == 3 == len({slug.lower() for slug in slugs}), "each has a file of its own"
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", slug) for slug in slugs)


def test_the_name_of_the_file_itself(tmp_path, capsys):
    name = '"><script>alert(1)</script>\x1b[31m](x).json'.replace("/", "|")
    assert report(tmp_path, sweep({"masks": [row()]}), name) == 0
    found = Elements((tmp_path / "out" / "x.html").read_text())
    assert "script" not in found.tags
    assert report(tmp_path, "{", name) == 2
    assert "\x1b" not in capsys.readouterr().err


# --- values


@pytest.mark.parametrize(
    "text, message",
    [
        ("NaN", "NaN is no number"), ("Infinity", "Infinity is no number"), ("-Infinity", "-Infinity is no number"),
        ("1e999", "1e999 is no number"), ("1" * 5000, "is no number"), ('"x', "expected a JSON file"),
        ("[" * 100_000, "recursion"), ('{"a":' * 100_000, "recursion"), ("\x00", "expected a JSON file"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(text, message, tmp_path, capsys):
    data = json.dumps({"benchmark": "x", "environment": {}, "figures": {"a": "HERE"}}).replace('"HERE"', text)
    assert report(tmp_path, data) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 1000
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\x80", b"", b"[]", b"null", b"1", b'"x"'])
def test_what_is_no_result_is_refused(data, tmp_path, capsys):
    (tmp_path / "r.json").write_bytes(data)
    assert main([str(tmp_path / "r.json"), "--html", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("path", ["/dev/zero", "/", "/proc/self/mem"])
def test_what_never_ends_is_refused(path, tmp_path, capsys):
    assert main([path, "--html", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def places(value, path=()):
    """Every place in a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


WRONG = (
    None,
    True,
    "text",
    -1,
    0,
    1e300,
    10**19,
    0.5,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["x"] * 3,
    {"us": "x"},
    -1e300,
)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_value_of_another_type_anywhere_is_one_line(path):
    """In our own files, at places drawn anew each time: a section, or a ValueError."""
    data = load(path)
    rng = random.Random()
    every = list(places(data))
    refused = 0
    for turn in range(30):
        where, new = rng.choice(every[1:]), rng.choice(WRONG)
        wrong = changed(data, where, new)
        try:
            (section,) = sections_of({str(path): wrong})
            nothing = {chart.slug: "" for chart in section.charts}
            text = render("page.html", [section], nothing)
            drawn([section] if turn % 10 == 0 else [], lambda chart, _: plots.svg(chart))
        except ValueError:
            refused += 1
        else:
            assert all(line.isprintable() for line in text.split("\n")), (where, new)
    for key in data:
        for new in WRONG:
            try:
                sections_of({str(path): data | {key: new}})
            except ValueError:
                refused += 1
    assert refused, "something of it was wrong"


@pytest.mark.parametrize(
    "change",
    [
        {"q_len": "64"}, {"batch": 10**18}, {"batch": -1}, {"dim": 1e300}, {"lengths": [10**19]}, {"kind": "x"},
        {"kind": []}, {"packed": []}, {"q_len": "x" * 1000, "batch": 10**9}, {"kv_len": [1] * 10, "batch": 10**9},
        {"sinks": {"a": 1}}, {"left": "x"}, {"q_heads": 0}, {"head_major": []},
    ],
    ids=str,
)  # fmt: skip
def test_cases_that_cannot_be(change, tmp_path, capsys):
    rows = [row(f"S={n}") for n in (16, 32, 64)]
    for n, one in zip((16, 32, 64), rows):
        one["case"] = one["case"] | {"q_len": n, "kv_len": n} | change
    assert report(tmp_path, sweep({"decode": rows, "prefill": rows})) in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("us", [0, -1, 1e-300, 1e300, True, "10", [1], None, {"a": 1}])
def test_times_that_cannot_be(us, tmp_path, capsys):
    rows = [row(f"S={n}") for n in (16, 32, 64)]
    for n, one in zip((16, 32, 64), rows):
        one["case"] = one["case"] | {"q_len": n, "kv_len": n}
    for which in ("fastattn", "other"):
        wrong = copy.deepcopy(rows)
        wrong[1]["implementations"][which]["us"] = us
        status = report(tmp_path, sweep({"decode": wrong, "masks": [wrong[1]]}))
        error = capsys.readouterr().err
        assert status in (0, 2) and error.count("\n") == (status == 2), error


@pytest.mark.parametrize(
    "data",
    [
        sweep({"masks": [row(str(i)) for i in range(20_000)]}),
        sweep({"masks": [{"label": "x", "implementations": {f"i{i}": {"us": 1.0} for i in range(2000)}}]}),
        sweep({"masks": [row(" ".join(map(str, range(i, i + 400)))) for i in range(400)]}),
        {"benchmark": "model", "environment": {}, "implementations": {
            f"a{i}": {"averages": {f"k{i}_tps": 1.0}} for i in range(3000)}},
        {"benchmark": "x", "environment": {}, "filler": "x" * (17 << 20)},
    ],
    ids=["rows", "columns", "labels", "averages", "bytes"],
)  # fmt: skip
def test_files_that_are_too_large_are_refused_at_once(data, tmp_path, capsys):
    assert report(tmp_path, data) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


def test_a_large_batch_is_a_number_and_no_tuple():
    one = case.Case(4, 8, batch=3, left=2)
    each = case.Case(4, 8, left=2)
    assert (one.pairs, one.kv_bytes) == (3 * each.pairs, 3 * each.kv_bytes)
    assert case.Case(1, 8, batch=10**15).pairs == 8 * 10**15


# --- pictures


def test_nothing_is_written_where_something_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("the picture\nis wrong")

    monkeypatch.setattr(plots, "_bars", fail)
    assert report(tmp_path, EXAMPLES["sweep"]) == 2
    assert "RuntimeError: the picture; is wrong" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain ä 漢 text", "plain ä 漢 text"), ("\x1b[1m", r"\x1b[1m"), ("a\r\nb\tc", "a  b c"), ("\x9b", r"\x9b"),
        ("\u202e", r"\u202e"), ("\ud800", r"\ud800"), ("\u2028", " "), ("", ""),
    ],
)  # fmt: skip
def test_printable(text, shown):
    assert printable(text) == shown
