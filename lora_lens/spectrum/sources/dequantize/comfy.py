"""What ComfyUI writes beside a weight, and scales in the order in which tensor cores take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_lens.spectrum.sources.dequantize.layer import Layer, json_facts


def of_comfy(layer: Layer) -> Mapping[str, Any]:
    """What ComfyUI notes of the layer, beside it or in the file's header; {} if the file is not its."""
    if "comfy_quant" in layer.tensors:
        return json_facts(bytes(layer.read("comfy_quant").flatten().tolist()))
    if "_quantization_metadata" not in layer.header:
        return {}
    layers = json_facts(layer.header["_quantization_metadata"]).get("layers")
    about = layers.get(layer.name) if isinstance(layers, Mapping) else None
    return about if isinstance(about, Mapping) else {"format": "one that its header does not name"}


def padded_count(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) from the tiles of 128 x 4 in which cuBLAS takes block scales.

    A tile holds row 32 i + j, column k at 16 j + 4 i + k.
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :columns]
