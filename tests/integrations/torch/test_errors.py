"""A call that torch refuses is refused in torch's words, whoever is allowed to serve calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_calls import TORCHS, WAYS, default_backends

import fastattn
from fastattn import drop_in

pytestmark = [
    pytest.mark.usefixtures("default_backends"),
    pytest.mark.filterwarnings("ignore:Sparse CSR"),
]
__all__ = ["default_backends"]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


Q, K = ones(2, 4, 6, 8), ones(2, 4, 9, 8)
#: Arguments, by what is wrong with them.
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a vector": ((ones(8), ones(8), ones(8)), {}),
    "a number": ((ones(), ones(), ones()), {}),
    "batches": ((ones(2, 4, 6, 8), ones(3, 4, 9, 8), ones(3, 4, 9, 8)), {}),
    "heads": ((Q, ones(2, 2, 9, 8), ones(2, 2, 9, 8)), {}),
    "grouped heads that do not divide": ((Q, ones(2, 3, 9, 8), ones(2, 3, 9, 8)), {"enable_gqa": True}),
    "more heads of k than of q": ((ones(2, 2, 6, 8), K, K), {"enable_gqa": True}),
    "grouped heads of two dims": ((ones(6, 8), ones(9, 8), ones(9, 8)), {"enable_gqa": True}),
    "head dims": ((Q, ones(2, 4, 9, 7), ones(2, 4, 9, 7)), {}),
    "dtypes": ((Q, K.half(), K), {}),
    "integers": ((Q.long(), K.long(), K.long()), {}),
    "bools": ((Q.bool(), K.bool(), K.bool()), {}),
    "complex numbers": ((Q.cfloat(), K.cfloat(), K.cfloat()), {}),
    "a list": (([[1.0]], K, K), {}),
    "None": ((Q, None, K), {}),
    "sparse tensors": ((ones(6, 8).to_sparse(), ones(9, 8).to_sparse(), ones(9, 8)), {}),
    "a bool mask with causal, three dims": ((Q[0], K[0], K[0], ones(6, 9).bool()), {"is_causal": True}),
    "a mask that does not broadcast": ((Q, K, K, ones(5, 9)), {}),
    "a mask of too many heads": ((Q, K, K, ones(2, 3, 6, 9)), {}),
    "a mask of more dims": ((Q, K, K, ones(1, 1, 1, 6, 9)), {}),
    "a mask of more dims for three": ((Q[0], K[0], K[0], ones(2, 1, 6, 9)), {}),
    "a mask of one dim": ((Q, K, K, ones(9)), {}),
    "a mask of no dim": ((Q, K, K, ones().bool()), {}),
    "a mask of integers": ((Q, K, K, ones(6, 9).long()), {}),
    "a mask of bytes": ((Q, K, K, ones(6, 9).byte()), {}),
    "a mask of half precision": ((Q, K, K, ones(6, 9).half()), {}),
    "a mask of float64": ((Q, K, K, ones(6, 9).double()), {}),
    "a mask of bfloat16 for float16": ((Q.half(), K.half(), K.half(), ones(6, 9).bfloat16()), {}),
    "a mask that is none": ((Q, K, K, "causal"), {}),
    "a mask that is a number": ((Q, K, K, 1), {}),
    "dropout of None": ((Q, K, K, None, None), {}),
    "dropout of a word": ((Q, K, K, None, "0"), {}),
    "dropout below 0": ((Q, K, K, None, -0.5), {}),
    "dropout above 1": ((Q, K, K, None, 1.5), {}),
    "causal as a number": ((Q, K, K, None, 0.0, 1), {}),
    "causal as a tensor": ((Q, K, K), {"is_causal": torch.tensor(True)}),
    "scale as a word": ((Q, K, K), {"scale": "1"}),
    "scale as a complex number": ((Q, K, K), {"scale": 1j}),
    "enable_gqa as a number": ((Q, K, K), {"enable_gqa": 1}),
}


def raised(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return type(caught.value), re.sub(r" \(position \d\)", "", str(caught.value))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("wrong", BAD)
def test_torchs_error(wrong: str, name: str) -> None:
    want = raised(TORCHS, *BAD[wrong])
    if name == "torch":
        assert raised(drop_in.scaled_dot_product_attention, *BAD[wrong]) == want
    else:
        with fastattn.use_backend(*WAYS[name]):
            assert raised(drop_in.scaled_dot_product_attention, *BAD[wrong]) == want


@pytest.mark.parametrize("wrong", BAD)
def test_explain_raises_nothing(wrong: str) -> None:
    arguments, options = BAD[wrong]
    with fastattn.use_backend("reference"):
        assert drop_in.explain(*arguments, **options).chosen == "torch"


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((Q, K), {}),
        ((), {}),
        ((Q, K, K, None, 0.0, False, 0.5), {}),  # a scale by position: torch takes it by name alone
        ((Q, K, K), {"mask": None}),
        ((Q, K, K), {"query": Q}),
    ],
)
def test_signature(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The words are Python's own."""
    assert raised(TORCHS, arguments, options)[0] is TypeError
    assert raised(drop_in.scaled_dot_product_attention, arguments, options)[0] is TypeError


@pytest.mark.parametrize("name", WAYS)
def test_by_name(name: str) -> None:
    every = {"query": Q, "key": K, "value": K, "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    with fastattn.use_backend(*(WAYS[name] or ("torch",))):
        found = drop_in.scaled_dot_product_attention(**every, enable_gqa=False)
    assert torch.allclose(found, TORCHS(**every, enable_gqa=False))


@pytest.mark.parametrize("other", ["key", "value", "attn_mask"])
def test_devices(other: str) -> None:
    """The meta device stands for another one. torch may say something, or compute nonsense of its own."""
    call: dict[str, Any] = {"query": Q, "key": K, "value": K, "attn_mask": ones(6, 9)}
    call[other] = call[other].to("meta")
    found = []
    for function in (TORCHS, drop_in.scaled_dot_product_attention):
        with fastattn.use_backend("reference"):
            try:
                found.append(function(**call).device.type)
            except Exception as error:
                found.append(f"{type(error)}: {error}")
    assert found[0] == found[1]
