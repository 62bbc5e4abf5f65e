"""The processes of `fastattn sweep users`: rows that end them, cut runs, and the command end to end on the CPU."""

import json
import threading
import time
from pathlib import Path

import fake_worker
import pytest
import torch

from fastattn.bench import results
from fastattn.bench.users import contenders, rows, run, summary, worker
from fastattn.cli.main import main

SETTINGS = run.Settings(torch.device("cpu"), quick=True)
HELPERS = Path(__file__).parents[2] / "helpers"


@pytest.fixture
def fake(monkeypatch):
    """Drives processes that only pretend."""
    monkeypatch.setenv("PYTHONPATH", f"{HELPERS}:{Path(contenders.__file__).parents[3]}")

    def drive(names, is_late=lambda: False, cut=None):
        return dict(run.drive(names, "check", SETTINGS, is_late, cut, module="fake_worker"))

    return drive


def test_a_row_that_ends_its_process_leaves_the_others(fake):
    found = fake(["a", "poison", "b", "silent", "c"])
    assert list(found) == ["a", "poison", "b", "silent", "c"]
    assert found["poison"] == {"failed": "CUDA error: an illegal memory access was encountered"}
    assert found["silent"] == {"failed": "its process ended with status 4"}
    pids = [found[name]["fastattn"]["pid"] for name in "abc"]
    assert len(set(pids)) == 3 and found["a"]["fastattn"]["phase"] == "check"


def test_a_row_is_measured_without_the_peer_that_ended_its_process(fake):
    found = fake(["a", "bad peer", "b"])
    assert list(found) == ["a", "bad peer", "b"]
    assert found["bad peer"]["torch-cudnn"] == {"failed": "CUDA error: of a peer"}
    assert "pid" in found["bad peer"]["fastattn"] and "torch-cudnn" not in found["b"]


def test_the_fake_speaks_as_the_worker():
    assert fake_worker.MARK == worker.MARK


def test_rows_share_a_process(fake):
    assert len({entries["fastattn"]["pid"] for entries in fake(["a", "b", "c"]).values()}) == 1


def test_a_row_without_an_end_is_ended(fake, monkeypatch):
    monkeypatch.setitem(run.ROW_SECONDS, "check", 1.0)
    found = fake(["a", "hang", "b"])
    assert found["hang"] == {"failed": "no end after 1 s"} and "fastattn" in found["b"]


def test_late_rows_are_left_out(fake):
    assert fake(["a", "b"], lambda: True) == {name: {"left_out": "no time"} for name in "ab"}


def test_a_run_that_is_cut_ends_at_once(fake, monkeypatch):
    """Not when the row ends, and without another process for the rows that are left."""
    cut = threading.Event()
    timer = threading.Timer(2.0, cut.set)
    begun = time.monotonic()
    timer.start()
    found = fake(["hang", "a"], cut=cut)
    assert time.monotonic() - begun < 20 and found == {}


def test_nobody_reads_a_process_that_was_left(fake):
    """Its pipes are closed: a thread that still reads would end in an error."""
    others = set(threading.enumerate())
    found = run.drive(["a", "chatty"], "check", SETTINGS, module="fake_worker")
    assert next(found)[0] == "a"
    time.sleep(0.2)
    assert set(threading.enumerate()) > others
    found.close()
    assert set(threading.enumerate()) == others


def test_ctrl_c_cuts_the_others(monkeypatch):
    events = []

    def drive(names, phase, settings, is_late, cut):
        events.append(cut)
        yield names[0], {"fastattn": {}}
        cut.wait(30)

    monkeypatch.setattr(run, "drive", drive)
    found = run._phase("check", rows.chosen(["causal 64"]), SETTINGS, lambda: False, lambda *item: None)
    next(found)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert events[0].is_set() and time.monotonic() - begun < 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("users") / "users.json"
    words = ["causal 64", "train MQA", "decode lengths"]
    options = ["--device", "cpu", "--quick", "--absent", "xformers=no wheel for this Python", "--json", str(path)]
    assert main(["sweep", "users", *words, *options]) == 0
    return json.loads(path.read_text())


def test_the_command_writes_all_that_it_promises(made):
    assert made["benchmark"] == "sweep users" and made["complete"] is True
    assert made["command"].startswith("fastattn sweep users 'causal 64' 'train MQA'")
    assert made["arguments"]["quick"] is True and made["arguments"]["rounds"] == run.QUICK_ROUNDS
    assert made["absent"]["xformers"] == "no wheel for this Python"
    assert list(made["rows"]) == ["causal 64", "decode lengths B32 8192", "train MQA 2048"]
    for name, row in made["rows"].items():
        ours, peer = row["contenders"]["fastattn"], row["contenders"]["torch"]
        assert ours["error"] < 8e-3 and ("gradient_error" in ours) == name.startswith("train")
        for entry in (ours, peer):
            for figures in (entry, entry["eager"], entry["host"]):
                low, high = figures["quarters_us"]
                assert 0 < figures["min_us"] <= low <= figures["us"] <= high <= figures["max_us"]
            assert entry["host"]["us"] <= entry["eager"]["us"]
        assert row["best_peer"] == "torch"
        assert row["ratio"] == pytest.approx(ours["us"] / peer["us"], abs=1e-3)
    assert made["summary"] == summary.of(made["rows"]) and made["summary"]["rows"] == 3


def test_a_cut_run_keeps_what_it_has(tmp_path, monkeypatch):
    path = tmp_path / "users.json"
    sound = run.drive

    def cut(names, phase, settings, is_late, event):
        for i, item in enumerate(sound(names, phase, settings, is_late, event)):
            if phase == "time" and i == 1:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(run, "drive", cut)
    with pytest.raises(KeyboardInterrupt):
        run.run(rows.chosen(["causal 64", "causal 100"]), SETTINGS, "x", str(path))
    found = json.loads(path.read_text())
    assert found["complete"] is False and "error" in found["rows"]["causal 100"]["contenders"]["fastattn"]
    timed = [name for name, row in found["rows"].items() if "us" in row["contenders"]["fastattn"]]
    assert timed == ["causal 64"] and found["summary"]["captured"]["timed"] == 1


def test_a_wrong_row_fails_the_command(monkeypatch, capsys):
    def wrong(names, phase, settings, is_late, cut):
        yield from ((name, {"fastattn": {"failed": "wrong result: NaN"}}) for name in names)

    monkeypatch.setattr(run, "drive", wrong)
    assert main(["sweep", "users", "causal 64", "--device", "cpu", "--check"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("1 rows; 1 failed")


@pytest.mark.parametrize(
    "argv, text",
    [
        (["users", "no such row"], "ROW: expected"),
        (["users", "--absent", "xformers"], "--absent: expected NAME=WHY"),
        *(
            (["users", "--seconds", text], "--seconds: expected a number of seconds over 0")
            for text in ("nan", "0", "-1")
        ),
        (["users", "--plot", "x.png"], "--plot: expected"),
        (["decode", "--check"], "ROW, --check, --flex, --absent, --seconds, --warm: expected"),
        (["decode", "--warm"], "ROW, --check, --flex, --absent, --seconds, --warm: expected"),
        (["decode", "causal"], "ROW, --check, --flex, --absent, --seconds, --warm: expected"),
    ],
)
def test_bad_input(argv, text, capsys):
    assert main(["sweep", *argv, "--device", "cpu"]) == 2
    assert text in capsys.readouterr().err


def test_the_commit_can_be_named(monkeypatch):
    """On a machine that has a copy of the source, and no git checkout."""
    monkeypatch.setenv("FASTATTN_COMMIT", "abc123")
    found = results.environment(torch.device("cpu"))
    assert found["commit"] == "abc123" and "FASTATTN_COMMIT" not in found["switches"]


def test_the_peers_of_a_gpu(monkeypatch):
    monkeypatch.setattr(contenders, "version_of", {"xformers": "1"}.get)
    assert contenders.peers(False, True) == [*contenders.TORCHS, "torch-varlen", "torch-plain", "xformers"]
    assert contenders.peers(True, True)[-1] == "flex"
    assert contenders.versions()["flash-attn"] is None and contenders.versions()["xformers"] == "1"
