"""cuDNN and our table of what it supports agree, for GPUs that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in

pytest.importorskip("cudnn")
pytestmark = pytest.mark.skipif(stand_in.library() is None, reason="no cuDNN library here: make gpuless brings one")

#: Refusals of ours that cuDNN does not share: it would serve the problem, only not well or not right.
OUR_OWN = (
    "above 256 have no fast kernel",
    "one query is wrong in this cuDNN",
    "the backward needs more than one query or key",  # plans for any length would do, unproven so far
)


@pytest.mark.parametrize("capability", stand_in.DEVICES, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_cudnn_serves_what_the_table_lets_through_and_nothing_else(capability: tuple[int, int]) -> None:
    program = Path(__file__).with_name("check_families.py")
    done = subprocess.run(
        [sys.executable, str(program), *map(str, capability)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, *rows = (json.loads(line) for line in done.stdout.splitlines())
    assert version["cudnn"] >= 91900
    assert len(rows) > 1000
    wrong = [row for row in rows if row["cudnn"] and not row["ours"]]
    assert not wrong, f"{len(wrong)} problems pass our table and not cuDNN:\n" + "\n".join(map(str, wrong[:10]))
    strict = [
        row
        for row in rows
        if row["ours"] and not row["cudnn"] and not any(o in w for w in row["ours"] for o in OUR_OWN)
    ]
    assert not strict, f"{len(strict)} problems pass cuDNN and not our table:\n" + "\n".join(map(str, strict[:10]))
    assert sum(not row["ours"] for row in rows) > 400
