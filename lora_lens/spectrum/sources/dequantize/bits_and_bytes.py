"""bitsandbytes: codes of a table with a largest value per block, and rows of 8 bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens.spectrum.sources.dequantize.layer import Layer, Plain, Shape, by_table, is_positive, json_facts


def nf4(layer: Layer) -> Plain | None:
    """4-bit codes of a table, two in a byte, and the largest value of each block of the flat weight."""
    state = next((part for part in layer.tensors if part.startswith("weight.quant_state.bitsandbytes__")), "")
    if not state:
        return None
    parts = ("weight", state, "weight.absmax", "weight.quant_map")
    if missing := {*parts} - layer.tensors.keys():
        raise InputError(f"is 4-bit of bitsandbytes, and its {listed(sorted(missing))} is missing")
    if not layer.holds(*parts, maybe=("weight.nested_absmax", "weight.nested_quant_map")):
        return None
    about = json_facts(bytes(layer.read(state).flatten().tolist()))
    shape, block = tuple(about.get("shape") or ()), about.get("blocksize")
    if len(shape) != 2 or not all(map(is_positive, (*shape, block))):
        raise InputError("is 4-bit of bitsandbytes, and its state holds no shape and blocksize")
    size = math.prod(shape)
    width = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(layer.dtype("weight"), 0)
    layer.require(math.prod(layer.shape("weight")) * width == -(-size // 2), "weight")
    layer.require(math.prod(layer.shape("weight.absmax")) == -(-size // block), "weight.absmax")
    nested = "weight.nested_absmax" in layer.tensors
    if nested != ("nested_blocksize" in about) or nested != ("weight.nested_quant_map" in layer.tensors):
        raise InputError("is 4-bit of bitsandbytes with nested scales, of which a part is missing")
    return Plain(shape, partial(_read_nf4, layer, about, shape))


def _read_nf4(layer: Layer, about: Mapping[str, Any], shape: Shape, expert: int | None) -> Tensor:
    codes = layer.read("weight").flatten().view(torch.uint8)
    values = by_table(codes, layer.read("weight.quant_map").float(), high_first=True)[: math.prod(shape)]
    largest = layer.read("weight.absmax")
    if "weight.nested_absmax" in layer.tensors:
        outer = layer.read("weight.nested_absmax").float()
        largest = layer.read("weight.nested_quant_map").float()[largest.int()]
        largest = _in_runs(largest, outer, about["nested_blocksize"]) + about["nested_offset"]
    return _in_runs(values, largest.float(), about["blocksize"]).view(shape)


def _in_runs(values: Tensor, numbers: Tensor, run: int) -> Tensor:
    """Multiply each run of flat values by its number, in place; the last run may be shorter."""
    whole = len(values) // run
    values[: whole * run].view(whole, run).mul_(numbers[:whole, None])
    values[whole * run :].mul_(numbers[whole:])
    return values


def int8_rows(layer: Layer) -> Plain | None:
    """LLM.int8: rows times SCB / 127."""
    if not layer.holds("weight", "SCB", maybe=("weight_format",)) or layer.dtype("weight") != "I8":
        return None
    shape = layer.shape("weight")
    layer.require(len(shape) == 2 and layer.shape("SCB") == shape[:1], "weight", "SCB")
    if "weight_format" in layer.tensors and int(layer.read("weight_format").flatten()[0]) != 0:
        raise InputError(
            "is 8-bit of bitsandbytes in the order of an old GPU; save it again with a newer one"
        )
    return Plain(shape, partial(_read_int8_rows, layer))


def _read_int8_rows(layer: Layer, expert: int | None) -> Tensor:
    return layer.read("weight").float().mul_(layer.read("SCB").float()[:, None] / 127)
