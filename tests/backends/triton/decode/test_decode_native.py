"""The decode kernels compile for real GPUs: Triton's compiler, ptxas included, needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

#: Shared memory that a program may have, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}


#: What is compiled for it: all kinds of calls, or those of wide heads, whose tiles depend on the shared memory.
FLAGS = {(8, 0): ["--wide"]}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"{c[0]}.{c[1]}")
def test_compiles_within_shared_memory(capability: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = Path(__file__).parent / "compile_decode.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(program), *map(str, capability), *FLAGS.get(capability, [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert max(entry["shared"] for entry in compiled) <= SHARED_MEMORY[capability]
    kernels = Counter((entry["kernel"], entry["wide"]) for entry in compiled)
    if capability not in FLAGS:
        # Those that combine too: not of windows, which fit one step, nor where tiles of 64 rows have Hopper's products.
        alone = 12 - (5 if capability == (9, 0) else 0)
        assert kernels["attend_kernel", False] == 14 + 4 + 7 + alone  # many queries: four kinds; chunks
        assert kernels["combine_kernel", False] == 12 + 7
    # Of wide heads, `python compile_decode.py 9 0 --every` compiles all.
    few = capability == (9, 0)  # 8 rows of 512 numbers have a kernel of their own to combine them
    assert kernels["combine_wide_kernel", True] == few
    assert (kernels["attend_kernel", True], kernels["combine_kernel", True]) == (7, 6 - few)  # one needs no splits
    if few:
        _, combine = (x for x in compiled if x["wide"] and x["call"] == f"{torch.bfloat16} 8x1 512/512 plain")
        assert (combine["ahead"], combine["kernel"]) == (8, "combine_wide_kernel"), "128 splits of 32 columns"
    for entry in compiled:
        assert not entry["serial"], entry
        assert entry["spilled"] <= (16 if entry["wide"] else 256), entry
    if capability == (9, 0):
        parts = [entry for entry in compiled if (entry["call"], entry["kernel"]) == ("chunk", "attend_kernel")]
        assert [entry["rows"] for entry in parts] == [128] * 5 + [64] * 2
        assert not any(entry["spilled"] for entry in parts)
        # 64 rows, values in the keys: 576 / 16 products for the scores, each once, and 64 / 16
        same = [entry for entry in compiled if entry["kernel"] == "attend_kernel" and " same" in entry["call"]]
        assert {(x["rows"], x["keys"], x["products"]) for x in same} == {(64, 64, 36 + 4)}
