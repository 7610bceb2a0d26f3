"""An adapter that PEFT made by itself, known to lora_lens from then on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.validate import instance
from lora_lens._base.wrappers import inner_model, named_modules
from lora_lens.adapters.adapted import AdaptedModel
from lora_lens.adapters.injection import (
    Attachment,
    base_of,
    lora_layers,
    note_pretrained,
    tensors_by_name,
)
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.layer_weights import weight_of
from lora_lens.spectrum.sources.adapters import PLAIN_STARTS


def require_ordinary(configs: Mapping[str, PeftConfig]) -> LoraConfig:
    """The config of a model's only adapter, a LoRA that leaves its base as it is.

    Raises:
        ValueError: it is something else, or there are several.
    """
    config = configs.get(ADAPTER)
    if not isinstance(config, LoraConfig) or len(configs) > 1:
        kinds = [f"{name!r} ({type(c).__name__})" for name, c in configs.items()]
        raise InputError(f"expected one LoRA called {ADAPTER!r}, and the model has {listed(kinds)}")
    if str(start := config.init_lora_weights).lower() not in PLAIN_STARTS - {"false"}:
        raise InputError(
            f"the adapter has init_lora_weights={start!r}: its base may hold a residual in place of the "
            "pretrained weights; load it with ll.load(model, start, checkpoint=...), where start is what "
            "ll.save wrote before training, or export it first"
        )
    return config


def adopt(peft_model: nn.Module) -> PeftModel:
    """Let lora_lens know an ordinary LoRA of PEFT's, as if :func:`lora_lens.attach` had made it.

    Then :func:`lora_lens.rewind`, :func:`lora_lens.export`, :func:`lora_lens.forgetting.drift` and the others
    take it. Nothing is copied, and no weight changes.

    Args:
        peft_model: with one LoRA (or DoRA) called "default" over the pretrained model, such as from
            ``PeftModel.from_pretrained``. Its buffers count as those of the pretrained model.

    Returns:
        ``peft_model`` itself.

    Raises:
        ValueError: it holds another adapter or several; trains more than the adapter can take back (biases,
            single tokens, parameters of experts); or its base may not be the pretrained model, as with PiSSA,
            or with ``init_lora_weights=False``, which a trainer's checkpoint of a window has.
        TypeError: it is no ``PeftModel``.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.adapters.adopt(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
        >>> ll.summary(adapted)["rank"].tolist()
        [2]
    """
    inner = inner_model(instance(peft_model, nn.Module, "peft_model", "a PeftModel"))
    adapted = cast(AdaptedModel, instance(inner, PeftModel, "peft_model", "a PeftModel, as PEFT makes it"))
    config = require_ordinary(adapted.peft_config)
    found = {
        name: module for name, module in named_modules(base_of(adapted)) if isinstance(module, LoraLayer)
    }
    whole = {n: m for n, m in named_modules(base_of(adapted)) if isinstance(m, AuxiliaryTrainingWrapper)}
    more = [f"biases (bias={config.bias!r})"] if config.bias != "none" else []
    more += [n for n, m in whole.items() if not isinstance(m, ModulesToSaveWrapper)]
    for name, layer in found.items():
        odd = [kind for kind in layer.lora_variant if not config.use_dora]
        if (
            isinstance(layer, ParamWrapper)
            or odd
            or ADAPTER not in layer.lora_A
            or layer.lora_bias.get(ADAPTER)
        ):
            more.append(name)
    if more:
        raise InputError(f"the adapter trains more than factors A and B of layers: {listed(more, most=3)}")
    if not found:
        raise InputError("no layer of the model has an adapter")
    marked: dict[str, Any] = {**found, **whole}
    for name, module in marked.items():
        module.planned_name = module.planned_path = name
    for layer in found.values():
        layer.planned_scaling = layer.scaling[ADAPTER]
    adapted.planned_layers, adapted.planned_whole = tuple(found), tuple(whole)
    dtype = weight_of(next(iter(found.values())).lora_A[ADAPTER]).dtype
    variant = Variant(config.use_rslora, config.use_dora, dropout=config.lora_dropout, dtype=dtype)
    _, buffers = note_pretrained(adapted)
    trainable = frozenset(name for name, _ in tensors_by_name(base_of(adapted), "parameters"))
    adapted.attachment = Attachment(f"LoRA of rank {config.r}, by PEFT", variant, {}, trainable, buffers)
    lora_layers(adapted)  # raises
    return adapted
