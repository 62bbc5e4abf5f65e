"""A model directory in Hugging Face's layout, made once and copied by the tests that damage it."""

import shutil
from pathlib import Path

import pytest

from fastattn.lm import load


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """The tiny preset with a tokenizer of single words, as a directory. Not to be changed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "saved-tiny"
    load("tiny", attn="eager", seed=3).model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def model_directory(saved_model, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))
