"""Tensor parallel from the command line and in fastattn.lm: real processes on gloo, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks as Processes

from fastattn.cli import main as cli

#: transformers spreads models over GPUs wherever torch is built for them.
on_cpu = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None, reason="transformers does not spread models over CPUs here"
)


def torchrun(count: int, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    lo = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **lo, "OMP_NUM_THREADS": "1"},
        **options,
    )


def save(path: Path, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer that has a word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "eos_token_id": None,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(LlamaConfig(**settings | changes)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@on_cpu
def test_generate_gives_the_text_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy and drawn, prompts of several lengths in fewer rows: the ranks stay in step to the end."""
    model, prompts = save(tmp_path / "model"), tmp_path / "prompts"
    prompts.write_text("w5 w6 w7\nw9\nw1 w2 w3 w4 w5\n", encoding="utf-8")
    options = ["generate", "--model", str(model), "--prompts-file", str(prompts), "-g", "12", "--batch-size", "2"]
    options += ["--device", "cpu", "--temperature", "0.9", "--seed", "3"]
    assert cli.main(options) == 0
    want = capsys.readouterr().out
    done = torchrun(2, "-m", "fastattn", *options, "--tp")
    assert done.returncode == 0, done.stderr
    assert done.stdout == want
    assert len(want.split()) > 3 * 12
    assert done.stderr.count("tokens/s; peak memory") == 1


@on_cpu
def test_a_prompt_from_stdin_reaches_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "--model", str(save(tmp_path)), "-g", "6", "--device", "cpu"]
    assert cli.main([*options, "--prompt", "w5 w6"]) == 0
    done = torchrun(2, "-m", "fastattn", *options, "--prompt", "-", "--tp", input="w5 w6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out


@on_cpu
def test_benchmark_writes_one_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--model", "tiny", "-p", "9", "-g", "3", "-n", "1", "--attn", "fastattn,sdpa", "--json", str(file)]
    done = torchrun(2, "-m", "fastattn", "benchmark", "--tp", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("spread over 2 ranks") == done.stdout.count("[fastattn] Trial 1:") == 1
    assert "MISSING" not in done.stderr and "UserWarning" not in done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["arguments"]["world_size"] == 2
    assert report["command"].startswith("torchrun --nproc-per-node=2 -m fastattn benchmark --tp")
    assert report["model"]["parameters"] == 1705216  # those of all ranks
    assert set(report["implementations"]) == {"fastattn", "sdpa"}
    assert report["implementations"]["fastattn"]["calls"]


SCRIPT = """
import sys, time, torch
from fastattn.lm.parallel import join

with join("cpu") as ranks:
    ids = torch.tensor([ranks.rank])
    print("said by", ranks.rank)
    if sys.argv[1] == "all" or ranks.rank == 1:
        raise ValueError("ids: broken")
    ranks.broadcast(ids)
    time.sleep(300)
"""


@on_cpu
@pytest.mark.parametrize("who", ["all", "one"])
def test_a_rank_that_raises_ends_the_others(who: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    begin = time.monotonic()
    done = torchrun(2, str(script), who)
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    assert done.stdout == "said by 0\n"
    assert done.stderr.count("ValueError: ids: broken") == 1, done.stderr


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MODEL = ["--model", "DIR", "--prompt", "a"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["benchmark", "--tp", "--model", "tiny"], "tp: expected to be started by torchrun"),
        (["generate", "--tp", *MODEL], "tp: expected to be started by torchrun"),
    ],
)
def test_what_is_refused_here(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.splitlines()) == 1


def join_here(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from fastattn.lm.parallel import join

    for name, value in zip(VARIABLES, ("0", "1", "7", "localhost", "1")):
        monkeypatch.setenv(name, value)
    with join(device):
        pass


@pytest.mark.parametrize(
    "device, accelerator, said",
    [
        ("cpu", "cuda", "device: expected cuda, over which"),
        ("cuda:0", "cuda", "device: expected cpu or cuda, each rank"),
        ("cuda", "cuda", "tp: expected a GPU for each rank of a host, got 8 ranks or more and 2 GPUs"),
    ],
)
def test_devices_that_ranks_cannot_have(
    device: str, accelerator: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    with pytest.raises(ValueError, match=said):
        join_here(monkeypatch, device)


def ranks_of(store: str) -> Any:
    """`Ranks` of the process group that the test's processes are in."""
    from fastattn.lm.parallel import Ranks

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return Ranks(dist.FileStore(store, size), rank, size, torch.device("cpu"))


def agreements(store: str) -> list[Any]:
    ranks = ranks_of(store)
    ids = torch.full((2,), 10 + ranks.rank)
    ranks.broadcast(ids)
    told = ranks.from_first(lambda: ["first", ranks.rank])
    alike = [ranks.first_failure(None), ranks.first_failure("all of us"), ranks.first_failure(None), told, ids.tolist()]
    return [alike, ranks.first_failure("no room" if ranks.rank else None)]


def test_ranks_agree(tmp_path: Path, two: Processes) -> None:
    alike = [None, "all of us", None, ["first", 0], [10, 10]]
    assert two.run(agreements, str(tmp_path / "store")) == [[alike, "rank 1: no room"], [alike, "no room"]]


def runners_of(folder: str, store: str) -> tuple[str, str, list[int], torch.Tensor]:
    from fastattn.lm import load
    from fastattn.lm.runners.fused import FusedRunner
    from fastattn.lm.runners.select import make_runner

    loaded = load(folder, dtype=torch.float32, ranks=ranks_of(store))
    said = ""
    try:
        FusedRunner(loaded.model, 1, 64)
    except ValueError as error:
        said = str(error)
    runner: Any = make_runner(loaded, 2, 64)
    runner.prefill(1, torch.arange(1, 9))
    logits = runner.prefill(1, torch.arange(9, 20))
    memory = runner.cache.memory[0].keys.shape
    return said, type(runner).__name__, list(memory), logits


@on_cpu
@pytest.mark.parametrize("tied", [False, True])
def test_the_models_modules_run_it_with_their_own_heads(tied: bool, tmp_path: Path, two: Processes) -> None:
    from fastattn.lm import load

    folder = save(tmp_path / "model", tie_word_embeddings=tied)
    with torch.no_grad():
        want = load(folder, attn="eager", dtype=torch.float32).model(input_ids=torch.arange(1, 20)[None]).logits[0, -1]
    for said, kind, memory, logits in two.run(runners_of, str(folder), str(tmp_path / "store")):
        assert "expected whole weights" in said
        assert kind == "ModuleRunner"
        assert memory == [2, 1, 64, 8]  # one of two K/V heads
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


def refusal_of(folder: str, store: str) -> list[str]:
    from fastattn.lm import load

    try:
        load(folder, ranks=ranks_of(store))
    except ValueError as error:
        return [str(error)]
    return []


@on_cpu
def test_models_that_cannot_be_spread(tmp_path: Path, two: Processes) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = save(tmp_path / "plain")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(plain)
    odd = save(tmp_path / "odd", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    for folder, said in (
        (plain, "tp: GPT2LMHeadModel has no tensor parallel plan"),
        (odd, "divides the model's 3 heads and 3 K/V heads, got 2"),
    ):
        for answer in two.run(refusal_of, str(folder), str(tmp_path / f"{folder.name}.store")):
            assert said in answer[0]


@on_cpu
def test_a_compiled_step_is_not_measured(tmp_path: Path) -> None:
    from fastattn.bench import model
    from fastattn.lm.parallel import Ranks

    alone = Ranks(dist.FileStore(str(tmp_path / "store"), 1), 0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="attn: sdpa-static cannot be measured with --tp"):
        model.run(model.Settings("tiny", attn=("sdpa-static",)), alone)


@pytest.mark.gpu
def test_one_rank_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--model", "tiny", "-p", "33", "-g", "9", "-n", "1", "--attn", "fastattn,sdpa", "--json", str(file)]
    done = torchrun(1, "-m", "fastattn", "benchmark", "--tp", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["arguments"]["world_size"] == 1
    assert report["arguments"]["device"] == "cuda:0"
    assert "not captured" not in done.stderr
