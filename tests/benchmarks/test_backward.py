"""The backward calls on each kernel: which they are, which of them torch has, and how its operators are called."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import backward, backward_tune, row_commands, torchs_backward
from benchmarks.backward_calls import ROWS, Own
from benchmarks.row_commands import call_of
from fastattn import reference
from fastattn.bench.users import truth
from fastattn.call import Problem

CPU = torch.device("cpu")
NAMED = [row for row in ROWS if "/" not in row.name]
TORCHS = {
    *("BERT padding B32 384", "T5 bias B8 512", "Swin B1024 49", "ALiBi full 2048", "softcap off 2048"),
    *("causal B2 2048", "B16 512", "full 24x4608", "ViT B64 257", "fp32 2048", "256 2048"),
}


@pytest.mark.parametrize("row", [row for row in NAMED if not isinstance(row, Own)], ids=lambda row: row.name)
def test_a_row_is_the_call_that_users_make(row):
    row = row.reduced()
    (x,) = row.tensors(CPU)
    call = call_of(row, CPU)
    wide = call._replace(q=call.q.double(), k=call.k.double(), v=call.v.double())
    p = replace(Problem.of(call), dtype=torch.float64)
    got = reference.backward(p, wide, x.grad_out.double(), None)
    want = truth.truth(row, x)[1:]
    found = [got.q, got.k, got.v] + ([got.mask] if row.mask_gradient else [])
    for a, b in zip(found, want, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 8e-3


def test_calls_of_our_own():
    calls = {row.name: call_of(row.reduced(), CPU) for row in ROWS if isinstance(row, Own)}
    assert set(calls) == {"ALiBi keys 2048", "Intervals prefixes 2048", "Intervals window 8192"}
    keys = calls.pop("ALiBi keys 2048")
    assert keys.mask.shape[2] == 1 and keys.mask.dtype == torch.bfloat16 and (keys.left, keys.right) == (-1, 0)
    for call in calls.values():
        assert call.mask is None and bool((call.lo < call.hi).all())


def test_which_torch_has():
    assert {row.name for row in NAMED if torchs_backward._has(call_of(row.reduced(), CPU))} == TORCHS


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("row", [row for row in NAMED if row.name in TORCHS], ids=lambda row: row.name)
def test_torchs_operators_are_called_as_they_want(name, row):
    """On the meta device, which has their signatures and shapes alone."""
    call = call_of(row.reduced(), CPU)
    meta = call._replace(**{x: getattr(call, x).to("meta") for x in ("q", "k", "v")})
    if call.mask is not None:
        meta = meta._replace(mask=call.mask.to("meta"))
    if call.mask is not None and (name == "flash" or (name == "cudnn" and "m" in call.grads)):
        with pytest.raises(NotImplementedError, match="takes no such mask"):
            torchs_backward._bound(name, meta, torch.empty_like(meta.q))
        return
    forward, run = torchs_backward._bound(name, meta, torch.empty_like(meta.q))
    assert forward()[0].shape == meta.q.shape
    grads = run()
    if "m" in call.grads:
        assert grads.shape == call.mask.shape
    else:
        assert grads[0].shape == meta.q.shape and grads[1].shape[2:] == meta.k.shape[2:]


def test_rows_that_would_begin_late_are_left_out(capsys):
    assert list(row_commands.in_time(ROWS[:2], time.monotonic(), 60.0)) == ROWS[:2]
    assert list(row_commands.in_time(ROWS[:2], time.monotonic() - 61.0, 60.0)) == []
    assert capsys.readouterr().out.count("left out: no time") == 2


def test_the_quickest_comes_first_and_what_fails_is_said(monkeypatch, capsys):
    def fails():
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(row_commands, "captured", lambda call, warmups: call)
    monkeypatch.setattr(row_commands, "best", lambda call: call())
    runs = {"slow": lambda: lambda: 3.0, "none": fails, "quick": lambda: lambda: 1.0}
    assert list(row_commands.tuned(runs.items()).items()) == [("quick", 1.0), ("slow", 3.0)]
    assert "none: RuntimeError: out of shared memory" in capsys.readouterr().err


def test_a_row_in_lines(capsys):
    checks = {"ours": {"error": 2e-3}, "other": {"failed": "RuntimeError: no"}}
    row_commands.report("full", {"ours": {"cold": 100.4, "hot": 9.94}, "torch": {"cold": 5.0, "hot": 4.0}}, checks)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["full", "ours", "100/9.9", "(2e-03)", "torch", "5.0/4.0"]
    assert second.strip() == "{'other': 'RuntimeError: no'}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert backward.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_tiles_are_tried_of_each_kind_of_row(monkeypatch):
    """One row of each, and of each pass some tiles, what is listed among them. Nothing runs."""
    pytest.importorskip("triton")
    from fastattn.backends.triton.binaries import store

    assert set(backward_tune.ROWS) <= {row.name for row in ROWS}
    needed = []
    monkeypatch.setattr(store.shared, "make_all", lambda every, device: needed.extend(every) or [])
    monkeypatch.setattr(backward_tune, "tuned", lambda runs: {name: 7.0 + i for i, (name, _) in enumerate(runs)})
    nothing = torch.empty(0)
    kinds = set()
    for row in ROWS:
        if row.name in backward_tune.ROWS:
            for one in backward_tune.tune(call_of(row.reduced(), CPU), (nothing, nothing, nothing)).values():
                assert 2 <= len(one.times) <= 12 and one.listed in one.times
                kinds.add(one.kind)
    assert needed and {kind.partition(" ")[0] for kind in kinds} >= {"_HALF_MASKED[128]", "_HALF[64]", "_FLOAT[128]"}


def test_the_best_tile_is_beside_the_listed_one():
    found = backward_tune.Found("_HALF[64] keys", {"64 64 4 2": 100.0, "64 128 8 2": 150.0}, "64 128 8 2")
    assert found.line() == (
        "_HALF[64] keys: best (64 64 4 2) 100 us; listed (64 128 8 2) 150 us, 1.500; then 64 128 8 2 1.50"
    )
    assert "not timed" in backward_tune.Found("x", {"a": 1.0}, "b").line()
    assert backward_tune.Found("x", {}, "b").line() == "x: none ran"
