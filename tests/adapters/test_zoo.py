"""A fixed part of the zoo, one family of each kind that has gone wrong somewhere; ``make zoo`` tries all."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING
from zoo.checks import check
from zoo.families import build

FAMILIES = [
    "timm:test_byobnet",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:test_vit",
    "transformers:albert",
    "transformers:bart",
    "transformers:clip",
    "transformers:deberta-v2",
    "transformers:deepseek_v3",
    "transformers:distilbert",
    "transformers:ernie4_5_moe",
    "transformers:falcon",
    "transformers:gemma4_text",
    "transformers:glm4_moe",
    "transformers:gpt2",
    "transformers:gpt_oss",
    "transformers:inkling2_text",
    "transformers:jamba",
    "transformers:layoutlmv3",
    "transformers:llama",
    "transformers:mamba",
    "transformers:mixtral",
    "transformers:qwen2_moe",
    "transformers:qwen2_vl",
    "transformers:qwen3_next",
    "transformers:roberta",
    "transformers:swin",
    "transformers:t5",
    "transformers:wav2vec2",
    "transformers:whisper",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_exactly_exported_and_read_back(family: str) -> None:
    source, name = family.split(":")
    if source == "transformers" and name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers does not have {name}")
    model, inputs = build(family)
    row = check(model, inputs)
    assert row.layers > 0
    assert not row.problems
