"""transformers: names that changed between 5.4 and the newest version tested, and private names."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import Any

from .versions import Gone, gone, need

#: What a forward calls the cache of keys and values: since 5.24, and before it (deprecated then, gone in 5.40).
CACHE_ARGUMENTS = ("cache", "past_key_values")

#: Arguments that an attention function gets under continuous batching, where no mask tells which keys belong to which
#: query. `cache` until 5.22; the indices since.
PAGED_ARGUMENTS = ("cache", "read_index", "write_index", "block_table")

_ATTENTION = "_attn_implementation"


def cache_argument(model: Any) -> str | None:
    """What the forward of a model, or of its body, calls its cache of keys and values; None if it names none.

    Decided by the forward's signature, not by the version: code that comes with a model may be older than transformers.
    A forward that takes any keyword may ignore a cache, so it counts as taking none.
    """
    forward = getattr(model, "_orig_mod", model).forward  # of a compiled model: the one that was compiled
    return _cache_argument(getattr(forward, "__func__", forward))


@lru_cache(maxsize=64)
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    arguments = signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in arguments), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes a cache to a model's forward, or to `generate`. ValueError: it takes none."""
    name = cache_argument(model)
    if name is None:
        raise ValueError(f"model: the forward of {type(model).__name__} takes no cache of keys and values")
    return {name: cache}


def last_logits_only(model: Any) -> dict[str, int]:
    """The keyword argument that makes a model compute logits of the last position alone; empty if it has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}


def attention_name(config: Any) -> str | None:
    """What a config's `attn_implementation` is: transformers keeps it in a private name, which all its models read."""
    found: str | None = getattr(config, _ATTENTION, None)
    return found


def set_attention_name(config: Any, name: str | None) -> None:
    setattr(config, _ATTENTION, name)


def keeps_a_state(model: Any) -> bool:
    """Whether a model has a state other than keys and values. True where transformers does not tell."""
    return bool(getattr(model, "_is_stateful", True))


def has_adapter(model: Any) -> bool:
    """Whether `from_pretrained` found an adapter beside the model and put it into its layers."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def ranks_of(model: Any) -> int:
    """Over how many ranks transformers spread a model."""
    return getattr(model, "_tp_size", None) or 1


def can_switch_attention(model: Any) -> bool:
    """Whether a model's layers call the attention that its config names. False where transformers does not tell."""
    ask = getattr(model, "_can_set_attn_implementation", None)
    return ask is not None and bool(ask())


def reads_experts_on_host(model: Any) -> bool:
    """Whether a model's experts are picked by a loop on the host, which waits for the device."""
    ask = getattr(model, "_can_set_experts_implementation", None)
    config = model.config.get_text_config(decoder=True)
    return bool(ask and ask()) and getattr(config, "_experts_implementation", None) == "eager"


def layer_configs(config: Any) -> list[Any]:
    """The config of each layer of a text model where they differ in other things than their type (since 5.14, and in
    few models); else the model's own alone, which is that of each layer."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def causal_class(config: Any) -> Any:
    """The class of a config's causal language model. Raises Gone or KeyError."""
    from transformers import AutoModelForCausalLM

    found = getattr(AutoModelForCausalLM, "_model_mapping", None)
    if found is None:
        raise Gone(gone("transformers", "transformers.AutoModelForCausalLM._model_mapping"))
    return found[type(config)]


def is_causal_family(model_type: str) -> bool:
    """Whether transformers has a causal language model of the family."""
    names = need("transformers", "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    return model_type in names


def distributed(ranks: int) -> Any:
    """How `from_pretrained` is told to spread a model over ranks. Raises ImportError before transformers 5.17."""
    try:
        return need("transformers", "transformers.distributed.configuration_utils.DistributedConfig")(tp_size=ranks)
    except (Gone, TypeError) as error:
        import transformers

        raise ImportError(f"tp: expected transformers 5.17 or later, got {transformers.__version__}") from error


def activation(name: str) -> Any:
    """An activation module of transformers'."""
    return need("transformers", "transformers.activations.ACT2FN")[name]


def modeling(family: str) -> Any:
    """The module with a family's layers, None if this version of transformers has no such family."""
    try:
        return import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None


def enable_checkpointing(model: Any) -> None:
    """Trains with activations computed anew. Newer versions warn of the older name, older versions have only that."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
