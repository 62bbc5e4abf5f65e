"""Spread a model over ranks while it is loaded (tensor parallel)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..._compat.transformers import causal_class, distributed, layer_configs
from ...common.failures import first_line
from .attention import import_transformers

if TYPE_CHECKING:
    from ..parallel import Ranks


def spread_options(config: Any, ranks: Ranks | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments that make `from_pretrained` spread a model over the ranks; none for a single rank.

    Raises ValueError for a model without a tensor parallel plan, or with heads that the ranks do not divide.
    """
    if ranks is None or ranks.size == 1:
        return {}
    transformers = import_transformers()
    how = distributed(ranks.size)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"model: expected a causal language model: {first_line(error)}") from error
    if not model.base_model.tp_plan:
        raise ValueError(f"tp: {type(model).__name__} has no tensor parallel plan in transformers")
    text = config.get_text_config(decoder=True)
    for layer in layer_configs(text):
        heads = layer.num_attention_heads
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        if heads % ranks.size or kv_heads % ranks.size:
            raise ValueError(
                f"tp: expected a number of ranks that divides the model's {heads} heads and {kv_heads} K/V heads, "
                f"got {ranks.size}"
            )
    return {"distributed_config": how}


def create_spread(config: Any, dtype: torch.dtype, attn: str, options: dict[str, Any]) -> Any:
    """A model with random weights, of which each rank creates only its own part: transformers fills in all weights that
    a checkpoint does not have, here all of them."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists all missing weights
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "DTensor random operators", UserWarning
            )  # on CPUs the seed is not applied
            kind = causal_class(config)  # the Auto class needs a name or a path
            return kind.from_pretrained(
                None, config=config, state_dict={}, dtype=dtype, attn_implementation=attn, **options
            )
    finally:
        logging.set_verbosity(verbosity)
