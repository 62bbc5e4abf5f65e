"""Bad calls: a ValueError or a TypeError that names the argument, every time, and nothing is the worse for it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from bad_calls import ALSO, ALSO_FINE, ENTRIES, HUGE, Entry
from cases import Case, check

import fastattn
from fastattn.backends import scratch
from fastattn.dispatch import registry, serve

CALLS = 1000
BY_NAME = {entry.name: entry for entry in ENTRIES}
PAIRS = [(entry.name, argument) for entry in ENTRIES for argument in entry.bad]
SIZES = [
    *(("KVCache", name) for name in ("layers", "batch", "kv_heads", "head_dim", "value_dim", "capacity", "windows")),
    *(("warmup", name) for name in ("q_heads", "head_dim", "value_dim")),
    ("KVCache.add_rows", "count"),
]


def complaint(entry: Entry, arguments: dict[str, Any], names: list[str]) -> str | None:
    """What is wrong with how the entry answers to arguments of which those named are bad. None: nothing."""
    accepted = [other for name in names for other in (name, *ALSO.get(name, ()))]
    try:
        entry.call(**arguments)
    except (ValueError, TypeError) as error:
        if any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in accepted):
            return None
        return f"{type(error).__name__} that names none of {accepted}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def complaints(name: str, argument: str, values: list[Any]) -> list[str]:
    entry, found = BY_NAME[name], []
    for value in values:
        text = complaint(entry, entry.good() | {argument: value}, [argument])
        if text is not None:
            found.append(f"{name}({argument}={value!r}): {text}"[:300])
    return found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_good_calls_are_good(entry: Entry) -> None:
    entry.call(**entry.good())


@pytest.mark.parametrize("name, argument", PAIRS)
def test_each_bad_value(name: str, argument: str) -> None:
    found = complaints(name, argument, BY_NAME[name].bad[argument])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name, argument", SIZES)
def test_sizes_beyond_any(name: str, argument: str) -> None:
    found = complaints(name, argument, HUGE)
    assert not found, "\n".join(found)


def test_a_thousand_random_bad_calls(seed: int) -> None:
    """One bad argument, in a third of the calls two, among others that are fine in another way than usual."""
    rng, found = random.Random(seed), []
    for _ in range(CALLS):
        name, argument = rng.choice(PAIRS)
        entry = BY_NAME[name]
        changed = {argument: rng.choice(entry.bad[argument])}
        if rng.random() < 1 / 3:
            other = rng.choice([a for n, a in PAIRS if n == name])
            changed.setdefault(other, rng.choice(entry.bad[other]))
        for (owner, other), values in ALSO_FINE.items():
            if owner == name and other not in changed and rng.random() < 0.1:
                changed[other] = rng.choice(values)
        text = complaint(entry, entry.good() | changed, [*changed])
        if text is not None:
            found.append(f"{name}({changed}): {text}"[:400])
    assert not found, f"{len(found)} of {CALLS}:\n" + "\n".join(found[:20])
    nothing_is_left_behind()


def nothing_is_left_behind() -> None:
    assert registry._chosen.get() is None and not scratch._inside_operator.get()
    assert not serve._lock.locked()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert fastattn.stats()["calls"].keys() <= {f"{name}{way}" for name in registry.NAMES for way in ("", ".backward")}
    check(Case(dtype=torch.float32, mask="causal", grads="qkv"), None)


def test_a_complaint_is_noticed() -> None:
    """What the tests above rest on."""

    def raises(error: type[BaseException], text: str) -> Entry:
        def call(**arguments: Any) -> None:
            raise error(text)

        return Entry("", call, dict, {})

    assert complaint(raises(ValueError, "rows: expected"), {}, ["rows"]) is None
    assert complaint(raises(TypeError, "got unexpected rows"), {}, ["rows"]) is None
    assert complaint(raises(ValueError, "arrows: expected"), {}, ["rows"]) is not None
    assert complaint(raises(IndexError, "rows"), {}, ["rows"]) is not None
    assert complaint(raises(KeyboardInterrupt, "rows"), {}, ["rows"]) is not None
    assert complaint(Entry("", dict, dict, {}), {}, ["rows"]) == "no error"


@pytest.mark.gpu
def test_a_thousand_random_bad_calls_beside_a_gpu(seed: int) -> None:
    """With a GPU there, more backends are asked, and a launch that should not be ends in an error at the next wait."""
    test_a_thousand_random_bad_calls(seed)
    torch.cuda.synchronize()
