"""The machine code that Triton makes of the Hopper forward: no GPU is needed to see what would be slow, or wrong.

Triton and the assembler in its wheel change from release to release; what they did wrong at some time is looked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import hopper_code
import pytest
from hopper_code import NAMES

from fastattn.backends.triton.hopper.binary import FULL, INTERVALS, SEGMENTS
from fastattn.backends.triton.hopper.launch import arguments

_SHARED = 227 << 10  #: bytes that a block of SM 9.0 may have
#: Registers that a kernel may spill outside of its inner loops. Without a mask P is carried in float32: see `pack`.
#: Bounds of rows take registers too: with Triton 3.6 up to 29 are spilled, with 3.9 more, and a few in the loops, most
#: of them in blocks that are masked.
_SPILLED, _SPILLED_UNMASKED, _SPILLED_BOUNDS = 16, 80, 130
#: With Segments what a tile needs once: up to 11 with Triton 3.6, 63 with 3.9, which reads two again in a loop.
_SPILLED_SEGMENTS, _IN_A_LOOP_OF_SEGMENTS = 76, 2
#: A mask with rows and lists: what a tile needs once waits outside of the loops.
_SPILLED_LISTED = 60
_IN_A_LOOP, _IN_A_WIDE_LOOP, _IN_A_LOOP_WITH_BOUNDS, _IN_A_LOOP_WITH_KEYS = 0, 3, 14, 18
_IN_A_LISTED_LOOP = 5  #: reads of what was spilled; nothing is spilled in it but in one of wide heads

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")
    return hopper_code.codes("hopper_code", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name: str, codes: dict[str, Any]) -> None:
    code, flags = codes[name], NAMES[name]
    dim, value_dim = flags.dims
    keys, wide = flags.blocks.keys, value_dim == 256
    # 168 registers a thread at the start are 3 groups of 128 threads; then 2 x 240 + 24 of them, which fit as well.
    assert (code["registers"], code["raised"], code["lowered"]) == (168, 240, 24)
    assert code["shared"] <= _SHARED
    assert code["arguments"] == len(arguments(flags, (0,) * 15).make()[0])
    if not wide:
        spilled = {FULL: _SPILLED_UNMASKED, INTERVALS: _SPILLED_BOUNDS, SEGMENTS: _SPILLED_SEGMENTS}
        most = _SPILLED if flags.tiles else spilled.get(flags.mask, _SPILLED)
        assert code["stores"] <= (_SPILLED_LISTED if flags.listed else most)
    # Two consumers; each has the loop over blocks twice, with a tile after it and without.
    assert len(code["loops"]) == 4
    for loop in code["loops"]:
        assert loop["products"] == dim // 16 + keys // 16
        assert loop["waits"] == 2, "the assembler has put the products one after the other"
        spilled_here = _IN_A_WIDE_LOOP if wide else _IN_A_LOOP
        if flags.mask == INTERVALS:
            spilled_here = _IN_A_LOOP_WITH_KEYS if flags.keys else _IN_A_LOOP_WITH_BOUNDS
        if flags.mask == SEGMENTS and not wide:
            spilled_here = _IN_A_LOOP_OF_SEGMENTS
            assert loop["stores"] == 0
        if flags.listed:
            spilled_here = _IN_A_LISTED_LOOP + wide
            assert loop["stores"] <= wide
        assert loop["stores"] + loop["loads"] <= spilled_here
        assert (loop["turns"], loop["passed"]) == ((1, 1) if flags.blocks.turns else (0, 0))
        share = 0.8 if flags.listed else 0.9
        assert loop["beside"] >= share * loop["exponentials"] > 0, "the softmax does not run beside a product"
