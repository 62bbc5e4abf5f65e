"""The page "When is fastattn the right choice, and when not", from the result file of `fastattn sweep users`:

    python -m benchmarks.choosing [USERS.json] [--docs DOCS]

USERS.json: benchmarks/results/*/users.json, of which there has to be one. Peers that compile for seconds a row may be
in files of some rows beside it, users-PEER.json, each with a section of its own. Writes DOCS/choosing.md and its line
in mkdocs.yml, which are kept: a test holds the page against the file. Each row in which a peer is quicker needs its
reason in `fastattn/bench/users/reasons.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn.bench import output
from fastattn.bench.users.contenders import OURS
from fastattn.bench.users.reasons import REASONS
from fastattn.bench.users.summary import NEAR, has_failed, of, sentence, us_of
from fastattn.cli.arguments import path_of

from .command import end
from .report.data import Section, number, title_of
from .report.reading import load, reading
from .report.users import HEAD, eager_cells, is_slower, ratio, sections

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def kept() -> Path | None:
    """The result file that is kept in the repository, or None. Raises ValueError for several."""
    found = sorted((ROOT / "benchmarks" / "results").glob("*/users.json"))
    if len(found) > 1:
        raise ValueError(f"USERS.json: expected one of {', '.join(str(path.relative_to(ROOT)) for path in found)}")
    return found[0] if found else None


def peers_beside(path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The files of single peers beside a result file. folder: where they are said to be."""
    return {(folder / other.name).as_posix(): load(other) for other in sorted(path.parent.glob("users-*.json"))}


def check_reasons(rows: Mapping[str, Row], reasons: Mapping[str, str]) -> None:
    """Raises ValueError for rows in which a peer is quicker without a reason, and for reasons of other rows."""
    slower = [name for name, row in rows.items() if is_slower(row, "ratio")]
    missing = [f"{name} ({rows[name]['ratio']:.2f})" for name in slower if not reasons.get(name)]
    if missing:
        raise ValueError(f"REASONS: expected a reason for each row over {NEAR}, missing: {'; '.join(missing)}")
    stale = [name for name in reasons if name not in slower]
    if stale:
        raise ValueError(f"REASONS: expected rows over {NEAR} alone, got: {'; '.join(stale)}")


def page(
    data: dict[str, Any], name: str, reasons: Mapping[str, str], beside: Mapping[str, dict[str, Any]] | None = None
) -> str:
    """The page. name: the result file's path in the repository; reasons: as `check_reasons` wants them; beside: the
    files of single peers, by their paths."""
    rows: dict[str, Row] = data["rows"]
    report = Section(name, "", "", str(data["command"]), str(data["date"]), data["environment"])
    slower = {row: found for row, found in rows.items() if is_slower(found, "ratio")}
    eager = {row: found for row, found in rows.items() if is_slower(found, "eager_ratio") and row not in slower}
    parts = [
        f"<!-- Made by `python -m benchmarks.choosing` from {name}. -->\n\n"
        "# When is fastattn the right choice, and when not",
        f"{len(rows)} attention calls as users of all kinds make them, each beside every peer that was there "
        f"(`{name}`, {report.caption}; `{report.command}`). A ratio is fastattn's time over that of the quickest peer "
        f"that gave a right result; up to {NEAR} counts as equal. [Benchmarks](benchmarks.md) has every figure.",
        f"**{sentence(of(rows))}.**",
        "## By kind of call",
        _by_kind(rows),
        "## Choose it for",
        _right(rows),
        "## Choose something else for",
        _wrong(slower, reasons),
        "## Small calls that Python makes one by one",
        _host(eager),
    ]
    for path, other in (beside or {}).items():
        parts += _beside(path, other, rows)
    if data.get("absent"):
        lines = [f"- {title_of(who)}: {why}" for who, why in data["absent"].items()]
        parts += ["## Who was not measured", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _beside(path: str, other: dict[str, Any], rows: dict[str, Row]) -> list[str]:
    """The section of a file of single peers: its rows that have a peer which no row of the page has."""
    there = {who for row in rows.values() for who, entry in row["contenders"].items() if us_of(entry, "ratio")}
    found = {who for row in other["rows"].values() for who, entry in row["contenders"].items() if us_of(entry, "ratio")}
    report = Section(path, "", "", str(other["command"]), str(other["date"]), other["environment"])
    parts = []
    for who in sorted(found - there - {*OURS}):
        lines = ["| call | fastattn, µs | its, µs | ratio | eager ratio |", "|---|---|---|---|---|"]
        ratios = []
        for name, row in other["rows"].items():
            ours, its = row["contenders"].get("fastattn", {}), row["contenders"].get(who, {})
            times = [us_of(entry, which) for which in ("ratio", "eager_ratio") for entry in (ours, its)]
            if any(us is None for us in times):
                continue
            us, other_us, eager, other_eager = (float(us or 0.0) for us in times)
            ratios.append(us / other_us)
            cells = [name, number(us), number(other_us), ratio(us / other_us), ratio(eager / other_eager)]
            lines.append(f"| {' | '.join(cells)} |")
        text = (
            f"`{path}`, {report.caption}; `{report.command}`. Median ratio {ratio(statistics.median(ratios))}, "
            f"quicker than fastattn in {sum(x > NEAR for x in ratios)} of {len(ratios)}."
        )
        parts += [f"## Beside {title_of(who)}", text, "\n".join(lines)] if ratios else []
    return parts


def _by_kind(rows: dict[str, Row]) -> str:
    lines = ["| calls | rows | best or equal | median ratio | worst ratio | its row | best peer there |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for who, found in sections(rows).items():
        compared = {name: row["ratio"] for name, row in found.items() if _counts(row)}
        near = sum(not has_failed(row) and not is_slower(row, "ratio") for row in found.values())
        cells = [who, str(len(found)), str(near), "-", "-", "-", "-"]
        if compared:
            worst = max(compared, key=lambda name: compared[name])
            middle = ratio(statistics.median(compared.values()))
            cells[3:] = [middle, ratio(compared[worst]), worst, title_of(found[worst]["best_peer"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(row: Row) -> bool:
    return row.get("ratio") is not None and not has_failed(row)


def _right(rows: dict[str, Row]) -> str:
    lines = []
    for who, found in sections(rows).items():
        best = [row["ratio"] for row in found.values() if _counts(row) and not is_slower(row, "ratio")]
        if best:
            part = f"**{who}**: {len(best)} of {len(found)} calls, at {ratio(statistics.median(best))} of the time of "
            lines.append(f"- {part}the quickest peer (median; {ratio(min(best))} to {ratio(max(best))}).")
    alone = [name for name, row in rows.items() if not has_failed(row) and _alone(row)]
    if alone:
        lines.append(f"- **Calls that no peer here can make**: {', '.join(alone)}.")
    return "\n".join(lines) or "Nothing: a peer is quicker in every row."


def _alone(row: Row) -> bool:
    return row.get("ratio") is None and us_of(row["contenders"].get("fastattn", {}), "ratio") is not None


def _wrong(slower: dict[str, Row], reasons: Mapping[str, str]) -> str:
    if not slower:
        return f"Nothing here: no peer is quicker by more than {NEAR - 1:.0%} in any row, in CUDA graphs."
    lines = ["| call | ratio | quickest peer | why |", "|---|---|---|---|"]
    for name, row in sorted(slower.items(), key=lambda item: -item[1]["ratio"]):
        lines.append(f"| {name} | {ratio(row['ratio'])} | {title_of(row['best_peer'])} | {reasons.get(name, '-')} |")
    return "\n".join(lines)


def _host(eager: dict[str, Row]) -> str:
    text = (
        "In a CUDA graph, and under `torch.compile` with graphs, a call costs the host nothing. Called one by one, a "
        "call that the GPU finishes sooner than Python launches it takes the host's time."
    )
    if not eager:
        return f"{text} In no row is a peer quicker there alone."
    lines = [f"| {' | '.join(HEAD)} | ratio |", f"|{'---|' * (len(HEAD) + 1)}"]
    for name, row in sorted(eager.items(), key=lambda item: -item[1]["eager_ratio"]):
        lines.append(f"| {' | '.join([name, *eager_cells(row), ratio(row['eager_ratio'])])} |")
    return f"{text} A peer is quicker there alone in {number(len(eager))} rows:\n\n" + "\n".join(lines)


BEFORE, LINE = "      - Benchmarks: benchmarks.md\n", "      - What to choose: choosing.md\n"


def with_the_page(menu: str) -> str | None:
    """The text of mkdocs.yml with the page in its menu; None: it is there. Raises ValueError without a place for it."""
    if LINE in menu:
        return None
    if BEFORE not in menu:
        raise ValueError(f"mkdocs.yml: expected a line {BEFORE.strip()!r}, after which the page is named")
    return menu.replace(BEFORE, BEFORE + LINE, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__)
    parser.add_argument("file", nargs="?", type=path_of, metavar="USERS.json", help="(benchmarks/results/*/users.json)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder (%(default)s)")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    path = Path(arguments.file) if arguments.file else kept()
    if path is None:
        raise ValueError("USERS.json: expected a file, there is no benchmarks/results/*/users.json")
    data = load(path)
    if data["benchmark"] != "sweep users":
        raise ValueError(f"{path}: expected a file of `fastattn sweep users --json FILE`")
    name = path.resolve()
    shown = name.relative_to(ROOT).as_posix() if name.is_relative_to(ROOT) else path.name
    beside = peers_beside(path, Path(shown).parent)
    with reading(path):
        text = page(data, shown, REASONS, beside)
    check_reasons(data["rows"], REASONS)
    target = arguments.docs / "choosing.md"
    output.write(target, text)
    print(f"Wrote {target}")
    menu = arguments.docs.parent / "mkdocs.yml"
    if menu.exists() and (named := with_the_page(menu.read_text(encoding="utf-8"))):
        output.write(menu, named)
        print(f"Wrote {menu}: its menu names the page")
    return 0


if __name__ == "__main__":
    end(main)
