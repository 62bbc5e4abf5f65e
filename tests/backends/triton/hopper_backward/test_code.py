"""The machine code that Triton makes of the Hopper backward: no GPU is needed to see what would be slow, or wrong."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import hopper_code
import pytest
from hopper_backward_code import NAMES

from fastattn.backends.triton.hopper_backward.launch import arguments

_SHARED = 227 << 10  #: bytes that a block of SM 9.0 may have
#: Spilled registers that a loop may touch at head dim 128: consumers have none to spare. Triton 3.6 needs 0 to 4 under
#: a causal mask, 3.9 up to 22. Smaller heads and full attention spill none.
#: With a fixed order of additions consumers have to know more. At head dim 256 full attention spills none, nor does
#: Triton 3.6; 3.9 loads one number a step under some masks.
_IN_A_LOOP = {"causal": 24, "band": 26, "intervals": 24, "everything": 24, "softcap": 46, "biased": 30}
_IN_A_LOOP |= {"ordered": 24, "ordered-causal-128-softcap": 50, "ordered-biased-128-everything": 60}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")
    return hopper_code.codes("hopper_backward_code", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name: str, codes: dict[str, Any]) -> None:
    code, flags = codes[name], NAMES[name]
    # 168 registers a thread at the start are 3 groups of 128 threads; then 2 x 240 + 24 of them, which fit as well.
    assert (code["registers"], code["raised"], code["lowered"]) == (168, 240, 24)
    assert code["shared"] <= _SHARED
    assert code["arguments"] == len(arguments(flags, (0,) * (15 if flags.biased else 13)).make()[0])
    allowed = 0
    if flags.dim == 256:
        allowed = 12 if flags.biased and flags.ordered else 2
    if flags.dim == 128:
        allowed = max((n for word, n in _IN_A_LOOP.items() if word in name), default=0)
    # Where a program's turn is waited for, the jump back to that wait looks like a loop without the consumers' barrier.
    loops = [loop for loop in code["loops"] if loop["turns"] or not flags.ordered]
    assert len(loops) in (2, 4)
    for loop in loops:
        # S, dP and dQ sum over all dims or keys, dV and dK over the tile's queries. (Of a loop that the compiler has
        # written twice, the second begins behind the first products.)
        wide = flags.dim == 256
        whole = 2 * flags.dim // 16 + 2 * 4 + (4 if wide else 8)
        assert loop["products"] in (whole, whole - flags.dim // 16)
        assert loop["waits"] == (4 if wide else 5), "the assembler has put the products one after the other"
        assert loop["turns"] == (2 if wide else 1)
        assert loop["stores"] + loop["loads"] <= allowed
