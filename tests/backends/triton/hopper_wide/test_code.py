"""The machine code that Triton makes of the Hopper forward for wide heads: see `hopper/test_code.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import hopper_code
import pytest
from hopper_wide_code import NAMES

from fastattn.backends.triton.hopper_wide.launch import arguments

_SHARED = 227 << 10  #: bytes that a block of SM 9.0 may have
#: Registers that a kernel may spill outside of its inner loops (with Triton 3.6 up to 2, with 3.9 up to 49), and in a
#: loop (3.6: none).
_SPILLED, _IN_A_LOOP = 60, 3

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")
    return hopper_code.codes("hopper_wide_code", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name: str, codes: dict[str, Any]) -> None:
    code, flags = codes[name], NAMES[name]
    # 168 registers a thread at the start are 3 groups of 128 threads; then 2 x 240 + 24 of them, which fit as well.
    assert (code["registers"], code["raised"], code["lowered"]) == (168, 240, 24)
    assert code["shared"] <= _SHARED
    assert code["arguments"] == len(arguments(flags, (0,) * 12).make()[0])
    assert code["stores"] <= _SPILLED
    # Two consumers; each has a loop over its blocks: the scores of one, and the values of two.
    assert len(code["loops"]) == 2
    for loop in code["loops"]:
        assert loop["products"] == (576 if flags.rest else 512) // 16 + 2 * 64 // 16
        # For the other's P V, for the scores, for the own P V; more of them: one product after the other.
        assert loop["waits"] == 3
        assert loop["stores"] + loop["loads"] <= _IN_A_LOOP
