"""The grid of test_grid.py runs in processes of its own: they start first, so that the other tests hide them."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_finish(session: pytest.Session) -> None:
    grids = [
        item for item in session.items if getattr(item, "module", None) and item.module.__name__.endswith("test_grid")
    ]
    alone = "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly
    if grids and alone and torch.cuda.is_available():
        grids[0].start()  # type: ignore[attr-defined]
