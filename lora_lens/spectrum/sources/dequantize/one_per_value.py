"""float8 and int8: one stored number per value, and a scale for several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lens.spectrum.sources.dequantize.comfy import of_comfy, padded_count, unswizzled
from lora_lens.spectrum.sources.dequantize.layer import (
    EXPONENTS,
    Layer,
    Plain,
    Shape,
    as_plane,
    by_blocks,
    is_positive,
    scale_numbers,
)
from lora_lens.spectrum.sources.quantized import NARROW

# The scale of a weight: DeepSeek's and transformers' names, compressed-tensors', fbgemm's and ModelOpt's,
# ComfyUI's and Mistral's. All multiply, also those that are called inverse.
SCALES = ("weight_scale_inv", "scale_inv", "weight_scale", "scale", "scale_weight", "qscale_weight")
POWERS = tuple(2**i for i in range(4, 10))  # sizes of blocks and groups where no config names one


def scaled(layer: Layer) -> Plain | None:
    """float8 or int8 values times the scale of their tensor, row, column, group or block."""
    scale = next((part for part in SCALES if part in layer.tensors), "")
    zero = next((part for part in ("weight_zero_point", "zero_point") if part in layer.tensors), "")
    if not scale or not layer.holds("weight", scale, maybe=("comfy_quant", zero)):
        return None
    if layer.dtype("weight") not in NARROW | {"I8"}:
        return None
    comfy, shape = of_comfy(layer), layer.shape("weight")
    kind = str(comfy.get("format", "float8"))
    if not kind.startswith(("float8", "int8", "mxfp8")) or comfy.get("convrot"):
        return None
    if layer.dtype("weight") == "I8" and layer.dtype(scale) == "F8_E8M0":
        return None  # two 4-bit floats in a byte
    rows, columns = _matrix_shape(shape, layer.stacked)
    if kind == "mxfp8":
        layer.require(math.prod(layer.shape(scale)) == padded_count(rows, columns // 32), "weight", scale)
        return Plain(shape, partial(_read_mxfp8, layer, scale))
    blocks = _blocks(layer, scale, rows, columns)
    if zero:
        layer.require(layer.shape(zero) == layer.shape(scale), scale, zero)
    return Plain(shape, partial(_read_scaled, layer, scale, zero, blocks))


def _read_scaled(layer: Layer, scale: str, zero: str, blocks: tuple[int, int], expert: int | None) -> Tensor:
    weight = layer.read("weight", expert).float()
    values = weight.flatten(1)
    if zero:
        values = by_blocks(values, as_plane(layer, zero, expert).neg_(), blocks, torch.Tensor.add_)
    values = by_blocks(values, as_plane(layer, scale, expert), blocks, torch.Tensor.mul_)
    return values.reshape(weight.shape)


def _matrix_shape(shape: Shape, stacked: bool) -> tuple[int, int]:
    out, *rest = shape[1:] if stacked else shape
    return out, math.prod(rest)


def _blocks(layer: Layer, scale: str, rows: int, columns: int) -> tuple[int, int]:
    """The (rows, columns) that share a number of the scale; the last block of an axis may be cut off."""
    found = layer.shape(scale)
    if layer.stacked and math.prod(found) > 1:
        layer.require(found[0] == layer.shape("weight")[0], "weight", scale)
        found = found[1:]
    counts = (*found, 1, 1)[:2]
    layer.require(len(found) <= 2 and 0 not in counts, "weight", scale)
    named = _named_blocks(layer.settings)
    if layer.dtype(scale) in EXPONENTS:
        named = [*named, (1, 32)]
    for a, b in named:
        if counts == (-(-rows // a), -(-columns // b)):
            return a, b
    ways = [_ways(size, count, bool(named)) for size, count in zip((rows, columns), counts, strict=True)]
    layer.require(all(len(way) == 1 for way in ways), "weight", scale)
    return ways[0][0], ways[1][0]


def _ways(size: int, count: int, named: bool) -> list[int]:
    """How many entries of an axis may share one of ``count`` numbers."""
    if count in (1, size):
        return [size if count == 1 else 1]
    return [] if named else [block for block in POWERS if -(-size // block) == count]


def _named_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sizes of blocks and groups that a config names: transformers' and compressed-tensors'."""
    found: list[tuple[int, int]] = []
    groups = settings.get("config_groups")
    parts = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if groups else []
    for part in (settings, *(part for part in parts if isinstance(part, Mapping))):
        block = part.get("weight_block_size") or part.get("block_structure")
        if isinstance(block, (list, tuple)) and len(block) == 2 and all(is_positive(b) for b in block):
            found.append((block[0], block[1]))
        if is_positive(part.get("group_size")) and part is not settings:
            found.append((1, part["group_size"]))
    return found


def _read_mxfp8(layer: Layer, scale: str, expert: int | None) -> Tensor:
    values = layer.read("weight", expert).float()
    numbers = unswizzled(layer.read(scale, expert), len(values), values.shape[1] // 32)
    return by_blocks(values, scale_numbers(numbers, scale), (1, 32), torch.Tensor.mul_)
