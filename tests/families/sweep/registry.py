"""Which model families transformers has: read from its auto classes, so that a new release brings its own."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .overrides import PARTS

#: Heads that produce tokens, the richest first: one of them is swept per family.
GENERATIVE = {
    "MULTIMODAL_LM": "multimodal",
    "IMAGE_TEXT_TO_TEXT": "multimodal",
    "VISION_2_SEQ": "multimodal",
    "SPEECH_SEQ_2_SEQ": "speech to text",
    "SEQ_TO_SEQ_CAUSAL_LM": "sequence to sequence",
    "CAUSAL_LM": "causal",
}
MASKED = {"MASKED_LM": "masked"}


class Unit(NamedTuple):
    """One model class of one family."""

    family: str  #: transformers' model_type
    kind: str
    model: str  #: name of the class in transformers
    part: str = ""  #: which of the config's configs is the model's; empty: the config itself

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    def default_config(self) -> transformers.PreTrainedConfig:
        config = getattr(transformers, CONFIG_MAPPING_NAMES[self.family])()
        return getattr(config, self.part) if self.part else config


def _mappings() -> dict[str, dict[str, str]]:
    """Task, as in MODEL_FOR_<task>_MAPPING, to model_type to class name. "BASE" is the model without a head."""
    found = {}
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            task = name.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("MAPPING_NAMES").strip("_")
            entries = getattr(modeling_auto, name)
            found[task or "BASE"] = {
                family: model if isinstance(model, str) else model[0] for family, model in entries.items()
            }
    return found


def _first(tasks: dict[str, str], mappings: dict[str, dict[str, str]], family: str) -> Unit | None:
    for task, kind in tasks.items():
        model = mappings.get(task, {}).get(family)
        if model is not None:
            return Unit(family, kind, model)
    return None


def units() -> list[Unit]:
    """A generating head and a masked one for each family that has them, else its base model, else any head."""
    mappings = _mappings()
    others = {"BASE": "encoder", **{task: task.lower().replace("_", " ") for task in sorted(mappings)}}
    found: list[Unit] = []
    for family in sorted({family for entries in mappings.values() for family in entries}):
        if family not in CONFIG_MAPPING_NAMES:
            continue
        if family in PARTS:
            found += [Unit(family, model, model, part) for model, part in PARTS[family].items()]
            continue
        heads = [_first(tasks, mappings, family) for tasks in (GENERATIVE, MASKED)]
        chosen = [unit for unit in heads if unit is not None]
        found += chosen or [unit for unit in [_first(others, mappings, family)] if unit is not None]
    return found
