"""Text from files and other libraries, made safe to print: terminals execute some characters, not show them."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line, with characters that are not printable as Python's escapes: `\\x1b` is four characters.

    Those are control characters (they could move the cursor, rename the window, answer for the reader), marks that
    change the direction of writing, and lone surrogates, which no encoding takes.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def one_line(text: str, between: str = " ") -> str:
    """The lines of a text joined into one printable line, without empty lines."""
    return between.join(part for line in text.splitlines() if (part := printable(line.strip())))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
