"""`fastattn.drop_in.scaled_dot_product_attention` against torch's math kernel in float64.

Each call goes twice: to torch's own function, as by default on a CPU, and through the op.
"""

from __future__ import annotations

import pytest
import torch
from torch_calls import (
    BF16,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    TORCHS,
    WAYS,
    TorchCall,
    check,
    check_gradients,
    default_backends,
    make,
    way,
)

from fastattn import drop_in

pytestmark = pytest.mark.usefixtures("default_backends")
__all__ = ["default_backends"]

#: q, k, v by shape: ranks, leading dims that broadcast, heads, values of another width.
SHAPES = {
    "four dims": TorchCall(),
    "values of another width": TorchCall(v=(2, 4, 9, 5)),
    "one query": TorchCall(q=(2, 4, 1, 8)),
    "one key": TorchCall(k=(2, 4, 1, 8)),
    "as many queries as keys": TorchCall(k=(2, 4, 6, 8)),
    "more queries than keys": TorchCall(q=(2, 4, 9, 8), k=(2, 4, 6, 8)),
    "head dim 1": TorchCall(q=(2, 4, 6, 1), k=(2, 4, 9, 1)),
    "odd sizes": TorchCall(q=(1, 3, 7, 5), k=(1, 3, 11, 5), v=(1, 3, 11, 3)),
    "two dims": TorchCall(q=(6, 8), k=(9, 8), v=(9, 5)),
    "three dims": TorchCall(q=(4, 6, 8), k=(4, 9, 8)),
    "three dims, broadcast": TorchCall(q=(4, 6, 8), k=(1, 9, 8)),
    "five dims": TorchCall(q=(2, 3, 2, 6, 8), k=(2, 3, 2, 9, 8)),
    "five dims, broadcast": TorchCall(q=(2, 3, 2, 6, 8), k=(1, 3, 2, 9, 8), v=(2, 1, 2, 9, 4)),
    "six dims": TorchCall(q=(2, 1, 3, 2, 6, 8), k=(2, 2, 3, 2, 9, 8)),
    "several ranks": TorchCall(q=(3, 2, 6, 8), k=(2, 9, 8), v=(9, 4)),
    "queries of fewer dims": TorchCall(q=(2, 6, 8), k=(3, 2, 9, 8)),
    "batch of k and v broadcast": TorchCall(q=(3, 4, 6, 8), k=(1, 4, 9, 8)),
    "batch of q broadcast": TorchCall(q=(1, 4, 6, 8), k=(3, 4, 9, 8)),
    "batch of v broadcast": TorchCall(q=(3, 4, 6, 8), k=(3, 4, 9, 8), v=(1, 4, 9, 8)),
    "one head of k and v": TorchCall(q=(2, 4, 6, 8), k=(2, 1, 9, 8)),
    "one head of q": TorchCall(q=(2, 1, 6, 8), k=(2, 4, 9, 8)),
    "one head of v": TorchCall(q=(2, 4, 6, 8), k=(2, 4, 9, 8), v=(2, 1, 9, 8)),
    "one head of k": TorchCall(q=(2, 4, 6, 8), k=(2, 1, 9, 8), v=(2, 4, 9, 8)),
    "grouped heads": TorchCall(q=(2, 6, 6, 8), k=(2, 2, 9, 8), enable_gqa=True),
    "grouped heads, as many": TorchCall(enable_gqa=True),
    "grouped heads, one": TorchCall(k=(2, 1, 9, 8), enable_gqa=True),
    "grouped heads, three dims": TorchCall(q=(6, 6, 8), k=(2, 9, 8), enable_gqa=True),
    "grouped heads, five dims": TorchCall(q=(2, 3, 4, 6, 8), k=(2, 3, 2, 9, 8), enable_gqa=True),
    "grouped heads, broadcast": TorchCall(q=(2, 4, 6, 8), k=(1, 2, 9, 8), enable_gqa=True),
}
MASKS = {
    "no mask": {},
    "causal": {"is_causal": True},
    "bool": {"mask": "bool"},
    "float": {"mask": "float"},
    "fully_masked": {"mask": "bool", "fully_masked": True},
    "fully_masked float": {"mask": "float", "fully_masked": True},
    "scale": {"scale": 0.3},
}


def full_mask(call: TorchCall) -> tuple[int, ...]:
    """The shape of the scores."""
    lead = torch.broadcast_shapes(call.q[:-3], call.k[:-3], (call.v or call.k)[:-3])
    heads = [shape[-3] for shape in (call.q, call.k, call.v or call.k) if len(shape) > 2]
    return (*lead, *([max(heads)] if heads else []), call.q[-2], call.k[-2])


def with_mask(call: TorchCall, mask: str) -> TorchCall:
    """The call with a mask of the shape of the scores."""
    changes = dict(MASKS[mask])
    if "mask" in changes:
        changes["mask"] = f"{changes['mask']}:{','.join(map(str, full_mask(call)))}"
        changes["fully_masked"] = bool(changes.get("fully_masked")) and call.q[-2] > 1
    return call.but(**changes)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(shapes: str, mask: str, name: str) -> None:
    call = with_mask(SHAPES[shapes], mask)
    found = check(call, name)
    if len(full_mask(call)) != 4:
        assert found.is_contiguous()  # as torch's is: code may view it


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("mask", ["no mask", "causal", "bool", "float", "fully_masked"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients(shapes: str, mask: str, name: str) -> None:
    check_gradients(with_mask(SHAPES[shapes], mask), name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape",
    ["6,9", "1,9", "6,1", "1,1", "4,6,9", "1,6,9", "4,1,9", "2,4,6,9", "2,1,6,9", "2,1,1,9", "1,4,1,9", "1,1,6,9",
     "2,4,6,1", "1,1,1,1"],
)  # fmt: skip
def test_masks_broadcast(shape: str, kind: str, name: str) -> None:
    call = TorchCall(mask=f"{kind}:{shape}")
    check(call, name)
    check_gradients(call, name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "shape",
    ["6,9", "2,6,9", "2,1,9", "3,2,6,9", "3,1,6,9", "1,1,6,9", "2,3,2,6,9", "2,1,1,6,9", "1,3,2,1,9", "1,1,1,6,9"],
)  # fmt: skip
def test_masks_of_five_dims(shape: str, name: str) -> None:
    call = SHAPES["five dims"].but(mask=f"bool:{shape}")
    check(call, name)
    check_gradients(call.but(mask=f"float:{shape}"), name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("mask", ["no mask", "causal", "bool", "float", "float32"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_dtypes(dtype: torch.dtype, mask: str, name: str) -> None:
    call = TorchCall(q=(2, 4, 7, 16), k=(2, 2, 11, 16), dtype=dtype, enable_gqa=True)
    call = call.but(mask="float32:2,4,7,11") if mask == "float32" else with_mask(call, mask)
    check(call, name)
    if mask != "float32" or name != "torch":  # torch's kernels in half precision have no gradient for it
        check_gradients(call, name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("mask", ["no mask", "causal", "bool", "float"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_layouts(layout: str, mask: str, name: str) -> None:
    """Around the values lies NaN."""
    for call in (TorchCall(layout=layout), TorchCall(q=(6, 6, 8), k=(6, 9, 8), layout=layout)):
        check(with_mask(call, mask), name)
        check_gradients(with_mask(call, mask), name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 5), (5, 1), (2, 3), (3, 2), (16, 33), (33, 16), (64, 64), (7, 70)])
def test_causal_is_aligned_to_the_upper_left(rows: int, keys: int, name: str) -> None:
    check_gradients(TorchCall(q=(1, 2, rows, 8), k=(1, 2, keys, 8), is_causal=True), name)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1, -0.5, 3.0, 1e-8])
def test_scales(scale: float, is_causal: bool, name: str) -> None:
    if name == "torch" and is_causal and scale <= 0:
        pytest.skip("NaN in torch's kernel (2.13, CPU)")
    check_gradients(TorchCall(scale=scale, is_causal=is_causal), name)


@pytest.mark.parametrize("name", WAYS)
def test_a_scale_of_numpys(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    check(TorchCall(scale=numpy.float64(0.3)), name)


@pytest.mark.parametrize("mask", ["no mask", "causal", "bool"])
@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 4, 0, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
        ((0, 4, 6, 8), (0, 4, 9, 8), (0, 4, 9, 8)),
        ((2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 0)),
        ((2, 4, 6, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
        ((0, 6, 8), (0, 9, 8), (0, 9, 8)),
        ((2, 0, 4, 6, 8), (2, 0, 4, 9, 8), (2, 0, 4, 9, 8)),
        ((0, 8), (9, 8), (9, 8)),
    ],
)
@pytest.mark.parametrize("name", WAYS)
def test_zero_sizes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: str, name: str) -> None:
    """No query, no entry, no value; without keys the output is 0."""
    inputs = make(TorchCall(q=q, k=k, v=v, is_causal=mask == "causal"))
    if mask == "bool":
        inputs.mask = torch.ones(q[-2], k[-2], dtype=torch.bool)
    with way(name):
        found = inputs.call(drop_in.scaled_dot_product_attention)
    assert found.shape == (*q[:-1], v[-1])
    assert not found.any()


def test_no_heads_and_no_head_dim() -> None:
    """torch's answers, whoever is allowed to give them."""
    for shape in ((2, 0, 6, 8), (2, 4, 6, 0)):
        x = torch.zeros(shape)
        with way("torch"):
            assert torch.equal(drop_in.scaled_dot_product_attention(x, x, x), TORCHS(x, x, x))


@pytest.mark.parametrize("value", [torch.finfo(FP32).min, -1e30, -1e4])
@pytest.mark.parametrize("name", WAYS)
def test_masks_of_large_numbers(value: float, name: str) -> None:
    """Not -inf: a row of nothing but this number is a mean of all values."""
    inputs = make(TorchCall())
    mask = torch.zeros(6, 9).masked_fill(torch.rand(6, 9) < 0.5, value)
    mask[2] = value
    with way(name):
        found = drop_in.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask)
    want = torch.softmax(inputs.q @ inputs.k.mT / 8**0.5 + mask, -1) @ inputs.v
    assert (found - want).abs().max() < 1e-5


def test_the_same_bits_as_torchs_where_torch_serves() -> None:
    for shapes in SHAPES.values():
        inputs = make(shapes)
        with way("torch"):
            found = inputs.call(drop_in.scaled_dot_product_attention)
        want = inputs.call(TORCHS)
        assert torch.equal(found, want)
        assert found.stride() == want.stride()
