import io
import json
import re
import sys

import pytest
import torch

import fastattn
from fastattn.cli import main as cli
from fastattn.lm import load

# "sdpa" and "eager" are decoded one row after another, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")
NUMBER = r"\d+\.\d tokens/s"


@pytest.fixture(scope="module")
def speaker(saved_model, tmp_path_factory):
    """The tiny preset with a tokenizer that has a word for every id: all that is generated shows as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "speaker"
    load(saved_model, attn="eager", dtype=torch.float32).model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1024)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "w900 {{ messages[0]['content'] }} w901"
    tokenizer.save_pretrained(path)
    return path


def generate(capsys, model, *options, prompt="w5 w6 w7"):
    """Exit status, stdout and stderr of the command on the CPU."""
    try:
        status = cli.main(["generate", "--model", str(model), "--prompt", prompt, "--device", "cpu", *options])
    except SystemExit as exit:  # argparse's way out
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def greedy(model, ids, count):
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, attention_mask=torch.ones(1, len(ids))
    )
    return [f"w{i}" for i in out[0].tolist()]


@pytest.mark.parametrize("attn", ["fastattn", "sdpa"])
def test_greedy_text_follows_the_prompt(capsys, speaker, attn):
    expected = greedy(load(speaker, attn="eager", device="cpu").model, [5, 6, 7], 9)
    capsys.readouterr()
    before = sum(fastattn.stats()["calls"].values())
    status, out, err = generate(capsys, speaker, "-g", "9", "--attn", attn)
    assert status == 0
    assert out.split() == expected
    memory = r"peak memory: \d+\.\d{3} GB"
    assert re.fullmatch(rf"prompt: 3 tokens, {NUMBER}; generation: 9 tokens, {NUMBER}; {memory}\n", err), err
    calls = sum(fastattn.stats()["calls"].values()) - before
    assert (calls > 0) == (attn == "fastattn")


def test_the_end_token_ends_it(capsys, speaker):
    model = load(speaker, attn="eager", device="cpu").model
    words = greedy(model, [5, 6, 7], 9)
    end = int(words[5][1:])
    model.generation_config.eos_token_id = end
    model.save_pretrained(speaker.parent / "ended")
    load(speaker, attn="eager").tokenizer.save_pretrained(speaker.parent / "ended")
    _, out, err = generate(capsys, speaker.parent / "ended", "-g", "9")
    index = words.index(f"w{end}", 3)
    assert out.split() == words[:index]
    assert f"generation: {index + 1 - 3} token" in err  # it was generated, but is no part of the text


def test_a_stop_string_ends_it(capsys, speaker):
    words = generate(capsys, speaker, "-g", "9")[1].split()
    status, out, err = generate(capsys, speaker, "-g", "9", "--stop", "nowhere", "--stop", " ".join(words[6:8]))
    index = " ".join(words).index(" ".join(words[6:8]))
    assert (status, out) == (0, " ".join(words)[:index] + "\n")


def test_the_seed_decides_what_is_drawn(capsys, speaker):
    texts = [generate(capsys, speaker, "-g", "12", "--temperature", "1", "--seed", s)[1] for s in ("3", "3", "4")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("options", [("--top-k", "1"), ("--top-p", "0.000001"), ("--min-p", "1")])
def test_few_tokens_to_draw_from_is_greedy(capsys, speaker, options):
    expected = generate(capsys, speaker, "-g", "6")[1]
    assert generate(capsys, speaker, "-g", "6", "--temperature", "5", "--seed", "1", *options)[1] == expected


def test_one_token_has_no_generation_speed(capsys, speaker):
    assert "; generation: 1 token; peak memory: " in generate(capsys, speaker, "-g", "1")[2]


def test_names_of_options(capsys, speaker):
    expected = generate(capsys, speaker, "-g", "5", "--temperature", "0.7")[1]
    for names in (("--max-tokens", "--temp"), ("--generation-tokens", "--temp")):
        assert generate(capsys, speaker, names[0], "5", names[1], "0.7")[1] == expected


def test_prompt_from_stdin(capsys, monkeypatch, speaker):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6 w7"))
    assert generate(capsys, speaker, "-g", "3", prompt="-")[1] == generate(capsys, speaker, "-g", "3")[1]


def test_a_byte_order_mark_is_no_prompt(capsys, monkeypatch, speaker, tmp_path):
    status, plain, _ = generate(capsys, speaker, "-g", "3")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffw5 w6 w7"))
    assert generate(capsys, speaker, "-g", "3", prompt="-")[:2] == (status, plain)
    path = tmp_path / "prompts"
    expected = batch(capsys, speaker, path, "w5 w6 w7\n", "-g", "3")
    assert batch(capsys, speaker, path, "\ufeffw5 w6 w7\n", "-g", "3")[:2] == expected[:2]


@pytest.mark.parametrize("options", [("--top-k", "0"), ("--top-p", "1"), ("--top-p", "1.0", "--top-k", "0")])
def test_off_is_off(capsys, speaker, options):
    assert generate(capsys, speaker, *options)[:2] == generate(capsys, speaker)[:2]
    drawn = ("--temperature", "1", "--seed", "4")
    assert generate(capsys, speaker, *drawn, *options)[:2] == generate(capsys, speaker, *drawn)[:2]


def test_chat_template(capsys, speaker):
    expected = greedy(load(speaker, attn="eager", device="cpu").model, [900, 5, 901], 4)
    status, out, err = generate(capsys, speaker, "-g", "4", "--chat", prompt="w5")
    assert (status, out.split()) == (0, expected[3:])  # only the answer
    assert err.startswith("prompt: 3 tokens")


@pytest.mark.parametrize(
    "options, message",
    [
        (("-g", "0"), "--max-tokens: expected at least 1, got 0"),
        (("--temperature", "-1"), "--temperature: expected a number of 0 or more, got -1.0"),
        (("--temperature", "nan"), "--temperature: expected a number of 0 or more, got nan"),
        (("--temperature", "1", "--top-p", "0"), "--top-p: expected a number in (0, 1], got 0.0"),
        (("--temperature", "1", "--top-k", "-1"), "--top-k: expected at least 0, got -1"),
        (("--top-k", "4"), "--top-k: only with a temperature above 0"),
        (("--temperature", "1", "--min-p", "2"), "--min-p: expected a number in [0, 1], got 2.0"),
        (("--repetition-penalty", "0"), "--repetition-penalty: expected a number above 0, got 0.0"),
        (("--batch-size", "0"), "--batch-size: expected at least 1, got 0"),
        (("--stop", ""), "--stop: expected strings that are not empty"),
        (("--prompts-file", "x"), "--prompts-file: not allowed with argument --prompt"),
        (("--seed", "-1"), "--seed: expected at least 0, got -1"),
        (("--attn", "nope"), "--attn: expected one of eager, fastattn,"),
        (("--device", "cuda:99"), "--device: "),
        (("--model", "tiny"), "--model: the preset tiny has random weights and no tokenizer"),
        (("--model", "nope"), "--model: expected a directory with config.json"),
        (("--prompt", ""), "--prompt: expected some text, this one has no tokens"),
    ],
)
def test_bad_options_are_one_line(capsys, speaker, options, message):
    status, out, err = generate(capsys, speaker, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fastattn: error: ")
    assert message in err


def test_chat_without_a_template(capsys, saved_model):
    status, _, err = generate(capsys, saved_model, "--chat", prompt="a b")
    assert (status, err) == (2, "fastattn: error: --chat: this model's tokenizer has no chat template\n")


def test_prompt_as_long_as_the_model(capsys, model_directory):
    config = json.loads((model_directory / "config.json").read_text()) | {"max_position_embeddings": 5}
    (model_directory / "config.json").write_text(json.dumps(config))
    status, _, err = generate(capsys, model_directory, prompt="a b a b a")
    assert (status, err) == (2, "fastattn: error: --prompt: expected fewer tokens than the model's 5, got 5\n")
    status, _, err = generate(capsys, model_directory, prompt="a b a")
    assert status == 0
    assert "generation: 2 tokens" in err


def batch(capsys, model, path, text, *options):
    path.write_text(text)
    status = cli.main(["generate", "--model", str(model), "--prompts-file", str(path), "--device", "cpu", *options])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("rows", ["1", "2", "8"])
def test_a_file_of_prompts(capsys, speaker, tmp_path, rows):
    lines = ["w5 w6 w7", "w1", "w9 w8", "w3 w3"]
    model = load(speaker, attn="eager", device="cpu").model
    expected = [greedy(model, [int(word[1:]) for word in line.split()], 6) for line in lines]
    text = "\n".join(lines) + "\n"
    status, out, err = batch(capsys, speaker, tmp_path / "prompts", text, "-g", "6", "--batch-size", rows)
    assert status == 0
    assert out == "".join(f"==> {i + 1} <==\n{' '.join(words)}\n" for i, words in enumerate(expected))
    assert re.match(rf"prompt: 8 tokens, {NUMBER}; generation: 24 tokens, {NUMBER}; peak memory", err), err


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--prompts-file: expected a prompt on each line, "),
        ("w1\n\nw2", "--prompts-file: line 2: expected some text"),
    ],
)
def test_bad_files_of_prompts(capsys, speaker, tmp_path, text, message):
    with_file = batch(capsys, speaker, tmp_path / "prompts", text)
    assert with_file[:2] == (2, "")
    assert message in with_file[2]


def test_a_file_of_prompts_that_is_not_there(capsys, speaker, tmp_path):
    arguments = ["generate", "--model", str(speaker), "--prompts-file", str(tmp_path / "nope")]
    assert cli.main(arguments) == 2
    assert "--prompts-file: cannot be read: " in capsys.readouterr().err


class Interrupted:
    """stdout that is interrupted, as by Ctrl-C, once a text has come so far."""

    def __init__(self, out, after):
        self.out, self.after, self.text = out, after, ""

    def write(self, text):
        self.out.write(text)
        self.text += text
        if self.after in self.text:
            self.after = "\0"
            raise KeyboardInterrupt

    def flush(self):
        self.out.flush()


def test_interrupted_it_keeps_what_there_is(capsys, speaker, monkeypatch):
    words = generate(capsys, speaker, "-g", "9")[1].split()
    monkeypatch.setattr(sys, "stdout", Interrupted(sys.stdout, words[6]))
    status, out, err = generate(capsys, speaker, "-g", "500")
    assert (status, out.split()) == (130, words[:7])
    assert out.endswith("\n")
    assert "; generation: 4 tokens, " in err
    assert err.count("\n") == 1


def test_an_interrupted_batch_prints_all_that_came(capsys, speaker, monkeypatch, tmp_path):
    words = generate(capsys, speaker, "-g", "9")[1].split()
    monkeypatch.setattr(sys, "stdout", Interrupted(sys.stdout, words[6]))
    status, out, _ = batch(capsys, speaker, tmp_path / "prompts", "w5 w6 w7\nw5 w6 w7\nw8", "-g", "500")
    first, second, third = re.split(r"==> \d <==\n", out)[1:]
    assert status == 130
    assert first.split() == words[:7]
    assert second.split() == words[:6]
    assert len(third.split()) == 4
