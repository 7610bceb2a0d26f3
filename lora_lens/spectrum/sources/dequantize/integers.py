"""Packed integers: GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.dequantize.layer import Layer, Plain, Shape, as_plane, by_blocks

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which of 8 places of an int32 column i lies


def gptq_or_awq(layer: Layer) -> Plain | None:
    """Both keep qweight, qzeros and scales (groups, out); the shapes tell them apart."""
    if "qweight" not in layer.tensors or not {"qzeros", "scales"} & layer.tensors.keys():
        return None
    if missing := {"qzeros", "scales"} - layer.tensors.keys():
        raise InputError(
            f"is quantized, and its {listed(sorted(missing))} is missing; download or save it again"
        )
    if not layer.holds("qweight", "qzeros", "scales", maybe=("g_idx",)) or layer.stacked:
        return None
    if {layer.dtype("qweight"), layer.dtype("qzeros")} != {"I32"}:
        return None
    shapes = [layer.shape(part) for part in ("qweight", "qzeros", "scales")]
    layer.require(all(len(shape) == 2 for shape in shapes), "qweight", "qzeros", "scales")
    (high, wide), (groups, zeros), (count, out) = shapes
    layer.require(groups == count > 0, "qzeros", "scales")
    if wide == out:
        return _gptq(layer, high, out, groups, zeros)
    if wide * 8 != out or "g_idx" in layer.tensors:
        return None
    layer.require(zeros == wide and high % groups == 0, "qweight", "qzeros", "scales")
    return Plain((out, high), partial(_read_awq, layer), True)


def _gptq(layer: Layer, high: int, out: int, groups: int, zeros: int) -> Plain | None:
    bits = layer.settings.get("bits")
    if "g_idx" in layer.tensors and (size := math.prod(layer.shape("g_idx"))):
        ways = [b for b in (2, 3, 4, 8) if high * 32 == size * b]
        layer.require(len(ways) == 1, "qweight", "g_idx")
        bits = ways[0]
    elif bits not in (2, 3, 4, 8):
        return None
    else:
        size = high * 32 // bits
        layer.require(high * 32 % bits == 0 and size % groups == 0, "qweight", "scales")
    layer.require(zeros == -(-out * bits // 32), "qzeros", "scales")
    kind = layer.settings.get("checkpoint_format", "gptq")
    method = str(layer.settings.get("quant_method", "gptq" if "bits" in layer.settings else ""))
    if kind not in ("gptq", "gptq_v2") or method != "gptq":
        what = f"of {method}, {kind}" if method else "and no config says how its zero points are stored"
        raise InputError(
            f"is quantized in GPTQ's packing, {what}: the gptqmodel package reads it; add the config.json or "
            "quantize_config.json that belongs to it, dequantize the model, or choose others by name"
        )
    return Plain((out, size), partial(_read_gptq, layer, bits, size, kind == "gptq"), True)


def _read_gptq(layer: Layer, bits: int, size: int, less_one: bool, expert: int | None) -> Tensor:
    scales = layer.read("scales").float().T.contiguous()  # (out, groups)
    codes = _unpacked(layer.read("qweight").T.contiguous(), bits, size)
    zeros = _unpacked(layer.read("qzeros"), bits, len(scales)).T
    if less_one:  # the first format stores the zero point less one
        zeros = (zeros + 1) & (2**bits - 1)
    groups = layer.read("g_idx").flatten() if "g_idx" in layer.tensors else None
    if groups is not None and len(groups) == 0:
        groups = None
    return _affine(codes, scales, zeros, groups)


def _read_awq(layer: Layer, expert: int | None) -> Tensor:
    codes, zeros = (_awq_columns(layer.read(part)) for part in ("qweight", "qzeros"))
    return _affine(codes.T.contiguous(), layer.read("scales").float().T.contiguous(), zeros.T, None)


def _awq_columns(words: Tensor) -> Tensor:
    codes = _unpacked(words, 4, 8 * words.shape[1])
    return codes.view(len(words), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)


def packed_integers(layer: Layer) -> Plain | None:
    """compressed-tensors' pack-quantized: integers of 1 to 8 bits, of which 2^(bits - 1) was added."""
    more = ("weight_zero_point", "weight_shape", "weight_g_idx")
    if not layer.holds("weight_packed", "weight_scale", maybe=more) or layer.dtype("weight_packed") != "I32":
        return None
    if "weight_shape" not in layer.tensors:
        raise InputError(
            "is quantized, and its weight_shape is missing; download or save it again, or choose others by "
            "name"
        )
    if layer.settings.get("transform_config"):
        raise InputError(
            "is quantized after a transform (config.json's transform_config), which compressed-tensors "
            "undoes in the model; choose others by name"
        )
    shape = tuple(int(size) for size in layer.read("weight_shape").flatten().tolist())
    packed, scale = layer.shape("weight_packed"), layer.shape("weight_scale")
    layer.require(len(packed) == len(shape) > 1 and packed[:-1] == shape[:-1], "weight_packed")
    columns = shape[-1]
    ways = [bits for bits in range(1, 9) if packed[-1] == -(-columns * bits // 32)]
    if len(ways) > 1:  # of few columns; then the config decides
        ways = [bits for bits in ways if bits in _named_bits(layer.settings)]
    if len(ways) != 1:
        raise InputError(
            f"of shape {shape} is packed into {packed}, which fits no or several numbers of bits; the "
            "compressed-tensors package that wrote it reads it; choose others by name"
        )
    groups = math.prod(scale[len(shape) - 1 :])
    rows_fit = scale[: len(shape) - 1] == shape[:-1] or math.prod(scale) == 1
    ordered = "weight_g_idx" in layer.tensors
    layer.require(
        rows_fit and groups > 0 and (ordered or columns % groups == 0), "weight_packed", "weight_scale"
    )
    if "weight_zero_point" in layer.tensors:
        expected = (*shape[:-2], -(-shape[-2] * ways[0] // 32), groups)
        layer.require(layer.shape("weight_zero_point") == expected, "weight_scale", "weight_zero_point")
    return Plain(shape, partial(_read_packed_integers, layer, ways[0], shape), True)


def _read_packed_integers(layer: Layer, bits: int, shape: Shape, expert: int | None) -> Tensor:
    rows, columns = shape[-2:]
    codes = _unpacked(layer.read("weight_packed", expert), bits, columns)
    scale = as_plane(layer, "weight_scale", expert).expand(rows, -1)
    if "weight_zero_point" in layer.tensors:
        words = layer.read("weight_zero_point", expert)
        zeros = _unpacked(words.T.contiguous(), bits, rows).T  # both have the same offset
    else:
        zeros = torch.full((1, 1), 2 ** (bits - 1), dtype=torch.uint8).expand(scale.shape)
    groups = layer.read("weight_g_idx", expert) if "weight_g_idx" in layer.tensors else None
    return _affine(codes, scale, zeros, groups)


def _named_bits(settings: Mapping[str, Any]) -> set[object]:
    groups = settings.get("config_groups")
    parts = groups.values() if isinstance(groups, Mapping) else ()
    found = (part.get("weights") for part in parts if isinstance(part, Mapping))
    return {part.get("num_bits") for part in found if isinstance(part, Mapping)}


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of each row of int32 words, packed without gaps, lowest bits first."""
    rows, width = words.shape
    missing = -width % bits
    words = torch.nn.functional.pad(words, (0, missing)) if missing else words
    codes = torch.empty(rows, words.shape[1] // bits * 32, dtype=torch.uint8)
    for i in range(32):  # the bits of one in 32 lie at the same place of a word, or of two
        word, shift = divmod(i * bits, 32)
        part = (words[:, word::bits] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            more = words[:, word + 1 :: bits] & ((1 << (shift + bits - 32)) - 1)
            part |= more << (32 - shift)
        codes[:, i::32] = part
    return codes[:, :count]


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None) -> Tensor:
    """(codes - zeros) * scales, where scales and zeros (rows, groups) hold for groups of columns.

    Args:
        groups: the group of each column; None if they follow one another.
    """
    values = codes.float()
    if groups is not None:
        if len(groups) != values.shape[1] or int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
            raise InputError("a quantized layer names groups that it has no scales for; download it again")
        places = groups.long()
        values -= zeros[:, places]
        values *= scales[:, places]
        return values
    blocks = (1, values.shape[1] // scales.shape[1])
    by_blocks(values, zeros.float(), blocks, torch.Tensor.sub_)
    return by_blocks(values, scales, blocks, torch.Tensor.mul_)
