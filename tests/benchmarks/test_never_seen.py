"""The command that calls shapes never seen before, and times first calls over a warm disk."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from benchmarks import never_seen, never_seen_calls
from benchmarks.never_seen_calls import BY_NAME, FULL, TINY, TRAINED, arguments, drawn, features_of
from benchmarks.warm_process import _SIZES, KINDS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("never_seen") / "never_seen.json"
    assert never_seen.main(["--device", "cpu", "--seed", "3", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["benchmark"] == "never_seen"
    return found


def test_figures(made: dict[str, Any]) -> None:
    calls = made["calls"]
    assert calls["count"] == TINY.count == sum(row["count"] for row in calls["features"])
    assert [row["feature"] for row in calls["features"]] == list(features_of(TINY))
    assert calls["steps"] == TINY.steps == sum(row["count"] for row in calls["training"])
    assert [row["feature"] for row in calls["training"]] == list(features_of(TINY, TRAINED))
    for row in calls["features"] + calls["training"]:
        assert 0 < row["median_ms"] <= row["worst_ms"] and row["served_by"]
    assert calls["builds"] == sum(row["builds"] for row in calls["features"] + calls["training"]) == 0
    assert [row["kind"] for row in made["first_call"]] == list(KINDS)
    for row in made["first_call"]:
        assert row["import_ms"] > 0 and row["call_ms"] > 0 and row["cuda_ms"] > 0
        assert row["ours_ms"] == pytest.approx(row["import_ms"] + row["call_ms"], abs=0.02)


def test_no_shape_comes_twice_and_every_feature_comes() -> None:
    assert set(features_of(FULL)) == set(never_seen_calls.FEATURES)
    rng = random.Random(1)
    every = features_of(FULL)
    shapes = [drawn(rng, FULL, every[n % len(every)]) for n in range(500)]
    assert len(set(shapes)) > 490
    for feature, batch, q_len, kv_len in shapes:
        assert 1 <= q_len <= kv_len <= FULL.longest and batch in FULL.batches and q_len * batch <= 1 << 15
        assert feature.startswith(("chunk", "decode")) or q_len == kv_len


def test_features_are_what_they_say() -> None:
    for feature in never_seen_calls.FEATURES:
        (q, k, v), options = arguments((feature, 2, 1 if "decode" in feature else 9, 12), TINY, torch.device("cpu"))
        assert q.shape[0] == 2 and k.shape == v.shape == (2, 2, 12, 16)
        assert ("kv_lengths" in options) == ("lengths" in feature)
        assert ("softcap" in options) == (feature == "softcap") and ("sinks" in options) == (feature == "sinks")


def test_a_build_while_a_caller_waits_is_a_failure(monkeypatch: pytest.MonkeyPatch, made: dict[str, Any]) -> None:
    def child(module: str, *rest: str, **options: Any) -> Any:
        if module.endswith("calls"):
            return made["calls"] | {"compiles": 1}
        return {"cuda_ms": 1.0, "import_ms": 2.0, "call_ms": 3.0, "triton_imported": False}

    monkeypatch.setattr(never_seen.results, "child", child)
    assert never_seen.main(["--device", "cpu"]) == 1


def test_the_sizes_are_the_same() -> None:
    for name, sizes in BY_NAME.items():
        heads, kv_heads, dim, dtype, length = _SIZES[name]
        assert (heads, kv_heads) == sizes.heads and (dim, dtype) == (sizes.dim, sizes.dtype)
        assert length <= sizes.longest
