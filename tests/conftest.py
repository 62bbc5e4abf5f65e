"""For all tests: seeds, thread settings, a saved model, and GPU tests that say so when they cannot run."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quick_interpreter
import torch

if not torch.cuda.is_available():
    # Triton reads it once, when it is first imported, and torch.compile imports it too: whichever test comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.setdefault("FASTATTN_NATIVE", "0")  # 20 s in each process with caches of its own; those that want it ask
    os.environ.setdefault("FASTATTN_COMPILE", "wait")  # else which backend serves depends on when a compiler ends

_NO_GPU = "no GPU here"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads of one only slow the other down
        torch.set_num_threads(1)
    # torch makes its list of the functions that `with torch.device(...)` redirects once in a process, when such a block
    # first calls one. Where that is within transformers' from_pretrained, which replaces torch.linspace for a while,
    # torch.linspace is redirected no more.
    with torch.device("cpu"):
        torch.empty(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            # The name is in the reason because pytest's summary folds skips of equal reasons into one line.
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid}: {_NO_GPU}"))


def pytest_runtest_setup() -> None:
    quick_interpreter.install()  # once something has imported Triton


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a test under FASTATTN_INTERPRET=1 found out is no other test's: a route is kept for as long as the process
    lives, and every later call of those shapes would run in Triton's interpreter, seconds instead of milliseconds."""
    from fastattn.shape_cache import shape_cache

    try:
        return (yield)
    finally:
        if os.environ.get("FASTATTN_INTERPRET") == "1":
            shape_cache.clear()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(isinstance(r.longrepr, tuple) and r.longrepr[2].endswith(_NO_GPU) for r in skipped)
    if count:
        terminalreporter.write_line(f"{count} GPU test{'s' * (count > 1)} skipped: {_NO_GPU}", yellow=True)


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Nothing is cached of other tests' calls, and nothing of this test's afterwards."""
    from fastattn.shape_cache import shape_cache

    shape_cache.clear()
    yield
    shape_cache.clear()


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every warning is given once more: those that earlier tests were given do not count."""
    from fastattn.common import notice

    monkeypatch.setattr(notice, "_given", set())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch's and Python's generators by the test's id; another FASTATTN_TEST_SEED gives other inputs.

    A test that makes generators of its own starts them from this number. A failure prints it.
    """
    value = zlib.crc32(f"{os.environ.get('FASTATTN_TEST_SEED', '')}{request.node.nodeid}".encode())
    torch.manual_seed(value)
    random.seed(value)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({value})")
    return value


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in Hugging Face's layout: the tiny preset with a tokenizer of single words. Not to be changed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fastattn.lm import load

    path = tmp_path_factory.mktemp("models") / "saved-tiny"
    load("tiny", attn="eager", seed=3).model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def model_directory(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of `saved_model` that a test may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))
