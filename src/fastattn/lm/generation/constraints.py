"""Constraints of a model's generation_config on every text: suppressed tokens, lengths, penalties."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...common.notice import warn_once


@dataclass(frozen=True)
class _Context:
    """What a request's processors depend on."""

    prompt: int  #: tokens
    limit: int  #: the largest number of new tokens
    eos: list[int]
    device: torch.device


#: Fields of a generation_config -> transformers' LogitsProcessor for its value, in the order of its `generate`. Those
#: that prevent or force the end of a text are left out if no token ends it.
_MAKERS: dict[str, Callable[[Any, Any, _Context], Any]] = {
    "sequence_bias": lambda known, value, at: known.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda known, value, at: known.RepetitionPenaltyLogitsProcessor(float(value)),
    "no_repeat_ngram_size": lambda known, value, at: known.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda known, value, at: known.NoBadWordsLogitsProcessor(value, at.eos or None),
    "min_length": lambda known, value, at: at.eos and known.MinLengthLogitsProcessor(value, at.eos, str(at.device)),
    "min_new_tokens": lambda known, value, at: (
        at.eos and known.MinNewTokensLengthLogitsProcessor(at.prompt, value, at.eos, str(at.device))
    ),
    "forced_bos_token_id": lambda known, value, at: known.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda known, value, at: known.ForcedEOSTokenLogitsProcessor(
        at.prompt + at.limit, value, str(at.device)
    ),
    "remove_invalid_values": lambda known, value, at: known.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda known, value, at: (
        at.eos and known.ExponentialDecayLengthPenalty(tuple(value), at.eos, at.prompt)
    ),
    "suppress_tokens": lambda known, value, at: known.SuppressTokensLogitsProcessor(value, str(at.device)),
    "begin_suppress_tokens": lambda known, value, at: known.SuppressTokensAtBeginLogitsProcessor(
        value, at.prompt, str(at.device)
    ),
}
#: Values that switch a field off, in addition to the defaults of a new GenerationConfig.
_OFF: dict[str, Any] = {
    "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "remove_invalid_values": False, "renormalize_logits": False, "num_beams": 1, "num_return_sequences": 1,
    "guidance_scale": 1, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "length_penalty": 1,
    "diversity_penalty": 0, "num_beam_groups": 1, "early_stopping": False, "token_healing": False, "use_mtp": False,
    "low_memory": False, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
}  # fmt: skip
#: Fields without an effect here: tokens that are read elsewhere, `Sampling` and `max_tokens` of the caller, how
#: `generate` stores, compiles and returns. Any other field that is set is named in a warning.
_ELSEWHERE = frozenset(
    {
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings", "max_length",
        "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "use_cache", "cache_implementation",
        "cache_config", "max_cache_len", "prefill_chunk_size", "output_attentions", "output_hidden_states",
        "output_scores", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile",
        "continuous_batching_config", "transformers_version", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    }
)  # fmt: skip


class Constraints:
    """The constraints of a model. `processors` makes those of a request."""

    def __init__(self, generation_config: Any, eos_ids: Collection[int] = ()) -> None:
        """
        Args:
            generation_config: transformers'. Fields that are set and not supported are named in a warning.
            eos_ids: tokens that end a text.

        Raises ValueError for a field whose value transformers refuses.
        """
        self._eos = sorted(eos_ids)
        fields = dict(_set_fields(generation_config))
        self._values = {name: fields.pop(name) for name in _MAKERS if name in fields}
        for name in fields:
            if name not in _ELSEWHERE:
                warn_once(
                    f"generation_config: {name}={fields[name]!r:.60} is not used here",
                    f"generation_config {name}",
                )
        self.processors(_Context(1, 1, self._eos, torch.device("cpu")), False)

    def processors(self, context: _Context, own_penalty: bool) -> list[Any]:
        """The LogitsProcessors of a request. own_penalty: it has a repetition penalty of its own, which replaces the
        model's."""
        import transformers

        found = []
        for name, value in self._values.items():
            if name == "repetition_penalty" and own_penalty:
                continue
            try:
                made = _MAKERS[name](transformers, value, context)
            except (ValueError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"generation_config: {name}: {value!r:.80} cannot be used: {error}") from error
            if made:
                found.append(made)
        return found

    def of(self, prompt: int, limit: int, device: torch.device, own_penalty: bool) -> list[Any]:
        """As `processors`, for a prompt of so many tokens and a limit of new tokens."""
        return self.processors(_Context(prompt, limit, self._eos, device), own_penalty) if self._values else []


def _set_fields(generation_config: Any) -> Iterator[tuple[str, Any]]:
    """The fields that are set, of those that transformers knows."""
    if generation_config is None:
        return
    for name, default in vars(type(generation_config)()).items():
        value = getattr(generation_config, name, None)
        off = (None, [], {}, default, *([_OFF[name]] if name in _OFF else []))
        if not name.startswith("_") and value not in off:
            yield name, value
