"""A tiny config from a default one, by the names of its attributes.

Levels, tried in turn until one makes a model that runs: "tiny" gives every size a small value of its own (two query
heads to a head of keys, or without such groups), "scaled" divides the widths by one factor, "short" cuts depth and vocabulary only, "default" the vocabulary. What a rule gets
wrong shows as a model that cannot be built, never as a wrong verdict.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

LEVELS = ("tiny", "tiny without groups", "scaled", "short", "default")
VOCABULARY = 128
SPECIAL = 100  #: first id of the tokens that stand for images and the like; ordinary ones are below
POSITIONS = 128
WINDOW = 5  #: of sliding layers and chunks, shorter than the sequences
_DROPPED = {
    *("transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype", "torch_dtype"),
    *("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "_attn_implementation"),
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "layers", "num_blocks")

# The first pattern that matches an integer's name decides. None: left alone.
_TINY: list[tuple[str, Any]] = [
    (r"^output_channels$", 32),
    (r"num_pos_feats", 16),
    (r"image_embedding_size", 4),
    (r"conv_dim|patch|kernel|stride|padding|dilation|groups?_size|channel|rope_theta|num_attention_heads_per", None),
    (r"(key_value|kv)_heads|multi_query_group", "kv_heads"),
    (r"linear_num_key_heads", 2),
    (r"mamba.*heads|linear_num_value_heads|^ssm.*heads", 4),
    (r"mamba.*(head_dim|d_head)", 16),
    (r"(d_state|state_size|state_dim)$", 8),
    (r"mamba_n_groups|^n_groups$", 1),
    (r"lora_rank|lora_dim|low_rank_dim|time_step_rank|lora_r$", 16),
    (r"index_n_heads", 2),
    (r"index_head_dim", 16),
    (r"qk_head_dim", 16),
    (r"global_head_dim", 16),
    (r"head_dim|^d_kv$|head_size|dim_head|kv_channels|d_head$", 8),
    (r"(attention|num|n|swa|decoder|encoder|^)_?heads?$", 4),
    (r"intermediate|ffn_(dim|hidden)|ff_dim|d_ff|n_inner|mlp_dim|d_inner|feed_forward|ffn_embed|shared_expert_", 64),
    (r"hidden_size|hidden_dim$|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim$|^dim$|^width$", 32),
    (r"projection_dim|d_embed|lru_width|output_dim|projector_hidden|projection_hidden|pooler_output_size", 32),
]
_EVERYWHERE: list[tuple[str, Any]] = [
    (r"vocab_size$|vocab_size_per_layer_input", VOCABULARY),
    (r"^(index_topk|indexer_topk)$", 8),
    (r"^((num|n|moe_num|num_local|n_routed)_(local_|routed_)?experts|experts)$", 4),
    (r"experts_per_tok|top_?k_experts|moe_k$|moe_topk$|num_selected_experts|^top_k$", 2),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"max_source_positions", 32),
    (
        r"(max.*position_embeddings|n_positions|max_position|max_target_positions|^n_ctx|max_seq_len|max_sequence_length)",
        POSITIONS,
    ),
    (r"sliding_window(_size)?$|attention_chunk_size|local_window|attention_window_size", WINDOW),
    (r"local_attention", 2 * WINDOW),
    (r"^attention_window$", 4),
    (r"num_queries|num_query_tokens|num_latents|n_latents|num_denoising", 8),
]
_SHALLOW: list[tuple[str, Any]] = [
    (r"feat_extract_layers|feature_layer|lstm_layers|conv_layers|residual_layers|post_conv|iou_head_depth", None),
    (r"first_k_dense|num_dense_layers|num_kv_shared_layers|num_hash_layers|nextn", "at most 1"),
    (r"_(period|interval|frequency|sparse_step|every_n_layers|pattern|layer_step)$|every_n", 2),
    (r"_offset$", "at most 1"),
    (r"(hidden_)?layers?$|^depth$|_depth$|^num_blocks$|(encoder|decoder)_layers$|layers_num", 2),
]
#: What some configs leave open and their models do not.
_NONE = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_IMAGE = re.compile(r"^(image_size|img_size|pretrain_image_size|image_resolution|input_resolution)$")


def shrink(config: PreTrainedConfig, level: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A config like this one that makes a tiny model. changes: by attribute, "text_config.hidden_size" in a nested one."""
    small = _shrink(config.to_dict(), level, {})
    if level.startswith("tiny"):
        _add_sections(config, small)
    for path, value in (changes or {}).items():
        *parents, name = path.split(".")
        place = small
        for parent in parents:
            place = place[parent]
        place[name] = value
    return type(config)(**{name: value for name, value in small.items() if name != "model_type"})


def _add_sections(config: PreTrainedConfig, small: dict[str, Any]) -> None:
    """Rotary sections where the model has a default of its own, made for larger heads."""
    rope = small.get("rope_parameters")
    if (
        "mrope_section" in (config.ignore_keys_at_rope_validation or ())
        and isinstance(rope, dict)
        and "rope_theta" in rope
    ):
        rope.setdefault("mrope_section", [2, 1, 1])
        if "partial_rotary_factor" in rope:
            rope["partial_rotary_factor"] = 1.0
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig) and isinstance(small.get(name), dict):
            _add_sections(getattr(config, name), small[name])


def _shrink(old: dict[str, Any], level: str, ids: dict[int, int]) -> dict[str, Any]:
    """ids: which small token id stands for which one of the original, the same in all nested configs."""
    depth = next((old[name] for name in _DEPTHS if isinstance(old.get(name), int)), 0)
    heads = next(
        (v for k, v in old.items() if re.search(r"attention_heads$|^n_heads?$|^num_heads$", k) and isinstance(v, int)),
        4,
    )
    rules = list(_EVERYWHERE)
    cut = {} if level == "default" else _cut_layers(old, depth)
    if level != "default":
        rules += _SHALLOW
    if level.startswith("tiny"):
        rules += _TINY
    new: dict[str, Any] = {}
    for name, value in old.items():
        if name in _DROPPED and not (name in ("out_features", "out_indices") and level == "default"):
            continue
        if name in cut:
            new[name] = cut[name]
            if name == "per_layer_config":
                new[name] = {layer: _shrink(part, level, ids) for layer, part in cut[name].items()}
        elif re.search(r"drop", name) and isinstance(value, float):
            new[name] = 0.0
        elif value is None and level.startswith("tiny") and name in _NONE:
            new[name] = _NONE[name] if level == "tiny" or name == "head_dim" else None
        elif isinstance(value, dict):
            if name == "per_layer_config":
                new[name] = {layer: _shrink(part, level, ids) for layer, part in value.items()}
            elif "rope" in name:
                new[name] = _rope(value, level)
            else:
                new[name] = _shrink(value, level, ids) if "model_type" in value else value
        elif _is_token(name, value):
            new[name] = _token(name, value, ids)
        elif isinstance(value, bool) or not isinstance(value, int):
            new[name] = _image(name, value, old)
        else:
            new[name] = _number(name, value, old, rules, level, max(1, heads // 4))
    if level != "default" and depth:
        for name in _DEPTHS:
            if isinstance(new.get(name), int) and old[name] == depth:
                new[name] = len(_kept(old, depth))
    return new


def _number(name: str, value: int, old: dict[str, Any], rules: list[tuple[str, Any]], level: str, factor: int) -> Any:
    if value <= 0:
        return value
    for pattern, small in rules:
        if re.search(pattern, name):
            if small == "kv_heads":
                return 1 if value == 1 else 2 if level == "tiny" else 4
            if small == "at most 1":
                return min(value, 1)
            return value if small is None else min(value, small)
    if level == "scaled" and value % factor == 0 and value > factor:
        widths = "|".join(p for p, s in _TINY if s in (32, 64, "kv_heads") or p.startswith("(attention"))
        if re.search(widths, name):
            return value // factor
    return _image(name, value, old)


def _kept(old: dict[str, Any], depth: int) -> list[int]:
    """Which layers stay: the first two of each kind, at most six."""
    lists = [v for v in old.values() if isinstance(v, list) and len(v) == depth and depth > 2]
    lists = [v for v in lists if all(isinstance(x, (str, int, bool)) for x in v) and len({*v}) <= 4]
    if not lists:
        return list(range(min(depth, 2)))
    seen: dict[tuple[Any, ...], int] = {}
    kept = []
    for i, kind in enumerate(zip(*lists)):
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            kept.append(i)
    return kept[:6] if len(kept) > 1 else [0, 1]


def _cut_layers(old: dict[str, Any], depth: int) -> dict[str, Any]:
    """The lists that speak of layers, for the layers that stay."""
    if depth <= 2:
        return {}
    kept, cut = _kept(old, depth), {}
    for name, value in old.items():
        if name == "attention_window" and isinstance(value, list):
            cut[name] = [4] * len(kept)
            continue
        if name == "per_layer_config" and value and all(str(layer).isdigit() for layer in value):
            cut[name] = {new: value[i] for new, i in enumerate(kept) if i in value}
        if not isinstance(value, list) or not value:
            continue
        if len(value) == depth:
            cut[name] = [value[i] for i in kept]
        elif re.search(r"index|indices|idxs|_layers|layer_ids|hook_ids", name) and all(
            isinstance(x, int) for x in value
        ):
            if len(value) < depth and max(value) <= depth:
                cut[name] = sorted({min(x, len(kept) - 1) for x in value if x >= 0})[-2:] or value
    return cut


def _is_token(name: str, value: Any) -> bool:
    if not re.search(r"token_(id|index)s?$|_token$", name):
        return False
    values = value if isinstance(value, list) else [value]
    return all(isinstance(x, int) and not isinstance(x, bool) for x in values)


def _token(name: str, value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_token(name, x, ids) for x in value]
    if name.startswith("forced_"):
        return None
    fixed = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}
    for prefix, small in fixed.items():
        if name.startswith(prefix):
            return small
    if value < 0:
        return value
    return ids.setdefault(value, SPECIAL + len(ids))


def _image(name: str, value: Any, old: dict[str, Any]) -> Any:
    """Few patches a side where the patch is large, more where it is small (they are merged on the way)."""
    patch = old.get("patch_size")
    patch = patch[0] if isinstance(patch, list) and patch else patch
    if not _IMAGE.match(name) or not value:
        return value
    side = 64 if not isinstance(patch, int) else patch * (4 if patch >= 8 else 16)
    if isinstance(value, list):
        return [min(side, x) if isinstance(x, int) else x for x in value]
    return min(side, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _rope(old: dict[str, Any], level: str) -> dict[str, Any]:
    """Rotary settings for heads of 8: sections that add up to 4."""
    if not level.startswith("tiny"):
        return old
    new: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, dict):
            value = _rope(value, level)
        elif isinstance(value, list) and "section" in name:
            value = [2, 1, 1] if len(value) == 3 else [4 // len(value)] * len(value)
        elif isinstance(value, list) and "factor" in name:
            value = value[:4]
        elif name == "original_max_position_embeddings":
            value = POSITIONS // 2
        new[name] = value
    return new
