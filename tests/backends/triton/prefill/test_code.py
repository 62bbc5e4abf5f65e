"""What the compiler makes of the kernels beside the main one, for SM 9.0: no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

#: In a process of its own: this one's kernels may be interpreted. Of each kernel: its name, registers of a thread,
#: loads of 16 bytes and of fewer than 4, loads of spilled registers and stores of them in its inner loops.
PROGRAM = """
import re, subprocess, tempfile
from dataclasses import replace
from pathlib import Path
import torch, triton
from fastattn.backends.triton.binaries.launcher import flag_sets
from fastattn.backends.triton.prefill import forward
from fastattn.backends.triton.prefill.lists import Lists
from fastattn.backends.triton.representative import representative
from fastattn.call import Problem
from hopper_code import _innermost as innermost

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def run(name, *command):
    return subprocess.run([tools / name, *command], capture_output=True, text=True, check=True).stdout

def count(pattern, lines):
    return sum(re.search(pattern, line) is not None for line in lines)

def show(name, flags):
    with tempfile.NamedTemporaryFile() as file:
        file.write(flags.compile().cubin)
        file.flush()
        usage, lines = run("cuobjdump", "-res-usage", file.name), run("nvdisasm", "-c", file.name).splitlines()
    loops = [line for loop in innermost(lines) for line in loop]
    print(name, re.search(r"REG:(\\d+)", usage)[1], count(r"LDG[.]E[.]128", lines),
          count(r"LDG[.]E[.](U|S)(8|16)", lines), count(r"\\bLDL\\b", loops), count(r"\\bSTL\\b", loops))

window = Problem(
    device="cuda", index=0, capability=(9, 0), dtype=torch.bfloat16, batch=1024, q_heads=8, kv_heads=8, q_len=49,
    kv_len=49, head_dim=32, value_dim=32, mask="additive", mask_shape=(1, 8, 49, 49), mask_dtype=torch.bfloat16,
    left=-1, right=-1, softcap=0.0, sinks=False, q_lengths=False, kv_lengths=False, return_lse=True, grads="",
)
(flags,) = forward.binaries(window)
show(flags.kernel.split(":")[1], flags)
alibi = replace(window, batch=1, q_len=2048, kv_len=2048, head_dim=128, value_dim=128, mask_shape=(1, 8, 2048, 2048))
causal = replace(alibi, mask="bool", mask_dtype=torch.bool, mask_shape=(1, 1, 2048, 2048))
for name, p, keys in (("additive", alibi, 64), ("bool", causal, 128)):
    call = representative(p)
    for flags in flag_sets(Lists(p, call, 128, keys).launches(call)):
        show(f"{name}_{flags.kernel.split(':')[1]}", flags)
"""


def test_registers_and_loads() -> None:
    helpers, here = Path(__file__).parents[3] / "helpers", os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([*sys.path, str(helpers), here])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (line.split() for line in done.stdout.splitlines())
    found = {name: tuple(int(x) for x in numbers) for name, *numbers in lines}
    assert found.keys() == {
        "batch_kernel", "additive_list_kernel", "additive_classify_kernel", "bool_list_kernel", "bool_classify_kernel",
    }  # fmt: skip
    # Four programs of a multiprocessor walk over the batch. The mask is loaded once, before that: 32 loads of a thread.
    registers, _, narrow, read, spilled = found["batch_kernel"]
    assert registers <= 128 and narrow == 32 and read <= 12 and spilled == 0
    # Masks that are classified come 16 bytes at a time, and at least five programs fit a multiprocessor.
    for name in ("additive_classify_kernel", "bool_classify_kernel"):
        registers, wide, _, read, spilled = found[name]
        assert registers <= 100 and wide >= 8 and read == spilled == 0, name
    assert found["additive_list_kernel"][0] <= 40
