"""What the functions of the Hopper forward pass to each other: values of several fields.

A field that may be `gl.constexpr` is None where the binary has no such thing.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental.gluon import language as gl

from ...._compat.gluon import aggregate, base_value

#: What hides keys. FULL: nothing but lengths. ALIGNED: causal, as many keys as queries. BAND: left and right, as data.
#: INTERVALS: bounds of each row, made by `bounds.py`; with KEYS also a bias of each key. SEGMENTS: tiles of one segment
#: each, made by `segments.py`; left and right as data.
FULL = gl.constexpr(0)
ALIGNED = gl.constexpr(1)
BAND = gl.constexpr(2)
INTERVALS = gl.constexpr(3)
SEGMENTS = gl.constexpr(4)

#: A tensor mask with a row for each query, beside FULL and BAND: none, bool, additive.
NO_TILES = gl.constexpr(0)
BOOL = gl.constexpr(1)
ADDITIVE = gl.constexpr(2)

ROWS = gl.constexpr(64)  # query rows of one consumer


@aggregate
class Config:
    """What a binary is made for."""

    BLOCK_M: gl.constexpr  # query rows of a tile, half of them for each of two warp groups
    BLOCK_N: gl.constexpr  # keys of a block
    D: gl.constexpr  # head dim, padded
    DV: gl.constexpr  # value dim, padded
    STAGES: gl.constexpr  # blocks of keys and values in shared memory
    Q_SLOTS: gl.constexpr  # tiles of queries in shared memory
    STAGED: gl.constexpr  # the output goes through shared memory and the copy engine
    MASK: gl.constexpr
    KEYS: gl.constexpr  # with INTERVALS: each key has a bias, the same for all queries
    TILES: gl.constexpr  # a tensor mask with a row for each query: NO_TILES, BOOL or ADDITIVE
    MASK_STAGES: gl.constexpr  # its tiles in shared memory
    LISTED: gl.constexpr  # of such a mask: which blocks are visited is in lists
    Q_LENGTHS: gl.constexpr
    KV_LENGTHS: gl.constexpr
    SINKS: gl.constexpr
    SOFTCAP: gl.constexpr
    LSE: gl.constexpr
    TURNS: gl.constexpr  # the two warp groups take turns at the tensor cores


@aggregate
class Shape:
    """The call's integers, all of them data, and what else says which keys are seen."""

    q_lengths: gl.tensor | gl.constexpr  # int32 [B]
    kv_lengths: gl.tensor | gl.constexpr
    bounds: gl.tensor | gl.constexpr  # int32: of `bounds.py`; with LISTED `block_lists.py`, SEGMENTS `segments.py`
    bias: gl.tensor | gl.constexpr  # float32: see `bounds.py`
    batch: gl.tensor
    heads: gl.tensor
    group: gl.tensor  # query heads per K/V head
    q_len: gl.tensor
    kv_len: gl.tensor
    left: gl.tensor
    right: gl.tensor
    rows: gl.tensor  # tiles of one head; with SEGMENTS as many as there is room for, of all batch entries
    section: gl.tensor  # heads whose keys and values fit the L2 cache together
    bias_b: gl.tensor  # strides of the bias; with TILES 1 where the mask has batch entries, or heads, 0 where not
    bias_h: gl.tensor
    list_b: gl.tensor  # strides of the lists
    list_h: gl.tensor
    list_m: gl.tensor


@aggregate
class Pipe:
    """Shared memory and its barriers."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    bias: gl.shared_memory_descriptor | gl.constexpr  # float32 [2, BLOCK_N], one block's for each consumer
    mask: gl.shared_memory_descriptor | gl.constexpr  # [2 * MASK_STAGES, 1, 1, ROWS, BLOCK_N]: tiles of the mask
    mask_full: gl.shared_memory_descriptor | gl.constexpr
    mask_empty: gl.shared_memory_descriptor | gl.constexpr
    own: gl.shared_memory_descriptor | gl.constexpr  # with SEGMENTS: the producer's, for values that it looks at itself


@aggregate
class Results:
    """Where a consumer puts what it found."""

    descriptor: base_value | gl.constexpr  # of the output
    staging: gl.shared_memory_descriptor | gl.constexpr  # [2, 1, 1, ROWS, DV]
    out: gl.tensor  # [B, Sq, H, Dv], contiguous
    lse: gl.tensor | gl.constexpr  # float32 [B, H, Sq], contiguous
    sinks: gl.tensor | gl.constexpr  # [H]
    dv8: gl.tensor  # Dv / 8


@aggregate
class Seen:
    """With INTERVALS: what the rows of one consumer's tile see. Nothing of it is read otherwise."""

    lo: gl.tensor | gl.constexpr  # [ROWS], as the rows of the scores lie
    hi: gl.tensor | gl.constexpr
    highest: gl.tensor | gl.constexpr  # the tile's greatest lo
    lowest: gl.tensor | gl.constexpr  # and least hi
    gaps: gl.tensor | gl.constexpr  # not 0: some keys in between may be seen by no row
    biased: gl.tensor | gl.constexpr  # with KEYS, not 0: the bias is more than bounds say
    bias: gl.tensor | gl.constexpr  # with KEYS: that of key 0, for the tile's head


@aggregate
class Part:
    """With SEGMENTS: the rows of a tile."""

    row: gl.tensor  # the first
    rows: gl.tensor  # how many
    position: gl.tensor  # of the first among the keys


@aggregate
class Listed:
    """With LISTED: which blocks of keys a tile visits."""

    at: gl.tensor  # the list's indices
    others: gl.tensor  # blocks that take a tile of the mask, at least one: they come first
    run: gl.tensor  # what the number of a later block is short of its index
    index: gl.tensor  # of the first block
