"""Caches of a test's own, in place of the process's."""

from __future__ import annotations

import pytest

from fastattn.dispatch import fast_path, refusals, routes
from fastattn.shape_cache import Reason, shape_cache


def own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, calls find no route, no refusal and no cached call of other tests, and leave none."""
    dropped_for = [Reason.BACKEND_REFUSED]
    monkeypatch.setattr(routes, "_routes", shape_cache.section("test", 1 << 10, dropped_for=dropped_for))
    monkeypatch.setattr(fast_path, "_cached", shape_cache.section("test", 1 << 10, dropped_for=dropped_for))
    monkeypatch.setattr(refusals, "_refusals", shape_cache.section("test", 1 << 10))
