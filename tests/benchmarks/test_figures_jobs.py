"""The table of `benchmarks.figures`: every file that is kept of an H200 is in it, with a command that there is."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.figures.jobs import JOBS, PROGRAMS, SUPERSEDED, Job, chosen, ordered
from fastattn.cli import main as cli

KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "h200"
CHOICES = {"tune-chunks", "hopper_backward_tune"}  #: constants in the code are chosen by them
NAMES = [job.name for job in JOBS]


def test_every_kept_file_has_its_job() -> None:
    assert len(set(NAMES)) == len(NAMES)
    kept = {path.stem for path in KEPT.glob("*.json")}
    assert kept - CHOICES - set(SUPERSEDED) <= set(NAMES) and set(SUPERSEDED) <= kept - set(NAMES)
    assert not CHOICES & set(NAMES)


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_calls_wait_for_their_kernels_where_they_did(path: Path) -> None:
    if path.stem in CHOICES or path.stem in SUPERSEDED:
        return
    found = json.loads(path.read_text())
    (job,) = [job for job in JOBS if job.name == path.stem]
    assert dict(job.environment).get("FASTATTN_COMPILE") == found["environment"]["switches"].get("FASTATTN_COMPILE")


@pytest.mark.parametrize("job", JOBS, ids=NAMES)
def test_commands_are_understood(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come as far as the file, whose folder is not there: all arguments before it are right."""
    monkeypatch.setenv("RANK", "0")  # of those that run under torchrun
    monkeypatch.setenv("LOCAL_RANK", "0")
    argv = job.argv(str(tmp_path / "no folder" / "x.json"), sys.executable)
    program = shlex.split(job.command)[0]
    rest = argv[len(PROGRAMS[program]) :]
    if program == "torchrun":
        assert rest[0].startswith("--nproc-per-node") and rest[:2].count("2") + rest[0].count("=2") == 1 == job.gpus - 1
    module = rest[rest.index("-m") + 1] if program != "fastattn" else "fastattn"
    rest = rest[rest.index("-m") + 2 :] if program != "fastattn" else rest
    if module == "fastattn":
        rest = [word for word in rest if word != "--tp"]  # starts a group of processes
        device = ["--device", "cpu"]
        assert cli.main([*rest, *device]) == 2
        said = capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="there is no directory") as error:
            importlib.import_module(module).main(rest)
        said = str(error.value)
    assert f"cannot be written, there is no directory {tmp_path / 'no folder'}" in said


def test_what_is_typed_and_what_is_started() -> None:
    job = Job("mine", "python -m benchmarks.mlx_model -p 8 --python PYTHON", 1.0)
    assert job.elsewhere and not Job("other", "fastattn sweep 'causal 1'", 1.0).elsewhere
    assert job.typed("kept/h200") == "python -m benchmarks.mlx_model -p 8 --python PYTHON --json kept/h200/mine.json"
    given = job.argv("/tmp/x", "/mlx/python")
    assert given[0] == sys.executable and given[-4:] == ["--python", "/mlx/python", "--json", "/tmp/x"]
    assert Job("x", "fastattn sweep 'causal 1'", 1.0).argv("f", None)[1:] == [
        *("-m", "fastattn", "sweep", "causal 1", "--json", "f")
    ]
    with pytest.raises(ValueError, match=r"bad: expected a command of fastattn, python, torchrun, got 'rm -r x'"):
        Job("bad", "rm -r x", 1.0)


def test_some_are_chosen_and_ordered() -> None:
    found = chosen(JOBS, ("dropin*", "host"), ("dropin-resolutions", "dropin-d*"))
    names = {job.name for job in found}
    assert {"host", "dropin", "dropin-more"} <= names and not {
        "users",
        "dropin-resolutions",
        "dropin-diffusers",
    } & names
    for only, skip in ((("nothing",), ()), ((), ("nothing",))):
        with pytest.raises(ValueError, match=r"--(only|skip): expected names of jobs .* got 'nothing'"):
            chosen(JOBS, only, skip)
    order = ordered(JOBS)
    quiet = [job.quiet for job in order]
    assert quiet == sorted(quiet, reverse=True) and order[0].name == "users"
    rest = [job for job in order if not job.quiet]
    assert [job.gpus for job in rest] == sorted((job.gpus for job in rest), reverse=True)
    single = [job.seconds for job in rest if job.gpus == 1]
    assert single == sorted(single, reverse=True)
