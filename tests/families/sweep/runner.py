"""A process per model class, with a limit of time and memory: a crash or a hang of one ends nothing but itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

import fastattn.hf  # noqa: F401  (imported once, before the processes part)

from . import registry
from .family import sweep

MEMORY = 6 << 30  #: bytes of address space


def _child(unit: registry.Unit, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    try:
        report = sweep(unit)
    except BaseException as e:
        report = {**unit._asdict(), "result": "not done", "checks": {}, "notes": {}, "warnings": []}
        report |= {"why": f"{type(e).__name__}: {e}"[:300], "trace": traceback.format_exc()[-1500:]}
    path.write_text(json.dumps(report))


def run(unit: registry.Unit, folder: Path, limit: float) -> dict[str, Any]:
    """The report of one model class; seconds: its wall time."""
    path = folder / f"{os.getpid()}.json"
    path.unlink(missing_ok=True)
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(unit, path))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    if path.exists() and not late:
        report = json.loads(path.read_text())
        path.unlink()
    else:
        why = f"not done after {limit:.0f} s" if late else f"the process ended with status {process.exitcode}"
        report = {**unit._asdict(), "result": "not done", "why": why, "checks": {}, "notes": {}, "warnings": []}
    return {**report, "seconds": round(time.monotonic() - start, 1)}


def chosen(names: list[str]) -> list[registry.Unit]:
    """All, or those whose family or family/kind is named."""
    units = registry.units()
    return [u for u in units if u.family in names or u.name in names] if names else units


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
