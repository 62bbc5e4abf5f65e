"""The attention function: every argument that a layer may pass, against attention written down plainly."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
from typing import Any

import naive
import pytest
import tiny_models  # noqa: F401  (registers "fastattn", quietly)
import torch
from torch import Tensor
from transformers import AttentionInterface, BridgeTowerConfig
from transformers.masking_utils import bidirectional_mask_function

from fastattn import FastattnWarning
from fastattn.common.notice import _given
from fastattn.integrations.transformers import attention_forward, interval_mask
from fastattn.integrations.transformers import mask as mask_module
from fastattn.integrations.transformers.attention import REFUSED
from fastattn.integrations.transformers.lazy_mask import compact_of, make_mask
from fastattn.masks import Intervals

B, HQ, HKV, S, D = 2, 4, 2, 9, 8


class Layer(torch.nn.Module):
    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_key_value_groups = HQ // HKV


def inputs(q_len: int = S, kv_len: int = S) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, HQ, q_len, D), torch.randn(B, HKV, kv_len, D), torch.randn(B, HKV, kv_len, D)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, expected: dict[str, Any], **arguments: Any) -> None:
    layer = arguments.pop("layer", Layer())
    out, weights = attention_forward(layer, q, k, v, mask, **arguments)
    k, v = (x.expand(B, -1, -1, -1) for x in (k, v))
    assert weights is None
    assert out.shape == (B, q.shape[2], HQ, D)
    assert out.is_contiguous()
    reference = naive.attention(q.double(), k.double(), v.double(), **expected).out.transpose(1, 2)
    torch.testing.assert_close(out.double(), reference, rtol=0, atol=1e-5)


def of_intervals(rows: list[list[int]], queries: int | None = None) -> Tensor:
    """A mask as the mask function makes it: query i sees the keys `rows[i][0] <= j < rows[i][1]`."""
    lo, hi = torch.tensor(rows).int().T.contiguous()
    visible = Intervals(lo.expand(B, -1).contiguous(), hi.expand(B, -1).contiguous())
    return make_mask(visible, None, B, queries or len(rows), S, torch.float32)


@pytest.mark.parametrize("q_len", [1, 4, S])
def test_without_a_mask(q_len: int) -> None:
    q, k, v = inputs(q_len)
    check(q, k, v, None, {"mask": "causal"})
    check(q, k, v, None, {}, layer=Layer(is_causal=False))
    check(q, k, v, None, {}, is_causal=False)
    check(q, k, v, None, {"mask": "causal"}, layer=Layer(is_causal=False), is_causal=True)
    check(q, k, v, None, {}, layer=torch.nn.Module())  # as eager: no mask hides nothing
    check(q, k, v, None, {"mask": "causal", "window": (3, -1)}, sliding_window=4)
    check(q, k, v, None, {"mask": "causal"}, sliding_window=S)


def test_scale_softcap_and_sinks() -> None:
    q, k, v = inputs()
    sinks = torch.randn(HQ)
    check(q, k, v, None, {"mask": "causal", "scale": 0.3}, scaling=0.3)
    check(q, k, v, None, {"mask": "causal", "softcap": 2.0}, softcap=2.0)
    check(q, k, v, None, {"mask": "causal"}, softcap=0.0)
    check(q, k, v, None, {"mask": "causal", "sinks": sinks}, s_aux=sinks)


def test_a_mask_replaces_causality_and_window() -> None:
    q, k, v = inputs(4)
    seen = torch.rand(B, 1, 4, S) < 0.5
    additive = torch.randn(B, 1, 4, S)
    for mask in (seen, additive):
        check(q, k, v, mask, {"mask": mask}, sliding_window=2)
        longer = torch.cat([mask, mask], -1)
        check(q, k, v, longer, {"mask": mask})
    mask = of_intervals([[0, 3], [2, 9], [9, 9], [5, 6]])
    check(q, k, v, mask, {"mask": tuple(compact_of(mask).visible)}, sliding_window=2)
    shared = of_intervals([[1, 5]], queries=4)
    check(q, k, v, shared, {"mask": tuple(compact_of(shared).visible)}, is_causal=True)


@pytest.mark.parametrize("says", [True, False, None])
def test_the_mask_decides_not_the_layers_is_causal(says: bool | None) -> None:
    """Encoders whose layers call themselves nothing or causal, decoders whose layers call themselves bidirectional."""
    layer = torch.nn.Module() if says is None else Layer(says)
    q, k, v = inputs()
    check(q, k, v, interval_mask(B, S, S), {"mask": "causal"}, layer=layer)
    check(q, k, v, interval_mask(B, S, S, mask_function=bidirectional_mask_function), {}, layer=layer)


@pytest.mark.parametrize("part", [False, True])
def test_no_mask_means_every_key_in_a_model_that_masks_are_made_for(part: bool) -> None:
    """BridgeTower's layers for pictures call themselves causal and are handed no mask, because nothing is padded."""
    q, k, v = inputs()
    whole, layer = BridgeTowerConfig(), Layer(is_causal=True)
    layer.config = whole.text_config if part else whole
    check(q, k, v, None, {"mask": "causal"}, layer=layer)
    interval_mask(B, S, S, config=whole)
    check(q, k, v, None, {}, layer=layer)
    check(q, k, v, interval_mask(B, S, S, config=whole), {"mask": "causal"}, layer=layer)
    layer.config = copy.deepcopy(layer.config)
    check(q, k, v, None, {"mask": "causal"}, layer=layer)
    known = {id(whole), id(whole.text_config), id(whole.vision_config)}
    assert known <= mask_module._asking.keys()
    del whole
    gc.collect()
    assert not known & mask_module._asking.keys(), "ids may come again"


def test_a_batch_of_one_broadcasts() -> None:
    q, k, v = inputs()
    check(q, k[:1], v[:1], None, {"mask": "causal"})
    out, _ = attention_forward(Layer(), q[:1], k, v, None)
    reference = naive.attention(q[:1].expand(B, -1, -1, -1).double(), k.double(), v.double(), mask="causal").out
    torch.testing.assert_close(out.double(), reference.transpose(1, 2), rtol=0, atol=1e-5)


def test_a_band_slices_the_keys() -> None:
    q, k, v = inputs(4, 20)
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.nan
    found, _ = attention_forward(Layer(), q, k, v, interval_mask(B, 4, 20))
    expected, _ = attention_forward(Layer(), q, k[:, :, :4], v[:, :, :4], None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["none", "causal", "intervals", "band", "bool", "additive"])
def test_position_bias(kind: str) -> None:
    q, k, v = inputs(4)
    bias = torch.randn(1, HQ, 4, S + 2, requires_grad=True)
    cut = bias[..., :S]
    seen = torch.rand(B, 1, 4, S) < 0.7
    seen[..., 0] = True
    mask = {
        "intervals": of_intervals([[0, 3], [1, 4], [0, 9], [2, 2]]),
        "band": interval_mask(B, 4, S),
        "bool": seen,
        "additive": torch.randn(B, 1, 4, S),
    }.get(kind)
    expected: dict[str, Any] = {"mask": cut}
    if kind == "causal":
        expected["window"] = (-1, 0)
    elif kind == "intervals":
        expected["mask"] = torch.where(compact_of(mask).dense(S), cut, -torch.inf)
    elif kind == "band":
        expected["mask"] = torch.where(torch.arange(S) <= torch.arange(4)[:, None], cut, -torch.inf)
    elif kind == "bool":
        expected["mask"] = torch.where(seen, cut, -torch.inf)
    elif kind == "additive":
        expected["mask"] = cut + mask
    check(q, k, v, mask, expected, layer=Layer(kind == "causal"), position_bias=bias)
    attention_forward(Layer(), q, k, v, mask, position_bias=bias)[0].sum().backward()
    assert bias.grad.isfinite().all()
    assert bias.grad.abs().max() > 0


def test_cu_seq_lens_pack_sequences() -> None:
    q, k, v = inputs()
    ends = torch.tensor([0, 4, S, S + 6, 2 * S])
    arguments = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    first = torch.tensor([[0] * 4 + [4] * 5, [0] * 6 + [6] * 3]).int()
    last = torch.arange(1, S + 1).int().expand(B, -1)
    check(q, k, v, None, {"mask": (first, last)}, **arguments)
    check(q, k, v, None, {"mask": (first, last), "window": (2, 0)}, sliding_window=3, **arguments)
    ends_of = torch.tensor([[4] * 4 + [9] * 5, [6] * 6 + [9] * 3]).int()
    check(q, k, v, None, {"mask": (first, ends_of)}, is_causal=False, **arguments)
    band = interval_mask(B, S, S, mask_function=lambda b, h, i, j: (j <= i) & (j > i - 3))
    check(q, k, v, band, {"mask": (first, last), "window": (2, 0)}, **arguments)
    seen = torch.rand(B, 1, S, S) < 0.7
    packed = seen & (torch.arange(S) >= first[:, None, :, None]) & (torch.arange(S) < ends_of[:, None, :, None])
    check(q, k, v, seen, {"mask": packed}, **arguments)


def test_sparse_indices() -> None:
    q, k, v = inputs(4)
    indices = torch.tensor([[0, 2], [1, 1], [5, -1], [8, 3]]).expand(B, 4, 2)
    seen = torch.zeros(4, S, dtype=torch.bool)
    for row, columns in enumerate(indices[0].tolist()):
        seen[row, [c for c in columns if c >= 0]] = True
    _given.clear()
    with pytest.warns(FastattnWarning, match="sparse attention of Layer"):
        check(q, k, v, None, {"mask": seen[None, None], "window": (-1, 0)}, indices=indices)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arguments_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` of Layer"):
        attention_forward(Layer(), *inputs(), None, **{name: torch.zeros(1)})


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, S, dtype=torch.long),
        torch.ones(B, 1, S, S, dtype=torch.int32),
        torch.ones(S, 2, dtype=torch.int32),
    ],
    ids=["2-D", "int", "rank"],
)
def test_masks_of_other_dtypes_raise(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="expected attention_mask to be None"):
        attention_forward(Layer(), *inputs(), mask)


def test_output_attentions_warns_once() -> None:
    _given.clear()
    with pytest.warns(FastattnWarning, match="does not return attention weights"):
        attention_forward(Layer(), *inputs(), None, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_forward(Layer(), *inputs(), None, output_attentions=True)


@pytest.mark.parametrize("kind", ["causal", "open", "chunk", "window", "intervals", "bool", "additive", "bias"])
def test_dropout_runs_on_transformers_sdpa(kind: str) -> None:
    q, k, v = inputs(4 if kind == "chunk" else S)
    rows = q.shape[2]
    seen = torch.rand(B, 1, rows, S) < 0.6
    seen[0, 0, 2] = False
    mask = {
        "intervals": of_intervals([[0, 3], [1, 1], [0, 9]] * 3) if rows == S else None,
        "bool": seen,
        "additive": torch.where(seen, torch.randn(B, 1, rows, S), -torch.inf),
    }.get(kind)
    arguments: dict[str, Any] = {"is_causal": kind != "open"}
    if kind == "window":
        arguments["sliding_window"] = 3
    if kind == "bias":
        arguments["position_bias"] = torch.randn(1, HQ, rows, S)
    expected, _ = attention_forward(Layer(), q, k, v, mask, **arguments)
    _given.clear()
    with pytest.warns(FastattnWarning, match="dropout"):
        # So little dropout that none of it happens: the result must be the plain one.
        found, _ = attention_forward(Layer(), q, k, v, mask, dropout=1e-12, **arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    dropped = [attention_forward(Layer(), q, k, v, mask, dropout=0.5, **arguments)[0] for _ in range(2)]
    assert not torch.equal(*dropped)
    assert not dropped[0].isnan().any()


def test_dropout_with_sinks_or_softcap_raises() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="dropout together with sinks"):
        attention_forward(Layer(), q, k, v, None, dropout=0.1, s_aux=torch.zeros(HQ))
    with pytest.raises(ValueError, match="dropout together with softcap"):
        attention_forward(Layer(), q, k, v, None, dropout=0.1, softcap=30.0)


def test_mixed_dtypes_under_autocast() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention_forward(Layer(), q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    reference = naive.attention(q.double(), k.double(), v.double(), mask="causal").out.transpose(1, 2)
    assert (out.double() - reference).norm() / reference.norm() < 1e-2


def test_registered_names() -> None:
    assert AttentionInterface()["fastattn"] is attention_forward
    code = "import sys, fastattn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
