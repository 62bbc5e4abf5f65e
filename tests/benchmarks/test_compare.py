"""What moved between two result files, and what is noise."""

import json
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Figure

RESULTS = Path(compare.__file__).parent / "results"
ENVIRONMENT = {"gpu": "g", "commit": "a"}


def users(us, low, high, eager=50.0):
    eager = {"us": eager, "min_us": eager - 9, "max_us": eager + 9, "quarters_us": [eager - 1, eager + 1]}
    entry = {"us": us, "min_us": 0.1, "max_us": 1e6, "quarters_us": [low, high], "eager": eager, "first_ms": 7.0}
    return result("sweep users", rows={"row": {"who": "x", "contenders": {"fastattn": entry}, "ratio": 1.0}})


def result(benchmark, **content):
    return {"benchmark": benchmark, "environment": ENVIRONMENT, **content}


def moved(old, new, least=compare.LEAST):
    return [name for name, *_ in compare.compare(old, new, least).moved]


def test_only_what_is_out_of_the_noise_moved():
    old = users(100.0, 98.0, 102.0)
    assert moved(old, users(110.0, 108.0, 112.0)) == ["row, fastattn"]
    assert moved(old, users(110.0, 101.0, 119.0)) == []  # the quartiles meet
    assert moved(old, users(100.0, 98.0, 102.0, eager=60.0)) == ["row, fastattn, eager"]


def test_a_small_change_is_none_however_quiet_the_trials():
    old, new = users(100.0, 99.9, 100.1), users(101.5, 101.4, 101.6)
    assert moved(old, new) == [] and moved(old, new, 0.01) == ["row, fastattn"]


def test_which_direction_is_worse():
    found = compare.compare(users(100.0, 98.0, 102.0), users(150.0, 148.0, 152.0, eager=30.0))
    assert [name for name, *_ in found.moved] == ["row, fastattn, eager", "row, fastattn"]  # the largest first
    assert found.worse == 1
    assert "1 worse, 1 better, 0 the same" in compare.text_of(found)
    rate = Figure.of([10.0, 11.0], True), Figure.of([20.0, 21.0], True)
    assert not compare.is_worse(*rate) and compare.is_worse(*reversed(rate))


def model(*tps):
    trials = [{"prompt_tps": x, "peak_memory": 5.0, "total_time": 3.0} for x in tps]
    return result("model", implementations={"fastattn": {"trials": trials}})


def test_models_are_compared_by_their_trials():
    assert moved(model(100.0, 110.0), model(120.0, 130.0)) == ["fastattn, prompt_tps"]
    assert moved(model(100.0, 125.0), model(120.0, 130.0)) == []
    names = dict(compare.figures(model(1.0, 2.0)))
    assert set(names) == {"fastattn, prompt_tps", "fastattn, peak_memory"}
    assert names["fastattn, prompt_tps"] == Figure(1.5, 1.0, 2.0, True)


def test_training_is_compared_by_its_steps():
    steps = [{"tokens_per_second": x, "loss": 1.0, "length": 5} for x in (1.0, 2.0, 3.0, 4.0, 5.0)]
    found = dict(compare.figures(result("train", implementations={"fastattn": {"steps": steps}})))
    assert found == {"fastattn, tokens_per_second": Figure(3.0, 2.0, 4.0, True)}


def forward(hot, quarters=None):
    row = {"times": {"hopper": {"hot": hot, "host": 5.0}}, "checks": {"hopper": {"error": 1e-3, "first": 1.0}}}
    return result("forward", rows={"causal 128": row | ({} if quarters is None else {"quarters": quarters})})


def test_forward_files_with_and_without_quartiles():
    quiet = {"hopper": {"hot": [9.9, 10.1], "host": [4.0, 6.0]}}
    loud = {"hopper": {"hot": [5.0, 15.0], "host": [4.0, 6.0]}}
    assert moved(forward(10.0, quiet), forward(12.0, {"hopper": {"hot": [11.9, 12.1], "host": [4.0, 6.0]}})) == [
        "causal 128, hopper, hot"
    ]
    assert moved(forward(10.0, loud), forward(12.0, quiet)) == []
    found = compare.compare(forward(10.0), forward(12.0))
    assert len(found.moved) == 1 and found.without_trials == 4
    assert "4 figures have no trials" in compare.text_of(found)


def test_other_sweeps_by_the_range_of_their_rounds():
    def sweep(us):
        entry = {"us": us, "min_us": us - 1, "max_us": us + 1, "method": "graph"}
        row = {"label": "l", "implementations": {"torch-flash": entry}, "case": {"us": 5}}
        return result("sweep op", sections={"prefill": [row]})

    assert moved(sweep(10.0), sweep(13.0)) == ["prefill: l, torch-flash"] and moved(sweep(10.0), sweep(11.5)) == []


def test_what_one_file_alone_has():
    found = compare.compare(users(1.0, 1.0, 1.0), result("sweep users", rows={}))
    assert found.only_old == ["row, fastattn", "row, fastattn, eager"] and found.only_new == []
    assert "only in OLD: row, fastattn; row, fastattn, eager" in compare.text_of(found)


def test_every_file_that_is_kept_is_like_itself():
    for path in sorted(RESULTS.glob("*/*.json")):
        data = json.loads(path.read_text())
        found = compare.compare(data, data)
        assert not found.moved and not found.only_old and not found.only_new, path
    data = json.loads((RESULTS / "h200" / "forward.json").read_text())
    assert len(dict(compare.figures(data))) > 400


def test_the_command(tmp_path, capsys):
    for name, data in (("old", users(100.0, 98.0, 102.0)), ("new", users(200.0, 198.0, 202.0))):
        (tmp_path / name).write_text(json.dumps(data | {"environment": {"gpu": "g", "commit": name}}))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "commit: old -> new"
    assert printed[3].split() == ["row,", "fastattn", "100", "(98..102)", "200", "(198..202)", "2.00x", "worse"]
    assert printed[-1] == "1 worse, 0 better, 1 the same"


def test_two_kinds_of_files_are_not_compared():
    with pytest.raises(ValueError, match=r"NEW\.json: expected a file of 'model'"):
        compare.compare(model(1.0), users(1.0, 1.0, 1.0))


def test_the_command_says_what_is_wrong(tmp_path):
    """In words of its own: a file of another kind is no damaged file, and no change is more than NaN."""
    paths = [str(tmp_path / name) for name in ("users", "model", "none")]
    none = {"benchmark": "sweep users", "environment": []}
    for path, data in zip(paths, (users(1.0, 1.0, 1.0), model(1.0), none), strict=True):
        with open(path, "w") as file:
            json.dump(data, file)
    with pytest.raises(ValueError, match=r"^NEW\.json: expected a file of 'sweep users' as OLD\.json, got 'model'"):
        compare.main(paths[:2])
    with pytest.raises(ValueError, match=r'none: expected an object as "environment", got list$'):
        compare.main([paths[0], paths[2]])
    for least in ("nan", "-1", "inf"):
        with pytest.raises(ValueError, match=r"^--least: expected a number of 0 or more"):
            compare.main([paths[0], paths[0], "--least", least])
