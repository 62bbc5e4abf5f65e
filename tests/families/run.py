"""make families: sweeps transformers' model families, writes the results as JSON and as docs/families.md.

    python tests/families/run.py [--json FILE] [--page FILE] [--limit SECONDS] [FAMILY ...]

Ends with status 1 if any family differs from eager attention, crashes, or is not done in time.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
from pathlib import Path

from sweep import page, runner

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model_type, or model_type/kind; all if none is named")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "families.json")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    units, reports = runner.chosen(options.families), []
    with tempfile.TemporaryDirectory() as folder:
        for count, unit in enumerate(units, 1):
            report = runner.run(unit, Path(folder), options.limit)
            reports.append(report)
            print(f"{count}/{len(units)} {unit.name}: {report['result']} ({report['seconds']} s)", flush=True)
            if count % 20 == 0 or count == len(units):
                options.json.write_text(json.dumps({"versions": runner.versions(), "families": reports}, indent=1))
    if options.page:
        options.page.write_text(page.page(runner.versions(), reports))
    found = collections.Counter(report["result"] for report in reports)
    print(", ".join(f"{count} {result}" for result, count in found.most_common()))
    return int(any(found[bad] for bad in page.BAD))


if __name__ == "__main__":
    sys.exit(main())
