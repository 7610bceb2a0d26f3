from __future__ import annotations

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lens.spectrum.sources.matrices import weights
from lora_lens.spectrum.sources.roles import is_embedding

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 40,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 1,
    "n_heads": 4,
    "num_mel_bins": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "embedding_size": 16,
}


def small(kind: str):
    """A model of a transformers class with whatever sizes its config has set small."""
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    known = vars(made.config_class())
    chosen = {key: value for key, value in SMALL.items() if key in known and type(known[key]) is type(value)}
    return made(made.config_class(**chosen))


def matrices(source) -> dict[str, torch.Tensor]:
    return {w.name: w.load() for w in weights(source)}


@pytest.mark.parametrize(
    "kind",
    [
        "WhisperForConditionalGeneration",  # 1-D convolutions, positions, a tied head
        "Wav2Vec2ForCTC",
        "Wav2Vec2ForXVector",
        "MambaForCausalLM",
        "T5ForConditionalGeneration",  # relative_attention_bias
        "RobertaForSequenceClassification",  # classifier.dense, classifier.out_proj
        "DistilBertForSequenceClassification",  # pre_classifier
        "BertForQuestionAnswering",
        "AlbertForMaskedLM",  # embedding_hidden_mapping_in is linear
        "ModernBertForMaskedLM",
        "GptOssForCausalLM",  # experts stored (in, out)
        "JetMoeForCausalLM",
        "SwitchTransformersForConditionalGeneration",
    ],
)
def test_a_model_and_its_own_file_list_the_same_weights(tmp_path, kind):
    model = small(kind)
    model.save_pretrained(tmp_path)
    live, stored = matrices(model), matrices(tmp_path)
    assert live.keys() == stored.keys()
    for name, matrix in live.items():
        assert torch.equal(matrix, stored[name]), name


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM"])
def test_experts_that_are_saved_under_other_names_have_the_same_values(tmp_path, kind):
    model = small(kind)
    model.save_pretrained(tmp_path)
    live, stored = matrices(model), matrices(tmp_path)
    assert live.keys() != stored.keys()
    sums = [sum(matrix.square().sum() for matrix in found.values()) for found in (live, stored)]
    torch.testing.assert_close(*sums)  # routers are in neither
    shapes = [
        {m.shape for n, m in found.items() if "down" in n or "w2" in n or "output" in n}
        for found in (live, stored)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "name",
    [
        "levit_128s",
        "crossvit_9_240",
        "caformer_s18",
        "mambaout_femto",
        "mixer_s32_224",
        "efficientvit_b0",
        "cpubone_nano",
    ],
)
@pytest.mark.parametrize("config", [False, True])
def test_timm_models_and_their_files_list_the_same_weights(tmp_path, name, config):
    if not timm.is_model(name):
        pytest.skip(f"this version of timm does not have {name}")
    model = timm.create_model(name)
    if config:
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    else:
        state = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    assert {w.name for w in weights(model)} == {w.name for w in weights(tmp_path)}


def qwen3_vl_moe(path, transposed: bool, facts: dict | None, inner: int = 40) -> dict[str, torch.Tensor]:
    """A file as the hub has them, (experts, in, out), or as transformers holds them."""
    tensors = {
        "mlp.experts.gate_up_proj": torch.randn(3, 2 * inner, 32),
        "mlp.experts.down_proj": torch.randn(3, 32, inner),
    }
    stored = {k: t.mT.contiguous() if transposed else t for k, t in tensors.items()}
    save_file(stored, path / "model.safetensors")
    if facts is not None:
        (path / "config.json").write_text(json.dumps(facts))
    return tensors


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [40, 32, 16])
@pytest.mark.parametrize(
    "facts", [None, {"model_type": "x", "text_config": {"hidden_size": 32, "num_experts": 3}}]
)
def test_which_way_round_experts_are_is_read_from_their_shapes(tmp_path, transposed, inner, facts):
    tensors = qwen3_vl_moe(tmp_path, transposed, facts, inner)
    for weight in weights(tmp_path):
        name, _, number = weight.name.removesuffix("]").partition("[")
        assert torch.equal(weight.load(), tensors[name][int(number)]), weight.name


def test_experts_that_could_be_either_way_round_are_read_with_a_warning(tmp_path):
    tensors = {"mlp.experts.up_proj": torch.randn(3, 24, 32), "mlp.experts.down_proj": torch.randn(3, 32, 24)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"mlp\.experts\.down_proj, mlp\.experts\.up_proj are read as \(experts, out"
    ):
        weights(tmp_path)
    save_file(tensors | {"mlp.gate.weight": torch.randn(3, 24)}, tmp_path / "model.safetensors")
    (up,) = weights(tmp_path, "up_proj[0]")  # the router takes 24, so up takes 24
    assert torch.equal(up.load(), tensors["mlp.experts.up_proj"][0].T)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "num_experts": 3}))
    (up,) = weights(tmp_path, "up_proj[0]")
    assert torch.equal(up.load(), tensors["mlp.experts.up_proj"][0])


@pytest.mark.parametrize("linear", [False, True])
def test_c_attn_is_read_the_way_round_that_its_shape_says(tmp_path, linear):
    """GPT-2 stores (in, out), nanoGPT and CLIP's c_fc (out, in), under the same names."""
    shapes = {"h.0.attn.c_attn": (48, 16), "h.0.attn.c_proj": (16, 16), "h.0.mlp.c_fc": (64, 16)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    stored = {f"{n}.weight": t if linear else t.T.contiguous() for n, t in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert {w.name: w.shape for w in weights(tmp_path)} == shapes
    assert all(torch.equal(w.load(), tensors[w.name]) for w in weights(tmp_path))


def test_a_bilinear_layer_and_one_dimensional_convolutions_are_no_experts(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "pair": nn.Bilinear(3, 4, 5), "proj": nn.Conv1d(3, 4, 2)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert [w.name for w in weights(model)] == [w.name for w in weights(tmp_path)] == ["a"]
    assert weights(tmp_path, "proj")[0].shape == weights(model, "proj")[0].shape == (4, 6)
    assert load_file(tmp_path / "model.safetensors")["pair.weight"].ndim == 3


@pytest.mark.parametrize(
    ("name", "looked_up"),
    [
        ("transformer.w", True),  # CTRL
        ("query", True),  # EoMT
        ("text_model.model.segment_emb", True),  # Kosmos-2.5
        ("encoder.layer.0.attention.self.query", False),
        ("model.altup_unembed_projections.0", False),  # Gemma 3n
        ("model.embed_tokens_per_layer", True),
    ],
)
def test_embeddings_are_told_by_their_names(name, looked_up):
    assert is_embedding(name) == looked_up
