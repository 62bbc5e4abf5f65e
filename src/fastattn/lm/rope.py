"""Rotary positions of a config: how many there are, and whether they depend on the length of a text."""

from __future__ import annotations

from typing import Any

#: Types whose angles depend on the position alone.
LENGTH_INDEPENDENT = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
#: Types that extend the original number of positions by `factor`.
EXTENDED = ("linear", "dynamic", "yarn")


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of each type of layer: one for all in most models, none without rotary positions."""
    found = getattr(config, "rope_parameters", None) or {}
    return [part for part in (found, *found.values()) if isinstance(part, dict) and "rope_type" in part]


def max_positions(config: Any) -> int:
    """The number of positions of a model; 2**31 if the config does not tell.

    Models that were extended to longer texts usually keep `max_position_embeddings` and add a factor.
    """
    known: int | None = getattr(config, "max_position_embeddings", None)
    if not known or known < 0:  # XLNet's config has -1
        return 2**31
    reach = []
    for settings in rope_settings(config):
        factor = settings.get("factor") if settings["rope_type"] in EXTENDED else None
        original: int = settings.get("original_max_position_embeddings") or known
        reach.append(max(known, int(original * factor)) if factor else known)
    return min(reach, default=known)


def length_independent_up_to(config: Any) -> int | None:
    """The number of tokens up to which the angle of a position does not depend on the text's length; None: any number.

    "longrope" has short factors up to the original length, and long factors for all positions of a longer text.
    "dynamic" changes with the text from `max_position_embeddings` on. 0 for types that are not known here.
    """
    least = None
    for settings in rope_settings(config):
        if settings["rope_type"] in LENGTH_INDEPENDENT:
            continue
        if settings["rope_type"] == "longrope":
            limit = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        elif settings["rope_type"] == "dynamic":
            limit = config.max_position_embeddings - 1  # a text shorter than that resets the module
        else:
            limit = 0
        least = limit if least is None else min(least, limit)
    return least


def changes_all_angles_once(config: Any) -> bool:
    """Whether all keys of a text get other angles when it grows beyond `length_independent_up_to`."""
    return any(settings["rope_type"] == "longrope" for settings in rope_settings(config))


def stores_longest_length(config: Any) -> bool:
    """Whether the rotary module stores the length of the longest text that it has processed."""
    return any("dynamic" in settings["rope_type"] for settings in rope_settings(config))
