from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import weights

ONE = torch.ones(1)
INTS = torch.ones(4, 4, dtype=torch.int32)
BYTES = torch.ones(4, 4, dtype=torch.uint8)
F8 = torch.randn(8, 6).to(torch.float8_e4m3fn)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(tensors, path):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
@pytest.mark.parametrize("vectors", [True, False])
def test_float8_without_a_scale_is_just_numbers(tmp_path, dtype, vectors):
    weight = torch.randn(12, 10).to(getattr(torch, dtype))
    tensors = {"a.weight": weight, "logit_scale": ONE, "b.norm.scale": ONE}
    expected = torch.linalg.svdvals(weight.double())
    layer = nn.Linear(10, 12)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for source in (saved(tensors, tmp_path / "model.safetensors"), nn.ModuleDict({"a": layer})):
        found = ll.spectra(source, "a", vectors=vectors, progress=False)["a"]
        torch.testing.assert_close(found.singular_values, expected)


@pytest.mark.parametrize("beside", ["weight_scale_bf16", "scales", "weight_scale_2", "scale_shift"])
@pytest.mark.parametrize("more", [{}, {"b.weight": torch.randn(3, 3)}])
def test_float8_with_a_scale_of_unknown_meaning_is_refused_wherever_it_lies(tmp_path, beside, more):
    scale = {f"a.{beside}": ONE} | more
    with pytest.raises(ValueError, match=rf"^a holds F8_E4M3 .*\({beside}\), so it is quantized; dequantize"):
        weights(saved({"a.weight": F8} | scale, tmp_path / "one.safetensors"))
    first = saved({"a.weight": F8}, tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="is one of several files, which may hold its scale"):
        weights(first)
    saved(scale, tmp_path / "m-00002-of-00002.safetensors")
    (tmp_path / "one.safetensors").unlink()
    places = {"a.weight": first.name} | dict.fromkeys(scale, "m-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="so it is quantized"):
        weights(tmp_path)  # by the names of the files
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for source in (tmp_path, first):
        with pytest.raises(ValueError, match="so it is quantized"):
            weights(source)


@pytest.mark.parametrize(
    "beside",
    [
        *("x.a.input_scale", "x.a.w_scale", "x.a.qscale", "scaled_fp8", "weight_scales.x.a"),
        *("x.a.s", "x.a.multiplier", "x.a.weight_exponent", "x.a._extra_state"),  # whatever is in the layer
        *("x.qkv_scale", "x.weight_scale", "scales", "a_scale"),  # and what speaks of scales around it
        *("x.qkv.weight_scale", "x.a.weight.s", "x.a.weight.multiplier"),
    ],
)
def test_float8_beside_what_may_be_its_scale_is_refused(tmp_path, beside):
    with pytest.raises(ValueError, match=f"and beside it is {beside}: if they have a scale, they are wrong"):
        weights(saved({"x.a.weight": F8, beside: ONE}, tmp_path / "model.safetensors"))
    layer = nn.Linear(10, 12)
    layer.weight = nn.Parameter(F8, requires_grad=False)
    if beside.startswith("x.a.") and "." not in beside[4:]:
        layer.register_buffer(beside[4:], ONE)
        with pytest.raises(ValueError, match=r"if they have a scale, they are wrong|so it is quantized"):
            weights(layer)


def test_float8_beside_a_file_of_scales_is_refused(tmp_path):
    saved({"a.s": ONE}, tmp_path / "scales.safetensors")
    saved({"a.weight": F8}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"and beside it is scales\.safetensors: if they have a scale"):
        weights(tmp_path)


@pytest.mark.parametrize("payload", ["B", "dense_weights", "weight_int4", "bitmask"])
def test_a_quantized_model_s_layers_are_not_left_out_where_their_format_is_unknown(tmp_path, payload):
    rest = {"c.weight": torch.eye(3), "d.relative_position_index": INTS}
    saved({f"a.{payload}": INTS, "a.s": ONE} | rest, tmp_path / "model.safetensors")
    assert [w.name for w in weights(tmp_path)] == ["c"]  # nothing says that it is quantized
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "new"}}))
    with pytest.raises(ValueError, match=rf"^a holds \w+ values that need the scales.*\({payload}\)"):
        weights(tmp_path)
    assert [w.name for w in weights(tmp_path, "c")] == ["c"]


QUANTIZED = [{"quantization_config": {"quant_method": "fp8"}}, {"quantization": "fp8"}]


@pytest.mark.parametrize("facts", [*QUANTIZED, {"thinker_config": {"text_config": QUANTIZED[0]}}])
def test_the_config_tells_that_float8_is_quantized(tmp_path, facts):
    saved({"a.weight": F8, "b.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"config\.json says that the model is quantized \(fp8\)"):
        weights(tmp_path)
    assert [w.name for w in weights(tmp_path, "b")] == [
        "b"
    ]  # what a quantized model leaves in full precision


@pytest.mark.parametrize(
    ("tensors", "who"),
    [
        ({"a.W_q": BYTES, "a.scale": ONE, "a.zero": ONE}, "HQQ, which the hqq package reads"),
        ({"a.codes": BYTES, "a.codebooks": ONE, "a.scales": ONE}, "AQLM, which the aqlm package reads"),
        ({"a.weight._data": BYTES, "a.weight._scale": ONE}, "quanto, which the optimum-quanto package"),
        ({"a.indices": INTS, "a.centroids.weight": torch.ones(1, 8)}, "VPTQ, which the vptq package reads"),
        ({"a.trellis": BYTES, "a.suh": ONE, "a.svh": ONE}, "EXL3, which the exllamav3 package reads"),
        (
            {"a.q_weight": INTS, "a.q_scale": ONE, "a.q_groups": ONE},
            "EXL2, which the exllamav2 package reads",
        ),
        (
            {"a.weight": INTS.view(torch.uint32), "a.scales": ONE, "a.biases": ONE},
            "MLX, which the mlx package",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_the_name_of_the_library_that_reads_it(tmp_path, tensors, who):
    with pytest.raises(ValueError, match=rf"^a is quantized by {who}"):
        weights(saved(tensors, tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a._weight_qdata": BYTES, "a._weight_scale": ONE}, "_weight_qdata"),  # without torchao's header
        ({"a.weight": BYTES, "a.weight_scale": F8, "a.weight_scale_3": ONE, "a.absmax": ONE}, "absmax"),
        ({"a.weight": torch.ones(8, 1).bfloat16(), "a.weight.absmax": ONE}, r"weight\.absmax"),
        ({"a.weight": torch.ones(4, 4), "a.SCB": ONE}, "SCB"),
        ({"a.weight": BYTES, "a.weight_scale": ONE}, "weight_scale"),  # BitNet's
    ],
)
def test_unknown_packed_and_scaled_weights_are_refused_by_what_lies_beside_them(tmp_path, tensors, named):
    with pytest.raises(ValueError, match=rf"^a holds .* values that need the scales.*{named}"):
        weights(saved(tensors, tmp_path / "model.safetensors"))


def test_scales_of_experts_are_no_weights_and_scales_of_inputs_change_none(tmp_path):
    experts = {"mlp.experts.gate_up_proj": torch.randn(2, 8, 6).to(F8.dtype)}
    experts["mlp.experts.gate_up_proj_scale_inv"] = torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"^mlp\.experts\.gate_up_proj is quantized, .*scale_inv"):
        weights(saved(experts, tmp_path / "experts.safetensors"))
    plain = {"a.weight": torch.randn(3, 3), "a.input_scale": ONE, "a.output_scale": ONE, "a.k_scale": ONE}
    assert len(weights(saved(plain, tmp_path / "plain.safetensors"))) == 1


@pytest.mark.filterwarnings("ignore:on this CPU bitsandbytes")  # the next test asks for it
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_is_read_live_and_where_it_is_saved(tmp_path, storage):
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(**TINY, vocab_size=32)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=four_bit, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "four")
    plain, saved_ones = (
        {weight.name: weight for weight in weights(tmp_path / folder)} for folder in ("plain", "four")
    )
    assert {weight.name for weight in weights(model)} == plain.keys() == saved_ones.keys()
    for live in weights(model):
        matrix, expected = live.load().float(), plain[live.name].load().float()
        assert live.shape == plain[live.name].shape == matrix.shape
        assert 1e-3 < float((matrix - expected).norm() / expected.norm()) < 0.2
        torch.testing.assert_close(saved_ones[live.name].load().float(), matrix, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("columns", [64, 96])
def test_four_bits_are_read_across_rows_and_a_cpu_that_does_not_is_named(columns):
    layers = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    weight, x = torch.randn(16, columns), torch.randn(5, columns)
    layer = layers.Linear4bit(columns, 16, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = layers.Params4bit(weight.clone(), quant_type="nf4", requires_grad=False)
    layer.to("cpu").train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        matrix = weights(nn.Sequential(layer))[0].load()
    assert (matrix - weight).abs().mean() < 0.08  # of 4 bits; 0.16 where scales are taken for others
    as_stored = torch.allclose(layer(x), x @ matrix.T, atol=1e-4)
    assert as_stored == (not [w for w in told if "do not fill blocks of 64" in str(w.message)])
    assert as_stored or columns == 96


def test_torchao_is_read_live_and_where_it_is_saved(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = nn.Sequential(nn.Linear(32, 16)).bfloat16()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
    live = weights(model)[0].load()
    assert torch.equal(live, model[0].weight.dequantize())
    tensors, header = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata=header)
    torch.testing.assert_close(weights(tmp_path)[0].load().float(), live.float(), rtol=0.01, atol=1e-6)
