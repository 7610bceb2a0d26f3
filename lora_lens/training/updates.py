"""How far a model's adapted layers have moved."""

from __future__ import annotations

from torch import nn

from lora_lens._base.errors import InputError
from lora_lens.adapters.injection import attached, lora_layers
from lora_lens.adapters.start import is_dora, trained_update
from lora_lens.spectrum.svd import product_norm


def is_attached(model: nn.Module) -> bool:
    """Whether it comes from attach, as an adapter of two factors in each of its layers."""
    try:
        attached(model)
    except InputError:
        return False
    return True


def update_norms(model: nn.Module) -> dict[str, float]:
    """||dW||_F of each adapted layer, by name; nothing of a model that is not from attach, or with DoRA."""
    if not is_attached(model):
        return {}
    peft_model, record = attached(model)
    layers = lora_layers(peft_model)
    if any(map(is_dora, layers.values())):
        return {}
    return {
        name: float(product_norm(*trained_update(layer, record.starts.get(name))))
        for name, layer in layers.items()
    }
