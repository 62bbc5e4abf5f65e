"""A part of the sweep over transformers' families; `make families` sweeps all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep import family, page, registry
from sweep.compare import difference

import fastattn.hf

HERE = Path(__file__).parent

#: Each once said something else than eager, or stands for a way of using masks that no other here has.
CHOSEN = (
    *("bert/masked", "modernbert/masked", "splinter", "longformer", "roberta/causal", "xlnet/causal"),
    *("t5", "bart/sequence to sequence", "whisper", "informer", "bigbird_pegasus", "t5gemma", "nllb-moe", "pegasus_x"),
    *("llama", "gpt2", "gpt_oss", "llama4_text", "gemma2", "gemma3_text", "gemma4_text", "deepseek_v3", "deepseek_v4"),
    *("falcon", "doge", "qwen3_next", "jamba", "opt", "bloom"),
    *("paligemma", "mllama", "git", "gemma4", "qwen2_vl", "llava", "blip", "bark"),
    *("sam", "data2vec-vision", "vit", "siglip2_vision_model", "swin", "align", "clap", "aimv2", "clip"),
    *("gemma4_audio", "granite_speech", "wav2vec2", "lasr_encoder"),
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("families") / "families.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--json", path, *CHOSEN],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())["families"]


@pytest.mark.slow
def test_chosen_families_give_what_eager_gives(reports: list[dict[str, Any]]) -> None:
    wrong = {}
    for report in reports:
        if report["result"] in page.BAD:
            bad = {name: check for name, check in report["checks"].items() if check["result"] in page.BAD}
            wrong[f"{report['family']}/{report['kind']}"] = report.get("why"), bad
    assert not wrong, json.dumps(wrong, indent=1)
    swept = [report for report in reports if report["result"] not in ("not built", "no attention")]
    assert len(swept) > len(CHOSEN) / 2, [report.get("why") for report in reports]


def test_families_are_found_in_the_auto_classes() -> None:
    units = registry.units()
    assert {"causal", "masked", "sequence to sequence", "multimodal", "base"} <= {unit.kind for unit in units}
    assert len({unit.name for unit in units}) == len(units) > 300


@pytest.mark.parametrize("fault", ["scaled", "padding is read", "the future is read"])
def test_a_faulty_attention_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastattn.hf.attention_forward

    def wrong(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if fault == "scaled":
            query = query * 1.001
        else:
            hidden = torch.full((query.shape[2], key.shape[2]), -torch.inf)
            attention_mask = hidden.triu(1 + key.shape[2] - query.shape[2])[None, None]
            attention_mask = attention_mask * 0 if fault == "the future is read" else attention_mask
            attention_mask = attention_mask.nan_to_num(0.0, neginf=-torch.inf)
        return right(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(fastattn.hf, "attention_forward", wrong)
    unit = next(unit for unit in registry.units() if unit.name == "llama/causal")
    report = family.sweep(unit)
    assert report["result"] == "differs"
    assert report["checks"]["left padded"]["result"] == "differs"
    assert report["checks"]["plain"]["result"] == ("equal" if fault == "padding is read" else "differs")


def test_a_difference_is_relative_and_a_nan_is_one() -> None:
    right = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([1.0, torch.nan])}
    assert difference(right, right) == (0.0, "")
    assert difference(right, {**right, "a": torch.tensor([100.0, 2.0])}) == (pytest.approx(0.01), "a")
    assert difference(right, {**right, "a": torch.tensor([torch.nan, 1.0])})[0] == torch.inf
    assert difference(right, {"a": right["a"]})[0] == torch.inf
