"""What is cached per shape: `stats()` counts all of it, `clear_plans()` drops all of it, and it is bounded."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, make
from cases import run as run_case

import fastattn
from fastattn.backends import scratch
from fastattn.dispatch import fast_path
from fastattn.shape_cache import Reason, Section, Size, shape_cache

#: What modules keep that no shape of a call has a part in, so that it neither grows with them nor need be forgotten.
KEPT_BY_OTHER_THINGS = {
    # by device
    "fastattn.call._capability",
    "fastattn.backends.triton.limits.sm_count",
    "fastattn.backends.triton.limits.shared_memory", "fastattn.lm.generation.decode_step._side_stream",
    "fastattn.backends.cudnn.disk._environment", "fastattn.backends.cudnn.runtime._handles",
    "fastattn.bench.peers.flashinfer_memory",
    # by the machine, or by what is installed on it
    "fastattn.dispatch.registry.backend", "fastattn.backends.triton.launcher.missing_on_a_gpu",
    "fastattn.backends.triton.launcher.has_triton", "fastattn.backends.cudnn.runtime.frontend",
    "fastattn.bench.peers.compiled_flex",
    "fastattn.integrations.transformers.kv_cache._check_offsets",
    "fastattn._compat.liger.operations", "fastattn._compat.torch.driver_version",
    "fastattn._compat.triton_compiler.compiler", "fastattn.backends.triton.binaries.label._environment",
    "fastattn._compat.triton.launches_as_known", "fastattn.backends.triton.cuda_driver._driver",
    # by the class of a model or a module
    "fastattn._compat.transformers._cache_argument",
    # by the features that a kernel is compiled for
    "fastattn.backends.triton.binaries.label._source",
    # by the config, dropped with it
    "fastattn.integrations.transformers.mask._asking",
    # by what calls, in words: counters and warnings
    "fastattn.dispatch.serve._calls", "fastattn.dispatch.serve._backwards", "fastattn.dispatch.handed_over._handed",
    "fastattn.common.notice._given",
    # what a benchmark forces, while it does
    "fastattn.backends.triton.hopper_backward.schedule._forced",
    # by the lists of backends that programs name: a few
    "fastattn.dispatch.native.calls._names",
    # what os.environ wraps, and names of variables
    "fastattn.config._plain", "fastattn.config._encoded",
    # lists of live objects
    "fastattn.shape_cache._functions", "fastattn.common.forks._wishes",
    "fastattn.backends.scratch._threads",
    "fastattn.backends.cudnn.worker._workers", "fastattn.backends.triton.binaries.compilers._pools",
    # processes and streams that are at work
    "fastattn.dispatch.native.library._running", "fastattn.cli.terminal._were_closed",
}  # fmt: skip
_CALLS = {
    "torch": Case(dtype=torch.float32, mask="causal", q_len=9, kv_len=9),
    "reference": Case(dtype=torch.float32, mask="causal", q_len=9, kv_len=9, softcap=3.0),
    "decode": Case(dtype=torch.float32, q_len=2, kv_len=300, kv_lengths=(300, 3)),
}


def modules() -> Iterator[ModuleType]:
    """All of fastattn's that can be imported here."""
    for info in pkgutil.walk_packages(fastattn.__path__, "fastattn."):
        if not info.name.endswith("__main__"):
            try:
                yield importlib.import_module(info.name)
            except ImportError:
                continue


def _memories() -> Iterator[tuple[str, Any]]:
    """Every dict, set, list and remembered function at the top of a module that may grow."""
    for module in modules():
        for name, x in vars(module).items():
            if name.startswith("__"):
                continue
            if isinstance(x, functools._lru_cache_wrapper):
                yield f"{x.__module__}.{name}", x
            elif isinstance(x, (Section, OrderedDict)) or (hasattr(x, "__len__") and name.islower() and _may_grow(x)):
                yield f"{module.__name__}.{name}", x


def memories() -> dict[str, int]:
    """How many entries each of them has."""
    wrapper = functools._lru_cache_wrapper
    return {name: x.cache_info().currsize if isinstance(x, wrapper) else len(x) for name, x in _memories()}


def _may_grow(x: Any) -> bool:
    return isinstance(x, (dict, set, list)) or type(x).__module__ in ("weakref", "_weakrefset")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    if "triton" in sys.modules or importlib.util.find_spec("triton"):  # type: ignore[attr-defined]
        monkeypatch.setenv("FASTATTN_INTERPRET", "0" if torch.cuda.is_available() else "1")
    for name, case in _CALLS.items():
        for length in (3, 4):
            inputs = make(case.but(q_len=min(length, case.q_len)), seed=seed)
            if name != "decode" or fastattn.explain(inputs.q, inputs.k, inputs.v, backend="decode").chosen:
                for _ in range(2):
                    run_case(inputs, name, poison=False)


def test_nothing_per_shape_is_left_that_clear_plans_does_not_know(calls: None) -> None:
    """A new memory is found here: it is a section of `shape_cache`, or its name says above what it depends on."""
    before = memories()
    assert before["fastattn.dispatch.routes._routes"] and before["fastattn.dispatch.fast_path._cached"]
    fastattn.clear_plans()
    after = memories()
    left = {name: count for name, count in after.items() if count and name not in KEPT_BY_OTHER_THINGS}
    assert not left


def test_every_memory_is_known_before_anything_is_in_it() -> None:
    """Whatever other tests of this process left, or did not."""
    holders = list(shape_cache._holders.values())
    known = {id(x) for x in holders} | {id(getattr(x, "_function", None)) for x in holders}
    found = memories()
    owned = {name for name, x in _memories() if id(x) in known}
    unknown = sorted(set(found) - owned - KEPT_BY_OTHER_THINGS)
    assert owned and not unknown
    assert not KEPT_BY_OTHER_THINGS - set(found), "names that are no more"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("interpreted", [True, False])
def test_no_test_is_served_by_what_another_found_out(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, in this order and in one process: see pytest_runtest_call in tests/conftest.py."""
    pytest.importorskip("triton")
    if interpreted:
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
        shape_cache.clear()  # of this call, if a test without it was here before
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    before = fastattn.stats()["calls"].get("decode", 0)
    fastattn.scaled_dot_product_attention(q, k, v)
    assert fastattn.stats()["calls"].get("decode", 0) - before == interpreted


def test_stats_show_what_clear_plans_forgets(calls: None) -> None:
    before = fastattn.stats()["cache"]
    sections = before["sections"]
    for name in ("calls", "routes", "refusals", "launches", "layouts", "scales", "offsets", "scratch", "plans"):
        assert set(sections[name]) == {"entries", "bytes", "max_entries", "max_bytes"}, name
    for name in ("calls", "routes"):
        assert sections[name]["max_entries"] >= sections[name]["entries"] > 0, name
    assert before["entries"] == sum(size["entries"] for size in sections.values())
    fastattn.clear_plans()
    after = fastattn.stats()["cache"]
    assert after["sections"].keys() >= sections.keys()
    assert after["entries"] == after["bytes"] == 0
    assert after["drops"]["cleared"] == before["drops"]["cleared"] + 1


def test_calls_after_it_are_right(calls: None, seed: int) -> None:
    inputs = make(_CALLS["torch"], seed=seed)
    want = run_case(inputs, "torch", poison=False)["out"]
    for _ in range(3):
        fastattn.clear_plans()
        assert torch.equal(run_case(inputs, "torch", poison=False)["out"], want)
        assert len(fast_path._cached) == 1


def test_it_may_be_called_while_others_call(seed: int) -> None:
    inputs = [make(_CALLS["torch"].but(q_len=n), seed=seed) for n in (2, 3, 4)]
    wants = [run_case(x, "torch", poison=False)["out"] for x in inputs]
    stop, wrong = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            try:
                for x, want in zip(inputs, wants, strict=True):
                    if not torch.equal(run_case(x, "torch", poison=False)["out"], want):
                        wrong.append("another result")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        fastattn.clear_plans()
        fastattn.stats()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_memory_is_bounded() -> None:
    for module in modules():
        for name, x in vars(module).items():
            if isinstance(x, Section):
                assert 0 < x.max_entries <= 1 << 14, name
                assert x in list(shape_cache._holders.values()), f"{module.__name__}.{name}: nobody owns it"
            if isinstance(x, functools._lru_cache_wrapper) and f"{x.__module__}.{name}" not in KEPT_BY_OTHER_THINGS:
                assert x.cache_info().maxsize, name


def test_a_section_is_bounded_in_entries_and_bytes() -> None:
    kept: Section[int, str] = Section("text", 100, len, 10)
    for i, text in enumerate(["aaaa", "bbbb"]):
        kept[i] = text
    assert kept.size() == Size(2, 8, 100, 10)
    kept[2] = "cccc"
    assert dict(kept) == {2: "cccc"} and kept.size() == Size(1, 4, 100, 10)
    kept.clear()
    assert kept.size() == Size(0, 0, 100, 10)
    few: Section[int, int] = Section("few", 3)
    for i in range(3):
        few[i] = i
    assert len(few) == 3
    few[3] = 3
    assert dict(few) == {3: 3}


def test_a_section_is_counted_while_it_lives() -> None:
    mine = [shape_cache.section("mine", 10), shape_cache.section("mine", 10)]
    mine[0][1] = mine[1][1] = mine[1][2] = 3
    assert shape_cache.stats()["sections"]["mine"] == Size(3, 0, 20)
    mine.pop()
    assert shape_cache.stats()["sections"]["mine"] == Size(1, 0, 10)
    mine.clear()
    assert "mine" not in shape_cache.stats()["sections"]


def test_a_reason_drops_what_depends_on_it() -> None:
    routed = shape_cache.section("routed", 10, dropped_for=[Reason.BACKEND_REFUSED])
    other = shape_cache.section("other", 10)
    routed[1] = other[1] = 1
    before = shape_cache.stats()["drops"]
    shape_cache.invalidate(Reason.BACKEND_REFUSED)
    assert (len(routed), len(other)) == (0, 1)
    assert shape_cache.stats()["drops"] == before | {"backend refused": before["backend refused"] + 1}
    routed[1] = 1
    shape_cache.clear()
    assert (len(routed), len(other)) == (0, 0)


def test_a_refused_call_drops_its_route_and_its_offsets() -> None:
    sections = {section.name: section for section in list(shape_cache._holders.values())}
    for name in ("calls", "routes", "offsets"):
        assert Reason.BACKEND_REFUSED in sections[name].dropped_for, name
    for name in ("refusals", "plans", "launches", "scratch"):
        assert Reason.BACKEND_REFUSED not in sections[name].dropped_for, name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    """A thread of the parent may hold the lock as it forks; in the child nobody would release it."""
    with shape_cache._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            shape_cache.clear()
            shape_cache.stats()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_holder_may_be_registered_while_others_are_counted() -> None:
    """Modules are imported, and with them their sections made, when a call first needs them: in any thread."""
    stop, wrong = threading.Event(), []

    def count() -> None:
        while not stop.is_set():
            try:
                shape_cache.stats()
                shape_cache.invalidate(Reason.BACKEND_REFUSED)
            except RuntimeError as error:
                wrong.append(str(error))
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        kept = [shape_cache.section("kept", 10) for _ in range(30)]  # so that counting takes its time
        for _ in range(300):
            kept[-20:] = [shape_cache.section("kept", 10) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_the_scratch_memory_of_all_threads_is_counted_and_forgotten() -> None:
    go_on, there = threading.Event(), threading.Event()

    def other() -> None:
        scratch._local.pieces[0] = 7, torch.empty(100, dtype=torch.uint8)
        there.set()
        go_on.wait(10)

    before = shape_cache.stats()["sections"]["scratch"]
    thread = threading.Thread(target=other)
    thread.start()
    assert there.wait(10)
    scratch._local.pieces[5] = 7, torch.empty(11, dtype=torch.uint8)
    after = shape_cache.stats()["sections"]["scratch"]
    assert (after["entries"] - before["entries"], after["bytes"] - before["bytes"]) == (2, 111)
    fastattn.clear_plans()
    assert shape_cache.stats()["sections"]["scratch"] == Size()
    go_on.set()
    thread.join()


@pytest.mark.gpu
def test_what_is_kept_on_a_gpu_is_counted_and_given_back(seed: int) -> None:
    """Offsets and scratch memory, to the byte that torch's allocator counts in blocks of 512."""
    fastattn.clear_plans()
    inputs = [
        make(Case(dtype=torch.bfloat16, mask="causal", q_len=n, kv_len=n, head_dim=64, return_lse=True), "cuda", seed)
        for n in range(100, 140)
    ]
    before = torch.cuda.memory_allocated()
    for x in inputs:
        for backend in ("cudnn", "decode"):
            if fastattn.explain(x.q, x.k, x.v, mask="causal", backend=backend).chosen:
                fastattn.scaled_dot_product_attention(x.q, x.k, x.v, mask="causal", backend=backend)
    torch.cuda.synchronize()
    kept = fastattn.stats()["cache"]["sections"]
    assert kept["offsets"]["entries"] > 0
    held = torch.cuda.memory_allocated() - before
    counted = sum(sums["bytes"] for sums in kept.values())
    assert counted <= held <= 1.5 * counted + (1 << 21), (held, kept)
    fastattn.clear_plans()
    assert torch.cuda.memory_allocated() - before < 1 << 21
