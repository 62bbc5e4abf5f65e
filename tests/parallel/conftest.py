from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from ranks import Ranks

if not dist.is_available() or not dist.is_gloo_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.stop()
