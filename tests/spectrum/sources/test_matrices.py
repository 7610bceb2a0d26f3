from __future__ import annotations

import copy
import json
import pickle
import struct

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from tiny_models import TINY
from torch import nn

from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.spectrum.sources.matrices import Weight, weights

BYTES = torch.ones(2, 2, 2, 2, dtype=torch.uint8)
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


llama = pytest.fixture(tiny_models.llama, scope="module")
gpt2 = pytest.fixture(tiny_models.gpt2, scope="module")


@pytest.fixture(scope="module")
def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **TINY | {"num_hidden_layers": 1}, num_local_experts=2, head_dim=8, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=3))


def by_name(found: list[Weight]) -> dict[str, Weight]:
    for weight in found:
        assert tuple(weight.load().shape) == weight.shape, weight.name
    assert len({w.name for w in found}) == len(found)
    return {w.name: w for w in found}


def assert_same(found: list[Weight], expected: list[Weight]) -> None:
    assert [w.name for w in found] == [w.name for w in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.load(), other.load()), one.name


# --- a model ---


def test_without_patterns_the_same_layers_in_the_same_order_as_target_layers(model):
    layers = target_layers(model)
    found = weights(model)
    assert [w.name for w in found] == list(layers)
    for weight in found:
        assert torch.equal(weight.load(), layers[weight.name].weight)


def test_a_language_model_without_its_embeddings_and_output(llama):
    found = by_name(weights(llama))
    assert list(found) == [f"model.layers.{b}.{kind}" for b in range(2) for kind in LLAMA]
    assert found["model.layers.1.mlp.down_proj"].shape == (16, 24)
    chosen = by_name(weights(llama, ["embed_tokens", "lm_head"]))
    assert torch.equal(chosen["model.embed_tokens"].load(), llama.model.embed_tokens.weight)
    assert torch.equal(chosen["lm_head"].load(), llama.lm_head.weight)


def test_gpt2_matrices_are_transposed_to_out_in(gpt2):
    found = by_name(weights(gpt2))
    assert found["transformer.h.0.mlp.c_fc"].shape == (64, 16)
    assert torch.equal(
        found["transformer.h.1.attn.c_attn"].load(), gpt2.transformer.h[1].attn.c_attn.weight.T
    )
    assert len(found) == 8


def test_each_expert_is_a_weight_of_its_own(mixtral):
    found = by_name(weights(mixtral))
    experts = mixtral.model.layers[1].mlp.experts
    assert torch.equal(found["model.layers.1.mlp.experts.down_proj[2]"].load(), experts.down_proj[2])
    assert found["model.layers.0.mlp.experts.gate_up_proj[0]"].shape == (48, 16)
    assert len(found) == 2 * (4 + 3 + 3)
    assert [w.name for w in weights(mixtral, "layers.0.mlp.experts.down_proj")] == [
        f"model.layers.0.mlp.experts.down_proj[{i}]" for i in range(3)
    ]
    assert [w.name for w in weights(mixtral, "1.mlp.experts.down_proj[2]")] == [
        "model.layers.1.mlp.experts.down_proj[2]"
    ]


def test_experts_stored_as_in_out_are_transposed(gpt_oss):
    found = by_name(weights(gpt_oss, "experts.*"))
    gate_up = found["model.layers.0.mlp.experts.gate_up_proj[1]"]
    assert gate_up.shape == (48, 16)
    assert torch.equal(gate_up.load(), gpt_oss.model.layers[0].mlp.experts.gate_up_proj[1].T)
    assert len(found) == 4


def test_gate_and_up_of_experts_apart_lie_in_halves_or_take_turns(mixtral, gpt_oss, tmp_path):
    experts = mixtral.model.layers[0].mlp.experts
    found = by_name(weights(mixtral, "all-experts", split_gate_up=True))
    assert len(found) == 2 * 3 * 3
    name = "model.layers.0.mlp.experts.gate_up_proj[2]"
    assert torch.equal(found[f"{name}[gate]"].load(), experts.gate_up_proj[2][:24])
    assert torch.equal(found[f"{name}[up]"].load(), experts.gate_up_proj[2][24:])
    assert found["model.layers.1.mlp.experts.down_proj[0]"].shape == (16, 24)
    gpt_oss.save_pretrained(tmp_path)
    for source in (gpt_oss, tmp_path):
        found = by_name(weights(source, "experts.gate_up_proj", split_gate_up=True))
        whole = gpt_oss.model.layers[0].mlp.experts.gate_up_proj[1]  # (in, out)
        assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj[1][gate]"].load(), whole[:, ::2].T)
        assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj[1][up]"].load(), whole[:, 1::2].T)


def test_all_experts_are_those_of_one_tensor_and_those_that_are_layers(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)  # one tensor each, as the hub has them
    inside = {w.name for w in weights(tmp_path, "all-experts")}
    assert inside == {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{k}"
        for i in (0, 1)
        for e in range(3)
        for k in (1, 2, 3)
    }
    assert len(weights(mixtral, "all-experts")) == 2 * 2 * 3


def test_q_k_and_v_of_multihead_attention_are_read_from_models_and_files(tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for source in (model, tmp_path):
        assert "attn.in_proj_weight" not in by_name(weights(source))
        found = by_name(weights(source, "in_proj_weight", split_qkv=True))
        assert list(found) == [f"attn.in_proj_weight[{part}]" for part in "qkv"]
        assert torch.equal(found["attn.in_proj_weight[k]"].load(), model["attn"].in_proj_weight[8:16])


def test_convolutions_are_chosen_by_pattern_as_out_by_everything_else():
    model = ConvNeXt(in_chans=3, num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    assert [w.name for w in weights(model)] == [
        f"stages.{s}.blocks.0.mlp.{fc}" for s in range(4) for fc in ("fc1", "fc2")
    ]
    (stem,) = weights(model, "stem.0")
    assert stem.shape == (8, 3 * 4 * 4)
    assert torch.equal(stem.load(), model.stem[0].weight.reshape(8, 48))


def test_a_model_under_peft_gives_its_base_weights_by_their_own_names(llama):
    expected = [(w.name, w.load().clone()) for w in weights(llama)]
    copy = transformers.LlamaForCausalLM(llama.config)
    copy.load_state_dict(llama.state_dict())
    adapted = get_peft_model(
        copy, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    )
    found = weights(adapted)
    assert [w.name for w in found] == [name for name, _ in expected]
    for weight, (_, matrix) in zip(found, expected, strict=True):
        assert torch.equal(weight.load(), matrix)
    assert [w.name for w in weights(adapted, ["0.self_attn.q_proj", "lm_head"])] == [
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ]


def test_fused_qkv_is_split_into_thirds(patch_vit, gpt2):
    q, k, v = weights(patch_vit, "0.attn.qkv", split_qkv=True)
    assert [w.name for w in (q, k, v)] == [f"blocks.0.attn.qkv[{part}]" for part in "qkv"]
    assert q.shape == (32, 32)
    assert torch.equal(torch.cat([q.load(), k.load(), v.load()]), patch_vit.blocks[0].attn.qkv.weight)
    assert [w.name for w in weights(patch_vit, "1.attn.qkv[k]", split_qkv=True)] == ["blocks.1.attn.qkv[k]"]
    key = by_name(weights(gpt2, split_qkv=True))["transformer.h.0.attn.c_attn[k]"]
    assert torch.equal(key.load(), gpt2.transformer.h[0].attn.c_attn.weight.T[16:32])


def test_qkv_mixed_by_head_stays_whole():
    config = transformers.GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    found = by_name(weights(transformers.GPTNeoXForCausalLM(config), split_qkv=True))
    assert "gpt_neox.layers.0.attention.query_key_value" in found


# --- safetensors ---


def test_a_saved_model_gives_what_the_live_one_gives(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    expected = sorted(weights(llama), key=lambda w: w.name)
    for source in (tmp_path, str(tmp_path / "model.safetensors")):
        assert_same(sorted(weights(source), key=lambda w: w.name), expected)
    assert_same(weights(tmp_path, "embed_tokens"), weights(llama, "embed_tokens"))


def test_shards_are_read_through_their_index(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = sorted(weights(llama), key=lambda w: w.name)
    assert_same(sorted(weights(tmp_path), key=lambda w: w.name), expected)
    assert_same(weights(tmp_path / "model.safetensors.index.json"), weights(tmp_path))


def test_the_config_beside_a_file_tells_what_is_transposed(gpt2, gpt_oss, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    found = by_name(weights(tmp_path / "gpt2", split_qkv=True))
    expected = by_name(weights(gpt2, split_qkv=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].load(), expected[name].load()) for name in found)
    gpt_oss.save_pretrained(tmp_path / "oss")
    experts = sorted(weights(gpt_oss, "experts.*_proj"), key=lambda w: w.name)
    assert_same(weights(tmp_path / "oss", "experts.*_proj"), experts)
    (tmp_path / "gpt2" / "config.json").unlink()
    assert by_name(weights(tmp_path / "gpt2"))["transformer.h.0.mlp.c_fc"].shape == (64, 16)  # by the shapes


def test_a_saved_mixture_of_experts_leaves_its_router_out_as_the_live_one_does(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)
    found = by_name(weights(tmp_path))
    gate_up = mixtral.model.layers[0].mlp.experts.gate_up_proj[1]
    w1 = found["model.layers.0.block_sparse_moe.experts.1.w1"]
    assert torch.equal(w1.load(), gate_up[:24])
    assert len(found) == 2 * (4 + 9)


def test_layer_10_comes_after_layer_9_and_convolutions_need_a_pattern(tmp_path):
    tensors = {f"layers.{i}.fc.weight": torch.randn(3, 2) for i in range(12)}
    tensors |= {"stem.conv.weight": torch.randn(4, 3, 2, 2), "stem.conv1d.weight": torch.randn(4, 3, 2)}
    save_file(tensors, tmp_path / "any.safetensors")
    assert [w.name for w in weights(tmp_path, "fc")] == [f"layers.{i}.fc" for i in range(12)]
    found = by_name(weights(tmp_path, "stem.*"))
    assert torch.equal(found["stem.conv"].load(), tensors["stem.conv.weight"].flatten(1))
    assert found["stem.conv1d"].shape == (4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_matrices_keep_their_stored_dtype(tmp_path, dtype):
    save_file({"a.weight": torch.randn(3, 2).to(dtype)}, tmp_path / "model.safetensors")
    (weight,) = weights(tmp_path)
    assert weight.load().dtype == (torch.float32 if dtype.itemsize == 1 else dtype)


def test_nothing_is_read_at_listing_and_weights_travel_to_other_processes(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    found = pickle.loads(pickle.dumps(weights(path)))
    assert torch.equal(found[0].load(), weights(path)[0].load())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is truncated or malformed.*download or save it"
    ):
        found[0].load()


# --- wrappers ---


def test_compiled_and_parallel_models_have_the_names_and_values_of_the_model_inside(patch_vit, tmp_path):
    expected = by_name(weights(patch_vit))
    blocks = copy.deepcopy(patch_vit)
    for i, block in enumerate(blocks.blocks):
        blocks.blocks[i] = torch.compile(block)
    save_file(dict(blocks.state_dict()), tmp_path / "compiled.safetensors")
    whole = torch.compile(patch_vit)
    for source in (whole, nn.DataParallel(patch_vit), nn.DataParallel(whole), blocks, tmp_path):
        found = by_name(weights(source))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].load(), expected[name].load()) for name in expected)


# --- what people get wrong ---


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        (3, TypeError, "targets must be a sequence of names or patterns of layers"),
        ([], ValueError, r"targets must name at least one layer, not \[\]; None is for the usual ones"),
        ([3], TypeError, "targets must hold names or patterns of layers, not 3"),
        ([""], ValueError, "targets must name at least one layer"),
        ({"qkv": 1}, TypeError, "targets must be a sequence"),
    ],
)
def test_targets_that_are_no_patterns_are_refused_by_name(patch_vit, targets, kind, message):
    with pytest.raises(kind, match=message):
        weights(patch_vit, targets)


@pytest.mark.parametrize("source", [None, [1], {"a.weight": torch.ones(2, 2)}, b"x", torch.ones(2, 2)])
def test_what_is_neither_a_model_nor_a_path_is_refused(source):
    with pytest.raises(TypeError, match="expected a model, or the path of a file or folder"):
        weights(source)


def test_what_is_no_source_says_what_to_do(tmp_path):
    with pytest.raises(
        TypeError, match="a model, or the path of a file or folder as a string or Path, not 3"
    ):
        weights(3)
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder some-model; a model on the .* is named org/model"
    ):
        weights("some-model")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected model\.safetensors"):
        weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="save the model again as safetensors"):
        weights(tmp_path)
    with pytest.raises(ValueError, match="a pickle can run code"):
        weights(tmp_path / "pytorch_model.bin")
    for name in ("a", "b"):
        save_file({"x.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several: a\.safetensors, b\.safetensors; give the path of one"):
        weights(tmp_path)
    save_file({"x": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights: expected tensors .* named \.weight"):
        weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", struct.pack("<Q", 2**60) + b"{}", b"\x02" + bytes(7) + b"[]"]
)
def test_malformed_safetensors_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or malformed"):
        weights(tmp_path)


def test_indexes_that_lead_astray_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    save_file({"a.weight": torch.ones(2, 2)}, folder / "s1.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..",
        "a\\b.safetensors",
        "x.bin",
    ):
        index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
        with pytest.raises(ValueError, match=r"which is no \.safetensors file of its own folder"):
            weights(folder)
    index.write_text(json.dumps({"weight_map": {"a.weight": "s2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names s2\.safetensors, which is not in its folder"):
        weights(folder)
    index.write_text(json.dumps({"weight_map": {"b.weight": "s1.safetensors"}}))
    with pytest.raises(ValueError, match=r"s1\.safetensors lacks b\.weight, which its index names"):
        weights(folder)
    for text, message in (("{", "no valid JSON"), ("[]", "no JSON object"), ("{}", "holds no weight_map")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            weights(folder)


def test_weights_without_usable_numbers_are_refused(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^0 is on the meta device.*load the model's weights first"):
        weights(model)
    with pytest.raises(ValueError, match=r"^0 is empty"):
        weights(nn.Sequential(nn.Linear(0, 2), nn.Linear(2, 2)))

    path = tmp_path / "model.safetensors"
    for tensors, message in (
        ({"a.weight": torch.ones(2, 2, dtype=torch.int8)}, "^a holds I8 values.*dequantize"),
        ({"a.weight": torch.ones(8, 1, dtype=torch.uint8)}, "^a holds U8 values"),
        ({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, "^a holds I32 values"),
        (
            {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.scales": torch.ones(1, 1)},
            "^a holds F8_E4M3 values that need the scales",
        ),
        ({"a.weight": torch.ones(0, 2)}, "^a is empty"),
        (
            {"a.weight": torch.ones(2, 2), "e.w_blocks": BYTES.int(), "e.w_scales": torch.ones(2, 2, 2)},
            r"^e\.w holds I32 values",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            weights(path)
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^0 holds int8 values"):
        weights(nn.Sequential(packed))


def test_a_pattern_that_matches_nothing_lists_what_could(patch_vit, tmp_path):
    with pytest.raises(
        ValueError, match=r"'q_proj' matches no weight of VisionTransformer.*attn\.qkv.*mlp\.fc1"
    ):
        weights(patch_vit, ["qkv", "q_proj"])
    save_file(dict(patch_vit.state_dict()), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"'norm1' matches no weight of .*vit\.safetensors; .*attn\.qkv"):
        weights(tmp_path / "vit.safetensors", "norm1")
    with pytest.raises(ValueError, match=r"no linear layers besides its head; choose others by name.*: 0$"):
        weights(nn.Sequential(nn.Conv2d(1, 2, 3)))
    assert {w.name for w in weights(tmp_path / "vit.safetensors")} == {w.name for w in weights(patch_vit)}
    assert load_file(tmp_path / "vit.safetensors").keys() == patch_vit.state_dict().keys()


def test_a_model_saved_with_an_adapter_in_it_says_that_its_update_is_left_out(tmp_path, llama):
    adapted = get_peft_model(copy.deepcopy(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    state = {k: t.contiguous().clone() for k, t in adapted.base_model.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="holds a model with an adapter in it; what is read are the weights"):
        found = weights(tmp_path / "model.safetensors")
    (q,) = (w for w in found if w.name == "model.layers.0.self_attn.q_proj")
    assert torch.equal(q.load(), llama.model.layers[0].self_attn.q_proj.weight)
