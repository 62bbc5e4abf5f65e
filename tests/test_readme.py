"""What the README shows has to run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from fastattn import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ") for _, text in BLOCKS for line in text.splitlines() if re.match(r"(\$ )?fastattn \w", line)
]


def test_there_is_something_to_test():
    assert len(PYTHON) >= 2
    assert {line.split()[1] for line in COMMANDS} == {"benchmark", "doctor", "explain"}


@pytest.mark.parametrize("text", PYTHON, ids=lambda text: next(n for n in text.splitlines() if "fastattn" in n))
def test_python_runs(text, tmp_path, monkeypatch):
    if "path/to/model" in text:
        from fastattn.lm import load

        load("tiny", attn="eager", device="cpu").model.save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the README shows a machine without a GPU")
def test_explain_says_what_is_shown(capsys, monkeypatch):
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    (shown,) = [text for _, text in BLOCKS if text.startswith("$ fastattn explain")]
    line, _, expected = shown.partition("\n")
    assert cli.main(shlex.split(line)[2:]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_are_understood(line):
    cli._parser().parse_args(shlex.split(line)[1:])
