"""Quantized files against the libraries that write them.

compressed-tensors, gptqmodel and comfy-kitchen are not among the test packages: where they are missing, the
same formats are written here by their specification.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import TINY
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import weights

E4M3 = torch.float8_e4m3fn
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def written(folder, tensors, settings=None, about=None, name="model.safetensors", facts=None):
    """A checkpoint as its library leaves it."""
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name, about)
    facts = (facts or {}) | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def read(folder, name="a"):
    (found,) = weights(folder, name)
    matrix = found.load()
    assert tuple(matrix.shape) == found.shape
    return matrix


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- float8 ---


def fine_grained(weight, block, scale_fmt="float"):
    settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=settings)
    found = Fp8Quantize(quantizer).convert({"a.weight": weight})
    back = Fp8Dequantize(quantizer)._dequantize_one(*found.values(), torch.float32)
    return *found.values(), back


@pytest.mark.parametrize(
    "beside", ["weight_scale_inv", "weight_scale", "scale_weight", "qscale_weight", "scale"]
)
@pytest.mark.parametrize(
    ("block", "scale_fmt"),
    [((64, 32), "float"), ((1, 32), "ue8m0"), ((192, 128), "float"), ((1, 128), "float")],
)
def test_float8_is_read_as_transformers_dequantizes_it(tmp_path, beside, block, scale_fmt):
    weight, scale, expected = fine_grained(seeded(192, 128), block, scale_fmt)
    if block == (192, 128):
        scale = scale.reshape(())  # of the whole tensor
    written(tmp_path, {"a.weight": weight, f"a.{beside}": scale}, {"quant_method": "fp8"})
    torch.testing.assert_close(read(tmp_path), expected, rtol=0, atol=0)
    spectrum = ll.spectra(tmp_path, "a", progress=False)["a"]
    torch.testing.assert_close(spectrum.singular_values, torch.linalg.svdvals(expected.double()))


def test_blocks_that_end_before_the_weight_does(tmp_path):
    # 192 = 128 + 64 rows in 2 blocks, 300 columns in 3
    weight, scale = seeded(192, 300).to(E4M3), seeded(2, 3).abs()
    expected = weight.float() * scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :300]
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    for settings in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None):
        torch.testing.assert_close(read(written(tmp_path, tensors, settings)), expected)
    with pytest.raises(
        ValueError, match=r"^a is quantized, and its parts do not fit .*weight \(192, 300\) and"
    ):
        weights(written(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [64, 64]}))


@pytest.mark.parametrize("shape", [(2, 2), (7,), (192, 5), (0, 1), (2, 3, 1)])
def test_a_scale_of_another_shape_than_its_blocks_is_refused(tmp_path, shape):
    tensors = {"a.weight": seeded(192, 300).to(E4M3), "a.weight_scale_inv": torch.ones(shape)}
    with pytest.raises(ValueError, match=r"^a is quantized, and its parts do not fit together"):
        weights(written(tmp_path, tensors, {"weight_block_size": [128, 128], "quant_method": "fp8"}))


def test_a_scale_in_another_shard(tmp_path):
    weight, scale, expected = fine_grained(seeded(64, 64), (32, 32))
    first, second = (f"m-0000{i}-of-00002.safetensors" for i in (1, 2))
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    written(tmp_path, {"a.weight": weight}, settings, name=first)
    written(tmp_path, {"a.weight_scale_inv": scale, "b.weight": torch.eye(3)}, settings, name=second)
    torch.testing.assert_close(read(tmp_path), expected)
    with pytest.raises(ValueError, match=r"^a holds F8_E4M3 values, and config.json says that the model is"):
        weights(tmp_path / first)  # nothing says where its scale is
    places = {"a.weight": first, "a.weight_scale_inv": second, "b.weight": second}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for source in (tmp_path, tmp_path / first):
        torch.testing.assert_close(read(source), expected)
    assert [w.name for w in weights(tmp_path / first)] == ["a"]
    assert [w.name for w in weights(tmp_path / second)] == ["b"]
    (tmp_path / second).unlink()
    with pytest.raises(
        ValueError, match=r"^a needs a\.weight_scale_inv, in a file that is not here; download"
    ):
        weights(tmp_path / first)
    with pytest.raises(FileNotFoundError, match=f"names {second}, which is not in its folder"):
        weights(tmp_path)


@pytest.mark.parametrize("scale", [(2, 2, 2), (2, 1, 1), (2, 64, 1), (2, 1, 64), (2,), ()])
def test_each_expert_of_a_stack_by_its_own_scale(tmp_path, scale):
    stack, factors = seeded(2, 64, 64).to(E4M3), seeded(*scale).abs()
    key, settings = "mlp.experts.down_proj", {"quant_method": "fp8", "weight_block_size": [32, 32]}
    written(tmp_path, {key: stack, f"{key}_scale_inv": factors}, settings, facts={"model_type": "mixtral"})
    whole = factors.reshape(*scale, *[1] * (3 - len(scale)))
    if scale == (2, 2, 2):
        whole = whole.repeat_interleave(32, 1).repeat_interleave(32, 2)
    with pytest.warns(UserWarning, match="neither a config with the hidden size nor their shapes"):
        found = weights(tmp_path)
    assert [w.name for w in found] == [f"{key}[0]", f"{key}[1]"]
    torch.testing.assert_close(torch.stack([w.load() for w in found]), stack.float() * whole)


# --- 4-bit floats ---


def test_gpt_oss_s_experts_are_those_of_the_live_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    config = transformers.GptOssConfig(**TINY | sizes, num_local_experts=2, head_dim=8)
    model = transformers.GptOssForCausalLM(config)
    experts = {"gate_up_proj": (2, 128, 2, 16), "down_proj": (2, 64, 2, 16)}
    tensors, at = {}, "model.layers.0.mlp.experts"
    for name, shape in experts.items():
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
        scales = torch.randint(120, 130, shape[:-1], dtype=torch.uint8)
        tensors |= {f"{at}.{name}_blocks": blocks, f"{at}.{name}_scales": scales}
        whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        getattr(model.model.layers[0].mlp.experts, name).data = whole.contiguous()
    written(tmp_path, tensors, {"quant_method": "mxfp4"}, facts={"model_type": "gpt_oss"})
    live, found = ({w.name: w for w in weights(source, f"{at}.*")} for source in (model, tmp_path))
    assert {*found} == {*live} == {f"{at}.{name}[{i}]" for name in experts for i in range(2)}
    for name, weight in found.items():
        torch.testing.assert_close(weight.load(), live[name].load(), rtol=0, atol=0)
    del tensors[f"{at}.down_proj_scales"]
    with pytest.raises(ValueError, match="down_proj holds MXFP4 blocks without their scales; download"):
        weights(written(tmp_path, tensors, {"quant_method": "mxfp4"}))


def low_nibble_first(codes):
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


@pytest.mark.parametrize("top", ["weight_scale_2", "weight_global_scale"])
def test_nvfp4_of_modelopt_and_of_compressed_tensors(tmp_path, top):
    codes = torch.randint(0, 16, (24, 64), generator=torch.Generator().manual_seed(0))
    scale, number = seeded(24, 4).abs().to(E4M3), torch.tensor([0.37])
    factor = (
        number if top == "weight_scale_2" else 1 / number
    )  # ModelOpt multiplies, compressed-tensors divides
    packed = "weight" if top == "weight_scale_2" else "weight_packed"
    tensors = {f"a.{packed}": low_nibble_first(codes), "a.weight_scale": scale, f"a.{top}": number}
    expected = FP4[codes] * (scale.float() * factor).repeat_interleave(16, 1)
    torch.testing.assert_close(read(written(tmp_path, tensors | {"a.input_scale": number})), expected)
    tensors["a.weight_scale"] = scale[:, :3]
    with pytest.raises(ValueError, match=r"do not fit together: .* \(24, 32\) and weight_scale \(24, 3\)"):
        weights(written(tmp_path, tensors))


@pytest.mark.parametrize(("packed", "kind"), [("weight", torch.int8), ("weight_packed", torch.uint8)])
def test_mxfp4_of_deepseek_and_of_compressed_tensors(tmp_path, packed, kind):
    codes = torch.randint(0, 16, (24, 64), generator=torch.Generator().manual_seed(0))
    exponents = torch.randint(120, 134, (24, 2), dtype=torch.uint8)
    beside, scale = (
        ("a.scale", exponents.view(torch.float8_e8m0fnu))
        if packed == "weight"
        else ("a.weight_scale", exponents)
    )
    written(tmp_path, {f"a.{packed}": low_nibble_first(codes).view(kind), beside: scale})
    expected = FP4[codes] * (exponents.float() - 127).exp2().repeat_interleave(32, 1)
    torch.testing.assert_close(read(tmp_path), expected, rtol=0, atol=0)


# --- ComfyUI ---


def comfy(**about):
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def test_comfyui_s_layouts_as_comfy_kitchen_dequantizes_them(tmp_path):
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorCoreMXFP8Layout, TensorCoreNVFP4Layout

    layouts = {
        "float8_e4m3fn": TensorCoreFP8Layout,
        "mxfp8": TensorCoreMXFP8Layout,
        "nvfp4": TensorCoreNVFP4Layout,
    }
    for kind, layout in layouts.items():
        weight = seeded(160, 192)
        values, params = layout.quantize(weight)
        parts = layout.state_dict_tensors(values, params)
        tensors = {f"x.a.weight{ending}": part for ending, part in parts.items()}
        expected = layout.dequantize(values, params)
        written(tmp_path, tensors | {"x.a.comfy_quant": comfy(format=kind)})
        torch.testing.assert_close(read(tmp_path), expected)
        about = json.dumps({"format_version": "1.0", "layers": {"x.a": {"format": kind}}})
        written(tmp_path, tensors, about={"_quantization_metadata": about})
        torch.testing.assert_close(read(tmp_path), expected)


def swizzled(scale):
    """The tiles of 128 x 4 in which cuBLAS takes block scales, element by element."""
    rows, columns = scale.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = torch.zeros(high * wide, 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile, r, c = row // 128 * wide + column // 4, row % 128, column % 4
            tiles[tile, r % 32 * 16 + r // 32 * 4 + c] = scale.view(torch.uint8)[row, column]
    return tiles.view(scale.dtype).reshape(high * 128, wide * 4)


def test_comfyui_s_nvfp4_by_its_specification(tmp_path):
    codes = torch.randint(0, 16, (160, 96), generator=torch.Generator().manual_seed(0))
    scale, number = seeded(160, 6).abs().to(E4M3), torch.tensor(0.37)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # the other nibble first
    tensors = {"a.weight": packed, "a.weight_scale": swizzled(scale), "a.weight_scale_2": number}
    written(tmp_path, tensors | {"a.comfy_quant": comfy(format="nvfp4")})
    torch.testing.assert_close(read(tmp_path), FP4[codes] * (scale.float() * number).repeat_interleave(16, 1))


@pytest.mark.parametrize(
    "about", [{"format": "int8_tensorwise", "convrot": True}, {"format": "asym_w4a8_int8"}, {"format": "new"}]
)
def test_comfyui_s_rotated_and_unknown_formats_are_refused(tmp_path, about):
    tensors = {"a.weight": torch.ones(8, 8, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}
    torch.testing.assert_close(read(written(tmp_path, tensors)), torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"^a holds I8 values that need the scales"):
        weights(written(tmp_path, tensors | {"a.comfy_quant": comfy(**about)}))
    header = {"_quantization_metadata": json.dumps({"layers": {"a": about}})}
    for layers in (header, {"_quantization_metadata": json.dumps({"layers": {"b": about}})}):
        with pytest.raises(ValueError, match=r"^a holds I8 values that need the scales"):
            weights(written(tmp_path, tensors, about=layers))


# --- packed integers ---


def packed_words(codes, bits):
    """Rows of integers as int32 words without gaps, lowest bits first: by Python's integers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append(
            [
                int.from_bytes(number.to_bytes(words * 4, "little")[4 * i : 4 * i + 4], "little", signed=True)
                for i in range(words)
            ]
        )
    return torch.tensor(rows, dtype=torch.int32)


def gptq(bits, order=None, less_one=True):
    """A layer (32, 64) of groups of 16 as GPTQ stores it, and the weight that it stands for."""
    torch.manual_seed(bits)
    codes, zeros = torch.randint(0, 2**bits, (64, 32)), torch.randint(1, 2**bits, (4, 32))
    scales = torch.rand(4, 32).half()
    groups = torch.arange(64) // 16 if order is None else order
    tensors = {
        "a.qweight": packed_words(codes.T, bits).T,
        "a.qzeros": packed_words(zeros - int(less_one), bits),
        "a.scales": scales,
        "a.g_idx": groups.int(),
    }
    return tensors, ((codes - zeros[groups]) * scales.float()[groups]).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, bits, kind):
    order = torch.arange(64).flip(0) % 4
    for groups in (None, order):
        tensors, expected = gptq(bits, groups, less_one=kind == "gptq")
        settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": kind}
        torch.testing.assert_close(read(written(tmp_path, tensors, settings)), expected)
    del tensors["a.g_idx"]
    _, expected = gptq(bits, less_one=kind == "gptq")
    torch.testing.assert_close(read(written(tmp_path, tensors, settings)), expected)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))  # of the older programs
    torch.testing.assert_close(read(tmp_path), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_as_gptqmodel_packs_and_dequantizes_it(tmp_path, bits):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    torch.manual_seed(bits)
    layer = nn.Linear(64, 64, bias=False)
    module = TorchLinear(bits, 32, True, False, 64, 64, False, register_buffers=True)
    zeros = torch.full((64, 2), 2.0 ** (bits - 1))
    module.pack_original(layer, torch.rand(64, 2) / 2**bits, zeros, torch.arange(64, dtype=torch.int32) // 32)
    parts = {f"a.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq_v2"}
    found = read(written(tmp_path, parts, settings))
    module.post_init()
    torch.testing.assert_close(found.to(module.scales.dtype), module.dequantize_weight().T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "no config says how its zero points are stored"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "of gptq, marlin: the gptqmodel",
        ),
        ({"quant_method": "auto-round", "bits": 4}, "of auto-round, gptq: the gptqmodel package reads it"),
    ],
)
def test_gptq_of_an_unknown_format_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=rf"^a is quantized in GPTQ's packing, .*{message}"):
        weights(written(tmp_path, gptq(4)[0], settings))


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_parts_of_gptq_that_do_not_fit_are_refused(tmp_path, part):
    tensors, _ = gptq(4)
    settings = {"quant_method": "gptq", "bits": 4}
    cut = tensors | {f"a.{part}": tensors[f"a.{part}"][:-1]}
    with pytest.raises(ValueError, match=r"^a is quantized, and its parts do not fit together"):
        weights(written(tmp_path, cut, settings))
    if part != "g_idx":
        del cut[f"a.{part}"]
        with pytest.raises(ValueError, match=rf"^a is quantized, and its {part} is missing"):
            weights(written(tmp_path, cut, settings))
    else:
        wrong = tensors | {"a.g_idx": tensors["a.g_idx"] + 1}
        with pytest.raises(ValueError, match="names groups that it has no scales for"):
            read(written(tmp_path, wrong, settings))


def test_awq(tmp_path):
    torch.manual_seed(0)
    codes, zeros, scales = (
        torch.randint(0, 16, (64, 32)),
        torch.randint(0, 16, (2, 32)),
        torch.rand(2, 32).half(),
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which column goes to the next place, as AutoAWQ's GEMM layer packs
    packed = [
        packed_words(whole.view(len(whole), -1, 8)[:, :, order].flatten(1), 4) for whole in (codes, zeros)
    ]
    tensors = {"a.qweight": packed[0], "a.qzeros": packed[1], "a.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    expected = ((codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).T
    torch.testing.assert_close(read(written(tmp_path, tensors, settings)), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_that_compressed_tensors_packs(tmp_path, bits, symmetric):
    torch.manual_seed(bits)
    codes, scale = torch.randint(0, 2**bits, (24, 48)), torch.rand(24, 3)
    zeros = torch.full((24, 3), 2 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, (24, 3))
    tensors = {"a.weight_packed": packed_words(codes, bits), "a.weight_scale": scale}
    tensors["a.weight_shape"] = torch.tensor([24, 48])
    if not symmetric:
        tensors["a.weight_zero_point"] = packed_words(zeros.T, bits).T
    expected = (codes - zeros.repeat_interleave(16, 1)) * scale.repeat_interleave(16, 1)
    torch.testing.assert_close(read(written(tmp_path, tensors)), expected)
    with pytest.raises(
        ValueError, match=r"^a is quantized, and its parts do not fit together: .*weight_scale \(23"
    ):
        weights(written(tmp_path, tensors | {"a.weight_scale": scale[:23]}))
    with pytest.raises(ValueError, match=r"^a is quantized after a transform"):
        weights(written(tmp_path, tensors, {"transform_config": {"config_groups": {"R1": {}}}}))
    with pytest.raises(ValueError, match=r"packed into \(24, 7\), which fits no or several numbers of bits"):
        weights(written(tmp_path, tensors | {"a.weight_packed": torch.ones(24, 7, dtype=torch.int32)}))
    del tensors["a.weight_shape"]
    with pytest.raises(ValueError, match=r"^a is quantized, and its weight_shape is missing"):
        weights(written(tmp_path, tensors))


@pytest.mark.parametrize(
    ("bits", "kind", "more"),
    [
        *((bits, "int", {"strategy": "group", "group_size": 32}) for bits in (2, 3, 4, 8)),
        (4, "int", {"strategy": "group", "group_size": 32, "symmetric": False}),
        (4, "int", {"strategy": "channel", "symmetric": False}),
        (8, "int", {"strategy": "channel", "dense": True}),
        (8, "int", {"strategy": "channel", "symmetric": False, "dense": True}),
        (8, "float", {"strategy": "tensor"}),
        (8, "float", {"strategy": "channel"}),
        (8, "float", {"strategy": "block", "block_structure": [32, 64]}),
        (8, "float", {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
        (4, "float", {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
        (4, "float", {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
    ],
)
def test_formats_of_compressed_tensors_as_it_decompresses_them(tmp_path, bits, kind, more):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    dense = more.pop("dense", False) if "dense" in (more := dict(more)) else False
    args = QuantizationArgs(num_bits=bits, type=kind, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight, strategy = seeded(96, 128), more["strategy"]
    shape = {"tensor": (1, 96 * 128), "channel": (96, 128), "block": (3, 32, 2, 64)}.get(strategy)
    parts = weight.reshape(shape or (96, -1, more.get("group_size", 1)))
    dims = (1, 3) if strategy == "block" else -1
    top = generate_gparam(weight.min(), weight.max()) if strategy == "tensor_group" else None
    low, high = (
        getattr(parts, end)(dim=dims, keepdim=shape is not None and strategy != "block")
        for end in ("amin", "amax")
    )
    scale, zero = calculate_qparams(low, high, args, global_scale=top)
    if "uint8" in str(more.get("scale_dtype")):
        scale = (
            scale.float().log2().floor().exp2()
            if scale.dtype != torch.uint8
            else (scale.float() - 127).exp2()
        )
    state = {"weight": weight, "weight_scale": scale.to(torch.float32), "weight_zero_point": zero}
    state |= {"weight_global_scale": top} if top is not None else {}
    name = (
        "int-quantized"
        if dense
        else {("int", bits): "pack-quantized", ("float", 8): "float-quantized"}.get((kind, bits), "")
    )
    name = name or ("nvfp4-pack-quantized" if strategy == "tensor_group" else "mxfp4-pack-quantized")
    name = "mxfp8-quantized" if bits == 8 and "uint8" in str(more.get("scale_dtype")) else name
    compressor = BaseCompressor.get_value_from_registry(name)
    saved = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(saved), scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "format": name}
    settings["config_groups"] = {"group_0": scheme.model_dump(mode="json")}
    saved = {f"a.{key}": value for key, value in saved.items() if value is not None}
    found = read(written(tmp_path, saved, settings))
    torch.testing.assert_close(
        found.to(expected.dtype), expected, rtol=1e-2 if bits == 4 and kind == "float" else 1e-6, atol=1e-6
    )


# --- bitsandbytes and torchao ---


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", False)])
def test_four_bit_of_bitsandbytes_as_it_dequantizes_it(tmp_path, storage, kind, nested):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "four")
    found = weights(tmp_path / "four")
    assert len(found) == 7
    for weight in found:
        layer = model.get_submodule(weight.name).weight
        state, shape = layer.quant_state, layer.quant_state.shape
        state.shape = torch.Size([shape.numel()])  # as one row: on some CPUs others are not read across rows
        expected = bnb.functional.dequantize_4bit(layer.data, state).reshape(shape)
        torch.testing.assert_close(weight.load().to(expected.dtype), expected, rtol=0, atol=0)


def test_eight_bit_of_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = seeded(24, 64).half()
    codes, rows, _ = functional.int8_vectorwise_quant(weight)
    tensors = {"a.weight": codes, "a.SCB": rows, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = functional.int8_vectorwise_dequant(codes, rows)
    torch.testing.assert_close(read(written(tmp_path, tensors)), expected.float(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"^a is 8-bit of bitsandbytes in the order of an old GPU"):
        weights(written(tmp_path, tensors | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=r"do not fit together: weight \(24, 64\) and SCB \(23,\)"):
        weights(written(tmp_path, tensors | {"a.SCB": rows[:23]}))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao_s_tensors_as_it_dequantizes_them(tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    settings = {"version": 2} if kind == "Int8WeightOnlyConfig" else {}
    model = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    quantization.quantize_(model, getattr(quantization, kind)(**settings))
    tensors, header = flatten_tensor_state_dict(model.state_dict())
    written(tmp_path, tensors, about=header)
    torch.testing.assert_close(read(tmp_path, "0"), model[0].weight.dequantize().float(), rtol=0, atol=0)
    missing = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale")}
    with pytest.raises(ValueError, match=r"^0 is of torchao, and its _weight_scale is missing"):
        weights(written(tmp_path, missing, about=header))
