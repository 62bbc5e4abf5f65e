"""Keys of -inf: scores of -inf are legal, and take a key out. The right answer is that of the other keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import torch as torch_sdpa

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [4, 8, 12, 16, 20, 24, 32, 36, 40, 64, 72, 80, 96, 100, 128]
LENGTHS = [(1, 2), (1, 17), (3, 5), (16, 16), (33, 65), (130, 257)]
BACKENDS = ["decode", "cudnn", "torch", "reference", None]


def check(
    dtype: torch.dtype, head_dim: int, q_len: int, kv_len: int, backend: str | None, device: str, heads: tuple[int, int]
) -> bool:
    """Ones against ones and a few keys of -inf, with and without gradients. False where the backend refuses."""
    q_heads, kv_heads = heads
    q = torch.ones(2, q_heads, q_len, head_dim, dtype=dtype, device=device)
    k = torch.ones(2, kv_heads, kv_len, head_dim, dtype=dtype, device=device)
    v = torch.randn(2, kv_heads, kv_len, head_dim, device=device).to(dtype)
    at = sorted({0, kv_len // 2, kv_len - 1})[: max(1, min(3, kv_len - 1))]
    for places in (at[:1], at):
        if len(places) == kv_len:
            continue
        for part in (slice(None), slice(0, 1)):  # all numbers of a key, one of them
            keys = k.clone()
            for place in places:
                keys[:, :, place, part] = -torch.inf
            lengths = torch.full((2,), kv_len, dtype=torch.int32, device=device)
            for arguments in ({}, {"kv_lengths": lengths}):
                if fastattn.explain(q, keys, v, backend=backend, **arguments).chosen is None:
                    return False
                others = [j for j in range(kv_len) if j not in places]
                want = v[:, :, others].double().mean(2, keepdim=True).repeat_interleave(q_heads // kv_heads, 1)
                out = fastattn.scaled_dot_product_attention(q, keys, v, backend=backend, **arguments)
                assert isinstance(out, Tensor)
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(out.double(), want.expand_as(out), rtol=tolerance, atol=tolerance)
    return True


def gradients(dtype: torch.dtype, head_dim: int, length: int, backend: str | None, device: str) -> None:
    """Those of the values: a key that is out has none, the others share alike."""
    q, k = (torch.ones(1, 2, length, head_dim, dtype=dtype, device=device) for _ in range(2))
    k[:, :, 0] = -torch.inf
    v = torch.randn(1, 2, length, head_dim, device=device).to(dtype).requires_grad_()
    if fastattn.explain(q, k, v, backend=backend).chosen is None:
        return
    fastattn.scaled_dot_product_attention(q, k, v, backend=backend).sum().backward()  # type: ignore[union-attr]
    want = torch.full_like(v, length / (length - 1), dtype=torch.float64)
    want[:, :, 0] = 0
    assert v.grad is not None
    torch.testing.assert_close(v.grad.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["torch", "reference", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_on_the_cpu(dtype: torch.dtype, backend: str | None, heads: tuple[int, int]) -> None:
    for head_dim in (4, 12, 20, 64, 100):
        for q_len, kv_len in LENGTHS[1:]:
            assert check(dtype, head_dim, q_len, kv_len, backend, "cpu", heads)
    for length in (2, 33, 130):
        gradients(dtype, 20, length, backend, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_the_decode_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("native on a GPU")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    for head_dim in (8, 40, 72):
        for q_len, kv_len in LENGTHS[:3]:
            assert check(dtype, head_dim, q_len, kv_len, "decode", "cpu", (4, 2))


def test_what_a_gpus_float32_kernel_is_given_is_finite() -> None:
    """It has no way of its own to multiply an infinity. NaN stays NaN; what is finite stays what it is."""
    k = torch.tensor([[[[1.0, -torch.inf, torch.inf, torch.nan, 3e38, -2e-40]]]])
    found = torch_sdpa._without_infinities(k, trained=False)[0, 0, 0].tolist()
    assert found[:3] == pytest.approx([1.0, -1e30, 1e30]) and found[3] != found[3]
    assert found[4:] == k[0, 0, 0, 4:].tolist()
    for x in found[:3]:  # as three products of TF32
        big = torch.tensor(x).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32)
        assert bool((big + (torch.tensor(x) - big)).isfinite())
    half = torch.full((1, 1, 1, 4), -torch.inf, dtype=torch.float16)
    assert torch_sdpa._without_infinities(half, trained=False) is half
    for dtype in (torch.float16, torch.bfloat16):  # the backward of torch's kernels has none for them either
        assert torch_sdpa._without_infinities(half.to(dtype), trained=True).isfinite().all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # the reference is asked for on purpose
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype, backend: str | None, heads: tuple[int, int]) -> None:
    served = 0
    for head_dim in HEAD_DIMS:
        for q_len, kv_len in LENGTHS:
            served += check(dtype, head_dim, q_len, kv_len, backend, "cuda", heads)
        gradients(dtype, head_dim, 130, backend, "cuda")
    assert served or (backend == "cudnn" and dtype == torch.float32)
