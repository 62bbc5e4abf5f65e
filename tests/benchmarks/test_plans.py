"""Dynamic plans against static ones: the command, lengths never seen before, first calls of a process."""

import json
import random
import subprocess
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import pretend

from benchmarks import first_call, fresh_lengths, plans
from fastattn.bench import runner
from fastattn.bench.case import Case
from fastattn.bench.runner import Runner

CPU = torch.device("cpu")


def a_runner():
    return Runner(CPU, quick=True, seed=0, say=lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The sections of the command's file."""
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    assert plans.main(["--quick", "--device", "cpu", "--seed", "3", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == "sweep plans"
    assert found["command"] == f"python -m benchmarks.plans --quick --device cpu --seed 3 --json {path}"
    return found["sections"]


def test_plans_rows(made):
    sections = made
    assert list(sections) == ["causal forward", "causal backward", "host", "fresh lengths", "first call"]
    for section in ("causal forward", "causal backward"):
        for row in sections[section]:
            ours = row["implementations"]
            assert set(ours) == {"fastattn-dynamic", "fastattn-static"}
            assert row["ratios"]["dynamic/static"] == ours["fastattn-dynamic"]["us"] / ours["fastattn-static"]["us"]
            eager = [ours[name]["eager"]["us"] for name in ("fastattn-dynamic", "fastattn-static")]
            assert row["ratios"]["dynamic/static eager"] == eager[0] / eager[1]
    assert all(e["method"] == "host" for row in sections["host"] for e in row["implementations"].values())
    found = {row["label"]: row["figures"] for row in sections["fresh lengths"]}
    assert list(found) == ["forward and backward", "left-padded batches", "packed batches", "chunks over a cache"]
    *trained, chunked = found.values()
    common = {"lengths", "warm_builds", "warm_disk_loads", "builds", "disk_loads", "checked", "largest_error"}
    common |= {"forward_median_ms", "forward_worst_ms"}
    assert set(chunked) == common
    for figures in trained:
        assert set(figures) == common | {"backward_median_ms", "backward_worst_ms", "largest_gradient_error"}
        assert figures["forward_median_ms"] <= figures["forward_worst_ms"]
        assert figures["checked"] > 0
    assert len(sections["first call"]) == 3
    for row in sections["first call"]:
        steps = "forward", "forward and backward", "forward, again", "forward and backward, again"
        assert set(row["figures"]) == {f"{step} ms" for step in steps}


def test_a_wrong_fresh_length_keeps_its_figures():
    good = fresh_lengths.with_errors({"x": 1.0}, [(), (1e-3, 2e-3), (2e-3, 1e-3)])
    assert good == {"figures": {"x": 1.0, "checked": 2, "largest_error": 2e-3, "largest_gradient_error": 2e-3}}
    bad = fresh_lengths.with_errors({"x": 1.0}, [(1e-3,), (float("nan"),), (2e-3,)])
    assert bad["figures"] == {"x": 1.0, "checked": 3, "largest_error": None}
    assert "relative error nan" in bad["error"]
    assert "relative error nan" in runner.summary({"label": "r", **bad})


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that computes nothing, and a runner that takes it for one: (what was asked of the GPU, the runner)."""
    gpu, bench = pretend(monkeypatch), a_runner()
    monkeypatch.setattr(bench, "pick", lambda full, quick, tiny: quick)
    monkeypatch.setattr(fresh_lengths, "CHECKED", 0)
    return gpu, bench


def test_packed_batches_find_all_that_they_need(pretended):
    gpu, bench = pretended
    fresh_lengths.warm_up_packed(bench, 8192, 60)
    plans = set(gpu.plans)
    figures = fresh_lengths._packed(bench, random.Random(1))["figures"]
    assert (figures["builds"], figures["checked"]) == (0, 0)
    packed = {key for key in plans if key.total}
    # Sequences to 16, 32 and 64, tokens to 1024, 2048, 4096 and 8192, and K/V heads folded into the offsets.
    assert {key.operand("q").dims[0] for key in packed} == {2 * 16, 2 * 32, 2 * 64}
    assert {key.total for key in packed} == {1024 + 1, 2048 + 1, 4096 + 1, 8192 + 1}
    assert gpu.plans == plans


def test_chunks_find_all_that_they_need(pretended, monkeypatch):
    gpu, bench = pretended
    pairs = [(1, 5000), (2, 3), (4, 900), (6, 7), (8, 8192), (9, 20), (16, 3000), (17, 18), (300, 301), (4000, 7000)]
    monkeypatch.setattr(fresh_lengths, "chunk_lengths", lambda *given: pairs)
    fresh_lengths.warm_up(bench, ("chunked", "decode"), "cache", 1, 8192)
    plans, kernels = set(gpu.plans), set(gpu.kernels)
    assert {kernel[5].block_m for kernel in kernels} == {16, 32, 64, 128}
    assert fresh_lengths._chunks(bench, random.Random(1))["figures"]["builds"] == 0
    assert (gpu.plans, gpu.kernels) == (plans, kernels)


def test_the_batches_are_what_they_say(monkeypatch):
    bench = a_runner()
    monkeypatch.setattr(bench, "pick", lambda full, quick, tiny: full)
    longest, *padded = fresh_lengths.padded_batches(bench, random.Random(1))
    packed = fresh_lengths.packed_batches(512, 8192, 60, 50, random.Random(1))
    assert longest.kv_len == 2048 and len(padded) == len(packed) == 50
    for case in padded:
        assert case.batch == len(case.padding) == 4 and 64 <= case.q_len == case.kv_len <= 2048
        assert all(0 <= n < case.q_len for n in case.padding)
    for case in packed:
        assert case.batch == 1 and 512 <= case.q_len == sum(case.packed) <= 8192
        assert 2 <= len(case.packed) <= 60 and min(case.packed) > 0
    counts = [len(case.packed) for case in packed]
    assert max(counts) > 32 >= min(counts)
    first, *fresh = fresh_lengths.lengths(bench, random.Random(1))
    assert first.kv_len == 8192 and len({case.kv_len for case in fresh}) == 200


def test_first_call_times_every_step():
    found = first_call.main("fastattn", "cpu", Case(12, 12, 1, 4, 2, 16))
    assert len(found) == 4
    assert all(ms > 0 for ms in found.values())


def test_a_child_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no GPU for you\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: failed)
    with pytest.raises(RuntimeError, match="no GPU for you"):
        plans.first_call(a_runner(), "fastattn", "off")
