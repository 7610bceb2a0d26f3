"""Layers whose weight bitsandbytes or torchao quantized, and the matrix that they multiply by."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from lora_lens._base.warning import warn

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
    """The matrix (out_features, in_features) that a quantized layer stores.

    Warns:
        UserWarning: it multiplies by another one on this CPU, by a fault of bitsandbytes' kernel.
    """
    keep_trainable([layer])  # or an evaluation would round what is read here
    weight = layer.weight
    if type(weight).__module__.startswith("torchao."):
        matrix: Tensor = weight.dequantize()
    elif type(weight).__name__ == "Params4bit":
        matrix = _of_four_bits(layer)
    else:
        # Not by PEFT's dequantize_module_weight, after which bitsandbytes' 8-bit layers lack their scales.
        matrix = dequantize_bnb_weight(weight, layer.state)
    return matrix.detach().reshape(layer.out_features, layer.in_features)


def _of_four_bits(layer: Any) -> Tensor:
    """As one long row: blocks reach from one row into the next, and on CPUs rows are not read so."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size([layer.out_features * layer.in_features])
    stored: Tensor = dequantize_4bit(layer.weight.data, state)
    if layer.weight.device.type == "cpu" and layer.in_features % state.blocksize:
        used = dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(stored.shape)
        if not torch.equal(used, stored):
            warn(
                f"on this CPU bitsandbytes reads 4-bit weights wrongly whose rows, of {layer.in_features} "
                f"numbers here, do not fill blocks of {state.blocksize}: the model does not answer as "
                "its weights say; use a GPU, or leave such layers unquantized (llm_int8_skip_modules)"
            )
    return stored


def keep_trainable(modules: Iterable[nn.Module]) -> None:
    """Have bitsandbytes leave its 4-bit weights as they are in evaluations.

    On CPUs with AVX512-BF16 it packs them then, which rounds their scales, and packed weights let no gradient
    through to the adapters below them.
    """
    for module in modules:
        if hasattr(module, PACKS):
            _unpack(module)
            setattr(module, PACKS, False)


def _unpack(layer: Any) -> None:
    """Bring a packed weight back into its layout, as ``state_dict`` does: packed, it dequantizes wrongly."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()
