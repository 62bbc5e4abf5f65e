"""What the arguments of several subcommands share."""

from __future__ import annotations

#: What a dtype is called on the command line -> torch's name for it.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"} | {n: n for n in ("bfloat16", "float16", "float32")}
