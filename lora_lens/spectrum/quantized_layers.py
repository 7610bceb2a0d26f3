"""Layers whose weight bitsandbytes or torchao quantized, and the matrix that they multiply by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers: whether they pack weights to evaluate them


def quantized_as(layer: object) -> str:
    """The class of a linear layer's quantized weight, if its values can be had back; otherwise ""."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor) or weight.is_meta:
        return ""
    kind = type(weight).__name__
    state: Any = getattr(layer, "state", None)  # of Linear8bitLt, which takes the scales from the weight
    scales = {
        "Params4bit": getattr(weight, "quant_state", None),
        "Int8Params": getattr(weight, "SCB", None) if getattr(state, "SCB", None) is None else state.SCB,
    }
    known = scales.get(kind) is not None
    if type(weight).__module__.startswith("torchao."):
        known = callable(getattr(weight, "dequantize", None))
    return kind if known else ""


def dequantized(layer: Any) -> Tensor:
    """The matrix (out_features, in_features) that a quantized layer multiplies by."""
    _unpack(layer)
    weight = layer.weight
    if type(weight).__module__.startswith("torchao."):
        matrix: Tensor = weight.dequantize()
    else:
        # Not by PEFT's dequantize_module_weight, after which bitsandbytes' 8-bit layers lack their scales.
        matrix = dequantize_bnb_weight(weight, getattr(layer, "state", None))
    return matrix.detach().reshape(layer.out_features, layer.in_features)


def keep_trainable(modules: Iterable[nn.Module]) -> None:
    """Have bitsandbytes leave its 4-bit weights as they are in evaluations.

    On CPUs with AVX512-BF16 it packs them then, and packed weights let no gradient through to the adapters
    below them.
    """
    for module in modules:
        if hasattr(module, PACKS):
            _unpack(module)
            setattr(module, PACKS, False)


def _unpack(layer: Any) -> None:
    """Bring a packed weight back into its layout, as ``state_dict`` does: packed, it dequantizes wrongly."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()
