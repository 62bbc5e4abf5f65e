"""MLX's whole model in a process of its own: what it is asked, and the file that comes of it."""

import json
import sys

import pytest

from benchmarks import compare, mlx_model
from benchmarks.report.sections import section_of

#: A process that says what it was asked.
CHILD = """
import json, sys
asked = json.loads(sys.argv[1])
trials = [{"prompt_tps": 100.0 + i, "generation_tps": 10.0, "peak_memory": 1.5, "total_time": 2.0}
          for i in range(asked["num_trials"])]
print("noise")
print(json.dumps({"trials": trials, "versions": {"mlx": "1"}, "device": "gpu", "parameters": 5, "asked": asked}))
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    monkeypatch.setattr(mlx_model, "CHILD", path)
    return path


def test_the_config_is_the_preset_in_mlx_names():
    found = mlx_model.config_of("llama-3.1-8b")
    assert (found["hidden_size"], found["num_hidden_layers"], found["num_key_value_heads"]) == (4096, 32, 8)
    assert found["rope_theta"] == 500000.0 and found["rope_scaling"]["factor"] == 8.0
    assert "rope_scaling" not in mlx_model.config_of("tiny")
    with pytest.raises(ValueError, match=r"--model: expected one of tiny, .*'gemma-2-2b'"):
        mlx_model.config_of("gemma-2-2b")


def test_the_file_is_one_of_a_model(child, tmp_path, capsys):
    file = tmp_path / "mlx.json"
    assert mlx_model.main(["--model", "tiny", "-p", "64", "-g", "8", "-n", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["benchmark"] == "model" and found["command"].startswith("python -m benchmarks.mlx_model --model tiny")
    assert found["implementations"]["mlx"]["averages"] == {
        "prompt_tps": 101.0, "generation_tps": 10.0, "peak_memory": 1.5
    }  # fmt: skip
    assert "Averages: prompt_tps=101.000, generation_tps=10.000, peak_memory=1.500" in capsys.readouterr().out
    assert dict(compare.figures(found))["mlx, prompt_tps"].value == 101.0
    assert any("MLX" in str(part) for part in section_of("mlx.json", found).parts)


def test_what_is_asked(child):
    found = mlx_model.measured({"num_trials": 1, "prompt_tokens": 7}, sys.executable)
    assert found["asked"] == {"num_trials": 1, "prompt_tokens": 7}


def test_a_process_that_fails_says_why(child):
    child.write_text("raise SystemExit('no module named mlx')")
    with pytest.raises(RuntimeError, match="no module named mlx"):
        mlx_model.measured({}, sys.executable)
    with pytest.raises(ValueError, match="--num-trials: expected 1 or more"):
        mlx_model.main(["-n", "0"])
