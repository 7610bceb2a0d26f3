"""An adapter in the form in which plain PEFT, with its ways of matching names, makes the same model of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.wrappers import named_modules, submodule, unwrapped
from lora_lens.adapters.injection import base_of, lora_config, wrapped_layers
from lora_lens.adapters.peft_names import ADAPTER, PREFIX, lies_in, target_settings
from lora_lens.adapters.stacks import innermost

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedModel


def for_plain_peft(
    peft_model: AdaptedModel, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """PEFT's settings that name the layers, the tensors that go with them, and what these hold in full.

    PEFT takes modules_to_save by the ends of names letter by letter: classifier also means pre_classifier.
    And where it has to adapt a layer as a parameter, see
    :func:`lora_lens.adapters.peft_names.target_settings`, it knows no DoRA. For some transformers models it
    renames tensors when it loads them, after rules made for released checkpoints, and drops those whose new
    name no module has. What it would take, drop or cannot adapt is written in full, with its adapter merged.

    Raises:
        ValueError: then there is no adapter left.
    """
    base = base_of(peft_model)
    layers, whole = peft_model.planned_layers, peft_model.planned_whole
    taken = [n for n, _ in named_modules(base) if whole and n.endswith(whole) and not lies_in(n, whole)]
    if lora_config(peft_model).use_dora:
        parameters = target_settings(layers, base).get("target_parameters", ())
        taken += [name.removesuffix(".weight") for name in parameters]
    taken += _dropped(peft_model, state)
    full = tuple(name for name in taken if not lies_in(name, [other for other in taken if other != name]))
    names = [name for name in layers if not lies_in(name, full)]
    if not names:
        why = f"has no adapter for {listed(layers, most=3)} beside modules_to_save={list(whole)}"
        if not whole:
            why = f"renames the tensors of {listed(layers, most=3)} on loading, and does not find them"
        raise InputError(f"plain PEFT {why}; use save and load, or PEFT's merge_and_unload")
    kept = {key: t for key, t in state.items() if not lies_in(key.removeprefix(PREFIX), full)}
    for name in full:
        kept |= {f"{PREFIX}{name}.{k}": t for k, t in _merged_state(submodule(base, name)).items()}
    settings = target_settings(names, base) | {"modules_to_save": [*whole, *full] or None}
    return settings, kept, full


def _dropped(peft_model: AdaptedModel, state: Mapping[str, Tensor]) -> list[str]:
    """The layers whose factors PEFT would not find again when it loads these tensors."""
    factors = {key: tensor for key, tensor in state.items() if ".lora_" in key}
    found = convert_peft_adapter_state_dict_for_transformers(
        peft_model, peft_model.peft_config[ADAPTER], dict(factors)
    )
    lost = {key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in factors.keys() - found.keys()}
    layers = wrapped_layers(peft_model).values()
    # Of experts the whole module, which holds several tensors of them.
    return list(dict.fromkeys(innermost(x.planned_path) for x in layers if x.planned_path in lost))


def _merged_state(module: nn.Module) -> dict[str, Tensor]:
    holder = nn.ModuleDict({"copy": copy.deepcopy(module)})
    for path, layer in list(holder.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            holder.set_submodule(innermost(path), layer.get_base_layer())
    return {unwrapped(key): tensor for key, tensor in holder["copy"].state_dict().items()}
