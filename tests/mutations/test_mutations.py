"""The deliberate mistakes still can be made: each has its one place in the source, and names tests that exist."""

from __future__ import annotations

from collections import Counter

import pytest
from mutation import Mutation
from mutations import MUTATIONS
from run import ROOT, SURVIVED, applied, main


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_mistake_can_still_be_made(mutation: Mutation) -> None:
    """Else rewrite it for the source as it is now, and run `python tests/mutations/run.py -k NAME`."""
    text = (ROOT / "src" / "fastattn" / mutation.file).read_text()
    changed = applied(mutation, text)
    assert changed is not None, f"{mutation.file} holds the text {text.count(mutation.old)} times, not once"
    assert changed != text
    if mutation.file.endswith(".py"):
        compile(changed, mutation.file, "exec")
    for name in mutation.tests:
        assert not name.startswith("tests/") or (ROOT / name).exists(), name


def test_mistakes_are_told_apart() -> None:
    assert len(MUTATIONS) >= 10
    assert not [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1]


@pytest.mark.slow
def test_a_survivor_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that no named test can notice, and one whose text is not in the source."""
    import run

    harmless = Mutation(
        "a comment",
        "config.py",
        '"""Environment variables',
        '"""Environment  variables',
        ("tests/backends/cudnn/test_keys.py", "-k", "equal"),
    )
    monkeypatch.setattr(run, "MUTATIONS", (harmless, harmless._replace(name="nothing", old="not in there")))
    assert main(["-j", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"{SURVIVED:<10} config.py: a comment" in printed and "DOES NOT APPLY config.py: nothing" in printed
    assert "0 of 2 noticed" in printed
