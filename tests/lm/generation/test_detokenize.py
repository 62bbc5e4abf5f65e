import random
from typing import Any

import pytest
from tiny_tokenizers import TEXTS, bytes_tokenizer, pieces_tokenizer

from fastattn.lm.generation.detokenize import Detokenizer, StopStrings, TextStream


@pytest.fixture(scope="module", params=[bytes_tokenizer, pieces_tokenizer], ids=["bytes", "pieces"])
def tokenizer(request):
    return request.param()


def stream(tokenizer, ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids) == text
    assert sum(map(bool, pieces)) >= len(text.split()) // 2  # as it comes, not at the end


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_what_continues_a_prompt_joins_to_it(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    for cut in range(1, len(ids)):
        before = decoded(tokenizer, ids[:cut])
        if not text.startswith(before):
            continue  # within a character, as no prompt ends
        assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == text


def test_no_piece_ends_within_a_character(tokenizer):
    ids = tokenizer("größe: 猫 and 😀 together 👩‍👩‍👧 end")["input_ids"]
    assert not any("\ufffd" in piece for piece in stream(tokenizer, ids))


def test_a_character_cut_off_at_the_end_is_shown_as_broken(tokenizer):
    ids = tokenizer("and 猫")["input_ids"][:-1]
    *pieces, last = stream(tokenizer, ids)
    assert "".join(pieces) == "and "
    assert last
    assert set(last) == {"\ufffd"}


def test_a_prompt_that_ends_within_a_character():
    tokenizer = bytes_tokenizer()
    ids = tokenizer("and 😀!")["input_ids"]
    for cut in range(1, len(ids)):
        before = decoded(tokenizer, ids[:cut]).rstrip("\ufffd")
        assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == "and 😀!"


def test_bytes_that_are_no_text_come_as_decoding_them_all_shows_them():
    tokenizer = bytes_tokenizer()
    for _ in range(300):
        ids = [random.randrange(1, 260) for _ in range(random.randint(1, 40))]
        assert "".join(stream(tokenizer, ids)) == decoded(tokenizer, ids)


def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer):
    token = next(i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) == {"\ufffd"})
    pieces = stream(tokenizer, [token] * 100)
    assert sum(map(bool, pieces)) > 10
    assert set("".join(pieces)) == {"\ufffd"}


def test_special_tokens_have_no_text_and_take_no_space_away(tokenizer):
    end = tokenizer.eos_token_id
    ids = tokenizer("word and word")["input_ids"]
    for place in range(len(ids)):
        mixed = [*ids[:place], *[end] * 12, *ids[place:]]
        assert "".join(stream(tokenizer, mixed)) == decoded(tokenizer, mixed) == "word and word"


def feed(stops, pieces):
    return [*(stops.add(piece) for piece in pieces), stops.flush()]


def test_without_stop_strings_all_passes_at_once():
    assert feed(StopStrings(), ["a", "bc", ""]) == ["a", "bc", "", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_nothing_of_a_stop_string_is_shown(size):
    text = "one tw two\n\nthree END four"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for stop, expected in (
        (["END"], "one tw two\n\nthree "),
        (["two\n\nthree"], "one tw "),
        (["two", "one tw t"], ""),  # the one that begins first
        (["four", "three"], "one tw two\n\n"),
        (["nowhere", "fourth"], text),
        ("END", "one tw two\n\nthree "),
    ):
        stops = StopStrings(stop)
        assert "".join(feed(stops, pieces)) == expected
        assert stops.found == (expected != text)
        assert stops.add("more") == ("" if stops.found else "more")


def test_only_what_may_begin_a_stop_string_waits():
    stops = StopStrings(["abc", "cd"])
    assert [stops.add(x) for x in ("xa", "b", "a", "bx", "c", "c", "e")] == ["x", "", "ab", "abx", "", "c", "ce"]


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3]])
def test_bad_stop_strings(stop):
    if stop == "":
        stop = [stop]
    with pytest.raises(ValueError, match="stop: expected strings that are not empty"):
        StopStrings(stop)


def test_the_token_that_ends_a_text_is_no_part_of_it(tokenizer):
    ids = tokenizer("word and")["input_ids"]
    texts = TextStream(tokenizer, [])
    *_, last = [texts.add(token, "stop" if i == len(ids) - 1 else None) for i, token in enumerate(ids)]
    assert last == ("", "stop")


def test_what_waits_is_shown_at_the_end(tokenizer):
    ids = tokenizer("word and wor")["input_ids"]
    texts = TextStream(tokenizer, [], ["and word"])
    shown = [texts.add(token, "length" if i == len(ids) - 1 else None) for i, token in enumerate(ids)]
    assert "".join(text for text, _ in shown) == "word and wor"
    assert shown[-1][1] == "length"


def test_a_stop_string_in_the_last_token_is_found(tokenizer):
    ids = tokenizer("word and")["input_ids"]
    texts = TextStream(tokenizer, [], ["d and"])
    shown = [texts.add(token, "length" if i == len(ids) - 1 else None) for i, token in enumerate(ids)]
    assert ("".join(text for text, _ in shown), shown[-1][1]) == ("wor", "stop")


def byte_tokens() -> Any:
    """A tokenizer in sentencepiece's manner: characters that it has no token for are bytes, and a run of bytes of which
    one is wrong is decoded as no character at all."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", ["🏳🌈", "日本語", "a日", "é"])
def test_a_cut_run_of_bytes(text: str) -> None:
    """What was shown stays; each byte that is left over is one replacement character, as decoding at once has it."""
    tokenizer = byte_tokens()
    ids = [2 if byte == b"a"[0] else 3 + byte for byte in text.encode()]
    for cut in range(1, len(ids) + 1):
        stream = Detokenizer(tokenizer, [2])
        found = "".join([stream.add(token) for token in ids[:cut]]) + stream.flush()
        whole = text.encode()[:cut].decode(errors="ignore")
        left = cut - len(whole.encode())
        assert found == whole + "\ufffd" * left


def test_bytes_that_break_a_run_take_nothing_back() -> None:
    tokenizer = byte_tokens()
    ids = [*(3 + byte for byte in "日".encode()), 3 + 0xE6, 2, 2]
    stream = Detokenizer(tokenizer, [2])
    assert "".join([stream.add(token) for token in ids]) + stream.flush() == "日\ufffdaa"
