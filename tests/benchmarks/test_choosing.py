"""The page "When is fastattn the right choice", from a made-up result file; and the kept page against the kept file."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import choosing
from benchmarks.report.reading import load
from benchmarks.report.sections import section_of
from fastattn.bench.users import summary
from fastattn.bench.users.reasons import REASONS
from fastattn.bench.users.rows import BY_NAME

ROOT = Path(choosing.__file__).parents[1]


def entry(us, eager, **more):
    return {"us": us, "eager": {"us": eager}, "host": {"us": 5.0}, "error": 1e-3, **more}


def row(who, **contenders):
    found = {"who": who, "contenders": {name.replace("_", "-"): value for name, value in contenders.items()}}
    return found | summary.ratios(found)


@pytest.fixture
def data():
    rows = {
        "quick": row("prefill", fastattn=entry(5.0, 9.0), torch=entry(10.0, 10.0)),
        "equal": row("prefill", fastattn=entry(10.2, 9.0), torch=entry(10.0, 10.0), flex={"refused": "no"}),
        "slower": row("vision", fastattn=entry(13.0, 30.0), torch_cudnn=entry(10.0, 10.0)),
        "host": row("vision", fastattn=entry(9.0, 40.0), torch=entry(10.0, 20.0), xformers={"failed": "no"}),
        "alone": row("vision", fastattn=entry(9.0, 40.0), torch=entry(1.0, 1.0, failed="wrong result")),
    }
    return {
        "benchmark": "sweep users",
        "date": "2026-01-02T03:04:05+00:00",
        "command": "fastattn sweep users",
        "environment": {"gpu": "NVIDIA H200", "torch": "2.11", "commit": "0123456789abcdef"},
        "absent": {"mlx": "no wheel for this Python"},
        "complete": True,
        "method": {},
        "rows": rows,
    }


def cells(text, heading):
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"][2:]


def test_the_page_says_what_the_rows_say(data):
    text = choosing.page(data, "benchmarks/results/h200/users.json", {"slower": "its head dim."})
    assert "NVIDIA H200, torch 2.11, commit 0123456789, 2026-01-02; `fastattn sweep users`" in text
    assert f"**{summary.sentence(summary.of(data['rows']))}.**" in text
    assert cells(text, "By kind of call") == [
        ["prefill", "2", "2", "0.76", "1.02", "equal", "torch"],
        ["vision", "3", "2", "1.10", "1.30", "slower", "torch cuDNN"],
    ]
    right = text.split("## Choose it for\n")[1].split("\n## ")[0]
    assert "**prefill**: 2 of 2 calls, at 0.76 of" in right and "**vision**: 1 of 3 calls, at 0.90 of" in right
    assert "**Calls that no peer here can make**: alone." in right
    assert cells(text, "Choose something else for") == [["slower", "1.30", "torch cuDNN", "its head dim."]]
    assert cells(text, "Small calls that Python makes one by one") == [["host", "torch", "40", "5", "20", "5", "2.00"]]
    assert text.rstrip().endswith("- MLX: no wheel for this Python")


def test_a_row_over_the_line_needs_its_reason(data):
    choosing.check_reasons(data["rows"], {"slower": "why"})
    with pytest.raises(ValueError, match=r"REASONS: .*missing: slower \(1\.30\)"):
        choosing.check_reasons(data["rows"], {})
    with pytest.raises(ValueError, match=r"REASONS: .*: quick"):
        choosing.check_reasons(data["rows"], {"slower": "why", "quick": "why"})


def test_the_command(data, tmp_path, monkeypatch):
    file = tmp_path / "users.json"
    file.write_text(json.dumps(data))
    monkeypatch.setattr(choosing, "REASONS", {})
    with pytest.raises(ValueError, match="missing: slower"):
        choosing.main([str(file), "--docs", str(tmp_path)])
    assert not (tmp_path / "choosing.md").exists()
    monkeypatch.setattr(choosing, "REASONS", {"slower": "why"})
    assert choosing.main([str(file), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "choosing.md").read_text() == choosing.page(load(file), "users.json", {"slower": "why"})
    file.write_text(json.dumps(data | {"benchmark": "model"}))
    with pytest.raises(ValueError, match="expected a file of `fastattn sweep users"):
        choosing.main([str(file), "--docs", str(tmp_path)])


def test_a_peer_in_a_file_of_its_own(data, tmp_path, monkeypatch):
    """Only who is not in the page's own file; rows that are wrong or refused are left out."""
    other = data | {"command": "fastattn sweep users causal"}
    other["rows"] = {
        "quick": row("prefill", fastattn=entry(5.0, 9.0), torch=entry(10.0, 10.0), flash_attn_4=entry(8.0, 18.0)),
        "slower": row("vision", fastattn=entry(12.0, 30.0), flash_attn_4=entry(10.0, 60.0)),
        "wrong": row("vision", fastattn=entry(12.0, 30.0), flash_attn_4=entry(1.0, 1.0, failed="wrong result")),
        "refused": row("vision", fastattn=entry(12.0, 30.0), flash_attn_4={"refused": "no"}),
    }
    (tmp_path / "users.json").write_text(json.dumps(data))
    (tmp_path / "users-flash-attn-4.json").write_text(json.dumps(other))
    monkeypatch.setattr(choosing, "REASONS", {"slower": "why"})
    assert choosing.main([str(tmp_path / "users.json"), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "choosing.md").read_text()
    assert cells(text, "Beside flash-attn 4") == [
        ["quick", "5", "8", "0.62", "0.50"],
        ["slower", "12", "10", "1.20", "0.50"],
    ]
    assert "users-flash-attn-4.json`" in text and "`fastattn sweep users causal`. Median ratio 0.91, quicker" in text
    assert "quicker than fastattn in 1 of 2." in text and text.count("## Beside") == 1


def test_the_menu_names_the_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace(choosing.LINE, "")
    named = choosing.with_the_page(menu)
    assert named.count("choosing.md") == 1 and named.replace(choosing.LINE, "") == menu
    assert choosing.with_the_page(named) is None
    with pytest.raises(ValueError, match=r"mkdocs\.yml: expected a line"):
        choosing.with_the_page("nav:\n")


def test_the_report_of_the_file(data):
    section = section_of("users.json", data)
    tables = {table.title: table for table in section.parts}
    assert set(tables) == {f"{who}{more}" for who in ("prefill", "vision") for more in ("", ", as Python calls it")}
    assert tables["prefill"].head == ["call", "fastattn, µs", "torch, µs", "ratio"]
    assert tables["prefill"].rows[0] == ["quick", "*5 (1e-03)", "10 (1e-03)", "0.50"]
    assert tables["vision"].head == ["call", "fastattn, µs", "torch cuDNN, µs", "torch, µs", "ratio"]
    assert tables["vision"].rows[2] == ["alone", "*9 (1e-03)", "-", "failed", "-"]
    assert tables["vision, as Python calls it"].rows[1] == ["host", "torch", "40", "5", "20", "5", "2.00"]
    assert section.findings == [f"{summary.sentence(summary.of(data['rows']))}."]
    assert "MLX was not measured: no wheel for this Python" in section.notes
    assert "host, xFormers: no" in section.notes
    assert any("cut" in note for note in section_of("u", data | {"complete": False}).notes)


# --- what is kept in the repository


def test_reasons_are_of_rows():
    assert set(REASONS) <= set(BY_NAME) and all(text.endswith(".") for text in REASONS.values())


def test_the_kept_page_is_made_from_the_kept_file():
    """Without a file there is neither a page nor a reason: nothing is said that was not measured."""
    page, path = ROOT / "docs" / "choosing.md", choosing.kept()
    if path is None:
        assert not page.exists() and not REASONS
        return
    found = load(path)
    choosing.check_reasons(found["rows"], REASONS)
    assert page.read_text(encoding="utf-8") == choosing.page(
        found, path.relative_to(ROOT).as_posix(), REASONS, choosing.peers_beside(path, path.parent.relative_to(ROOT))
    )
    assert found["complete"] and not re.search("dirty", str(found["environment"]["commit"]))
    assert set(found["rows"]) == set(BY_NAME), "measured anew when the list changes"
