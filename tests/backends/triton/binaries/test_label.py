"""What names a binary on disk: everything that could make it invalid, and nothing that differs from call to call."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_compiler import Flags as Other

from fastattn.backends.triton.binaries import label as module
from fastattn.backends.triton.binaries.label import label
from fastattn.backends.triton.binaries.triton_kernel import TritonFlags
from fastattn.backends.triton.hopper.binary import ALIGNED, BAND, Flags
from fastattn.backends.triton.hopper_backward.binary import Flags as BackwardFlags

FLAGS = Flags("bf16", (128, 128), ALIGNED)
CHANGES: dict[str, Any] = {
    "dtype": "fp16", "dims": (64, 64), "mask": BAND, "q_lengths": True, "kv_lengths": True, "sinks": "fp32",
    "softcap": True, "lse": True, "short": True, "keys": True,
    "tiles": "bf16", "listed": True,
}  # fmt: skip
BACKWARD = BackwardFlags("bf16", 128, ALIGNED)
BACKWARD_CHANGES: dict[str, Any] = {
    "dtype": "fp16", "dim": 64, "mask": BAND, "softcap": True, "split": True, "biased": True,
    "ordered": True,
}  # fmt: skip
TRITON = TritonFlags("fastattn.a:b", (9, 0), ("i32",), (), (), ())
TRITON_CHANGES: dict[str, Any] = {
    "kernel": "fastattn.a:c", "capability": (8, 0), "types": ("i64",), "aligned": (0,), "constants": ((0, None),),
    "options": (("num_warps", 4),),
}  # fmt: skip


def forget() -> None:
    module._environment.cache_clear()
    module._source.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, whose files may be changed."""
    for name in ("backends/triton", "_compat", "parallel"):
        shutil.copytree(module._ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "flags, changes",
    [(FLAGS, CHANGES), (BACKWARD, BACKWARD_CHANGES), (TRITON, TRITON_CHANGES)],
    ids=["hopper", "hopper backward", "triton"],
)
def test_every_field_is_in_the_name(flags: Any, changes: dict[str, Any]) -> None:
    assert changes.keys() == {field.name for field in dataclasses.fields(flags)}
    labels = {label(flags), *(label(dataclasses.replace(flags, **{name: x})) for name, x in changes.items())}
    assert len(labels) == 1 + len(changes)
    assert label(dataclasses.replace(flags)) == label(flags)


def test_classes_are_told_apart() -> None:
    assert label(Other()) != label(Other("good", 1))
    assert b"stand_in_compiler" in label(Other()) and b"hopper.binary" in label(FLAGS)


@pytest.mark.parametrize(
    "name",
    ["backends/triton/hopper/forward.py", "backends/triton/hopper_backward/consumer.py",
     "backends/triton/hopper/tiles.py", "backends/triton/masking.py",
     "backends/triton/decode/kernel.py", "_compat/gluon.py"],
)  # fmt: skip
def test_another_source_is_another_binary(tree: Path, name: str) -> None:
    before = label(FLAGS)
    path = tree / name
    path.write_text(path.read_text() + "\n")
    forget()
    assert label(FLAGS) != before


def test_a_kernel_elsewhere_counts_too(tree: Path) -> None:
    flags = dataclasses.replace(TRITON, kernel="fastattn.parallel.merge_kernel:merge")
    before, other = label(flags), label(FLAGS)
    path = tree / "parallel" / "merge_kernel.py"
    path.write_text(path.read_text() + "\n")
    forget()
    assert label(flags) != before and label(FLAGS) == other


def test_another_machine_is_another_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [label(FLAGS)]
    for holder, name, value in (
        (module, "FORMAT", 99),
        (module, "__version__", "9.9"),
        (module, "compiler", lambda: SimpleNamespace(identity="another")),
        (module.torch_internals, "driver_version", lambda: 12345),
    ):
        monkeypatch.setattr(holder, name, value)
        forget()
        found.append(label(FLAGS))
    assert len(set(found)) == len(found)
