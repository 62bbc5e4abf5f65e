"""What this machine and its installation are called: versions, driver, commit. None for what is not there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path


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
    """The NVIDIA driver's version, such as 580.65.06."""
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
    # A wheel unpacked below another repository must not be taken for part of it.
    if ask("git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return ask("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def switches() -> dict[str, str]:
    """The environment variables in force that change what fastattn does."""
    names = sorted(name for name in os.environ if name.startswith("FASTATTN_") or name == "TRITON_INTERPRET")
    return {name: os.environ[name] for name in names}
