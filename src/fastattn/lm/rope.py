"""What a model's rotary positions say of the lengths of its texts."""

from __future__ import annotations

from typing import Any

#: Kinds whose angles depend on the position alone.
FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
#: Kinds that reach `factor` times as far as the model did before it was extended.
STRETCHED = ("linear", "dynamic", "yarn")


def parts(config: Any) -> list[dict[str, Any]]:
    """The settings of each kind of layer; one for all in most models, [] for a model without rotary positions."""
    found = getattr(config, "rope_parameters", None) or {}
    return [part for part in (found, *found.values()) if isinstance(part, dict) and "rope_type" in part]


def longest(config: Any) -> int:
    """How many positions a model has; 2**31 where nothing says it.

    The published way to longer texts leaves max_position_embeddings as it was and adds a factor.
    """
    known: int | None = getattr(config, "max_position_embeddings", None)
    if not known or known < 0:  # XLNet says -1
        return 2**31
    reach = []
    for part in parts(config):
        factor = part.get("factor") if part["rope_type"] in STRETCHED else None
        original: int = part.get("original_max_position_embeddings") or known
        reach.append(max(known, int(original * factor)) if factor else known)
    return min(reach, default=known)


def fixed_up_to(config: Any) -> int | None:
    """The number of tokens up to which the angles of a position do not depend on how long the text is; None: always.

    "longrope" has short factors up to the original length and long ones beyond, for all positions then. "dynamic"
    grows with the text, from max_position_embeddings on.
    """
    least = None
    for part in parts(config):
        if part["rope_type"] in FIXED:
            continue
        if part["rope_type"] == "longrope":
            here = part.get("original_max_position_embeddings") or config.max_position_embeddings
        elif part["rope_type"] == "dynamic":
            here = config.max_position_embeddings - 1  # what grew is put back by a text that is shorter than that
        else:
            here = 0  # nobody knows
        least = here if least is None else min(least, here)
    return least


def is_turned_anew(config: Any) -> bool:
    """Whether a text that grows beyond `fixed_up_to` has all its keys turned by other angles, once."""
    return any(part["rope_type"] == "longrope" for part in parts(config))


def remembers(config: Any) -> bool:
    """Whether the rotary module remembers the longest text that it has seen."""
    return any("dynamic" in part["rope_type"] for part in parts(config))
