"""4-bit floats, two in a byte: MXFP4 and NVFP4."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens.spectrum.sources.dequantize.comfy import of_comfy, padded_count, unswizzled
from lora_lens.spectrum.sources.dequantize.layer import (
    EXPONENTS,
    Layer,
    Plain,
    by_blocks,
    by_table,
    scale_numbers,
)

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(layer: Layer) -> Plain | None:
    """gpt-oss: blocks of 32 along the input, 16 bytes each, and the exponent of each block."""
    for blocks, scales in (("blocks", "scales"), ("weight.blocks", "weight.scales")):
        if layer.holds(blocks, scales) and layer.dtype(blocks) == "U8" == layer.dtype(scales):
            *first, count, size = layer.shape(blocks)
            layer.require(layer.shape(scales) == (*first, count), blocks, scales)
            return Plain((*first, 2 * count * size), partial(_read_fp4, layer, blocks, scales, ""), True)
    if "blocks" in layer.tensors and layer.dtype("blocks") == "U8" and len(layer.shape("blocks")) > 2:
        raise InputError(
            "holds MXFP4 blocks without their scales; download or save it again, or choose others by name"
        )
    return None


def packed_fp4(layer: Layer) -> Plain | None:
    """NVFP4 and MXFP4 of ModelOpt, compressed-tensors, DeepSeek and ComfyUI: one scale for 16 or 32."""
    packed = "weight_packed" if "weight_packed" in layer.tensors else "weight"
    scale = next((part for part in ("weight_scale", "scale") if part in layer.tensors), "")
    top = next((part for part in ("weight_scale_2", "weight_global_scale") if part in layer.tensors), "")
    if not scale or not layer.holds(packed, scale, maybe=(top, "comfy_quant")):
        return None
    of_scale = layer.dtype(scale)
    nv = of_scale == "F8_E4M3" and bool(top) and layer.dtype(packed) == "U8"
    mx = of_scale in EXPONENTS and not top and layer.dtype(packed) in ("U8", "I8")
    comfy = of_comfy(layer)
    if not (nv or mx) or comfy.get("format", "nvfp4") != "nvfp4" or (comfy and not nv):
        return None
    *first, bytes_in = layer.shape(packed)
    group = 16 if nv else 32
    fits = bytes_in * 2 // group == (layer.shape(scale) or (0,))[-1] and layer.shape(scale)[:-1] == (*first,)
    if comfy:
        fits = math.prod(layer.shape(scale)) == padded_count(first[-1], bytes_in * 2 // group)
    if mx and not fits and 3 * layer.shape(scale)[-1] * 8 == bytes_in:
        return None  # 6-bit floats
    layer.require(fits and bytes_in * 2 % group == 0, packed, scale)
    if top:
        of_each = layer.stacked and math.prod(layer.shape(top)) == first[0]
        layer.require(math.prod(layer.shape(top)) == 1 or of_each, packed, top)
    return Plain((*first, 2 * bytes_in), partial(_read_fp4, layer, packed, scale, top), True)


def _read_fp4(layer: Layer, packed: str, scale: str, top: str, expert: int | None) -> Tensor:
    codes = layer.read(packed, expert).view(torch.uint8)
    codes = codes.flatten(-2) if codes.ndim > 2 else codes
    swizzled = bool(of_comfy(layer))
    values = by_table(codes, torch.tensor(FP4), high_first=swizzled)
    numbers = layer.read(scale, expert)
    if swizzled:
        numbers = unswizzled(numbers, len(values), values.shape[1] // 16)
    numbers = scale_numbers(numbers, scale)
    values = by_blocks(values, numbers, (1, values.shape[1] // numbers.shape[1]), torch.Tensor.mul_)
    if top:
        of_each = expert is not None and math.prod(layer.shape(top)) > 1
        number = layer.read(top, expert if of_each else None).float().reshape(())
        values = values.mul_(number) if top == "weight_scale_2" else values.div_(number)
    return values
