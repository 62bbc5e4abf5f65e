import io
import json
import re

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.lm import load


@pytest.fixture(scope="module")
def speaker(saved_model, tmp_path_factory):
    """The tiny preset with a tokenizer that has a word for every id: all that is generated shows as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "speaker"
    load(saved_model, attn="eager").model.save_pretrained(path)
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
    number = r"\d+\.\d tokens/s"
    assert re.fullmatch(rf"prompt: 3 tokens, {number}; generation: 9 tokens, {number}\n", err), err
    calls = sum(fastattn.stats()["calls"].values()) - before
    assert calls == (2 * 9 if attn == "fastattn" else 0)  # layers, forwards


def test_the_end_token_ends_it(capsys, speaker):
    model = load(speaker, attn="eager", device="cpu").model
    words = greedy(model, [5, 6, 7], 9)
    end = int(words[5][1:])
    model.generation_config.eos_token_id = end
    model.save_pretrained(speaker.parent / "ended")
    load(speaker, attn="eager").tokenizer.save_pretrained(speaker.parent / "ended")
    _, out, err = generate(capsys, speaker.parent / "ended", "-g", "9")
    assert out.split() == words[: words.index(f"w{end}") + 1]
    assert "generation: 9 tokens" not in err


def test_the_seed_decides_what_is_drawn(capsys, speaker):
    texts = [generate(capsys, speaker, "-g", "12", "--temperature", "1", "--seed", s)[1] for s in ("3", "3", "4")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("options", [("--top-k", "1"), ("--top-p", "0.000001")])
def test_few_tokens_to_draw_from_is_greedy(capsys, speaker, options):
    expected = generate(capsys, speaker, "-g", "6")[1]
    assert generate(capsys, speaker, "-g", "6", "--temperature", "5", "--seed", "1", *options)[1] == expected


def test_one_token_has_no_generation_speed(capsys, speaker):
    assert generate(capsys, speaker, "-g", "1")[2].endswith("; generation: 1 token\n")


def test_prompt_from_stdin(capsys, monkeypatch, speaker):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6 w7"))
    assert generate(capsys, speaker, "-g", "3", prompt="-")[1] == generate(capsys, speaker, "-g", "3")[1]


def test_chat_template(capsys, speaker):
    expected = greedy(load(speaker, attn="eager", device="cpu").model, [900, 5, 901], 4)
    status, out, err = generate(capsys, speaker, "-g", "4", "--chat", prompt="w5")
    assert (status, out.split()) == (0, expected[3:])  # only the answer
    assert err.startswith("prompt: 3 tokens")


@pytest.mark.parametrize(
    "options, message",
    [
        (("-g", "0"), "--generation-tokens: expected at least 1, got 0"),
        (("--temperature", "-1"), "--temperature: expected 0 or more, got -1.0"),
        (("--temperature", "nan"), "--temperature: expected 0 or more, got nan"),
        (("--temperature", "1", "--top-p", "0"), "--top-p: expected a number in (0, 1], got 0.0"),
        (("--temperature", "1", "--top-k", "0"), "--top-k: expected at least 1, got 0"),
        (("--top-k", "4"), "--top-p and --top-k: only with --temperature above 0"),
        (("--seed", "-1"), "--seed: expected 0 or more, got -1"),
        (("--attn", "nope"), "attn: expected one of eager, fastattn,"),
        (("--device", "cuda:99"), "device: "),
        (("--model", "tiny"), "--model: the preset tiny has random weights and no tokenizer"),
        (("--model", "nope"), "model: expected a directory with config.json"),
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
