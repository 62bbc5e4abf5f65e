"""A process whose binaries are on disk makes its first calls without importing Triton, which takes 0.3 s and more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

PROGRAM = Path(__file__).parents[3] / "helpers" / "warm_first_call.py"


def test_first_calls_over_a_warm_disk(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {
        "FASTATTN_PLAN_CACHE": str(tmp_path / "kept"),
        "FASTATTN_COMPILE": "off",
        "FASTATTN_BACKENDS": "",
        "PYTHONPATH": os.pathsep.join([str(Path(fastattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "CC": "cc",
    }

    def run(what: str) -> str:
        command = [sys.executable, str(PROGRAM), what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write")
    found = json.loads(run("call"))
    # The kernel, and one that combines its splits where it does not; bounds; tiles of segments; their order; lists.
    assert found["launched"] == [1, 2, 1, 2, 3, 1, 2, 2]
    assert found["imported"] == []
    assert found["disk_loads"] == found["binaries"] >= 8
    assert found["compiles"] == found["background_compiles"] == found["failures"] == 0
