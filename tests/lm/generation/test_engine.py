import gc
import random
import weakref

import pytest
import torch
from fake_runner import FakeRunner, collect, ragged

from fastattn import FastattnWarning
from fastattn.lm import load
from fastattn.lm.generation.decode_step import CLEAR_EVERY, buckets
from fastattn.lm.generation.engine import Engine, Event, make_engine, row_capacity
from fastattn.lm.generation.sampling import Sampling
from fastattn.lm.runners.per_row import PerRowRunner
from fastattn.lm.runners.select import make_runner

AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["looks", "ahead"])


pytestmark = pytest.mark.usefixtures("fresh_warnings")


@AHEAD
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_every_prompt_gets_what_it_gets_alone(rows, ahead):
    runner = FakeRunner(rows)
    prompts, limits = ragged(7), [random.randint(1, 9) for _ in range(7)]
    tokens, reasons = collect(Engine(runner, ahead=ahead).generate(prompts, limits))
    assert tokens == [runner.greedy(prompt, limit) for prompt, limit in zip(prompts, limits)]
    assert reasons == ["length"] * 7
    assert runner.is_clear


@AHEAD
def test_a_stop_token_ends_a_text_and_its_row_goes_to_another(ahead):
    runner = FakeRunner(2)
    prompts = ragged(6)
    alone = [runner.greedy(prompt, 12) for prompt in prompts]
    ends = {alone[0][3], alone[3][0], alone[4][11]}  # in the middle, at once, and where the limit is
    tokens, reasons = collect(Engine(runner, ends, ahead=ahead).generate(prompts, 12))
    for found, expected, reason in zip(tokens, alone, reasons):
        stop = next((i for i, token in enumerate(expected) if token in ends), None)
        assert found == (expected if stop is None else expected[: stop + 1])
        assert reason == ("length" if stop is None else "stop")
    assert [length for _, length in runner.calls("prefill")] == [len(prompt) for prompt in prompts]  # in their order
    assert runner.is_clear


@AHEAD
def test_the_surplus_step_after_a_stop_changes_no_other_row(ahead):
    runner = FakeRunner(2)
    end = runner.greedy([1], 1)[0]
    prompt = next([i] for i in range(2, 61) if end not in runner.greedy([i], 6))
    other = runner.greedy(prompt, 6)
    events = list(Engine(runner, [end], ahead=ahead).generate([[1], prompt], 6))
    assert events[:2] == [Event(0, end, "stop"), Event(1, other[0])]
    assert [event.token for event in events[1:]] == other
    # Ahead, one step ran with both before the host knew; then the second moved into the first row.
    assert runner.calls("decode") == [(2,)] * ahead + [(1,)] * (5 - ahead)
    assert runner.calls("move") == [(1, 0)]


@AHEAD
def test_decode_runs_on_no_more_rows_than_there_are_texts(ahead):
    runner = FakeRunner(4)
    prompts, limits = ragged(4), [2, 6, 3, 5]
    tokens, _ = collect(Engine(runner, ahead=ahead).generate(prompts, limits))
    assert tokens == [runner.greedy(prompt, limit) for prompt, limit in zip(prompts, limits)]
    # The end at a limit is known before the step: none is run too many.
    assert runner.calls("decode") == [(4,), (3,), (2,), (2,), (1,)]


@AHEAD
def test_those_that_wait_begin_as_soon_as_there_is_a_row(ahead):
    runner = FakeRunner(2)
    events = list(Engine(runner, ahead=ahead).generate([[1], [2], [3], [4]], [1, 4, 2, 2]))
    assert [event.request for event in events] == [0, 1, 2, 1, 2, 1, 3, 1, 3]
    assert runner.calls("prefill") == [(0, 1), (1, 1), (0, 1), (0, 1)]  # into the row that was left
    assert not runner.calls("move")[:-1]  # only at the end, when nobody waits


def test_one_token_each_needs_no_step():
    runner = FakeRunner(2)
    tokens, _ = collect(Engine(runner).generate([[1], [2], [3]], 1))
    assert tokens == [runner.greedy([i], 1) for i in (1, 2, 3)]
    assert not runner.calls("decode")


def test_a_row_is_filled_to_the_last_place_and_not_beyond():
    runner = FakeRunner(1, capacity=8)
    tokens, reasons = collect(Engine(runner).generate([[1, 2, 3]], 100))
    assert (tokens, reasons) == ([runner.greedy([1, 2, 3], 5)], ["length"])
    runner = FakeRunner(1, capacity=8)
    assert collect(Engine(runner).generate([list(range(7))], 100))[0] == [runner.greedy(list(range(7)), 1)]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, seed=3),
    Sampling(temperature=0.9, seed=4),
    Sampling(temperature=1.3, top_p=0.8, seed=5),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.7, top_k=20, min_p=0.01, repetition_penalty=1.1, seed=6),
    Sampling(temperature=0.9, seed=7),
]


@AHEAD
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_what_is_drawn_does_not_depend_on_the_batch(rows, ahead):
    prompts = ragged(7)
    alone = [
        collect(Engine(FakeRunner(1)).generate([prompt], 10 + i, [how]))[0][0]
        for i, (prompt, how) in enumerate(zip(prompts, SAMPLINGS))
    ]
    limits = [10 + i for i in range(7)]
    tokens, _ = collect(Engine(FakeRunner(rows), ahead=ahead).generate(prompts, limits, SAMPLINGS))
    assert tokens == alone


def test_equal_prompts_differ_where_tokens_are_drawn():
    how = Sampling(temperature=1.0, seed=3)
    tokens, _ = collect(Engine(FakeRunner(4)).generate([[5, 6]] * 4, 12, how))
    assert len({tuple(found) for found in tokens}) == 4
    again, _ = collect(Engine(FakeRunner(1)).generate([[5, 6]], 12, how.for_request(2)))
    assert again[0] == tokens[2]


@AHEAD
def test_closing_early_empties_the_rows_and_leaves_the_engine_ready(ahead):
    runner = FakeRunner(2)
    engine = Engine(runner, ahead=ahead)
    events = engine.generate([[1], [2], [3]], 50)
    for _ in range(5):
        next(events)
    assert not runner.is_clear
    events.close()
    assert runner.is_clear
    assert collect(engine.generate([[4]], 5))[0] == [runner.greedy([4], 5)]


def test_nothing_is_left_when_an_iterator_is_dropped():
    runner = FakeRunner(2)
    events = Engine(runner).generate([[1], [2], [3]], 50)
    next(events)
    gone = weakref.ref(runner)
    gc.disable()  # at once, without a search for cycles
    try:
        del runner, events
        assert gone() is None
    finally:
        gc.enable()


@AHEAD
@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_an_error_of_the_runner_empties_the_rows(monkeypatch, where, ahead, error):
    runner = FakeRunner(2)
    engine = Engine(runner, ahead=ahead)
    real, calls = getattr(runner, where), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(runner, where, fails)
    with pytest.raises(type(error)):
        list(engine.generate([[1], [2], [3], [4]], [5, 3, 5, 5]))
    assert runner.is_clear
    monkeypatch.undo()
    assert collect(engine.generate([[4], [5]], 5))[0] == [runner.greedy([i], 5) for i in (4, 5)]


def test_an_engine_generates_one_thing_at_a_time():
    engine = Engine(FakeRunner(2))
    events = engine.generate([[1]], 5)
    late = engine.generate([[2]], 5)
    next(events)
    with pytest.raises(RuntimeError, match="this engine is generating"):
        engine.generate([[3]], 5)
    with pytest.raises(RuntimeError, match="this engine is generating"):
        next(late)
    assert len(list(events)) == 4  # not disturbed


@AHEAD
def test_a_cancelled_request_is_not_heard_of_again(ahead):
    runner = FakeRunner(2)
    engine = Engine(runner, ahead=ahead)
    seen = []
    for event in engine.generate([[1], [2], [3], [4]], [30, 4, 4, 4]):
        seen.append(event.request)
        if seen.count(0) == 2 and 3 not in seen and len(seen) < 5:
            engine.cancel(0)  # runs
            engine.cancel(3)  # waits
    assert [seen.count(i) for i in range(4)] == [2, 4, 4, 0]
    assert runner.is_clear


def test_a_request_cancelled_by_the_event_before_its_own():
    engine = Engine(FakeRunner(2))
    events = engine.generate([[1], [2]], 3)
    assert next(events).request == 0
    engine.cancel(1)
    assert [event.request for event in events] == [0, 0]
    with pytest.raises(ValueError, match="request: expected the number of one of 0 that run, got 0"):
        engine.cancel(0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1], []],), r"prompts\[1\]: expected at least one token"),
        (([[1], [2] * 8],), r"prompts\[1\]: expected fewer tokens than a row's 8, got 8"),
        (([[1, 61]],), r"prompts\[0\]: expected token ids from 0 to 60, got 1 to 61"),
        (([[-1]],), r"prompts\[0\]: expected token ids from 0 to 60, got -1"),
        (([[1]], 0), "max_tokens: expected at least 1, got 0"),
        (([[1], [2]], [3, 0]), "max_tokens: expected at least 1, got 0"),
        (([[1], [2]], [3]), "max_tokens: expected one for all prompts or 2, one for each, got 1"),
        (([[1]], 3, [Sampling()] * 2), "sampling: expected one for all prompts or 1"),
    ],
)
def test_bad_input(arguments, message):
    runner = FakeRunner(2, capacity=8)
    with pytest.raises(ValueError, match=message):
        Engine(runner).generate(*arguments)
    assert not runner.log


def test_no_prompts_no_events():
    assert list(Engine(FakeRunner(2)).generate([])) == []


@pytest.mark.parametrize(
    "rows, expected", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_buckets(rows, expected):
    assert buckets(rows) == expected


class Replayed:
    """Stands for a captured step: runs it again."""

    def __init__(self, step):
        self.replay = step


class Pretended:
    """A recorder without a GPU, for one engine. `fails`: where it raises an error, "warm up" or "record"."""

    def __init__(self, runner, fails=None, error=None):
        self.runner, self.fails, self.error = runner, fails, error
        self.log = []  #: what was done, and with how many rows

    def warm_up(self, step):
        self._do("warm up", step)

    def record(self, step):
        self._do("record", step)
        return Replayed(step)

    def _do(self, what, step):
        step()
        self.log.append((what, *self.runner.calls("decode")[-1]))
        if self.fails == what:
            raise self.error or RuntimeError(f"no {what}")

    @property
    def recorded(self):
        return [rows for what, rows in self.log if what == "record"]


class Together:
    """Stands for the ranks that run a model. others: the failure of another rank."""

    def __init__(self, others=None):
        self.others, self.failures, self.shared = others, [], []

    def first_failure(self, mine):
        self.failures.append(mine)
        return mine or self.others

    def broadcast(self, ids):
        self.shared.append(ids.tolist())
        ids[:1] = 7  # what rank 0 chose for the first row


@pytest.mark.parametrize(
    "fails, others, reason", [(None, "rank 1: no room", "rank 1: no room"), ("record", None, "no record")]
)
def test_ranks_capture_together_or_not_at_all(fails, others, reason):
    ranks, runner = Together(others), FakeRunner(4)
    recorder = Pretended(runner, fails)
    engine = Engine(runner, capture=True, ranks=ranks, recorder=recorder)
    with pytest.warns(FastattnWarning, match=f"not captured in a CUDA graph.*: {reason}$"):
        engine.generate([[1], [2], [3]], 5)
    assert ranks.failures == [None if fails is None else reason]  # every rank is asked, however it went here
    assert recorder.log == [("warm up", 4), ("record", 4)]  # and no other size is tried
    assert not engine.captured_buckets
    assert runner.is_clear


def test_ranks_capture_what_all_can():
    ranks, runner = Together(), FakeRunner(4)
    engine = Engine(runner, capture=True, ranks=ranks, recorder=Pretended(runner))
    engine.generate([[1], [2], [3]], 5)
    assert ranks.failures == [None] * 3
    assert engine.captured_buckets == [1, 2, 4]


def test_a_step_that_only_some_ranks_took_ends_it():
    ranks, runner = Together(), FakeRunner(2)
    engine = Engine(runner, capture=True, ranks=ranks, recorder=Pretended(runner, "warm up"))
    with pytest.raises(RuntimeError, match="no warm up"):
        engine.generate([[1]], 5)
    assert ranks.failures == []


@AHEAD
def test_ranks_go_on_with_the_tokens_of_the_first(ahead):
    """A token that another rank chose is what is told, and what the next one follows from."""
    runner, ranks = FakeRunner(1), Together()
    tokens, _ = collect(Engine(runner, ahead=ahead, ranks=ranks).generate([[3, 4]], 4))
    assert tokens == [[7, 7, 7, 7]]
    following = [runner.greedy([3, 4, *[7] * n], 1) for n in range(4)]
    assert ranks.shared[:4] == following


@AHEAD
def test_captured_steps_run_in_buckets(ahead):
    runner = FakeRunner(6)
    recorder = Pretended(runner)
    engine = Engine(runner, capture=True, ahead=ahead, recorder=recorder)
    prompts, limits = ragged(5), [9, 7, 5, 4, 2]
    events = engine.generate(prompts, limits)
    assert recorder.recorded == [6, 4, 2, 1]  # the largest first, before any prompt
    assert runner.is_clear
    runner.log.clear()
    tokens, _ = collect(events)
    assert tokens == [runner.greedy(prompt, limit) for prompt, limit in zip(prompts, limits)]
    assert runner.calls("decode") == [(6,), (4,), (4,), (4,), (2,), (2,), (1,), (1,)]
    assert runner.is_clear


def test_what_was_captured_is_used_again():
    runner = FakeRunner(8)
    recorder = Pretended(runner)
    engine = Engine(runner, capture=True, recorder=recorder)
    list(engine.generate([[1]], 1))
    assert recorder.recorded == []  # one token needs no step
    list(engine.generate([[1], [2]], 3))
    assert recorder.recorded == [2, 1]
    list(engine.generate([[1], [2], [3]], 3))
    assert recorder.recorded == [2, 1, 4]


def test_unused_rows_of_a_bucket_are_emptied_now_and_then():
    runner = FakeRunner(4, capacity=512)
    prompts = ragged(3)
    engine = Engine(runner, capture=True, ahead=True, recorder=Pretended(runner))
    events = engine.generate(prompts, 3 * CLEAR_EVERY)
    most = max(int(runner.lengths[3]) for _ in events)
    assert CLEAR_EVERY - 2 <= most <= CLEAR_EVERY


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room for it\nmore"), RuntimeError("cannot be captured")])
def test_without_a_capture_the_loop_goes_on(error):
    runner = FakeRunner(4)
    recorder = Pretended(runner, "record", error)
    engine = Engine(runner, capture=True, recorder=recorder)
    with pytest.warns(FastattnWarning, match="not captured in a CUDA graph.*: (no room for it|cannot be captured)$"):
        events = engine.generate([[1], [2], [3]], 5)
    assert runner.is_clear
    assert collect(events)[0] == [runner.greedy([i], 5) for i in (1, 2, 3)]
    assert (3,) in runner.calls("decode")  # exactly those that are needed
    list(engine.generate([[1]], 3))
    assert recorder.recorded == [4]  # not tried again


@pytest.mark.parametrize("tokens, capacity", [(1, 256), (256, 256), (257, 512), (10**9, 131072)])
def test_rows_have_a_round_length_within_the_models(tokens, capacity):
    assert row_capacity(tokens, 131072) == capacity


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_captured_steps_give_what_the_loop_gives(rows):
    prompts, limits = ragged(9), [random.randint(1, 40) for _ in range(9)]
    runner = FakeRunner(rows, device="cuda")
    engine = Engine(runner)
    events = engine.generate(prompts, limits)
    assert engine.captured_buckets == sorted(set(buckets(rows)))
    assert runner.is_clear
    runner.log.clear()
    tokens, _ = collect(events)
    assert tokens == [runner.greedy(prompt, limit) for prompt, limit in zip(prompts, limits)]
    assert not runner.calls("decode")  # replayed, every one
    assert runner.is_clear


@pytest.mark.gpu
def test_stops_and_draws_on_a_gpu():
    prompts = ragged(7)
    alone = [
        collect(Engine(FakeRunner(1, device="cuda"), [7, 8]).generate([prompt], 30, [how]))
        for prompt, how in zip(prompts, SAMPLINGS)
    ]
    for options in ({}, {"capture": False}, {"ahead": False}):
        found = collect(Engine(FakeRunner(4, device="cuda"), [7, 8], **options).generate(prompts, 30, SAMPLINGS))
        assert found == ([tokens[0] for tokens, _ in alone], [reasons[0] for _, reasons in alone])


@pytest.mark.gpu
def test_the_caller_may_change_its_stream():
    runner = FakeRunner(2, device="cuda")
    tokens, events = [], Engine(runner).generate([[1, 2]], 20)
    for i in range(20):
        with torch.cuda.stream(torch.cuda.Stream() if i % 2 else torch.cuda.default_stream()):
            tokens.append(next(events).token)
    assert tokens == runner.greedy([1, 2], 20)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_in_the_loop(monkeypatch):
    runner = FakeRunner(2, device="cuda")
    real = runner.decode

    def decode(ids):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        return real(ids)

    monkeypatch.setattr(runner, "decode", decode)
    with pytest.warns(FastattnWarning, match="not captured in a CUDA graph.*: not while capturing"):
        events = Engine(runner).generate([[1], [2], [3]], 8)
    assert collect(events)[0] == [runner.greedy([i], 8) for i in (1, 2, 3)]


@pytest.mark.gpu
def test_the_loop_is_never_captured():
    loaded = load("tiny", attn="sdpa", device="cuda", dtype=torch.float32)
    engine = Engine(PerRowRunner(loaded.model, 2, 64))
    prompts = ragged(3, vocab_size=1024)
    expected = [collect(Engine(PerRowRunner(loaded.model, 1, 64)).generate([prompt], 6))[0][0] for prompt in prompts]
    assert collect(engine.generate(prompts, 6))[0] == expected
    assert not engine.captured_buckets


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_models_captured_steps_give_what_its_loop_gives(count):
    loaded = load("tiny", attn="fastattn", device="cuda", dtype=torch.float32)
    prompts = ragged(count, most=70, vocab_size=1024)
    runner = make_runner(loaded, 4, 256)
    # All end together, so that the loop runs on as many rows as the bucket has: kernels may round by their number.
    expected = collect(Engine(runner, capture=False).generate(prompts, 40))[0]
    assert collect(Engine(runner).generate(prompts, 40))[0] == expected


@pytest.mark.gpu
def test_memory_is_given_back():
    loaded = load("tiny", attn="fastattn", device="cuda")

    def use():
        events = make_engine(loaded, 2, 4096).generate([[1, 2, 3], [4], [5]], 100)
        for _ in range(20):
            next(events)

    use()  # workspaces and what is compiled stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        use()
    gc.collect()
    assert torch.cuda.memory_allocated() < before + (1 << 20)  # a cache alone is 8 MiB
