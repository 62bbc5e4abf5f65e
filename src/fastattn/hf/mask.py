"""The mask function: which keys each query sees, as intervals wherever they can say it.

transformers calls it once per forward and layer type. It answers with

- None where the attention function's own causal rule says it all (training, prefill, decode without padding);
- an int32 tensor `[B, 1, Sq | 1, 2]`: row i sees the keys `[lo, hi)`. transformers hands 4-D tensors on untouched;
- a dense bool tensor `[B, 1, Sq, Skv]`, made by transformers itself, where neither will do: padding with holes,
  blocks of bidirectional tokens, functions that only `vmap` can evaluate, models that compute with their mask;
- eager's additive mask, to a model that brings its own attention and never calls ours.

Where the numbers of an interval mask are known on the host too, the mask carries them along as a `Band`: the same mask
as a window over the first few keys, for which the fastest kernels are made. Where it is padding or packing it carries
the same as `Pieces`: whole sequences, which kernels take as offsets and lengths. What only the device knows of a
`cache.StaticCache` is in `slots.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat.hf import causal_mask_function, eager_mask, is_tracing, sdpa_mask
from ..masks import Segments
from ..notice import warn_once
from .hints import Band, Pieces, chunks, pack
from .hints import hint_of as hint_of
from .intervals import Padding, find_padding, intervals_of, real_keys, scan
from .patterns import Pattern, recognise
from .slots import Slots, mask_over_slots

#: Models that compute with their mask (indexers of sparse attention, masks joined to other masks) and so need it dense.
COMPUTE_WITH_MASK = frozenset(
    {
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "doge",
        "dots3_note_text",
        "glm5_next_text",
        "glm_moe_dsa",
        "hy_v4",
        "informer",
        "lasr_encoder",
        "minimax_m3_vl_text",
        "mistral_large4_text",
        "nemotron_asr_streaming_encoder",
        "qwen4_exp_text",
        "siglip2_vision_model",
        "t5gemma2_decoder",
    }
)

#: Models some of whose layers compute attention themselves, with the mask that eager attention adds.
PARTLY_EAGER = frozenset({"bigbird_pegasus", "blip_text_model"})

#: Models with causal layers that call themselves bidirectional: None would be misread by them.
MISTAKEN_FOR_BIDIRECTIONAL = frozenset({"git", "informer", "nllb-moe", "pegasus_x"})


class Place(NamedTuple):
    """Where queries and keys stand in the sequence."""

    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int

    @property
    def end(self) -> int | None:
        """How many keys there are up to the last query's own; None where only the device knows."""
        if isinstance(self.q_offset, Tensor):
            return None
        return self.q_offset + self.q_length - self.kv_offset


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one layer type for one forward, as transformers' `AttentionMaskInterface` asks for it.

    Args:
        batch_size, q_length, kv_length: B, Sq, Skv.
        q_offset, kv_offset: position of the first query and of the first key. A static cache passes its live length
            tensor; its value now is what counts, later changes do not reach the mask.
        mask_function: bool of (batch, head, query position, key position).
        attention_mask: None, or bool `[B, positions]`, False for padding; missing positions count as padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: False where None must not be answered, be the mask causal
            or open.
        use_vmap: the function takes only scalars.
        device: of the result.
        config: the model's; only `model_type` and `is_causal` are read.

    Returns:
        None, int32 `[B, 1, Sq | 1, 2]` or bool `[B, 1, Sq, Skv]`; see the module's docstring.

    The host reads from the device at most once or twice a forward, never while a graph is captured or traced.
    """

    request: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    if brings_its_own_attention(config):
        skip = bool(allow_is_bidirectional_skip)
        return eager_mask(**request, allow_is_bidirectional_skip=skip, dtype=kwargs.get("dtype", torch.float32))

    def dense() -> Tensor:
        return sdpa_mask(**request, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)

    model = getattr(config, "model_type", None)
    if isinstance(kv_offset, Slots):
        if use_vmap:
            raise ValueError("StaticCache: a mask function that only vmap can evaluate has no place for lengths by row")
        whole = model in COMPUTE_WITH_MASK
        return mask_over_slots(kv_offset, q_length, kv_length, mask_function, attention_mask, whole)
    if use_vmap or model in COMPUTE_WITH_MASK:
        return dense()
    readable = not is_tracing(attention_mask if attention_mask is not None else q_offset)
    pattern = recognise(mask_function)
    if pattern is not None and pattern.segments is not None:
        whole = isinstance(q_offset, int) and q_offset == kv_offset == 0
        whole = whole and pattern.segments.shape[-1] == q_length == kv_length
        if not (whole and readable and bool(pattern.sorted_segments())):
            pattern = None
    if pattern is None and not readable:
        return dense()

    if isinstance(q_offset, Tensor) and readable and q_length > 1:
        q_offset = int(q_offset)  # the host must wait for it, which only a call of many queries repays
    place = Place(q_length, kv_length, q_offset, kv_offset)
    positions = torch.arange(q_length, device=device)[None] + q_offset
    real = None if attention_mask is None else real_keys(attention_mask, kv_length, kv_offset)
    if pattern is None:
        found = scan(mask_function, batch_size, positions, kv_length, kv_offset, real)
        return dense() if found is None else pack(*found, batch_size, None)

    if _must_be_dense(pattern, place, allow_is_causal_skip, allow_is_bidirectional_skip):
        return dense()
    padding = None
    if real is not None:
        padding = find_padding(real) if readable else None
        if padding is None:
            return dense()
    band = _band(pattern, place, padding)
    if band is not None and band.keys == kv_length and band.left < 0:
        if band.right == 0 and allow_is_causal_skip and model not in MISTAKEN_FOR_BIDIRECTIONAL:
            return None
        # A decoder made bidirectional by its config may still have layers that call themselves causal.
        if band.right < 0 and getattr(config, "is_causal", None) is not False:
            return None
    if pattern.is_open:
        positions = positions[:, :1]  # all queries see the same
    lo, hi = intervals_of(pattern, positions, kv_offset, kv_length, padding)
    hint = band if band is not None or not readable else _pieces(pattern, place, padding, batch_size)
    return pack(lo, hi, batch_size, hint)


def brings_its_own_attention(config: Any) -> bool:
    """True for a model of transformers with layers that do not call the attention function that its config names."""
    name = type(config).__module__
    if torch.compiler.is_compiling() or not name.startswith("transformers.models."):
        return False
    modeling = sys.modules.get(name.replace(".configuration_", ".modeling_"))
    calls = modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")
    if calls and config.model_type not in PARTLY_EAGER:
        return False
    warn_once(
        f'attn_implementation="fastattn": {"some of " if calls else ""}the layers of "{config.model_type}" compute '
        "attention themselves in this version of transformers, and go on doing so without fastattn."
    )
    return True


def _must_be_dense(
    pattern: Pattern, place: Place, allow_is_causal_skip: bool, allow_is_bidirectional_skip: bool | None
) -> bool:
    """True when the caller forbids the answer None where it would be right: it means to compute with the mask.

    (Static caches forbid it as well, but there None would not be right: keys that are not written yet follow.)
    """
    if pattern.is_open:
        return allow_is_bidirectional_skip is False
    only_causal = pattern.is_band and pattern.left < 0 and pattern.right == 0
    return only_causal and not allow_is_causal_skip and place.end == place.kv_length


def _band(pattern: Pattern, place: Place, padding: Padding | None) -> Band | None:
    """The mask as a Band over the first keys, where that is the whole truth and the host knows the numbers."""
    keys = place.kv_length
    if not pattern.is_open:
        chunked = 0 < pattern.chunk < keys + place.kv_offset  # a chunk that holds all keys hides none
        if place.end is None or chunked or pattern.segments is not None:
            return None
        if pattern.right == 0:
            keys = min(keys, place.end)  # what follows are the unwritten slots of a static cache
        if keys != place.end:
            return None
    if padding is not None and (padding.latest_first > 0 or padding.earliest_stop < keys):
        return None
    left = -1 if pattern.left >= keys - 1 else pattern.left
    right = -1 if pattern.right > 0 and pattern.right >= keys - 1 else pattern.right
    return Band(keys, left, right)


def _pieces(pattern: Pattern, place: Place, padding: Padding | None, batch_size: int) -> Pieces | None:
    """The mask as Pieces, where it is nothing but causal padding or packing and more than a query's worth."""
    keys, end = place.kv_length, place.end
    if end is None or place.q_length == 1 or pattern.is_open or pattern.right != 0:
        return None
    left = -1 if pattern.left >= keys - 1 else pattern.left
    chunked = 0 < pattern.chunk < keys + place.kv_offset
    if chunked and pattern.segments is None:
        return _chunk_pieces(pattern, place, padding, batch_size, left)
    if pattern.segments is not None:
        if padding is not None:
            return None
        ids = pattern.segments.expand(batch_size, -1)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if chunked:
            within = torch.arange(keys, device=ids.device)[None] if pattern.positions is None else pattern.positions
            begin = 0 if pattern.chunk_start is None else pattern.chunk_start[:, None]
            starts[:, 1:] |= ((within - begin) // pattern.chunk).diff(dim=-1) != 0
        row, start = (x.to(torch.int32) for x in starts.nonzero(as_tuple=True))  # waits for the device: how many?
        stop = torch.full_like(start, keys)
        stop[:-1] = torch.where(row[1:] == row[:-1], start[1:], keys)
        return Pieces(Segments(torch.stack([row, start, stop]), causal=True), left)
    if padding is None or end > keys:
        return None
    first, stop = (x[:, 0].to(torch.int32).expand(batch_size) for x in (padding.first, padding.stop.clamp(max=end)))
    row = torch.arange(batch_size, dtype=torch.int32, device=first.device)
    before = end - place.q_length  # keys before the first query's own
    if not before and place.q_length == keys:
        return Pieces(Segments(torch.stack([row, first, stop]), causal=True), left)
    q_first, q_stop = ((x - before).clamp(0, place.q_length) for x in (first, stop))
    return Pieces(Segments(torch.stack([row, q_first, q_stop, first, stop]), causal=True), left)


def _chunk_pieces(pattern: Pattern, place: Place, padding: Padding | None, batch_size: int, left: int) -> Pieces | None:
    """The same for chunks, each a segment."""
    if pattern.chunk_start is None or place.end is None:
        return None
    begin = pattern.chunk_start[:, None].expand(batch_size, 1)
    start = begin.new_full((batch_size, 1), place.end + place.kv_offset - place.q_length)
    first, end = start.new_full((), place.kv_offset), start + place.q_length
    if padding is not None:
        first, end = padding.first + place.kv_offset, torch.minimum(end, padding.stop + place.kv_offset)
    found = chunks(pattern.chunk, begin, first, end, start, place.q_length, place.kv_offset, place.kv_length)
    if place.end == place.q_length == place.kv_length and not place.kv_offset:  # each query has its key
        found = found._replace(table=found.table[:3])
    return Pieces(found, left)
