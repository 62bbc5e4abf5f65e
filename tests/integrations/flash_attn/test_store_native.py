"""The kernel that stores in caches compiles for a real GPU: Triton's compiler needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastattn.integrations.flash_attn.store_kernel import _store as kernel

for dtype in ("bf16", "fp32"):
    for rows, pages in ((False, False), (True, False), (False, True)):
        values = {"ROWS": rows, "PAGES": pages, "BLOCK": 16, "BLOCK_D": 128}
        signature, constants = {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in values:
                signature[name], constants[index,] = "constexpr", values[name]
            elif name in ("keys", "values", "k", "v"):
                signature[name] = "*" + dtype
            elif name in ("starts", "rows", "table"):
                signature[name] = "*i32"
            else:
                assert name in kernel.do_not_specialize or index in kernel.do_not_specialize, name
                signature[name] = "i32"
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        print(compiled.name, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_the_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_store True"] * 6
