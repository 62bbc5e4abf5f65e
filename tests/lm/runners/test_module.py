"""`ModuleRunner`: every row of a batch has the logits that it has by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from fastattn._compat.transformers import with_cache
from fastattn.lm import Loaded, load
from fastattn.lm.runner import Runner
from fastattn.lm.runners.module import ModuleRunner

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "cohere2", "llama4"]
#: Llama 4 scales its queries by a position that all rows share.
CHANGES: dict[str, dict[str, Any]] = {"llama4": {"attn_temperature_tuning": False}}
CAPACITY = 40


def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    changes = CHANGES.get(family, {})
    return build(family, "fastattn", **changes), build(family, "eager", **changes)


@torch.no_grad()
def greedy(eager: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """The next tokens of a sequence alone, by a plain loop."""
    cache, found = DynamicCache(config=eager.config), []
    step = ids[None]
    for _ in range(count):
        step = eager(step, **with_cache(eager, cache)).logits[:, -1:].argmax(-1)
        found.append(int(step))
    return found


class Rows:
    """Greedy generation on a runner, row by row, compared with eager attention."""

    def __init__(self, runner: Runner, eager: PreTrainedModel) -> None:
        self.runner, self.eager = runner, eager
        self.prompts: dict[int, Tensor] = {}
        self.found: dict[int, list[int]] = {}

    def prefill(self, row: int, ids: Tensor) -> None:
        logits = self.runner.prefill(row, ids.to(self.runner.device))
        assert logits.shape == (self.runner.vocab_size,)
        self.prompts[row], self.found[row] = ids, [int(logits.argmax())]

    def decode(self, rows: int, steps: int = 1) -> None:
        for _ in range(steps):
            # unused rows get a token as well
            ids = torch.tensor([self.found[row][-1] if row in self.found else 5 for row in range(rows)])
            logits = self.runner.decode(ids.to(self.runner.device))
            assert logits.shape == (rows, self.runner.vocab_size)
            for row, token in enumerate(logits.argmax(-1).tolist()):
                if row in self.found:
                    self.found[row].append(token)

    def clear(self, row: int) -> None:
        self.runner.clear(row)
        self.forget(row)

    def forget(self, row: int) -> None:
        self.prompts.pop(row, None)
        self.found.pop(row, None)

    def move(self, source: int, target: int) -> None:
        self.runner.move(source, target)
        self.prompts[target], self.found[target] = self.prompts.pop(source), self.found.pop(source)

    def check(self) -> None:
        for row, found in self.found.items():
            assert found == greedy(self.eager, self.prompts[row], len(found)), row


def poison(runner: ModuleRunner) -> None:
    """NaN in the memory of all rows, which must be empty."""
    for memory in runner.cache.memory:
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_independent(family: str) -> None:
    fast, eager = models(family)
    runner = ModuleRunner(fast, 4, CAPACITY, prefill_step=4)
    runner.prefill(0, tokens(1, 3)[0])
    runner.clear(0)
    poison(runner)
    rows = Rows(runner, eager)
    for row, length in enumerate((3, 17, 1)):
        rows.prefill(row, tokens(1, length)[0])
    rows.decode(3, 6)
    rows.check()
    rows.move(2, 0)  # ends row 0
    rows.decode(2, 3)
    rows.prefill(2, tokens(1, 9)[0])
    rows.decode(4, 3)  # row 3 is unused
    rows.clear(1)
    rows.decode(1, 2)
    rows.prefill(1, tokens(1, 12)[0])
    rows.decode(3, 4)
    rows.check()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4"])
def test_where_the_host_knows_no_length(family: str) -> None:
    """As after a captured step: prefills of any length and in any state of a row."""
    fast, eager = models(family)
    runner = ModuleRunner(fast, 3, CAPACITY, prefill_step=7)
    runner.cache.forget()
    rows = Rows(runner, eager)
    for row, length in enumerate((2, 20, 8)):
        rows.prefill(row, tokens(1, length)[0])
    rows.decode(3, 5)
    rows.check()
    more = tokens(1, 11)[0]
    ids = torch.cat([rows.prompts[2], torch.tensor(rows.found[2][:-1]), more])
    rows.prefill(2, more)
    rows.prompts[2] = ids
    rows.decode(3, 2)
    rows.check()


def test_a_full_row_is_harmless() -> None:
    fast, eager = models("gemma2")
    rows = Rows(ModuleRunner(fast, 2, 12), eager)
    rows.prefill(0, tokens(1, 11)[0])
    rows.prefill(1, tokens(1, 3)[0])
    rows.decode(2, 6)
    rows.forget(0)
    rows.check()
    rows.clear(0)
    rows.prefill(0, tokens(1, 5)[0])
    rows.decode(2, 2)
    rows.check()


def test_one_row_of_llama4_scales_its_queries() -> None:
    changes = {"floor_scale": 4, "attn_scale": 0.5}  # so early that it shows
    fast, eager = build("llama4", "fastattn", **changes), build("llama4", "eager", **changes)
    rows = Rows(ModuleRunner(fast, 1, CAPACITY), eager)
    rows.prefill(0, tokens(1, 13)[0])
    rows.decode(1, 6)
    rows.check()
    with pytest.raises(ValueError, match="attn_temperature_tuning"):
        ModuleRunner(fast, 2, CAPACITY)


def test_takes_what_load_returns() -> None:
    loaded = load("tiny", device="cpu")
    assert isinstance(loaded, Loaded)
    runner: Runner = ModuleRunner(loaded, 2, CAPACITY)
    assert (runner.rows, runner.capacity, runner.vocab_size) == (2, CAPACITY, 1024)
    assert runner.device == torch.device("cpu")


def test_bad_arguments() -> None:
    runner = ModuleRunner(build("llama", "fastattn"), 2, CAPACITY)
    for ids in (torch.zeros(0, dtype=torch.long), tokens(1, 3)):
        with pytest.raises(ValueError, match="ids: expected"):
            runner.prefill(0, ids)
    for ids in (torch.zeros(0, dtype=torch.long), tokens(1, 3)[0], tokens(1, 2)):
        with pytest.raises(ValueError, match="ids: expected"):
            runner.decode(ids)
    with pytest.raises(ValueError, match="rows"):
        runner.prefill(2, tokens(1, 3)[0])
    with pytest.raises(ValueError, match="full"):
        runner.prefill(0, tokens(1, CAPACITY + 1)[0])
    with pytest.raises(ValueError, match="capacity: expected"):
        ModuleRunner(build("llama", "fastattn"), 2, 0)


_SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
REFUSED: dict[str, tuple[Any, str]] = {
    "eager": (lambda: build("llama", "eager"), 'attn_implementation is "eager"'),
    "encoder": (lambda: build("t5", "eager"), "encoder"),
    "no logits": (lambda: build("bert", "fastattn"), "no logits"),
    "mamba": (lambda: _made(MambaConfig(**_SIZES, state_size=4)), "recurrent|past_key_values"),
    "hybrid": (
        lambda: _made(
            Qwen3NextConfig(
                **_SIZES,
                intermediate_size=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                num_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        ),
        "recurrent|another state",
    ),
    "own attention": (
        lambda: _made(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
        "position_ids|compute attention themselves",
    ),
    "a length on the host": (
        lambda: _made(OPTConfig(**_SIZES, word_embed_proj_dim=32, num_attention_heads=4, ffn_dim=48)),
        "lengths on the device: ",
    ),
    "longrope": (
        lambda: build(
            "phi3",
            "fastattn",
            rope_parameters=LONGROPE,
            max_position_embeddings=128,
            original_max_position_embeddings=32,
        ),
        "longrope",
    ),
}


def _made(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation="fastattn").eval()


@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, why = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=why):
        ModuleRunner(model, 2, CAPACITY)


def test_positions_that_are_learned() -> None:
    found = []
    for implementation in ("fastattn", "eager"):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=99, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        found.append(AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval())
    with pytest.raises(ValueError, match="24 positions"):
        ModuleRunner(found[0], 2, 25)
    rows = Rows(ModuleRunner(found[0], 2, 24), found[1])
    rows.prefill(0, tokens(1, 21)[0])
    rows.prefill(1, tokens(1, 4)[0])
    rows.decode(2, 6)  # row 0 runs full: its positions stay inside the table
    rows.forget(0)
    rows.check()


class Captured:
    """A runner whose decode steps are replayed from one CUDA graph per number of rows."""

    def __init__(self, runner: ModuleRunner) -> None:
        self.runner = runner
        self.rows, self.capacity, self.vocab_size = runner.rows, runner.capacity, runner.vocab_size
        self.device = runner.device
        self.prefill, self.clear, self.move = runner.prefill, runner.clear, runner.move
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def capture(self, rows: int) -> None:
        """While all rows are empty; they are so afterwards."""
        ids = torch.full((rows,), 5, device=self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.runner.decode(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.runner.decode(ids)
        self.graphs[rows] = graph, ids, logits
        for row in range(rows):
            self.runner.clear(row)

    def decode(self, ids: Tensor) -> Tensor:
        graph, place, logits = self.graphs[ids.shape[0]]
        place.copy_(ids)
        graph.replay()
        return logits


def test_experts_on_the_host_are_not_captured() -> None:
    model = build("gpt_oss", "fastattn")
    assert ModuleRunner(model, 1, 8).capturable
    model.set_experts_implementation("eager")
    assert not ModuleRunner(model, 1, 8).capturable


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # prefill in float32 asks the reference
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral", "qwen3"])
def test_captured_decode(family: str) -> None:
    """float32, so that the tokens are those of eager."""
    fast, eager = (model.cuda() for model in models(family))
    for model in (fast, eager) if family == "gpt_oss" else ():
        model.set_experts_implementation("batched_mm")  # the one that can be captured in float32
    captured = Captured(ModuleRunner(fast, 3, CAPACITY, prefill_step=16))
    captured.runner.prefill(0, tokens(1, 3)[0].cuda())
    captured.clear(0)
    for count in (1, 2, 3):
        captured.capture(count)
    poison(captured.runner)
    rows = Rows(captured, _OnGPU(eager))
    for row, length in enumerate((3, 20, 1)):
        rows.prefill(row, tokens(1, length)[0])
    rows.decode(3, 12)  # over the window's end, and over many lengths
    rows.check()
    rows.move(2, 0)
    rows.decode(2, 2)
    rows.clear(1)
    rows.decode(1, 3)
    rows.prefill(1, tokens(1, 18)[0])  # behind the host's back rows have grown
    rows.decode(2, 4)
    rows.check()


class _OnGPU:
    """eager, for prompts of the CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config, self.forward = model, model.config, model.forward

    def __call__(self, ids: Tensor, **inputs: Any) -> Any:
        return self.model(ids.cuda(), **inputs)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    """Neither decode nor prefill, in bfloat16, whether the host knows a row's length or not."""
    model = build("llama", "fastattn", head_dim=64).to("cuda", torch.bfloat16)
    runner = ModuleRunner(model, 2, 256)
    ids = tokens(1, 100)[0].cuda()

    def turn() -> None:
        for row in range(2):
            runner.clear(row)
            runner.prefill(row, ids)
            runner.prefill(row, ids[:30])
        runner.decode(ids[:2])

    for known in (True, False):
        if not known:
            runner.cache.forget()
        turn()  # builds plans and kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            turn()
        finally:
            torch.cuda.set_sync_debug_mode("default")
