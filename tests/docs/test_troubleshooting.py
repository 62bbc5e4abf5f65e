"""Every message that a user can meet has an entry in docs/troubleshooting.md."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from messages import HOLE, SOURCE, messages

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
#: The first cell of a table's row, in backticks (of which some are inside).
ENTRIES = re.findall(r"^\| `(.+?)` \| ", PAGE, re.MULTILINE)

#: Messages that nobody is shown, by file and text: what becomes of them instead.
INTERNAL = {
    ("common/disk.py", "*"): "caught: the plan is built, the kernel compiled anew, with a line in the log",
    ("*", "unreachable: *"): "a mistake of ours",
    ("common/folder.py", "*"): "the same",
    ("backends/triton/binaries/flag_set.py", "*"): "caught: the kernel is compiled anew",
    ("backends/triton/binaries/process.py", "*"): "what follows `its kernel could not be compiled: `",
    ("backends/triton/binaries/child.py", "*"): "the same",
    ("parallel/plan.py", "* is not in *"): "a mistake of ours",
    ("__init__.py", "module * has no attribute *"): "Python's own message",
    ("bench/implementations.py", "torch's *"): "an entry of a result file: what an implementation cannot do",
    ("bench/implementations.py", "its matrix of scores *"): "the same",
    ("bench/implementations.py", "expected one query, *"): "the same",
    ("bench/peers.py", "*"): "the same",
    ("bench/users/contenders.py", "*"): "the same",
    ("bench/users/packages.py", "*"): "the same",
    ("bench/case.py", "*"): "cases are written in our own modules",
    ("__main__.py", HOLE): "an exit status",
    ("call.py", "*"): "raised at import: a field of `Call` that the operators cannot have",
    ("dispatch/fast_path.py", "Call has other fields *"): "the same",
}


def internal(where, text):
    name = where.partition(":")[0]
    return any(fnmatch(name, file) and fnmatch(text, pattern) for file, pattern in INTERNAL)


def pattern_of(entry):
    return re.compile(".*".join(map(re.escape, entry.split(HOLE))), re.DOTALL)


def words(text):
    """What a text says beside the words that every message has."""
    return [word for word in re.findall(r"[A-Za-z_]{2,}", text) if word not in ("expected", "got", "as", "of")]


EVERY = list(messages())
FOUND = sorted({(text, where) for where, text in EVERY if words(text) and not internal(where, text)})


def test_there_is_something_to_test():
    assert len(FOUND) > 150
    assert len(ENTRIES) > 100
    assert any(where.startswith("dispatch/") and "slow reference" in text for text, where in FOUND)


@pytest.mark.parametrize("text, where", FOUND, ids=[f"{where}: {text[:50]}" for text, where in FOUND])
def test_every_message_has_an_entry(text, where):
    assert any(pattern_of(entry).fullmatch(text) for entry in ENTRIES), (
        f"{where} can say\n    {text}\n"
        f"and docs/troubleshooting.md has no entry for it: add a row, with {HOLE} for what is filled in"
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_of_some_message(entry):
    """An entry whose message is gone goes too; and none is so wide that it says nothing."""
    assert words(entry), "an entry for everything"
    every = {text for _, text in EVERY}
    assert any(pattern_of(entry).fullmatch(text) for text in every) or any(
        # what is filled in may be spelled out in the entry
        pattern_of(text).fullmatch(entry)
        for text in every
        if words(text)
    ), f"no message of {SOURCE.name} is like this any more"


def test_entries_say_what_to_do():
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            assert len(line.rstrip(" |").rpartition(" | ")[2]) >= 3, line
