"""Ours over torch's, from the rows of `benchmarks.host`, with the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .host_cases import OURS

TARGETS = {"forward": 1.0, "forward and backward": 1.15, "wall time": 1.05}


def ratios(rows: Sequence[dict[str, Any]], wall: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each case, mode and function of ours. Against torch's cuDNN call where there is one, else the best of
    torch's; wall time always against the best."""
    found: list[dict[str, Any]] = []
    keys = dict.fromkeys((row["case"], row["what"], row["mode"]) for row in rows if row["case"] != "floor")
    for case, what, mode in keys:
        us = {x["implementation"]: x["us"] for x in rows if (x["case"], x["what"], x["mode"]) == (case, what, mode)
              and "us" in x}  # fmt: skip
        found += _against(us, {"case": case, "what": what, "mode": mode}, TARGETS[what], "torch-cudnn")
    for case in dict.fromkeys(row["case"] for row in wall):
        us = {x["implementation"]: x["us"] for x in wall if x["case"] == case and "us" in x}
        found += _against(us, {"case": case, "what": "wall time", "mode": "grad"}, TARGETS["wall time"])
    return found


def _against(
    us: dict[str, float], head: dict[str, Any], target: float, preferred: str | None = None
) -> Iterator[dict[str, Any]]:
    torchs = {who: time for who, time in us.items() if who == "torch" or who.startswith("torch-")}
    if not torchs:
        return
    peer = preferred if preferred in torchs else min(torchs, key=lambda who: torchs[who])
    for who in OURS:
        if who in us:
            ratio = round(us[who] / torchs[peer], 3)
            yield {
                **head, "implementation": who, "us": us[who], "torch": peer, "torch_us": torchs[peer],
                "ratio": ratio, "target": target, "meets": ratio <= target,
            }  # fmt: skip


def line_of_ratio(row: dict[str, Any]) -> str:
    """One as text."""
    head = f"{row['case']:<35} {row['what']:<21} {row['mode']:<10} {row['implementation']:<9}"
    sign = "<=" if row["meets"] else "> "
    return (
        f"{head} {row['us']:8.1f} / {row['torch_us']:8.1f} ({row['torch']}) = {row['ratio']:.3f} {sign} {row['target']}"
    )
