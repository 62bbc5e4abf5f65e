"""Every argument of the engine and of the functions above it is checked, by name, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from fake_runner import FakeRunner
from tiny_models import SIZES, loaded, made

from fastattn.lm import Sampling, batch_generate, make_engine, make_runner, stream_batch, stream_generate
from fastattn.lm.generation.engine import Engine
from fastattn.lm.generation.prompts import encode
from fastattn.lm.generation.sampling import Chooser, choose


class Tokenizer:
    eos_token_id = None

    def decode(self, ids: list[int], **options: Any) -> str:
        return "x" * len(ids)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return loaded(made(hf.LlamaConfig(**SIZES)), Tokenizer())


COUNTS = [2.5, math.nan, math.inf, "3", None, True, 0, -1, torch.tensor(2.0), [3.5]]


@pytest.mark.parametrize("value", COUNTS, ids=repr)
def test_max_tokens_is_a_whole_number(tiny: Any, value: Any) -> None:
    for call in (
        lambda: Engine(FakeRunner(2)).generate([[1, 2]], value),
        lambda: stream_generate(tiny, [1, 2], max_tokens=value),
        lambda: stream_batch(tiny, [[1, 2]], max_tokens=value),
        lambda: batch_generate(tiny, [[1, 2]], max_tokens=value),
    ):
        with pytest.raises(ValueError, match=r"^max_tokens: expected "):
            call()


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3), 3])
def test_whole_numbers_of_other_libraries_count(value: Any) -> None:
    assert len(list(Engine(FakeRunner(2)).generate([[1, 2]], value))) == 3


CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda _: Engine(FakeRunner(1), eos_ids=[2.5]), "eos_ids"),
    (lambda _: Engine(FakeRunner(1), eos_ids=7), "eos_ids"),
    (lambda _: Engine(FakeRunner(1), eos_ids=[-1]), "eos_ids"),
    (lambda _: Engine(FakeRunner(1), capture="yes"), "capture"),
    (lambda _: Engine(FakeRunner(1), ahead=1), "ahead"),
    (lambda _: Engine(FakeRunner(1)).generate("text"), "prompts"),
    (lambda _: Engine(FakeRunner(1)).generate(3), "prompts"),
    (lambda _: Engine(FakeRunner(1)).generate([3]), r"prompts\[0\]"),
    (lambda _: Engine(FakeRunner(1)).generate(["ab"]), r"prompts\[0\]"),
    (lambda _: Engine(FakeRunner(1)).generate([[1.5]]), r"prompts\[0\]"),
    (lambda _: Engine(FakeRunner(1)).generate([torch.tensor([[1, 2]])]), r"prompts\[0\]"),
    (lambda _: Engine(FakeRunner(1)).generate([torch.tensor([1.0])]), r"prompts\[0\]"),
    (lambda _: Engine(FakeRunner(1)).generate([[1]], 3, {"temperature": 1}), "sampling"),
    (lambda _: Engine(FakeRunner(1)).generate([[1]], 3, [None]), "sampling"),
    (lambda _: Engine(FakeRunner(1)).cancel(0.0), "request"),
    (lambda tiny: make_engine(tiny, 0, 8), "rows"),
    (lambda tiny: make_engine(tiny, 1.0, 8), "rows"),
    (lambda tiny: make_engine(tiny, 1, "8"), "tokens"),
    (lambda tiny: make_engine(tiny, 1, 8, prefill_step=0), "prefill_step"),
    (lambda tiny: make_engine(tiny, 1, 8, prefill_step=2.5), "prefill_step"),
    (lambda tiny: make_runner(tiny, 1, 8.0), "capacity"),
    (lambda tiny: stream_batch(tiny, [[1]], batch_size=1.5), "batch_size"),
    (lambda tiny: stream_batch(tiny, [[1]], batch_size=math.nan), "batch_size"),
    (lambda tiny: stream_batch(tiny, "text"), "prompts"),
    (lambda tiny: batch_generate(tiny, 5), "prompts"),
    (lambda tiny: stream_generate(tiny, 5), "prompt"),
    (lambda tiny: stream_generate(tiny, [1.5]), "prompt"),
    (lambda tiny: stream_generate(tiny, [1], stop=3), "stop"),
    (lambda tiny: stream_generate(tiny, [1], stop=[3]), "stop"),
    (lambda tiny: stream_generate(tiny, [1], engine="fast"), "engine"),
    (lambda tiny: encode(tiny, [1], chat="yes"), "chat"),
    (lambda tiny: encode(tiny, [1], chat=True), "prompt"),
    (lambda _: Sampling(temperature="hot"), "temperature"),
    (lambda _: Sampling(temperature=True), "temperature"),
    (lambda _: Sampling(temperature=1, top_p="x"), "top_p"),
    (lambda _: Sampling(temperature=1, top_k=math.nan), "top_k"),
    (lambda _: Sampling(temperature=1, min_p=math.nan), "min_p"),
    (lambda _: Sampling(repetition_penalty="x"), "repetition_penalty"),
    (lambda _: Sampling(seed=1.5), "seed"),
    (lambda _: Sampling(processors=3), "processors"),
    (lambda _: Sampling(processors=[3]), "processors"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_bad_arguments_are_named(tiny: Any, number: int) -> None:
    call, name = CALLS[number]
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call(tiny)


def test_an_option_that_does_not_exist_is_named(tiny: Any) -> None:
    with pytest.raises(TypeError, match=r"^temprature: no such option"):
        stream_generate(tiny, [1], temprature=1.0)


@pytest.mark.parametrize("temperature", [1e-39, 5e-324, 1e-30, 1e-7])
def test_a_temperature_next_to_0_is_greedy(temperature: float) -> None:
    how = Sampling(temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
    assert how.is_greedy
    runner = FakeRunner(1)
    assert [event.token for event in Engine(runner).generate([[1, 2]], 9, how)] == runner.greedy([1, 2], 9)


def test_a_low_temperature_draws_the_best() -> None:
    logits = torch.randn(3, 50) * 1e3
    ids = torch.zeros(3, dtype=torch.int64)
    choosers = [Chooser(Sampling(temperature=1e-6), torch.tensor([1]), 5) for _ in range(3)]
    choose(choosers, logits, ids)
    assert torch.equal(ids, logits.argmax(-1))


def test_off_means_off() -> None:
    """With and without a temperature: the same as not given."""
    assert Sampling(top_k=0, top_p=1, min_p=0) == Sampling()
    assert Sampling(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0) == Sampling(temperature=0.7)
    assert Sampling(repetition_penalty=1).is_greedy
