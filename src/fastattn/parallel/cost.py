"""What each strategy costs: bytes moved, time computed, how much of the one hides behind the other.

Arithmetic on a few rates, so that it can be checked against measurements (`benchmarks.parallel`) and applied to
machines that are not at hand. `ContextParallel(strategy="auto")` takes the strategy with the least total.
"""

from __future__ import annotations

from dataclasses import dataclass

STRATEGIES = ("ulysses", "ring", "allgather")
BACKWARD = 2.5  #: floating-point operations of a backward over those of its forward: five GEMMs for two


@dataclass(frozen=True)
class Hardware:
    """Rates that are reached, not those of data sheets, in bytes, operations and seconds."""

    flops: float = 620e12  #: of a long causal forward on one GPU, counting visible pairs only
    backward_flops: float = 500e12
    ramp: int = 1 << 15  #: rows x heads at which a kernel reaches half of its rate
    memory: float = 2.8e12  #: bytes per second read or written
    link: float = 300e9  #: bytes per second that a GPU sends, and receives, within its host
    network: float = 45e9  #: the same between hosts, per GPU
    latency: float = 25e-6  #: of one collective or one round of messages
    launch: float = 30e-6  #: of one attention call, with what surrounds it


HOPPER = Hardware()  #: an H100 or H200 with NVLink, and 400 Gb/s of network per GPU


@dataclass(frozen=True)
class Work:
    """One attention call over a whole sequence.

    pairs: query-key pairs that are visible, per batch entry and head; `busiest`: the largest share of them that one
    rank has when it computes its own tokens' rows (1 / ranks when balanced); `needed`: the share of other ranks' keys
    and values that a rank needs, on average.
    """

    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    itemsize: int
    pairs: float
    busiest: float
    needed: float
    backward: bool

    @staticmethod
    def of(
        length: int,
        ranks: int,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int = 128,
        batch: int = 1,
        itemsize: int = 2,
        causal: bool = True,
        window: int | None = None,
        backward: bool = False,
    ) -> Work:
        """A call whose work is balanced between ranks. window: tokens to the left that a query sees; None = all."""
        pairs = length * (length + 1) / 2 if causal else float(length) ** 2
        needed = (0.75 if ranks > 1 else 0.0) if causal else 1.0
        if window is not None and window < length:
            pairs = (window + 1) * (length - window / 2) if causal else length * (window + 1.0)
            needed = min(needed, sparse_need(window, length, ranks))
        return Work(
            length, q_heads, kv_heads, head_dim, head_dim, batch, itemsize, pairs, 1 / ranks, needed, backward
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 2.0 * self.batch * self.q_heads * (self.head_dim + self.value_dim) * self.pairs

    @property
    def q_bytes(self) -> float:
        """Of all queries; outputs are counted as large."""
        return float(self.batch * self.q_heads * self.length * self.head_dim * self.itemsize)

    @property
    def kv_bytes(self) -> float:
        """Of all keys and values."""
        return float(self.batch * self.kv_heads * self.length * (self.head_dim + self.value_dim) * self.itemsize)


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of one rank, the busiest."""

    strategy: str
    compute: float  #: attention itself
    around: float  #: packing, unpacking, merging
    communication: float
    exposed: float  #: of the communication, what no computation hides
    received: float  #: bytes that come from other ranks

    @property
    def total(self) -> float:
        return self.compute + self.around + self.exposed


def sparse_need(reach: int, length: int, ranks: int) -> float:
    """The share of other ranks' keys that is needed when no query sees further than `reach` tokens to the left."""
    return min(1.0, 2.0 * reach * ranks / (max(1, ranks - 1) * length)) if ranks > 1 and length else 0.0


def single(work: Work, hardware: Hardware = HOPPER) -> float:
    """Seconds of one GPU doing all of it."""
    return _compute(work, work.flops, work.length, hardware, 1)


def predict(
    work: Work, ranks: int, strategy: str, hardware: Hardware = HOPPER, ranks_per_host: int | None = None
) -> Prediction:
    """What a strategy costs a rank, forward and (if `work.backward`) backward.

    ranks_per_host: ranks that share a host; None means all do.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    local = min(ranks, ranks_per_host or ranks)
    found = {"ulysses": _ulysses, "ring": _ring, "allgather": _allgather}[strategy]
    return found(work, ranks, local, hardware)


def cheapest(
    work: Work,
    ranks: int,
    hardware: Hardware = HOPPER,
    ranks_per_host: int | None = None,
    allowed: tuple[str, ...] = STRATEGIES,
) -> str:
    """The strategy with the least total."""
    return min(allowed, key=lambda name: predict(work, ranks, name, hardware, ranks_per_host).total)


def _ulysses(work: Work, ranks: int, local: int, hardware: Hardware) -> Prediction:
    # A K/V head goes to every rank that has one of its query heads.
    copies = max(1.0, ranks / work.kv_heads)
    passes = 2 * work.q_bytes + copies * work.kv_bytes  # q, k, v there, the output back
    if work.backward:
        passes += 2 * work.q_bytes + copies * work.kv_bytes  # its gradient there, those of q, k, v back
    own = passes / ranks
    received = own * (ranks - 1) / ranks
    seconds = max(own * (local - 1) / ranks / hardware.link, own * (ranks - local) / ranks / hardware.network)
    rounds = 4 if work.backward else 2
    communication = (seconds + rounds * hardware.latency) if ranks > 1 else 0.0
    around = 4 * own / hardware.memory  # packed and unpacked, read and written
    compute = _compute(work, work.flops / ranks, work.length, hardware, 1, heads=work.q_heads / ranks)
    return Prediction("ulysses", compute, around, communication, communication, received)


def _allgather(work: Work, ranks: int, local: int, hardware: Hardware) -> Prediction:
    gathers = 2 if work.backward else 1
    wide = 2 * work.kv_bytes * max(1.0, 2 / work.itemsize) if work.backward else 0.0  # gradients, in float32
    whole = gathers * work.kv_bytes + wide
    received = whole * (ranks - 1) / ranks
    # What comes from other hosts comes once per host, over all of its network; within the host it is passed on.
    across = whole * (ranks - local) / ranks / (local * hardware.network)
    rounds = 3 if work.backward else 1
    seconds = max(received / hardware.link, across)
    communication = seconds + rounds * hardware.latency if ranks > 1 else 0.0
    around = 3 * whole / hardware.memory
    compute = _compute(work, work.flops * work.busiest, work.length / ranks, hardware, 2)
    return Prediction("allgather", compute, around, communication, communication, received)


def _ring(work: Work, ranks: int, local: int, hardware: Hardware) -> Prediction:
    rate = hardware.link if local == ranks else hardware.network  # a round waits for its slowest pair
    passes = 3 if work.backward else 1  # keys and values twice, their gradients back in the same precision
    received = passes * work.needed * work.kv_bytes * (ranks - 1) / ranks
    rounds = (ranks - 1) * (3 if work.backward else 1)
    communication = received / rate + rounds * hardware.latency
    compute = _compute(work, work.flops * work.busiest, work.length / ranks, hardware, ranks)
    hidden = min(communication - rounds * hardware.latency, compute * (ranks - 1) / ranks)
    # Per round the float32 sum is read and written, and the block's result is read: of q's size each.
    touched = (8 + work.itemsize) / work.itemsize * work.q_bytes / ranks * (2 if work.backward else 1)
    share = 1.0 if work.needed >= 0.75 else work.needed
    around = max(0, ranks - 1) * touched * share / hardware.memory + 4 * received / hardware.memory
    exposed = max(0.0, communication - hidden) if ranks > 1 else 0.0
    return Prediction("ring", compute, around, communication, exposed, received)


def _compute(
    work: Work, flops: float, rows: float, hardware: Hardware, calls: int, heads: float | None = None
) -> float:
    """Seconds of attention in so many calls; a call of few rows and heads does not fill the GPU."""
    size = max(1.0, rows * (work.q_heads if heads is None else heads) * work.batch)
    slower = 1 + hardware.ramp / size
    seconds = flops / hardware.flops * slower + calls * hardware.launch
    if work.backward:
        seconds += BACKWARD * flops / hardware.backward_flops * slower + calls * hardware.launch
    return seconds
