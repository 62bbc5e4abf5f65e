"""What binaries of the Hopper forward for wide heads there are, and how one is compiled. No GPU is needed for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..hopper.binary import CAPABILITY, GluonFlags

ROWS, KEYS = 64, 64  #: of a tile, of a block: see `parts.py`, which cannot be imported without triton
HALF, REST = 256, 64  #: columns of parts of tiles


@dataclass(frozen=True, slots=True)
class Flags(GluonFlags):
    """Names one binary. Lengths, strides, heads, windows and scales are no part of it."""

    dtype: str  #: "bf16" or "fp16"
    rest: bool = False  #: the head dim is above 512
    same: bool = False  #: the values are the keys' first columns
    band: bool = False
    split: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    sinks: str = ""  #: their dtype in Triton's words, or "": none, or the second kernel's
    softcap: bool = False
    lse: bool = False

    def __str__(self) -> str:
        names = "same", "band", "split", "q_lengths", "kv_lengths", "softcap", "lse"
        words = ["Hopper forward", self.dtype, "576/512" if self.rest else "512/512"]
        words += [name for name in names if getattr(self, name)]
        return " ".join([*words, *([f"sinks {self.sinks}"] if self.sinks else [])])

    def compiled(self) -> Any:
        return compile_kernel(self)


def compile_kernel(flags: Flags) -> Any:
    """Triton's own result."""
    from triton.experimental.gluon import language as gl

    from ...._compat.gluon import SOURCE_OF
    from ...._compat.triton_compiler import compiled
    from .forward import INTEGERS, wide_kernel

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[flags.dtype]

    def descriptor(rows: int, columns: int) -> str:
        box = [1, 1, rows, columns]
        return f"tensordesc<{flags.dtype}{box!r},{gl.NVMMASharedLayout.get_default_for(box, element)!r}>"

    signature = dict.fromkeys(wide_kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("inner", "scale"), "fp32")
    signature |= {"q_desc": descriptor(ROWS, HALF), "k_desc": descriptor(KEYS, HALF), "out_ptr": "*" + flags.dtype}
    if flags.rest:
        signature |= {"q_rest_desc": descriptor(ROWS, REST), "k_rest_desc": descriptor(KEYS, REST)}
    if not flags.same:
        signature["v_desc"] = descriptor(KEYS, HALF)
    if flags.lse:
        signature["lse_ptr"] = "*fp32"
    if flags.sinks:
        signature["sinks_ptr"] = "*" + flags.sinks
    if flags.q_lengths:
        signature["q_lengths_ptr"] = "*i32"
    if flags.kv_lengths:
        signature["kv_lengths_ptr"] = "*i32"
    if flags.split:
        signature["scratch_ptr"] = "*fp32"
    values = {
        "REST": flags.rest,
        "SAME": flags.same,
        "BAND": flags.band,
        "SPLIT": flags.split,
        "Q_LENGTHS": flags.q_lengths,
        "KV_LENGTHS": flags.kv_lengths,
        "SINKS": bool(flags.sinks),
        "SOFTCAP": flags.softcap,
        "LSE": flags.lse,
    }
    names = wide_kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {
        (i,): values.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"
    }
    # Outputs are torch's own allocations: rows are stored in wide pieces.
    outputs = ["out_ptr", *(["scratch_ptr"] if flags.split else [])]
    attributes: dict[tuple[int, ...], Any] = {(names.index(x),): [["tt.divisibility", 16]] for x in outputs}
    return compiled(wide_kernel, signature, constants, attributes, CAPABILITY, {"num_warps": 4}, SOURCE_OF)
