"""`fastattn sweep decode`: few queries against a long cache, held against torch's attention and against the memory.

The least that a decode step can take is the time to read K and V once. Here that is half of the time of copying the
same bytes, measured in the same turns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from .calls import Case
from .rows import Row, Sweep, best_peer, quotient, time_of

PEERS = ("torch-cudnn", "torch-flash", "torch-efficient")
METHOD = {
    "all": "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 cache (a call of more than "
    "that has one set), replayed in turns; K and V are [B,Hkv,S,D] in memory; fastattn is called until it has what it "
    "will stay with",
    "read": "half of the time of copying the bytes of K and V that are seen, in the same turns",
    "ragged": "lengths on the device; fastattn's K and V hold NaN past them, torch's are ordinary numbers and a bool "
    "mask; TB/s and read are of the keys that are there. equal: the same number of keys in rows of one length",
    "heads": "torch-efficient has no grouped heads: K and V are repeated for it within the call, as its user has to",
    "window": "torch gets just the keys of the window; torch-flash is its kernel with the sinks applied through the "
    "log-sum-exp, torch-math plain tensor operations",
}


def run(sweep: Sweep) -> None:
    """Measures all rows."""

    def add(section: str, cases: Sequence[Case], names: Sequence[str] = PEERS) -> None:
        for case in cases:
            sweep.add(section, case.label(), partial(_measure, sweep, case, names))

    def cached(
        kv_len: int, batch: int = 1, q_len: int = 1, q_heads: int = 32, kv_heads: int = 8, dim: int = 128
    ) -> Case:
        return Case(q_len, kv_len, batch, q_heads, kv_heads, dim, head_major=True)

    long = sweep.pick(8192, 8192, 48)
    full = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 2048), (8, 8192), (32, 2048), (64, 4096))
    shapes = sweep.pick(full, ((1, 512), (1, 8192), (8, 8192)), ((1, 32), (2, 48)))
    add("one query", [cached(kv_len, batch) for batch, kv_len in shapes])
    queries = sweep.pick(((4, 8192), (16, 4096)), ((4, 8192),), ((4, 48),))
    add("few queries", [cached(kv_len, q_len=q_len) for q_len, kv_len in queries])
    add("head dims", [cached(long, dim=dim) for dim in sweep.pick((64, 256), (64,), (64,))])
    heads = sweep.pick(((32, 32), (32, 8), (64, 8), (64, 4)), ((64, 8),), ((8, 8),))
    add("heads", [cached(long, q_heads=q_heads, kv_heads=kv_heads) for q_heads, kv_heads in heads])
    gpt_oss = [
        Case(1, long, batch, 64, 8, 64, head_major=True, left=min(127, long // 2), sinks=True)
        for batch in sweep.pick((1, 8), (1,), (1,))
    ]
    add("window and sinks", gpt_oss, ("torch-flash", "torch-math"))
    add("ragged", ragged(sweep.pick((32, 8192), (32, 8192), (3, 48)), sweep.seed))


def ragged(shape: tuple[int, int], seed: int) -> list[Case]:
    """A batch of lengths drawn evenly from 1/64 of the capacity to all of it, and one of equal lengths as large."""
    batch, capacity = shape
    rng = random.Random(seed)
    lengths = tuple(rng.randint(max(1, capacity // 64), capacity) for _ in range(batch))
    equal = round(sum(lengths) / batch)
    return [Case(1, capacity, batch, head_major=True, lengths=lengths), Case(1, equal, batch, head_major=True)]


def _measure(sweep: Sweep, case: Case, peers: Sequence[str]) -> Row:
    row = sweep.compare(case, ("fastattn", *peers), settle=True, read=True)
    for entry in row["implementations"].values():
        if "us" in entry:
            entry["tb_s"] = case.kv_bytes / entry["us"] / 1e6
    ours, peer, read = time_of(row, "fastattn"), best_peer(row), row["read"].get("us")
    row["best_peer"] = peer[0] if peer else None
    row["figures"] = {"read us": read, "TB/s": row["implementations"]["fastattn"].get("tb_s")}
    row["ratios"] = {"/ best torch": quotient(ours, peer[1] if peer else None), "/ read": quotient(ours, read)}
    return row
