"""The maintainers' benchmarks: how they end, what they write, and that the package needs none of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import command
from fastattn.bench import output

ROOT = Path(command.__file__).parents[1]


def test_commands_end_in_one_line(monkeypatch, capsys):
    def fails(error):
        def main():
            raise error

        return main

    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)
    full = output.NotWrittenError(28, "No space left", "x\x1b[31m.json")
    cases = [(ValueError("bad\x07"), 2, "bad\\x07"), (full, 1, "x\\x1b[31m.json: cannot be written: No space left")]
    for error, status, text in cases:
        with pytest.raises(SystemExit) as caught:
            command.end(fails(error))
        assert caught.value.code == status
        assert capsys.readouterr().err.endswith(f": error: {text}\n")
    with pytest.raises(SystemExit) as caught:
        command.end(lambda: 0)
    assert caught.value.code == 0


def test_every_command_ends_so():
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        assert "sys.exit(main(" not in text, path
        if "__main__" in text and path.name not in (
            "first_call.py",
            "mlx_child.py",
            "never_seen_calls.py",
            "warm_process.py",
        ):  # (children, whose errors are read)
            assert "end(main)" in text, path


def test_a_result_file_names_its_command(tmp_path):
    file = tmp_path / "x.json"
    command.write(str(file), "tune_x", ["--json", "a b"], torch.device("cpu"), {"rows": [1]})
    found = json.loads(file.read_text())
    assert (found["benchmark"], found["command"]) == ("tune_x", "python -m benchmarks.tune_x --json 'a b'")
    assert found["environment"]["torch"] == torch.__version__ and found["rows"] == [1]
    command.write(None, "tune_x", [], torch.device("cpu"), {})


def test_the_package_imports_none_of_them():
    code = "import sys, fastattn.cli.main, fastattn.bench.sweeps, fastattn.bench.model"
    code += "; sys.exit('benchmarks' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for path in (ROOT / "src").rglob("*.py"):
        assert "import benchmarks" not in path.read_text() and "from benchmarks" not in path.read_text(), path
