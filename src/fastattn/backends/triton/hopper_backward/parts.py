"""What the functions of the Hopper backward pass to each other: values of several fields.

A field that may be `gl.constexpr` is None where the binary has no such thing.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental.gluon import language as gl

from ...._compat.gluon import aggregate, base_value

#: What hides keys. FULL: nothing. CAUSAL: lower right, no more queries than keys. BAND: left and right, as data, where
#: every query sees a key. INTERVALS: bounds of each query, made by `bounds.py`; it stands for all the rest, and with
#: BIASED each key has a bias as well.
FULL = gl.constexpr(0)
CAUSAL = gl.constexpr(1)
BAND = gl.constexpr(2)
INTERVALS = gl.constexpr(3)

ROWS = gl.constexpr(64)  # queries of a tile
HALF = gl.constexpr(64)  # keys, or queries, whose products one consumer has in its registers: rows of a product
NARROW = gl.constexpr(128)  # the largest head dim of `consumer.py`; above it is `wide_consumer.py`
STAGES = gl.constexpr(2)  # tiles of queries in shared memory


@aggregate
class Config:
    """What a binary is made for."""

    D: gl.constexpr  # head dim and value dim, padded
    KEYS: gl.constexpr  # keys of a block, which one program has: 64 with wide heads, else 128
    MASK: gl.constexpr
    SOFTCAP: gl.constexpr
    SPLIT: gl.constexpr  # several programs share a block of keys, and add their dK and dV up in memory
    BIASED: gl.constexpr  # with INTERVALS: keys have biases, the same for all queries
    ORDERED: gl.constexpr  # what several programs add to is added in a fixed order: see `order.py`


@aggregate
class Shape:
    """The call's integers, all of them data, and what else says which keys are seen."""

    bounds: gl.tensor | gl.constexpr  # int32: see `bounds.py`
    extents: gl.tensor | gl.constexpr  # int32: see `extents.py`
    bias: gl.tensor | gl.constexpr  # float32 [B|1, H|1, Skv]: see `key_bias.py`
    bias_b: gl.tensor | gl.constexpr  # its strides
    bias_h: gl.tensor | gl.constexpr
    batch: gl.tensor
    heads: gl.tensor
    kv_heads: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    left: gl.tensor
    right: gl.tensor
    tiles: gl.tensor  # of the queries of one head
    blocks: gl.tensor  # of the keys of one head
    share: gl.tensor  # query heads of a program
    split: gl.tensor  # programs that share a block of keys
    section: gl.tensor  # see `tiles.block_of`
    sections: gl.tensor
    ticket: gl.tensor | gl.constexpr  # with ORDERED: which program this is, see `order.take_ticket`


@aggregate
class Loads:
    """What the copy engine reads."""

    q: base_value  # [B, Hq, Sq, D] in boxes of [1, 1, ROWS, D]
    grad_out: base_value
    k: base_value  # [B, Hkv, Skv, D] in boxes of [1, 1, KEYS, D]
    v: base_value
    rows: base_value  # float32, flat, in boxes of ROWS: see `prepare.py`
    clean_q: base_value | gl.constexpr  # [B, Hq, tiles * ROWS, D]: copies of tiles in which some query sees nothing
    clean_grad_out: base_value | gl.constexpr


@aggregate
class Pipe:
    """Shared memory and its barriers."""

    q: gl.shared_memory_descriptor  # [STAGES, 1, 1, ROWS, D]
    grad_out: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [STAGES, ROWS]
    delta: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor  # [1, 1, 1, KEYS, D]
    v: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor | gl.constexpr  # with wide heads: [STAGES, KEYS, ROWS]
    ds: gl.shared_memory_descriptor  # [STAGES, KEYS, ROWS], with wide heads [1, KEYS, ROWS]
    q_full: gl.shared_memory_descriptor
    grad_out_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    keys_full: gl.shared_memory_descriptor  # of k, of v
    turn: gl.shared_memory_descriptor | gl.constexpr  # with ORDERED: it is this program's turn to add
    added: gl.shared_memory_descriptor | gl.constexpr  # both consumers have, in every second step
    counted: gl.shared_memory_descriptor | gl.constexpr  # others may see it


@aggregate
class Results:
    """Where a consumer puts what it found."""

    dk: base_value  # descriptors of [B, Hkv, Skv, D] in boxes of [1, 1, HALF, D]
    dv: base_value
    dq_sum: gl.tensor  # float32 [B * Hq * tiles, ROWS * D], as `sums.py` orders it
    dkv_sum: gl.tensor | gl.constexpr  # with SPLIT: float32 [2, B * Hkv * blocks, KEYS * D], dV first
    counters: gl.tensor | gl.constexpr  # with ORDERED: int32, see `order.py`
    inner: gl.tensor  # of scores, where they are capped
    scale: gl.tensor  # of what goes into the exponent
    factor: gl.tensor  # of dK
