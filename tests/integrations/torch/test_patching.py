"""`patch`, `unpatch`, `patched`: fastattn under code that calls torch's function, and torch's function back."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from served import Served
from torch import nn
from torch.nn import functional
from torch_calls import TORCHS, TinyBlock, default_backends, distributed_step

import fastattn
from fastattn import drop_in
from fastattn.common import notice
from fastattn.integrations.torch import patching

__all__ = ["default_backends"]


@pytest.fixture(autouse=True)
def through_the_op(default_backends: None) -> Iterator[None]:
    """What is patched shows in what the reference serves. Nothing is left patched."""
    with fastattn.use_backend("reference"):
        yield
    drop_in.unpatch()
    assert functional.scaled_dot_product_attention is TORCHS
    assert patching._patch.function is None


def run(model: Any = None) -> dict[str, int]:
    """Who serves one forward."""
    model = TinyBlock() if model is None else model
    served = Served()
    with torch.no_grad():
        model(torch.randn(2, 5, 16))
    return served()


REFERENCE = {"reference": 1}


def module_of(text: str, name: str = "somebodys_code") -> types.ModuleType:
    """A module of that text, imported under a name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(text, vars(module))
    return module


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that imported torch's function in several ways."""
    (tmp_path / "research_code.py").write_text(
        """
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as attend
keep = F.scaled_dot_product_attention

def by_name(q): return scaled_dot_product_attention(q, q, q)
def by_another_name(q): return attend(q, q, q)
def by_module(q): return F.scaled_dot_product_attention(q, q, q)
def kept(q): return keep(q, q, q)
""",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("research_code")
    sys.modules.pop("research_code", None)


def served_by(function: Any) -> dict[str, int]:
    served = Served()
    function(torch.randn(1, 2, 4, 8))
    return served()


def test_patch_and_unpatch() -> None:
    assert run() == {}
    drop_in.patch()
    assert functional.scaled_dot_product_attention is not TORCHS
    assert run() == REFERENCE
    drop_in.unpatch()
    assert functional.scaled_dot_product_attention is TORCHS
    assert run() == {}


def test_once_is_enough() -> None:
    drop_in.patch()
    there = functional.scaled_dot_product_attention
    drop_in.patch()
    assert functional.scaled_dot_product_attention is there
    drop_in.unpatch()
    drop_in.unpatch()
    assert run() == {}


def test_blocks_nest() -> None:
    with drop_in.patched():
        with drop_in.patched():
            assert run() == REFERENCE
        assert run() == REFERENCE
        drop_in.patch()
        drop_in.unpatch()
        assert run() == REFERENCE  # the block lasts
        drop_in.patch()
    assert run() == REFERENCE  # what was asked for without a block lasts
    drop_in.unpatch()
    assert run() == {}


def test_an_error_ends_the_block() -> None:
    with pytest.raises(KeyError), drop_in.patched():
        raise KeyError
    assert run() == {}
    model = TinyBlock()
    with pytest.raises(RuntimeError), drop_in.patched(model):
        model(torch.randn(1, 2, 3))
    assert run(model) == {}
    assert patching._models.depth == 0


def test_as_a_decorator() -> None:
    assert drop_in.patched()(run)() == REFERENCE
    assert run() == {}


def test_names_that_modules_imported(code: types.ModuleType) -> None:
    with drop_in.patched():
        for function in (code.by_name, code.by_another_name, code.by_module):
            assert served_by(function) == REFERENCE, function
        assert code.keep is TORCHS  # who keeps the original means it
        assert served_by(code.kept) == {}
        assert torch._C._nn.scaled_dot_product_attention is TORCHS
    for name in ("scaled_dot_product_attention", "attend", "keep"):
        assert getattr(code, name) is TORCHS


def test_modules_imported_or_reloaded_within(code: types.ModuleType) -> None:
    drop_in.patch()
    importlib.reload(code)
    assert served_by(code.by_name) == REFERENCE
    late = module_of("from torch.nn.functional import scaled_dot_product_attention")
    gone = code
    del sys.modules["research_code"]  # somebody still holds it
    again = importlib.import_module("research_code")
    drop_in.unpatch()
    for module in (late, gone, again):
        assert module.scaled_dot_product_attention is TORCHS, module
    del sys.modules["somebodys_code"]


def test_what_is_held_elsewhere_is_torchs_function_again() -> None:
    drop_in.patch()
    held = functional.scaled_dot_product_attention
    assert served_by(lambda q: held(q, q, q)) == REFERENCE
    drop_in.unpatch()
    assert served_by(lambda q: held(q, q, q)) == {}
    q = torch.randn(1, 2, 4, 8)
    assert torch.equal(held(q, q, q, is_causal=True), TORCHS(q, q, q, is_causal=True))


def test_somebody_elses_function_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        return TORCHS(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(functional, "scaled_dot_product_attention", other)
        with pytest.raises(RuntimeError, match=r"is not torch's own function but .*other"):
            drop_in.patch()
        with pytest.raises(RuntimeError), drop_in.patched():
            pass
        assert functional.scaled_dot_product_attention is other
    assert run() == {}
    drop_in.patch()  # nothing of the failed attempts is left
    assert run() == REFERENCE


def test_somebody_who_comes_later_stays() -> None:
    drop_in.patch()
    ours = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda *args, **kwargs: ours(*args, **kwargs)
    theirs = functional.scaled_dot_product_attention
    try:
        assert run() == REFERENCE
        with pytest.warns(fastattn.FastattnWarning, match="was replaced by"):
            drop_in.unpatch()
        assert functional.scaled_dot_product_attention is theirs
        assert run() == {}
    finally:
        functional.scaled_dot_product_attention = TORCHS


def test_a_failure_on_the_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, code: types.ModuleType) -> None:
    def broken(module: types.ModuleType) -> set[str]:
        raise RecursionError

    with monkeypatch.context() as m:
        m.setattr(patching, "_imported_as", broken)
        with pytest.raises(RecursionError):
            drop_in.patch()
    assert functional.scaled_dot_product_attention is TORCHS
    assert code.scaled_dot_product_attention is TORCHS
    assert run() == {}


def test_a_warning_that_is_an_error_leaves_nothing(code: types.ModuleType) -> None:
    drop_in.patch()
    other = functional.scaled_dot_product_attention = lambda *arguments, **options: TORCHS(*arguments, **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            notice._given.clear()
            with pytest.raises(fastattn.FastattnWarning):
                drop_in.unpatch()
        assert functional.scaled_dot_product_attention is other
        assert code.attend is TORCHS
    finally:
        functional.scaled_dot_product_attention = TORCHS


def test_looks_like_torchs_function() -> None:
    with drop_in.patched():
        function = functional.scaled_dot_product_attention
        assert function.__name__ == "scaled_dot_product_attention"
        assert "attn_mask" in (function.__doc__ or "")
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function


def test_reload_of_the_module() -> None:
    drop_in.patch()
    importlib.reload(patching)
    assert run() == REFERENCE
    patching.unpatch()
    assert functional.scaled_dot_product_attention is TORCHS
    patching.patch()
    assert run() == REFERENCE


def test_threads() -> None:
    """All threads are served; blocks that come and go in several leave nothing behind."""
    wrong: list[str] = []

    def use() -> None:
        try:
            with fastattn.use_backend("reference"):
                for _ in range(20):
                    q = torch.randn(1, 2, 4, 8)
                    with drop_in.patched():
                        if functional.scaled_dot_product_attention is TORCHS:
                            wrong.append("not patched")
                        found = functional.scaled_dot_product_attention(q, q, q)
                    if not torch.allclose(found, TORCHS(q, q, q), atol=1e-5):
                        wrong.append("another result")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_can_unpatch() -> None:
    text = """
import os, torch, fastattn.drop_in as d
from torch.nn import functional as F
from fastattn.integrations.torch import patching
d.patch()
patching._patch._lock.acquire()  # as a thread of the parent may hold it
pid = os.fork()
if pid == 0:
    d.unpatch()
    os._exit(0 if F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "0", done.stderr


# A model alone


def test_a_model_alone() -> None:
    model, other = nn.Sequential(TinyBlock(), TinyBlock()), TinyBlock()
    with drop_in.patched(model):
        assert run(model) == {"reference": 2}
        assert run(model[0]) == REFERENCE
        assert run(other) == {}
        assert served_by(lambda q: functional.scaled_dot_product_attention(q, q, q)) == {}
        with drop_in.patched(other):
            assert run(other) == REFERENCE
        with drop_in.patched():
            assert run() == REFERENCE
        assert run(other) == {}
    assert run(model) == {}
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_models_own_forward_is_put_back() -> None:
    model = TinyBlock()
    model.forward = own = types.MethodType(lambda self, x: TinyBlock.forward(self, x) * 2, model)
    x = torch.randn(2, 5, 16)
    want = model(x)
    with drop_in.patched(model):
        with drop_in.patched(model):
            assert torch.allclose(model(x), want, atol=1e-6)
        assert run(model) == REFERENCE
    assert model.forward is own


def test_blocks_of_a_model_end_in_any_order() -> None:
    """As those of several threads do."""
    model = TinyBlock()
    one, other = drop_in.patched(model), drop_in.patched(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert run(model) == REFERENCE
    other.__exit__(None, None, None)
    assert run(model) == {}
    assert "forward" not in vars(model)


def test_a_forward_set_within_stays() -> None:
    model = TinyBlock()
    with drop_in.patched(model):
        model.forward = own = lambda x: x
    assert model.forward is own


def test_a_model_saved_within_is_whole() -> None:
    model = TinyBlock()
    x = torch.randn(2, 5, 16)
    with drop_in.patched(model):
        again = pickle.loads(pickle.dumps(model))
        assert str(inspect.signature(model.forward)) == str(inspect.signature(again.forward))
    model.zero_grad()
    assert torch.allclose(again(x), model(x), atol=1e-5)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_model_with_lists_of_modules_is_saved_within() -> None:
    """A list has no forward of its own to be found again by its name."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    with drop_in.patched(model):
        again = pickle.loads(pickle.dumps(model))
        assert run(model) == {"reference": 2}  # one a layer
    torch.testing.assert_close(again(x), model(x))


def test_modules_of_torchscript_and_fx() -> None:
    """TorchScript keeps torch's operator, a graph of torch.fx torch's function: both bypass names."""
    model = nn.Sequential(torch.jit.script(ScriptedBlock()), torch.fx.symbolic_trace(TinyBlock()), TinyBlock())
    x = torch.randn(2, 5, 16)
    want = model(x)
    with drop_in.patched(model):
        assert run(model) == REFERENCE
        assert torch.allclose(model(x), want, atol=1e-5)


def test_copies_of_a_model_are_their_own() -> None:
    model = TinyBlock()
    x = torch.randn(2, 5, 16)
    with drop_in.patched(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not twin(x).any()
        assert model(x).any()
    assert not twin(x).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_models_checkpoints(reentrant: bool) -> None:
    """The backward runs forwards again, from outside of the model's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TinyBlock()

        def forward(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)

    model = Model()
    x = torch.randn(2, 5, 16, requires_grad=True)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with drop_in.patched(model):
        served = Served()
        model(x).square().sum().backward()
        assert served() == {"reference": 2, "reference.backward": 1}
    for p, grad in zip(model.parameters(), want, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4)


def test_other_threads_run_other_models() -> None:
    model, other = TinyBlock(), TinyBlock()
    started, go_on = threading.Event(), threading.Event()
    model.out.register_forward_hook(lambda *_: (started.set(), go_on.wait(20))[0] and None)
    with drop_in.patched(model):
        thread = threading.Thread(target=run, args=(model,))
        thread.start()
        assert started.wait(20)
        found = run(other)  # while the model's forward is under way
        go_on.set()
        thread.join()
    assert found == {}


@pytest.mark.parametrize("model", [TinyBlock, "model", nn.functional])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model: expected None or a torch\.nn\.Module"), drop_in.patched(model):
        pass


def test_data_parallel_is_refused() -> None:
    model = nn.Sequential(nn.DataParallel(TinyBlock()))
    with pytest.raises(ValueError, match="DataParallel"), drop_in.patched(model):
        pass
    with drop_in.patched():
        assert run(model) == REFERENCE


# torch.compile, torch.jit, DDP


@pytest.mark.parametrize("of_the_model", [False, True])
def test_compiled_before_and_after(of_the_model: bool) -> None:
    torch._dynamo.reset()
    model = TinyBlock()
    before = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert run(before) == {}
    with drop_in.patched(model if of_the_model else None):
        assert run(before) == REFERENCE
        after = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert run(after) == REFERENCE
        assert run(before) == REFERENCE
    assert run(before) == {}
    assert run(after) == {}
    with drop_in.patched(after if of_the_model else None):
        assert run(after) == REFERENCE


def test_parts_that_were_compiled() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(TinyBlock(), TinyBlock())
    model[0].compile(fullgraph=True, backend="aot_eager")
    assert run(model) == {}
    with drop_in.patched(model):
        for _ in range(3):
            assert run(model) == {"reference": 2}
        assert run(model[0]) == REFERENCE
        assert patching._models.depth == 0
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 2, 3))
        assert patching._models.depth == 0
    assert run(model) == {}


def test_compiled_training() -> None:
    torch._dynamo.reset()
    model = TinyBlock()
    x = torch.randn(2, 5, 16)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with drop_in.patched():
        served = Served()
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
        assert served() == {"reference": 1, "reference.backward": 1}
    for p, grad in zip(model.parameters(), want, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4)


class ScriptedBlock(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


class Scripted(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_script_has_torchs_operator() -> None:
    q = torch.randn(1, 2, 4, 8)
    with drop_in.patched():
        scripted = torch.jit.script(Scripted())
        assert "aten::scaled_dot_product_attention" in str(scripted.graph)
        assert torch.equal(scripted(q), TORCHS(q, q, q, is_causal=True))


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path)
    try:
        plain, patched = ranks.run(distributed_step, False), ranks.run(distributed_step, True)
    finally:
        ranks.stop()
    for rank in range(2):
        assert patched[rank]["served"] == {"reference": 1, "reference.backward": 1}
        assert plain[rank]["served"] == {}
        for found, want in zip(patched[rank]["grads"], plain[rank]["grads"], strict=True):
            assert torch.allclose(found, want, atol=1e-4)


# torch's own modules


@pytest.mark.parametrize("mask", [None, "causal", "padding", "both"])
def test_multihead_attention(mask: str | None) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    options: dict[str, Any] = {"need_weights": False}
    if mask in ("causal", "both"):
        options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": mask == "causal"}
    if mask in ("padding", "both"):
        options["key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        if mask == "both":
            options["attn_mask"] = options["attn_mask"].isinf()
    want = attention(x, x, x, **options)[0]
    with drop_in.patched():
        served = Served()
        found = attention(x, x, x, **options)[0]
        assert served() == REFERENCE
    assert torch.allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("fast_path", [True, False])
def test_transformer_encoder(fast_path: bool) -> None:
    """Its path in C++, in evaluation and without gradients, is torch's own; without it, and in training, ours."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with drop_in.patched():
            assert run(encoder.eval()) == ({} if fast_path else {"reference": 2})
            with torch.no_grad():
                found = encoder(x)
            served = Served()
            encoder.train()(x).sum().backward()
            assert served() == {"reference": 2, "reference.backward": 2}
        with torch.no_grad():
            assert torch.allclose(found, encoder.eval()(x), atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_transformers_sdpa_and_ours() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastattn.hf  # noqa: F401

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (2, 7))
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    with torch.no_grad():
        want = model(tokens, attention_mask=padding).logits[padding.bool()]
        for name in ("sdpa", "fastattn"):
            model.set_attn_implementation(name)
            with drop_in.patched():
                served = Served()
                found = model(tokens, attention_mask=padding).logits[padding.bool()]
                assert served() == {"reference": 2}, name
            assert torch.allclose(found, want, atol=1e-4), name
    training = LlamaForCausalLM(config)
    with drop_in.patched():
        served = Served()
        training(tokens, labels=tokens).loss.backward()
        assert served() == {"reference": 2, "reference.backward": 2}


def test_our_own_torch_backend_is_torchs_function() -> None:
    q = torch.randn(1, 2, 4, 8)
    handed = fastattn.stats()["handed_to_torch"]
    with drop_in.patched(), fastattn.use_backend("torch"):
        fastattn.scaled_dot_product_attention(q, q, q)
    assert fastattn.stats()["handed_to_torch"] == handed
