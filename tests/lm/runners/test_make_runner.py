"""Which runner a model gets, and the runner for one row after another."""

import pytest
import torch
from fake_runner import collect, ragged

from fastattn import FastattnWarning
from fastattn.lm import Engine, load, make_runner
from fastattn.lm.runners.fused import FusedRunner
from fastattn.lm.runners.module import ModuleRunner
from fastattn.lm.runners.per_row import PerRowRunner
from fastattn.lm.runners.recompute import RecomputeRunner
from fastattn.lm.runners.select import PER_ROW, Candidate, candidates, first_that_fits

pytestmark = pytest.mark.usefixtures("fresh_warnings")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", attn="eager", device="cpu", dtype=torch.float32)


def reference(loaded, prompt, count, **options):
    ids = torch.tensor([prompt])
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def test_the_loop_gives_what_transformers_gives(tiny):
    prompts = ragged(3, most=12, vocab_size=1024)
    expected = [reference(tiny, prompt, 6, eos_token_id=None) for prompt in prompts]
    runner = PerRowRunner(tiny.model, 2, 64)
    assert collect(Engine(runner).generate(prompts, 6))[0] == expected


@pytest.mark.parametrize("step", [3, 4, 100])
def test_the_loop_prefills_in_steps(tiny, step):
    ids = torch.randint(1024, (11,))
    runner = PerRowRunner(tiny.model, 2, 64, prefill_step=step)
    torch.testing.assert_close(runner.prefill(1, ids), tiny.model(ids[None]).logits[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        runner.decode(torch.tensor([3, 4]))[1], tiny.model(torch.cat([ids, torch.tensor([4])])[None]).logits[0, -1]
    )


def test_a_full_row_of_the_loop_stays_as_it_is(tiny):
    runner = PerRowRunner(tiny.model, 2, 5)
    for row in range(2):
        runner.prefill(row, torch.tensor([1, 2, 3, 4]))
        runner.decode(torch.tensor([5] * (row + 1)))
    assert not runner.decode(torch.tensor([5])).any()  # beyond a row's capacity there are no logits
    runner.clear(0)
    after = runner.prefill(0, torch.tensor([1, 2]))
    torch.testing.assert_close(after, tiny.model(torch.tensor([[1, 2]])).logits[0, -1], rtol=1e-4, atol=1e-4)


def refuses(*arguments):
    raise ValueError("tiny: no such family\nand more")


def test_the_loop_is_what_remains_and_says_why(tiny):
    tried = [Candidate(refuses), Candidate(PerRowRunner, {}, PER_ROW)]
    with pytest.warns(FastattnWarning, match="one row after another, which is slow: tiny: no such family$"):
        assert isinstance(first_that_fits(tried, tiny, 2, 64), PerRowRunner)


def test_the_first_runner_that_takes_the_model_serves(tiny):
    tried = [Candidate(refuses), Candidate(PerRowRunner), Candidate(RecomputeRunner)]
    assert isinstance(first_that_fits(tried, tiny, 2, 64), PerRowRunner)  # without a warning: pytest would show it
    fast = [candidate.make for candidate in candidates(tiny) if not candidate.slow]
    assert fast == [ModuleRunner]  # eager was asked for
    ours = load("tiny", attn="fastattn", device="cpu")
    assert [candidate.make for candidate in candidates(ours) if not candidate.slow] == [FusedRunner, ModuleRunner]


def test_a_runner_with_other_logits_is_passed_over(tiny):
    class Wrong(PerRowRunner):
        def decode(self, ids):
            return super().decode(ids).roll(1, -1)

    assert isinstance(first_that_fits([Candidate(Wrong), Candidate(RecomputeRunner)], tiny, 2, 64), RecomputeRunner)
    with pytest.raises(ValueError, match="model: tiny cannot be run: its logits after a token after a prompt are not"):
        first_that_fits([Candidate(Wrong)], tiny, 2, 64)


def test_an_error_in_a_runner_is_no_refusal(tiny):
    with pytest.raises(AttributeError):
        first_that_fits([Candidate(lambda *arguments: {}.missing)], tiny, 2, 64)


@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")
@pytest.mark.parametrize("attn", ["fastattn", "sdpa"])
def test_any_runner_gives_what_transformers_gives(attn):
    loaded = load("tiny", attn=attn, device="cpu", dtype=torch.float32)
    prompts = ragged(3, most=12, vocab_size=1024)
    expected = [reference(loaded, prompt, 6, eos_token_id=None) for prompt in prompts]
    assert collect(Engine(make_runner(loaded, 2, 64)).generate(prompts, 6))[0] == expected


@pytest.mark.parametrize(
    "rows, capacity, message",
    [
        (0, 8, "rows: expected at least 1, got 0"),
        (1, 0, "capacity: expected at least 1"),
        (1, 2**30, "at most the mod"),
    ],
)
def test_bad_sizes(tiny, rows, capacity, message):
    with pytest.raises(ValueError, match=message):
        make_runner(tiny, rows, capacity)
