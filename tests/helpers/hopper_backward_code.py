"""Compiles binaries of the Hopper backward for SM 9.0 and reads their machine code: see `hopper_code`.

python hopper_backward_code.py [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]

from hopper_code import Code, main, read_compiled  # noqa: E402

from fastattn.backends.triton.hopper_backward.binary import BAND, CAUSAL, FULL, INTERVALS, Flags  # noqa: E402

_MASKS = {"full": FULL, "causal": CAUSAL, "band": BAND, "intervals": INTERVALS}
NAMES = {f"{name}-{dim}": Flags("bf16", dim, mask) for name, mask in _MASKS.items() for dim in (64, 128)} | {
    "causal-128-fp16": Flags("fp16", 128, CAUSAL),
    "causal-128-split": Flags("bf16", 128, CAUSAL, split=True),
    "causal-128-softcap": Flags("bf16", 128, CAUSAL, softcap=True),
    "intervals-128-everything": Flags("fp16", 128, INTERVALS, softcap=True, split=True),
    "intervals-64-everything": Flags("fp16", 64, INTERVALS, softcap=True, split=True),
    "biased-64": Flags("bf16", 64, INTERVALS, biased=True),
    "biased-128": Flags("bf16", 128, INTERVALS, biased=True),
    "biased-128-everything": Flags("fp16", 128, INTERVALS, softcap=True, split=True, biased=True),
    "biased-64-everything": Flags("fp16", 64, INTERVALS, softcap=True, split=True, biased=True),
    "ordered-full-64": Flags("bf16", 64, FULL, ordered=True),
    "ordered-full-128": Flags("bf16", 128, FULL, ordered=True),
    "ordered-causal-64": Flags("bf16", 64, CAUSAL, ordered=True),
    "ordered-causal-128": Flags("bf16", 128, CAUSAL, ordered=True),
    "ordered-causal-128-fp16-split": Flags("fp16", 128, CAUSAL, split=True, ordered=True),
    "ordered-band-128": Flags("bf16", 128, BAND, ordered=True),
    "ordered-intervals-128": Flags("bf16", 128, INTERVALS, ordered=True),
    "ordered-causal-128-softcap": Flags("bf16", 128, CAUSAL, softcap=True, ordered=True),
    "ordered-biased-128-everything": Flags("fp16", 128, INTERVALS, softcap=True, split=True, biased=True, ordered=True),
    "full-256": Flags("bf16", 256, FULL),
    "causal-256-softcap": Flags("bf16", 256, CAUSAL, softcap=True),
    "band-256-softcap-split": Flags("fp16", 256, BAND, softcap=True, split=True),
    "intervals-256": Flags("bf16", 256, INTERVALS),
    "biased-256-everything": Flags("fp16", 256, INTERVALS, softcap=True, split=True, biased=True),
    "ordered-causal-256-softcap": Flags("bf16", 256, CAUSAL, softcap=True, ordered=True),
    "ordered-biased-256-everything": Flags("fp16", 256, INTERVALS, softcap=True, split=True, biased=True, ordered=True),
    "ordered-biased-64-everything": Flags("fp16", 64, INTERVALS, softcap=True, split=True, biased=True, ordered=True),
}


def read(name: str) -> Code:
    from fastattn.backends.triton.hopper_backward.binary import compile_kernel

    return read_compiled(compile_kernel(NAMES[name]))


if __name__ == "__main__":
    main(NAMES, read)
