"""Warnings that are given once a process."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from ..dispatch import FastattnWarning


def warn_once(text: str) -> None:
    """Warns with this text unless it was given before. Silent while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _warn(text)


@cache
def _warn(text: str) -> None:
    warnings.warn(text, FastattnWarning, stacklevel=4)
