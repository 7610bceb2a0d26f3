"""PEFT's LoRA layers in the offset form: W x + scaling (B A - B_0 A_0) x over the unchanged weight W.

The start (B_0, A_0) lies in each layer as two buffers. With the changes dB = B - B_0 and dA = A - A_0 the
update is dB A + B_0 dA, one product of rank 2r: [dB, B_0] [A; dA]. Before the first step it is zero to the
last bit, because in each of its terms one factor is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens.adapters.peft_names import ADAPTER

START_B, START_A = "start_b", "start_a"  # PEFT writes them along, and lora_lens checks them


def widened(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A - B_0 A_0, of twice the rank: (out, 2r, ...) and (2r, in, ...)."""
    if b.shape != b0.shape:  # rewound for a while, see lora_lens.rewind
        return torch.cat([b, -b0], dim=1), torch.cat([a, a0])
    return torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])


class Offset(LoraVariant):
    """What PEFT asks for an adapter's part in place of its own B A."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the start is there already, also for a second adapter with the same config."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        to_rank, from_rank = module.lora_A[active_adapter], module.lora_B[active_adapter]
        b, a = widened(from_rank.weight, to_rank.weight, module.start_b, module.start_a)
        x = module.lora_dropout[active_adapter](x)
        x = getattr(to_rank, "_conv_forward", nn.functional.linear)(x, a, None)
        b = b * module.scaling[active_adapter]
        added: Tensor = getattr(from_rank, "_conv_forward", nn.functional.linear)(x, b, None)
        return result + added

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        if not orig_weight.is_floating_point():
            raise InputError(
                "PEFT takes this quantized layer for a plain one and would merge into its integers: set "
                "is_loaded_in_8bit or is_loaded_in_4bit of the model to True, and attach again"
            )
        merged: Tensor = (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = Offset.merge_safe(module, active_adapter, orig_weight.data)


def set_offset(layer: Any, config: LoraConfig) -> None:
    """Give a layer the offset form, with its factors as they are now as the start.

    Args:
        config: PEFT's of the adapter.

    Raises:
        ValueError: PEFT's layer of this kind asks for no variants, so the start would be left out.
    """
    if "lora_variant" not in type(layer).forward.__code__.co_names:
        raise InputError(f"PEFT's {type(layer).__name__} has no place for a start: leave such layers out")
    for name, factor in ((START_B, layer.lora_B), (START_A, layer.lora_A)):
        layer.register_buffer(name, factor[ADAPTER].weight.detach().clone())
    layer.lora_variant[ADAPTER], layer.planned_config = Offset(), config
    for name, function in OWN.items():
        setattr(layer, name, partial(function, layer))


def start_in(layer: Any) -> tuple[Tensor, Tensor] | None:
    """B_0 and A_0 of a layer in the offset form, as its B and A lie; None of any other layer."""
    return (layer.start_b, layer.start_a) if START_B in getattr(layer, "_buffers", ()) else None


def added_factors(layer: Any, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
    """What the adapter adds to its base, without scaling: factors (out, R) and (R, in)."""
    b, a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    if isinstance(layer.lora_variant.get(adapter), Offset):
        b, a = widened(b, a, layer.start_b, layer.start_a)
    return b.flatten(1), a.flatten(1)


def _delta_weight(layer: Any, adapter: str) -> Tensor:
    if not isinstance(layer.lora_variant.get(adapter), Offset):
        own: Tensor = type(layer).get_delta_weight(layer, adapter)
        return own
    b, a = added_factors(layer, adapter)
    exact = torch.promote_types(b.dtype, torch.float32)
    delta: Tensor = torch.mm(b.to(exact), a.to(exact)) * layer.scaling[adapter]
    delta = delta.reshape(-1, *layer.lora_A[adapter].weight.shape[1:])
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _merge(layer: Any, *args: Any, **kwargs: Any) -> None:
    """Into a copy of the base, whose weight may be the pretrained model's or another layer's, too."""
    if not layer.merged:
        layer.unmerged_base = [layer.base_layer]  # in a list, which nn.Module does not look into
        layer.base_layer = copy.deepcopy(layer.base_layer)
    type(layer).merge(layer, *args, **kwargs)


def _unmerge(layer: Any) -> None:
    """The base as it was, bit for bit, also where merging rounded."""
    if not layer.merged:
        type(layer).unmerge(layer)
        return
    layer.merged_adapters.clear()
    layer.base_layer = layer.unmerged_base.pop().to(layer.base_layer.weight.device)


def unmerged_base(layer: Any) -> nn.Module:
    """The layer that holds the pretrained weight."""
    base: nn.Module = layer.unmerged_base[0] if layer.merged else layer.get_base_layer()
    return base


def _resolve_variant(layer: Any, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
    """An adapter that is added with the config of the first one is to be a copy of it, start included."""
    if config == layer.planned_config:
        return Offset()
    own: LoraVariant | None = type(layer).resolve_lora_variant(layer, config=config, **kwargs)
    return own


OWN: dict[str, Callable[..., Any]] = {
    "get_delta_weight": _delta_weight,
    "merge": _merge,
    "unmerge": _unmerge,
    "resolve_lora_variant": _resolve_variant,
}
