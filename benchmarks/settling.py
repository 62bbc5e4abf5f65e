"""Waits until what serves a call serves it for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastattn
from fastattn.bench.timing import synchronize, wait_for_compilers


def settle(run: Callable[[], Any], device: torch.device, calm: int = 3, most: int = 12) -> None:
    """Runs it until no kernel is compiled and no plan is built for it: `calm` times in a row, `most` in all."""
    from fastattn.backends.cudnn.plans import shared as plans

    quiet = 0
    for _ in range(most):
        before = _made()
        run()
        synchronize(device)
        wait_for_compilers(120.0)
        plans.wait(30.0)
        quiet = quiet + 1 if _made() == before else 0
        if quiet == calm:
            break


def _made() -> tuple[Any, ...]:
    from fastattn.dispatch.native import calls as native

    now = fastattn.stats()
    return now["binaries"]["binaries"], now["binaries"]["failures"], now["plans"]["plans"], native.module is None
