"""Training through the op in the ways in which PyTorch trains: each is the plain training step, or says that it is not.

The model is `training_model.TinyLM`, whose sinks are Parameters; the reference is the same model on plain attention.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, Case, make, refusals, relative_error, run
from features import FEATURES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel
from training_model import IGNORED, VOCABULARY, TinyLM, loss, next_tokens, plainly

import fastattn
from fastattn import Intervals, Segments

pytestmark = pytest.mark.usefixtures("way")

attend = fastattn.scaled_dot_product_attention
Moved = dict[str, Tensor]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the machine's."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def model(attention: Callable[..., Any] = attend, **options: Any) -> TinyLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TinyLM(attention, **options)


def batch(rows: int = 4, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and labels `[rows, length]`, left-padded, and the padding of each row, int32 `[rows]`."""
    ids = torch.randint(1, VOCABULARY, (rows, length))
    padding = torch.arange(rows, dtype=torch.int32) * 2 % (length - 2)
    labels = next_tokens(ids).masked_fill(torch.arange(length) < padding[:, None], IGNORED)
    return ids, labels, padding


def mean_loss(net: nn.Module, ids: Tensor, labels: Tensor, padding: Tensor) -> Tensor:
    width = ids.shape[1]
    positions = (torch.arange(width) - padding[:, None]).clamp(min=0)
    logits = net(ids, positions, mask=Segments.left_padded(padding, width, width))
    return loss(logits, labels) / (labels != IGNORED).sum()


def gradients(net: nn.Module) -> Moved:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_close(got: Moved, want: Moved, tolerance: float) -> None:
    assert got.keys() == want.keys() and want
    largest = max(float(x.norm()) for x in want.values())
    for name, x in want.items():
        assert relative_error(got[name], x, floor=largest / 100) < tolerance, name


def assert_same_bits(got: Moved, want: Moved) -> None:
    assert got.keys() == want.keys() and want
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


# -- lower precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(BF16, 0.06), (FP16, 0.01)], ids=["bf16", "fp16"])
def test_autocast(dtype: torch.dtype, tolerance: float) -> None:
    """Forward and backward within what the dtype's rounding costs in all layers; parameters and gradients float32."""
    data = batch()
    want, net = model(plainly), model()
    want_loss = mean_loss(want, *data)
    want_loss.backward()
    with torch.autocast("cpu", dtype):
        got_loss = mean_loss(net, *data)
    got_loss.backward()
    assert abs(got_loss.item() / want_loss.item() - 1) < tolerance
    assert {x.dtype for x in gradients(net).values()} == {FP32}
    assert_close(gradients(net), gradients(want), tolerance)


def test_grad_scaler() -> None:
    """Scaled float16 steps move the parameters as float32 steps do."""
    data = [batch() for _ in range(2)]
    moved = []
    for attention, lower in ((plainly, False), (attend, True)):
        net = model(attention)
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=lower)
        for one in data:
            with torch.autocast("cpu", FP16, enabled=lower):
                value = mean_loss(net, *one)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        moved.append({name: p.detach() - start[name] for name, p in net.named_parameters()})
    assert_close(moved[1], moved[0], 0.02)


def test_grad_scaler_skips_steps_that_overflow() -> None:
    data, net = batch(), model()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-10)
    scales = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", FP16):
            value = mean_loss(net, *data)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        now = {name: p.detach() for name, p in net.named_parameters()}
        if len(scales) == 1:
            assert_same_bits(now, start)
    assert scales[0] == 2.0**30, "the first step overflows"
    assert scales[-1] == scales[-2], "the last one does not"
    assert all(torch.isfinite(x).all() for x in now.values())
    assert not torch.equal(now["layers.0.attention.sinks"], start["layers.0.attention.sinks"])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_overflow_upstream_is_not_hidden(backend: str, value: float) -> None:
    """What a GradScaler looks for must come through, from any row that sees a key."""
    for row in (0, 7):
        q, k, v = (torch.randn(1, 2, 8, 8, requires_grad=True) for _ in range(3))
        upstream = torch.zeros(1, 2, 8, 8)
        upstream[0, 0, row, 0] = value
        found = torch.autograd.grad(attend(q, k, v, mask="causal", backend=backend), (q, k, v), upstream)
        assert not torch.isfinite(found[2]).all()


# -- ways of computing the same step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_gradient_accumulation(rows: int) -> None:
    ids, labels, padding = batch()
    want, net = model(plainly), model()
    mean_loss(want, ids, labels, padding).backward()
    total = int((labels != IGNORED).sum())
    for part in zip(ids.split(rows), labels.split(rows), padding.split(rows)):
        (mean_loss(net, *part) * ((part[1] != IGNORED).sum() / total)).backward()
    assert_close(gradients(net), gradients(want), 1e-4)


@pytest.mark.parametrize("trained", ["sinks", "qkv", "tokens", "head"])
def test_only_some_parameters_are_trained(trained: str) -> None:
    data = batch()
    nets = model(plainly), model()
    for net in nets:
        for name, p in net.named_parameters():
            p.requires_grad_(trained in name)
        mean_loss(net, *data).backward()
    assert_close(gradients(nets[1]), gradients(nets[0]), 1e-4)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_saved_tensors_offloaded(use_reentrant: bool | None) -> None:
    data = batch()
    found = []
    for context in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        net = model(use_reentrant=use_reentrant)
        with context:
            mean_loss(net, *data).backward()
        found.append(gradients(net))
    assert_same_bits(found[1], found[0])


def test_functional_call() -> None:
    """With parameters that are no Parameters, and with gradients for them."""
    data, other = batch(), model()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, *one: Tensor) -> Tensor:
            return mean_loss(self.net, *one)

    owner = Loss()
    value = torch.func.functional_call(owner, {f"net.{name}": x for name, x in given.items()}, data)
    found = dict(zip(given, torch.autograd.grad(value, list(given.values()))))
    mean_loss(other, *data).backward()
    assert_same_bits(found, gradients(other))
    assert all(p.grad is None for p in owner.parameters())


# -- copies ------------------------------------------------------------------------------------------------------------


def step(net: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> None:
    net.zero_grad()
    mean_loss(net, *data).backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copied_module_trains_on_by_itself(duplicate: Callable[[TinyLM], TinyLM]) -> None:
    data, net = batch(), model()
    step(net, data)
    twin = duplicate(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(twin, data)
    assert_same_bits({name: p.detach() for name, p in net.named_parameters()}, before)
    step(net, data)
    assert_same_bits(dict(twin.named_parameters()), dict(net.named_parameters()))
    assert isinstance(twin.layers[0].attention.sinks, nn.Parameter)


def test_averaged_weights() -> None:
    data, net = batch(), model()
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    first = net.layers[0].attention.sinks.detach().clone()
    step(net, data)
    average.update_parameters(net)
    sinks = average.module.layers[0].attention.sinks
    torch.testing.assert_close(sinks, (first + net.layers[0].attention.sinks) / 2)
    assert torch.isfinite(mean_loss(average, *data))


# -- compiled ----------------------------------------------------------------------------------------------------------


def segments(padding: Tensor, width: int) -> dict[str, Any]:
    return {"mask": Segments.left_padded(padding, width, width)}


def intervals(padding: Tensor, width: int) -> dict[str, Any]:
    hi = torch.arange(1, width + 1, dtype=torch.int32).expand(padding.shape[0], width)
    return {"mask": Intervals(padding[:, None].expand_as(hi), hi)}


def packed(padding: Tensor, width: int) -> dict[str, Any]:
    """One row, cut where the paddings would have ended."""
    inner = (padding + 1).sort().values
    return {"mask": Segments.packed(torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), width)]), causal=True)}


def right_padded(padding: Tensor, width: int) -> dict[str, Any]:
    return {"mask": "causal", "q_lengths": width - padding, "kv_lengths": width - padding}


@pytest.mark.parametrize("where, dynamic", [("inside", True), ("outside", False)], ids=["inside", "outside"])
@pytest.mark.parametrize("options_of", [segments, intervals, packed, right_padded])
def test_compiled_training_step(options_of: Callable[..., Any], where: str, dynamic: bool) -> None:
    """One graph, the mask built inside of it or outside; other paddings, and when it is dynamic other lengths, do not
    make another."""
    torch._dynamo.reset()
    nets = model(layers=1), model(layers=1)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]

    def value(net: nn.Module, ids: Tensor, labels: Tensor, padding: Tensor, options: Any) -> Tensor:
        options = options_of(padding, ids.shape[1]) if options is None else options
        return loss(net(ids, **options), labels) / (labels != IGNORED).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(value, fullgraph=True, backend=counter, dynamic=dynamic)
    compiles = 0
    for turn in range(3):
        ids, labels, padding = batch(1 if options_of is packed else 3, 12 + turn * dynamic)
        padding = torch.randperm(8)[:3].int()
        if options_of is right_padded:
            labels = next_tokens(ids).masked_fill(
                torch.arange(ids.shape[1]) >= ids.shape[1] - padding[:, None], IGNORED
            )
        options = options_of(padding, ids.shape[1]) if where == "outside" else None
        found = []
        for function, net, optimizer in zip((value, compiled), nets, optimizers):
            optimizer.zero_grad()
            result = function(net, ids, labels, padding, options)
            result.backward()
            optimizer.step()
            found.append({"loss": result.detach()} | gradients(net))
        assert_close(found[1], found[0], 1e-5)
        compiles = compiles or counter.frame_count  # torch itself may need two to learn which numbers are constant
    assert_close(*({name: p.detach() for name, p in net.named_parameters()} for net in nets), 1e-5)
    assert counter.frame_count == compiles <= 2


def test_compiled_checkpoints() -> None:
    torch._dynamo.reset()
    data = batch()
    want, net = model(layers=1), model(layers=1, use_reentrant=False)
    mean_loss(want, *data).backward()
    torch.compile(mean_loss, fullgraph=True, backend="aot_eager")(net, *data).backward()
    assert_close(gradients(net), gradients(want), 1e-5)


# -- deterministic algorithms ------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch raises where an operation has no deterministic form; two threads, so that order could matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


LONG = Case(batch=1, q_len=150, kv_len=150, dtype=FP32)
DETERMINISTIC = FEATURES | {
    "long": LONG,
    "long-lengths": LONG.but(q_lengths=(99,), kv_lengths=(101,), mask="causal", sinks=FP32),
    "long-segments": LONG.but(mask="segments:3c"),
    "long-intervals": LONG.but(mask="intervals:bq"),
    "long-additive": LONG.but(mask="additive:1h1k"),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_equal_bits_twice(name: str, deterministic: None) -> None:
    """No operation on the way raises under torch's switch, and none gives other bits the second time."""
    for backend in ("torch", "reference"):
        case = DETERMINISTIC[name].but(dtype=FP32)
        inputs = make(case.but(grads="qkv" if backend == "torch" else case.leaves))
        if backend == "torch" and refusals(inputs, backend):
            continue
        first, second = ({n: x.clone() for n, x in run(inputs, backend).items()} for _ in range(2))
        assert set(inputs.leaves) <= {n.removeprefix("d") for n in first}
        assert_same_bits(first, second)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_training_twice_gives_equal_bits(use_reentrant: bool | None, deterministic: None) -> None:
    data = [batch() for _ in range(3)]
    found = []
    for _ in range(2):
        net = model(use_reentrant=use_reentrant)
        for one in data:
            step(net, one)
        found.append({name: p.detach() for name, p in net.named_parameters()})
    assert_same_bits(*found)


# -- what attention cannot do, and what it can -------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_a_gradient_penalty(use_reentrant: bool | None) -> None:
    """No term is left out."""

    def penalty(net: TinyLM) -> Tensor:
        value = mean_loss(net, *data)
        found = torch.autograd.grad(value, net.tokens.weight, create_graph=True)[0]
        return value + found.square().sum()

    data = batch()
    plain, mine = model(plainly), model(use_reentrant=use_reentrant)
    penalty(plain).backward()
    penalty(mine).backward()
    for (name, p), (_, want) in zip(mine.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)


class Biased(nn.Module):
    """One layer of attention whose additive mask is made of a Parameter.

    kind: "alibi", a slope for each head; "t5", a bias for each head and bucket of distances; "keys", a Parameter that
    is the mask itself, broadcast over batch entries and queries; "relative", one for all heads and rows.
    """

    def __init__(self, kind: str, attention: Callable[..., Any], heads: int = 4, length: int = 10) -> None:
        super().__init__()
        self.kind, self.attention, self.heads = kind, attention, heads
        self.qkv = nn.Linear(16, 3 * 16)
        shapes = {"alibi": (heads, 1, 1), "t5": (4, heads), "keys": (heads, 1, length), "relative": (length, length)}
        self.bias = nn.Parameter(torch.randn(shapes[kind]))
        distance = (torch.arange(length)[None] - torch.arange(length)[:, None]).abs()
        self.register_buffer("distance", distance)

    def mask(self) -> Tensor:
        if self.kind == "alibi":
            return -self.bias * self.distance
        if self.kind == "t5":
            buckets = self.distance.clamp(min=1).log2().long()
            return self.bias[buckets].permute(2, 0, 1)[None]
        return self.bias

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attention(q, k, v, mask=self.mask(), window=(-1, 0) if causal else None)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("kind", ["alibi", "t5", "keys", "relative"])
def test_learning_a_bias(kind: str, causal: bool) -> None:
    """A student learns a teacher's bias: the loss falls, step by step as plain attention's does."""
    x = torch.randn(3, 10, 16)
    teacher = Biased(kind, plainly)
    with torch.no_grad():
        teacher.qkv.weight.mul_(3)
        goal = teacher(x, causal)
    losses, slopes = [], []
    for attention in (plainly, attend):
        student = copy.deepcopy(teacher)
        student.attention = attention
        student.qkv.requires_grad_(False)
        with torch.no_grad():
            student.bias.zero_()
        optimizer = torch.optim.Adam([student.bias], lr=0.1)
        values, grads = [], []
        for _ in range(15):
            optimizer.zero_grad()
            value = (student(x, causal) - goal).square().mean()
            value.backward()
            optimizer.step()
            values.append(value.item())
            grads.append(student.bias.grad.clone())
        losses.append(values)
        slopes.append(torch.stack(grads))
    assert losses[0][-1] < losses[0][0] / 2
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(*losses))
    assert relative_error(slopes[1].flatten(1), slopes[0].flatten(1)) < 1e-3  # Adam alone would not see their size
