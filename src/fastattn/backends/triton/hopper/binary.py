"""What binaries of the Hopper forward there are, and how one is compiled. No GPU is needed for that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..binaries.flag_set import Binary

CAPABILITY = (9, 0)
FULL, ALIGNED, BAND, INTERVALS, SEGMENTS = 0, 1, 2, 3, 4  #: see `parts.py`, which cannot be imported without triton


class GluonFlags:
    """What a `FlagSet` of a kernel in Gluon has besides the fields that name its binary."""

    __slots__ = ()

    @property
    def capability(self) -> tuple[int, int]:
        return CAPABILITY

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def compiled(self) -> Any:
        """Triton's own result. Takes seconds, or milliseconds where Triton finds it on the disk."""
        raise NotImplementedError

    def compile(self) -> Binary:
        compiled = self.compiled()
        meta = compiled.metadata
        return Binary(compiled.asm["cubin"], meta.name, meta.shared, 32 * meta.num_warps)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How heads of one size are cut. What of it fits: 227 KiB of shared memory, 240 registers a thread."""

    keys: int  #: of a block
    stages: int  #: blocks of keys and values in shared memory
    q_slots: int  #: tiles of queries in shared memory; with one, the next tile's queries come late
    staged: bool  #: the output goes through shared memory, where there is room, and the copy engine
    turns: bool  #: the two consumers take turns at the tensor cores


#: By head dim and value dim, both padded. (256, 256): 128 registers of output and 32 of scores a thread.
BLOCKS = {
    (64, 64): Blocks(128, 4, 2, True, turns=False),
    (128, 128): Blocks(128, 2, 2, True, turns=True),
    (256, 128): Blocks(64, 2, 1, True, turns=True),
    (256, 256): Blocks(64, 2, 1, False, turns=True),
}
#: For few keys. Twice as many smaller blocks bring keys and values earlier where they come from memory, not from the L2
#: cache: up to a fifth of the time of 700 keys. With many keys they cost a tenth.
SHORT_BLOCKS = {
    (64, 64): Blocks(64, 8, 2, True, turns=False),
    (128, 128): Blocks(64, 4, 2, True, turns=True),
}
#: Under a mask with a row for each query, whose tiles are in shared memory too: by dims and bytes of a mask's element,
#: and how many tiles of it there are.
TILED_BLOCKS = {
    ((64, 64), 1): (Blocks(128, 4, 2, True, turns=False), 2),
    ((64, 64), 2): (Blocks(128, 3, 2, True, turns=False), 2),
    ((64, 64), 4): (Blocks(64, 4, 2, True, turns=False), 3),
    ((128, 128), 1): (Blocks(128, 2, 1, True, turns=True), 2),
    ((128, 128), 2): (Blocks(64, 3, 1, True, turns=True), 4),
    ((128, 128), 4): (Blocks(64, 3, 1, True, turns=True), 2),
    ((256, 128), 1): (Blocks(64, 2, 1, True, turns=True), 2),
    ((256, 128), 2): (Blocks(64, 2, 1, True, turns=True), 2),
    ((256, 128), 4): (Blocks(64, 2, 1, True, turns=True), 1),
    ((256, 256), 1): (Blocks(64, 2, 1, False, turns=True), 2),
    ((256, 256), 2): (Blocks(64, 2, 1, False, turns=True), 2),
    ((256, 256), 4): (Blocks(64, 2, 1, False, turns=True), 1),
}
SIZES = {"bool": 1, "bf16": 2, "fp16": 2, "fp32": 4}  #: of elements of such masks, by dtype in `Flags.tiles`
SHORT = 768  #: keys
ROWS = 64  #: queries of one consumer
TILE = 2 * ROWS


@dataclass(frozen=True, slots=True)
class Flags(GluonFlags):
    """Names one binary. Strides, windows and scales are no part of it, and of lengths only whether keys are few."""

    dtype: str  #: "bf16" or "fp16"
    dims: tuple[int, int]  #: a key of `BLOCKS`
    mask: int
    keys: bool = False  #: with INTERVALS: keys have biases
    tiles: str = ""  #: with FULL or BAND: a key of `SIZES`, the dtype of a mask with a row for each query, or "": none
    listed: bool = False  #: of such a mask: which blocks are visited is in lists
    q_lengths: bool = False
    kv_lengths: bool = False
    sinks: str = ""  #: their dtype in Triton's words, or "": none
    softcap: bool = False
    lse: bool = False
    short: bool = False  #: few keys, of a call or of its segments, and `SHORT_BLOCKS` has the dims

    @property
    def blocks(self) -> Blocks:
        if self.tiles:
            return TILED_BLOCKS[self.dims, SIZES[self.tiles]][0]
        return (SHORT_BLOCKS if self.short else BLOCKS)[self.dims]

    @property
    def prepared(self) -> bool:
        """Whether it reads numbers that other kernels have left: bounds, tiles of segments, lists."""
        return self.mask in (INTERVALS, SEGMENTS) or self.listed

    @property
    def mask_stages(self) -> int:
        """Tiles of the mask in shared memory."""
        return TILED_BLOCKS[self.dims, SIZES[self.tiles]][1] if self.tiles else 0

    def __str__(self) -> str:
        words = [
            "Hopper forward",
            self.dtype,
            f"{self.dims[0]}/{self.dims[1]}",
            ("full", "aligned", "band", "intervals", "segments")[self.mask],
        ]
        words += [
            name
            for name in ("keys", "listed", "q_lengths", "kv_lengths", "softcap", "lse", "short")
            if getattr(self, name)
        ]
        words += [f"mask {self.tiles}"] if self.tiles else []
        return " ".join([*words, *([f"sinks {self.sinks}"] if self.sinks else [])])

    def compiled(self) -> Any:
        return compile_kernel(self)


#: In Triton's words, and in Gluon's.
_ELEMENTS = {
    "bool": ("u8", "uint8"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "float16"),
    "fp32": ("fp32", "float32"),
}


def tiles_of(flags: Flags) -> int:
    """What the kernel knows of the mask: NO_TILES, BOOL or ADDITIVE of `parts.py`."""
    return 0 if not flags.tiles else 1 if flags.tiles == "bool" else 2


def compile_kernel(flags: Flags, **changes: Any) -> Any:
    """Triton's own result. changes: fields of `Blocks` and mask_stages, for measurements."""
    from triton.experimental.gluon import language as gl

    from ...._compat.gluon import SOURCE_OF
    from ...._compat.triton_compiler import compiled
    from .forward import INTEGERS, forward_kernel

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[flags.dtype]
    mask_stages = changes.pop("mask_stages", flags.mask_stages)
    blocks = replace(flags.blocks, **changes)
    dim, value_dim = flags.dims

    def descriptor(rows: int, columns: int, name: str = flags.dtype, element: Any = element) -> str:
        box = [1, 1, rows, columns]
        return f"tensordesc<{name}{box!r},{gl.NVMMASharedLayout.get_default_for(box, element)!r}>"

    signature = dict.fromkeys(forward_kernel.arg_names, "constexpr")
    signature |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("inner", "scale"), "fp32")
    signature |= {"q_desc": descriptor(ROWS, dim), "out_ptr": "*" + flags.dtype}
    signature |= {"k_desc": descriptor(blocks.keys, dim), "v_desc": descriptor(blocks.keys, value_dim)}
    if blocks.staged:
        signature["out_desc"] = descriptor(ROWS, value_dim)
    if flags.tiles:
        name, kind = _ELEMENTS[flags.tiles]
        signature["mask_desc"] = descriptor(ROWS, blocks.keys, name, getattr(gl, kind))
    if flags.lse:
        signature["lse_ptr"] = "*fp32"
    if flags.sinks:
        signature["sinks_ptr"] = "*" + flags.sinks
    if flags.q_lengths:
        signature["q_lengths_ptr"] = "*i32"
    if flags.kv_lengths:
        signature["kv_lengths_ptr"] = "*i32"
    if flags.prepared:
        signature["bounds_ptr"] = "*i32"
    if flags.keys:
        signature["bias_ptr"] = "*fp32"
    values = {
        "BLOCK_M": TILE,
        "BLOCK_N": blocks.keys,
        "D": dim,
        "DV": value_dim,
        "STAGES": blocks.stages,
        "Q_SLOTS": blocks.q_slots,
        "STAGED": blocks.staged,
        "MASK": flags.mask,
        "KEYS": flags.keys,
        "TILES": tiles_of(flags),
        "MASK_STAGES": mask_stages,
        "LISTED": flags.listed,
        "Q_LENGTHS": flags.q_lengths,
        "KV_LENGTHS": flags.kv_lengths,
        "SINKS": bool(flags.sinks),
        "SOFTCAP": flags.softcap,
        "LSE": flags.lse,
        "TURNS": blocks.turns,
    }
    names = forward_kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {
        (i,): values.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"
    }
    # The output is torch's own allocation: its rows are stored in wide pieces.
    attributes: dict[tuple[int, ...], Any] = {(names.index("out_ptr"),): [["tt.divisibility", 16]]}
    return compiled(forward_kernel, signature, constants, attributes, CAPABILITY, {"num_warps": 4}, SOURCE_OF)
