"""How many tokens each row of a cache holds: `Lengths`, shared by all caches."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(x: Tensor) -> bool:
    """True while work on x's device is captured in a CUDA graph."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


class _HostKnowledge:
    """What the host knows of the lengths of a whole cache; shared by the views of neighbouring rows."""

    def __init__(self, batch: int) -> None:
        self.lengths: list[int | None] = [0] * batch
        #: Rows whose steps were captured in a CUDA graph. Replays go unnoticed, so the host never knows these again.
        self.captured: set[int] = set()
        self.together = True  #: every step since the last reset was one of all rows, with as many tokens for each
        self.bound = 0  #: no row is longer, replays of captured steps aside


class Lengths:
    """Tokens of each row of a cache, or of some neighbouring rows of it, and the current step.

    Kernels read `tokens` on the device, so that one captured step is right at every length. What the host happens to
    know beside it (`known`) lets steps of many queries run without reading lengths at all.

    batch: rows. capacity: tokens that a row has room for; None: any number (all layers keep windows).
    """

    def __init__(self, batch: int, capacity: int | None, device: torch.device | str) -> None:
        with torch.inference_mode(False):  # else only inference mode could write into it
            tokens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._set(tokens, _HostKnowledge(batch), capacity, 0)

    def _set(self, tokens: Tensor, host: _HostKnowledge, capacity: int | None, first: int) -> None:
        self.tokens = tokens  #: int32 [B], the tokens of the current step included once it has begun
        self.capacity, self.first, self._host = capacity, first, host
        self.starts = tokens  #: int32 [B]: tokens before the current step
        self._counts: Tensor | None = None
        self.start: int | None = None  #: `starts` of every row, where the host knows it
        self.new = 0  #: most tokens that the step adds to a row
        self.ragged = False  #: rows were given different numbers of new tokens, or may have been: see `begin`
        self.steps = 0  #: begun so far
        self.in_step = False  #: a step has begun since the rows were last emptied

    @property
    def batch(self) -> int:
        """Rows."""
        return self.tokens.shape[0]

    @property
    def counts(self) -> Tensor:
        """int32 `[B]`: what the current step adds to each row."""
        if self._counts is None:
            self._counts = self.tokens - self.starts
        return self._counts

    @property
    def all_rows(self) -> bool:
        """True unless this is a view of some of the rows."""
        return self.batch == len(self._host.lengths)

    @property
    def agreed(self) -> int | None:
        """Tokens of every one of these rows; None where only the device knows, or where they differ."""
        found = self._host.lengths[self.first : self.first + self.batch]
        return found[0] if found.count(found[0]) == len(found) else None

    @property
    def known(self) -> int | None:
        """The same; None during a capture as well, whose graph is replayed at other lengths."""
        return None if capturing(self.tokens) else self.agreed

    @property
    def bound(self) -> int:
        """Tokens that no row of the cache has more than, replays of captured steps aside."""
        return self._host.bound

    @property
    def equal(self) -> bool:
        """True where all rows are known to have the same length, whatever it is."""
        return self.batch == 1 or self._host.together

    def begin(self, new: int, counts: Tensor | None = None) -> None:
        """Begins a step of `new` tokens for every row, or the first `counts[b]` of them (int32 `[B]`) for row b.

        A row without enough room drops the rest, and counts as one that was given fewer. Never reads the device. (But
        for one token in a captured step: a full row's is computed as if it had replaced the last one.)
        """
        host, agreed, captures = self._host, self.agreed, capturing(self.tokens)
        self.start, self.new = None if captures else agreed, new
        knows = not captures and self.capacity is not None and (agreed is not None or host.bound + new <= self.capacity)
        room = self.capacity is None or knows
        self.ragged = counts is not None or not (room or (captures and new == 1))
        if captures:
            host.captured.update(range(self.first, self.first + self.batch))
        self.starts, self._counts = self.tokens.clone(), None
        if counts is None:
            self.tokens.add_(new)
            if self.capacity is not None:
                self.tokens.clamp_(max=self.capacity)
        else:
            self._counts = counts.clamp(0, new)
            if self.capacity is not None:
                self._counts = torch.minimum(self._counts, self.capacity - self.starts)
            self.tokens.add_(self._counts)
        if counts is not None:
            self.set_known(None)
        elif agreed is not None:
            self.set_known(self._at_most(agreed + new))
        else:
            before = host.lengths[self.first : self.first + self.batch]
            self.set_known([None if n is None else self._at_most(n + new) for n in before])
        host.bound = self.capacity if host.captured and self.capacity is not None else self._at_most(host.bound + new)
        host.together = host.together and counts is None and self.all_rows
        self.steps, self.in_step = self.steps + 1, True

    def _at_most(self, tokens: int) -> int:
        return tokens if self.capacity is None else min(tokens, self.capacity)

    def set_known(self, lengths: int | list[int | None] | None) -> None:
        """Tells the host the length of these rows, one for all or one for each; None: only the device knows."""
        host, end = self._host, self.first + self.batch
        host.lengths[self.first : end] = lengths if isinstance(lengths, list) else [lengths] * self.batch
        for row in host.captured:
            if self.first <= row < end:
                host.lengths[row] = None

    def forget(self) -> None:
        """Leaves these rows to the device from now on, as a captured step does."""
        self._host.captured.update(range(self.first, self.first + self.batch))
        self.set_known(None)

    def empty(self, rows: Tensor | None = None) -> None:
        """Empties all rows, or those of a bool mask `[B]` on the device (then the host knows none of the lengths)."""
        if rows is not None:
            self.tokens.masked_fill_(rows, 0)
            self.set_known(None)
            self._host.together = False
            return
        self.tokens.zero_()
        self.in_step = False
        self.set_known(0)
        self._host.together = self.all_rows
        if self.all_rows:
            self._host.bound = 0

    def crop(self, tokens: int) -> None:
        """Keeps at most so many tokens of each row; of a negative number takes away as many."""
        known = self.known
        if tokens > 0:
            self.tokens.clamp_(max=tokens)
            known = None if known is None else min(known, tokens)
        else:
            self.tokens.add_(tokens).clamp_(min=0)
            known = None if known is None else max(0, known + tokens)
        self.set_known(known)

    def copy_from(self, other: Lengths) -> None:
        """Gives this row the length of another row of the same cache."""
        self.tokens.copy_(other.tokens)
        self.set_known(other.known)

    def reorder(self, rows: Tensor) -> None:
        """Replaces row i by row `rows[i]`: int `[N]` on the device. In place where N is the number of rows."""
        agreed, batch, host = self.agreed, rows.shape[0], self._host
        with torch.inference_mode(False):
            tokens, self.starts = self.tokens.index_select(0, rows), self.starts.index_select(0, rows)
        self._counts = None
        if batch == self.batch:
            self.tokens.copy_(tokens)
        else:
            self.tokens = tokens
            host.lengths = [None] * batch
            host.captured = set(range(batch)) if host.captured else set()
        self.set_known(agreed)  # of rows that differ the host no longer knows which is which

    def add_rows(self, count: int) -> None:
        """Appends `count` empty rows."""
        host, empty = self._host, self.agreed == 0
        with torch.inference_mode(False):
            more = self.tokens.new_zeros(count)
            self.tokens, self.starts = torch.cat([self.tokens, more]), torch.cat([self.starts, more])
        self._counts = None
        host.lengths += [0] * count
        host.together &= empty

    def view(self, first: int, batch: int) -> Lengths:
        """The rows `first .. first + batch - 1`, in the same memory: a step of the view is one of those rows here."""
        with torch.inference_mode(False):
            tokens = self.tokens[first : first + batch]
        view = Lengths.__new__(Lengths)
        view._set(tokens, self._host, self.capacity, self.first + first)
        return view
