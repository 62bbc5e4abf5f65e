"""The command that runs whole models on the drop-in beside torch's function: tiny models, on a CPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fastattn
from benchmarks import drop_in, drop_in_runs
from benchmarks.drop_in_runs import Plan
from fastattn.integrations.torch import decide

CPU = torch.device("cpu")
THERE = [name for name, kind in drop_in.MODELS.items() if kind.library is None or find_spec(kind.library)]
SHORT = Plan(rounds=2, seconds=0.0)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


@pytest.mark.parametrize("name", THERE)
def test_a_model(name: str) -> None:
    """Each is served by fastattn where that is insisted on, in a forward and in a step, and errs as torch does."""
    with fastattn.use_backend("reference"):
        rows = drop_in.measured(name, CPU, tiny=True, plan=SHORT)
    assert [row["what"] for row in rows] == ["forward", "training step"]
    for row in rows:
        assert "error" not in row and row["right"], row
        assert row["torch_ms"] > 0 and row["fastattn_ms"] > 0
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        calls = sum(row["torch_kernels"].values())
        assert calls > 0 and not row["handed_to_torch"]
        assert row["calls"]["reference"] == calls
        assert row["calls"].get("reference.backward", 0) == (calls if row["what"] == "training step" else 0)
        assert len(drop_in.lines_of(row)) == 1 + ("fresh" in row)
    if name in ("resolutions", "tabpfn"):
        assert all(row["fresh"]["sizes"] == 3 == len(row["fresh"]["times"]["fastattn"]["firsts_ms"]) for row in rows)


def test_the_sizes_of_a_changing_model_come_once() -> None:
    for name in ("resolutions", "tabpfn"):
        for tiny in (False, True):
            with torch.device("meta"):
                made = drop_in.MODELS[name].make(tiny)
            shapes = [
                tuple(tuple(x.shape) for x in own.values() if x is not None) for own in (made.inputs, *made.fresh)
            ]
            assert len(set(shapes)) == len(shapes) >= (4 if tiny else 21)


@pytest.mark.parametrize("name", THERE)
def test_the_real_sizes_can_be_made(name: str) -> None:
    """On the meta device, which shows that the shapes fit, and that no model is larger than a GPU."""
    with torch.device("meta"):
        made = drop_in.MODELS[name].make(False)
        parameters = sum(x.numel() for x in made.model.parameters())
        assert 1e6 < parameters < 4e9
        if drop_in.MODELS[name].library is None:
            assert made.call(made.model, made.inputs).is_meta


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fastattn.drop_in.scaled_dot_product_attention

    def off(*args: Any, **options: Any) -> torch.Tensor:
        return own(*args, **options) * 1.01

    with torch.device(CPU):
        made = drop_in.MODELS["llama-fp32" if "llama-fp32" in THERE else "gpt2"].make(True)
    for training in (False, True):
        run = drop_in_runs.ready(made, torch.float32, training, CPU)
        assert drop_in_runs.errors(run)["right"]
        with monkeypatch.context() as patch:
            patch.setattr("fastattn.integrations.torch.sdpa.scaled_dot_product_attention", off)
            found = drop_in_runs.errors(run)
        assert not found["right"]
        assert all(x["torch"] < 1e-5 < 1e-4 < x["fastattn"] for x in found["errors"].values())


def test_a_step_changes_nothing() -> None:
    """Else each run would be of another model."""
    with torch.device(CPU):
        made = drop_in.MODELS["gpt2"].make(True)
    run = drop_in_runs.ready(made, torch.bfloat16, True, CPU)
    before = [x.clone() for x in made.model.parameters()]
    losses = [run().item() for _ in range(3)]
    assert len(set(losses)) == 1
    assert all(torch.equal(x, y) for x, y in zip(before, made.model.parameters()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(drop_in, "QUICK", SHORT)
    assert drop_in.main(["vit-l-224", "tabpfn", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == "drop_in" and found["tiny"] and found["environment"]["torch"] == torch.__version__
    assert [(row["model"], row["what"]) for row in found["rows"]] == [
        (model, what) for model in ("vit-l-224", "tabpfn") for what in ("forward", "training step")
    ]
    ratios = [row["ratio"] for row in found["rows"]] + [x["fresh"]["ratio"] for x in found["rows"] if "fresh" in x]
    assert len(ratios) == 6 and found["worst_ratio"] == max(ratios) and found["target"] == 1.02
    assert set(found["slower"].values()) == {x for x in ratios if x > 1.02}
    assert found["wrong"] == found["failed"] == found["bypassed"] == []
    assert f"Worst ratio: {found['worst_ratio']}" in capsys.readouterr().out


def test_what_fails_is_a_row_and_a_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(F, "gelu", broken)
    assert drop_in.main(["sdxl", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("RuntimeError: no such kernel\n") == 2 and "failed: ['sdxl, forward'" in out
    with pytest.raises(ValueError, match=r"MODEL: expected .*gpt2.*, got 'gpt3'"):
        drop_in.main(["gpt3"])


def test_torch_beside_itself_is_no_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody chose among torch's kernels, fastattn serves nothing."""

    def measured(name: str, *args: Any) -> list[dict[str, Any]]:
        row = {"model": name, "what": "forward", "ratio": 1.0, "calls": {}}
        return [row | {"handed_to_torch": {decide.CHOSEN: 2}}, row | {"what": "other", "handed_to_torch": {"else": 2}}]

    monkeypatch.setattr(drop_in, "measured", measured)
    assert drop_in.main(["gpt2", "--device", "cpu"]) == 1
    assert "fastattn passed by: ['gpt2, forward']" in capsys.readouterr().out


def test_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert drop_in.main(["gpt2", "--device", "cpu", "--budget", "-1"]) == 0
    assert "left out: no time" in capsys.readouterr().out
