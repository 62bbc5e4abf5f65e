"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checks import check_sequence

_CONTEXT = range(6, 32)  #: how many tokens before the first are decoded along: as few as begin with a character
_HELD = 8  #: tokens; a character has at most four bytes, so that more which do not end one are no beginning of one
_BROKEN = "\ufffd"  #: what decoders write for bytes that are no character, or not yet


class Detokenizer:
    """Decodes tokens one by one. What it returns, joined, is the text of all of them.

    A token's text may depend on its neighbours (a space that is dropped in front, bytes of one character in several
    tokens), so a window is decoded, with and without what is new: the difference is what to show. Special tokens have
    no text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """context: the tokens before the first, such as the prompt's. Their text is not returned."""
        self._tokenizer = tokenizer
        tails = (list(context[-count:]) for count in _CONTEXT)
        self._ids = next((ids for ids in tails if not self._decode(ids).startswith(_BROKEN)), [])
        self._read = len(self._ids)  #: tokens of the window whose text was returned
        self._shown = self._decode(self._ids)

    def add(self, token: int) -> str:
        """The text that the token completes: none, or some."""
        self._ids.append(token)
        text = self._decode(self._ids)
        count = len(self._ids)
        if text.endswith(_BROKEN):
            if count - self._read <= _HELD:
                return ""
            # These bytes are no character. The last few may still begin one: show what they do not change.
            for end in range(count - 1, count - 5, -1):
                stable = self._decode(self._ids[:end])
                if text.startswith(stable):
                    text, count = stable, end
                    break
        return self._show(text, count)

    def flush(self) -> str:
        """The text that was held back because a character was not complete. Nothing comes after it."""
        return self._show(self._decode(self._ids), len(self._ids))

    def _show(self, text: str, count: int) -> str:
        """What is new in the text of the window's first tokens. The window begins anew with those it came from."""
        new = self._beyond(text, count)
        if new:  # else a special token: it has no text that could be context for what follows
            del self._ids[: self._read]
            self._read = count - self._read
            self._shown = self._decode(self._ids[: self._read])
        return new

    def _beyond(self, text: str, count: int) -> str:
        # A context may end within a character, which what follows completes.
        for shown in (self._shown, self._shown.rstrip(_BROKEN)):
            if text.startswith(shown):
                return text[len(shown) :]
        # What follows broke bytes that were a character: some decoders give up on all bytes of a run if one is wrong.
        # The character was shown, and stays; the rest is what its own tokens say.
        return self._decode(self._ids[self._read : count])

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would change text that was returned already.
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Lets text through up to the first stop string; what may be the beginning of one waits."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Raises ValueError for an empty string."""
        stop = [stop] if isinstance(stop, str) else check_sequence("stop", stop, "strings")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected strings that are not empty, got {list(stop)!r}")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.found = False  #: whether a stop string came; nothing is let through afterwards

    def add(self, text: str) -> str:
        """What may be shown once this text has come."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = self._beginning()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return "" if self.found else shown

    def _beginning(self) -> int:
        """How many characters at the end of what is held a stop string begins with."""
        for count in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0


class TextStream:
    """The text of one request, piece by piece."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stop)

    def add(self, token: int, finish_reason: str | None) -> tuple[str, str | None]:
        """The text to show now, and the finish reason: the one given, or "stop" where a stop string came.

        The token that ends a text (finish reason "stop") is no part of it.
        """
        text = "" if finish_reason == "stop" else self._detokenizer.add(token)
        if finish_reason:
            text += self._detokenizer.flush()
        text = self._stops.add(text)
        if self._stops.found:
            return text, "stop"
        return text + (self._stops.flush() if finish_reason else ""), finish_reason
