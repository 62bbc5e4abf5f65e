"""liger-kernel's operations in one model: the same numbers, nothing else in the process changed, nothing left behind.

Its kernels run natively on a GPU and in Triton's interpreter on a CPU: the same tests.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

pytest.importorskip("liger_kernel")
import triton
import triton.language as tl

import fastattn
from benchmarks import train
from fastattn._compat import liger
from fastattn._compat.functions import with_globals
from fastattn._compat.transformers import activation as known_activation
from fastattn.bench import model as model_benchmark
from fastattn.cli import main as cli
from fastattn.lm import Engine, load, make_runner
from fastattn.lm.fused_ops import FusedOps, check_fused_ops, choose_fused_ops, find_fused_ops, rotary, use_fused_ops
from fastattn.lm.loading.loaded import Loaded
from fastattn.lm.loading.presets import PRESETS, preset_config
from fastattn.lm.runners.module import ModuleRunner

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
#: family -> what must be replaced in its tiny model
REPLACED = {
    "llama": ("LlamaMLP", "LlamaRMSNorm", "rope in LlamaAttention"),
    "mistral": ("MistralMLP", "MistralRMSNorm", "rope in MistralAttention"),
    "qwen3": ("Qwen3MLP", "Qwen3RMSNorm", "rope in Qwen3Attention"),
    "gemma2": ("Gemma2MLP", "Gemma2RMSNorm", "rope in Gemma2Attention"),
    "gemma3": ("Gemma3MLP", "Gemma3RMSNorm", "rope in Gemma3Attention"),
    "phi3": ("Phi3RMSNorm", "rope in Phi3Attention"),
    "gpt_oss": ("GptOssRMSNorm", "rope in GptOssAttention"),
    "olmo2": ("Olmo2MLP", "Olmo2RMSNorm"),
    "glm": ("GlmRMSNorm",),
    "cohere2": ("Cohere2MLP",),
}
MAIN = ("gemma2", "gemma3", "phi3", "llama", "gpt_oss")
#: Phi3 turns a part of each head only; more heads than a power of two.
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma2": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
}


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel, on a CPU as far as Triton's interpreter goes: it knows no libdevice and no numbers of Python's."""
    if GPU:
        return
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def scalar(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", scalar)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", rsqrt)
    for name in ("geglu", "cross_entropy"):
        monkeypatch.setattr(importlib.import_module(f"liger_kernel.ops.{name}"), "tanh", tanh)
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of liger-kernel's functions ran."""
    found: dict[str, int] = {}
    real = liger.operations()

    def counted(name: str) -> type:
        function = getattr(real, name)

        class Counted:
            @staticmethod
            def apply(*arguments: Any) -> Any:
                found[name] = found.get(name, 0) + 1
                return function.apply(*arguments)

        return Counted

    class Kernels:
        LigerRMSNormFunction = counted("LigerRMSNormFunction")
        LigerSiLUMulFunction = counted("LigerSiLUMulFunction")
        LigerGELUMulFunction = counted("LigerGELUMulFunction")
        LigerRopeFunction = counted("LigerRopeFunction")

    monkeypatch.setattr(liger, "operations", lambda: Kernels)
    return found


def model_of(family: str, attn: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """On the device, with norms' weights that are neither all 1 nor all 0."""
    model = build(family, attn, **CHANGES.get(family, {}), **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.rand(parameter.shape, generator=generator) - 0.5
    if family == "gpt_oss":
        model.set_experts_implementation("batched_mm")  # the one that a GPU has in float32, and that can be captured
    return model.to(DEVICE, dtype)


def ids_of(rows: int = 2, length: int = 11) -> Tensor:
    return tokens(rows, length).to(DEVICE)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What each module holds, hooks and all."""
    return [(module, dict(module.__dict__)) for module in model.modules()]


def same_state(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        a is b and list(x) == list(y) and all(x[key] is y[key] for key in x) for (a, x), (b, y) in zip(one, other)
    )


@pytest.mark.parametrize("family", REPLACED)
def test_same_logits(family: str, calls: dict[str, int]) -> None:
    model, ids = model_of(family), ids_of()
    expected = logits(model, ids)
    ops = use_fused_ops(model)
    assert ops.replaced == REPLACED[family]
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    layers = model.config.num_hidden_layers
    assert calls.get("LigerRopeFunction", 0) == layers * any("rope" in name for name in ops.replaced)
    assert calls.get("LigerSiLUMulFunction", 0) + calls.get("LigerGELUMulFunction", 0) == layers * any(
        name.endswith("MLP") for name in ops.replaced
    )
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert calls.get("LigerRMSNormFunction", 0) == norms
    ops.undo()
    calls.clear()
    assert torch.equal(logits(model, ids), expected)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float16])
@pytest.mark.parametrize("family", [family for family in MAIN if family != "gpt_oss"])  # whose router may tip
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """No further from float32 than transformers' own modules are, give or take."""
    model, ids = model_of(family, dtype=dtype), ids_of()
    truth = logits(copy.deepcopy(model).float(), ids)
    plain = logits(model, ids)
    with use_fused_ops(model):
        fused = logits(model, ids)
    assert fused.dtype == plain.dtype
    error, least = (torch.linalg.vector_norm(x.float() - truth) for x in (fused, plain))
    assert error <= 2 * least + 2e-3 * torch.linalg.vector_norm(truth)


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient)
        assert error <= 1e-4 * torch.linalg.vector_norm(gradient), name


@pytest.mark.parametrize("family", MAIN)
def test_gradients(family: str) -> None:
    model, ids = model_of(family), ids_of()
    expected = gradients(model, ids)
    with use_fused_ops(model):
        found = gradients(model, ids)
    assert_gradients(found, expected)


def test_gradient_checkpointing() -> None:
    """The forward that the backward repeats is the same one."""
    model, ids = model_of("gemma2"), ids_of()
    with use_fused_ops(model):
        expected = gradients(model, ids)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        found = gradients(model, ids)
    assert_gradients(found, expected)


@pytest.mark.parametrize("family", MAIN)
def test_nothing_else_changes(family: str) -> None:
    """Neither classes nor globals nor another model; and the model itself is what it was afterwards."""
    model, other, ids = model_of(family), model_of(family), ids_of()
    modeling = sys.modules[type(model).__module__]
    namespace = dict(vars(modeling))
    classes = {kind: dict(vars(kind)) for kind in {type(module) for module in model.modules()}}
    mine, others, expected = state(model), state(other), logits(other, ids)
    ops = use_fused_ops(model)
    assert not same_state(state(model), mine)
    assert torch.equal(logits(other, ids), expected)
    assert same_state(state(other), others)
    later = model_of(family)
    assert torch.equal(logits(later, ids), expected)
    logits(model, ids)

    def unchanged() -> bool:
        return vars(modeling) == namespace and all(dict(vars(kind)) == held for kind, held in classes.items())

    assert unchanged()
    ops.undo()
    assert unchanged() and same_state(state(model), mine)
    ops.undo()  # harmless
    assert same_state(state(model), mine)


def test_the_block_ends_with_an_error() -> None:
    model = model_of("gemma2")
    before = state(model)
    with pytest.raises(RuntimeError, match=r"[Ll]ong"), find_fused_ops(model):
        logits(model, ids_of().float())  # no indices
    assert same_state(state(model), before)


def test_a_module_with_its_own_forward_keeps_it() -> None:
    """A hook of accelerate's, or a kernel from the hub: before, and in between."""
    model = model_of("gemma2")
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    own = norm.forward = norm.forward
    ops = use_fused_ops(model)
    assert norm.forward is own
    inner = mlp.forward
    wrapped = mlp.forward = lambda x: inner(x)
    ops.undo()
    assert norm.forward is own and mlp.forward is wrapped


def test_a_copy_is_a_model_of_its_own() -> None:
    model, ids = model_of("gemma2"), ids_of()
    with use_fused_ops(model):
        twin = copy.deepcopy(model)
    expected = logits(twin, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin, ids), expected)


def test_unknown_models_are_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=99, n_positions=24, n_embd=32, n_layer=1, n_head=4))
    before = state(model)
    ops = use_fused_ops(model)
    assert ops.replaced == () and same_state(state(model), before)


class _Other(nn.Module):
    """Looks like a norm of Llama's, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states / torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Detached(_Other):
    """A norm of Llama's with another gradient."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class _Gated(_Other):
    """A norm of Llama's that takes a gate as well."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        x = hidden_states.float() * (1 if gate is None else gate)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class _MLP(nn.Module):
    """Looks like Llama's, and is not."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.change = known_activation("silu"), change

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.change == "clamped":
            gate, up = gate.clamp(max=10), up.clamp(-10, 10)
        if self.change == "dropout":
            gate = nn.functional.dropout(gate, 0.5, self.training)
        if self.change == "detached":
            gate = gate.detach()
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("kind", [_Other, _Detached, _Gated])
def test_norms_that_compute_otherwise_are_left_alone(kind: type[nn.Module]) -> None:
    assert find_fused_ops(nn.Sequential(kind())).replaced == ()


@pytest.mark.parametrize("change", ["none", "clamped", "dropout", "detached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_that_compute_otherwise_are_left_alone(change: str, dtype: torch.dtype) -> None:
    """Even where it shows only with large numbers, in training, or in the gradient."""
    model = nn.Sequential(_MLP(change).eval().to(dtype))
    assert find_fused_ops(model).replaced == (("_MLP",) if change == "none" else ())


def test_hooks_do_not_see_the_trials() -> None:
    model, seen = model_of("gemma2"), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    assert find_fused_ops(model).replaced == REPLACED["gemma2"]
    assert not seen


def test_what_computes_otherwise_is_left_alone() -> None:
    exact = model_of("gemma2", hidden_activation="gelu")  # liger-kernel's is the approximation by tanh
    assert find_fused_ops(exact).replaced == ("Gemma2RMSNorm", "rope in Gemma2Attention")


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_calls_that_the_kernels_cannot_take(family: str, calls: dict[str, int]) -> None:
    model, ids = model_of(family, dtype=torch.float64), ids_of()
    expected = logits(model, ids)
    with use_fused_ops(model):
        assert torch.equal(logits(model, ids), expected)
    assert not calls


def test_autocast() -> None:
    """The dtypes of all results stay as they were: norms of float32 weights, products in bfloat16."""
    model, ids = model_of("gemma2"), ids_of()
    seen: list[list[torch.dtype]] = []
    for name, module in model.named_modules():
        if not name.endswith("act_fn"):  # not called where its product with the other half is one operation
            module.register_forward_hook(lambda m, i, out: seen[-1].append(out.dtype) if torch.is_tensor(out) else None)
    for ops in (FusedOps(), find_fused_ops(model)):
        seen.append([])
        with ops, torch.autocast(DEVICE, torch.bfloat16):
            logits(model, ids)
    assert seen[0] == seen[1] and torch.bfloat16 in seen[0]


@pytest.mark.skipif(GPU, reason="without a GPU")
def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]) -> None:
    model, ids = model_of("gemma2"), ids_of()
    expected = logits(model, ids)
    assert choose_fused_ops(model, None).replaced == () == choose_fused_ops(model, False).replaced
    assert choose_fused_ops(model, True).replaced == REPLACED["gemma2"]  # in the interpreter
    monkeypatch.delenv("FASTATTN_INTERPRET")
    for refused in (lambda: choose_fused_ops(model, True), lambda: load("tiny", device="cpu", fused_ops=True)):
        with pytest.raises(ValueError, match="fused_ops: expected a model on a GPU, got one on cpu"):
            refused()
    with use_fused_ops(model):  # a model that was moved since
        assert torch.equal(logits(model, ids), expected)
    assert not calls


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    liger.operations.cache_clear()
    model = model_of("gemma2")
    asked: list[Callable[[], Any]] = [
        lambda: use_fused_ops(model),
        lambda: choose_fused_ops(model, True),
        lambda: load("tiny", fused_ops=True),
    ]
    for ask in asked:
        with pytest.raises(ImportError, match=r"pip install 'fastattn\[liger\]'"):
            ask()
    assert choose_fused_ops(model, None).replaced == ()


def test_installed_but_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(liger, "import_module", broken)
    liger.operations.cache_clear()
    with pytest.raises(ImportError, match="liger-kernel cannot be used here: no such device"):
        check_fused_ops(torch.device(DEVICE))


def test_a_forward_that_cannot_be_copied_keeps_its_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when transformers decorates it in another way: with a warning, and with the other operations."""

    model = model_of("gemma2")
    kind = type(model.model.layers[0].self_attn)
    held = {"forward": kind.forward}

    @functools.wraps(kind.forward)
    def indirect(*arguments: Any, **options: Any) -> Any:
        return held["forward"](*arguments, **options)

    monkeypatch.setattr(kind, "forward", indirect)
    with pytest.warns(fastattn.FastattnWarning, match=r"rotary embedding is not fused.*cannot be copied"):
        assert find_fused_ops(model).replaced == ("Gemma2MLP", "Gemma2RMSNorm")


@pytest.mark.parametrize("what", ["scores", "gate", "twice"])
def test_an_attention_that_uses_its_queries_otherwise_is_left_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel rotates in place: what a forward computes from the queries afterwards would be wrong."""
    model = model_of("llama")
    kind = type(model.model.layers[0].self_attn)
    modeling = sys.modules[kind.__module__]
    own: Any = modeling.ALL_ATTENTION_FUNCTIONS

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **rest: Any
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        before = q if what == "scores" else q.tanh() if what == "gate" else None
        turned, k = modeling_rope(q, k, *position_embeddings)
        if what == "twice":
            turned, k = modeling_rope(turned, k, *position_embeddings)
        attend = own.get_interface(self.config._attn_implementation, modeling.eager_attention_forward)
        out, _ = attend(self, turned if before is None else turned + before, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), None

    def modeling_rope(*arguments: Any) -> Any:
        return modeling.apply_rotary_pos_emb(*arguments)

    # As if it had been written in transformers' module: the names it uses are that module's globals.
    scope = {"modeling_rope": modeling.apply_rotary_pos_emb, "apply_rotary_pos_emb": modeling.apply_rotary_pos_emb}
    assert rotary.recognise(model.model.layers[0].self_attn) is rotary.ROPES[0]
    source = with_globals(forward, scope)
    monkeypatch.setattr(kind, "forward", source)
    assert rotary.recognise(model.model.layers[0].self_attn) is None


def test_the_loss_when_asked_for() -> None:
    """Without logits while it trains, with them otherwise; torch's and transformers' own are left alone."""
    model, ids = model_of("gemma2"), ids_of()
    entropy, expected = nn.functional.cross_entropy, gradients(model, ids)
    before, loss = state(model), model(ids, labels=ids).loss
    ops = find_fused_ops(model, loss=True)
    assert ops.replaced == (*REPLACED["gemma2"][:2], "loss of Gemma2ForCausalLM", *REPLACED["gemma2"][2:])
    with ops:
        made = model(ids, labels=ids)
        assert made.logits is None
        torch.testing.assert_close(made.loss, loss, rtol=1e-4, atol=1e-4)
        found = gradients(model, ids)
        model.eval()
        assert model(ids).logits.shape == (*ids.shape, model.config.vocab_size)
        model.train()
    assert_gradients(found, expected)
    assert nn.functional.cross_entropy is entropy and same_state(state(model), before)
    with pytest.raises(ValueError, match="fused_loss: liger-kernel has none for Cohere2ForCausalLM"):
        find_fused_ops(model_of("cohere2"), loss=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kernels_of", ["torch", pytest.param("liger", marks=pytest.mark.gpu)])
def test_compiled(kernels_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sees the replaced functions, not those of the modules' classes and globals, and these after `undo`.
    It cannot look through Triton's interpreter: without a GPU the kernels are replaced, by wrong ones, so that it shows
    which were called."""
    torch._dynamo.reset()
    model, ids = model_of("gemma2"), ids_of()
    plain = expected = logits(model, ids)
    if kernels_of == "torch":
        monkeypatch.setattr(liger, "operations", lambda: _Wrong)
        with use_fused_ops(model):
            expected = logits(model, ids)
        assert not torch.allclose(expected, plain, rtol=0.1, atol=0.1)
    compiled = torch.compile(model, backend="inductor" if GPU else "eager")
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if GPU else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits(compiled, ids), plain, **tolerance)
    with use_fused_ops(model):
        torch.testing.assert_close(logits(compiled, ids), expected, **tolerance)
    torch.testing.assert_close(logits(compiled, ids), plain, **tolerance)


def _shift(x: Tensor) -> Tensor:
    return x + 1


def _shifted(x: Tensor, *, by: float = 2.0) -> Tensor:
    return _shift(x) * by


@pytest.mark.parametrize("order", ["original first", "copy first"])
def test_a_copy_with_other_globals_is_compiled_as_a_function_of_its_own(order: str) -> None:
    """As each attention module's forward is after a graph break in its caller: torch.compile finds what it compiled by
    the code of a function, and there it names globals that are in the scope of one of the two only."""
    torch._dynamo.reset()
    copied = with_globals(_shifted, {"_shift": lambda x: x + 10})
    x = torch.ones(3)
    functions = [(_shifted, 4.0), (copied, 22.0)]
    for function, expected in 2 * (functions if order == "original first" else functions[::-1]):
        compiled = torch.compile(function, backend="eager")
        assert compiled(x).tolist() == [expected] * 3
        assert function(x).tolist() == [expected] * 3
    assert copied.__name__ == "_shifted" and copied.__kwdefaults__ == {"by": 2.0}


class _Wrong:
    """Kernels that differ from liger-kernel's, each in its way."""

    class LigerRMSNormFunction:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
            return 0.5 * x

    class LigerGELUMulFunction:
        @staticmethod
        def apply(gate: Tensor, up: Tensor) -> Tensor:
            return gate - up

    LigerSiLUMulFunction = LigerGELUMulFunction

    class LigerRopeFunction:
        @staticmethod
        def apply(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
            return 2 * q, -k


def loaded_of(model: PreTrainedModel, wish: bool | None) -> Loaded:
    return Loaded(model, None, model.config, "tiny", fused_ops=wish)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # prefill in float32 asks the reference
def test_same_tokens(family: str, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine through the module runner, greedily, on a GPU with captured steps; between its calls the model is as
    transformers made it. On a CPU our attention kernels take part in one family: they take most of the time there."""
    if not GPU and family != "gemma3":
        monkeypatch.setenv("FASTATTN_BACKENDS", "torch,reference")
    model = model_of(family, "fastattn")
    prompts, before = [[5, 6, 7], [9] * 13, [3]], state(model)
    found = []
    for wish in (False, True):
        calls.clear()
        runner = make_runner(loaded_of(model, wish), 3, 40)
        assert isinstance(runner, ModuleRunner) and runner.fused_ops == (REPLACED[family] if wish else ())
        events = list(Engine(runner, eos_ids=()).generate(prompts, 8))
        found.append([[e.token for e in events if e.request == i] for i in range(3)])
        assert bool(calls) == wish
        assert ModuleRunner(loaded_of(model, wish), 1, 8).fused_ops == runner.fused_ops
        assert same_state(state(model), before)
    assert found[0] == found[1] and all(len(tokens) == 8 for tokens in found[0])


@pytest.mark.parametrize("tokens_per_row", [1, 3])
@pytest.mark.parametrize("lies", ["head-major", "token-major"])
def test_rotary_embedding_of_several_rows(lies: str, tokens_per_row: int, calls: dict[str, int]) -> None:
    """A token of each row, as in decode: what a head norm returns lies so that its rows are as near as its heads."""
    model = model_of("gemma3", "fastattn")
    own = sys.modules[type(model).__module__].apply_rotary_pos_emb
    fused = rotary.fused_rope(liger.operations().LigerRopeFunction, own, rotary.ROPES[0])
    q, k = torch.randn(3, 4, tokens_per_row, 8), torch.randn(3, 2, tokens_per_row, 8)
    if lies == "token-major":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    if torch.cuda.is_available():
        q, k = q.cuda(), k.cuda()
    position = torch.tensor([[5], [0], [70]], device=q.device) + torch.arange(tokens_per_row, device=q.device)
    angle = torch.cat([position[..., None] / torch.tensor([1.0, 3.0, 9.0, 27.0], device=q.device)] * 2, -1)
    cos, sin = angle.cos(), angle.sin()
    calls.clear()
    expected, found = own(q, k, cos, sin), fused(q.clone(), k.clone(), cos, sin)
    assert calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # prefill in float32 asks the reference
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "gpt_oss"])
def test_captured(family: str) -> None:
    """Decode steps with liger-kernel's operations are captured in a CUDA graph, and replayed at other lengths."""
    runner = ModuleRunner(model_of(family, "fastattn"), 2, 64)
    assert runner.fused_ops == REPLACED[family]  # on a GPU nobody has to ask
    ids = [tokens(1, length)[0].cuda() for length in (5, 17)]
    place = torch.zeros(2, dtype=torch.long, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runner.decode(place)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = runner.decode(place)
    for steps in (1, 9):
        expected = torch.empty(0)
        for replay in (False, True):
            for row in range(2):
                runner.clear(row)
                runner.prefill(row, ids[row])
            for step in range(steps):
                place.copy_(torch.tensor([step + 3, step + 7]))
                if replay:
                    graph.replay()
                else:
                    expected = runner.decode(place).clone()
        torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    runner = ModuleRunner(model_of("llama", "fastattn", torch.bfloat16, head_dim=64), 2, 256)
    assert runner.fused_ops
    ids = tokens(1, 100)[0].cuda()

    def turn() -> None:
        for row in range(2):
            runner.clear(row)
            runner.prefill(row, ids)
        runner.decode(ids[:2])

    turn()  # builds plans and kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        turn()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("error::fastattn.FastattnWarning")
def test_what_the_kernels_cannot_do_is_done_without() -> None:
    """Unless they are required."""
    model = model_of("gemma2", "fastattn")

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("out of registers")

    ops = FusedOps(((model.model.norm, MethodType(fail, model.model.norm)),), ("Gemma2RMSNorm",))
    with pytest.raises(fastattn.FastattnWarning, match=r"without liger-kernel's fused operations.*out of registers"):
        ModuleRunner(model, 1, 16, find_ops=lambda model, wish: ops)
    with pytest.raises(ValueError, match="out of registers"):
        ModuleRunner(model, 1, 16, fused_ops=True, find_ops=lambda model, wish: ops)


def test_required_where_nothing_runs_it() -> None:
    model = model_of("gemma2", "eager")
    with pytest.raises(ValueError, match="fused_ops: cannot be used with tiny, it is decoded one row after another"):
        make_runner(loaded_of(model, True), 1, 16)


def test_presets_of_any_family() -> None:
    config = preset_config("gemma-2-2b")
    assert config.model_type == "gemma2" and preset_config("tiny").model_type == "llama"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 2_614_341_888
    assert config.layer_types[:2] == ["sliding_attention", "full_attention"]
    config = preset_config("gpt2")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + (50304 - 50257) * 768
    assert (config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings) == (12, 12, 1024)
    assert set(PRESETS) == {"tiny", "llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b", "gemma-4", "gpt2"}


def test_generation_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine uses them; transformers' loop runs the same weights without."""
    if not GPU:
        monkeypatch.setenv("FASTATTN_BACKENDS", "torch,reference")  # as in `test_same_tokens`
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    monkeypatch.setitem(PRESETS, "tiny-gemma", {"model_type": "gemma2", **sizes, **heads})
    for wish, found in ((True, list(REPLACED["gemma2"])), (False, [])):
        names = ("fastattn", "fastattn-hf", "eager")
        settings = model_benchmark.Settings(
            "tiny-gemma", 6, 1, 1, generation_tokens=2, attn=names, device=DEVICE, fused_ops=wish
        )
        report = model_benchmark.run(settings)
        assert report.arguments["fused_ops"] == found and not any(result.error for result in report.results)
        printed = capsys.readouterr().out
        line = "[fastattn] Fused by liger-kernel: Gemma2MLP, Gemma2RMSNorm, rope in Gemma2Attention"
        assert printed.count("Fused by") == printed.count(line) == len(found) / 3


TINY = ["benchmark", "--model", "tiny", "--device", DEVICE, "-p", "8", "-n", "1"]


def test_training_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """fastattn's steps alone use them, and the losses and gradients of both agree."""
    settings = train.Settings("tiny", 8, 1, 1, warmup_steps=1, attn=("fastattn", "sdpa"), device=DEVICE, fused_ops=True)
    report = train.run(settings)
    printed = capsys.readouterr().out
    assert "Fused by liger-kernel, in fastattn's steps: LlamaMLP, LlamaRMSNorm, rope in LlamaAttention" in printed
    assert not report.disagreements() and "Warning" not in printed
    assert report.arguments["fused_ops"] == ["LlamaMLP", "LlamaRMSNorm", "rope in LlamaAttention"]
    fused, plain = (result.steps[-1] for result in report.results)
    assert fused.loss == pytest.approx(plain.loss, rel=1e-2)


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for line, text in {
        "--attn sdpa --fused-ops on": "fused_ops: only fastattn uses them",
        "--fused-ops maybe": "invalid choice: 'maybe'",
    }.items():
        try:
            status = cli.main([*TINY, *line.split()])
        except SystemExit as end:
            status = end.code
        assert status == 2 and text in capsys.readouterr().err, line
    monkeypatch.delenv("FASTATTN_INTERPRET", raising=False)  # no kernel of Triton's is needed
    fastattn.clear_plans()
    assert cli.main([*TINY, "-g", "2", "--fused-ops", "off"]) == 0
