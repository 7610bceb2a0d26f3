"""PEFT's layers in place of exactly those that were planned, or an error and the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

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
    places = paths_of(model, (*names, *whole))
    with undone_on_error(model):
        adapted = _adapted(model, config, [places[name] for name in names], autocast, seed)
        for name in whole:
            wrapper = ModulesToSaveWrapper(model.get_submodule(places[name]), ADAPTER)
            wrapper.set_adapter(ADAPTER)
            model.set_submodule(places[name], wrapper)
        for path in places.values():
            placed(model, path)
        _require_plan(model, names, whole)
    return adapted


def _adapted(
    model: nn.Module, config: LoraConfig, paths: Sequence[str], autocast: bool, seed: int
) -> PeftModel:
    """PEFT matches targets by the ends of names, and changes some; the keys of a state it takes as given."""
    meant = {key: getattr(config, key) for key in MATCHING}
    try:
        with seeded(seed), _drawing_on_cpu(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT minds mixed models
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            for key in MATCHING:
                setattr(config, key, DUMMY_TARGET_MODULES if key == "target_modules" else None)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            config.target_modules = NOTHING
            keys: dict[str, Any] = dict.fromkeys(f"{path}.lora_A" for path in paths)  # PEFT reads no values
            cast(LoraModel, adapted.base_model).inject_adapter(model, ADAPTER, state_dict=keys)
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


def _require_plan(model: nn.Module, names: Sequence[str], whole: Sequence[str]) -> None:
    """Mark the planned layers with their names, whatever wrappers come later; raise if they are others."""
    kinds = (LoraLayer, AuxiliaryTrainingWrapper)
    found: dict[str, Any] = {n: m for n, m in named_modules(model) if isinstance(m, kinds)}
    planned: dict[str, type] = dict.fromkeys(names, LoraLayer) | dict.fromkeys(whole, ModulesToSaveWrapper)
    wrong = [n for n, kind in planned.items() if not isinstance(found.get(n), kind)]
    wrong += [n for n, m in found.items() if n not in planned or isinstance(m, ParamWrapper)]
    if wrong:
        raise InputError(
            f"PEFT did not adapt the planned layers and only these: {listed(wrong, most=4)} differ; "
            "attach was undone, leave them out of the targets or try another version of PEFT"
        )
    for name in planned:
        found[name].planned_name = name
    for name in names:
        found[name].planned_scaling = found[name].scaling[ADAPTER]
