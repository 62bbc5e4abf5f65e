"""A transformers cache of fixed capacity whose lengths live on the device: `StaticCache`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..._compat.hf import Cache, causal_mask, layer_without_memory
from ..._compat.hf import StaticCache as TheirStaticCache
from ..._compat.transformers import attention_name, set_attention_name
from ..._compat.versions import Gone, gone
from ...cache.lengths import Lengths
from ...cache.memory import KVMemory
from ...common.checks import check_count, check_device, check_tensor
from ...validation import FLOATING
from .cache_layers import Kind, Layer, LayerMemory
from .lazy_mask import LiveKeys, compact_of

#: Layers that keep keys and values, or nothing.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp"})


class StaticCache(Cache):
    """Keys and values of a model for a batch of sequences, of fixed capacity, their lengths on the device.

        cache = fastattn.hf.StaticCache(model.config, batch=4, capacity=4096, device=model.device)
        model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

    One step of `model(ids, position_ids=..., cache=cache)` can be captured in a CUDA graph and replayed at
    every length, after one like it has run uncaptured. Rows may have different lengths: row b's next token goes to
    position `lengths[b]`; pass `position_ids=cache.positions(tokens)` then. A row that is full drops what is too much
    where only the device knows. The attention over it must be `attn_implementation="fastattn"`; a model all of whose
    layers see everything may use another one, as long as the rows' lengths are equal.

    Args:
        config: the model's, or that of its text part: how many layers there are, which of them have a window.
        batch, capacity: B rows of at most that many tokens.
        dtype: of keys and values. Default: that of the first ones.
        device: where they and the lengths live; by default the current GPU where there is one, else the CPU.

    Raises:
        ValueError: an argument is not as described, or the model has layers with a state of another kind (recurrent,
            compressed, indexed); the message says which.
        Gone: the installed transformers does not pass a cache's `kv_offset` on to the mask function.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("batch", batch), ("capacity", capacity)):
            check_count(name, size)
        if dtype is not None and dtype not in FLOATING:
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
        kinds = _kinds(config, capacity)
        implementation = attention_name(config.get_text_config(decoder=True))
        if any(kind.window for kind in kinds if kind) and implementation not in (None, "fastattn"):
            raise ValueError(
                f'config: expected attn_implementation="fastattn" for layers with a window, got {implementation!r}'
            )
        lengths = Lengths(batch, capacity, check_device(device))
        _check_offsets()
        self._compose(lengths, [kind and LayerMemory(kind, batch, dtype) for kind in kinds])

    def _compose(self, rows: Lengths, memories: list[LayerMemory | None]) -> None:
        self._rows, self._memories = rows, memories
        super().__init__(layers=[Layer(memory, rows) if memory else layer_without_memory() for memory in memories])

    @property
    def lengths(self) -> Tensor:
        """int32 `[B]`: tokens of each row, on the device. Who writes them calls `forget` first."""
        return self._rows.tokens

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        assert self._rows.capacity is not None
        return self._rows.capacity

    @property
    def memory(self) -> list[KVMemory]:
        """Keys and values of each layer that has stored any: all rows, in a view as well."""
        return [memory.made for memory in self._memories if memory and memory.made]

    @property
    def windows(self) -> dict[int, int]:
        """Tokens kept by each layer, by its index, that keeps less than the capacity."""
        kept = enumerate(self._memories)
        return {index: memory.kind.window for index, memory in kept if memory and memory.kind.window}

    @property
    def max_batch_size(self) -> int:
        """Rows."""
        return self._rows.batch

    def positions(self, tokens: int) -> Tensor:
        """`position_ids` for the next tokens of every row: int64 `[B, tokens]`, those past the capacity its last."""
        new = torch.arange(tokens, device=self.lengths.device)
        return (self.lengths[:, None] + new).clamp_(max=self.capacity - 1)

    def view(self, first: int, count: int) -> StaticCache:
        """The rows `first .. first + count - 1` as a cache of their own, in the same memory: a step of the one is a
        step of those rows in the other."""
        batch = self._rows.batch
        if not (0 <= first < first + count <= batch):
            raise ValueError(f"first, count: expected rows of 0..{batch - 1}, got {first} and {count}")
        view = StaticCache.__new__(StaticCache)
        view._compose(self._rows.view(first, count), self._memories)
        return view

    def reset(self, row: int | None = None) -> None:
        """Empties all rows, or one of them."""
        (self._rows if row is None else self.view(row, 1)._rows).empty()

    def forget(self) -> None:
        """Leaves the lengths to the device from now on, as a captured step does: graphs and callers may write them."""
        self._rows.forget()

    def move(self, source: int, target: int) -> None:
        """Copies row `source` to row `target`, and empties `source`."""
        if source == target:
            return
        here, there = self.view(source, 1), self.view(target, 1)
        for memory in self.memory:
            memory.copy_row(self._rows.first + source, self._rows.first + target)
        there._rows.copy_from(here._rows)
        here.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row i by row `beam_idx[i]`: int64 `[B]`."""
        check_tensor("beam_idx", beam_idx)
        if beam_idx.shape != self.lengths.shape:
            raise ValueError(f"beam_idx: expected [{self._rows.batch}], as many rows, got {list(beam_idx.shape)}")
        index = beam_idx.to(self.lengths.device)
        for memory in self.memory:
            memory.rows(self._rows.first, self._rows.batch).reorder(index)
        self._rows.reorder(index)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes `-tokens_to_remove` tokens back, or, given a positive number, all but so many.

        Raises ValueError in a model with a window shorter than the capacity: what a ring had there is lost.
        """
        if not self.is_croppable:
            raise ValueError("StaticCache: layers with a window cannot go back")
        self._rows.crop(tokens_to_remove)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back as it was."""
        return not self.windows

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("StaticCache: the number of rows is fixed; make one of that many")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("StaticCache: the number of rows is fixed; make one of that many")


@cache
def _check_offsets() -> None:
    """Raises Gone unless a `DeviceOffset` reaches the mask function of the installed transformers: without it a ring
    would be masked as if its keys were in order."""
    probe = StaticCache.__new__(StaticCache)
    probe._compose(Lengths(2, 4, "cpu"), [LayerMemory(Kind(4, 0, False), 2, None)])
    probe.forget()
    config = PretrainedConfig()
    set_attention_name(config, "fastattn")
    try:
        found = compact_of(causal_mask(config, 2, 1, probe))
    except Exception as error:
        raise Gone(gone("transformers", "create_causal_mask as it was")) from error
    if found is None or not isinstance(found.hint, LiveKeys):
        raise Gone(gone("transformers", "create_causal_mask that passes a cache's kv_offset on unchanged"))


def _kinds(config: PretrainedConfig, capacity: int) -> list[Kind | None]:
    """What each layer of a model keeps, as transformers' own static cache has it: None for nothing."""
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    for index, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise ValueError(f"config: layer {index} of {config.model_type} keeps another state than keys: {kind}")
    try:
        layers = TheirStaticCache(config=config, max_cache_len=capacity).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"config: {config.model_type} has layers that no static cache can serve: {error!r}") from error
    kinds: list[Kind | None] = []
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if name == "DummyLayer":
            kinds.append(None)
            continue
        if name not in ("StaticLayer", "StaticSlidingWindowLayer"):
            raise ValueError(f"config: layer {index} of {config.model_type} keeps another state than keys: {name}")
        kept = min(layer.max_cache_len, capacity)
        kinds.append(Kind(kept, kept if kept < capacity else 0, name != "StaticLayer"))
    if len({kind.window for kind in kinds if kind and kind.is_sliding}) > 1:
        raise ValueError(f"config: {config.model_type} has windows of different lengths")
    return kinds
