"""What binaries of the Hopper backward there are, and how one is compiled. No GPU is needed for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..hopper.binary import CAPABILITY, GluonFlags

FULL, CAUSAL, BAND, INTERVALS = 0, 1, 2, 3  #: see `parts.py`, which cannot be imported without triton
ROWS = 64  #: queries of a tile
HALF = 64  #: keys whose dK and dV are stored together
DIMS = (64, 128, 256)  #: head dim and value dim, padded


@dataclass(frozen=True, slots=True)
class Flags(GluonFlags):
    """Names one binary. Lengths, strides, windows and scales are no part of it."""

    dtype: str  #: "bf16" or "fp16"
    dim: int  #: of `DIMS`
    mask: int
    softcap: bool = False
    split: bool = False  #: programs share blocks of keys
    biased: bool = False  #: with INTERVALS: keys have biases
    ordered: bool = False  #: sums have a fixed order, so that bits repeat

    def __str__(self) -> str:
        words = ["Hopper backward", self.dtype, str(self.dim), ("full", "causal", "band", "intervals")[self.mask]]
        return " ".join([*words, *[name for name in ("softcap", "split", "biased", "ordered") if getattr(self, name)]])

    def compiled(self) -> Any:
        return compile_kernel(self)


def key_columns(dim: int) -> int:
    """Columns of a box of keys: each consumer multiplies with half of the dims, which must lie together."""
    return min(dim // 2, 64)


def keys_of(dim: int) -> int:
    """Keys of a block: with 256 dims registers have room for 64."""
    return 64 if dim > 128 else 128


def compile_kernel(flags: Flags) -> Any:
    """Triton's own result."""
    from triton.experimental.gluon import language as gl

    from ...._compat.gluon import SOURCE_OF
    from ...._compat.triton_compiler import compiled
    from .backward import BIAS_INTEGERS, INTEGERS, backward_kernel

    def descriptor(rows: int, columns: int = 64) -> str:
        box = [1, 1, rows, flags.dim]
        layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=4)
        return f"tensordesc<{flags.dtype}{box!r},{layout!r}>"

    keys = keys_of(flags.dim)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    names = backward_kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("inner", "scale", "factor"), "fp32")
    signature |= dict.fromkeys(("q_desc", "grad_out_desc"), descriptor(ROWS))
    signature |= {"k_desc": descriptor(keys, key_columns(flags.dim)), "v_desc": descriptor(keys)}
    signature |= dict.fromkeys(("dk_desc", "dv_desc"), descriptor(HALF))
    signature |= {"rows_desc": f"tensordesc<fp32{[ROWS]!r},{flat!r}>", "dq_sum_ptr": "*fp32"}
    if flags.split:
        signature["dkv_sum_ptr"] = "*fp32"
    if flags.ordered:
        signature["counters_ptr"] = "*i32"
    if flags.mask == INTERVALS:
        signature |= dict.fromkeys(("clean_q_desc", "clean_grad_out_desc"), descriptor(ROWS))
        signature |= dict.fromkeys(("bounds_ptr", "extents_ptr"), "*i32")
    if flags.biased:
        signature |= dict.fromkeys(BIAS_INTEGERS, "i32") | {"bias_ptr": "*fp32"}
    values = {
        "D": flags.dim,
        "KEYS": keys,
        "MASK": flags.mask,
        "SOFTCAP": flags.softcap,
        "SPLIT": flags.split,
        "BIASED": flags.biased,
        "ORDERED": flags.ordered,
    }
    constants: dict[tuple[int, ...], Any] = {
        (i,): values.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"
    }
    return compiled(backward_kernel, signature, constants, {}, CAPABILITY, {"num_warps": 4}, SOURCE_OF)
