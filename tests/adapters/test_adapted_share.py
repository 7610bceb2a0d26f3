"""What share of a model is adapted, and why the rest is not."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lora_lens as ll


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def test_every_matrix_counts_once_and_the_shares_add_up(mixtral):
    adapted = ll.attach(mixtral, ll.Window.first(2))
    table = ll.adapters.coverage(adapted)
    matrices = {name: p for name, p in mixtral.named_parameters() if p.ndim > 1}
    assert table["parameters"].sum() == sum(p.numel() for p in matrices.values())
    assert {name.removesuffix(".weight") for name in matrices} == set(table["name"])
    assert table["share"].sum() == pytest.approx(1)
    states = table.set_index("name")["state"]
    assert set(states.index[states == "adapted"]) == set(ll.summary(adapted)["layer"])
    assert states["model.layers.0.mlp.experts.gate_up_proj"] == "adaptable"
    assert states["model.embed_tokens"] == states["model.layers.0.mlp.gate"] == "left out"


def test_summary_says_what_was_left_out_and_why(mixtral):
    said = repr(ll.summary(ll.attach(mixtral, ll.Window.first(2))))
    assert "Of 21,088 parameters in 9 matrices of the model:" in said
    assert (
        "not adapted: model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj" in said
    )
    assert "can be adapted and is not among the targets" in said
    assert "model.embed_tokens: is an embedding" in said
    whole = ll.summary(ll.attach(mixtral, ll.Window.first(2), targets=["all-linear", "all-experts"]))
    assert "experts" not in repr(whole).partition("\n\nOf ")[2]
    assert "<pre>Of 21,088 parameters" in whole._repr_html_()
    assert type(whole[["layer"]]) is not type(whole)  # a part of it is about less than the model


def test_a_bypassed_layer_keeps_its_reason_after_attach_and_what_is_trained_in_full_is_said():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.Sequential(model, nn.Linear(8, 8), nn.Linear(8, 3))
    adapted = ll.attach(model, ll.Window.first(2), targets="1", modules_to_save=["2"])
    table = ll.adapters.coverage(adapted).set_index("name")
    assert table["state"]["1"] == "adapted" and table["state"]["2"] == "trained in full"
    assert "bypassed" in table["why"]["0.layers.0.linear1"]
    assert "bypassed" in table["why"]["0.layers.0.self_attn.in_proj_weight"]


def test_tied_weights_count_once_and_models_of_pefts_own_methods_have_a_coverage():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    assert ll.adapters.coverage(model)["parameters"].sum() == sum(
        p.numel() for p in model.parameters() if p.ndim > 1
    )
    from peft import IA3Config, OFTConfig

    for config in (OFTConfig(oft_block_size=8), IA3Config(feedforward_modules=[])):
        adapted = ll.attach(model, ll.PeftMethod(config), targets="self_attn.*")
        table = ll.adapters.coverage(adapted)
        assert (table["state"] == "adapted").sum() == 4
        assert table["parameters"].sum() == ll.adapters.coverage(model)["parameters"].sum()


def test_a_model_without_a_matrix():
    assert ll.adapters.coverage(nn.BatchNorm1d(3)).empty
    with pytest.raises(TypeError, match="model must be a model"):
        ll.adapters.coverage(torch.ones(3))
