"""Result files: JSON with the environment that a figure was measured in, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    import torch  # imported where it is used: `fastattn doctor` asks for versions where torch is broken


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code that was run: GPU, driver and versions. None for what is not there."""
    import torch

    from .. import __version__

    cudnn = guarded(torch.backends.cudnn.version)
    found: dict[str, Any] = {
        "gpu": None,
        "compute_capability": None,
        "gpu_memory": None,
        "driver": None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_text(cudnn) if cudnn else None,
        "cudnn_frontend": version_of("nvidia-cudnn-frontend"),
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "liger_kernel": version_of("liger-kernel"),
        "fastattn": __version__,
        "commit": commit(),
        "switches": switches(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_memory"] = properties.total_memory
        found["driver"] = driver_version()
    return found


def header(benchmark: str, command: str, device: torch.device) -> dict[str, Any]:
    """What every file of figures begins with: what was run, when and where."""
    return {"benchmark": benchmark, "date": now(), "command": command, "environment": environment(device)}


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: str | Path, data: Any) -> None:
    """Writes data as JSON: see `output.write`."""
    output.write(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def guarded(probe: Callable[[], Any]) -> Any:
    """What the probe returns, or None where it fails: a broken driver must not cost a finished measurement."""
    try:
        return probe()
    except Exception:
        return None


def version_of(package: str) -> str | None:
    """The installed version of a package, by its name on PyPI, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cudnn_text(version: int) -> str:
    """cuDNN's number as people write it: 91900 -> 9.19.0 (9.0 and later; before that 8905 -> 8.9.5)."""
    major = 10000 if version >= 90000 else 1000
    return f"{version // major}.{version % major // 100}.{version % 100}"


def driver_version() -> str | None:
    """The NVIDIA driver's version, such as 580.65.06, or None."""
    return ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def cpu_name() -> str:
    """The CPU's model name as Linux gives it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """The git commit of this package's source, "-dirty" with changes on top; None when it was installed as a wheel."""
    here = Path(__file__).parent
    # A wheel unpacked below somebody's own repository must not be taken for part of it.
    if ask("git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return ask("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def switches() -> dict[str, str]:
    """The environment variables in force that change what fastattn does."""
    names = sorted(name for name in os.environ if name.startswith("FASTATTN_") or name == "TRITON_INTERPRET")
    return {name: os.environ[name] for name in names}


def ask(*command: str) -> str | None:
    """The first line that a command prints, or None when it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def child(module: str, *arguments: str, seconds: float, env: dict[str, str] | None = None) -> Any:
    """What `python -m MODULE ARGUMENTS` prints last, JSON, in a process of its own.

    Raises RuntimeError with what it said last when it fails, subprocess.TimeoutExpired after so many seconds.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])
