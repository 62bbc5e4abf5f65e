"""One attention call that is measured, as numbers: no tensors, no torch, so that reports can be made anywhere."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = 2  #: of bfloat16, in which everything is measured


@dataclass(frozen=True)
class Case:
    """An attention call, causal (lower right), bfloat16."""

    q_len: int
    kv_len: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    head_major: bool = False  #: K/V's memory is [B,Hkv,S,D], as a cache's, and not [B,S,Hkv,D], as projections write
    left: int = -1  #: of a sliding window: keys before its own that a query sees; -1 for all
    sinks: bool = False
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None  #: keys that are there, for each batch entry; then Sq is 1
    padding: tuple[int, ...] | None = None  #: tokens of padding on the left, for each batch entry; then Sq is Skv
    packed: tuple[int, ...] | None = None  #: lengths of sequences side by side in one batch entry, Sq = Skv in all
    additive: bool = False  #: a random additive mask, one for all heads and entries, beside the causal one
    #: head dim of the values if they are the keys' first columns (absorbed MLA); 0: they are a tensor of their own
    values: int = 0

    def __post_init__(self) -> None:
        if self.lengths is not None and (self.q_len != 1 or len(self.lengths) != self.batch):
            raise ValueError("lengths: expected one for each batch entry, and one query")
        if self.padding is not None and (self.q_len != self.kv_len or len(self.padding) != self.batch):
            raise ValueError("padding: expected one number for each batch entry, and as many queries as keys")
        if self.packed is not None and not (self.batch == 1 and self.q_len == self.kv_len == sum(self.packed)):
            raise ValueError("packed: expected one batch entry of as many queries as keys, the sum of the lengths")
        if sum(x is not None for x in (self.lengths, self.padding, self.packed)) + self.additive > 1:
            raise ValueError("lengths, padding, packed, additive: expected one of them")
        if not 0 <= self.values <= self.dim:
            raise ValueError("values: expected at most as many columns as the keys have")
        if self.softcap and self.additive:
            raise ValueError("softcap: expected no additive mask beside it")

    def label(self) -> str:
        dims = f"{self.dim}/{self.values}" if self.values else f"{self.dim}"
        parts = [f"B={self.batch} Sq={self.q_len} Skv={self.kv_len} {self.q_heads}/{self.kv_heads} D={dims}"]
        parts += [f"window {self.left}"] if self.left >= 0 else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += [f"lengths {min(self.lengths)}..{max(self.lengths)}"] if self.lengths else []
        parts += [f"left padding {min(self.padding)}..{max(self.padding)}"] if self.padding else []
        parts += [f"{len(self.packed)} sequences packed"] if self.packed else []
        parts += ["additive mask"] if self.additive else []
        return " ".join(parts)

    @property
    def value_dim(self) -> int:
        return self.values or self.dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that some query sees."""
        lengths, times = (self.lengths, 1) if self.lengths else ((self.kv_len,), self.batch)
        seen = sum(lengths) if self.left < 0 else sum(min(n, self.left + self.q_len) for n in lengths)
        numbers = self.dim if self.values else 2 * self.dim
        return seen * times * self.kv_heads * numbers * ITEM_BYTES

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head, over all batch entries."""
        times = 1
        if self.packed:
            parts = [(n, n) for n in self.packed]
        elif self.padding:
            parts = [(self.q_len - n, self.q_len - n) for n in self.padding]
        elif self.lengths:
            parts = [(self.q_len, n) for n in self.lengths]
        else:
            parts, times = [(self.q_len, self.kv_len)], self.batch
        return times * sum(_seen(q_len, kv_len, self.left) for q_len, kv_len in parts)

    def useful_flops(self, kind: str) -> float:
        """Operations of the visible pairs of query and key: 2 GEMMs in a forward, 5 in a backward."""
        keys, values = {"inference": (1, 1), "training": (1, 1), "backward": (3, 2), "step": (4, 3)}[kind]
        return 2.0 * self.pairs * self.q_heads * (keys * self.dim + values * self.value_dim)

    def flops(self, backward: bool = False) -> float:
        """Operations of both GEMMs over every pair of query and key, as the reference computes them."""
        forward = 2.0 * self.batch * self.q_heads * self.q_len * self.kv_len * (self.dim + self.value_dim)
        return 3.5 * forward if backward else forward


def _seen(q_len: int, kv_len: int, left: int) -> int:
    """Pairs under a causal mask, lower right, in which a query sees `left` keys before its own (-1: all)."""

    def up_to(n: int) -> int:  # the last q_len of n queries, each of which sees all keys up to its own
        first = max(n - q_len, 0)
        return n * (n + 1) // 2 - first * (first + 1) // 2

    return up_to(kv_len) - (up_to(max(kv_len - left - 1, 0)) if left >= 0 else 0)
