"""`ContextParallel`: one sequence over several ranks."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import debug
from ..api import scaled_dot_product_attention
from ..dispatch import registry
from ..masks import Segments
from ..shape_cache import shape_cache
from . import cost, exchange, strategies
from .blocks import Options
from .checks import check_agreement, outline
from .decode import decode
from .layout import ORDERS, Layout
from .plan import Pattern, Plan
from .sequence import Lengths, pattern_of, work_of

if TYPE_CHECKING:
    from .transformers import ShardedCache

IGNORED = -100  #: the label of a token whose prediction does not count
MOST_BYTES = 256 << 20  #: of intervals on the device, in the plans that are kept


def _most_bytes(plan: Plan) -> int:
    """That a plan comes to hold on the device: an interval for each of the rank's tokens, forward, backward and in each
    step of an exchange."""
    ranks = plan.layout.ranks
    return 8 * (plan.layout.length // ranks + 1) * (ranks + 2)


class ContextParallel:
    """Attention over a sequence whose tokens are spread over the ranks of a group.

    Every method named below as collective must be called by all ranks of the group, in the same order.
    """

    def __init__(
        self,
        mesh: DeviceMesh | dist.ProcessGroup | None = None,
        *,
        strategy: str = "auto",
        order: str = "head-tail",
        hardware: cost.Hardware = cost.HOPPER,
        ranks_per_host: int | None = None,
    ) -> None:
        """
        Args:
            mesh: a DeviceMesh of one dimension (`mesh["cp"]`), a ProcessGroup, or None for all ranks.
            strategy: "ulysses" (all-to-all over heads), "ring", "allgather", or "auto": per call the one that
                `cost.predict` finds cheapest.
            order: which tokens a rank holds. "head-tail": two chunks, one from each end, which balances causal work;
                "contiguous": one chunk.
            hardware: rates for "auto".
            ranks_per_host: ranks of the group that share a host; default: what torchrun says (LOCAL_WORLD_SIZE).

        Raises:
            ValueError: an argument is not as described.
        """
        if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, such as mesh['cp'], got {mesh.ndim}")
        if strategy not in ("auto", *cost.STRATEGIES):
            raise ValueError(f"strategy: expected auto, {', '.join(cost.STRATEGIES)}, got {strategy!r}")
        if order not in ORDERS:
            raise ValueError(f"order: expected {' or '.join(ORDERS)}, got {order!r}")
        group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "mesh: expected a DeviceMesh, a ProcessGroup that this process is in, or None after "
                f"init_process_group, got {type(group).__name__}"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(self.group), self.group.size()
        self.strategy, self.order, self.hardware = strategy, order, hardware
        self.ranks_per_host = _ranks_per_host(group) if ranks_per_host is None else ranks_per_host
        self._plans = shape_cache.section("context parallel plans", 64, weigh=_most_bytes, max_bytes=MOST_BYTES)
        self._choices = shape_cache.section("context parallel plans", 1 << 10)
        self._connected: set[torch.device] = set()

    def layout(self, length: int) -> Layout:
        """Which rank holds which of `length` tokens."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"length: expected the number of tokens of all ranks together, got {length!r}")
        return Layout(length, self.size, self.order)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor that every rank has whole. Any length: shards may differ by a token or two."""
        return self.layout(x.shape[dim]).take(x, dim, self.rank)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """int64 `[1, tokens of this rank]`: where they stand in the sequence; what a model takes as `position_ids`."""
        return self.layout(length).positions(self.rank)[None].to(device or "cpu")

    def unshard(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole of what `shard` cut up, on every rank. Collective. No gradient flows through it."""
        layout, x = self.layout(length), x.detach().movedim(dim, 0)
        room = x.new_zeros((max(layout.size(r) for r in range(self.size)), *x.shape[1:]))
        room[: x.shape[0]] = x
        return layout.join(list(exchange.all_gather(room, self.group)), 0).movedim(0, dim)

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

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        length: int,
        mask: str | Segments | None = None,
        cu_seqlens: Lengths | None = None,
        window: tuple[int, int] | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        strategy: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`fastattn.scaled_dot_product_attention` over the whole sequence, shards in and out. Collective.

        Args:
            q, k, v: `[B, Hq, S, D]`, `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`, the S tokens that this rank holds (`shard`).
            length: tokens of all ranks together.
            mask: None, "causal", or `Segments` of the whole sequence (a table of three rows; read on the host once
                per call, so keep it on the CPU if you can).
            cu_seqlens: packed sequences of one batch entry: ints or an integer tensor `[N + 1]`, cumulative lengths in
                the whole sequence; with `mask="causal"` causal within each.
            window, softcap, scale: as the op's.
            sinks: `[Hq]`, the same on every rank. Their gradient is this rank's share of it: ranks' shares add up, as
                those of any parameter that all ranks have.
            return_lse: also return the log-sum-exp, `[B, Hq, S]`.
            strategy: for this call instead of the constructor's.

        Returns:
            `[B, Hq, S, Dv]` of this rank's tokens; with return_lse a pair. Gradients reach q, k, v and sinks.

        Raises:
            ValueError: an argument is not as described; with FASTATTN_DEBUG=1 on every rank, also where ranks differ.
        """
        try:
            layout = self.layout(length)
            pattern, call = pattern_of(layout, self.rank, q, k, v, mask, cu_seqlens, window, sinks, softcap, scale)
            chosen = self._strategy(strategy, layout, pattern, call.q, call.k, call.v)
        except (ValueError, TypeError) as error:
            if debug.ENABLED:  # the others must not go on without this rank
                check_agreement({"error": str(error)}, self.group)
            raise
        if debug.ENABLED:
            said = {"error": "", "q": outline(q), "k": outline(k), "v": outline(v), "mask and window": pattern}
            said |= {"sinks": sinks is not None, "softcap": softcap, "scale": scale, "return_lse": return_lse}
            check_agreement(said | {"order": self.order, "strategy": chosen}, self.group)
        q, k, v = call.q, call.k, call.v
        if chosen == "ulysses":
            out, lse = self._ulysses(layout, pattern, q, k, v, sinks, call.scale, call.softcap, return_lse)
        else:
            plan = self._plan(layout, pattern, q.device)
            options = Options(call.scale, call.softcap or None, registry.allowed())
            if chosen == "ring":
                self._connect(q.device)
            run = strategies.by_ring if chosen == "ring" else strategies.by_allgather
            out, lse = run(plan, self.group, q, k, v, sinks, options)
        return (out, lse) if return_lse and lse is not None else out

    def chosen(self, q: Tensor, k: Tensor, v: Tensor, *, length: int, strategy: str | None = None, **call: Any) -> str:
        """The strategy that `attention` with these arguments would use. Not collective."""
        layout = self.layout(length)
        names = ("mask", "cu_seqlens", "window", "sinks", "softcap", "scale")
        pattern, found = pattern_of(layout, self.rank, q, k, v, *(call.get(name) for name in names))
        return self._strategy(strategy, layout, pattern, found.q, found.k, found.v)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the same queries on every rank to keys and values that are spread over them. Collective.

        Args:
            q: `[B, Hq, Sq, D]`, the same on every rank.
            k, v: `[B, Hkv, capacity, D]`, `[B, Hkv, capacity, Dv]`: this rank's part of the cache, in any order; none
                (capacity 0) is fine.
            sinks: `[Hq]`, the same on every rank.
            options: the op's `kv_lengths` (int32 `[B]` on the device: how much of this rank's part is filled), `mask`
                (over this rank's part), `scale`, `softcap`, `backend`. Without a mask every query sees all keys.

        Returns:
            `[B, Hq, Sq, Dv]`, the same on every rank; with return_lse also the log-sum-exp `[B, Hq, Sq]`. No gradient.
        """
        if debug.ENABLED:
            check_agreement({"q": outline(q), "kv heads": k.shape[1], "value dim": v.shape[-1]}, self.group)
        with torch.no_grad():
            out, lse = decode(q, k, v, self.group, sinks, **options)
        return (out, lse) if return_lse else out

    def model(
        self, model: torch.nn.Module, length: int, cu_seqlens: Lengths | None = None
    ) -> AbstractContextManager[None]:
        """Within the block the attention of a model of transformers is this object's: see `hf.over_ranks`."""
        from .transformers import over_ranks

        return over_ranks(self, model, length, cu_seqlens)

    def decoding(self, model: torch.nn.Module, cache: ShardedCache) -> AbstractContextManager[None]:
        """Within the block a model of transformers decodes against a sharded cache: see `hf.decoding`."""
        from .transformers import decoding

        return decoding(self, model, cache)

    def cache(self, length: int) -> ShardedCache:
        """A cache for a model of transformers in which each rank keeps its own shard: see `hf.ShardedCache`."""
        from .transformers import ShardedCache

        return ShardedCache(self, length)

    def _plan(self, layout: Layout, pattern: Pattern, device: torch.device) -> Plan:
        key = (pattern, device)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = Plan(layout, self.rank, pattern, device)
        return found

    def _strategy(self, asked: str | None, layout: Layout, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str:
        asked = self.strategy if asked is None else asked
        why = strategies.refusal(self.size, q.shape[1], k.shape[1])
        if asked == "ulysses" and why:
            raise ValueError(f"strategy: {why}")
        if asked in cost.STRATEGIES:
            return asked
        if asked != "auto":
            raise ValueError(f"strategy: expected auto, {', '.join(cost.STRATEGIES)}, got {asked!r}")
        backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        heads = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.element_size())
        key = (pattern, heads, backward)
        found = self._choices.get(key)
        if found is None:
            allowed = tuple(name for name in cost.STRATEGIES if name != "ulysses" or not why)
            work = work_of(layout, pattern, heads, backward)
            found = cost.cheapest(work, self.size, self.hardware, self.ranks_per_host, allowed)
            self._choices[key] = found
        return found

    def _ulysses(
        self,
        layout: Layout,
        pattern: Pattern,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        scale: float,
        softcap: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap or None, "return_lse": return_lse}
        if pattern.segments is None:
            options["mask"] = "causal" if pattern.right == 0 else None
        else:
            table = torch.tensor(pattern.segments, dtype=torch.int32, device=q.device).reshape(-1, 3).T.contiguous()
            options["mask"] = Segments(table, causal=pattern.right == 0)
        if pattern.left >= 0 or pattern.right > 0:
            options["window"] = (pattern.left, -1 if pattern.right == 0 else pattern.right)

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
            found = scaled_dot_product_attention(q, k, v, sinks=sinks, **options)
            return found if isinstance(found, tuple) else (found, None)

        return strategies.by_heads(layout, self.rank, self.group, q, k, v, sinks, attend)

    def _connect(self, device: torch.device) -> None:
        if device not in self._connected:
            exchange.connect(device, self.group)
            self._connected.add(device)


def _ranks_per_host(group: dist.ProcessGroup) -> int:
    """How many of a group's ranks share a host, by torchrun's numbering; all of them without torchrun."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or group.size()
    return max(Counter(rank // local for rank in dist.get_process_group_ranks(group)).values())
