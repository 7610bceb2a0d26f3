"""Every family of the zoo: the modules of timm and the model types of transformers, and how each is built."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.inputs import image_for, inputs_for
from zoo.small_configs import small_config

# In this order: what most people fine-tune comes first.
TASKS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_MAPPING",
)
TASKS += tuple(
    sorted(
        n for n in vars(modeling_auto) if n.endswith("_MAPPING") and n.startswith("MODEL_") and n not in TASKS
    )
)


def transformers_class(model_type: str) -> type[nn.Module] | None:
    """The class that is tried for a model type; None for parts of other types, which have none."""
    config = CONFIG_MAPPING[model_type]
    for task in TASKS:
        mapping = getattr(modeling_auto, task)
        if config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, tuple) else found
    return None


def build(family: str) -> tuple[nn.Module, Any]:
    """A model and its input; ``family`` is "timm:<model>" or "transformers:<model type>"."""
    torch.manual_seed(0)
    library, _, name = family.partition(":")
    if library == "timm":
        model = timm.create_model(name, **TIMM_SETTINGS.get(name, {}))
        return model.eval(), (image_for(model.pretrained_cfg),)
    kind = transformers_class(name)
    if kind is None:
        raise LookupError("a part of another type, without a class of its own")
    model = kind._from_config(small_config(CONFIG_MAPPING[name], SETTINGS.get(name))).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # no trained one is zero, where a window does not learn
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model, inputs_for(model)


def timm_models() -> list[str]:
    return [f"timm:{name}" for name in TIMM]


def transformers_types() -> list[str]:
    return [f"transformers:{name}" for name in sorted(CONFIG_MAPPING.keys())]


TWO_STAGES = {
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 2],
}
# What a type needs besides small sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 8, "embedding_size": 16},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 2], "depth": [1, 1, 1]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "donut-swin": TWO_STAGES,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"hidden_dim": 2560, "image_size": 64},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "informer": {"prediction_length": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "led": {
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"pad_token_id": 0},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "swin": TWO_STAGES,
    "swinv2": TWO_STAGES,
}
# The smallest model of each module of timm.
TIMM = [
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "ens_adv_inception_resnet_v2",
    "adv_inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "jx_nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
]
TIMM_SETTINGS: dict[str, dict[str, Any]] = {
    "vgg11": {"num_features": 64},
}
