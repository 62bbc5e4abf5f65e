"""A mask that takes no memory until something computes with it, and then is eager's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import tiny_models  # noqa: F401  (registers "fastattn", quietly)
import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sliding_window_causal_mask_function

from fastattn.integrations.transformers import attention_forward, interval_mask
from fastattn.integrations.transformers.lazy_mask import LazyMask, compact_of

B, S = 2, 7
LEFT_PADDED = torch.arange(S) >= torch.tensor([[0], [3]])


def lazy(padded: bool = True) -> Tensor:
    return interval_mask(B, S, S, attention_mask=LEFT_PADDED if padded else None, dtype=torch.bfloat16)


def eager(padded: bool = True) -> Tensor:
    return eager_mask(B, S, S, attention_mask=LEFT_PADDED if padded else None, dtype=torch.bfloat16)


#: What models do with masks, and what they must find.
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda m: torch.randn(B, 3, S, S, generator=torch.Generator().manual_seed(1)) + m,
    "slice of queries": lambda m: m[:, :, 2:5],
    "slice of keys": lambda m: m[..., :4],
    "index": lambda m: m[:, 0],
    "expand": lambda m: m.expand(B, 4, S, S),
    "cat": lambda m: torch.cat([m, torch.zeros(B, 1, S, 2, dtype=m.dtype)], -1),
    "pad": lambda m: torch.nn.functional.pad(m, (0, 2)),
    "masked_fill": lambda m: m.masked_fill(torch.eye(S, dtype=torch.bool), -1.0),
    "compare": lambda m: m == 0,
    "to dtype": lambda m: m.to(torch.float32),
    "bool": lambda m: m.bool(),
    "where": lambda m: torch.where(m < 0, 1.0, 2.0),
    "out": lambda m: torch.mul(m, 0.5, out=torch.empty(B, 1, S, S, dtype=m.dtype)),
    "stack": lambda m: torch.stack([m, m]),
    "softmax": lambda m: m.float().softmax(-1),
    "repeat_interleave": lambda m: m.repeat_interleave(2, 0),
    "clone": lambda m: m.clone(),
    "numpy": lambda m: torch.from_numpy(m.half().numpy()),
    "tolist": lambda m: torch.tensor(m.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "baddbmm": lambda m: torch.baddbmm(m[:, 0], torch.ones(B, S, 2).to(m.dtype), torch.ones(B, 2, S).to(m.dtype)),
}
#: Those that make a view of the dense mask on their way, or (pickle) what a shallow copy makes as well.
VIEWS = {"pickle", "slice of queries", "slice of keys", "index", "expand", "repeat_interleave", "baddbmm"}


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
@pytest.mark.parametrize("name", READS)
def test_operations_see_the_mask_of_eager(name: str, padded: bool) -> None:
    mask = lazy(padded)
    found = READS[name](mask)
    assert not isinstance(found, LazyMask)
    expected = READS[name](eager(padded))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert (compact_of(mask) is None) == (name in VIEWS), "who holds a view may write into it, unseen"


WRITES: dict[str, Callable[[Tensor], object]] = {
    "setitem": lambda m: m.__setitem__((slice(None), slice(None), slice(2, 4)), 0.0),
    "setitem of a part": lambda m: m[0].__setitem__((0, 3), -1.0),
    "masked_fill_": lambda m: m.masked_fill_(torch.eye(S, dtype=torch.bool), -5.0),
    "add_": lambda m: m.add_(1.0),
    "iadd": lambda m: m.__iadd__(torch.ones(S, dtype=m.dtype)),
    "copy_": lambda m: m.copy_(torch.ones(B, 1, S, S)),
    "out": lambda m: torch.add(torch.ones(B, 1, S, S, dtype=m.dtype), 1.0, out=m),
    "view": lambda m: m.view(B, S, S)[1].zero_(),
    "slice of everything": lambda m: m[:, :, :, :S].zero_(),
    "setitem of an alias": lambda m: m[:, :, :, : S + 3].__setitem__((slice(None), slice(None), 1), 7.0),
    "detached": lambda m: m.detach().add_(1.0),
    "alias of a mask that was read": lambda m: (m + 1, m[:].zero_()),
    "shallow copy": lambda m: copy.copy(m)[..., 0].fill_(-5.0),
    "unsafe_chunk": lambda m: m.unsafe_chunk(2)[0].fill_(0),
    "foreach": lambda m: torch._foreach_add_([m], 2.0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_in_place_writes_reach_attention(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        mask, expected = lazy(), eager()
        WRITES[name](mask)
        WRITES[name](expected)
        assert torch.equal(mask + 0, expected)
        assert compact_of(mask) is None
        q = torch.randn(B, 3, S, 8)
        layer = torch.nn.Module()
        found, _ = attention_forward(layer, q, q, q, mask)
        assert torch.equal(found, attention_forward(layer, q, q, q, expected)[0])


def test_gradients_of_in_place_writes() -> None:
    q, found = torch.randn(B, 3, S, 8), []
    for make in (lazy, eager):
        mask, bias = make(False).float(), torch.linspace(-1, 1, S).requires_grad_()
        mask = interval_mask(B, S, S) if make is lazy else mask
        mask += bias
        attention_forward(torch.nn.Module(), q, q, q, mask)[0].square().sum().backward()
        found.append(bias.grad)
    torch.testing.assert_close(*found)


def test_in_place_operations_return_the_mask() -> None:
    mask = lazy()
    assert mask.mul_(2.0) is mask
    assert compact_of(mask) is None


@pytest.mark.parametrize(
    "anew",
    [
        lambda m: m[:, :, :, :S],
        lambda m: m[:, :, :, : S + 5],
        lambda m: m[:],
        lambda m: m.detach(),
        lambda m: m.to("cpu"),
        lambda m: m.to(m.dtype),
        lambda m: m.contiguous(),
        lambda m: m.to("meta"),
    ],
)
def test_aliases_and_copies_stay_lazy(anew: Callable[[Tensor], Tensor]) -> None:
    mask = anew(lazy())
    assert isinstance(mask, LazyMask)
    assert mask._state.dense is None
    assert compact_of(mask).visible.lo.device == mask.device


def test_metadata_is_that_of_eagers_mask() -> None:
    mask, expected = lazy(), eager()
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad"):
        assert getattr(mask, name) == getattr(expected, name)
    assert mask.size() == expected.size() and mask.stride() == expected.stride()
    assert mask.is_floating_point() and mask.is_contiguous()
    assert isinstance(mask, Tensor)
    assert "LazyMask" in repr(mask)


def test_gradients_of_scores_plus_mask() -> None:
    scores = torch.randn(B, 1, S, S, requires_grad=True)
    ((scores + lazy(False).float()).softmax(-1) * torch.arange(S)).sum().backward()
    found, scores.grad = scores.grad, None
    ((scores + eager(False).float()).softmax(-1) * torch.arange(S)).sum().backward()
    assert torch.equal(found, scores.grad)


class Attend(torch.nn.Module):
    """A model in little: makes its mask and hands it to two layers, or computes with it before."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda mask: mask, window: int | None = None) -> None:
        super().__init__()
        self.change, self.window = change, window

    def forward(self, x: Tensor) -> Tensor:
        arguments = {} if self.window is None else {"mask_function": sliding_window_causal_mask_function(self.window)}
        mask = self.change(interval_mask(x.shape[0], x.shape[2], x.shape[2], dtype=x.dtype, **arguments))
        for _ in range(2):
            x = attention_forward(self, x, x, x, mask)[0].transpose(1, 2)
        return x


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda mask: mask,
    "bias": lambda mask: mask + torch.linspace(0, 3, mask.shape[-1]),
    "cut": lambda mask: mask[:, :, :, : mask.shape[-1]],
    "hidden": lambda mask: mask.masked_fill(torch.arange(mask.shape[-1]) % 3 == 1, -torch.inf),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_compiled(change: str, window: int | None) -> None:
    torch._dynamo.reset()
    model = Attend(CHANGES[change], window)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8, 11):
        x = torch.randn(2, 3, length, 8)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_graph_drops_the_dense_mask() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graph.graph.eliminate_dead_code()
        graphs.append(str(graph.graph))
        return graph

    torch.compile(Attend(), fullgraph=True, backend=backend)(torch.randn(2, 3, 9, 8))
    torch.compile(Attend(CHANGES["bias"]), fullgraph=True, backend=backend)(torch.randn(2, 3, 9, 8))
    assert ["where" in graph for graph in graphs] == [False, True]


def test_layers_compiled_one_by_one() -> None:
    """Regional compilation: the mask comes from outside of the graph."""
    torch._dynamo.reset()
    layer = torch.nn.Module()
    run = torch.compile(lambda q, mask: attention_forward(layer, q, q, q, mask)[0], backend="aot_eager")
    for padded in (False, True):
        q, mask = torch.randn(B, 3, S, 8), lazy(padded)
        torch.testing.assert_close(run(q, mask), attention_forward(layer, q, q, q, mask)[0])


def test_exported() -> None:
    x = torch.randn(2, 3, 9, 8)
    dim = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Attend(), (x,), dynamic_shapes=({2: dim},))
    for length in (9, 14):
        x = torch.randn(2, 3, length, 8)
        torch.testing.assert_close(program.module()(x), Attend()(x))
