"""What PEFT's matching by name makes of a plan, and how to name exactly the planned layers to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.wrappers import named_modules
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.layer_weights import layers_at
from lora_lens.spectrum.stacks import stack_name, stacks_planned, wrapped_names

ADAPTER = "default"  # PEFT's name for the only adapter of a model
PREFIX = "base_model.model."  # of PEFT's tensor names
# Ends of names that PEFT makes other targets of in some mixtures of experts, see target_settings.
MOVED = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def target_settings(names: Collection[str], model: nn.Module) -> dict[str, Any]:
    """PEFT's settings that adapt these layers of ``model`` and no others, when plain PEFT loads an adapter.

    In a list each entry also takes layers whose names end in it; a string is a regular expression for whole
    names. In mixtures of experts PEFT makes other targets of what ends in names such as gate_proj, which were
    the experts' in transformers 4, even of the full names of dense layers. It leaves parameters alone.
    """
    every = dict(named_modules(model))
    stacks = stacks_planned(model, names := wrapped_names(names))
    names = [name for name in names if name not in stacks]
    last = {name.rpartition(".")[2] for name in names}
    moved = _moved_ends(model, last | {"down_proj", "w2"})  # one of which every mixture has
    modules = [name for name in names if name.rpartition(".")[2] not in moved]
    ends = tuple(f".{name}" for name in modules)
    longer = [n for n in every if n not in names and n.endswith(ends)] if ends else []
    settings: dict[str, Any] = {"target_modules": modules}
    if longer and moved:  # where PEFT moves targets, it takes regular expressions apart
        settings["exclude_modules"] = longer
    elif longer:
        settings["target_modules"] = "|".join(map(re.escape, modules))
    if last & moved:
        settings["target_parameters"] = [f"{n}.weight" for n in names if n.rpartition(".")[2] in moved]
    if stacks:
        settings.setdefault("target_parameters", []).extend(stack.path for stack in stacks.values())
    return settings


def peft_config(
    model: nn.Module,
    ranks: Mapping[str, int],
    alpha: float | None,
    variant: Variant,
    modules_to_save: Sequence[str] = (),
    *,
    random: bool = False,
) -> LoraConfig:
    """PEFT's settings for adapters of these ranks, by layer; with ``random``, PEFT draws their A.

    Other adapters get their values after the injection, so PEFT need not draw any.
    """
    targets = target_settings(ranks, model)
    layers = layers_at(model, ranks).values()
    ranks = {stack_name(name): rank for name, rank in ranks.items()}
    return LoraConfig(
        **targets,
        init_lora_weights=random,
        bias="none",
        use_rslora=variant.rslora,
        use_dora=variant.dora,
        lora_dropout=variant.dropout,
        modules_to_save=list(modules_to_save) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
        **rank_settings(ranks, alpha, targets.get("target_parameters", ())),
    )


def rank_settings(
    ranks: Mapping[str, int], alpha: float | None, parameters: Collection[str] = ()
) -> dict[str, Any]:
    """PEFT's settings for these ranks by layer; alpha is the rank where None.

    Args:
        parameters: of :func:`target_settings`: PEFT compares these with the patterns,
            and the layers' names where lora_lens injects.
    """
    most = max(ranks.values())
    settings: dict[str, Any] = {"r": most, "lora_alpha": alpha or most}
    if len(set(ranks.values())) > 1:
        # PEFT takes the first pattern that ends a name, and one layer's name may end another's.
        longest_first = {
            re.escape(name) + r"(\.weight)?" * (f"{name}.weight" in parameters): ranks[name]
            for name in sorted(ranks, key=len, reverse=True)
        }
        settings["rank_pattern"] = longest_first
        if alpha is None:
            settings["alpha_pattern"] = dict(longest_first)
    return settings


def _moved_ends(model: nn.Module, ends: Iterable[str]) -> set[str]:
    """The last parts of names that PEFT's conversion for transformers 5 makes other targets of."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return set()
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # PEFT or transformers of before the conversion
        return set()
    moved = set()
    for end in ends:
        config = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it moves this one only together with others
            moved.add(end)
        if set(config.target_modules or ()) != {end} or config.target_parameters:
            moved.add(end)
    return moved


def saved_modules(model: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """The modules that ``modules_to_save`` names by the end of their names, in whole dotted parts.

    Of those that lie in another one of them only the outer one. PEFT itself compares ends letter by letter.

    Raises:
        ValueError: one is missing, or a container that is never called itself.
    """
    if not wanted:
        return ()
    modules = {name: module for name, module in named_modules(model) if name}
    found = {end: [name for name in modules if f".{name}".endswith(f".{end}")] for end in wanted}
    for end in (end for end, names in found.items() if not names):
        raise InputError(f"modules_to_save names {end!r}, and {type(model).__name__} has no such module")
    every = {name for names in found.values() for name in names}
    outer = [n for n in modules if n in every and not any(n.startswith(f"{other}.") for other in every)]
    for name in (n for n in outer if isinstance(modules[n], CONTAINERS)):
        children = [f"{name}.{child}" for child, _ in modules[name].named_children()]
        raise InputError(
            f"modules_to_save names {name}, a {type(modules[name]).__name__}, which is never called itself; "
            f"name what is in it: {listed(children, most=4)}"
        )
    return tuple(outer)


def lies_in(name: str, outer: Iterable[str]) -> bool:
    """Whether a module is one of ``outer`` or lies in one of them."""
    return any(name == other or name.startswith(f"{other}.") for other in outer)
