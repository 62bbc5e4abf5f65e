"""Models of transformers over ranks: logits, training steps and decode are those of one process."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import relative_error
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastattn._compat.transformers import with_cache
from fastattn.parallel import ContextParallel

LENGTH, VOCABULARY, NEW = 43, 37, 5
FAMILIES = ("llama", "gpt_oss", "gemma2")
CUTS = (0, 11, 30, LENGTH)  #: packed sequences


def make(family: str) -> Any:
    """The same weights in every process."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, logging

    import fastattn.hf  # noqa: F401  (registers "fastattn")

    logging.set_verbosity_error()
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"]
    config: Any = LlamaConfig(**sizes)
    if family == "gpt_oss":
        config = GptOssConfig(**sizes, sliding_window=9, layer_types=kinds, num_local_experts=4, num_experts_per_tok=2)
    elif family == "gemma2":
        config = Gemma2Config(**sizes, sliding_window=9, layer_types=kinds, attn_logit_softcapping=2.0)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn").train()
    return model if family == "gpt_oss" else model.double()  # grouped products of experts are not made in float64


def close(family: str) -> float:
    return 1e-4 if family == "gpt_oss" else 1e-9


def ids(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def shards(cp: ContextParallel, whole: Tensor) -> dict[str, Tensor]:
    return {"input_ids": cp.shard(whole, 1), "position_ids": cp.positions(whole.shape[1])}


def logits_of(family: str, strategy: str, batch: int) -> Tensor:
    cp, model, whole = ContextParallel(strategy=strategy), make(family), ids(batch)
    with torch.no_grad(), cp.model(model, LENGTH):
        found = model(**shards(cp, whole), use_cache=False).logits
    assert model.config._attn_implementation == "fastattn"
    with torch.no_grad():
        model(input_ids=whole[:, :4])  # on its own again
    return cp.unshard(found, 1, LENGTH)


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, strategy: str, two: Ranks) -> None:
    with torch.no_grad():
        want = make(family)(input_ids=ids(2)).logits
    for found in two.run(logits_of, family, strategy, 2):
        assert relative_error(found, want) < close(family)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def step_of(family: str, checkpointed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    cp, model, whole = ContextParallel(), make(family), ids()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = whole.masked_fill(torch.arange(LENGTH) < 4, -100)  # of a prompt, say
    with cp.model(model, LENGTH):
        loss = model(**shards(cp, whole), **cp.targets(labels), use_cache=False).loss
        loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= cp.size
    dist.all_reduce(loss.detach())
    return loss.detach() / cp.size, gradients(model)


def step_alone(family: str) -> tuple[Tensor, dict[str, Tensor]]:
    model, whole = make(family), ids()
    loss = model(input_ids=whole, labels=whole.masked_fill(torch.arange(LENGTH) < 4, -100)).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(
    found: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-5
) -> None:
    assert relative_error(found[0], want[0]) < 1e-6  # the loss is float32
    assert found[1].keys() == want[1].keys()
    largest = max(float(x.norm()) for x in want[1].values())
    for name, x in want[1].items():
        assert relative_error(found[1][name], x, floor=largest / 100) < tolerance, name


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family: str, checkpointed: bool, two: Ranks) -> None:
    for found in two.run(step_of, family, checkpointed):
        assert_same_step(found, step_alone(family), 1e-3 if family == "gpt_oss" else 1e-5)


def too_late() -> tuple[str, str]:
    cp, model = ContextParallel(), make("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with cp.model(model, LENGTH):
        loss = model(**shards(cp, ids()), **cp.targets(ids()), use_cache=False).loss
    try:
        loss.backward()
    except RuntimeError as error:
        model.set_attn_implementation("fastattn")
        model(input_ids=ids())
        return "raised", str(error)
    return "nothing", ""


def test_a_checkpointed_backward_outside_of_the_block_says_so(two: Ranks) -> None:
    for what, text in two.run(too_late):
        assert what == "raised"
        assert "the backward belongs into the block" in text


def packed_logits() -> Tensor:
    cp, model = ContextParallel(), make("llama")
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(CUTS)])[None]
    with torch.no_grad(), cp.model(model, LENGTH, cu_seqlens=CUTS):
        found = model(input_ids=cp.shard(ids(), 1), position_ids=cp.shard(positions, 1), use_cache=False).logits
    return cp.unshard(found, 1, LENGTH)


def test_packed_sequences(two: Ranks) -> None:
    model = make("llama")
    with torch.no_grad():
        want = torch.cat([model(input_ids=ids()[:, a:b]).logits for a, b in pairwise(CUTS)], 1)
    for found in two.run(packed_logits):
        assert relative_error(found, want) < 1e-9


def decoded(family: str) -> tuple[Tensor, int]:
    cp, model, whole = ContextParallel(), make(family).eval(), ids(2, LENGTH + NEW)
    cache = cp.cache(LENGTH)
    with torch.no_grad():
        with cp.model(model, LENGTH):
            model(**shards(cp, whole[:, :LENGTH]), **with_cache(model, cache))
        with cp.decoding(model, cache):
            tokens = whole[:, LENGTH:].split(1, 1)
            logits = [model(input_ids=x, **with_cache(model, cache)).logits for x in tokens]
    return torch.cat(logits, 1), cache.layers[0].keys.shape[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_from_a_sharded_cache(family: str, two: Ranks) -> None:
    with torch.no_grad():
        want = make(family).eval()(input_ids=ids(2, LENGTH + NEW)).logits[:, LENGTH:]
    answers = two.run(decoded, family)
    assert sum(held for _, held in answers) == LENGTH + NEW  # no token is kept twice
    for found, _ in answers:
        assert relative_error(found, want) < close(family)


def padded() -> list[str]:
    cp, model = ContextParallel(), make("llama")
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, ::2] = 0
    try:
        with cp.model(model, LENGTH):
            model(**shards(cp, ids()), attention_mask=cp.shard(mask, 1))
    except ValueError as error:
        return [str(error)]
    return ["nothing"]


def test_padding_is_refused(two: Ranks) -> None:
    for found in two.run(padded):
        assert "pack the sequences" in found[0]


def refused() -> list[str]:
    from transformers import AutoModelForCausalLM, BloomConfig, Llama4TextConfig, MambaConfig

    cp, said = ContextParallel(), []
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    llama4 = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16}
    configs = [
        MambaConfig(**sizes),
        BloomConfig(**sizes, n_head=2),
        Llama4TextConfig(**sizes, **llama4, intermediate_size_mlp=16, num_local_experts=1),
    ]
    for config in configs:
        model = AutoModelForCausalLM.from_config(config)
        try:
            with cp.model(model, LENGTH):
                model(**shards(cp, ids() % 32))
        except ValueError as error:
            said.append(str(error))
    return said


def test_models_that_mix_tokens_in_other_ways_are_refused(two: Ranks) -> None:
    for mamba, bloom, llama4 in two.run(refused):
        assert "layers of the kinds linear_attention" in mamba
        assert "cannot be spread over ranks" in bloom
        assert "chunked_attention" in llama4


def step_of_fsdp(strategy: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Two ranks of context times two of data: each pair of the latter has another batch entry."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "dp"))
    cp, model = ContextParallel(mesh["cp"], strategy=strategy), make("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)  # parameters sharded over "dp", their gradients reduced over both
    fully_shard(model, mesh=mesh)
    whole = ids(2)[mesh["dp"].get_local_rank()][None]
    with cp.model(model, LENGTH):
        loss = model(**shards(cp, whole), **cp.targets(whole), use_cache=False).loss
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss / 4, gradients(model)


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather"])
def test_with_fsdp_on_another_dimension(strategy: str, four: Ranks) -> None:
    model, whole = make("llama"), ids(2)
    loss = model(input_ids=whole, labels=whole).loss
    loss.backward()
    for found in four.run(step_of_fsdp, strategy):
        assert_same_step(found, (loss.detach(), gradients(model)))
