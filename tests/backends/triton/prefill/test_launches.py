"""What the compiler makes of the launches that are listed: no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: In a process of its own: this one's kernels may be interpreted.
PROGRAM = """
import sys, torch
from fastattn.backends.triton.prefill import forward, launch_config
from fastattn.call import Problem

capability = tuple(int(x) for x in sys.argv[1:3])
float32, bfloat16 = torch.float32, torch.bfloat16
for dtype, head, value, mask_dtype in (
    (float32, 64, 64, float32), (float32, 128, 128, None), (float32, 192, 128, torch.bool),
    (float32, 256, 256, float32),
    (float32, 512, 512, None), (float32, 576, 512, float32),
    (bfloat16, 64, 64, float32), (bfloat16, 128, 128, bfloat16), (bfloat16, 256, 256, torch.bool),
    (bfloat16, 576, 512, bfloat16),
):
    p = Problem(
        device="cuda", index=0, capability=capability, dtype=dtype, batch=2, q_heads=4, kv_heads=2, q_len=512,
        kv_len=512, head_dim=head, value_dim=value,
        mask="none" if mask_dtype is None else "bool" if mask_dtype == torch.bool else "additive",
        mask_shape=() if mask_dtype is None else (1, 4, 512, 512), mask_dtype=mask_dtype, left=-1, right=0, softcap=0.0,
        sinks=False, q_lengths=False, kv_lengths=False, return_lse=False, grads="",
    )
    if not launch_config.fits(p):
        continue
    binary = forward.binaries(p)[0].compile()
    expected = launch_config.shared(p, launch_config.choose(p))
    print(dtype, head, value, mask_dtype, binary.shared, expected, "" if binary.shared <= expected else "TOO MUCH")
"""


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
def test_kernels_take_no_more_shared_memory_than_is_counted(capability: tuple[int, int]) -> None:
    command = [sys.executable, "-c", PROGRAM, *(str(x) for x in capability)]
    environment = {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) >= 8
    assert not [line for line in lines if line.endswith("TOO MUCH")]
