import re

import pytest

from fastattn.common import machine


def test_commit_is_one_of_this_source_or_none():
    found = machine.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)


@pytest.mark.parametrize("version, text", [(91900, "9.19.0"), (92503, "9.25.3"), (90100, "9.1.0"), (8905, "8.9.5")])
def test_cudnn_version_as_people_write_it(version, text):
    assert machine.cudnn_text(version) == text


def test_ask_answers_none_when_a_command_is_missing_or_fails():
    assert machine.ask("a-command-that-does-not-exist") is None
    assert machine.ask("sh", "-c", "echo one; exit 3") is None
    assert machine.ask("sh", "-c", "echo one; echo two") == "one"
