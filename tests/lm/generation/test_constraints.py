"""What generation_config asks of every text is done as transformers' generate does it, or named in a warning."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from tiny_models import SIZES, generated, loaded, made, prompt, tokens_of

from fastattn.common.notice import FastattnWarning, _given
from fastattn.lm import Loaded, Sampling, make_engine, stream_generate
from fastattn.lm.generation.constraints import Constraints
from fastattn.lm.loading.loaded import end_tokens


def model_of(**settings: Any) -> Any:
    model = made(hf.LlamaConfig(**SIZES))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


PLAIN = generated(model_of(), prompt(12), 12)


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [PLAIN[0], PLAIN[1]]},
        {"begin_suppress_tokens": [PLAIN[0]]},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[PLAIN[2]], [PLAIN[0], PLAIN[1]]]},
        {"sequence_bias": [[[PLAIN[1]], -10.0]]},
        {"eos_token_id": PLAIN[3]},
        {"eos_token_id": [PLAIN[5], PLAIN[3]]},
        {"eos_token_id": PLAIN[3], "pad_token_id": PLAIN[3]},
        {"eos_token_id": PLAIN[3], "min_new_tokens": 8},
        {"eos_token_id": PLAIN[3], "min_length": 18},
        {"eos_token_id": 7, "forced_eos_token_id": 7},
        {"eos_token_id": PLAIN[3], "exponential_decay_length_penalty": (2, 1.5)},
        {"remove_invalid_values": True},
    ],
    ids=str,
)
def test_it_is_done_as_generate_does_it(settings: dict[str, Any]) -> None:
    model = model_of(**settings)
    ids = prompt(12)
    engine = make_engine(loaded(model), 2, 64)
    expected = generated(made_eager(settings), ids, 12)
    if settings != {"remove_invalid_values": True}:
        assert expected != PLAIN
    assert tokens_of(engine, [ids, prompt(3, 5)], 12)[0] == expected


def made_eager(settings: dict[str, Any]) -> Any:
    model = made(hf.LlamaConfig(**SIZES), "eager")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def test_a_requests_own_penalty_goes_before_the_models() -> None:
    engine = make_engine(loaded(model_of(repetition_penalty=1.7)), 1, 64)
    ids = prompt(12)
    for own in (1.0, 1.3):
        found = [event.token for event in engine.generate([ids], 12, Sampling(repetition_penalty=own))]
        assert found == generated(made_eager({}), ids, 12, repetition_penalty=own)


def test_what_is_not_done_is_named() -> None:
    _given.clear()
    with pytest.warns(FastattnWarning, match="guidance_scale=2.0 is not used"):
        make_engine(loaded(model_of(guidance_scale=2.0)), 1, 64)
    _given.clear()
    with pytest.warns(FastattnWarning, match="num_beams=4 is not used"):
        Constraints(hf.GenerationConfig(num_beams=4))


def test_what_changes_no_greedy_text_is_passed_over() -> None:
    """Without a warning: pytest would show it."""
    _given.clear()
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 20, "use_cache": True}
    Constraints(hf.GenerationConfig(**settings, bos_token_id=1, pad_token_id=0))
    Constraints(None)
    assert not _given


def test_a_value_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^generation_config: no_repeat_ngram_size: -3 cannot be used"):
        make_engine(loaded(model_of(no_repeat_ngram_size=-3)), 1, 64)


class Tokenizer:
    """Its tokens are letters, but for the one that ends a text."""

    eos_token_id: int | None = PLAIN[3]

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids if token != self.eos_token_id)


def test_the_tokenizers_end_of_text_counts_too() -> None:
    model = model_of()
    with_eos = Loaded(model, Tokenizer(), model.config, "tiny")
    assert end_tokens(with_eos) == {PLAIN[3]}
    pieces = list(stream_generate(with_eos, prompt(12), max_tokens=12))
    assert [piece.token for piece in pieces] == PLAIN[: PLAIN.index(PLAIN[3]) + 1]
    assert pieces[-1].finish_reason == "stop"
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(with_eos) == {7, 9, PLAIN[3]}


@pytest.mark.parametrize("value", ["2", 2.5, True, [1, "x"], {"a": 1}])
def test_an_end_of_text_that_is_no_token_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="generation_config: eos_token_id: expected token ids"):
        make_engine(loaded(model_of(eos_token_id=value)), 1, 64)


def test_the_models_stop_strings_end_a_text() -> None:
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = None
    model = model_of(stop_strings=[chr(0x4E00 + PLAIN[4])])
    text = "".join(p.text for p in stream_generate(Loaded(model, tokenizer, model.config, "tiny"), prompt(12)))
    assert text == tokenizer.decode(PLAIN[: PLAIN.index(PLAIN[4])])
