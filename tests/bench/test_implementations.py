"""Every implementation computes the same call, checked against the reference."""

import os

import pytest
import torch

import fastattn
from fastattn.bench import check, implementations, inputs
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS

CPU = torch.device("cpu")


def inputs_of(case, count=1):
    return inputs.make_inputs(case, CPU, torch.Generator().manual_seed(1), count)


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 9, batch=2),
        Case(4, 12, head_major=True),
        Case(1, 12, head_major=True),
        Case(1, 20, batch=3, head_major=True, lengths=(20, 1, 7)),
        Case(9, 9, q_heads=4, kv_heads=4),
    ],
    ids=Case.label,
)
def test_torch_is_asked_for_the_same_as_fastattn(case):
    """The masks, is_causal and enable_gqa that torch gets, on torch's CPU kernels."""
    (x,) = inputs_of(case)
    out = implementations._bind_torch(case, x)()
    assert check.relative_error((out,), check.reference(case, x, backward=False)) < check.OUTPUT_LIMIT
    ours = IMPLEMENTATIONS["fastattn"].bind(case, inputs.poisoned(case, x))()
    assert check.relative_error((ours,), check.reference(case, x, backward=False)) < check.OUTPUT_LIMIT


def test_lower_right_is_torchs_own_kind_of_mask():
    case = Case(4, 12, q_heads=4, kv_heads=4, head_major=True)
    (x,) = inputs_of(case)
    call = implementations._bind_torch(case, x, lower_right=True)
    assert isinstance(call.keywords["attn_mask"], torch.nn.attention.bias.CausalBias)
    assert check.relative_error((call(),), check.reference(case, x, backward=False)) < check.OUTPUT_LIMIT


def test_torch_with_a_window_and_sinks():
    case = Case(1, 40, 2, 8, 2, 64, head_major=True, left=12, sinks=True)
    (x,) = inputs_of(case)
    expected = check.reference(case, x, backward=False)
    assert check.relative_error((IMPLEMENTATIONS["torch-math"].bind(case, x)(),), expected) < check.OUTPUT_LIMIT
    with pytest.raises(ValueError, match="neither sinks nor windows"):
        IMPLEMENTATIONS["torch-cudnn"].bind(case, x)


def test_flash_with_sinks_by_its_log_sum_exp(monkeypatch):
    """The arithmetic, with the one operator that a CPU lacks made of others."""
    case = Case(1, 40, 2, 8, 2, 64, head_major=True, left=12, sinks=True)
    (x,) = inputs_of(case)

    def flash(q, k, v):
        out, lse = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True, backend="reference")
        return out, lse, None, None, 1, 13, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    out = IMPLEMENTATIONS["torch-flash"].bind(case, x)()
    assert check.relative_error((out,), check.reference(case, x, backward=False)) < check.OUTPUT_LIMIT


def test_truth_of_the_gradients():
    case = Case(6, 6, q_heads=4, kv_heads=2, dim=16)
    (x,) = inputs_of(case)
    q, k, v = (t.float().requires_grad_() for t in (x.q, x.k, x.v))
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    expected = out, *torch.autograd.grad(out, (q, k, v), x.grad_out.float())
    assert check.relative_error(check.reference(case, x, backward=True), expected) < 1e-5


def test_relative_error():
    one = torch.ones(4)
    assert check.relative_error((one * 1.5, one), (one, one)) == 0.5
    bad = check.relative_error((one, one * torch.nan), (one, one))
    assert bad != bad
    for error in (bad, 1e-2, float("inf")):
        with pytest.raises(ValueError, match="wrong result"):
            check.check_error(error, 1e-2)


def test_inputs_are_normal_and_k_v_one_piece_of_memory():
    for head_major in (False, True):
        case = Case(5, 200, 2, 8, 2, 64, head_major=head_major)
        first, second = inputs_of(case, 2)
        assert first.k.shape == (2, 2, 200, 64)
        assert (first.k.stride(1) > first.k.stride(2)) == head_major
        assert first.q.transpose(1, 2).is_contiguous()
        assert not torch.equal(first.k, second.k)
        assert first.memory.data_ptr() == first.k.data_ptr()
        assert first.memory.numel() * 2 == case.kv_bytes
        assert abs(first.k.float().std() - 1) < 0.05
        assert not torch.equal(first.k, first.v)


def test_values_that_are_in_the_keys():
    for head_major in (False, True):
        case = Case(1, 20, 2, 8, 2, 48, values=32, head_major=head_major)
        (x,) = inputs_of(case, 1)
        assert x.v.data_ptr() == x.k.data_ptr()
        assert torch.equal(x.v, x.k[..., :32])
        assert x.v.stride() == x.k.stride()
        assert x.grad_out.shape == (2, 8, 1, 32)
        assert x.memory.numel() * 2 == case.kv_bytes


def test_enough_input_sets_to_overflow_the_cache_and_not_the_memory():
    l2 = 50 << 20
    small = Case(1, 512, head_major=True)
    assert (
        (inputs.set_count(small, l2) - 1) * (small.kv_bytes + 8192)
        < 4 * l2
        <= inputs.set_count(small, l2) * (small.kv_bytes + 8192)
    )
    assert inputs.set_count(Case(1, 131072, head_major=True), l2) == 1
    window = Case(1, 8192, 8, 64, 8, 64, head_major=True, left=127, sinks=True)
    assert window.kv_bytes == 2 * 8 * 128 * 8 * 64 * 2
    assert inputs.set_count(window, l2) == inputs.MOST_BYTES // (2 * 8 * 8 * 8192 * 64 * 2 + 2 * 8 * 64 * 64 * 2)
    assert inputs.set_count(small, 0) == 1


@pytest.mark.parametrize("change", [{"lengths": (3,)}, {"lengths": (3, 4), "q_len": 2}])
def test_lengths_are_for_one_query_and_each_entry(change):
    with pytest.raises(ValueError, match="lengths"):
        Case(**{"q_len": 1, "kv_len": 8, "batch": 2, **change})


def test_switches_are_set_while_called_and_only_then(monkeypatch):
    monkeypatch.setenv("FASTATTN_PLANS", "before")
    with IMPLEMENTATIONS["fastattn-static"].active():
        assert os.environ["FASTATTN_PLANS"] == "static"
        assert torch.is_inference_mode_enabled()
    assert os.environ["FASTATTN_PLANS"] == "before"
    monkeypatch.delenv("FASTATTN_PLANS")
    with IMPLEMENTATIONS["fastattn-dynamic"].active(gradients=True):
        assert os.environ["FASTATTN_PLANS"] == "dynamic"
        assert not torch.is_inference_mode_enabled()
    assert "FASTATTN_PLANS" not in os.environ
    with IMPLEMENTATIONS["torch-flash"].active():
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()
