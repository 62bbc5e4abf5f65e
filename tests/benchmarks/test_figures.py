"""`benchmarks.figures` with jobs that measure nothing: when they run, what becomes of them, and of their files."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import __main__ as figures
from benchmarks.figures import running
from benchmarks.figures.jobs import Job
from benchmarks.figures.running import FAILED, MADE, SKIPPED
from fastattn.common import machine

FAKE = Path(__file__).parents[1] / "helpers" / "fake_job.py"
COMMIT = "0" * 40
Run = Callable[..., tuple[int, str]]


def fake(name: str, word: str = "good", takes: float = 0.1, *, says: float = 10.0, rest: str = "", **more: Any) -> Job:
    """A job that takes so many seconds, and says how many."""
    return Job(name, f"python {FAKE} {word} {takes} {rest}".rstrip(), says, **more)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on some jobs, on a machine with an H200 and a copy of the source. Returns its status and output."""
    monkeypatch.setenv("FASTATTN_COMMIT", COMMIT)
    monkeypatch.delenv("FASTATTN_COMPILE", raising=False)
    monkeypatch.setattr(machine, "ask", lambda *command: "NVIDIA H200" if command[0] == "nvidia-smi" else None)

    def command(jobs: Sequence[Job], *argv: str) -> tuple[int, str]:
        status = figures.main(["--out", str(tmp_path / "here" / "made"), *argv], jobs)
        return status, capsys.readouterr().out

    return command


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        return json.loads((tmp_path / "here" / "made" / f"{name}.json").read_text())

    return read


def files(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "here" / "made"))


def test_files_name_the_commit_and_the_command_as_they_are_kept(run: Run, made: Any, tmp_path: Path) -> None:
    job = fake("one", environment=(("FASTATTN_COMPILE", "wait"),))
    status, said = run([job, fake("two")])
    assert status == 0 and files(tmp_path) == ["one.json", "two.json"]
    assert made("one")["command"] == f"python {FAKE} good 0.1 --json benchmarks/results/h200/one.json"
    assert made("one")["environment"]["commit"] == COMMIT
    assert made("one")["compile"] == "wait" and made("two")["compile"] is None
    logs = tmp_path / "here" / "logs"
    assert sorted(os.listdir(logs)) == ["one.log", "two.log"], "what was written beside them is gone"
    assert "good begins" in (logs / "one.log").read_text() and "FASTATTN_COMPILE=wait" in (logs / "one.log").read_text()
    assert "one: begins on GPU 0, about 10 s" in said and said.rstrip().endswith("2 made, 0 failed, 0 skipped")


def test_jobs_run_side_by_side_quiet_ones_alone_and_first(run: Run, made: Any) -> None:
    jobs = [
        *(fake(f"short {i}", takes=1.5, says=5 + i) for i in range(3)),
        fake("long", takes=1.5, says=20),
        fake("both", takes=0.3, says=4, gpus=2),
        fake("quiet", takes=0.4, quiet=True),
        fake("quieter", takes=0.4, says=12, quiet=True),
    ]
    assert run(jobs, "--gpus", "3,5")[0] == 0
    ran = {job.name: made(job.name)["ran"] for job in jobs}
    begun = sorted(ran, key=lambda name: ran[name][0])
    assert begun[:3] == ["quieter", "quiet", "both"] and set(begun[3:5]) == {"long", "short 2"}
    assert set(begun[5:]) == {"short 0", "short 1"}

    def together(a: str, b: str) -> bool:
        return ran[a][0] < ran[b][1] and ran[b][0] < ran[a][1]

    for name in ("quiet", "quieter", "both"):
        assert not any(together(name, other) for other in ran if other != name), name
    assert together("long", "short 2")
    assert made("both")["gpus"] == ["3", "5"]
    for i, name in enumerate(ran):
        for other in list(ran)[:i]:
            assert not together(name, other) or not set(made(name)["gpus"]) & set(made(other)["gpus"]), (name, other)


def test_no_job_begins_that_has_no_time(run: Run, tmp_path: Path) -> None:
    jobs = [fake("long", says=40), fake("quiet", says=31, quiet=True), fake("short", says=20)]
    status, said = run(jobs, "--seconds", "30")
    assert status == 0 and files(tmp_path) == ["short.json"]
    assert "long: skipped: no time: it takes 40 s, 30 are left" in said
    assert said.rstrip().endswith("1 made, 0 failed, 2 skipped")


@pytest.mark.parametrize("word", ["parent", "stubborn"])
def test_a_job_that_takes_too_long_is_ended_with_all_of_its_processes(
    word: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "GRACE", 0.5)
    monkeypatch.setattr(running, "PATIENCE", 1.0)
    begun = time.monotonic()
    status, said = run([fake("slow", word, says=5.0), fake("next", says=4.5)])
    assert status == 1 and time.monotonic() - begun < 30 and files(tmp_path) == ["next.json"]
    assert "slow: failed in " in said and "ended: it took more than 5 s" in said
    assert not alive(child_of(tmp_path / "here" / "logs" / "slow.log"))


def test_all_are_ended_when_the_time_is_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no job has taken several times what it says."""
    begun = time.monotonic()
    jobs = [fake("slow", "parent", says=2.9), fake("other", "parent", says=2.8), fake("next", says=2.7)]
    status, said = run(jobs, "--seconds", "3", "--gpus", "0,1")
    assert status == 1 and time.monotonic() - begun < 3 + running.GRACE + 3
    assert said.count("ended: the time is up") == 4, "each twice: when it was ended, and at the end"
    assert "next: skipped: no time" in said and files(tmp_path) == []
    for name in ("slow", "other"):
        assert not alive(child_of(tmp_path / "here" / "logs" / f"{name}.log"))


def test_nothing_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    out.mkdir()
    logs.mkdir()

    def say(text: str) -> None:
        if text.startswith("next: "):
            while "child" not in (logs / "slow.log").read_text():
                time.sleep(0.05)
            raise KeyboardInterrupt

    settings = running.Settings(out, logs, "kept", COMMIT, ("0", "1"))
    with pytest.raises(KeyboardInterrupt):
        running.run([fake("slow", "parent", says=20.0), fake("next")], settings, say)
    assert not alive(child_of(logs / "slow.log"))


def test_nothing_goes_on_after_a_second_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job that does not hear SIGTERM is waited for."""
    logs, sleep, interrupts = tmp_path / "logs", time.sleep, [KeyboardInterrupt(), KeyboardInterrupt()]
    logs.mkdir()

    def interrupted(seconds: float) -> None:
        if interrupts and "child" in (logs / "slow.log").read_text():
            raise interrupts.pop()
        sleep(seconds)

    settings = running.Settings(tmp_path, logs, "kept", COMMIT)
    monkeypatch.setattr(running.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.run([fake("slow", "stubborn", says=20.0)], settings, lambda text: None)
    assert not alive(child_of(logs / "slow.log"))
    assert not interrupts


def test_a_job_whose_files_cannot_be_written_leaves_the_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / "here" / "made" / "first.json").mkdir(parents=True)
    (tmp_path / "here" / "logs" / "second.log").mkdir(parents=True)
    status, said = run([fake("first", says=9.0), fake("second", says=8.0), fake("third", says=7.0)])
    assert status == 1 and files(tmp_path) == ["first.json", "third.json"]
    assert "first: failed in" in said and "its result file cannot be taken over: " in said
    assert "second: failed: it cannot be started: " in said


def child_of(log: Path) -> int:
    words = log.read_text().split()
    return int(words[words.index("child") + 1])


def alive(pid: int) -> bool:
    """Whether the process is there; one that has ended and that nobody has waited for is not."""
    time.sleep(0.2)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_that_fails_leaves_the_others_and_the_old_file(run: Run, made: Any, tmp_path: Path) -> None:
    run([fake("wrong")])
    old = made("wrong")
    names = ("wrong", "silent", "cut", "foreign")
    status, said = run([*(fake(name, name) for name in names), fake("good")])
    assert status == 1 and files(tmp_path) == ["good.json", "wrong.json"] and made("wrong") == old
    logs = tmp_path / "here" / "logs"
    said = re.sub(r" in \d+ s:", " in N s:", said)  # a machine that has much to do starts them slowly
    assert f"wrong: failed in N s: exit status 3, see {logs / 'wrong.log'}\n" in said
    assert "\n    wrong begins\n    a figure\n    ValueError: oh no\n" in said
    assert "silent: failed in N s: it wrote no result file: FileNotFoundError" in said
    assert "cut: failed in N s: it wrote no result file: JSONDecodeError" in said
    assert f"foreign: failed in N s: its result file is of commit of another day, not of {COMMIT}" in said
    assert json.loads((logs / "wrong.json.part").read_text())["ran"], "what it has found can be looked at"
    lines = said.rstrip().splitlines()
    assert lines[-1] == "1 made, 4 failed, 0 skipped" and lines[-6].split()[:2] == ["good", "made"]
    assert all(line.split()[1] == "failed" for line in lines[-5:-1])


def test_what_a_file_leaves_out_is_said(run: Run) -> None:
    assert re.search(r"some: made in \d+ s: left out: sdxl, t5", run([fake("some", rest="sdxl t5")])[1])
    rows = {"causal 1": {"ratio": 1.0}, "causal 2": {"left_out": "no time"}}
    assert running.left_out_of({"rows": rows, "left_out": {"bert": "no time"}}) == ["bert", "causal 2"]
    assert running.left_out_of({"rows": [{"model": "x"}], "left_out": []}) == []


def test_it_goes_on_with_what_is_missing(run: Run, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [fake("one"), fake("two"), fake("three")]
    run(jobs, "--only", "one,two")
    before = made("one"), made("two")
    said = run(jobs, "--missing", "--list")[1]
    assert "three" in said and "two" not in said and "1 jobs" in said
    status, said = run(jobs, "--missing")
    assert status == 0 and (made("one"), made("two")) == before and made("three")
    assert said.rstrip().endswith("1 made, 0 failed, 2 skipped") and said.count("its file is of this commit") == 2
    monkeypatch.setenv("FASTATTN_COMMIT", "1" * 40)
    assert run(jobs, "--missing", "--skip", "t*")[1].rstrip().endswith("1 made, 0 failed, 0 skipped")
    assert made("one")["environment"]["commit"] == "1" * 40


def test_what_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    jobs = [
        fake("peer", needs=("torch", "no-such-package")),
        fake("mlx", rest="PYTHON"),
        fake("pair", gpus=2),
        fake("torch", needs=("torch",)),
    ]
    status, said = run(jobs)
    assert status == 0 and files(tmp_path) == ["torch.json"]
    assert "peer: skipped: no-such-package: not installed" in said
    assert "mlx: skipped: needs an environment with mlx and mlx-lm: --mlx-python PYTHON" in said
    assert "pair: skipped: needs 2 GPUs, --gpus names 1" in said
    assert run(jobs, "--only", "mlx", "--mlx-python", "/mlx/bin/python")[0] == 0
    assert "left_out" in (tmp_path / "here" / "made" / "mlx.json").read_text()


def test_the_table_is_printed(run: Run, tmp_path: Path) -> None:
    jobs = [fake("short", says=5), fake("long", says=15, recorded=True), fake("quiet", says=7, quiet=True)]
    status, said = run(jobs, "--list", "--gpus", "0,1")
    lines = said.rstrip().splitlines()
    assert status == 0 and not (tmp_path / "here").exists()
    assert [line.split()[:2] for line in lines[1:4]] == [["quiet", "~7"], ["long", "15"], ["short", "~5"]]
    assert lines[1].endswith(f"python {FAKE} good 0.1") and lines[-1].startswith("3 jobs, about 17 s on 2 GPUs")


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--seconds", "0"], "--seconds: expected a number of seconds over 0"),
        (["--seconds", "nan"], "--seconds: expected a number of seconds over 0"),
        (["--gpus", "0,0"], "--gpus: expected each GPU once"),
        (["--only", "none"], "--only: expected names of jobs"),
    ],
)
def test_bad_arguments(argv: list[str], text: str, run: Run) -> None:
    with pytest.raises(ValueError, match=text):
        run([fake("one")], *argv)


def test_the_folder_of_a_gpu() -> None:
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", None: None}
    assert {name: figures.folder_of(name) for name in names} == names
    assert figures.folder_of("NVIDIA GeForce RTX 4090") == "4090" and figures.folder_of("Quadro") is None


def test_without_a_gpu_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ask", lambda *command: None)
    with pytest.raises(ValueError, match="--out: expected a folder, nvidia-smi finds no GPU"):
        figures.main([], [fake("one")])


def test_a_tree_with_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for what this command has written itself."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.delenv("FASTATTN_COMMIT", raising=False)
    with pytest.raises(ValueError, match="expected a git checkout, or its commit in FASTATTN_COMMIT"):
        figures.commit_here(dirty=False)
    kept = tmp_path / "benchmarks" / "results" / "h200" / "users.json"
    kept.parent.mkdir(parents=True)
    for path in (kept, tmp_path / "code.py"):
        path.write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = figures.commit_here(dirty=False)
    assert len(commit) == 40
    kept.write_text("new")
    (tmp_path / "beside.txt").write_text("not tracked")
    assert figures.commit_here(dirty=False) == commit
    (tmp_path / "code.py").write_text("new")
    with pytest.raises(ValueError, match=r"expected a tree without changes \(code.py\): .* --dirty"):
        figures.commit_here(dirty=False)
    assert figures.commit_here(dirty=True) == f"{commit}-dirty"
    monkeypatch.setenv("FASTATTN_COMMIT", "abc-dirty")
    with pytest.raises(ValueError, match="expected a tree without changes: "):
        figures.commit_here(dirty=False)


def test_a_real_command_end_to_end(run: Run, made: Any) -> None:
    job = Job("decode", "fastattn sweep users 'causal 64' --quick --check --device cpu", 60.0)
    status, said = run([job])
    assert status == 0, said
    found = made("decode")
    assert found["command"] == job.typed("benchmarks/results/h200") and found["benchmark"] == "sweep users"
    assert found["environment"]["commit"] == COMMIT and found["complete"]


def test_states() -> None:
    found = [running.Outcome(fake("b"), state, "why\nmore") for state in (SKIPPED, FAILED, MADE)]
    assert figures.summary(found).splitlines() == [
        "b  made     -  why", "b  failed   -  why", "b  skipped  -  why", "1 made, 1 failed, 1 skipped"
    ]  # fmt: skip
