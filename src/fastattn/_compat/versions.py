"""Which versions of other libraries were tested, and what is said when a name of theirs is gone."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: By name in the registry: the oldest version that is supported, and the newest one that the tests, on a GPU or
#: without, have passed on. A newer one may work as well.
TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "nvidia-cudnn-frontend": ("1.28", "1.32"),
    "transformers": ("5.4", "5.24"),
    "liger-kernel": ("0.8.5", "0.8.5"),
    "peft": ("0.19", "0.21"),
}

#: Versions of Triton that may compile our own kernels without anybody looking: a compiler with a defect gives wrong
#: numbers, not an error. Under each of these all kinds of kernels were compiled and their machine code was read.
COMPILERS = ("3.6", "3.7", "3.8", "3.9")


class Gone(ImportError):
    """A name of another library is not there in the version that is installed."""


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.28.0rc1" -> (1, 28, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def newer_than_tested(name: str, installed: str) -> str:
    """The newest version tested, where the installed one is newer; else ""."""
    newest = TESTED[name][1] if name in TESTED else ""
    found, known = numbers(installed), numbers(newest)
    return newest if known and found[: len(known)] > known else ""


def untested_compiler(installed: str) -> str:
    """Why a version of Triton is not to compile our own kernels, "" where it is one of `COMPILERS`."""
    found = numbers(installed)
    if any(found[: len(known)] == known for known in map(numbers, COMPILERS)):
        return ""
    return f"Triton {installed} was not tested ({COMPILERS[0]} to {COMPILERS[-1]} were)"


def need(package: str, name: str) -> Any:
    """A name of another library, "module.of.it.name". Raises Gone, which says which versions have it."""
    home, _, last = name.rpartition(".")
    try:
        return getattr(import_module(home), last)
    except (ImportError, AttributeError) as error:
        raise Gone(gone(package, name)) from error


def gone(package: str, name: str) -> str:
    """A sentence: what is missing, which versions have it, what to do."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed: fastattn needs it for {name}"
    oldest, newest = TESTED[package]
    if not newer_than_tested(package, installed) and numbers(installed) >= numbers(oldest):
        return f"{package} {installed} has no {name}; {newest} has: pip install -U '{package}<{_next(newest)}'"
    return (
        f"{package} {installed} has no {name}: fastattn was tested with {oldest} to {newest}: "
        f"pip install '{package}>={oldest},<{_next(newest)}'"
    )


def _next(newest: str) -> str:
    """The first version that is newer than all those called "2.13"."""
    *head, last = numbers(newest)
    return ".".join(map(str, (*head, last + 1)))
