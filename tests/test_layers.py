from __future__ import annotations

import pytest
from torch import nn

import lora_lens as ll
from lora_lens.heads import classifier
from lora_lens.layers import block_and_kind, part_of, target_layers


def test_patterns_select_by_the_end_of_the_name_in_whole_parts(model):
    assert list(target_layers(model, "qkv")) == [f"blocks.{b}.attn.qkv" for b in range(6)]
    assert list(target_layers(model, "blocks.[0-1].mlp.*")) == [
        f"blocks.{b}.mlp.{fc}" for b in (0, 1) for fc in ("fc1", "fc2")
    ]
    assert next(iter(target_layers(model, ["fc2", "blocks.0.attn.qkv"]))) == "blocks.0.attn.qkv"
    assert list(target_layers(model, "head")) == ["head"]


def test_without_patterns_all_linear_layers_but_the_classifier(patch_vit):
    assert len(target_layers(patch_vit)) == 8
    assert "head" not in target_layers(patch_vit)


def test_a_pattern_that_matches_nothing_lists_what_could_match(patch_vit):
    with pytest.raises(ValueError, match=r"'q_proj' matches no module.*attn.qkv.*mlp.fc1"):
        target_layers(patch_vit, "q_proj")


def test_convolutions_are_layers_too(patch_vit):
    assert list(target_layers(patch_vit, "all-conv")) == ["patch_embed.proj"]
    assert "patch_embed.proj" in target_layers(patch_vit, ["qkv", "proj"])
    assert list(target_layers(patch_vit, "attn.proj")) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_a_pattern_that_matches_only_modules_without_a_weight_says_so(patch_vit):
    with pytest.raises(ValueError, match=r"'act' matches only blocks.0.mlp.act \(GELU\)"):
        target_layers(patch_vit, "act")


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="Sequential has no linear classifier"):
        classifier(nn.Sequential(nn.Linear(2, 2)))


def test_block_and_kind():
    assert block_and_kind("blocks.3.attn.qkv") == (3, "attn.qkv")
    assert block_and_kind("model.layers.11.self_attn.q_proj") == (11, "self_attn.q_proj")
    assert block_and_kind("head") == (-1, "head")
    assert block_and_kind("0") == (0, "0")


def test_groups_go_by_type_and_by_the_usual_names(model):
    assert set(target_layers(model, "all-linear")) == set(target_layers(model))
    attention, mlp = (set(target_layers(model, group)) for group in ("all-attention", "all-mlp"))
    assert {block_and_kind(n)[1] for n in attention} == {"attn.qkv", "attn.proj"}
    assert {block_and_kind(n)[1] for n in mlp} == {"mlp.fc1", "mlp.fc2"}
    assert all("backbone" in name for name in target_layers(model, "all-conv"))
    for group in ("all-linear", "all-conv", "all-attention", "all-mlp"):
        assert set(ll.spectra(model, group, vectors=False)) == set(target_layers(model, group))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.0.attn.c_proj", "attention"),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("decoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("blk.3.attn_q", "attention"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("encoder.layer.0.output.dense", "mlp"),
        ("decoder.block.0.layer.1.DenseReluDense.wi_0", "mlp"),
        ("blk.3.ffn_up", "mlp"),
        ("layers.0.linear1", "mlp"),
        ("head", "other"),
        ("layers.0.downsample.reduction", "other"),
    ],
)
def test_the_part_that_a_layer_plays_is_told_by_its_name(name, part):
    assert part_of(name) == part


def test_a_group_without_members_says_why():
    with pytest.raises(ValueError, match=r"Sequential has no convolution that can be adapted$"):
        target_layers(nn.Sequential(nn.Linear(2, 2)), "all-conv")
    with pytest.raises(ValueError, match=r"has no convolution.*; 0 is a convolution with groups=2"):
        target_layers(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), "all-conv")
