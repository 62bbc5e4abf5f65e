"""Communication between ranks. Every function is a collective: all ranks of the group call it, in the same order.

Tensors are `[B, H, tokens, D]`. Messages are token-major, so that what is received has the layout that the op prefers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout, Span
from .plan import Plan, Step

Group = dist.ProcessGroup

# torch 2.13 renamed both; the old names warn there.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextmanager
def together(what: str, group: Group) -> Iterator[None]:
    """Adds a note to a failure: which collective, and the likely causes. On a GPU failures show later, when NCCL's
    watchdog ends the process."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"fastattn.parallel: {what} failed on rank {group.rank()} of {group.size()}: another rank died, hung for "
            "longer than the group's timeout, or made another call (FASTATTN_DEBUG=1 compares the ranks' calls)"
        )
        raise


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`[ranks, *x.shape]`."""
    found = x.new_empty((group.size(), *x.shape))
    with together("all-gather", group):
        _all_gather(found.view(-1), x.contiguous().view(-1), group=group)
    return found


def gather(layout: Layout, tensors: Sequence[Tensor], rank: int, group: Group) -> list[Tensor]:
    """The whole sequence of each tensor, in one collective. tensors: `[B, H, tokens of the rank, D]`, one dtype."""
    sent, padded = _padded(layout, tensors, 1)
    for x, part in zip(tensors, padded):
        for index, piece in enumerate(layout.pieces(rank)):
            part[0, index, :, : piece.size] = _token_major(x[:, :, piece.start : piece.stop])
    parts = all_gather(sent[0], group)
    found = []
    for part in _parts(layout, parts, tensors):
        owners = [layout.owner(i) for i in range(layout.count)]
        whole = [part[r, index, :, : chunk.size] for (r, index), chunk in zip(owners, layout.chunks)]
        found.append(torch.cat(whole, 1).transpose(1, 2))
    return found


def reduce_scatter(layout: Layout, tensors: Sequence[Tensor], rank: int, group: Group) -> list[Tensor]:
    """The sum over ranks of whole sequences, of which each rank gets its tokens: the backward of `gather`."""
    sent, padded = _padded(layout, tensors, layout.ranks)
    for x, part in zip(tensors, padded):
        for i, chunk in enumerate(layout.chunks):
            r, index = layout.owner(i)
            part[r, index, :, : chunk.size] = _token_major(x[:, :, chunk.start : chunk.stop])
    received = sent.new_empty((1, sent.shape[1]))
    with together("reduce-scatter", group):
        _reduce_scatter(received.view(-1), sent.view(-1), group=group)
    held = layout.held(rank)
    return [
        torch.cat([part[0, index, :, : chunk.size] for index, chunk in enumerate(held)], 1).transpose(1, 2)
        for part in _parts(layout, received, tensors)
    ]


def _padded(layout: Layout, tensors: Sequence[Tensor], ranks: int) -> tuple[Tensor, list[Tensor]]:
    """Room for the chunks of so many ranks, each as long as the longest of all: as one message per rank
    `[ranks, numbers]`, and of each tensor `[ranks, chunks per rank, B, longest, H, D]`."""
    even = all(chunk.size == layout.longest for chunk in layout.chunks)
    count = sum(_part_size(layout, x) for x in tensors)
    flat = (tensors[0].new_empty if even else tensors[0].new_zeros)((ranks, count))
    return flat, _parts(layout, flat, tensors)


def _parts(layout: Layout, flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([_part_size(layout, x) for x in tensors], 1)
    shapes = [(flat.shape[0], layout.per_rank, x.shape[0], layout.longest, x.shape[1], x.shape[3]) for x in tensors]
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def _part_size(layout: Layout, x: Tensor) -> int:
    return layout.per_rank * layout.longest * x.shape[0] * x.shape[1] * x.shape[3]


class Transfer:
    """Messages in flight: started by the constructor, complete after `wait`."""

    def __init__(self, sent: Tensor | None, target: int, received: Tensor | None, source: int, group: Group) -> None:
        self.sent, self.received = sent, received  # alive until the messages are complete
        ops = []
        if sent is not None and sent.numel():
            ops.append(dist.P2POp(dist.isend, sent, group=group, group_peer=target))
        if received is not None and received.numel():
            ops.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
        self.group = group
        with together("an exchange of messages", group):
            self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor | None:
        """On a GPU the current stream waits, the host does not."""
        with together("an exchange of messages", self.group):
            for work in self.works:
                work.wait()
        return self.received


def connect(device: torch.device, group: Group) -> None:
    """A first collective of all ranks, without which NCCL would not let only some of them exchange messages."""
    with together("the first contact", group):
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def visit(plan: Plan, k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Keys and values of each rank in turn, those that this one needs, beginning with its own.

    The next ones are in flight while the caller computes with the last.
    """
    pending = None
    for step, following in pairwise([*plan.steps, None]):
        assert step is not None
        if pending is None:
            keys, values = _selected(k, step.receive), _selected(v, step.receive)
        else:
            received = pending.wait()
            assert received is not None
            keys, values = _keys_and_values(received, step.receive, k, v)
        pending = None
        if following is not None:
            sent = packed([_token_major(_selected(x, following.send)) for x in (k, v)], k.dtype)
            room = _room(k, v, following.receive)
            pending = Transfer(sent, following.target, room, following.source, group)
        yield step, keys, values


class Returns:
    """Sends gradients of keys and values back to the ranks that hold them, which sum them in `dk` and `dv`."""

    def __init__(self, dk: Tensor, dv: Tensor, like: Tensor, group: Group) -> None:
        self.dk, self.dv, self.group, self.dtype = dk, dv, group, like.dtype
        self.pending: tuple[Step, Transfer] | None = None

    def send(self, step: Step, dk: Tensor, dv: Tensor) -> None:
        """dk, dv: of what was received in this step."""
        self.finish()
        sent = packed([_token_major(x) for x in (dk, dv)], self.dtype)
        room = _room(self.dk, self.dv, step.send, self.dtype)
        self.pending = step, Transfer(sent, step.source, room, step.target, self.group)

    def keep(self, step: Step, dk: Tensor, dv: Tensor) -> None:
        """Of the rank's own keys and values."""
        self._add(step.receive, dk, dv)

    def finish(self) -> None:
        if self.pending is not None:
            step, transfer = self.pending
            received = transfer.wait()
            assert received is not None
            self._add(step.send, *_keys_and_values(received, step.send, self.dk, self.dv))
            self.pending = None

    def _add(self, spans: Sequence[Span], dk: Tensor, dv: Tensor) -> None:
        start = 0
        for span in spans:
            stop = start + span.size
            self.dk[:, :, span.start : span.stop] += dk[:, :, start:stop]
            self.dv[:, :, span.start : span.stop] += dv[:, :, start:stop]
            start = stop


def all_to_all(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], group: Group
) -> list[list[Tensor]]:
    """Sends the tensors `parts[r]` to rank r; what comes back from rank r has `shapes[r]`. One dtype."""
    sizes = [sum(numel(shape) for shape in row) for row in shapes]
    like = parts[0][0]
    received = like.new_empty(sum(sizes))
    sent = packed([x for row in parts for x in row], like.dtype)
    with together("all-to-all", group):
        dist.all_to_all_single(received, sent, sizes, [sum(x.numel() for x in row) for row in parts], group=group)
    return [unpacked(x, row) for x, row in zip(received.split(sizes), shapes)]


def packed(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All of them, each in the order of its dims, as one message; copied once, whatever their strides."""
    flat = tensors[0].new_empty(sum(x.numel() for x in tensors), dtype=dtype)
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
        part.view(x.shape).copy_(x)
    return flat


def unpacked(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [x.view(shape) for x, shape in zip(flat.split([numel(shape) for shape in shapes]), shapes)]


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _selected(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The spans of `[B, H, tokens, D]` end to end."""
    if len(spans) == 1:
        return x[:, :, spans[0].start : spans[0].stop]
    if not spans:
        return x[:, :, :0]
    return torch.cat([x[:, :, a:b].transpose(1, 2) for a, b in spans], 1).transpose(1, 2)


def _room(k: Tensor, v: Tensor, spans: Sequence[Span], dtype: torch.dtype | None = None) -> Tensor:
    tokens = sum(span.size for span in spans)
    return k.new_empty(k.shape[0] * tokens * (k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]), dtype=dtype)


def _keys_and_values(x: Tensor, spans: Sequence[Span], k: Tensor, v: Tensor) -> list[Tensor]:
    tokens = sum(span.size for span in spans)
    shapes = [(y.shape[0], tokens, y.shape[1], y.shape[3]) for y in (k, v)]
    return [part.transpose(1, 2) for part in unpacked(x, shapes)]
