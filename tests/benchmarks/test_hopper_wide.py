"""What the benchmark of the Hopper forward for wide heads compares with; the measurement needs an H100."""

import naive
import pytest
import torch

from benchmarks import hopper_wide
from fastattn.backends.triton.hopper_wide import launch
from fastattn.call import Problem

SMALL = ["full", "window", "lengths", "everything", "one head a group", "decode, 64 heads", "MLA, values apart"]


@pytest.mark.parametrize("name", SMALL)
def test_its_truth(name, monkeypatch):
    monkeypatch.setattr(hopper_wide, "DEVICE", "cpu")
    (_, heads, kv_heads, *sizes), what = hopper_wide.CASES[name]
    call = hopper_wide.call_of((2, heads, kv_heads, *[min(x, 90) for x in sizes[:2]], *sizes[2:]), what)
    lengths = {x: getattr(call, x) for x in ("q_lengths", "kv_lengths") if getattr(call, x) is not None}
    q, k, v = (x.double().nan_to_num() for x in (call.q, call.k, call.v))
    expected = naive.attention(
        q, k, v, window=(call.left, call.right), sinks=call.sinks, softcap=call.softcap or None, **lengths
    )
    out, lse = hopper_wide.reference(call)
    seen = ~expected.lse.isinf()
    assert torch.equal(~lse.isinf(), seen)
    assert hopper_wide.relative(out.double(), expected.out) < 1e-5
    assert hopper_wide.relative(lse.double()[seen], expected.lse[seen]) < 1e-5
    assert hopper_wide.relative(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")


def test_operations_and_calls(monkeypatch):
    """All calls are the kernel's."""
    monkeypatch.setattr(hopper_wide, "DEVICE", "cpu")
    assert hopper_wide.operations((1, 1, 1, 3, 4, 300, 0), {}) == 2 * 12 * 812
    assert hopper_wide.operations((2, 8, 1, 4, 4, 512, 512), {"right": 0}) == 2 * 2 * 8 * 10 * 1024
    for sizes, what in hopper_wide.CASES.values():
        problem = Problem.of(hopper_wide.call_of((1, *sizes[1:3], 2, 2, *sizes[5:]), what))
        why = [x for x in launch.reasons(problem) if "compute capability" not in x]
        assert not why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert hopper_wide.main([]) == 2
    assert "needs a GPU of compute capability 9.0" in capsys.readouterr().err
