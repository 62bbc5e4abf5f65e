"""What only a GPU can show: compiled code, determinism, memory, routes. Graphs and streams: test_cuda_graphs.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, FP32, Case, assert_right, make, reference_results, refusals, relative_error, run
from torch import Tensor

import fastattn
from fastattn import Intervals

# Here the reference is asked for on purpose.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")]

attend = fastattn.scaled_dot_product_attention
BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16, mask="causal")
DECODE = BASE.but(q_len=1, kv_len=700)


#: What serves plain calls in half precision.
FIRST = "hopper" if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else "cudnn"


def _block(x: Tensor, weight: Tensor, sinks: Tensor | None) -> Tensor:
    """A transformer's attention: a fused projection, whose pieces are strided views, and the way back."""
    batch, length, width = x.shape
    q, k, v = (x @ weight).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
    out = attend(q, k, v, mask="causal", sinks=sinks)
    return out.transpose(1, 2).reshape(batch, length, width) * 2


@pytest.mark.parametrize("with_sinks", [False, True])
def test_compiled_by_inductor_is_eager(with_sinks: bool) -> None:
    torch._dynamo.reset()
    step = torch.compile(_block, fullgraph=True)
    for length in (129, 200):
        leaves = [torch.randn(2, length, 256), torch.randn(256, 768) / 16, torch.randn(4)]
        leaves = [x.to("cuda", BF16).requires_grad_() for x in leaves][: 2 + with_sinks]
        arguments = leaves if with_sinks else [*leaves, None]
        upstream = torch.randn(2, length, 256, device="cuda", dtype=BF16)
        before = fastattn.stats()["calls"].get(f"{FIRST}.backward", 0)
        got = step(*arguments)
        want = _block(*arguments)
        assert got.stride() == want.stride()
        assert relative_error(got, want) < 0.01
        for g, w in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
            assert relative_error(g, w) < 0.02
        assert fastattn.stats()["calls"][f"{FIRST}.backward"] == before + 2


def test_compiled_decode_with_cuda_graphs() -> None:
    """torch's own capture of compiled code, with lengths that change between its replays."""
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        return attend(q * 1.0, k, k, mask="causal", kv_lengths=lengths) + 0

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    q, k = torch.randn(2, 8, 1, 128, device="cuda", dtype=BF16), torch.randn(2, 2, 512, 128, device="cuda", dtype=BF16)
    for lengths in ((1, 2), (100, 512), (512, 7), (0, 300)):
        on_device = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        with torch.no_grad():
            got = compiled(q, k, on_device).clone()
        assert relative_error(got, step(q.double(), k.double(), on_device)) < 4e-3


def test_autocast() -> None:
    q, k, v = (torch.randn(2, 4, 129, 64, device="cuda", requires_grad=True) for _ in range(3))
    with torch.autocast("cuda", BF16):
        assert fastattn.explain(q, k, v, mask="causal").chosen == FIRST
        out = attend(q, k, v, mask="causal")
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == BF16
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    wide = [x.detach().to(BF16).double().requires_grad_() for x in (q, k, v)]
    exact = attend(*wide, mask="causal")
    assert relative_error(out, exact) < 4e-3
    for g, w in zip(got, torch.autograd.grad(exact, wide, upstream.double())):
        assert g.dtype == FP32
        assert relative_error(g, w) < 8e-3


@pytest.mark.parametrize(
    "case", [BASE.but(q_len=1000, kv_len=1000), BASE.but(kv_lengths=(129, 50)), BASE.but(mask="intervals:bq")], ids=str
)
@pytest.mark.parametrize("backend", ["decode", "cudnn", "hopper"])
def test_deterministic_algorithms(case: Case, backend: str, seed: int) -> None:
    if backend == "hopper" and FIRST != "hopper":
        pytest.skip("needs compute capability 9.0")
    case = case.but(q_len=1) if backend == "decode" else case.but(grads="qkv")
    inputs = make(case, "cuda", seed)
    want = reference_results(inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(inputs, backend)
        for _ in range(3):
            again = run(inputs, backend)
            assert all(torch.equal(x, first[name]) for name, x in again.items())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_right(case, inputs, first, want)


def _peak(call: Callable[[], Any]) -> int:
    """Bytes that a call takes at the most, beyond what is there. The second call: the first may also build things."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", ["cudnn", "torch", "reference"])
@pytest.mark.parametrize("grads", ["", "qkv"])
def test_memory_of_a_long_prefill(grads: str, backend: str) -> None:
    """Less than one byte for each score of one head."""
    length = 16384
    case = BASE.but(batch=1, q_heads=4, kv_heads=1, q_len=length, kv_len=length, grads=grads)
    q, k, v = (torch.randn(1, h, length, 128, device="cuda", dtype=BF16) for h in (4, 1, 1))
    leaves = [x.requires_grad_(bool(grads)) for x in (q, k, v)]

    def call() -> Any:
        out = attend(q, k, v, mask="causal", backend=backend)
        return torch.autograd.grad(out, leaves, out.detach()) if grads else out

    # The reference holds a chunk of scores a few times over, whatever the length.
    limit = length * length if backend != "reference" else 12 * (1 << 25) * 4
    assert _peak(call) < limit, case


@pytest.mark.parametrize("layout", ["bhsd", "cache", "bshd"])
@pytest.mark.parametrize("backend", ["decode", "cudnn"])
def test_a_cache_is_not_copied(backend: str, layout: str, seed: int) -> None:
    case = DECODE.but(batch=1, kv_len=65536, layout=layout, kv_lengths=(60000,))
    inputs = make(case, "cuda", seed)
    one_tensor = inputs.k.numel() * inputs.k.element_size()
    assert _peak(lambda: run(inputs, backend, poison=False)) < one_tensor / 2


def test_offsets_beyond_int32() -> None:
    """A cache of more than 2^31 numbers: what is at its end must count."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    length, dim = 2_200_000, 128
    k, v = (torch.randn(1, length, 8, dim, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(2))
    q = torch.randn(1, 8, 1, dim, device="cuda", dtype=BF16)
    start = length - 1000
    seen = Intervals(*(torch.full((1, 1), x, dtype=torch.int32, device="cuda") for x in (start, length)))
    want = attend(q.double(), k[:, :, start:].double(), v[:, :, start:].double(), backend="reference")
    for backend in ("decode", "cudnn"):
        assert relative_error(attend(q, k, v, mask=seen, backend=backend), want) < 4e-3, backend


def test_routes() -> None:
    """What DESIGN promises for a GPU with everything installed."""

    def chosen(case: Case) -> str | None:
        inputs = make(case, "cuda")
        return fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options).chosen

    assert chosen(DECODE) == "decode"
    assert chosen(BASE) == FIRST
    assert chosen(BASE.but(grads="qkv")) == FIRST
    assert chosen(DECODE.but(grads="qkv")) == FIRST
    assert chosen(BASE.but(dtype=FP32)) == "prefill"
    softcap = "hopper" if FIRST == "hopper" else "prefill"
    assert chosen(BASE.but(softcap=1.0)) == softcap
    assert chosen(BASE.but(softcap=1.0, grads="qkv")) == softcap
    with fastattn.use_backend("torch"):
        assert chosen(BASE) == "torch"


def test_cudnn_switched_off(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    inputs = make(BASE, "cuda", seed)
    assert fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options).chosen == (
        "hopper" if FIRST == "hopper" else "torch"
    )
    assert_right(BASE, inputs, run(inputs))


def test_the_reference_warns_once_on_a_gpu(fresh_warnings: None) -> None:
    q = torch.randn(1, 2, 200, 64, device="cuda", dtype=BF16, requires_grad=True)
    with fastattn.use_backend("torch", "reference"):
        with pytest.warns(fastattn.FastattnWarning, match="softcap"):
            attend(q, q, q, softcap=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend(q[:, :, :150], q, q, softcap=2.0)


@pytest.mark.parametrize("name", ["k", "v", "mask", "sinks", "q_lengths", "kv_lengths"])
def test_tensors_on_the_host_are_refused(name: str) -> None:
    q = torch.randn(2, 4, 5, 64, device="cuda", dtype=BF16)
    host = {
        "k": q.cpu(), "v": q.cpu(), "mask": torch.ones(5, 5).bool(), "sinks": torch.zeros(4),
        "q_lengths": torch.ones(2, dtype=torch.int32), "kv_lengths": torch.ones(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{name}: expected device cuda:0 as of q"):
        attend(**{"q": q, "k": q, "v": q, name: host[name]})


def test_float32_is_not_tf32(seed: int) -> None:
    """True float32 unless torch's own switch allows less."""
    case = BASE.but(dtype=FP32, grads="qkv")
    assert not torch.backends.cuda.matmul.allow_tf32
    for backend, one in (("torch", case), ("reference", case), ("decode", case.but(q_len=4, grads=""))):
        inputs = make(one, "cuda", seed)
        assert not refusals(inputs, backend)
        assert_right(one, inputs, run(inputs, backend))
