"""What the compiler makes of the launches that are listed: no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

#: In a process of its own: this one's kernels may be interpreted. Of each pass: what it is of, bytes of shared memory,
#: bytes that are counted, loads of fewer than 4 bytes, and stores of spilled registers in its inner loops.
PROGRAM = """
import re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from fastattn.backends.triton.prefill import forward
from fastattn.backends.triton.backward import launch, launch_config
from fastattn.call import Problem
from hopper_code import _innermost as innermost

float32, bfloat16 = torch.float32, torch.bfloat16
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def code(binary):
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary.cubin)
        file.flush()
        command = [tools / "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

def count(pattern, lines):
    return sum(re.search(pattern, line) is not None for line in lines)

capability = tuple(int(x) for x in sys.argv[1:3])
for dtype, dim, mask_dtype, shape in (
    (bfloat16, 128, bfloat16, (1, 4, 2048, 2048)), (bfloat16, 64, bfloat16, (1, 4, 512, 512)),
    (bfloat16, 256, None, ()), (float32, 128, None, ()), (float32, 96, None, ()), (float32, 32, None, ()),
):
    if capability < (9, 0) and dim != 128:
        continue
    n = shape[-1] if shape else 2048
    biased = mask_dtype == bfloat16
    p = Problem(
        device="cuda", index=0, capability=capability, dtype=dtype, batch=2, q_heads=4, kv_heads=4, q_len=n, kv_len=n,
        head_dim=dim, value_dim=dim, mask="additive" if biased else "bool" if shape else "none", mask_shape=shape,
        mask_dtype=mask_dtype, left=-1, right=-1, softcap=0.0, sinks=False, q_lengths=False, kv_lengths=False,
        return_lse=False, grads="qkvm" if biased else "qkv", backward=True,
    )
    listed = launch_config.choose(p)
    for flags in launch.binaries(p):
        name = flags.kernel.split(":")[1].removesuffix("_kernel")
        if not hasattr(listed, name) or dict(flags.options)["num_warps"] != getattr(listed, name).warps:
            continue
        binary, tile = flags.compile(), getattr(listed, name)
        lines = code(binary)
        spilled = sum(count(r"\\bSTL\\b", loop) for loop in innermost(lines))
        narrow = count(r"LDG[.]E[.](U|S)(8|16)", lines) if p.masked_rows else 0
        print(str(dtype)[6:], dim, name, binary.shared, launch_config.shared(p, tile), narrow, spilled)
"""


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_kernels_take_no_more_than_is_counted(capability: tuple[int, int]) -> None:
    """Shared memory; and on SM 9.0 masks with rows are loaded in wide pieces, by loops that spill next to nothing."""
    helpers, here = Path(__file__).parents[3] / "helpers", os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([*sys.path, str(helpers), here])}
    command = [sys.executable, "-c", PROGRAM, *(str(x) for x in capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) >= (13 if capability == (9, 0) else 4)
    for dtype, dim, name, shared, counted, narrow, spilled in found:
        assert int(shared) <= int(counted), (dtype, dim, name)
        if capability == (9, 0):
            assert narrow == "0", (dtype, dim, name)
            if dtype == "bfloat16" and int(dim) <= 128:
                assert int(spilled) <= 8, (dtype, dim, name)
