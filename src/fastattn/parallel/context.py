"""`ContextParallel`: one sequence over several ranks, in calls of the op and in models of transformers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import ShardedAttention
from .sequence import Lengths

if TYPE_CHECKING:
    from .transformers import ShardedCache

IGNORED = -100  #: the label of a token whose prediction does not count


class ContextParallel(ShardedAttention):
    """Attention over a sequence whose tokens are spread over the ranks of a group.

    `shard`, `positions` and `unshard` cut a sequence up and put it together; `attention` and `decode` are the op over
    shards; `model`, `decoding`, `cache` and `targets` run a model of transformers. Every method that is called
    collective must be called by all ranks of the group, in the same order.

    Args: see `ShardedAttention.__init__`.
    """

    def targets(self, labels: Tensor, *, averaged: bool = True, ignored: int = IGNORED) -> dict[str, Tensor]:
        """What a causal language model of transformers takes to compute its loss over this rank's tokens.

        A token predicts the one after it, which another rank may hold, so labels are shifted before they are cut up.

        Args:
            labels: integer `[B, length]`, whole: for each token its own id, or `ignored`.
            averaged: gradients (and losses) of ranks are averaged afterwards, as DDP and FSDP do: each rank's loss is
                multiplied by their number. Else the ranks' losses add up to the whole.

        Returns:
            "labels" and "shift_labels", this rank's, shifted; "num_items_in_batch": what the sum is divided by.
        """
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)
        count = (shifted != ignored).sum().clamp(min=1) / (self.size if averaged else 1)
        mine = self.shard(shifted, 1)
        return {"labels": mine, "shift_labels": mine, "num_items_in_batch": count}

    def model(
        self, model: torch.nn.Module, length: int, cu_seqlens: Lengths | None = None
    ) -> AbstractContextManager[None]:
        """Within the block the attention of a model of transformers is this object's: see `transformers.over_ranks`."""
        from .transformers import over_ranks

        return over_ranks(self, model, length, cu_seqlens)

    def decoding(self, model: torch.nn.Module, cache: ShardedCache) -> AbstractContextManager[None]:
        """Within the block a model of transformers decodes against a sharded cache: see `transformers.decoding`."""
        from .transformers import decoding

        return decoding(self, model, cache)

    def cache(self, length: int) -> ShardedCache:
        """A cache for a model of transformers, of which each rank keeps its shard: see `transformers.ShardedCache`."""
        from .transformers import ShardedCache

        return ShardedCache(self, length)
