"""docs/support.md says what our table says, and what cuDNN answered."""

from __future__ import annotations

import difflib
import importlib.util

import pytest
import stand_in
from support_page import GPUS, PAGE, answers, ours, page, without_answers

from fastattn.backends.cudnn.runtime import version_text

REMEDY = "docs/support.md is out of date: python tests/gpuless/support_page.py writes it anew"


def assert_same(found: str, expected: str) -> None:
    changes = difflib.unified_diff(
        found.splitlines(), expected.splitlines(), "docs/support.md", "expected", n=0, lineterm=""
    )
    assert found == expected, "\n".join([REMEDY, *list(changes)[:40]])


def test_the_page_says_what_our_table_says() -> None:
    """Without cuDNN: all but its answers."""
    assert_same(without_answers(PAGE.read_text()), without_answers(page(ours(), answered=False)))


@pytest.mark.skipif(stand_in.library() is None, reason="no cuDNN library here: make gpuless brings one")
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="no cuDNN frontend here")
def test_the_page_says_what_cudnn_answers() -> None:
    text, rows = PAGE.read_text(), {gpu: answers(gpu) for gpu in GPUS}
    version = version_text(rows["9.0"][0]["version"])
    if f"Which calls does cuDNN {version} serve" not in text:
        pytest.skip(f"the page is for another cuDNN than {version}, which is here")
    assert_same(text, page(rows, answered=True))


def test_a_page_that_is_out_of_date_is_noticed() -> None:
    text = PAGE.read_text()
    assert "| both" in text
    with pytest.raises(AssertionError, match="out of date"):
        assert_same(without_answers(text).replace("| both", "| forward", 1), without_answers(text))
