"""The kernel of ragged offsets against offsets and lengths counted on the host: through Triton's interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

pytest.importorskip("triton")

from fastattn.backends.cudnn.graphs import KEY_SIDE, RAGGED
from fastattn.backends.cudnn.ragged_offsets import ragged_offsets
from fastattn.call import Call, token_major

HEADS, KV_HEADS, DIM = 4, 2, 8
ROWS = 17


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    return "cuda" if torch.cuda.is_available() else "cpu"


def counted(
    table: list[list[int]], tensors: dict[str, Tensor], fold: int, batch: int, totals: tuple[int, int]
) -> dict[str, list[int]]:
    """Offsets by role and lengths, of columns (batch entry, first query, end, first key, end)."""
    found: dict[str, list[int]] = {role: [] for role in (*tensors, "seq_q", "seq_kv")}
    for b, q_first, q_end, first, end in table:
        b, q_first, q_end = min(max(b, 0), batch - 1), *(min(max(x, 0), totals[0]) for x in (q_first, q_end))
        first, end = (min(max(x, 0), totals[1]) for x in (first, end))
        for head in range(fold):
            keys = max(end - first, 0)
            found["seq_q"].append(max(q_end - q_first, 0) if keys else 0)
            found["seq_kv"].append(keys)
            for role, x in tensors.items():
                part = head // (fold // KV_HEADS) if role in KEY_SIDE else head * (HEADS // fold)
                start = first if role in KEY_SIDE else q_first
                found[role].append(b * x.stride(0) + part * x.stride(1) + start * x.stride(2))
    return found


@pytest.mark.parametrize("fold", [KV_HEADS, HEADS])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, "windows"])
def test_segments(rows: int | str, fold: int, native: str, seed: int) -> None:
    """Tables with and without batch entries, with the keys apart and not, of any strides."""
    rng = random.Random(seed)
    batch, q_len = 3, 20
    kv_len = 26 if rows in (4, 5) else q_len
    q = token_major(torch.empty(0, device=native), batch, HEADS, q_len, DIM)
    k = token_major(q, batch, KV_HEADS, kv_len, DIM)
    tensors = {"q": q, "k": k, "v": k, "o": q}
    assert set(tensors) <= set(RAGGED)
    for _ in range(4):
        count = rng.randint(1, 4)
        given: list[list[int]] = [
            sorted(rng.randint(-2, most + 2) for _ in range(count + 1)) for most in (q_len, kv_len)
        ]
        if rows == "windows":
            step = rng.choice((1, 2))
            cuts = torch.tensor(given[0], dtype=torch.int32, device=native).repeat_interleave(step)
            table = cuts.as_strided((2, count), (step, step))
        else:
            assert isinstance(rows, int)
            lines = [given[0][:-1], given[0][1:]]
            if rows >= 4:
                lines += [given[1][:-1], given[1][1:]]
            if rows % 2:
                lines.insert(0, sorted(rng.randint(0, batch - 1) for _ in range(count)))
            table = torch.tensor(lines, dtype=torch.int32, device=native)
            if rng.random() < 0.5:
                table = table.mT.contiguous().mT
        lines = table.tolist()
        entries = lines.pop(0) if len(lines) % 2 else [0] * count
        columns = [list(x) for x in zip(entries, *lines[:2], *lines[-2:], strict=True)]
        got = ragged_offsets(tensors, ROWS, fold, Call(q, k, k, segments=table))
        live = count * fold
        for name, expected in counted(columns, tensors, fold, batch, (q_len, kv_len)).items():
            x = got[name if name.startswith("seq") else f"ragged_{name}"].flatten()
            assert x[:live].tolist() == expected, name
            if name.startswith("seq"):
                assert x.shape == (ROWS,) and not x[live:].any()
            else:
                assert x.shape == (ROWS + 1,) and bool((x[live:] < tensors[name].untyped_storage().nbytes() // 4).all())
