"""What the rules of `shrink` cannot know of a family. This table decides what can be built, never what is right."""

from __future__ import annotations

from typing import Any

_SERIES = {"prediction_length": 6, "context_length": 14, "lags_sequence": [1, 2], "feature_size": 4}
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
_DEEPER_RESNET = {
    **_RESNET,
    "backbone_config": {**_RESNET["backbone_config"], "out_features": ["stage2", "stage3", "stage4"]},
}

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
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100, "image_token_index": 100},
    "kosmos-2": {"latent_query_num": 4},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "chmv2": {"backbone_config.out_indices": [1, 2], "backbone_config.num_hidden_layers": 4},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "image_size": 16},
    "kimi_linear": {"num_experts": 4, "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "bailing_hybrid": {"num_experts": 4, "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 2, "num_hidden_layers": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
}

#: Families whose model has no forward of its own: the models in it, by the config that each has there.
PARTS = {
    "bark": {
        "BarkSemanticModel": "semantic_config",
        "BarkCoarseModel": "coarse_acoustics_config",
        "BarkFineModel": "fine_acoustics_config",
    },
    "musicgen": {"MusicgenForCausalLM": "decoder"},
    "musicgen_melody": {"MusicgenMelodyForCausalLM": "decoder"},
}
