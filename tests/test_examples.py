"""The examples run as the README says, with as little to do as they can have."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("accelerate", reason="the examples need pip install 'fastattn[examples]'")
pytest.importorskip("tokenizers", reason="the examples need pip install 'fastattn[examples]'")


@pytest.fixture(scope="module")
def train_tiny():
    spec = importlib.util.spec_from_file_location("train_tiny", EXAMPLES / "train_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_train_tiny_makes_a_model_that_generates(tmp_path):
    out = tmp_path / "model"
    options = ["--steps", "2", "--batch-size", "2", "--length", "32", "--vocab-size", "300", "--out", out]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_tiny.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loss: 5.7" in done.stdout  # of a model that has learnt nothing: ln 300
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (out / "loss.png").exists() == has_matplotlib
    assert (f"plot: {out / 'loss.png'}" if has_matplotlib else "matplotlib is not installed") in done.stdout

    command = [sys.executable, "-m", "fastattn", "generate", "--model", out, "--prompt", "def ", "-g", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    assert "generation: 5 tokens" in done.stderr


def test_train_tiny_reads_the_same_library_every_time(train_tiny):
    training, held_out = train_tiny.read_library(0)
    assert train_tiny.read_library(0) == (training, held_out)
    assert train_tiny.read_library(1)[1] != held_out
    assert len(training) > 8 * len(held_out) > 100
    assert any("class OrderedDict" in text for text in training + held_out)


def test_train_tiny_has_tokens_for_any_text(train_tiny):
    tokenizer = train_tiny.train_tokenizer(["def f():\n    return 1\n"] * 3, 280)
    text = "def größe():\n\treturn '猫'  # \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = train_tiny.blocks(["a" * 10, "b" * 7], tokenizer, 6)
    ids = [i for piece in pieces for i in piece["input_ids"].tolist()]
    assert tokenizer.decode(ids) == f"{'a' * 10}{train_tiny.END}{'b' * 7}"[: len(tokenizer.decode(ids))]
    assert all(len(piece["input_ids"]) == 6 and piece["labels"] is piece["input_ids"] for piece in pieces)


def test_train_tiny_without_matplotlib(train_tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not train_tiny.plot([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
