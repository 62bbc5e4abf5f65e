"""What is kept per shape: `stats()` counts all of it, `clear_plans()` forgets all of it, and it is bounded."""

from __future__ import annotations

import functools
import importlib
import pkgutil
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
from fastattn import shape_cache as memo
from fastattn.backends import scratch
from fastattn.dispatch import routing as dispatch
from fastattn.shape_cache import Memo

#: What modules keep that no shape of a call has a part in, so that it neither grows with them nor need be forgotten.
KEPT_BY_OTHER_THINGS = {
    # by device
    "fastattn.call._capability",
    "fastattn.backends.triton.decode.launch_config.sm_count", "fastattn.lm.generation.decode_step._side_stream",
    "fastattn.backends.cudnn.disk._environment", "fastattn.backends.cudnn.runtime._handles",
    "fastattn.bench.peers._flashinfer_memory",
    # by the machine, or by what is installed on it
    "fastattn.dispatch.routing.backend", "fastattn.backends.triton.launcher.missing_on_a_gpu",
    "fastattn.backends.triton.launcher.has_triton", "fastattn.backends.cudnn.runtime.frontend",
    "fastattn.bench.peers._flex",
    "fastattn._compat.liger.operations", "fastattn._compat.torch.driver_version",
    "fastattn._compat.triton.launches_as_known", "fastattn.backends.triton.cuda_driver._driver",
    # by the class of a model or a module
    "fastattn._compat.transformers._cache_argument",
    # by the features that a kernel is compiled for
    "fastattn.backends.triton.hopper.launch.function", "fastattn.backends.triton.hopper.launch._processors",
    # by the config, dropped with it
    "fastattn.integrations.transformers.mask._asking",
    # by what calls, in words: counters and warnings
    "fastattn.dispatch.routing._calls", "fastattn.common.notice._given",
    # what os.environ wraps
    "fastattn.config._plain",
    # lists of live objects
    "fastattn.shape_cache._all", "fastattn.shape_cache._functions", "fastattn.common.forks._wishes",
    "fastattn.backends.scratch._threads",
    "fastattn.backends.cudnn.worker._workers",
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


def memories() -> dict[str, int]:
    """Entries of every dict, set, list and remembered function at the top of a module that may grow."""
    found = {}
    for module in modules():
        for name, x in vars(module).items():
            if name.startswith("__"):
                continue
            if isinstance(x, functools._lru_cache_wrapper):
                found[f"{x.__module__}.{name}"] = x.cache_info().currsize
            elif isinstance(x, (Memo, OrderedDict)) or (hasattr(x, "__len__") and name.islower() and _may_grow(x)):
                found[f"{module.__name__}.{name}"] = len(x)
    return found


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
    """A new memory is found here: it is one of `memo`'s, or its name says above what it depends on."""
    before = memories()
    assert before["fastattn.dispatch.routing._routes"] and before["fastattn.dispatch.routing.fast_path"]
    fastattn.clear_plans()
    after = memories()
    left = {name: count for name, count in after.items() if count and name not in KEPT_BY_OTHER_THINGS}
    assert not left
    assert not KEPT_BY_OTHER_THINGS - set(after), "names that are no more"


def test_stats_show_what_clear_plans_forgets(calls: None) -> None:
    kept = fastattn.stats()["kept"]
    for name in ("calls", "routes", "refusals", "launches", "layouts", "scales", "offsets", "scratch", "plans"):
        assert set(kept[name]) == {"entries", "bytes"}, name
    for name in ("calls", "routes"):
        assert kept[name]["entries"] > 0, name
    fastattn.clear_plans()
    assert fastattn.stats()["kept"].keys() >= kept.keys()
    assert not any(count for sums in fastattn.stats()["kept"].values() for count in sums.values())


def test_calls_after_it_are_right(calls: None, seed: int) -> None:
    inputs = make(_CALLS["torch"], seed=seed)
    want = run_case(inputs, "torch", poison=False)["out"]
    for _ in range(3):
        fastattn.clear_plans()
        assert torch.equal(run_case(inputs, "torch", poison=False)["out"], want)
        assert len(dispatch.fast_path) == 1


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
            if isinstance(x, Memo):
                assert 0 < x.limit <= 1 << 14, name
                assert x.name != "other", f"{module.__name__}.{name} says not what it keeps"
            if isinstance(x, functools._lru_cache_wrapper) and f"{x.__module__}.{name}" not in KEPT_BY_OTHER_THINGS:
                assert x.cache_info().maxsize, name


def test_a_memo_is_bounded_in_bytes() -> None:
    kept: Memo[int, str] = Memo(100, "text", len, 10)
    for i, text in enumerate(["aaaa", "bbbb"]):
        kept[i] = text
    assert kept.holds() == (2, 8)
    kept[2] = "cccc"
    assert dict(kept) == {2: "cccc"} and kept.holds() == (1, 4)
    kept.forget()
    assert kept.holds() == (0, 0)


def test_a_memo_is_counted_while_it_lives() -> None:
    mine: list[Memo[int, int]] = [Memo(10, "mine"), Memo(10, "mine")]
    mine[0][1] = mine[1][1] = mine[1][2] = 3
    assert memo.holdings()["mine"] == {"entries": 3, "bytes": 0}
    mine.pop()
    assert memo.holdings()["mine"] == {"entries": 1, "bytes": 0}
    mine.clear()
    assert "mine" not in memo.holdings()


def test_the_scratch_memory_of_all_threads_is_counted_and_forgotten() -> None:
    go_on, there = threading.Event(), threading.Event()

    def other() -> None:
        scratch._local.pieces[0] = 7, torch.empty(100, dtype=torch.uint8)
        there.set()
        go_on.wait(10)

    before = memo.holdings()["scratch"]
    thread = threading.Thread(target=other)
    thread.start()
    assert there.wait(10)
    scratch._local.pieces[5] = 7, torch.empty(11, dtype=torch.uint8)
    after = memo.holdings()["scratch"]
    assert (after["entries"] - before["entries"], after["bytes"] - before["bytes"]) == (2, 111)
    fastattn.clear_plans()
    assert memo.holdings()["scratch"] == {"entries": 0, "bytes": 0}
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
    kept = fastattn.stats()["kept"]
    assert kept["offsets"]["entries"] > 0
    held = torch.cuda.memory_allocated() - before
    counted = sum(sums["bytes"] for sums in kept.values())
    assert counted <= held <= 1.5 * counted + (1 << 21), (held, kept)
    fastattn.clear_plans()
    assert torch.cuda.memory_allocated() - before < 1 << 21
