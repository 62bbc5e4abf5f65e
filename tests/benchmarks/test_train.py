import json
import re

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import fastattn
import fastattn.lm
from benchmarks import train as bench
from benchmarks.command import end
from benchmarks.train import Settings, run, step_lengths
from benchmarks.train_report import Report, Result, Step
from fastattn.lm.loading.presets import PRESETS

SMALL = {"model": "tiny", "prompt_tokens": 12, "num_trials": 2, "warmup_steps": 1, "device": "cpu"}


def step(loss=1.0, norm=None, **changes):
    return Step(**{"length": 8, "tokens_per_second": 10.0, "seconds": 2.0, "loss": loss, "peak_memory": 1.0,
                   "gradient_norm": norm, **changes})  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_trials": 0}, "num_trials: expected at least 1, got 0"),
        ({"warmup_steps": 0}, "warmup_steps: expected at least 1, got 0"),
        ({"prompt_tokens": 1}, "prompt_tokens: expected at least 2 to train on, got 1"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, got 'lion'"),
        ({"variable_lengths": (1, 50)}, r"variable_lengths: expected LOW,HIGH from 2 .*, got 1,50"),
        ({"variable_lengths": (9, 3)}, r"variable_lengths: .*, got 9,3"),
        ({"variable_lengths": (8, 19)}, "a length for each of 13 steps, got 8,19"),
        ({"delay": -1.0}, "delay: expected 0 or more"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"dtype": "int8"}, "dtype: expected one of bfloat16"),
        ({"attn": ("sdpa", "sdpa")}, "attn: expected one or more names, each once"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"model": "tiny", **changes})


def test_gpt2(monkeypatch, capsys):
    """A preset whose modules are not Llama's: the same losses, gradients that agree, and no more tokens than it has."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 99, "n_positions": 16}
    monkeypatch.setitem(PRESETS, "gpt2", PRESETS["gpt2"] | sizes | {"bos_token_id": 1, "eos_token_id": 1})
    report = run(Settings(**SMALL | {"model": "gpt2"}, batch_size=2, attn=("fastattn", "sdpa")))
    ours, theirs = report.results
    assert [s.loss for s in ours.steps] == pytest.approx([s.loss for s in theirs.steps], rel=1e-5)
    assert not report.disagreements() and ours.calls and not theirs.calls
    with pytest.raises(ValueError, match="prompt_tokens: expected at most the model's 16, got 17"):
        run(Settings(**SMALL | {"model": "gpt2", "prompt_tokens": 17}))


def test_lengths():
    assert step_lengths(Settings("tiny", 100, num_trials=4, warmup_steps=2)) == [100] * 6
    settings = Settings("tiny", num_trials=9, warmup_steps=2, variable_lengths=(50, 60))
    lengths = step_lengths(settings)
    assert lengths[0] == 60
    assert sorted(lengths) == list(range(50, 61))  # 11 steps, 11 lengths: each once
    assert lengths == step_lengths(settings)
    assert lengths != step_lengths(Settings("tiny", num_trials=9, warmup_steps=2, variable_lengths=(50, 60), seed=1))


def test_lines(capsys):
    run(Settings(**SMALL, attn=("sdpa",), batch_size=2))
    number = r"\d+\.\d{3}"
    expected = [
        r"Model tiny: 1\.71e6 parameters \(random weights\), float32, on the CPU",
        r"Running warmup\.\.",
        r"Timing training with prompt_tokens=12, batch_size=2, adamw\.",
        *[
            f"Step {i}:  length=12, tokens_per_second={number}, "
            f"loss={number}\\d, peak_memory={number}, seconds={number}"
            for i in (1, 2)
        ],
        f"All steps: tokens_per_second={number}, median_step={number}, peak_memory={number}, "
        f"last_loss={number}\\d, last_gradient_norm={number}\\d",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), line


def test_definitions(monkeypatch):
    """The clock is read when a step starts and ends: a warmup of 9 s, then 2 s and 6 s."""
    times = iter([0.0, 9.0, 10.0, 12.0, 20.0, 26.0])
    monkeypatch.setattr(bench, "clock", lambda device: next(times))
    memory = iter([9_000_000_000, 5_000_000_000, 4_000_000_000])
    monkeypatch.setattr(bench, "peak_memory", lambda device: next(memory))
    (result,) = run(Settings(**SMALL, attn=("sdpa",), batch_size=4)).results
    assert [(s.tokens_per_second, s.seconds, s.peak_memory) for s in result.steps] == [(24, 2, 5), (8, 6, 4)]
    assert result.tokens_per_second == 2 * 4 * 12 / 8
    assert result.median == 16
    assert result.peak_memory == 5


def test_turns_with_the_same_tokens_and_weights(monkeypatch):
    """Everyone's steps are on the same batches, and no step changes the weights that the next one sees."""
    seen = []
    real = bench._step

    def spy(loaded, optimizer, ids, last):
        weights = torch.cat([p.detach().flatten() for p in loaded.model.parameters()])
        assert loaded.model.training
        assert all(p.grad is None for p in loaded.model.parameters())
        seen.append((loaded.model.config._attn_implementation, ids, weights))
        return real(loaded, optimizer, ids, last)

    monkeypatch.setattr(bench, "_step", spy)
    settings = Settings(**SMALL, attn=("sdpa", "eager"), variable_lengths=(5, 30), batch_size=3)
    run(settings)
    assert [name for name, *_ in seen] == ["sdpa", "eager", "eager", "sdpa", "sdpa", "eager"]
    assert [ids.shape for _, ids, _ in seen[::2]] == [(3, n) for n in step_lengths(settings)]
    for (_, ids, weights), (_, other_ids, other_weights) in zip(seen[::2], seen[1::2]):
        assert torch.equal(ids, other_ids)
        assert torch.equal(weights, other_weights)
    assert torch.equal(seen[0][2], seen[-1][2])


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_works(monkeypatch, name, kind):
    """The learning rate is 0, but its step is taken, on gradients that the backward has made."""
    norms = []

    def spy(self, *args, **kwargs):
        norms.append(sum(p.grad.abs().sum().item() for group in self.param_groups for p in group["params"]))
        return real(self, *args, **kwargs)

    real = kind.step
    monkeypatch.setattr(kind, "step", spy)
    (result,) = run(Settings(**SMALL, attn=("sdpa",), optimizer=name)).results
    assert len(norms) == 3
    assert min(norms) > 0
    assert result.steps[-1].gradient_norm > 0


def test_loss_and_gradients_are_those_of_the_model():
    (result,) = run(Settings(**SMALL, attn=("eager",))).results
    loaded = fastattn.lm.load("tiny", "eager", device="cpu")
    ids = bench._tokens(loaded, Settings(**SMALL), 12, 2)
    logits = loaded.model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    norm = sum(p.grad.double().square().sum() for p in loaded.model.parameters()).sqrt().item()
    assert result.steps[-1].loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.steps[-1].gradient_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fastattn_against_sdpa(checkpointing, capsys):
    before = fastattn.stats()["calls"]
    settings = Settings(
        **SMALL, attn=("fastattn", "sdpa"), variable_lengths=(20, 40), gradient_checkpointing=checkpointing
    )
    report = run(settings)
    ours, sdpa = report.results
    after = fastattn.stats()["calls"]
    backward = sum(n for key, n in ours.calls.items() if key.endswith(".backward"))
    assert backward == 2 * 3  # layers, steps
    # A checkpointed layer runs its forward again.
    assert sum(ours.calls.values()) - backward == 2 * 3 * (2 if checkpointing else 1)
    assert sum(after.values()) - sum(before.values()) == sum(ours.calls.values())
    assert sdpa.calls == {}
    assert report.disagreements() == []
    assert "Warning" not in capsys.readouterr().out
    for a, b in zip(ours.steps, sdpa.steps, strict=True):
        assert a.length == b.length
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_an_implementation_that_computes_something_else_is_noticed(monkeypatch, capsys):
    def not_causal(module, query, key, value, attention_mask, **rest):
        """Sees the future."""
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * rest["scaling"]
        return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    # Not `register`: nothing takes a name out again, and other tests list them.
    monkeypatch.setitem(AttentionInterface._global_mapping, "not_causal", not_causal)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "not_causal", eager_mask)
    report = run(Settings(**SMALL, attn=("sdpa", "not_causal")))
    lines = report.disagreements()
    assert any(
        re.fullmatch(r"gradient of not_causal and of sdpa lie .* apart, expected at most 1e-03", line) for line in lines
    )
    out = capsys.readouterr().out
    assert all(f"Warning: {line}\n" in out for line in lines)
    assert report.as_dict("x")["disagreements"] == lines


@pytest.mark.parametrize(
    "loss, norm, expected",
    [
        (2.0, 3.0, []),
        (2.0001, 3.001, []),
        (2.01, 3.0, ["loss of fastattn and of sdpa lie 5.0e-03 apart, expected at most 1e-04"]),
        (2.0, 3.3, ["gradient of fastattn and of sdpa lie 1.0e-01 apart, expected at most 1e-03"]),
        (float("nan"), 3.0, ["loss of fastattn is nan"]),
        (2.0, float("inf"), ["gradient of fastattn is inf"]),
    ],
)
def test_disagreements(loss, norm, expected):
    results = [Result("fastattn", [step(1.0), step(loss, norm)]), Result("sdpa", [step(1.0), step(2.0, 3.0)])]
    report = Report({"dtype": "float32", "device": "cpu"}, {}, results)
    assert report.disagreements() == expected
    json.dumps(report.as_dict("x"), allow_nan=False)


def test_out_of_memory_costs_one_implementation_only(monkeypatch, capsys):
    real = bench._step

    def fail(loaded, optimizer, ids, last):
        if loaded.model.config._attn_implementation == "eager" and last:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, optimizer, ids, last)

    monkeypatch.setattr(bench, "_step", fail)
    report = run(Settings(**SMALL, attn=("eager", "sdpa")))
    eager, sdpa = report.results
    assert (eager.error, sdpa.error) == ("out of memory", None)
    assert eager.tokens_per_second is None
    assert len(sdpa.steps) == 2
    assert "eager: out of memory, given up" in capsys.readouterr().out
    assert report.disagreements() == []
    assert "eager" in report.comparison()
    json.dumps(report.as_dict("x"), allow_nan=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attn": ("sdpa", "nope")}, "attn: expected one of"),
        ({"model": "nope"}, "model: expected a directory"),
        ({"prompt_tokens": 131073}, "prompt_tokens: expected at most the model's 131072, got 131073"),
        ({"variable_lengths": (8, 200000)}, "variable_lengths: expected at most the model's 131072, got 200000"),
    ],
)
def test_unusable_settings_are_refused_before_anything_runs(changes, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_measure", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        run(Settings(**{**SMALL, "attn": ("sdpa",), **changes}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line, message",
    [
        ("--variable-lengths 3", "expected 2 whole numbers separated by commas, got '3'"),
        ("--variable-lengths 40,3", "variable_lengths: expected LOW,HIGH"),
        ("--optimizer lion", "argument --optimizer: invalid choice: 'lion'"),
        ("-p 1", "prompt_tokens: expected at least 2"),
        ("--fused-loss", "fused_loss: only with fused_ops"),
        ("--attn sdpa --fused-ops on", "fused_ops: only fastattn uses them"),
        ("--json no/such/place.json", "there is no directory"),
    ],
)
def test_bad_options_end_the_command(capsys, monkeypatch, line, message):
    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught:
        end(lambda: bench.main(["--model", "tiny", *line.split()]))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_command_and_its_file(tmp_path, capsys):
    file = tmp_path / "train.json"
    line = "--model tiny --device cpu -b 2 -n 3 --warmup-steps 2 --variable-lengths 8,20 "
    line += f"--optimizer sgd --attn fastattn,sdpa --json {file}"
    assert bench.main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    table = out[out.index("\nattention ") :].splitlines()[1:4]
    assert table[0].count("/ sdpa") == 2
    assert table[2].split()[0] == "fastattn"
    found = json.loads(file.read_text())
    assert found["benchmark"] == "train"
    assert found["command"] == f"python -m benchmarks.train {line}"
    assert found["environment"]["torch"] == torch.__version__
    assert found["arguments"]["variable_lengths"] == [8, 20]
    assert (found["arguments"]["num_trials"], found["arguments"]["dtype"]) == (3, "float32")
    ours, sdpa = (found["implementations"][name] for name in ("fastattn", "sdpa"))
    assert [s["length"] for s in ours["steps"]] == [s["length"] for s in sdpa["steps"]]
    assert ours["averages"]["last_loss"] == pytest.approx(sdpa["averages"]["last_loss"], rel=1e-5)
    assert set(ours["averages"]) == {
        "tokens_per_second", "median_step_tokens_per_second", "peak_memory", "last_loss", "last_gradient_norm",
    }  # fmt: skip


@pytest.mark.parametrize("names, base", [(("fastattn", "sdpa"), "sdpa"), (("fastattn", "eager"), "fastattn")])
def test_comparison_is_with_sdpa_or_else_the_first(names, base):
    results = [Result(name, [step(tokens_per_second=100.0 / (i + 1))]) for i, name in enumerate(names)]
    head, _, *rows = Report({}, {}, results).comparison().splitlines()
    assert head.count(f"/ {base}") == 2
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells[base][1::2][:2] == ["1.00x", "1.00x"]
    if base == "sdpa":
        assert cells["fastattn"] == ["100.000", "2.00x", "100.000", "2.00x", "1.000", "1.0000", "-"]


@pytest.mark.gpu
def test_on_a_gpu():
    settings = Settings("tiny", num_trials=3, variable_lengths=(200, 400), attn=("fastattn", "sdpa"))
    report = run(settings)
    assert (report.arguments["dtype"], report.arguments["device"]) == ("bfloat16", "cuda:0")
    assert report.disagreements() == []
    ours = report.results[0]
    assert ours.calls.get("cudnn.backward", 0) > 0
    for result in report.results:
        assert 0.01 < result.peak_memory < 1  # weights, gradients and two moments are 13.6 MB
