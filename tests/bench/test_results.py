import json
import os
import stat
from types import SimpleNamespace

import pytest
import torch

from fastattn.bench import output, results
from fastattn.common import machine


def test_environment_names_what_a_figure_depends_on(monkeypatch):
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    found = results.environment(torch.device("cpu"))
    assert (found["gpu"], found["driver"]) == (None, None)
    assert found["torch"] == torch.__version__
    assert found["switches"]["FASTATTN_CUDNN"] == "0"
    assert {"cuda", "cudnn", "cudnn_frontend", "triton", "transformers", "python", "fastattn", "commit"} <= set(found)
    json.dumps(found, allow_nan=False)


def test_a_command_can_be_named_by_who_starts_it(monkeypatch):
    monkeypatch.delenv(results.COMMAND, raising=False)
    device = torch.device("cpu")
    assert results.header("op", "fastattn sweep --json /tmp/x.json", device)["command"].endswith("--json /tmp/x.json")
    monkeypatch.setenv("FASTATTN_COMMAND", "fastattn sweep --json kept/x.json")
    found = results.header("op", "fastattn sweep --json /tmp/x.json", device)
    assert found["command"] == "fastattn sweep --json kept/x.json"
    assert "FASTATTN_COMMAND" not in found["environment"]["switches"]


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    old_umask = os.umask(0o022)
    try:
        results.write_json(path, {"a": [1, 2.5, None]})
    finally:
        os.umask(old_umask)
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("data", [{"a": object()}, {"a": float("nan")}])
def test_data_that_is_no_json_leaves_the_old_file(tmp_path, data):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError)):
        results.write_json(path, data)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_writable_path_is_left_alone(tmp_path):
    path = tmp_path / "result.json"
    assert output.check_writable(path) == path
    assert os.listdir(tmp_path) == []


def test_unwritable_paths(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "this is a directory"),
        (tmp_path / "no" / "x.json", "there is no directory"),
        (tmp_path / "file" / "x.json", "there is no directory"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            output.check_writable(path)
        assert str(path) in str(caught.value)


def test_environment_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(machine, "ask", lambda *command: "580.65.06" if command[0] == "nvidia-smi" else None)
    found = results.environment(torch.device("cuda", 0))
    keys = ("gpu", "compute_capability", "gpu_memory", "driver", "cudnn", "commit")
    assert [found[key] for key in keys] == [properties.name, "9.0", 85_000_000_000, "580.65.06", "9.19.0", None]
