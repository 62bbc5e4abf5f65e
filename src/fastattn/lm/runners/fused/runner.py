"""`FusedRunner`: models of Llama's kind, layer by layer in few kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....api import scaled_dot_product_attention
from ....cache.lengths import Lengths
from ....cache.memory import KVMemory
from ... import runner as runner_protocol
from ...runner import prefill_steps
from .structure import Snapshot
from .weights import Layer, check_supported, read_layers


class FusedRunner:
    """A `Runner` for a transformers model of one of `weights.FAMILIES`.

    A layer has four GEMMs instead of seven, with the norms and the residuals in them, and one kernel between the QKV
    GEMM and attention. Results differ from transformers' by rounding: intermediate results that transformers rounds
    stay in float32 here.

    The model's parameters are merged in place (see `weights.read_layers`). The model still works, but must not be
    trained, moved, cast or given adapters or hooks while the runner lives: the next prompt raises RuntimeError then.

    Args:
        model: on its device, in bfloat16, float16 or float32; any attention implementation.
        rows: the number of sequences.
        capacity: the number of tokens of each, prompt included.
        prefill_step: prompt tokens per forward pass. Default: `lm.runner.PREFILL_STEP`.

    Raises:
        ValueError: the model is of another kind, or has something that these layers do not; the message names it.
    """

    capturable = True

    def __init__(self, model: Any, rows: int, capacity: int, prefill_step: int | None = None) -> None:
        check_supported(model)
        self._step = prefill_step
        config, weight = model.config, model.lm_head.weight
        self.rows, self.capacity, self.vocab_size = rows, capacity, weight.shape[0]
        self.device: torch.device = weight.device
        with torch.inference_mode():
            self._embedding = model.model.embed_tokens.weight.detach()
            self._layers, self._head = read_layers(model, capacity)
            shape = (len(self._layers), 2, rows, config.num_key_value_heads, capacity, self._layers[0].rotary.dim)
            # Zeros: entries past a row's length must be finite, because kernels may read them and multiply them by 0.
            self._block = torch.zeros(shape, dtype=weight.dtype, device=self.device)  # in one piece: moved at once
            self._memory = [KVMemory(keys, values) for keys, values in self._block]
            self._lengths = Lengths(rows, capacity, self.device)
            if self.device.type == "cuda":
                self._warm_up_gemms()
        self._model = Snapshot(model)
        self._fresh = [True] * rows  #: not used since the row was cleared: its length is 0

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """See `Runner`. Raises RuntimeError if the model was changed since the runner was made."""
        self._model.check()
        known, lengths = 0 if self._fresh[row] else None, self._lengths.view(row, 1)
        if self._fresh[row]:  # decode steps increase the length of unused rows too
            lengths.empty()
        self._fresh[row] = False
        h = last = ids.new_empty(0)
        for part in ids.split(prefill_steps(ids.shape[0], self._step)):
            tokens = part.shape[0]
            if known is not None and known + _rounded(tokens) <= self.capacity:
                part = functional.pad(part, (0, _rounded(tokens) - tokens))
            h = self._forward(part[None], lengths, known, tokens)
            known, last = None if known is None else known + tokens, h[tokens - 1 : tokens]
        return self._head(last)[0]

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """See `Runner`."""
        return self._head(self._forward(ids[:, None], self._lengths.view(0, ids.shape[0]), None, 1))

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """See `Runner`."""
        self._lengths.view(row, 1).empty()
        self._fresh[row] = True

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """See `Runner`."""
        if source != target:
            self._block[:, :, target] = self._block[:, :, source]
            self._lengths.view(target, 1).copy_from(self._lengths.view(source, 1))
            self._fresh[target] = self._fresh[source]
            self.clear(source)

    def _warm_up_gemms(self) -> None:
        """Makes cuBLAS choose and load its kernels for every number of tokens that a prefill step may have. Otherwise
        the first prompt of a length waits for it, up to 45 ms."""
        layer = self._layers[0]
        inner, hidden = layer.out.weight.shape[1], self._embedding.shape[1]
        step = self._step or runner_protocol.PREFILL_STEP
        most = min(self.capacity, step + step // 4)
        for tokens in sorted({_rounded(n) for n in range(2, most + 1)}):
            h = self._embedding.new_zeros((tokens, hidden))
            layer.qkv(h)
            layer.out(h.new_zeros((tokens, inner)), h)
            layer.down(layer.gate_up(h), h)

    def _forward(self, ids: Tensor, lengths: Lengths, known: int | None, count: int) -> Tensor:
        """Returns the output of the last layer, `[N * S, hidden]`.

        ids: int64 `[N, S]`. The first `count` of each row are appended; the rest is padding, which those do not see and
        which is overwritten later. known: the length of the one row, if the host knows it.
        """
        tokens, reach = ids.shape[1], self.capacity
        lengths.begin(tokens)
        ends = lengths.tokens
        if known is None and self.device.type == "cpu":  # lengths are on the host, and time grows with the capacity
            reach = int(ends.max())
            if ids.shape[0] == 1 and reach < self.capacity:
                known = reach - tokens
        h = functional.embedding(ids.reshape(-1), self._embedding)
        for layer, memory in zip(self._layers, self._memory, strict=True):
            part = memory.rows(lengths.first, lengths.batch)
            keys, values = part.keys, part.values
            q = layer.rotary(layer.qkv(h), keys, values, lengths.starts)
            if known is None:
                out = _attend(layer, q, keys[:, :, :reach], values[:, :, :reach], ends)
            else:
                end = known + tokens
                out = _attend(layer, q, keys[:, :, :end], values[:, :, :end], None)
            layer.out(out.transpose(1, 2).reshape(h.shape[0], -1), h)
            layer.down(layer.gate_up(h), h)
        if count < tokens:
            lengths.crop(count - tokens)
        return h


def _rounded(tokens: int) -> int:
    """The number of tokens that are computed for a step: a multiple of 64 above 16. There are few of those, so that all
    can be warmed up (`FusedRunner._warm_up_gemms`), and cuBLAS' tiles have 64 rows or more anyway."""
    return tokens if tokens == 1 else -(-tokens // 64) * 64 if tokens > 16 else 16


def _attend(layer: Layer, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    window = None if layer.window is None else (layer.window - 1, -1)
    out = scaled_dot_product_attention(
        q, keys, values, scale=layer.scale, mask="causal", window=window, kv_lengths=lengths
    )
    assert isinstance(out, Tensor)
    return out
