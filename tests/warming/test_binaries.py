"""`warmup` compiles the kernels that calls will need, side by side, before it makes any call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stand_in_backend import StandIn, stand_in_binaries
from stand_in_compiler import Flags, compiled, processes

import fastattn
from fastattn import warmup
from fastattn.backends.triton.binaries import compilers
from fastattn.backends.triton.binaries.store import Binaries
from fastattn.call import Problem

pytestmark = pytest.mark.usefixtures("fresh_caches", "fresh_warnings")

SMALL = {"q_heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": torch.float32, "device": "cpu", "max_length": 200}


class ByLength(StandIn):
    """Few keys take another binary than many; a window, one that cannot be compiled."""

    def flags_of(self, problem: Problem) -> Flags:
        if problem.left >= 0:
            return Flags("wrong")
        return Flags("slow 0.1", int(problem.kv_len > 100))

    def binaries(self, problem: Problem) -> list[Flags]:
        both = [Flags("slow 0.1", number) for number in (0, 1)]
        return [self.flags_of(problem), *([] if problem.left >= 0 else both)]


@pytest.fixture(autouse=True)
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Binaries]:
    found = stand_in_binaries(tmp_path, monkeypatch)
    ByLength(Flags()).installed(monkeypatch)
    yield found
    found.compilers.stop()


def attend(length: int, **options: object) -> None:
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
    fastattn.scaled_dot_product_attention(q, k, k, mask="causal", **options)  # type: ignore[arg-type]


def test_no_call_finds_its_kernel_missing_afterwards(
    binaries: Binaries, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "cores", lambda: 2)
    warmth = warmup(**SMALL, phases=("prefill", "decode"))
    assert warmth.compiled == 2 and warmth.kernels_loaded == 0 and not warmth.failed and warmth.complete
    assert len(processes(tmp_path / "log")) == 2, "side by side"
    assert {family.served_by for family in warmth.families} == {("decode",)}
    assert "2 kernels compiled, 0 read from disk." in str(warmth)
    assert "[1/2] compiling Flags(how='slow 0.1', number=" in capsys.readouterr().err
    before = fastattn.stats()
    for length in (1, 7, 99, 100, 101, 200):
        attend(length)
    after = fastattn.stats()
    assert after["binaries"] == before["binaries"] and len(compiled(tmp_path / "log")) == 2
    assert after["calls"]["decode"] - before["calls"]["decode"] == 6


def test_another_process_reads_them(binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmup(**SMALL, phases=("decode",), progress=False)
    other = stand_in_binaries(tmp_path, monkeypatch)
    fastattn.clear_plans()
    warmth = warmup(**SMALL, phases=("decode",), progress=False)
    assert (warmth.compiled, warmth.kernels_loaded) == (0, 2) and warmth.complete
    other.compilers.stop()


def test_what_cannot_be_compiled_is_reported(binaries: Binaries) -> None:
    with pytest.warns(fastattn.FastattnWarning, match="does not like it"):
        warmth = warmup(**SMALL, windows=((5, 0),), phases=("prefill",), progress=False)
    assert warmth.failed == ("Flags(how='wrong', number=0): ValueError: the compiler does not like it",)
    assert not warmth.complete
    assert "Not compiled: Flags(how='wrong', number=0): ValueError: the compiler does not like it." in str(warmth)
    assert {family.served_by for family in warmth.families} == {("torch",)}


def test_nothing_is_compiled_where_that_is_switched_off(
    binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    warmth = warmup(**SMALL, phases=("decode",), progress=False)
    assert not warmth.complete and all("FASTATTN_COMPILE=off" in text for text in warmth.failed)
    assert compiled(tmp_path / "log") == []
