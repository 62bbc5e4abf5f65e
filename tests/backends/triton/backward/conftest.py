"""Several blocks in small shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from portable_cases import is_native

from fastattn.call import Problem


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """Several blocks of queries and keys in the shapes of these tests, and lists for every mask with rows. On a GPU the
    shapes are larger instead: see `sized`."""
    pytest.importorskip("triton")
    from fastattn.backends.triton.backward import backward, launch_config
    from fastattn.backends.triton.backward.launch_config import Tile

    monkeypatch.setattr(launch_config, "LISTED_KEYS", 48)
    if is_native(request):
        return
    choose = launch_config.choose

    def small(p: Problem) -> Any:
        listed = choose(p)
        tile = Tile(16, 16, 4, 1)
        tall = tile if p.masked_rows else Tile(16, 32, 4, 1)
        return dataclasses.replace(listed, keys=tall, queries=tile, bias=tile)

    monkeypatch.setattr(backward, "choose", small)
