"""Text from tokens, one token at a time: whole characters only, and without stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checks import check_sequence

_CONTEXT = range(6, 32)  #: tokens before the first that are decoded with it: the fewest that begin with a character
_MOST_PENDING = 8  #: tokens without a complete character; a character has at most four bytes
_BROKEN = "\ufffd"  #: the replacement character, for bytes that are no character or not a complete one


class Detokenizer:
    """Decodes tokens one by one. The texts it returns, joined, are the text of all tokens.

    A token's text may depend on the tokens around it (a space that is dropped in front, bytes of one character in
    several tokens). Therefore a window of tokens is decoded with and without the new ones, and the difference is
    returned. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """context: the tokens before the first, such as the prompt. Their text is not returned."""
        self._tokenizer = tokenizer
        tails = (list(context[-count:]) for count in _CONTEXT)
        self._ids = next((ids for ids in tails if not self._decode(ids).startswith(_BROKEN)), [])
        self._read = len(self._ids)  #: the number of tokens of the window whose text was returned
        self._returned = self._decode(self._ids)

    def add(self, token: int) -> str:
        """The text that the token completes; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        count = len(self._ids)
        if text.endswith(_BROKEN):
            if count - self._read <= _MOST_PENDING:
                return ""
            # These bytes are no character. The last few may still begin one: return the text that they do not change.
            for end in range(count - 1, count - 5, -1):
                stable = self._decode(self._ids[:end])
                if text.startswith(stable):
                    text, count = stable, end
                    break
        return self._return(text, count)

    def flush(self) -> str:
        """The text that was held back because a character was not complete. To be called after the last token."""
        return self._return(self._decode(self._ids), len(self._ids))

    def _return(self, text: str, count: int) -> str:
        """Returns the new part of `text`, the text of the window's first `count` tokens. The window then begins with
        the tokens of that part."""
        new = self._after_returned(text, count)
        if new:  # a special token has no text, which the next tokens could need as context
            del self._ids[: self._read]
            self._read = count - self._read
            self._returned = self._decode(self._ids[: self._read])
        return new

    def _after_returned(self, text: str, count: int) -> str:
        # The context may end within a character, which the next tokens complete.
        for text_before in (self._returned, self._returned.rstrip(_BROKEN)):
            if text.startswith(text_before):
                return text[len(text_before) :]
        # The new tokens turned complete characters into replacement characters: some decoders replace all bytes of a
        # run if one is wrong. The characters were returned and stay; decode the new tokens alone.
        return self._decode(self._ids[self._read : count])

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would change text that was returned already.
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Raises ValueError for an empty string."""
        stop = [stop] if isinstance(stop, str) else check_sequence("stop", stop, "strings")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected strings that are not empty, got {list(stop)!r}")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.found = False  #: whether a stop string was found; no text is returned afterwards

    def add(self, text: str) -> str:
        """Adds text. Returns the text that is certain not to belong to a stop string."""
        if self.found:
            return ""
        self._held += text
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._held[: min(found)]
        keep = self._beginning()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """The text that was held back. To be called after the last text."""
        shown, self._held = self._held, ""
        return "" if self.found else shown

    def _beginning(self) -> int:
        """The number of characters at the end of the held text that a stop string begins with."""
        for count in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0


class TextStream:
    """The text of one request, token by token."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stop)

    def add(self, token: int, finish_reason: str | None) -> tuple[str, str | None]:
        """The new text, and the finish reason: the one given, or "stop" if a stop string was found.

        The token that ends a text (finish reason "stop") is not part of it.
        """
        text = "" if finish_reason == "stop" else self._detokenizer.add(token)
        if finish_reason:
            text += self._detokenizer.flush()
        text = self._stops.add(text)
        if self._stops.found:
            return text, "stop"
        return text + (self._stops.flush() if finish_reason else ""), finish_reason
