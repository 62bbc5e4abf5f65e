"""A whole training step in one CUDA graph: forward, backward and optimizer, replayed on data that it has not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BF16, relative_error
from torch import Tensor, nn
from training_model import IGNORED, VOCABULARY, TinyLM, loss, next_tokens

import fastattn
from fastattn import Segments

# Here the reference is asked for on purpose.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")]

ROWS, LENGTH = 2, 129
BACKENDS = ("cudnn", "torch", "reference")
WARM_UP = 3  #: steps before the capture, which records only what has been built
SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_backend(request.param):
        yield request.param


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The op alone: parameters in bfloat16 would round the steps that are to be compared."""
    return fastattn.scaled_dot_product_attention(q.to(BF16), k.to(BF16), v.to(BF16), **options).to(q.dtype)


def without_sinks(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor, **options: Any) -> Tensor:
    return in_bfloat16(q, k, v, **options)


def model(backend: str) -> TinyLM:
    """With heads of 64. torch's kernels take no sinks, so there they stay out."""
    torch.manual_seed(1)
    return TinyLM(without_sinks if backend == "torch" else in_bfloat16, width=256, longest=LENGTH).cuda()


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and labels `[ROWS, LENGTH]`, and the left padding of each row, which differs from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    padding = torch.randint(0, LENGTH // 2, (ROWS,), generator=generator, dtype=torch.int32)
    labels = next_tokens(ids).masked_fill(torch.arange(LENGTH) < padding[:, None], IGNORED)
    return ids.cuda(), labels.cuda(), padding.cuda()


def value(net: nn.Module, padded: bool, ids: Tensor, labels: Tensor, padding: Tensor) -> Tensor:
    mask = Segments.left_padded(padding, LENGTH, LENGTH) if padded else "causal"
    return loss(net(ids, mask=mask), labels) / labels.numel()


def on_a_side_stream(work: Callable[[], None]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def moved(net: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    return {name: (p - s).detach() for (name, p), s in zip(net.named_parameters(), start.parameters())}


def assert_moved_alike(net: nn.Module, eager: nn.Module, start: nn.Module) -> None:
    """Compares how far the parameters went in all steps, not where they are: that is mostly where they started."""
    got, want = moved(net, start), moved(eager, start)
    largest = max(float(x.norm()) for x in want.values())
    for name, x in want.items():
        assert relative_error(got[name], x, floor=largest / 20) < 0.02, name


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "left-padding"])
def test_captured_training_step(backend: str, padded: bool) -> None:
    """Forward, backward and SGD in one graph: the losses and the parameters of eager steps on the same data."""
    start = model(backend)
    net, eager = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [torch.optim.SGD(m.parameters(), **SETTINGS) for m in (net, eager)]
    static = [x.clone() for x in batch(0)]

    def warm_up() -> None:
        for _ in range(WARM_UP):
            optimizers[0].zero_grad(set_to_none=True)
            value(net, padded, *static).backward()
            optimizers[0].step()

    on_a_side_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)  # so that the gradients lie in the graph's memory
    with torch.cuda.graph(graph):
        captured = value(net, padded, *static)
        captured.backward()
        optimizers[0].step()
    seeds = [0] * WARM_UP + [1, 2, 3]
    for turn, seed in enumerate(seeds):
        data = batch(seed)
        optimizers[1].zero_grad()
        want = value(eager, padded, *data)
        want.backward()
        optimizers[1].step()
        if turn < WARM_UP:  # these the other model has made before its capture
            continue
        for old, new in zip(static, data):
            old.copy_(new)
        graph.replay()
        assert abs(captured.item() / want.item() - 1) < 0.01
    assert_moved_alike(net, eager, start)


def test_make_graphed_callables(backend: str) -> None:
    """torch's own way: a module whose forward and backward are graphs, inside a training step that is not."""
    start = model(backend)
    eager, net = copy.deepcopy(start).layers[0], copy.deepcopy(start).layers[0]

    class Causal(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, {"mask": "causal"})

    def data() -> Tensor:
        return torch.randn(ROWS, LENGTH, 256, device="cuda", requires_grad=True)

    used = {name for name, _ in net.named_parameters() if not (backend == "torch" and name.endswith("sinks"))}
    for name, p in net.named_parameters():
        p.requires_grad_(name in used)  # make_graphed_callables wants a gradient for every parameter
    graphed = torch.cuda.make_graphed_callables(Causal(net), (data(),))
    for _ in range(3):
        x = data()
        y = x.detach().clone().requires_grad_()
        upstream = torch.randn_like(x)
        got, want = graphed(x), Causal(eager)(y)
        net.zero_grad()
        eager.zero_grad()
        got.backward(upstream)
        want.backward(upstream)
        assert relative_error(got, want) < 0.01
        assert relative_error(x.grad, y.grad) < 0.02
        wanted = dict(eager.named_parameters())
        for name, p in net.named_parameters():
            if name in used:
                assert relative_error(p.grad, wanted[name].grad) < 0.02, name
