"""What only a GPU can show: CUDA graphs, streams, threads, compiled code, memory, and no waiting for the device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import BF16, FP32, Case, Inputs, errors, make, refusals, relative_error, run, truth
from torch import Tensor

import fastattn
from fastattn import Intervals, dispatch

# Here the reference is asked for on purpose.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")]

attend = fastattn.scaled_dot_product_attention
BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16, mask="causal")
DECODE = BASE.but(q_len=1, kv_len=700)
BACKENDS = ("decode", "cudnn", "torch", "reference")
#: Calls whose masks are data on the device, and that every backend serves.
ON_DEVICE = {
    "causal": DECODE,
    "lengths": DECODE.but(kv_lengths=(700, 33)),
    "intervals": DECODE.but(mask="intervals:bq", q_len=2),
    "window": DECODE.but(window=(100, 0), kv_lengths=(650, 700), q_len=3),
    "bool": DECODE.but(mask="bool:b1qk", q_len=4),
    "additive": DECODE.but(mask="additive:b11k"),
}


def right(case: Case, inputs: Inputs, got: dict[str, Tensor], want: dict[str, Tensor] | None = None) -> None:
    found = errors(case, inputs, got, truth(inputs) if want is None else want)
    assert max(found.values()) <= 1, f"{case}: shares of the accepted error: {found}"


def refill(inputs: Inputs, case: Case, seed: int) -> Inputs:
    """New data in the same memory; returns what it was copied from."""
    fresh = make(case, "cuda", seed)
    pairs = [(getattr(inputs, n), getattr(fresh, n)) for n in ("q", "k", "v", "grad_out", "grad_lse")]
    for name, x in inputs.options.items():
        pairs += zip(
            *(list(o[name]) if isinstance(x, Intervals) else [o[name]] for o in (inputs.options, fresh.options))
        )
    with torch.no_grad():
        for old, new in pairs:
            if isinstance(old, Tensor):
                old.copy_(new)
    return fresh


def capture(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # builds what has to be built: a capture records only what runs
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_graph_reads_its_masks_when_it_is_replayed(name: str, backend: str, seed: int) -> None:
    case = ON_DEVICE[name]
    inputs = make(case, "cuda", seed)
    graph, results = capture(lambda: run(inputs, backend, poison=False))
    kv_lengths = ((700, 700), (1, 512), (0, 69)) if case.kv_lengths else (None,) * 3
    for turn, lengths in enumerate(kv_lengths):
        again = case.but(kv_lengths=lengths)
        fresh = refill(inputs, again, seed + 1 + turn)
        results["out"].fill_(torch.nan)
        graph.replay()
        right(again, fresh, results)


@pytest.mark.parametrize("backend", ["cudnn", "torch", "reference"])
@pytest.mark.parametrize("case", [BASE, BASE.but(kv_lengths=(129, 20)), BASE.but(mask="bool:b1qk")], ids=str)
def test_graph_of_a_training_step(case: Case, backend: str, seed: int) -> None:
    case = case.but(grads="qkv")
    inputs = make(case, "cuda", seed)
    graph, results = capture(lambda: run(inputs, backend, poison=False))
    for turn in (1, 2):
        fresh = refill(inputs, case, seed + turn)
        graph.replay()
        right(case, fresh, results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grads", ["", "qkv"])
def test_works_on_the_current_stream(grads: str, backend: str, seed: int) -> None:
    """The inputs become right late, on a stream of their own: work on any other stream would read NaN."""
    case = (DECODE if backend == "decode" else BASE).but(grads=grads)
    if backend == "decode" and grads:
        pytest.skip("decode has no gradients")
    inputs = make(case, "cuda", seed)
    values = [x.detach().clone() for x in (inputs.q, inputs.k, inputs.v)]
    want = truth(inputs)
    run(inputs, backend)  # builds plans and kernels, so that nothing but the stream holds the next call up
    with torch.no_grad():
        for x in (inputs.q, inputs.k, inputs.v):
            x.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: about 60 ms
        with torch.no_grad():
            for x, value in zip((inputs.q, inputs.k, inputs.v), values):
                x.copy_(value)
        got = run(inputs, backend, poison=False)
    stream.synchronize()
    right(case, inputs, got, want)


@pytest.mark.parametrize("backend", ["decode", "cudnn", "torch"])
def test_threads_with_streams_of_their_own(backend: str, seed: int) -> None:
    base = DECODE if backend == "decode" else BASE.but(grads="qkv")
    cases = [base.but(kv_len=base.kv_len + n, q_len=1 if backend == "decode" else 129 + n) for n in range(4)]
    prepared = [(case, make(case, "cuda", seed + n)) for n, case in enumerate(cases)]
    wants = [truth(inputs) for _, inputs in prepared]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(12):
                    n = (index + turn) % len(cases)
                    case, inputs = prepared[n]
                    found = errors(case, inputs, run(inputs, backend, poison=False), wants[n])
                    if max(found.values()) > 1:
                        failures.append(f"thread {index}, turn {turn}, {case}: {found}")
        except Exception as error:
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, torch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_nothing_is_read_on_the_host(name: str, backend: str, seed: int) -> None:
    case = ON_DEVICE[name].but(grads="" if backend == "decode" else "qkv")
    inputs = make(case, "cuda", seed)
    run(inputs, backend)
    with no_waiting():
        got = run(inputs, backend, poison=False)
    right(case, inputs, got)


def test_varlen_reads_nothing_on_the_host() -> None:
    q, k = (torch.randn(300, h, 64, device="cuda", dtype=BF16) for h in (8, 2))
    cu = torch.tensor([0, 100, 100, 257, 300], dtype=torch.int32, device="cuda")
    fastattn.varlen_attention(q, k, k, cu, cu, causal=True)
    with no_waiting():
        got = fastattn.varlen_attention(q, k, k, cu, cu, causal=True)
    want = fastattn.varlen_attention(q.double(), k.double(), k.double(), cu, cu, causal=True)
    assert relative_error(got, want) < 4e-3


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
        before = fastattn.stats()["calls"].get("cudnn.backward", 0)
        got = step(*arguments)
        want = _block(*arguments)
        assert got.stride() == want.stride()
        assert relative_error(got, want) < 0.01
        for g, w in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
            assert relative_error(g, w) < 0.02
        assert fastattn.stats()["calls"]["cudnn.backward"] == before + 2


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
        assert fastattn.explain(q, k, v, mask="causal").chosen == "cudnn"
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
@pytest.mark.parametrize("backend", ["decode", "cudnn"])
def test_deterministic_algorithms(case: Case, backend: str, seed: int) -> None:
    case = case.but(q_len=1) if backend == "decode" else case.but(grads="qkv")
    inputs = make(case, "cuda", seed)
    want = truth(inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(inputs, backend)
        for _ in range(3):
            again = run(inputs, backend)
            assert all(torch.equal(x, first[name]) for name, x in again.items())
    finally:
        torch.use_deterministic_algorithms(False)
    right(case, inputs, first, want)


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
    assert chosen(BASE) == "cudnn"
    assert chosen(BASE.but(grads="qkv")) == "cudnn"
    assert chosen(DECODE.but(grads="qkv")) == "cudnn"
    assert chosen(BASE.but(dtype=FP32)) == "torch"
    assert chosen(BASE.but(softcap=1.0)) == "reference"
    with fastattn.use_backend("torch"):
        assert chosen(BASE) == "torch"


def test_cudnn_switched_off(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    inputs = make(BASE, "cuda", seed)
    assert fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options).chosen == "torch"
    right(BASE, inputs, run(inputs))


def test_the_reference_warns_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    q = torch.randn(1, 2, 200, 64, device="cuda", dtype=BF16)
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
        right(one, inputs, run(inputs, backend))
