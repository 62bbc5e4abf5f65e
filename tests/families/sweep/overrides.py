"""What the rules of `shrink` cannot know of a family. This table decides what can be built, never what is right."""

from __future__ import annotations

from typing import Any

_SERIES = {"prediction_length": 6, "context_length": 14, "lags_sequence": [1, 2]}
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
}
_DEEPER_RESNET = {**_RESNET, "backbone_config": {**_RESNET["backbone_config"], "out_features": ["stage2", "stage3", "stage4"]}}

#: By family: attributes of the tiny config.
CHANGES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": {**_SERIES, "sampling_factor": 1},
    "time_series_transformer": _SERIES,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _DEEPER_RESNET,
    "detr": _RESNET,
    "table-transformer": _RESNET,
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma4_assistant": {},
}
