"""A runner without a model: what follows depends on all that a row holds, and on nothing else.

A row's state is a number that its tokens stir one after another; the logits are that number's line of a random table.
Rows start out with garbage, as memory does, so that an engine which does not clear them shows.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

STATES = 997


class FakeRunner:
    """Keeps a log of its calls, and checks that no row is overrun."""

    capturable = True

    def __init__(self, rows: int, capacity: int = 256, vocab_size: int = 61, device: str = "cpu") -> None:
        self.rows, self.capacity, self.vocab_size, self.device = rows, capacity, vocab_size, torch.device(device)
        generator = torch.Generator().manual_seed(5)
        self.table = torch.randn(STATES, vocab_size, generator=generator).to(device)
        self.state = torch.full((rows,), 555, dtype=torch.int64, device=device)
        self.lengths = torch.full((rows,), 777, dtype=torch.int64, device=device)
        self.log: list[tuple] = []

    def prefill(self, row: int, ids: Tensor) -> Tensor:
        self.log.append(("prefill", row, len(ids)))
        state = self.state[row]
        for token in ids:
            state = self._stir(state, token)
        self.state[row] = state
        self.lengths[row] += len(ids)
        return self.table[state]

    def decode(self, ids: Tensor) -> Tensor:
        count = len(ids)
        self.log.append(("decode", count))
        self.state[:count] = self._stir(self.state[:count], ids)
        self.lengths[:count] += 1
        return self.table[self.state[:count]]

    def clear(self, row: int) -> None:
        self.log.append(("clear", row))
        self.state[row] = 0
        self.lengths[row] = 0

    def move(self, source: int, target: int) -> None:
        self.log.append(("move", source, target))
        for x in (self.state, self.lengths):
            x[target] = x[source]
            x[source] = 0

    @staticmethod
    def _stir(state: Tensor, token: Tensor) -> Tensor:
        return (state * 31 + token + 1) % STATES

    @property
    def is_clear(self) -> bool:
        return not self.state.any() and not self.lengths.any()

    def calls(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.log if call[0] == name]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What follows a prompt, worked out by itself."""
        state, tokens = 0, []
        for token in prompt:
            state = (state * 31 + token + 1) % STATES
        while len(tokens) < count:
            tokens.append(int(self.table[state].argmax()))
            state = (state * 31 + tokens[-1] + 1) % STATES
        return tokens


def ragged(count, most=9, vocab_size=61):
    return [[random.randrange(vocab_size) for _ in range(random.randint(1, most))] for _ in range(count)]


def collect(events):
    """The tokens of each request, and why it ended. Nothing comes after an end."""
    tokens, reasons = {}, {}
    for event in events:
        assert event.request not in reasons
        tokens.setdefault(event.request, []).append(event.token)
        if event.finish_reason:
            reasons[event.request] = event.finish_reason
    assert tokens.keys() == reasons.keys()
    return [tokens[i] for i in sorted(tokens)], [reasons[i] for i in sorted(reasons)]
