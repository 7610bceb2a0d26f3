"""What share of a model's matrices is adapted, what could be, and why the rest cannot."""

from __future__ import annotations

import html
from typing import Any, cast

import pandas as pd
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parameter import is_lazy

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.wrappers import inner_model, named_modules
from lora_lens.adapters.copying import copied
from lora_lens.adapters.injection import base_of, without_peft
from lora_lens.spectrum.adaptable_layers import adaptable
from lora_lens.spectrum.sources.models import name_without_peft
from lora_lens.spectrum.stacks import stack_name
from lora_lens.spectrum.usage.kept_layers import memory

ADAPTED, WHOLE, ADAPTABLE, LEFT_OUT = "adapted", "trained in full", "adaptable", "left out"


def coverage(model: nn.Module) -> pd.DataFrame:
    """Every parameter of two or more dimensions: whether it is adapted, could be, or why it cannot.

    Args:
        model: with or without PEFT around its layers.

    Returns:
        One row per parameter, those that share memory once, in the model's order. Columns: name (of the
        layer, or of the parameter where it is no layer's weight), parameters (how many numbers it holds;
        of a quantized weight those that store it), share (of all of them, in [0, 1]), state and why. The
        state is "adapted"; "trained in full" (modules_to_save); "adaptable", where a window fits and there is
        none; or "left out", with the reason.

    Raises:
        TypeError: ``model`` is no model.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> layers = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> adapted = ll.attach(model, ll.Window.middle(2), targets="1")
        >>> ll.adapters.coverage(adapted)[["name", "parameters", "state"]]
          name  parameters      state
        0    0          72   left out
        1    1          48    adapted
        2    2          24  adaptable
    """
    model = inner_model(validate.instance(model, nn.Module, "model", "a model"))
    wrappers = _wrappers(model)
    adapted = {getattr(m, "planned_name", n) for n, m in wrappers.items() if isinstance(m, BaseTunerLayer)}
    whole = tuple(f"{n}." for n, m in wrappers.items() if isinstance(m, AuxiliaryTrainingWrapper))
    model = _without_peft(model) if isinstance(model, PeftModel) else model
    modules, wrappers = dict(named_modules(model)), _wrappers(model)
    found = adaptable(model)
    able = {stack_name(name) for name in found.layers}
    rows, seen = [], set()
    for path, module in modules.items():
        holder = name_without_peft(path, wrappers.keys())
        if holder is None or path in wrappers:
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.ndim < 2 or memory(parameter) in seen:
                continue
            seen.add(memory(parameter))
            name = holder if key == "weight" and holder else f"{holder}.{key}".strip(".")
            row = {"name": name, "parameters": parameter.numel(), "state": LEFT_OUT, "why": ""}
            if name in adapted:
                row["state"] = ADAPTED
            elif f"{path}.".startswith(whole):
                row["state"] = WHOLE
            elif name in able:
                row |= {"state": ADAPTABLE, "why": "can be adapted and is not among the targets"}
            else:
                row["why"] = found.reasons.get(name, f"is a weight of {type(module).__name__}")
            rows.append(row)
    table = pd.DataFrame(rows, columns=["name", "parameters", "share", "state", "why"])
    return table.assign(share=table["parameters"] / max(table["parameters"].sum(), 1))


def _wrappers(model: nn.Module) -> dict[str, nn.Module]:
    model = inner_model(base_of(model)) if isinstance(model, PeftModel) else model
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name: module for name, module in named_modules(model) if isinstance(module, kinds)}


def _without_peft(model: PeftModel) -> nn.Module:
    """The same tensors in modules as they were, because reading PEFT's code takes most of the time."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return inner_model(without_peft(cast(PeftModel, copied(model, tensors))))
    except InputError:  # it holds something that has no copy
        return inner_model(base_of(model))


def in_words(table: pd.DataFrame) -> str:
    """What :func:`coverage` found, in a few lines."""
    lines = []
    for state, group in table.groupby("state", sort=False):
        if state in (ADAPTED, WHOLE):
            lines.append((state == WHOLE, -group["share"].sum(), f"{_amount(group)} {state!s}"))
    for (_, why), group in table[~table["state"].isin([ADAPTED, WHOLE])].groupby(["state", "why"]):
        names = listed(group.sort_values("parameters", ascending=False, kind="stable")["name"], most=3)
        lines.append((2, -group["share"].sum(), f"{_amount(group)} not adapted: {names}: {why}"))
    total = f"Of {table['parameters'].sum():,} parameters in {len(table)} matrices of the model:"
    return "\n".join([total, *(f"  {text}" for _, _, text in sorted(lines))])


class Summary(pd.DataFrame):
    """A table that also says what share of the model it is about; a part of it is an ordinary table.

    Attributes:
        coverage: what :func:`coverage` found.
    """

    _metadata = ["coverage"]  # noqa: RUF012 - pandas's name and type
    coverage: pd.DataFrame

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n\n{in_words(self.coverage)}"

    def _repr_html_(self) -> str:
        return f"{cast(Any, super())._repr_html_()}<pre>{html.escape(in_words(self.coverage))}</pre>"


def _amount(group: pd.DataFrame) -> str:
    return f"{group['share'].sum():.1%} ({len(group)})"
