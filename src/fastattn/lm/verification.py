"""`ReferenceLogits`: short texts on which models are checked to be causal language models, and runners to be right.

The reference is one forward pass of the model over the whole text, without a cache. What a model stores from token to
token (keys, a recurrent state, convolutions, attributes of its modules) differs between families and between releases
of transformers. A runner that stores it wrongly computes other logits.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.failures import first_line

if TYPE_CHECKING:
    from .runner import Runner

LONG, SHORT = 10, 6  #: tokens of the two texts: a convolution over 4 tokens is shorter


class ReferenceLogits:
    """Two short texts and the model's logits after each of their tokens.

    Raises ValueError for a model that is no causal language model: its forward fails, its logits are NaN, differ from
    call to call, or depend on later tokens.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        self._model = model
        self._options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        self.long, self.short = _texts(model)
        try:
            self.after_long, self.after_short = self._logits(self.long), self._logits(self.short)
            again = self._logits(self.long)
            other_end = self._logits(torch.cat([self.long[: LONG - 3], self.short[:3]]))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"model: {name} makes no logits of a text's next token: {first_line(error)}") from error
        tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        #: whether rounding changes logits visibly, and may choose other experts
        self._coarse = model.dtype not in (torch.float32, torch.float64) or tf32
        #: how much the logits of adjacent positions differ: losing the beginning of a text changes them as much
        self._spread = (self.after_long[1:] - self.after_long[:-1]).nan_to_num().norm(dim=-1).mean()
        if self.after_long.isnan().any() or self.after_short.isnan().any():
            raise ValueError(f"model: {name} makes logits that are NaN")
        if not self._agree(again, self.after_long):
            raise ValueError(f"model: {name} makes other logits each time: its forward pass is random")
        # Both texts have the same length, so that only rounding may differ.
        change = (other_end - self.after_long)[: LONG - 3].nan_to_num().norm()
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
        """The number of logits for a token."""
        return self.after_long.shape[-1]

    def check(self, runner: Runner) -> None:
        """Raises ValueError unless the runner's logits are the model's.

        The runner processes the texts in two steps, token by token, in two rows at a time, and in a row that held
        another text. Its rows are empty before and after.
        """
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
                self._compare(after, self.after_long[last - 1], "a prompt in two steps")
                ids = long[last:]
                if runner.rows > 1 and end:
                    self._compare(runner.prefill(1, short[:end]), self.after_short[end - 1], "a prompt")
                    ids = torch.cat([ids, short[end:]])
                after = runner.decode(ids)
                self._compare(after[0], self.after_long[last], "a token after a prompt")
                if len(ids) > 1:
                    self._compare(after[1], self.after_short[end], "a token of a second row")
            for row in range(min(runner.rows, 2)):
                runner.clear(row)
            self._compare(runner.prefill(0, short), self.after_short[end], "a prompt in a row that was cleared")
        except Exception as error:  # a model may raise anything if it is not run as it expects
            if isinstance(error, (ValueError, torch.OutOfMemoryError)):
                raise
            raise ValueError(f"it fails: {type(error).__name__}: {error}") from error
        finally:
            for row in range(min(runner.rows, 2)):
                runner.clear(row)

    def check_long(self, tokens: int) -> None:
        """Raises ValueError if the model's logits after so many tokens differ from call to call.

        Attention over hashed buckets (Reformer) is random for texts that are longer than a bucket.
        """
        ids = self.long.repeat(-(-tokens // LONG))[:tokens]
        one, two = (self._logits(ids)[-1] for _ in range(2))
        if not self._agree(one, two):
            raise ValueError("it makes other logits of a long text each time")

    def _compare(self, logits: Tensor, reference: Tensor, where: str) -> None:
        if not self._agree(logits.float(), reference):
            raise ValueError(f"its logits after {where} are not those of a forward pass over the whole text")

    def _agree(self, logits: Tensor, reference: Tensor) -> bool:
        """Whether logits are equal up to rounding.

        The tolerance is relative to the logits and to how much those of adjacent positions differ, because losing a
        part of the text changes them as much.
        """
        finite = reference.isfinite()
        if not torch.equal(logits.isfinite(), finite):
            return False
        error, scale = (logits - reference)[finite].norm(), reference[finite].norm()
        spread = self._spread * max(1, reference.numel() // reference.shape[-1]) ** 0.5
        if self._coarse:
            return bool(error <= torch.maximum(0.05 * scale, 0.5 * spread))
        return bool(error <= torch.maximum(2e-5 * scale, torch.minimum(1e-3 * scale, 0.02 * spread)))


def _texts(model: Any) -> tuple[Tensor, Tensor]:
    """Two random texts without special tokens (padding, images)."""
    config = model.config.get_text_config(decoder=True)
    size = min(config.vocab_size, model.get_input_embeddings().num_embeddings)
    special = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))
               and isinstance(value, int)}  # fmt: skip
    allowed = torch.tensor([token for token in range(min(size, 4096)) if token not in special] or [0])
    drawn = torch.randint(len(allowed), (LONG + SHORT,), generator=torch.Generator().manual_seed(0))
    long, short = allowed[drawn].split([LONG, SHORT])
    return long, short
