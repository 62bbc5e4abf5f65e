"""Result files: JSON with the environment that a figure was measured in, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..common import machine
from . import output

#: The environment variable that names the commit where the source is no git checkout: a copy on another machine.
COMMIT = "FASTATTN_COMMIT"
#: The environment variable that holds the command which result files name, where a program starts the command with
#: other paths than a person would type: into a folder of its own, say.
COMMAND = "FASTATTN_COMMAND"


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code that was run: GPU, driver and versions. None for what is not there."""
    from .. import __version__

    cudnn = guarded(torch.backends.cudnn.version)
    found: dict[str, Any] = {
        "gpu": None,
        "compute_capability": None,
        "gpu_memory": None,
        "driver": None,
        "cpu": machine.cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": machine.cudnn_text(cudnn) if cudnn else None,
        "cudnn_frontend": machine.version_of("nvidia-cudnn-frontend"),
        "triton": machine.version_of("triton"),
        "transformers": machine.version_of("transformers"),
        "liger_kernel": machine.version_of("liger-kernel"),
        "fastattn": __version__,
        "commit": os.environ.get(COMMIT) or machine.commit(),
        "switches": {name: value for name, value in machine.switches().items() if name not in (COMMIT, COMMAND)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_memory"] = properties.total_memory
        found["driver"] = machine.driver_version()
    return found


def header(benchmark: str, command: str, device: torch.device) -> dict[str, Any]:
    """What every file of figures begins with: what was run, when (UTC, ISO 8601) and where. command: as it was typed;
    FASTATTN_COMMAND, where it is set, is what is named instead."""
    command = os.environ.get(COMMAND) or command
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": now, "command": command, "environment": environment(device)}


def write_json(path: str | Path, data: Any) -> None:
    """Writes data as JSON: see `output.write`."""
    output.write(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def guarded(probe: Callable[[], Any]) -> Any:
    """What the probe returns, or None where it fails: a broken driver must not cost a finished measurement."""
    try:
        return probe()
    except Exception:
        return None


def child(module: str, *arguments: str, seconds: float, env: dict[str, str] | None = None) -> Any:
    """What `python -m MODULE ARGUMENTS` prints last, JSON, in a process of its own.

    Raises RuntimeError with the last line of its stderr when it fails, subprocess.TimeoutExpired after so many seconds.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])
