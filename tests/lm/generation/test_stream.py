import gc
import weakref

import pytest
import torch
from tiny_tokenizers import bytes_tokenizer

from fastattn.lm import load
from fastattn.lm.generation import stream
from fastattn.lm.generation.engine import make_engine
from fastattn.lm.generation.prompts import encode
from fastattn.lm.generation.results import Usage
from fastattn.lm.generation.stream import batch_generate, generate, stream_batch, stream_generate

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")
PROMPT = "größe: 猫"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tiny preset with a byte-level tokenizer, cut to its vocabulary: what it generates is bytes at random."""
    path = tmp_path_factory.mktemp("models") / "bytes"
    tokenizer = bytes_tokenizer()
    model = load("tiny", attn="fastattn", device="cpu", dtype=torch.float32, seed=4).model
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return load(path, attn="fastattn", device="cpu")


def reference(loaded, prompt, count):
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    return loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()


def text_of(loaded, prompt, ids):
    """What the ids add to a prompt."""
    whole = loaded.tokenizer.decode(loaded.tokenizer(prompt)["input_ids"] + ids, skip_special_tokens=True)
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


def test_pieces_tokens_and_text_are_those_of_transformers(loaded):
    ids = reference(loaded, PROMPT, 40)
    pieces = list(stream_generate(loaded, PROMPT, max_tokens=40))
    assert [piece.token for piece in pieces] == ids
    assert "".join(piece.text for piece in pieces) == text_of(loaded, PROMPT, ids)
    assert [piece.finish_reason for piece in pieces] == [None] * 39 + ["length"]
    assert all(piece.usage is None for piece in pieces[:-1])
    assert generate(loaded, PROMPT, max_tokens=40) == text_of(loaded, PROMPT, ids)


def test_usage_comes_with_the_last_piece(loaded):
    *_, last = stream_generate(loaded, PROMPT, max_tokens=7)
    usage = last.usage
    assert (usage.prompt_tokens, usage.generation_tokens) == (len(loaded.tokenizer(PROMPT)["input_ids"]), 7)
    assert usage.prompt_tps > 0
    assert usage.generation_tps > 0
    assert usage.peak_memory > 1e6
    *_, last = stream_generate(loaded, PROMPT, max_tokens=1)
    assert last.usage.generation_tps == 0


def test_usage_as_a_line():
    line = "prompt: 1 token, 2.0 tokens/s; generation: 3 tokens, 4.5 tokens/s; peak memory: 6.789 GB"
    assert str(Usage(1, 2.0, 3, 4.5, 6789000000)) == line


def test_ids_are_a_prompt_too(loaded):
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    expected = generate(loaded, PROMPT, max_tokens=9)
    assert generate(loaded, ids, max_tokens=9) == generate(loaded, torch.tensor(ids), max_tokens=9) == expected


def test_end_tokens_end_a_text_and_are_not_shown(loaded, monkeypatch):
    ids = reference(loaded, PROMPT, 20)
    end = ids[7]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end, 299])
    pieces = list(stream_generate(loaded, PROMPT, max_tokens=20))
    count = ids.index(end) + 1
    assert [piece.token for piece in pieces] == ids[:count]
    assert (pieces[-1].finish_reason, pieces[-1].usage.generation_tokens) == ("stop", count)
    assert "".join(piece.text for piece in pieces) == text_of(loaded, PROMPT, ids[: count - 1])


def test_stop_strings(loaded):
    whole = generate(loaded, PROMPT, max_tokens=40)
    stop = whole[15:19]
    pieces = list(stream_generate(loaded, PROMPT, max_tokens=40, stop=[stop]))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage.generation_tokens == len(pieces) < 40


PROMPTS = [PROMPT, "a", "words and more words, to be a longer one", "日本語", "end"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_gives_what_each_prompt_gives(loaded, batch_size):
    limits = [12, 3, 9, 20, 6]
    results = batch_generate(loaded, PROMPTS, max_tokens=limits, batch_size=batch_size)
    for prompt, limit, result in zip(PROMPTS, limits, results):
        assert result.tokens == reference(loaded, prompt, limit)
        assert result.text == text_of(loaded, prompt, result.tokens)
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(loaded.tokenizer(prompt)["input_ids"]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_drawn_batch_gives_what_each_prompt_gives(loaded, batch_size):
    how = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12}
    results = batch_generate(loaded, PROMPTS, batch_size=batch_size, seed=11, **how)
    assert [result.text for result in results] == [
        generate(loaded, prompt, seed=11 + i, **how) for i, prompt in enumerate(PROMPTS)
    ]


def test_a_stop_string_in_a_batch_ends_one_text_only(loaded):
    alone = batch_generate(loaded, PROMPTS, max_tokens=30, batch_size=2)
    stop = alone[2].text[10:14]
    results = batch_generate(loaded, PROMPTS, max_tokens=30, stop=[stop], batch_size=2)
    for result, before in zip(results, alone):
        assert result.text == before.text.split(stop)[0]
        assert result.finish_reason == ("stop" if stop in before.text else before.finish_reason)
    assert len(results[2].tokens) < 30
    assert any(len(result.tokens) == 30 for result in results)


def test_an_engine_is_used_again(loaded):
    engine = make_engine(loaded, 2, 100)
    for _ in range(2):
        assert generate(loaded, "a", max_tokens=9, engine=engine) == generate(loaded, "a", max_tokens=9)
        found = batch_generate(loaded, PROMPTS, max_tokens=9, engine=engine)
        assert [result.tokens for result in found] == [reference(loaded, prompt, 9) for prompt in PROMPTS]


def test_nothing_is_generated_for_no_prompts(loaded):
    assert batch_generate(loaded, []) == []
    assert list(stream_batch(loaded, [])) == []


def test_closing_frees_what_was_made_for_it(loaded, monkeypatch):
    made = []

    def make(*arguments):
        engine = make_engine(*arguments)
        made.append(weakref.ref(engine.runner))
        return engine

    monkeypatch.setattr(stream, "make_engine", make)
    pieces = stream_generate(loaded, PROMPT, max_tokens=200)
    for _ in range(3):
        next(pieces)
    gc.collect()
    gc.disable()  # what follows is freed at once, without a search for cycles
    try:
        assert made[0]() is not None
        pieces.close()
        assert made[0]() is None
        generate(loaded, PROMPT, max_tokens=3)
        assert made[1]() is None
    finally:
        gc.enable()


def test_interrupted_in_the_middle_the_engine_is_ready_again(loaded, monkeypatch):
    engine = make_engine(loaded, 1, 100)
    real, calls, shown = engine.runner.decode, [], []

    def decode(ids):
        calls.append(ids)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(ids)

    monkeypatch.setattr(engine.runner, "decode", decode)
    pieces = stream_generate(loaded, PROMPT, max_tokens=50, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        shown.extend(piece.token for piece in pieces)
    assert shown == reference(loaded, PROMPT, 6)
    assert generate(loaded, PROMPT, max_tokens=9, engine=engine) == generate(loaded, PROMPT, max_tokens=9)


def test_the_models_length_ends_a_text(loaded, monkeypatch):
    monkeypatch.setattr(loaded.config, "max_position_embeddings", 20)
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    *_, last = stream_generate(loaded, PROMPT, max_tokens=50)
    assert (last.finish_reason, last.usage.generation_tokens) == ("length", 20 - len(ids))
    with pytest.raises(ValueError, match="prompt: expected fewer tokens than the model's 20, got 20"):
        stream_generate(loaded, [1] * 20)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"stop": [""]}, "stop: expected strings that are not empty"),
        ({"temperature": -1}, "temperature: expected a number of 0 or more, got -1"),
        ({"prompt": ""}, "prompt: expected some text, this one has no tokens"),
        ({"prompt": []}, "prompt: expected some text, this one has no tokens"),
        ({"prompt": [10**6]}, r"prompts\[0\]: expected token ids from 0 to \d+, got 1000000"),
    ],
)
def test_bad_input_is_said_before_anything_is_generated(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        stream_generate(loaded, **{"prompt": PROMPT, **options})
    with pytest.raises(ValueError, match=message.replace("prompt:", r"prompts\[0\]:")):
        stream_batch(loaded, [options.pop("prompt", PROMPT)], **options)


def test_bad_batches(loaded):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        stream_batch(loaded, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="max_tokens: expected one for all prompts or 2"):
        stream_batch(loaded, ["a", "a"], max_tokens=[3])
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected some text"):
        batch_generate(loaded, ["a", ""])


def test_a_model_without_a_tokenizer():
    with pytest.raises(ValueError, match="loaded: tiny has no tokenizer; expected a model directory"):
        generate(load("tiny", attn="eager", device="cpu"), "a")


def test_chat_needs_a_template(loaded):
    with pytest.raises(ValueError, match="chat: this model's tokenizer has no chat template"):
        encode(loaded, "a", chat=True)


@pytest.mark.gpu
def test_text_on_a_gpu(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    there = load(tmp_path, attn="fastattn", device="cuda")
    expected = [generate(there, prompt, max_tokens=30) for prompt in PROMPTS]
    assert [result.text for result in batch_generate(there, PROMPTS, max_tokens=30)] == expected
    *_, last = stream_generate(there, PROMPT, max_tokens=30)
    assert last.usage.peak_memory > 1e6
