"""A chat template is a stranger's program: what it may do, how long, and how much."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastattn.lm import load
from fastattn.lm.generation.chat_template import render_chat
from fastattn.lm.generation.prompts import encode

MESSAGES = [{"role": "user", "content": "hey 😀"}]


@pytest.fixture(scope="module")
def loaded(saved_model) -> Any:
    return load(saved_model, attn="eager", device="cpu")


@pytest.fixture
def tokenizer(loaded, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    return loaded.tokenizer


def children() -> set[str]:
    """This process's children, zombies among them."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/stat") as file:
                if file.read().rpartition(")")[2].split()[1] == str(os.getpid()):
                    found.add(number)
        except OSError:
            continue
    return found


@pytest.fixture
def leaves_no_child() -> Iterator[None]:
    """The test ends with the children it began with: helpers of earlier tests (multiprocessing's) may be among them."""
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize(
    "template",
    [
        "<{{ messages[0]['role'] }}> {{ messages[0]['content'] }}{% if add_generation_prompt %}<bot>{% endif %}",
        "{% for m in messages %}{{ m.content | upper }}{{ unk_token }}{% endfor %}é\n\n",
        "{%- set ns = namespace(n=0) -%}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        {"default": "{{ messages | tojson }}", "tool_use": "x"},
        "{{ 'a' * 100000 }}",
    ],
)
def test_a_template_gives_what_transformers_gives(tokenizer, template):
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, MESSAGES) == expected


@pytest.mark.parametrize(
    "template, cause",
    [
        ("{{ raise_exception('no\nsystem \x1b[31m role') }}", r"failed: no system \\x1b\[31m role"),
        ("{% for %}", "failed: Expected an expression"),
        ("{{ foo.bar.baz }}", "failed: 'foo' is undefined"),
        ("{{ tools[0].name }}", "failed: "),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion depth"),
        ("{% for i in range(10**9) %}{% endfor %}", "failed: Range too big"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError: division by zero"),
        ("{{ 'a' * 10**11 }}", "failed: it took more than 1024 MiB of memory"),
        ("{% set n = namespace(x='a' * 10**6) %}{% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}",
         "failed: it took more than 1024 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "failed: it wrote 9899901 characters, where at most"),
        ({"rag": "x", "tool_use": "y"}, "failed: "),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_line(tokenizer, template, cause, leaves_no_child):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=cause) as caught:
        render_chat(tokenizer, MESSAGES)
    assert str(caught.value).startswith(f"chat: {tokenizer.name_or_path}: the chat template ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one call into C
    ],
)
def test_a_template_that_does_not_end_is_ended(tokenizer, template, leaves_no_child):
    tokenizer.chat_template = template
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"does not end: it was stopped after 1 seconds|more memory or time"):
        render_chat(tokenizer, MESSAGES, seconds=1)
    assert time.monotonic() - begin < 10


def test_ctrl_c_leaves_no_child(tokenizer, leaves_no_child):
    tokenizer.chat_template = "{{ 9 ** (9 ** 9) }}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it without one
    try:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            render_chat(tokenizer, MESSAGES)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_tokenizers_own_trouble_stays_in_the_child(tokenizer, monkeypatch, capfd):
    """Whatever ends the child, the parent goes on and nothing is printed."""
    tokenizer.chat_template = "x"
    for how in (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: os._exit(3),
        lambda: os.write(2, b"x") and os._exit(0),
    ):
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, how=how, **__: how())
        with pytest.raises(ValueError, match="the chat template was stopped"):
            render_chat(tokenizer, MESSAGES)
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: 3)
    with pytest.raises(ValueError, match="failed: expected a text, got int"):
        render_chat(tokenizer, MESSAGES)
    assert capfd.readouterr() == ("", "")


def test_many_threads_and_ignored_children(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    found: list[str] = []
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as daemons have it
    try:
        threads = [threading.Thread(target=lambda: found.append(render_chat(tokenizer, MESSAGES))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert found == [MESSAGES[0]["content"]] * 8


def test_text_that_is_no_unicode_is_refused(loaded):
    for chat_too in (False, True):
        with pytest.raises(ValueError, match=r"prompt: expected Unicode text, got a lone surrogate"):
            encode(loaded, "a \udcff", chat=chat_too)
