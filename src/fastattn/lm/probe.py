"""Whether a model continues texts, and whether a runner says of them what the model says: tried on a few tokens.

The truth is one forward pass over the whole text, without a cache. What a model keeps from token to token (keys, the
state of a recurrence, convolutions, what its modules remember) differs from family to family and from release to
release of transformers; whether a runner keeps it right shows in the logits.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .runner import Runner

LONG, SHORT = 10, 6  #: tokens of the two texts: more than a convolution of 4 reaches back


class Probe:
    """Two short texts and the model's logits after each of their tokens.

    Raises ValueError for a model that is no causal language model: its forward fails, its logits are no numbers, differ
    from call to call, or depend on tokens that follow.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}

        self._model, self._options = model, options
        logits = self._logits
        self.long, self.short = _texts(model)
        try:
            self.after_long, self.after_short = logits(self.long), logits(self.short)
            again = logits(self.long)
            begin = logits(torch.cat([self.long[: LONG - 3], self.short[:3]]))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            text = str(error).strip().splitlines()
            reason = text[0] if text else type(error).__name__
            raise ValueError(f"model: {name} makes no logits of a text's next token: {reason}") from error
        tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        #: whether rounding alone changes logits visibly, and may choose other experts
        self._coarse = model.dtype not in (torch.float32, torch.float64) or tf32
        #: how much neighbouring places of a text differ: what losing a text's beginning would do, at least
        self._spread = (self.after_long[1:] - self.after_long[:-1]).nan_to_num().norm(dim=-1).mean()
        if self.after_long.isnan().any() or self.after_short.isnan().any():
            raise ValueError(f"model: {name} makes logits that are no numbers (NaN)")
        if not self._agree(again, self.after_long):
            raise ValueError(f"model: {name} says something else each time: its forward pass is random")
        # Of one length, so that nothing else differs: what is left is rounding, if anything.
        change = (begin - self.after_long)[: LONG - 3].nan_to_num().norm()
        if change > (0.01 if self._coarse else 1e-4) * self.after_long[: LONG - 3].nan_to_num().norm():
            raise ValueError(
                f"model: {name} is no causal language model: its logits depend on the tokens that follow (an encoder?)"
            )

    @torch.inference_mode()
    def _logits(self, ids: Tensor) -> Tensor:
        """`[S, V]`, after each of the tokens."""
        found: Tensor = self._model(input_ids=ids[None].to(self._model.device), **self._options).logits[0]
        return found.float()

    @property
    def vocab_size(self) -> int:
        """How many logits there are for a token."""
        return self.after_long.shape[-1]

    def check(self, runner: Runner) -> None:
        """Runs the texts through a runner, whose rows are empty before and after: in two steps, token by token, in two
        rows at a time, and in a row that held another text. Raises ValueError where its logits are not the model's."""
        if runner.vocab_size != self.vocab_size:
            raise ValueError(f"it makes {runner.vocab_size} logits, the model {self.vocab_size}")
        device = runner.device
        long, short = (ids[: runner.capacity].to(device) for ids in (self.long, self.short))
        split, last, end = len(long) // 2, len(long) - 1, len(short) - 1
        try:
            for part in (long[:split], long[split:last]):
                if len(part):
                    after = runner.prefill(0, part)
            if last:
                self._compare(after, self.after_long[last - 1], "of a prompt in two steps")
                ids = long[last:]
                if runner.rows > 1 and end:
                    self._compare(runner.prefill(1, short[:end]), self.after_short[end - 1], "of a prompt")
                    ids = torch.cat([ids, short[end:]])
                after = runner.decode(ids)
                self._compare(after[0], self.after_long[last], "of a token after a prompt")
                if len(ids) > 1:
                    self._compare(after[1], self.after_short[end], "of a second row")
            for row in range(min(runner.rows, 2)):
                runner.clear(row)
            self._compare(runner.prefill(0, short), self.after_short[end], "in a row that was cleared")
        except Exception as error:  # a model may raise anything where it is not run as it expects
            if isinstance(error, (ValueError, torch.OutOfMemoryError)):
                raise
            raise ValueError(f"it fails: {type(error).__name__}: {error}") from error
        finally:
            for row in range(min(runner.rows, 2)):
                runner.clear(row)

    def check_long(self, tokens: int) -> None:
        """Raises ValueError where the model says something else each time of a text of so many tokens: attention over
        hashed buckets is random only where a text is longer than a bucket."""
        ids = self.long.repeat(-(-tokens // LONG))[:tokens]
        one, two = (self._logits(ids)[-1] for _ in range(2))
        if not self._agree(one, two):
            raise ValueError("it says something else of a long text each time")

    def _compare(self, found: Tensor, truth: Tensor, where: str) -> None:
        if not self._agree(found.float(), truth):
            raise ValueError(f"what it says {where} is not what a forward pass of the whole text says")

    def _agree(self, found: Tensor, truth: Tensor) -> bool:
        """Whether logits are the same up to rounding: measured against the logits, and against how much those of
        neighbouring places differ, which is what losing a part of the text would do."""
        finite = truth.isfinite()
        if not torch.equal(found.isfinite(), finite):
            return False
        error, scale = (found - truth)[finite].norm(), truth[finite].norm()
        spread = self._spread * max(1, truth.numel() // truth.shape[-1]) ** 0.5
        if self._coarse:
            return bool(error <= torch.maximum(0.05 * scale, 0.5 * spread))
        return bool(error <= torch.maximum(2e-5 * scale, torch.minimum(1e-3 * scale, 0.02 * spread)))


def _texts(model: Any) -> tuple[Tensor, Tensor]:
    """Two texts of tokens without a meaning of their own: no padding, no place of an image."""
    config = model.config.get_text_config(decoder=True)
    size = min(config.vocab_size, model.get_input_embeddings().num_embeddings)
    special = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))
               and isinstance(value, int)}  # fmt: skip
    allowed = torch.tensor([token for token in range(min(size, 4096)) if token not in special] or [0])
    drawn = torch.randint(len(allowed), (LONG + SHORT,), generator=torch.Generator().manual_seed(0))
    long, short = allowed[drawn].split([LONG, SHORT])
    return long, short
