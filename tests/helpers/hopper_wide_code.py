"""Compiles binaries of the Hopper forward for wide heads and reads their machine code: see `hopper_code`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from hopper_code import Code, main, read_compiled

from fastattn.backends.triton.hopper_wide.binary import Flags

NAMES = {
    "full": Flags("bf16"),
    "causal": Flags("bf16", band=True, lse=True),
    "mla": Flags("bf16", rest=True, same=True),
    "mla-split": Flags("fp16", rest=True, same=True, split=True, kv_lengths=True),
    "everything": Flags(
        "fp16", rest=True, band=True, q_lengths=True, kv_lengths=True, sinks="fp32", softcap=True, lse=True
    ),
}


def read(name: str) -> Code:
    from fastattn.backends.triton.hopper_wide.binary import compile_kernel

    return read_compiled(compile_kernel(NAMES[name]))


if __name__ == "__main__":
    main(NAMES, read)
