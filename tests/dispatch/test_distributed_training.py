"""Training spread over processes: a step of DDP or FSDP2 through fastattn is the step of one process.

The reference has no padding, no packing and no fastattn in it: one process, plain attention, each sequence by itself.
Two processes on the CPU (gloo) serve all tests of this file; one that hangs or dies fails its test and is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import relative_error
from ranks import Ranks
from served import Served
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_model import IGNORED, VOCABULARY, TinyLM, loss, next_tokens, plainly

from fastattn import Segments

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

MODELS = ("plain", "llama", "gpt_oss")
WORLD = 2
#: Lengths of the sequences of each optimizer step. The processes take turns: theirs differ in number and in length.
STEPS = ((7, 9, 5, 1, 3), (4, 12, 8))


@dataclass(frozen=True)
class Run:
    """One training run. Everything that a process needs to know of it."""

    model: str  #: "plain", or a family of transformers
    layout: str  #: of the sequences that a process has: "left" or "right" (padding), "packed", or "alone"
    wrap: str  #: "ddp", "fsdp" or "none"
    use_reentrant: bool | None = None  #: activation checkpointing of either kind
    bf16: bool = False  #: FSDP's mixed precision

    def __str__(self) -> str:
        kind = {None: "", True: "-reentrant", False: "-checkpoint"}[self.use_reentrant]
        return f"{self.wrap}-{self.model}-{self.layout}{kind}{'-bf16' if self.bf16 else ''}"


def sequences(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in STEPS[step]]


def make(run: Run) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(1)
    if run.model == "plain":
        attend = {"attend": plainly} if run.layout == "alone" else {}
        return TinyLM(**attend, use_reentrant=run.use_reentrant)
    if run.model not in MODELS:
        raise ValueError(f"no model {run.model!r}")
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, logging

    import fastattn.hf  # noqa: F401  (registers "fastattn")

    logging.set_verbosity_error()
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if run.model == "llama":
        config = LlamaConfig(**sizes)
    else:
        kinds = ["sliding_attention", "full_attention"]
        config = GptOssConfig(**sizes, sliding_window=3, layer_types=kinds, num_local_experts=4, num_experts_per_tok=2)
    attention = "eager" if run.layout == "alone" else "fastattn"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if run.use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": run.use_reentrant})
    return model


def lay_out(mine: list[Tensor], layout: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Ids, positions and labels `[B, S]` of the sequences in one batch, and the sequences' lengths."""
    lengths = [len(x) for x in mine]
    parts = [(x[None], torch.arange(len(x))[None], next_tokens(x[None])) for x in mine]
    if layout in ("packed", "alone"):
        ids, positions, labels = (torch.cat(x, 1) for x in zip(*parts))
        return ids, positions, labels, lengths
    width = max(lengths)
    rows = []
    for part, n in zip(parts, lengths):
        pad = (width - n, 0) if layout == "left" else (0, width - n)
        rows.append([nn.functional.pad(x, pad, value=v) for x, v in zip(part, (0, 0, IGNORED))])
    ids, positions, labels = (torch.cat(x) for x in zip(*rows))
    return ids, positions, labels, lengths


def logits_of(model: nn.Module, run: Run, ids: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
    width, counts = ids.shape[1], torch.tensor(lengths, dtype=torch.int32)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    if run.model == "plain":
        options: dict[str, Any] = {"mask": "causal"}
        if run.layout == "packed":
            options = {"mask": Segments.packed(ends, causal=True)}
        elif run.layout == "left":
            options = {"mask": Segments.left_padded(width - counts, width, width)}
        elif run.layout == "right":
            options |= {"q_lengths": counts, "kv_lengths": counts}
        return model(ids, positions, **options)
    options = {"use_cache": False}
    if run.layout in ("left", "right"):
        columns = torch.arange(width)
        from_end = columns if run.layout == "right" else columns.flip(0)
        options["attention_mask"] = (from_end < counts[:, None]).long()
    elif run.layout == "packed" and run.model == "gpt_oss":  # it does not show its positions to the search for packing
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return model(input_ids=ids, position_ids=positions, **options).logits


def train(run: Run, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """How far each parameter has moved after all steps."""
    bare = make(run)
    start = {name: p.detach().clone() for name, p in bare.named_parameters()}
    model = bare
    if run.wrap == "ddp":
        model = DistributedDataParallel(bare)
    elif run.wrap == "fsdp":
        dtypes = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (world,))} | ({"mp_policy": dtypes} if run.bf16 else {})
        for layer in bare.layers if run.model == "plain" else bare.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, **how)
        fully_shard(bare, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(len(STEPS)):
        every = sequences(step)
        mine = every[rank::world]
        counted = sum(len(x) - 1 for x in every)
        for part in [[x] for x in mine] if run.layout == "alone" else [mine]:
            ids, positions, labels, lengths = lay_out(part, run.layout)
            # Processes average their gradients; what is wanted is the mean over the tokens of all of them.
            (loss(logits_of(model, run, ids, positions, lengths), labels) * world / counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in bare.named_parameters()}
    return {name: p.detach() - start[name] for name, p in now.items()}


def train_here(run: Run) -> dict[str, Tensor]:
    """`train`, in one of the processes."""
    return train(run, dist.get_rank(), WORLD)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    team = Ranks(WORLD, tmp_path_factory.mktemp("team"))
    yield team
    team.stop()


@cache
def one_process(model: str) -> dict[str, Tensor]:
    return train(Run(model, "alone", "none"))


def assert_moved_alike(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Compares how far the parameters went, not where they are: that is mostly where they started."""
    assert got.keys() == want.keys()
    largest = max(float(x.norm()) for x in want.values())
    for name, x in want.items():
        assert x.norm() > 0, f"{name} did not move at all"
        assert relative_error(got[name], x, floor=largest / 100) < tolerance, name


RUNS = [Run(m, layout, wrap) for wrap in ("ddp", "fsdp") for m in MODELS for layout in ("left", "right", "packed")]
RUNS += [Run(m, "left", "ddp", kind) for m in MODELS for kind in (True, False)]
RUNS += [Run(m, "packed", "fsdp", False) for m in MODELS]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_processes_step_as_one(run: Run, team: Ranks) -> None:
    want = one_process(run.model)
    for got in team.run(train_here, run):
        assert_moved_alike(got, want)


@pytest.mark.parametrize("model", ["plain", "llama"])  # gpt_oss may choose other experts when it is rounded
def test_mixed_precision_of_fsdp(model: str, team: Ranks) -> None:
    for got in team.run(train_here, Run(model, "packed", "fsdp", bf16=True)):
        assert_moved_alike(got, one_process(model), tolerance=0.1)


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("model", MODELS)
def test_one_process_with_all_sequences(model: str, layout: str) -> None:
    assert_moved_alike(train(Run(model, layout, "none")), one_process(model))


@pytest.mark.parametrize("model", MODELS)
def test_the_share_of_one_process_is_another_step(model: str) -> None:
    """What the tests above would not notice if their sequences, or the differences they look at, were too small."""
    with pytest.raises(AssertionError):
        assert_moved_alike(train(Run(model, "left", "none"), rank=0, world=WORLD), one_process(model), tolerance=0.1)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_checkpointing_computes_attention_again(
    model: str, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests with checkpoints would be the tests without."""
    totals = []
    for kind in (None, use_reentrant):
        served = Served()
        train(Run(model, "left", "none", kind))
        calls = served()
        backwards = sum(n for name, n in calls.items() if name.endswith(".backward"))
        totals.append((sum(calls.values()) - backwards, backwards))
    layers = 2 * len(STEPS)
    assert totals == [(layers, layers), (2 * layers, layers)]


def test_processes_that_hang_or_raise_fail_their_test(team: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "SECONDS", 0.0)
        with pytest.raises(pytest.fail.Exception, match="gave no answer within 0 s"):
            team.run(train_here, Run("plain", "left", "ddp"))
    assert not team.members
    with pytest.raises(pytest.fail.Exception, match="ValueError: no model 'none such'"):
        team.run(train_here, Run("none such", "left", "ddp"))  # on new processes
    assert not team.members
