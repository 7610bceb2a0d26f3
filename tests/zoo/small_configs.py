"""A small configuration for any model type of transformers, made from its configuration class alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import transformers

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS, IMAGE, PATCH = 64, 4, 2, 128, 256, 32, 8

# The first pattern that matches a setting's whole name gives its small value, if it is a number by default.
SMALL = [
    (r".*vocab_size.*", VOCABULARY),
    (r"(num_|n_)?(local_|routed_|total_)?experts|num_.*_experts|moe_num_experts|n_routed_experts", 4),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r".*experts_per_tok.*|moe_topk|moe_k|.*top_k_experts|num_selected_experts", 2),
    (r"n_group|topk_group|moe_layer_freq", 1),
    (r"first_k_dense_replace|num_dense_layers|mlp_only_layers", 1),
    (r"moe_intermediate_size.*|expert_ffn_hidden_size|shared_expert_intermediate_size", 48),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim|qk_head_dim|index_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|multi_query_group_num|kv_heads|n_head_kv).*", 2),
    (r".*(num_.*heads|num_heads|n_heads?|attention_heads).*|index_n_heads", HEADS),
    (r".*(num_.*layers?|n_layers?|encoder_layers|decoder_layers|num_blocks|depth)", LAYERS),
    (r".*(intermediate|ffn|feed_forward|feedforward|inner|mlp|fc).*(size|dim)|d_ff|n_inner", 96),
    (r"head_dim|d_kv|attention_head_dim|attention_head_size|kv_channels|head_size|global_head_dim", 16),
    (
        r"(.*_)?(hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|emb_dim|hidden_channels)"
        r"|d_model|n_embd|dim|width|hidden_size_.*|encoder_hidden|projection_dim|.*proj_dim|q_hidden_size"
        r"|lru_width|time_step_rank|dims|conv_dim|output_hidden_size|out_hidden_size",
        WIDTH,
    ),
    (r"(max_|n_|num_).*(position|ctx|positions|seq_len|sequence_length).*|max_seqlen", POSITIONS),
    (r"(.*_)?(image_size|img_size|input_size|crop_size)", IMAGE),
    (r"(.*_)?patch_size", PATCH),
]
SECTIONED = r"glm4v|glm46v|glm_ocr|glm_image|glmga|qwen2_vl|qwen2_5_vl|qwen2_5_omni|paddleocr|ernie4_5_vl"
TOKENS = re.compile(r".*_(token_id|token_index|id)")


def small_config(config_class: type, given: Mapping[str, Any] | None = None) -> Any:
    """An instance with small sizes; ``given`` has the settings that a type needs otherwise."""
    return config_class(**small_settings(config_class, given))


def small_settings(config_class: type, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    given = dict(given or {})
    default = config_class()
    names = [
        n
        for n in inspect.signature(config_class.__init__).parameters
        if n == "rope_parameters" or _value(default, n) is not None
    ]
    settings: dict[str, Any] = {}
    token = 3
    for name in names:
        value = _value(default, name)
        if isinstance(value, transformers.PreTrainedConfig):
            inner = small_settings(type(value), given.pop(name, None))
            settings[name] = inner | {"model_type": value.model_type}
            continue
        if name == "rope_parameters" and re.search(SECTIONED, config_class.model_type):
            sections = [2, 1, 1] if "glm4v_moe" in config_class.model_type else [2, 3, 3]
            settings[name] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
            settings[name] |= {"partial_rotary_factor": 0.5} if sections == [2, 1, 1] else {}
            continue
        small = next((small for pattern, small in SMALL if re.fullmatch(pattern, name)), None)
        if isinstance(value, bool):
            continue
        if TOKENS.fullmatch(name):
            if isinstance(value, int) and value >= VOCABULARY:
                token += 1
                settings[name] = VOCABULARY - token
        elif isinstance(value, int) and small is not None:
            if "kv_heads" in name or "key_value_heads" in name:
                heads = _value(
                    default, name.replace("num_kv_", "num_").replace("num_key_value_", "num_attention_")
                )
                small = HEADS if value == heads or hasattr(default, "kv_lora_rank") else small
            settings[name] = min(value, small) if value > 0 else value
        elif isinstance(value, dict) and "mrope_section" in value:
            half = int(16 * value.get("partial_rotary_factor", 1)) // 2
            settings[name] = value | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
        elif isinstance(value, (list, tuple)) and value:
            short = _short(name, value, default, small)
            if short is not None:
                settings[name] = short
    return settings | given


def _value(config: Any, name: str) -> Any:
    """A setting; None where it is not set, or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # such as Gemma 4's own error for settings of single layers
        return None


def _short(name: str, value: list | tuple, default: Any, small: int | None) -> list | tuple | None:
    kind = type(value)
    if "depth" in name and all(isinstance(v, int) for v in value):
        return kind(1 for _ in value)
    if "heads" in name and all(isinstance(v, int) for v in value):
        return kind(min(v, 2) for v in value)
    layers = getattr(default, "num_hidden_layers", None)
    if isinstance(layers, int) and len(value) == layers and layers > LAYERS:
        kept = [value[0], next((v for v in value if v != value[0]), value[0])]
        return kind(kept)
    widths = small in (WIDTH, 96) or name in ("hidden_sizes", "embed_dims", "embed_dim", "widths")
    if widths and all(isinstance(v, int) for v in value):
        return kind(16 * (1 + i) for i in range(len(value)))
    if small in (IMAGE, PATCH) and all(isinstance(v, int) for v in value):
        return kind(min(v, small) for v in value)
    return None
