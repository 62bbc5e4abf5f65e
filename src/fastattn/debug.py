"""FASTATTN_DEBUG=1: checks that read the data, for which the host waits for the GPU. Read once, at import."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .call import Call, as_token_major
from .config import is_on
from .masks import visibility

ENABLED = is_on("FASTATTN_DEBUG", False)


def check_call(call: Call) -> None:
    """Raises ValueError, naming the argument, for lengths, segments or intervals out of the tensors' range, and for NaN
    or infinity in keys and values that a tensor mask hides.

    Without FASTATTN_DEBUG the host does not read any of that: values out of range are clamped on the device, and what
    is hidden is multiplied by 0.
    """
    for name, lengths, total in (
        ("q_lengths", call.q_lengths, call.q.shape[2]),
        ("kv_lengths", call.kv_lengths, call.k.shape[2]),
    ):
        if lengths is not None and lengths.numel():
            least, most = (int(x) for x in lengths.aminmax())
            if least < 0 or most > total:
                raise ValueError(f"{name}: expected lengths in 0..{total}, got {least}..{most}")
    if call.mask is not None:
        check_hidden(call)
    if call.segments is not None and call.segments.numel():
        check_segments(call.segments, call.q.shape[0], call.q.shape[2], call.k.shape[2])
    if call.lo is not None and call.hi is not None and call.lo.numel():
        least, most = int(call.lo.min()), int(call.hi.max())
        if least < 0 or most > call.k.shape[2]:
            raise ValueError(f"mask: expected intervals within 0..{call.k.shape[2]}, got {least}..{most}")


def check_hidden(call: Call) -> None:
    """Raises ValueError where a key that the mask tensor hides from a query, or its value, is not finite."""
    seen, bounded = visibility(call), visibility(call._replace(mask=None))
    assert seen is not None
    hidden = ~seen if bounded is None else ~seen & bounded
    shape = (*call.q.shape[:3], call.k.shape[2])
    hidden = hidden.expand(shape).any(2).unflatten(1, (call.k.shape[1], -1)).any(2)  # of any query
    for name, x in (("k", call.k), ("v", call.v)):
        if bool((hidden & ~x.isfinite().all(3)).any()):
            raise ValueError(
                f"{name}: expected finite numbers in the keys that mask hides (what lengths, Intervals and Segments "
                "exclude may hold anything), got NaN or infinity"
            )


def check_segments(table: Tensor, batch: int, q_len: int, kv_len: int) -> None:
    """Raises ValueError for a table of segments that is not as `masks.Segments` describes."""
    names = ["q_start", "q_stop", "kv_start", "kv_stop"] if table.shape[0] >= 4 else ["start", "stop"]
    rows = table.long().tolist()
    if len(rows) == len(names):
        rows.insert(0, [0] * len(rows[0]))
    columns = dict(zip(["row", *names], rows, strict=True))
    for name, column in columns.items():
        most = batch - 1 if name == "row" else kv_len if name.startswith("kv") else q_len
        if min(column) < 0 or max(column) > most:
            raise ValueError(f"mask.table: expected {name} in 0..{most}, got {min(column)}..{max(column)}")
    segments = list(zip(columns["row"], columns[names[0]], columns[names[1]], strict=True))
    for (row, first, stop), (next_row, next_first, _) in pairwise(segments):
        if (next_row, next_first) < (row, first) or (next_row == row and next_first < stop):
            raise ValueError(
                f"mask.table: expected segments sorted by row and start, without overlap, got [{first}, {stop}) of row "
                f"{row} before one of row {next_row} from {next_first}"
            )


def check_result(call: Call, backend: str, out: Tensor, lse: Tensor | None) -> None:
    """Raises AssertionError for a wrong shape, dtype or layout, and for a result not finite though the inputs are."""
    expected = (*call.q.shape[:3], call.v.shape[3])
    assert tuple(out.shape) == expected, f"{backend}: expected shape {expected}, got {tuple(out.shape)}"
    assert out.dtype == call.q.dtype, f"{backend}: expected {call.q.dtype}, got {out.dtype}"
    assert as_token_major(out, out.dtype) is out, f"{backend}: the output is not token-major: strides {out.stride()}"
    inputs = [x for x in (call.q, call.k, call.v) if x.numel()]
    if all(bool(torch.isfinite(x).all()) for x in inputs):
        assert bool(torch.isfinite(out).all()), f"{backend}: finite inputs gave a result that is not finite"
        if lse is not None and call.return_lse:
            assert not bool(lse.isnan().any()), f"{backend}: finite inputs gave a NaN log-sum-exp"
