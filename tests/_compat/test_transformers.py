"""Names of transformers that changed, or that it does not promise: asked once, and what happens when one is gone."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from tiny_models import DECODERS, build
from transformers import masking_utils

from fastattn._compat import mask_functions
from fastattn._compat import transformers as questions
from fastattn._compat.versions import Gone, need
from fastattn.integrations.transformers.patterns import recognise


class Old:
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...


class New:
    def forward(self, input_ids: Any, cache: Any = None, logits_to_keep: int = 0) -> Any: ...


class Anything:
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize("model, name", [(Old(), "past_key_values"), (New(), "cache"), (Anything(), None)])
def test_the_cache_is_called_as_the_forward_calls_it(model: Any, name: str | None) -> None:
    assert questions.cache_argument(model) == name
    if name is None:
        with pytest.raises(ValueError, match="model: the forward of Anything takes no cache"):
            questions.with_cache(model, 1)
    else:
        assert questions.with_cache(model, 1) == {name: 1}
    assert questions.last_logits_only(model) == ({"logits_to_keep": 1} if name == "cache" else {})


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_every_family_takes_its_cache_without_a_warning(family: str) -> None:
    model, ids = build(family, "fastattn"), torch.arange(3, 9)[None]
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :4], **questions.with_cache(model, cache), use_cache=True)
        rest = model(ids[:, 4:], **questions.with_cache(model, cache), use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_asked_for_what_it_compiles() -> None:
    model = build("llama", "fastattn")
    assert questions.cache_argument(torch.compile(model)) == questions.cache_argument(model) is not None


@pytest.mark.parametrize(
    "question, careful",
    [
        (questions.keeps_a_state, True),
        (questions.can_switch_attention, False),
        (questions.ranks_of, 1),
    ],
)
def test_a_name_that_is_gone_gives_the_careful_answer(question: Any, careful: Any) -> None:
    assert question(Anything()) == careful


def test_what_cannot_be_done_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.AutoModelForCausalLM, "_model_mapping")
    with pytest.raises(Gone, match=r"^transformers 5\.\S+ has no .*_model_mapping.*: pip install (-U )?'tran"):
        questions.causal_class(DECODERS["llama"])
    with pytest.raises(Gone, match=r"has no transformers\.masking_utils\.nothing"):
        need("transformers", "transformers.masking_utils.nothing")
    with pytest.raises(Gone, match=r"has no transformers\.nothing\.at_all"):
        need("transformers", "transformers.nothing.at_all")


def test_mask_functions_mean_what_they_are_taken_to_mean() -> None:
    made = {name for name in mask_functions._KINDS if hasattr(masking_utils, name.split(".")[0])}
    assert made == mask_functions.UNDERSTOOD
    assert len(made) >= 7


@pytest.mark.parametrize("name", ["sliding_window_overlay", "and_masks", "causal_mask_function"])
def test_one_that_means_something_else_is_not_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a version had changed it: a window of one more, a union, no diagonal."""

    def sliding_window_overlay(sliding_window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    def and_masks(*mask_functions: Any) -> Any:
        def and_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return mask_functions[0](batch_idx, head_idx, q_idx, kv_idx)

        return and_mask

    def causal_mask_function(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < q_idx

    made: dict[str, Any] = {f.__name__: f for f in (sliding_window_overlay, and_masks, causal_mask_function)}
    changed = types.SimpleNamespace(**{**vars(masking_utils), name: made[name]})
    made[name].__qualname__ = name
    understood = mask_functions.understood(changed)
    assert mask_functions.UNDERSTOOD - understood
    monkeypatch.setattr(mask_functions, "UNDERSTOOD", understood)
    whole = masking_utils.sliding_window_causal_mask_function(3)
    assert recognise(whole) is None


def test_the_paged_cache_is_known_by_every_name() -> None:
    assert {"cache", "read_index", "write_index", "block_table"} <= set(questions.PAGED_ARGUMENTS)
