"""Every kind of damage to a model's directory is one line that names the path, or does no harm; no code of it runs."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import EITHER, HARMLESS, MARK, REFUSED, WORDS, Kind, Q, config, kinds, make, weights, with_code

from fastattn.lm import batch_generate, load
from fastattn.lm.loading.pretrained import read_config
from fastattn.warming.model import read_config as warming_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
KINDS = list(kinds())
IDS = torch.tensor([[3, 7, 5, 2]])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The undamaged directory, and the logits of its model for IDS."""
    path = make(tmp_path_factory.mktemp("good") / "model")
    with torch.no_grad():
        return path, load(path, attn="eager", device="cpu").model(IDS).logits


@pytest.fixture
def copy(good: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MARK, str(tmp_path / "code-was-run"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])  # which that is added to
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return Path(shutil.copytree(good[0], tmp_path / "model"))


def test_there_are_many_kinds():
    assert len(KINDS) >= 150
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {kind.expected for kind in KINDS} == {REFUSED, HARMLESS, EITHER}


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name[:60] for kind in KINDS])
def test_damage(kind: Kind, copy: Path, good: tuple[Path, torch.Tensor]):
    kind.damage(copy)
    begin, refusal = time.monotonic(), None
    try:
        loaded = load(copy, attn="eager", device="cpu")
        if kind.expected == HARMLESS:
            with torch.no_grad():
                torch.testing.assert_close(loaded.model(IDS).logits, good[1])
        if kind.expected != REFUSED:
            batch_generate(loaded, ["w3 w7"], max_tokens=2)
    except ValueError as error:
        refusal = str(error)
    assert time.monotonic() - begin < 30
    assert not Path(os.environ[MARK]).exists(), "code of the directory was run"
    if refusal is None:
        assert kind.expected != REFUSED, "it was loaded"
    else:
        assert kind.expected != HARMLESS, refusal
        assert str(copy) in refusal or kind.name.startswith("a shard named '/"), refusal
        assert "\n" not in refusal, refusal
        assert len(refusal) < 1000, refusal


def test_quantized_weights_of_an_unknown_kind(copy: Path):
    """Whole numbers of the right shape would be taken for weights."""
    weights(lambda found: found.update({Q: found[Q].to(torch.int8)}))(copy)
    config(quantization_config={"quant_method": "nope"})(copy)
    with pytest.raises(ValueError, match=rf"model.safetensors: {Q}: expected floating point numbers, got I8"):
        load(copy, attn="eager", device="cpu")


def test_a_config_far_larger_than_its_weights_takes_no_memory(copy: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changes in ({"vocab_size": 10**9}, {"num_hidden_layers": 9999}, {"hidden_size": 2**24, "head_dim": 8}):
        shutil.copy(copy / "config.json", copy / "kept")
        config(**changes)(copy)
        with pytest.raises(ValueError, match=r"config.json: describes a model far larger than its weights"):
            load(copy, attn="eager", device="cpu")
        shutil.move(copy / "kept", copy / "config.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB


@pytest.mark.parametrize("autos", [("AutoConfig", "AutoModelForCausalLM"), ("AutoTokenizer",)])
def test_code_runs_for_who_trusts_it(copy: Path, autos: tuple[str, ...], good: tuple[Path, torch.Tensor]):
    with_code(*autos)(copy)
    loaded = load(copy, attn="eager", device="cpu", trust_remote_code=True)
    assert Path(os.environ[MARK]).exists()
    assert "Own" in (type(loaded.tokenizer) if "AutoTokenizer" in autos else type(loaded.model)).__name__
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, good[1])


@pytest.mark.parametrize("read", [read_config, warming_config])
def test_a_config_alone_runs_no_code(copy: Path, read: Callable[..., Any]):
    with_code("AutoConfig", "AutoModelForCausalLM")(copy)
    with pytest.raises(ValueError, match=r"code of its own, .*--trust-remote-code, trust_remote_code=True"):
        read(copy)
    assert not Path(os.environ[MARK]).exists()
    assert read(copy, trust_remote_code=True).vocab_size == WORDS


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError(), KeyboardInterrupt(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_want_of_memory_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(copy, attn="eager", device="cpu")
    assert caught.value is error


def test_what_a_file_says_commands_no_terminal(copy: Path):
    config(model_type="\x1b]0;owned\x07\x1b[2J")(copy)
    with pytest.raises(ValueError, match=r"config.json: ") as caught:
        load(copy, attn="eager", device="cpu")
    assert str(caught.value).isprintable()


def test_a_directory_that_may_not_be_read(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("read_text", "iterdir"):  # tests run as root, who may read everything
        monkeypatch.setattr(Path, method, refuse)
        for read in (load, warming_config):
            with pytest.raises(ValueError, match=rf"^{copy}.*Permission denied"):
                read(copy)


def test_a_name_that_can_be_none(copy: Path):
    for name in ("x" * 5000, "a\x00b", ""):
        with pytest.raises(ValueError, match="model: expected a directory"):
            load(name)
        with pytest.raises(ValueError, match="model: expected a directory"):
            warming_config(name)


def test_a_panic_of_a_parser_is_damage(copy: Path, monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):  # as pyo3 has it
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match=r"tokenizer.json: expected a tokenizer .*: index out of bounds"):
        load(copy, attn="eager", device="cpu")


@pytest.mark.parametrize("layout", ["snapshots", "cache"])
def test_the_links_of_the_hubs_cache_are_followed(copy: Path, tmp_path: Path, layout: str, monkeypatch):
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    path = (blobs.parent / "snapshots" / "abc") if layout == "snapshots" else tmp_path / "elsewhere"
    if layout == "cache":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models--a--b"))
    path.mkdir(parents=True)
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.copy(file, blobs / str(number))
        (path / file.name).symlink_to(blobs / str(number))
    assert load(path, attn="eager", device="cpu").tokenizer("w3")["input_ids"] == [3]


def test_a_link_to_the_directory_and_a_relative_path(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").symlink_to(copy)
    monkeypatch.chdir(copy)
    for path in (tmp_path / "link", Path("."), Path("../model"), Path("../link")):
        assert load(path, attn="eager", device="cpu").name == "model"


@pytest.mark.parametrize(
    "kind, options",
    [
        ("config.json half", ("generate", "--prompt", "w3", "--model")),
        ("code for config and model", ("generate", "--prompt", "w3", "--model")),
        (f"{Q} with nan", ("benchmark", "-p", "3", "-g", "2", "-n", "1", "--model")),
        ("code for the config", ("warmup", "--max-length", "32", "--model")),
    ],
)
def test_from_the_shell(copy: Path, kind: str, options: tuple[str, ...]):
    """In a process of its own, with "yes" on stdin in case it prompts."""
    next(one for one in KINDS if one.name == kind).damage(copy)
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *options, str(copy), "--device", "cpu"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FASTATTN_DEBUG": "0"},
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("fastattn: error: ") and str(copy) in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not Path(os.environ[MARK]).exists()
