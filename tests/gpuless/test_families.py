"""cuDNN and our table of what it supports agree, for GPUs that are not here."""

from __future__ import annotations

import pytest
import stand_in
from support_page import GPUS, answers, too_strict, too_weak

pytest.importorskip("cudnn")
pytestmark = pytest.mark.skipif(stand_in.library() is None, reason="no cuDNN library here: make gpuless brings one")


@pytest.mark.parametrize("gpu", GPUS)
def test_cudnn_serves_what_the_table_lets_through_and_nothing_else(gpu: str) -> None:
    rows = answers(gpu)
    assert rows[0]["version"] >= 91900
    assert len(rows) > 2000
    wrong = too_weak(rows)
    assert not wrong, f"{len(wrong)} calls pass our table and not cuDNN:\n" + "\n".join(map(str, wrong[:10]))
    strict = too_strict(rows)
    assert not strict, f"{len(strict)} calls pass cuDNN and not our table:\n" + "\n".join(map(str, strict[:10]))
    assert sum(not row["ours"] for row in rows) > 1000
