"""Triton's launches, the cuDNN frontend's executions, liger-kernel's operations: as known, or not used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastattn._compat import cudnn, liger, triton


def test_this_triton_launches_as_known() -> None:
    pytest.importorskip("triton")
    assert triton.launches_as_known()


def test_another_triton_launches_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")

    class Changed:
        def run(self, kernel: Any, *arguments: Any) -> None:
            kernel.run(*arguments)

    monkeypatch.setattr(jit, "JITFunction", Changed)
    assert not triton.launches_as_known.__wrapped__()
    monkeypatch.setattr(jit, "JITFunction", SimpleNamespace())
    assert not triton.launches_as_known.__wrapped__()


def graph(**changes: Any) -> Any:
    lowered = SimpleNamespace(_execute_with_raw_ptrs=lambda *arguments: arguments)
    parts = {
        "_variant_pack_uids": lambda: [3, 1],
        "_materialize_backend_plan": lambda index: SimpleNamespace(cpp_index=index + 10),
        "_plan_index": 2,
        "_plans": [None],
        "_lowered_graph": lowered,
    }
    return SimpleNamespace(**{name: part for name, part in (parts | changes).items() if part is not None})


def test_the_frontend_is_executed_from_addresses() -> None:
    raw = cudnn.raw_execution(graph())
    assert raw is not None and raw.uids == (3, 1)
    assert raw(100, 200, SimpleNamespace(backend_handle=7)) is None
    assert raw.call(100, 2, 200, 7, raw.plan) == (100, 2, 200, 7, 12)
    from_disk = cudnn.raw_execution(graph(_plans=[]))
    assert from_disk is not None and from_disk.plan == -1


@pytest.mark.parametrize(
    "changes",
    [
        {"_variant_pack_uids": None},
        {"_variant_pack_uids": lambda: ["q"]},
        {"_plan_index": None},
        {"_materialize_backend_plan": lambda index: SimpleNamespace(cpp_index=None)},
        {"_lowered_graph": SimpleNamespace()},
    ],
)
def test_another_frontend_executes_by_itself(changes: dict[str, Any]) -> None:
    assert cudnn.raw_execution(graph(**changes)) is None


def test_an_operation_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("liger_kernel.ops")
    assert liger.operations() is ops
    monkeypatch.delattr(ops, "LigerRopeFunction")
    with pytest.raises(ImportError, match=r"^fused_ops: .* here: liger-kernel \S+ has no liger_kernel\.ops\.LigerRope"):
        liger.operations.__wrapped__()
    monkeypatch.setattr(liger, "installed", lambda: False)
    with pytest.raises(ImportError, match="liger-kernel is not installed"):
        liger.operations.__wrapped__()
