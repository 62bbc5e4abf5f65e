"""Text that somebody else wrote, made fit to be shown: a terminal obeys some characters instead of showing them."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line, what cannot be seen in it as Python would write it: `\\x1b` is four characters.

    That is control characters (with which a text could move the cursor, rename the window, answer for its reader),
    marks that turn the direction of writing, and halves of surrogate pairs, which no encoding takes.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def one_line(text: str, between: str = " ") -> str:
    """The lines of a text as one, without those that are empty, and printable."""
    return between.join(part for line in text.splitlines() if (part := printable(line.strip())))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
