"""Caches of a test's own, in place of the process's."""

from __future__ import annotations

import pytest

from fastattn.dispatch import fast_path, refusals, routes
from fastattn.integrations.torch import decide, known
from fastattn.shape_cache import shape_cache


def own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, calls find no route, no refusal and no cached call of other tests, and leave none.

    For tests whose calls are bound to what stands in for a backend; others take the fixture `fresh_caches`.
    """
    sections = (
        (routes, "_routes"), (fast_path, "_cached"), (refusals, "_refusals"), (decide, "_decisions"), (known, "_known")
    )  # fmt: skip
    for module, name in sections:
        dropped_for = getattr(module, name).dropped_for
        monkeypatch.setattr(module, name, shape_cache.section("test", 1 << 10, dropped_for=dropped_for))
