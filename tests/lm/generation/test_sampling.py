import math

import pytest
import torch
from fake_runner import FakeRunner
from transformers import LogitsProcessor
from transformers.generation import logits_process as known

from fastattn.lm import load
from fastattn.lm.generation.engine import Engine
from fastattn.lm.generation.sampling import Chooser, Sampling, choose
from fastattn.lm.runners.per_row import PerRowRunner

PROMPT = torch.tensor([3, 1, 4, 1, 5])


def tokens(logits, how, count):
    """What is drawn from the same logits again and again."""
    chooser, ids = Chooser(how, PROMPT, count), torch.zeros(1, dtype=torch.int64)
    found = []
    for _ in range(count):
        choose([chooser], logits[None], ids)
        found.append(int(ids))
    return found


def test_the_default_is_greedy():
    assert Sampling().is_greedy
    assert not Sampling(temperature=1.0).is_greedy
    assert not Sampling(repetition_penalty=1.2).is_greedy


def test_greedy_rows_are_left_alone():
    ids = torch.tensor([7, 8, 9])
    choose([None, Chooser(Sampling(temperature=1.0, top_k=1), PROMPT, 5), None], torch.eye(12)[:4] * 50, ids)
    assert ids.tolist() == [7, 1, 9]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature):
    logits = torch.randn(6)
    count = 4000
    found = torch.tensor(tokens(logits, Sampling(temperature=temperature, seed=1), count)).bincount(minlength=6)
    expected = (logits / temperature).softmax(-1)
    assert torch.allclose(found / count, expected, atol=5 * 0.5 / math.sqrt(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}]
)
def test_only_those_that_transformers_would_keep_are_drawn(options, dtype):
    logits = (2 * torch.randn(40)).to(dtype)
    scores = logits.float()[None] / 1.5
    kinds = {"top_k": known.TopKLogitsWarper, "top_p": known.TopPLogitsWarper, "min_p": known.MinPLogitsWarper}
    for name, value in options.items():
        scores = kinds[name](value)(None, scores)
    kept = set((scores[0] > -math.inf).nonzero()[:, 0].tolist())
    found = tokens(logits, Sampling(temperature=1.5, seed=2, **options), 600)
    assert set(found) <= kept
    assert len(set(found)) > len(kept) // 2


def test_the_seed_decides():
    logits = torch.randn(1000)
    a, b, c = (tokens(logits, Sampling(temperature=1.0, seed=seed), 8) for seed in (5, 5, 6))
    assert a == b != c
    d, e = (tokens(logits, Sampling(temperature=1.0), 8) for _ in range(2))
    assert d != e  # none: another each time


def test_torchs_own_generator_is_left_alone():
    logits = torch.randn(9)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    tokens(logits, Sampling(temperature=1.0), 3)
    assert torch.rand(1) == expected


def test_requests_have_seeds_of_their_own():
    how = Sampling(temperature=1.0, seed=2**63 - 1)
    assert [how.for_request(i).seed for i in range(3)] == [2**63 - 1, 0, 1]
    assert Sampling(temperature=1.0).for_request(3).seed is None


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.5])
def test_repetition_penalty_is_that_of_transformers(penalty):
    loaded = load("tiny", attn="eager", device="cpu", dtype=torch.float32)
    ids = torch.randint(1024, (1, 6))
    expected = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=penalty,
    )
    events = Engine(PerRowRunner(loaded.model, 1, 64)).generate(
        [*ids.tolist(), [9, 9]], 12, Sampling(repetition_penalty=penalty)
    )
    assert [event.token for event in events if event.request == 0] == expected[0, 6:].tolist()


@pytest.mark.parametrize("ahead", [False, True])
def test_processors_see_the_prompt_and_all_that_came_after_it(ahead):
    seen = []

    class Forced(LogitsProcessor):
        """Adds one to the last token."""

        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            assert scores.dtype == torch.float32
            return scores.scatter(1, input_ids[:, -1:] + 1, 1e9)

    how = Sampling(processors=[Forced()])
    events = Engine(FakeRunner(2), ahead=ahead).generate([[3, 7], [40]], 3, [how, Sampling()])
    found = [event.token for event in events if event.request == 0]
    assert found == [8, 9, 10]
    assert seen == [[[3, 7]], [[3, 7, 8]], [[3, 7, 8, 9]]]


def test_rows_together_are_what_they_are_alone():
    hows = [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, seed=2),
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.8, top_p=0.7, seed=4),
        Sampling(temperature=0.8, repetition_penalty=1.4, seed=5),
        Sampling(temperature=0.8, repetition_penalty=1.4, seed=6),
        Sampling(repetition_penalty=1.4),
    ]
    steps = torch.randn(5, 9, 50)  # a row more than there are requests, as in a bucket

    def run(rows):
        choosers = [None if hows[row].is_greedy else Chooser(hows[row], PROMPT, 5) for row in rows]
        found = []
        for logits in steps[:, rows]:
            ids = logits.argmax(-1)
            choose(choosers, torch.cat([logits, logits[:1]]), ids)
            found.append(ids)
        return torch.stack(found, 1)

    together = run(list(range(8)))
    for row in range(8):
        assert torch.equal(run([row])[0], together[row])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature: expected a number of 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a number of 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature: expected a number of 0 or more, got inf"),
        ({"temperature": 1, "top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"temperature": 1, "top_p": 1.1}, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"temperature": 1, "top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"temperature": 1, "top_k": 1.5}, "top_k: expected a whole number, at least 0, got 1.5"),
        ({"temperature": 1, "min_p": -1}, r"min_p: expected a number in \[0, 1\], got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": 2**63}, "seed: expected at most"),
        ({"top_p": 0.5}, "top_p: only with a temperature above 0"),
        ({"top_k": 5}, "top_k: only with a temperature above 0"),
        ({"min_p": 0.1}, "min_p: only with a temperature above 0"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampling(**options)


@pytest.mark.gpu
def test_choosing_does_not_wait_for_the_gpu():
    torch.cuda.synchronize()
    prompt = PROMPT.cuda()
    how = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)
    choosers = [Chooser(Sampling(temperature=0.8, seed=2), prompt, 9), Chooser(how, prompt, 9), None]
    logits, ids = torch.randn(4, 500, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            choose(choosers, logits, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
