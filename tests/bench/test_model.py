import functools
import json
import re

import pytest
import torch

import fastattn
import fastattn.lm
from fastattn.bench import model as bench
from fastattn.bench import model_runners
from fastattn.bench.loaded import Held
from fastattn.bench.model import Settings, fresh_lengths, run
from fastattn.bench.model_report import FreshLength, Report, Result, Trial
from fastattn.lm.parallel import Ranks

SMALL = {"model": "tiny", "prompt_tokens": 12, "generation_tokens": 3, "num_trials": 2, "device": "cpu"}


@pytest.mark.parametrize(
    "name", ["prompt_tokens", "generation_tokens", "batch_size", "num_trials", "prefill_step_size"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got {value}"):
        Settings(**{"model": "tiny", name: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"delay": -1.0}, "delay: expected 0 or more"),
        ({"delay": float("nan")}, "delay: expected 0 or more"),
        ({"fresh_lengths": -1}, "fresh_lengths: expected 0 or more"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"dtype": "int8"}, "dtype: expected one of bfloat16"),
        ({"prompt_lengths": (0, 5)}, "prompt_lengths: expected 1 <= low"),
        ({"prompt_lengths": (6, 5)}, "prompt_lengths: expected 1 <= low"),
        ({"prompt_lengths": (5, 6), "fresh_lengths": 1}, "fresh_lengths: only"),
        ({"attn": ()}, "attn: expected one or more names"),
        ({"attn": ("sdpa", "sdpa")}, "attn: expected one or more names, each once"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"model": "tiny", **changes})


@pytest.mark.parametrize("prompt, generation, count, step", [(2049, 128, 10, 2048), (8, 128, 5, 2048), (300, 1, 4, 64)])
def test_fresh_lengths_are_met_by_nothing_else(prompt, generation, count, step):
    settings = Settings(
        "tiny",
        prompt,
        generation_tokens=generation,
        prefill_step_size=step,
        attn=("fastattn", "sdpa"),
        fresh_lengths=count,
    )
    lengths = fresh_lengths(settings, 100_000)
    assert [len(own) for own in lengths] == [count, count]
    together = lengths[0] + lengths[1]
    assert len(set(together)) == 2 * count
    for n in together:
        assert n >= 2
        assert not prompt <= n <= prompt + generation  # prompts and decode steps of the trials
        assert (n - 1) % step
        assert abs(n - prompt) <= max(generation + 4 * count, prompt // 8)
    assert lengths == fresh_lengths(settings, 100_000)


def test_fresh_lengths_for_a_model_that_is_too_short():
    settings = Settings("tiny", 4, generation_tokens=10, attn=("sdpa",), fresh_lengths=50)
    with pytest.raises(ValueError, match="fresh_lengths: expected at most 8 for prompts of 4 tokens"):
        fresh_lengths(settings, 20)


def test_lines_are_those_of_mlx_lm(capsys):
    run(Settings(**SMALL, attn=("sdpa",), batch_size=2))
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d{3}"
    figures = f"prompt_tps={number}, generation_tps={number}, peak_memory={number}"
    expected = [
        r"Model tiny: 1\.71e6 parameters \(random weights\), float32, on the CPU",
        r"Running warmup\.\.",
        r"Timing with prompt_tokens=12, generation_tokens=3, batch_size=2\.",
        f"Trial 1:  {figures}, total_time={number}",
        f"Trial 2:  {figures}, total_time={number}",
        f"Averages: {figures}",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), line


def test_definitions(monkeypatch):
    """The clock is read when a trial starts, at the first token and at the end: 0, 2 and 5 seconds."""
    times = iter([0.0, 2.0, 5.0] * 3)
    monkeypatch.setattr(model_runners, "clock", lambda device: next(times))
    monkeypatch.setattr(bench, "peak_memory", lambda device: 7_500_000_000)
    (result,) = run(Settings(**SMALL, attn=("sdpa",), batch_size=4)).results
    assert result.trials == [Trial(4 * 12 / 2, 4 * 3 / 3, 7.5, 5.0)] * 2
    assert result.average("prompt_tps") == 24.0


def test_one_generated_token_has_no_generation_speed():
    (result,) = run(Settings(**{**SMALL, "generation_tokens": 1}, attn=("sdpa",))).results
    assert result.average("generation_tps") == 0.0


def test_implementations_get_the_same_fresh_prompts(monkeypatch):
    seen = {}
    real = model_runners.generate_tokens

    def spy(model, ids, **rest):
        seen.setdefault(model.config._attn_implementation, []).append(ids)
        assert rest == {"step": 5}
        return real(model, ids, **rest)

    monkeypatch.setattr(model_runners, "generate_tokens", spy)
    run(Settings(**SMALL, attn=("sdpa", "eager"), prefill_step_size=5))
    assert len(seen["sdpa"]) == 3  # a warmup and two trials
    assert all(torch.equal(a, b) for a, b in zip(seen["sdpa"], seen["eager"]))
    assert not torch.equal(seen["sdpa"][1], seen["sdpa"][2])


def test_fresh_lengths_are_timed_twice_each(monkeypatch, capsys):
    seen = []
    real = bench._time_to_first
    monkeypatch.setattr(bench, "_time_to_first", lambda *args: (seen.append(args[3]), real(*args))[1])
    (result,) = run(Settings(**SMALL, attn=("sdpa",), fresh_lengths=3)).results
    lengths = [f.length for f in result.fresh]
    assert seen == [m for n in lengths for m in (12, n, n)]  # after a prompt of a length that is known
    assert 12 not in lengths
    assert result.fresh_ratio == sorted(f.first / f.second for f in result.fresh)[1]
    out = capsys.readouterr().out
    assert all(f"New length {n}: first=" in out for n in lengths)
    assert f"median first/second={result.fresh_ratio:.3f}" in out


def test_out_of_memory_costs_one_implementation_only(monkeypatch, capsys):
    real = bench._trial

    def trial(loaded, runner, settings, number, others):
        if loaded.model.config._attn_implementation == "eager" and number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, runner, settings, number, others)

    monkeypatch.setattr(bench, "_trial", trial)
    report = run(Settings(**SMALL, attn=("eager", "sdpa")))
    eager, sdpa = report.results
    assert eager.error == "out of memory"
    assert eager.average("prompt_tps") is None
    assert sdpa.error is None
    assert len(sdpa.trials) == 2
    assert "eager: out of memory, given up" in capsys.readouterr().out
    json.dumps(report.as_dict("x"), allow_nan=False)
    assert report.comparison()


def test_running_out_of_memory_on_one_of_several_ranks_ends_it(monkeypatch):
    """The others are in a collective with it: there is nothing that this one could pass over to."""

    def trial(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "_trial", trial)
    ranks = Ranks(torch.distributed.HashStore(), 0, 1, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        run(Settings(**SMALL, attn=("eager", "sdpa")), ranks)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attn": ("sdpa", "nope")}, "attn: expected one of"),
        ({"model": "nope"}, "model: expected a directory"),
        ({"prompt_tokens": 131072}, "expected at most the model's 131072, got 131075"),
        ({"device": "cuda:99"}, "device: "),
    ],
)
def test_unusable_settings_are_refused_before_anything_runs(changes, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_measure", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        run(Settings(**{**SMALL, "attn": ("sdpa",), **changes}))
    assert capsys.readouterr().out == ""


def test_fastattn_against_eager():
    before = fastattn.stats()["calls"]
    report = run(Settings(**SMALL, attn=("fastattn", "eager"), fresh_lengths=1))
    ours, eager = report.results
    # Two layers; a prompt, then two steps; three times; and a new length twice, after a known one.
    assert sum(ours.calls.values()) == 2 * (3 * (1 + 2) + 3)
    # The runner was tried on a few tokens before, which is no part of what is measured.
    assert sum(fastattn.stats()["calls"].values()) - sum(before.values()) > sum(ours.calls.values())
    assert eager.calls == {}


@pytest.mark.parametrize("name", ["fastattn", "fastattn-hf", "sdpa", "sdpa-static"])
def test_every_runner_continues_prompts_alike(name, monkeypatch):
    """Greedily, each prompt as if it were alone, whatever their lengths."""
    loaded = fastattn.lm.load("tiny", model_runners.attention_of(name), torch.float32, "cpu", 0)
    made = []
    real = type(loaded.model).forward

    @functools.wraps(real)
    def forward(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        made.append(found.logits[:, -1].argmax(-1).tolist())
        return found

    monkeypatch.setattr(type(loaded.model), "forward", forward)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    runner = model_runners.make_runner(loaded, name, 2, 16, 2048)
    for some in (prompts[:1], prompts):
        first, end = model_runners.timed(lambda some=some: runner.run(some, 4), loaded.model.device)
        assert 0 < first < end
    if name != "fastattn":  # whose runner brings its own layers, and is compared with transformers elsewhere
        expected = []
        ids = torch.tensor(prompts[1:])
        for _ in range(4):
            with torch.inference_mode():
                token = real(loaded.model, ids).logits[:, -1].argmax(-1)
            expected.append(token.item())
            ids = torch.cat([ids, token[:, None]], 1)
        assert [tokens[1] for tokens in made if len(tokens) == 2] == expected


def test_prompts_of_different_lengths(monkeypatch):
    seen = []
    real = model_runners._Engine.run

    def run_(self, prompts, tokens):
        seen.append([len(prompt) for prompt in prompts])
        return real(self, prompts, tokens)

    monkeypatch.setattr(model_runners._Engine, "run", run_)
    settings = Settings(**{**SMALL, "prompt_lengths": (3, 9), "batch_size": 4})
    (result,) = run(settings).results
    assert seen == [settings.lengths(i) for i in range(3)]
    assert all(3 <= n <= 9 for own in seen for n in own)
    assert len({tuple(own) for own in seen}) == 3
    trial = result.trials[0]
    assert trial.prompt_tps * (trial.total_time - 4 * 3 / trial.generation_tps) == pytest.approx(sum(seen[1]), rel=0.01)


def test_a_peak_is_not_due_to_what_others_hold(monkeypatch):
    allocated = 100
    held = Held(torch.device("cpu"))
    monkeypatch.setattr(held, "_allocated", lambda: allocated)
    with held.by("a"):
        allocated = 130
    with held.by("b"):
        allocated = 135
    with held.by("a"):
        allocated = 140
    assert (held.by_others("a"), held.by_others("b"), held.by_others("c")) == (5, 35, 40)


def test_report_keeps_every_figure_and_its_circumstances():
    result = Result("sdpa", [Trial(10.0, 5.0, 1.0, 2.0), Trial(20.0, 7.0, 2.0, 2.0)], [FreshLength(7, 0.3, 0.1)])
    found = Report({"device": "cpu", "seed": 1}, {"name": "tiny"}, [result]).as_dict("fastattn benchmark")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"benchmark", "date", "command", "environment", "arguments", "model", "implementations"}
    sdpa = found["implementations"]["sdpa"]
    assert sdpa["trials"][1] == {"prompt_tps": 20.0, "generation_tps": 7.0, "peak_memory": 2.0, "total_time": 2.0}
    assert sdpa["averages"] == {"prompt_tps": 15.0, "generation_tps": 6.0, "peak_memory": 1.5}
    assert sdpa["fresh_lengths"]["lengths"][0] | {"ratio": 3.0} == {
        "length": 7, "first_s": 0.3, "second_s": 0.1, "ratio": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("names, base", [(("fastattn", "sdpa"), "sdpa"), (("fastattn", "eager"), "fastattn")])
def test_comparison_is_with_sdpa_or_else_the_first(names, base):
    results = [Result(name, [Trial(100.0 / (i + 1), 10.0 * (i + 1), 1.0, 1.0)]) for i, name in enumerate(names)]
    head, _, *rows = Report({}, {}, results).comparison().splitlines()
    assert head.count(f"/ {base}") == 2
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells[base][1::2][:2] == ["1.00x", "1.00x"]
    if base == "sdpa":
        assert cells["fastattn"] == ["100.000", "2.00x", "10.000", "0.50x", "1.000", "-"]


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    settings = Settings("tiny", 300, generation_tokens=5, num_trials=1, attn=("fastattn", "sdpa"), fresh_lengths=2)
    report = run(settings)
    assert (report.arguments["dtype"], report.arguments["device"]) == ("bfloat16", "cuda:0")
    assert f"on {torch.cuda.get_device_name()}" in capsys.readouterr().out
    for result in report.results:
        assert 0.003 < result.average("peak_memory") < 1  # the weights alone are 3.4 MB
        assert len(result.fresh) == 2
    environment = report.as_dict("x")["environment"]
    assert all(environment[key] for key in ("gpu", "compute_capability", "gpu_memory", "driver", "cuda", "cudnn"))


def test_no_trial_changes_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for the first run, or for the second, is used by another one before anything is timed."""
    runs: list[int] = []
    compiled = {1: 2, 2: 1}  # after so many runs, so many kernels
    held = [5]
    monkeypatch.setattr(bench.binaries, "stats", lambda: {"binaries": held[0]})
    monkeypatch.setattr(bench.binaries, "wait", lambda timeout: held.append(held.pop() + compiled.get(len(runs), 0)))
    bench._settle(lambda: runs.append(1))
    assert len(runs) == 3
    runs[:] = [1] * 5
    bench._settle(lambda: runs.append(1))
    assert len(runs) == 6
