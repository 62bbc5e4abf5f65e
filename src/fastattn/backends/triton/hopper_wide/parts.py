"""What the functions of the Hopper forward for wide heads pass to each other: values of several fields.

A field that may be `gl.constexpr` is None where the binary has no such thing.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental.gluon import language as gl

from ...._compat.gluon import aggregate

ROWS = gl.constexpr(64)  # rows of a tile: of each query, some heads of a group
KEYS = gl.constexpr(64)  # of a block
HALF = gl.constexpr(256)  # columns of the output that one consumer holds, and of a part of queries, keys and values
REST_COLUMNS = gl.constexpr(64)  # columns of the last part of a head dim above 512


@aggregate
class Config:
    """What a binary is made for."""

    REST: gl.constexpr  # the head dim is above 512: queries and keys have a third part
    SAME: gl.constexpr  # the values are the keys' first columns
    BAND: gl.constexpr  # a band hides keys
    SPLIT: gl.constexpr  # the keys of a tile are divided among programs; `combine.py` combines what they leave
    Q_LENGTHS: gl.constexpr
    KV_LENGTHS: gl.constexpr
    SINKS: gl.constexpr
    SOFTCAP: gl.constexpr
    LSE: gl.constexpr


@aggregate
class Shape:
    """The call's integers, all of them data."""

    q_lengths: gl.tensor | gl.constexpr  # int32 [B]
    kv_lengths: gl.tensor | gl.constexpr
    batch: gl.tensor
    kv_heads: gl.tensor
    group: gl.tensor  # query heads per K/V head
    q_len: gl.tensor
    kv_len: gl.tensor
    left: gl.tensor
    right: gl.tensor
    rows: gl.tensor  # tiles along the queries
    queries: gl.tensor  # of a tile, a power of two: so many rows are one head's
    blocks: gl.tensor  # tiles along the heads of a group
    splits: gl.tensor  # programs that share the keys of a tile


@aggregate
class Pipe:
    """Shared memory and its barriers. A part is [64, 256]: half of the columns of a tile of queries or of a block.

    kv: with SAME two blocks of keys, else one of keys and one of values; two parts each.
    """

    q: gl.shared_memory_descriptor  # [2, 1, 1, ROWS, HALF]
    q_rest: gl.shared_memory_descriptor | gl.constexpr  # [1, 1, ROWS, REST_COLUMNS]
    kv: gl.shared_memory_descriptor  # [4, 1, 1, KEYS, HALF]
    k_rest: gl.shared_memory_descriptor | gl.constexpr  # [2, 1, 1, KEYS, REST_COLUMNS], of each consumer's block
    p: gl.shared_memory_descriptor  # [ROWS, KEYS]: the last block's probabilities, for who did not compute them
    bases: gl.shared_memory_descriptor  # float32 [2, ROWS]: what each consumer's last exponents were counted from
    sums: gl.shared_memory_descriptor  # float32 [2, ROWS]: of each consumer's probabilities
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # of each part of kv
    empty: gl.shared_memory_descriptor
    rest_full: gl.shared_memory_descriptor | gl.constexpr
    rest_empty: gl.shared_memory_descriptor | gl.constexpr
    bases_full: gl.shared_memory_descriptor  # of each consumer
    p_full: gl.shared_memory_descriptor
    sums_full: gl.shared_memory_descriptor


@aggregate
class Results:
    """Where a consumer puts what it found."""

    out: gl.tensor  # [B, Sq, H, Dv], contiguous
    lse: gl.tensor | gl.constexpr  # float32 [B, H, Sq], contiguous
    sinks: gl.tensor | gl.constexpr  # [H]
    scratch: gl.tensor | gl.constexpr  # with SPLIT, float32: see `combine.py`
    dv8: gl.tensor  # Dv / 8


@aggregate
class Item:
    """A tile of rows and a range of keys: what a program works on at a time."""

    b: gl.tensor
    kv_head: gl.tensor
    head: gl.tensor  # the first
    query: gl.tensor  # the first
    split: gl.tensor
    position: gl.tensor  # of the first query
    first: gl.tensor  # the first key of the first block; the others lie before it
    pairs: gl.tensor  # of blocks, at least one
