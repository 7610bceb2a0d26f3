"""PEFT's layers in place of exactly those that were planned, or an error and the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.random_state import seeded
from lora_lens._base.wrappers import named_modules, paths_of, placed
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.rollback import undone_on_error
from lora_lens.adapters.stacks import adapted_parameter
from lora_lens.spectrum.stacks import Stack, stacks_planned

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedParameter

MATCHING = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
NOTHING = "(?!)"  # a regular expression


def injected(
    model: nn.Module,
    config: LoraConfig,
    names: Sequence[str],
    whole: Sequence[str],
    autocast: bool,
    seed: int,
) -> PeftModel:
    """PEFT's adapters in the layers ``names``, and copies that it trains in full of the modules ``whole``.

    Each gets its name as the attribute ``planned_name``, which stays whatever wrappers come around it.

    Raises:
        ValueError: PEFT refuses a layer or adapts others; then ``model`` is as it was.
    """
    stacks = stacks_planned(model, names)
    layers = [name for name in names if name not in stacks]
    places = paths_of(model, (*layers, *(stack.holder for stack in stacks.values()), *whole))
    parameters = [f"{places[stack.holder]}.{stack.key}" for stack in stacks.values()]
    with undone_on_error(model):
        adapted = _adapted(model, config, [places[name] for name in layers], parameters, autocast, seed)
        for name in whole:
            wrapper = ModulesToSaveWrapper(model.get_submodule(places[name]), ADAPTER)
            wrapper.set_adapter(ADAPTER)
            model.set_submodule(places[name], wrapper)
        for path in places.values():
            placed(model, path)
        _require_plan(model, names, whole, stacks)
    return adapted


def _adapted(
    model: nn.Module,
    config: LoraConfig,
    paths: Sequence[str],
    parameters: Sequence[str],
    autocast: bool,
    seed: int,
) -> PeftModel:
    """PEFT matches targets by the ends of names, and changes some; the keys of a state it takes as given."""
    meant = {key: getattr(config, key) for key in MATCHING}
    try:
        with seeded(seed), _drawing_on_cpu(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT minds mixed models
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            warnings.filterwarnings("ignore", message="target_modules=.* were set but no module was matched")
            for key in MATCHING:
                setattr(config, key, DUMMY_TARGET_MODULES if key == "target_modules" else None)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            config.target_modules = NOTHING
            inject = cast(LoraModel, adapted.base_model).inject_adapter
            if paths:
                keys: dict[str, Any] = dict.fromkeys(f"{path}.lora_A" for path in paths)
                inject(model, ADAPTER, state_dict=keys)  # PEFT reads no values
            if parameters:  # which PEFT takes without a state only
                config.target_parameters = list(parameters)
                inject(model, ADAPTER)
            cast_adapter_dtype(model, ADAPTER, autocast_adapter_dtype=autocast)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"PEFT cannot adapt these layers: {error}") from error
    finally:
        for key, value in meant.items():
            setattr(config, key, value)
    return adapted


def _drawing_on_cpu() -> AbstractContextManager[object]:
    """The same random factors wherever new tensors are made by default; it slows calls, so only if needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _require_plan(
    model: nn.Module, names: Sequence[str], whole: Sequence[str], stacks: Mapping[str, Stack]
) -> None:
    """Mark the planned layers with their names, whatever wrappers come later; raise if they are others."""
    kinds = (LoraLayer, AuxiliaryTrainingWrapper)
    paths: dict[str, Any] = {n: m for n, m in named_modules(model) if isinstance(m, kinds)}
    names_of = {n: adapted_parameter(n, m) if isinstance(m, ParamWrapper) else n for n, m in paths.items()}
    found = {names_of[path]: module for path, module in paths.items()}
    planned: dict[str, type] = dict.fromkeys(names, LoraLayer) | dict.fromkeys(whole, ModulesToSaveWrapper)
    wrong = [n for n, kind in planned.items() if not isinstance(found.get(n), kind)]
    wrong += [n for n, m in found.items() if n not in planned or isinstance(m, ParamWrapper) != (n in stacks)]
    if wrong:
        raise InputError(
            f"PEFT did not adapt the planned layers and only these: {listed(wrong, most=4)} differ; "
            "attach was undone, leave them out of the targets or try another version of PEFT"
        )
    for path, module in paths.items():
        module.planned_name, module.planned_path = names_of[path], path
        if isinstance(module, ParamWrapper):
            noted = cast("AdaptedParameter", module)
            noted.planned_transposed = stacks[names_of[path]].transposed
            noted.planned_order = tuple(module.get_base_layer()._parameters)
    for name in names:
        found[name].planned_scaling = found[name].scaling[ADAPTER]
