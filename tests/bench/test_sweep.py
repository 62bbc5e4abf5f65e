"""The sweeps end to end on the CPU; the timing of a GPU on a simulated one."""

import argparse
import io
import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import pretend

import fastattn
from fastattn.bench import calls, first_call, inputs, rows, sweep, sweep_decode, sweep_fresh, sweep_plans, timing
from fastattn.bench.calls import IMPLEMENTATIONS, Case
from fastattn.bench.rows import Sweep
from fastattn.bench.timing import Contender, Timing

CPU = torch.device("cpu")


def command(*argv):
    parser = argparse.ArgumentParser()
    sweep.add_command(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["sweep", *argv])
    arguments.argv = ["sweep", *argv]
    return arguments.run(arguments)


def a_sweep(device=CPU):
    return Sweep(device, quick=True, seed=0, say=lambda line: None)


def inputs_of(case, count=1):
    return calls.make_inputs(case, CPU, torch.Generator().manual_seed(1), count)


# --- the command


SECTIONS = {
    "plans": ["causal forward", "causal backward", "host", "fresh lengths", "first call"],
    "decode": ["one query", "few queries", "head dims", "heads", "window and sinks", "ragged"],
    "backward": ["forward", "backward"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (what was written, where, what was printed), each sweep run once."""

    @cache
    def make(name):
        path, printed = tmp_path_factory.mktemp("sweep") / f"{name}.json", io.StringIO()
        with redirect_stdout(printed):
            assert command(name, "--quick", "--device", "cpu", "--seed", "3", "--json", str(path)) == 0
        return json.loads(path.read_text()), path, printed.getvalue()

    return make


@pytest.mark.parametrize("name", sweep.NAMES)
def test_a_sweep_writes_all_that_it_promises(name, made):
    found, path, out = made(name)
    keys = ("benchmark", "date", "command", "environment", "arguments", "method", "left_out", "seconds", "stats")
    assert set(found) == {*keys, "sections"}
    assert found["benchmark"] == f"sweep {name}"
    assert found["command"] == f"fastattn sweep {name} --quick --device cpu --seed 3 --json {path}"
    assert found["arguments"] == {"name": name, "quick": True, "device": "cpu", "seed": 3, "dtype": "bfloat16"}
    assert found["method"]
    assert {"torch-cudnn", "torch-flash"} <= set(found["left_out"])
    assert list(found["sections"]) == SECTIONS[name]
    for section, listed in found["sections"].items():
        assert listed
        for row in listed:
            assert "error" not in row
            assert f"{section}: {row['label']}: " in out  # progress, row by row
            assert "implementations" in row or row["figures"]
            for entry in row.get("implementations", {}).values():
                assert 0 < entry["min_us"] <= entry["us"] <= entry["max_us"]
                assert entry["method"] in ("wall", "host")
                assert 0 < entry["relative_error"] < calls.GRADIENT_LIMIT
    assert f"Wrote {path}" in out


def test_plans_rows(made):
    sections = made("plans")[0]["sections"]
    for section in ("causal forward", "causal backward"):
        for row in sections[section]:
            ours = row["implementations"]
            assert set(ours) == {"fastattn-any", "fastattn-exact"}
            assert row["ratios"]["any/exact"] == ours["fastattn-any"]["us"] / ours["fastattn-exact"]["us"]
            eager = [ours[name]["eager"]["us"] for name in ("fastattn-any", "fastattn-exact")]
            assert row["ratios"]["any/exact eager"] == eager[0] / eager[1]
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


def test_decode_rows(made):
    sections = made("decode")[0]["sections"]
    for row in (row for section in sections.values() for row in section):
        us, read = row["implementations"]["fastattn"]["us"], row["read"]
        assert read["us"] == read["copy"]["us"] / 2
        assert row["ratios"]["/ read"] == us / read["us"]
        assert row["figures"]["TB/s"] == row["implementations"]["fastattn"]["tb_s"] == read["bytes"] / us / 1e6
    (gpt_oss,) = sections["window and sinks"]
    assert gpt_oss["best_peer"] == "torch-math"
    math = gpt_oss["implementations"]["torch-math"]
    assert gpt_oss["ratios"]["/ best torch"] == gpt_oss["implementations"]["fastattn"]["us"] / math["us"]
    ragged, equal = sections["ragged"]
    case = ragged["case"]
    assert ragged["read"]["bytes"] == sum(case["lengths"]) * 2 * case["kv_heads"] * case["dim"] * 2
    assert abs(ragged["read"]["bytes"] / equal["read"]["bytes"] - 1) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="sweep: expected an NVIDIA GPU"):
        command("backward")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--device", "tpu"), "device: expected cpu, cuda"),
        (("--device", "cpu", "--seed", "-1"), "--seed: expected 0 or more"),
        (("--device", "cpu", "--json", "no/such/directory/x.json"), "there is no directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(argv, message, monkeypatch):
    monkeypatch.setattr(rows.Sweep, "add", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        command("decode", *argv)


def test_help_needs_no_torch():
    code = "import sys, fastattn.bench.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- rows


def test_a_failure_becomes_an_entry(monkeypatch):
    def refuse(case, x):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    def late(case, x):
        made = []

        def call():
            made.append(1)
            if len(made) > 1:
                raise RuntimeError("late")
            return calls._bind_fastattn(case, x)()

        return call

    def wrong(case, x):
        return lambda: calls._bind_fastattn(case, x)() * 1.02

    mine = IMPLEMENTATIONS["fastattn-any"]
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-cudnn", replace(mine, name="torch-cudnn", binder=refuse))
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-math", replace(mine, name="torch-math", binder=late))
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-flash", replace(mine, name="torch-flash", binder=wrong))
    bench = a_sweep()
    names = ("fastattn", "torch-cudnn", "torch-math", "torch-flash")
    bench.add("s", "r", lambda: bench.compare(Case(9, 9), names))
    (row,) = bench.sections["s"]
    entries = row["implementations"]
    assert entries["torch-cudnn"]["error"] == "RuntimeError: No available kernel. Aborting execution."
    assert entries["torch-math"]["error"] == "RuntimeError: late"
    assert "wrong result: relative error 2.0" in entries["torch-flash"]["error"]
    assert entries["fastattn"]["us"] > 0
    assert rows.best_peer(row) is None
    assert not any("us" in entries[name] for name in names[1:])
    assert "torch-cudnn failed (RuntimeError: No available" in rows.summary(row)
    assert sweep.section_table(bench.sections["s"]).splitlines()[-1].split()[2:] == ["-", "-", "-"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_a_wrong_result(value, monkeypatch):
    def nothing(case, x):
        return lambda: torch.full_like(x.q, value)

    monkeypatch.setitem(IMPLEMENTATIONS, "fastattn", replace(IMPLEMENTATIONS["fastattn"], binder=nothing))
    monkeypatch.setattr(rows, "stats", _counting(fastattn.stats))
    bench = a_sweep()
    bench.add("s", "r", lambda: bench.compare(Case(9, 9), ("fastattn",)))
    entry = bench.sections["s"][0]["implementations"]["fastattn"]
    assert entry["relative_error"] is None
    assert f"relative error {value}" in entry["error"]
    assert bench.failed
    json.dumps(bench.sections, allow_nan=False)


def _counting(stats):
    """stats() as if each look at it had seen one more call served."""
    looks = []

    def look():
        looks.append(1)
        return {**stats(), "calls": {"torch": len(looks)}}

    return look


def test_a_row_that_raises_costs_that_row_only():
    bench = a_sweep()
    bench.add("s", "bad", lambda: 1 // 0)
    bench.add("s", "good", lambda: {"figures": {"x": 1.0}})
    bad, good = bench.sections["s"]
    assert bad == {"label": "bad", "error": "ZeroDivisionError: integer division or modulo by zero"}
    assert good == {"label": "good", "figures": {"x": 1.0}}
    assert bench.failed
    assert sweep.section_table([bad, good]).splitlines()[2:] == ["bad   -", "good  1"]


def test_calls_too_large_for_the_reference_are_not_checked(monkeypatch):
    monkeypatch.setattr(calls, "MOST_FLOPS", Case(9, 9).flops())
    assert a_sweep().compare(Case(9, 9), ("fastattn",))["check"] == "reference"
    row = a_sweep().compare(Case(9, 9), ("fastattn",), kind="backward")
    assert row["check"] == "skipped: the reference would take 4.6e+06 operations"
    assert row["implementations"]["fastattn"]["us"] > 0
    assert "relative_error" not in row["implementations"]["fastattn"]


def test_ratios():
    row = {"implementations": {"fastattn": {"us": 3.0}, "torch-a": {"us": 2.0}, "torch-b": {"error": "x"}}}
    assert rows.best_peer(row) == ("torch-a", 2.0)
    assert rows.quotient(rows.time_of(row, "fastattn"), rows.time_of(row, "torch-a")) == 1.5
    assert rows.time_of(row, "torch-b") is rows.time_of(row, "torch-c") is None
    assert rows.quotient(None, 2.0) is rows.quotient(2.0, None) is rows.quotient(2.0, 0.0) is None
    assert rows.spread([1.0, 9.0, 2.0]) == {"median_ms": 2.0, "worst_ms": 9.0}


def test_settling_asks_for_the_exact_plan(monkeypatch):
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    seen = []
    rows._come_back(lambda: seen.append(os.environ["FASTATTN_PLANS"]))
    assert seen == ["exact"]
    assert "FASTATTN_PLANS" not in os.environ


def test_a_wrong_fresh_length_keeps_its_figures():
    good = sweep_fresh._with_errors({"x": 1.0}, [(), (1e-3, 2e-3), (2e-3, 1e-3)])
    assert good == {"figures": {"x": 1.0, "checked": 2, "largest_error": 2e-3, "largest_gradient_error": 2e-3}}
    bad = sweep_fresh._with_errors({"x": 1.0}, [(1e-3,), (float("nan"),), (2e-3,)])
    assert bad["figures"] == {"x": 1.0, "checked": 3, "largest_error": None}
    assert "relative error nan" in bad["error"]
    assert "relative error nan" in rows.summary({"label": "r", **bad})


# --- fresh lengths


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that computes nothing, and a sweep that takes it for one: (what was asked of the GPU, the sweep)."""
    gpu, bench = pretend(monkeypatch), a_sweep()
    monkeypatch.setattr(bench, "pick", lambda full, quick, tiny: quick)
    monkeypatch.setattr(sweep_fresh, "CHECKED", 0)
    return gpu, bench


def test_packed_batches_find_all_that_they_need(pretended):
    gpu, bench = pretended
    sweep_fresh._warm_up_packed(bench, 8192, 60)
    plans = set(gpu.plans)
    figures = sweep_fresh._packed_batches(bench, random.Random(1))["figures"]
    assert (figures["builds"], figures["checked"]) == (0, 0)
    packed = {key for key in plans if key.total}
    # Sequences to 16, 32 and 64, tokens to 1024, 2048, 4096 and 8192, and K/V heads folded into the places.
    assert {key.operand("q").dims[0] for key in packed} == {2 * 16, 2 * 32, 2 * 64}
    assert {key.total for key in packed} == {1024 + 1, 2048 + 1, 4096 + 1, 8192 + 1}
    assert gpu.plans == plans


def test_chunks_find_all_that_they_need(pretended, monkeypatch):
    gpu, bench = pretended
    pairs = [(1, 5000), (2, 3), (4, 900), (6, 7), (8, 8192), (9, 20), (16, 3000), (17, 18), (300, 301), (4000, 7000)]
    monkeypatch.setattr(sweep_fresh, "_pairs", lambda *given: pairs)
    sweep_fresh._warm_up(bench, ("chunked", "decode"), "cache", 1, 8192)
    plans, kernels = set(gpu.plans), set(gpu.kernels)
    assert {kernel[5].block_m for kernel in kernels} == {16, 32, 64}
    assert sweep_fresh._chunks(bench, random.Random(1))["figures"]["builds"] == 0
    assert (gpu.plans, gpu.kernels) == (plans, kernels)


def test_the_batches_are_what_they_say(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep_fresh, "_steps", lambda sweep, rng, fresh, warm_up: seen.append(fresh))
    bench = a_sweep()
    monkeypatch.setattr(bench, "pick", lambda full, quick, tiny: full)
    sweep_fresh._padded_batches(bench, random.Random(1))
    sweep_fresh._packed_batches(bench, random.Random(1))
    padded, packed = seen
    assert len(padded) == len(packed) == 50
    for batch in padded:
        assert batch.size == 4 and 64 <= batch.length <= 2048 and batch.mask.causal
        row, first, end = batch.mask.table
        assert row.tolist() == [0, 1, 2, 3]
        assert bool((first >= 0).all() and (first < end).all() and (end == batch.length).all())
    for batch in packed:
        assert batch.size == 1 and 512 <= batch.length <= 8192 and batch.mask.causal
        _, first, end = batch.mask.table
        assert 2 <= len(first) <= 60 and bool((first < end).all())
        assert torch.equal(first[1:], end[:-1]) and (int(first[0]), int(end[-1])) == (0, batch.length)
    assert max(batch.mask.table.shape[1] for batch in packed) > 32 >= min(batch.mask.table.shape[1] for batch in packed)


# --- calls


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 9, batch=2),
        Case(4, 12, head_major=True),
        Case(1, 12, head_major=True),
        Case(1, 20, batch=3, head_major=True, lengths=(20, 1, 7)),
        Case(9, 9, q_heads=4, kv_heads=4),
    ],
    ids=Case.label,
)
def test_torch_is_asked_for_the_same_as_fastattn(case):
    """The masks, is_causal and enable_gqa that torch gets, on torch's CPU kernels."""
    (x,) = inputs_of(case)
    out = calls._bind_torch(case, x)()
    assert calls.relative_error((out,), calls.truth(case, x, backward=False)) < calls.OUTPUT_LIMIT
    ours = IMPLEMENTATIONS["fastattn"].bind(case, calls.poisoned(case, x))()
    assert calls.relative_error((ours,), calls.truth(case, x, backward=False)) < calls.OUTPUT_LIMIT


def test_lower_right_is_torchs_own_kind_of_mask():
    case = Case(4, 12, q_heads=4, kv_heads=4, head_major=True)
    (x,) = inputs_of(case)
    call = calls._bind_torch(case, x, lower_right=True)
    assert isinstance(call.keywords["attn_mask"], torch.nn.attention.bias.CausalBias)
    assert calls.relative_error((call(),), calls.truth(case, x, backward=False)) < calls.OUTPUT_LIMIT


def test_torch_with_a_window_and_sinks():
    case = Case(1, 40, 2, 8, 2, 64, head_major=True, left=12, sinks=True)
    (x,) = inputs_of(case)
    expected = calls.truth(case, x, backward=False)
    assert calls.relative_error((IMPLEMENTATIONS["torch-math"].bind(case, x)(),), expected) < calls.OUTPUT_LIMIT
    with pytest.raises(ValueError, match="neither sinks nor windows"):
        IMPLEMENTATIONS["torch-cudnn"].bind(case, x)


def test_flash_with_sinks_by_its_log_sum_exp(monkeypatch):
    """The arithmetic, with the one operator that a CPU lacks made of others."""
    case = Case(1, 40, 2, 8, 2, 64, head_major=True, left=12, sinks=True)
    (x,) = inputs_of(case)

    def flash(q, k, v):
        out, lse = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True, backend="reference")
        return out, lse, None, None, 1, 13, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    out = IMPLEMENTATIONS["torch-flash"].bind(case, x)()
    assert calls.relative_error((out,), calls.truth(case, x, backward=False)) < calls.OUTPUT_LIMIT


def test_truth_of_the_gradients():
    case = Case(6, 6, q_heads=4, kv_heads=2, dim=16)
    (x,) = inputs_of(case)
    q, k, v = (t.float().requires_grad_() for t in (x.q, x.k, x.v))
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    expected = out, *torch.autograd.grad(out, (q, k, v), x.grad_out.float())
    assert calls.relative_error(calls.truth(case, x, backward=True), expected) < 1e-5


def test_relative_error():
    one = torch.ones(4)
    assert calls.relative_error((one * 1.5, one), (one, one)) == 0.5
    bad = calls.relative_error((one, one * torch.nan), (one, one))
    assert bad != bad
    for error in (bad, 1e-2, float("inf")):
        with pytest.raises(ValueError, match="wrong result"):
            calls.check_error(error, 1e-2)


def test_inputs_are_normal_and_k_v_one_piece_of_memory():
    for head_major in (False, True):
        case = Case(5, 200, 2, 8, 2, 64, head_major=head_major)
        first, second = inputs_of(case, 2)
        assert first.k.shape == (2, 2, 200, 64)
        assert (first.k.stride(1) > first.k.stride(2)) == head_major
        assert first.q.transpose(1, 2).is_contiguous()
        assert not torch.equal(first.k, second.k)
        assert first.memory.data_ptr() == first.k.data_ptr()
        assert first.memory.numel() * 2 == case.kv_bytes
        assert abs(first.k.float().std() - 1) < 0.05
        assert not torch.equal(first.k, first.v)


def test_enough_input_sets_to_overflow_the_cache_and_not_the_memory():
    l2 = 50 << 20
    small = Case(1, 512, head_major=True)
    assert (
        (calls.set_count(small, l2) - 1) * (small.kv_bytes + 8192)
        < 4 * l2
        <= calls.set_count(small, l2) * (small.kv_bytes + 8192)
    )
    assert calls.set_count(Case(1, 131072, head_major=True), l2) == 1
    window = Case(1, 8192, 8, 64, 8, 64, head_major=True, left=127, sinks=True)
    assert window.kv_bytes == 2 * 8 * 128 * 8 * 64 * 2
    assert calls.set_count(window, l2) == inputs.MOST_BYTES // (2 * 8 * 8 * 8192 * 64 * 2 + 2 * 8 * 64 * 64 * 2)
    assert calls.set_count(small, 0) == 1


def test_ragged_and_equal_batches_hold_about_the_same():
    ragged, equal = sweep_decode.ragged((32, 8192), 0)
    assert len(ragged.lengths) == 32
    assert 128 <= min(ragged.lengths) < max(ragged.lengths) <= 8192
    assert abs(ragged.kv_bytes / equal.kv_bytes - 1) < 1e-3


@pytest.mark.parametrize("change", [{"lengths": (3,)}, {"lengths": (3, 4), "q_len": 2}])
def test_lengths_are_for_one_query_and_each_entry(change):
    with pytest.raises(ValueError, match="lengths"):
        Case(**{"q_len": 1, "kv_len": 8, "batch": 2, **change})


def test_switches_are_set_while_called_and_only_then(monkeypatch):
    monkeypatch.setenv("FASTATTN_PLANS", "before")
    with IMPLEMENTATIONS["fastattn-exact"].active():
        assert os.environ["FASTATTN_PLANS"] == "exact"
        assert torch.is_inference_mode_enabled()
    assert os.environ["FASTATTN_PLANS"] == "before"
    monkeypatch.delenv("FASTATTN_PLANS")
    with IMPLEMENTATIONS["fastattn-any"].active(gradients=True):
        assert os.environ["FASTATTN_PLANS"] == "any"
        assert not torch.is_inference_mode_enabled()
    assert "FASTATTN_PLANS" not in os.environ
    with IMPLEMENTATIONS["torch-flash"].active():
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_first_call_times_every_step():
    found = first_call.main("fastattn", "cpu", 12, (4, 2, 16))
    assert len(found) == 4
    assert all(ms > 0 for ms in found.values())


def test_a_child_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no GPU for you\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **rest: failed)
    with pytest.raises(RuntimeError, match="no GPU for you"):
        sweep_plans._first_call(a_sweep(), "fastattn", "off")


# --- timing


class Gpu:
    """A GPU and its host in simulated microseconds, in place of torch.cuda."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0  # the host's clock; when the GPU has done all that is queued
        self.captured = None
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e6)
        for name, value in {
            "synchronize": self.synchronize, "_sleep": lambda cycles: self.launch(cycles / 1000, 0.0),
            "Event": lambda enable_timing: _Event(self), "CUDAGraph": lambda: _Graph(self), "graph": self.graph,
            "current_stream": lambda: "a stream",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, gpu_us, host_us):
        self.now += host_us
        if self.captured is not None:
            self.captured.append(gpu_us)
        else:
            self.free = max(self.free, self.now) + gpu_us

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert (stream, capture_error_mode) == ("a stream", "thread_local")
        self.captured = graph.kernels
        try:
            yield
        finally:
            self.captured = None


class _Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


class _Graph:
    def __init__(self, gpu):
        self.gpu = gpu
        self.kernels = []

    def replay(self):
        self.gpu.launch(sum(self.kernels), 5.0)


CUDA = torch.device("cuda", 0)


def test_a_graph_hides_what_the_host_costs(monkeypatch):
    gpu = Gpu(monkeypatch)
    slow = [lambda: gpu.launch(10.0, 400.0)] * 7
    found = timing.race([Contender("a", slow), Contender("b", [lambda: gpu.launch(20.0, 1.0)])], CUDA)
    assert found["a"] == Timing(pytest.approx(10.0), pytest.approx(10.0), pytest.approx(10.0), "graph")
    assert found["b"].us == pytest.approx(20.0)
    assert set(found["a"].as_dict()) == {"us", "min_us", "max_us", "method"}


def test_eager_calls_wait_behind_a_busy_gpu(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = timing.race([Contender("a", [lambda: gpu.launch(10.0, 400.0)] * 3)], CUDA, eager=True)
    assert found["a"] == Timing(pytest.approx(10.0), pytest.approx(10.0), pytest.approx(10.0), "queue")


def test_a_gpu_that_waited_for_the_host_is_told(monkeypatch):
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(timing, "BUSY", (1 << 10, 1 << 12))
    found = timing.race([Contender("a", [lambda: gpu.launch(10.0, 400.0)])], CUDA, eager=True)
    assert found["a"].us > 300.0
    assert found["a"].as_dict()["note"] == "the GPU waited for the host at times"


def test_what_cannot_be_captured_is_timed_in_the_queue(monkeypatch):
    gpu = Gpu(monkeypatch)

    def call():
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.launch(10.0, 30.0)

    found = timing.race([Contender("a", [call])], CUDA)["a"]
    assert (found.us, found.method) == (pytest.approx(10.0), "queue")
    assert found.note == "not captured in a graph: RuntimeError: operation not permitted when stream is capturing"


def test_rounds_go_in_turns_and_a_failure_leaves_the_race(monkeypatch):
    log = []

    class Lane:
        method, note = "fake", None

        def __init__(self, name):
            self.name, self.us = name, iter([100.0, 3.0, 1.0, 2.0])

        def sample(self):
            log.append(self.name)
            if self.name == "b" and log.count("b") == 3:
                raise RuntimeError("gone")
            return next(self.us)

    monkeypatch.setattr(timing, "_lane", lambda contender, device, eager: Lane(contender.name))
    found = timing.race([Contender("a", []), Contender("b", [])], CUDA, rounds=3)
    assert log == ["a", "b", "a", "b", "a", "b", "a"]
    assert found["a"] == Timing(2.0, 1.0, 3.0, "fake")  # the first round does not count
    assert str(found["b"]) == "gone"


def test_host_cost_is_the_best_batch_of_calls_that_nobody_waits_for(monkeypatch):
    gpu = Gpu(monkeypatch)
    costs = iter([50.0] * 100 + [9.0] * 100 + [8.0] * 100 + [12.0] * 100)
    bad = Contender("bad", [lambda: 1 // 0])
    found = timing.host_cost([bad, Contender("a", [lambda: gpu.launch(40.0, next(costs))])], CUDA, batches=3)
    assert found["a"] == Timing(pytest.approx(8.0), pytest.approx(8.0), pytest.approx(12.0), "host")
    assert isinstance(found["bad"], ZeroDivisionError)


@pytest.mark.parametrize(
    "sets, rough, count", [(1, 10.0, 300), (7, 10.0, 301), (3, 5000.0, 3), (511, 1.0, 2044), (1, 0.0, 2048)]
)
def test_calls_in_a_graph(sets, rough, count):
    assert timing.calls_in_graph(sets, rough) == count


def test_contexts_are_in_force_while_called():
    inside = []

    @contextmanager
    def context():
        inside.append(1)
        yield
        inside.pop()

    found = timing.race([Contender("a", [lambda: inside[0]], context), Contender("b", [int], nullcontext)], CPU)
    assert found["a"].method == found["b"].method == "wall"
    assert not inside


@pytest.mark.gpu
def test_every_implementation_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    bench = a_sweep(device)
    everyone = ("fastattn", "fastattn-any", "fastattn-exact", "torch-cudnn", "torch-flash")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for kind in ("inference", "training", "backward"):
            row = bench.compare(Case(300, 300, batch=2), everyone, kind=kind, eager=True)
            for entry in row["implementations"].values():
                assert (entry["method"], entry["eager"]["method"]) == ("graph", "queue"), entry
        bench.add("host", "r", lambda: bench.compare(Case(128, 128), everyone, host=True))
        ragged = Case(1, 512, 3, head_major=True, lengths=(512, 1, 100))
        window = Case(1, 512, 2, 64, 8, 64, head_major=True, left=127, sinks=True)
        for case in (Case(1, 512, head_major=True), Case(4, 512, head_major=True), ragged, window):
            peers = ("torch-flash", "torch-math") if case.sinks else sweep_decode.PEERS
            bench.add("decode", case.label(), lambda case=case, peers=peers: sweep_decode._measure(bench, case, peers))
    assert not bench.failed
    for row in bench.sections["decode"]:
        assert row["implementations"]["fastattn"]["method"] == "graph"
        assert row["best_peer"], row
        assert row["read"]["us"] > 0
