"""A tensor mask that is the same for all queries, as one bias per key: what a kernel adds to exponents in base 2."""

from __future__ import annotations

from typing import Any

from ...call import Call, Problem
from .arguments import broadcast_strides
from .binaries.launcher import Launch, launcher_of
from .binaries.triton_kernel import NamedKernel
from .launcher import overlaps

RANGE_NUMBERS = 4  #: of a row's range
SLACK = 128  #: numbers before the first bias, so that a block that begins before key 0 can be read whole

_KERNEL = NamedKernel(f"{__package__}.key_bias_kernel", "key_bias_kernel")


class KeyBias:
    """Biases of calls of one kind, at a place in the memory of `Bounds`.

    ranges_at, bias_at: int32 and float32 numbers from the memory's beginning: [B'|1, H'|1, 4] (first key that the mask
    lets be seen, one past the last, 1 where biases say more than this range, unused; 0 without such a key) and
    [B'|1, H'|1, Skv], of the mask's B' and H'. end: one past the last number. strides: of the bias, along batch entries
    and heads; 0 where it is broadcast. launch: the launcher, of the memory and the mask.
    """

    __slots__ = ("bias_at", "end", "heads", "launch", "ranges_at", "strides")

    def __init__(self, p: Problem, call: Call, start: int) -> None:
        mask: Any = call.mask
        batch, self.heads = p.mask_shape[:2]
        rows = batch * self.heads
        self.ranges_at = start
        self.bias_at = start + rows * RANGE_NUMBERS + SLACK
        self.end = self.bias_at + rows * p.kv_len
        self.strides = (self.heads * p.kv_len if batch > 1 else 0, p.kv_len if self.heads > 1 else 0)
        mask_strides = broadcast_strides(mask, 4)
        pdl = overlaps(p.capability)
        self.launch = launcher_of(
            _KERNEL,
            (self.heads, batch),
            call.q.device,
            p.capability,
            (*mask_strides[:2], mask_strides[3], self.heads, p.kv_len, self.ranges_at, self.bias_at),
            (1024, pdl),
            num_warps=4,
            **({"launch_pdl": True} if pdl else {}),
        )

    def in_order(self, call: Call, memory: Any) -> list[Launch]:
        """See `Bounds.in_order`."""
        return [(self.launch, (memory, call.mask), ())]
