"""The types of PEFT's model and layers after attach, with what it notes on them; for annotations only."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_lens.adapters import injection


class AdaptedModel(PeftModel):
    """What :func:`lora_lens.attach` returns for factors."""

    attachment: injection.Attachment
    planned_layers: tuple[str, ...]
    planned_whole: tuple[str, ...]


class PeftOnlyModel(PeftModel):
    """What it returns for a config of PEFT's."""

    start_change: float


class AdaptedLayer(nn.Module, LoraLayer):
    """One of the layers that it put into the model."""

    planned_name: str
    planned_path: str
    planned_scaling: float


class AdaptedParameter(ParamWrapper):
    """What it put around a module whose parameter it adapts."""

    planned_name: str
    planned_path: str
    planned_transposed: bool
    planned_order: tuple[str, ...]
