"""Which layers to adapt, by their spectra: in the order of a measure, as names for any trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import listed
from lora_lens._base.validate import choice, flag, instance, patterns, share as checked_share, whole_number
from lora_lens.spectrum import measures
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet

# The measures, and whether the layers with the smallest come first.
MEASURES = {"condition_number": True, "signal_to_noise": False, "above_mp": False, "effective_rank": False}
PART = re.compile(r"\[(\w+)\]$")
# Parameters that PEFT takes for stacks of experts, and its guard against a division by zero.
PEFT_EXPERTS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")
PEFT_GUARD = 1e-8


def rank_layers(
    spectra: SpectrumSet, by: str = "condition_number", *, smallest_first: bool | None = None
) -> pd.DataFrame:
    """The layers in the order in which one measure of their spectra recommends them.

    Args:
        spectra: of the layers to choose among; singular values alone are enough (``vectors=False``).
        by: "condition_number", s_0 / s_{k-1}, the smallest first, as in KappaTune: such layers are the least
            specialized (Ludwig 2025, "The condition number as a scale-invariant proxy for information
            encoding in neural units"); "signal_to_noise", the sum of the singular values above the
            Marchenko-Pastur edge over the sum of the others and over s_0, the largest first, as in Hartford
            et al. 2024, "Spectrum: targeted training on signal to noise ratio", with the edge of
            :func:`lora_lens.spectrum.measures.marchenko_pastur`; "above_mp", the share of the singular
            values above that edge, the largest first; "effective_rank", as a share of k, the largest first.
        smallest_first: the other order, if it is not the one above.

    Returns:
        One row per layer with its place as the index, from 0: layer, kind, out, in, k and the measure. Layers
        that are equal by it keep the model's order; NaN, of a zero weight, comes last.

    Raises:
        TypeError, ValueError: no spectra, or another measure.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> sharp = ll.spectrum.factorize("fc1", torch.diag(torch.tensor([8.0, 2.0, 1.0])))
        >>> flat = ll.spectrum.factorize("fc2", torch.diag(torch.tensor([4.0, 3.0, 2.0])))
        >>> ll.spectrum.rank_layers(ll.SpectrumSet([sharp, flat]))[["layer", "condition_number"]]
          layer  condition_number
        0   fc2               2.0
        1   fc1               8.0
    """
    instance(spectra, SpectrumSet, "spectra", "a SpectrumSet, such as ll.spectra(model, vectors=False)")
    ascending = MEASURES[choice(by, "by", MEASURES)]
    if smallest_first is not None:
        ascending = flag(smallest_first, "smallest_first")
    if not len(spectra):
        raise InputError("spectra holds none; there are no layers to rank")
    table = spectra.table()[["layer", "kind", "out", "in", "k"]]
    table[by] = [_measured(spectrum, by) for spectrum in spectra.values()]
    return table.sort_values(by, ascending=ascending, kind="stable", ignore_index=True)


def select_layers(
    spectra: SpectrumSet,
    by: str = "condition_number",
    *,
    share: float | None = None,
    count: int | None = None,
    smallest_first: bool | None = None,
) -> list[str]:
    """The names of the first layers of :func:`rank_layers`, for ``targets=`` and PEFT's ``target_modules``.

    Args:
        spectra: as there.
        by: the measure, as there.
        share: of the layers, in (0, 1], at least one; default a fifth, as in PEFT.
        count: how many instead, at least 1.
        smallest_first: as there.

    Raises:
        TypeError, ValueError: as there; both ``share`` and ``count``, or more layers than there are.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.copy_(torch.eye(8))
        >>> ll.spectrum.select_layers(ll.spectra(model, vectors=False), count=1)
        ['1']
    """
    ranked = rank_layers(spectra, by, smallest_first=smallest_first)["layer"]
    if share is not None and count is not None:
        raise InputError(f"share={share!r} and count={count!r} are two ways to say how many; give one")
    if count is not None:
        return list(ranked[: whole_number(count, "count", least=1, most=len(ranked))])
    share = checked_share(0.2 if share is None else share, "share")
    if share == 0:
        raise InputError("share must be above 0: no layer is left")
    return list(ranked[: max(1, int(len(ranked) * share))])


def kappa_targets(
    spectra: SpectrumSet, top_p: float = 0.2, *, max_dim: int = 16384
) -> dict[str, list[str] | None]:
    """What PEFT's ``find_kappa_target_modules`` would choose, from spectra that are there already.

    PEFT chooses among *all* ``nn.Linear`` layers, the head and routers included, so the answer is its own if
    the spectra are of these; and among stacks of experts, each by the mean over its experts. It computes in
    float32, where condition numbers from about 1e7 on are rounding.

    Args:
        spectra: of the layers, with each expert as a weight of its own, as :func:`lora_lens.spectra` gives.
        top_p: the share of the layers, in (0, 1], and of the stacks; at least one each.
        max_dim: layers with a larger side are left out.

    Returns:
        "target_modules" and "target_parameters" for PEFT's LoraConfig; the second None without experts.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.copy_(torch.eye(8))
        >>> ll.spectrum.kappa_targets(ll.spectra(model, vectors=False))
        {'target_modules': ['1'], 'target_parameters': None}
    """
    instance(spectra, SpectrumSet, "spectra", "a SpectrumSet, such as ll.spectra(model, vectors=False)")
    top_p, max_dim = checked_share(top_p, "top_p"), whole_number(max_dim, "max_dim", least=1)
    modules: dict[str, list[float]] = {}
    stacks: dict[str, list[float]] = {}
    for name, spectrum in spectra.items():
        if max(spectrum.shape) > max_dim:
            continue
        values, part = spectrum.singular_values, PART.search(name)
        kappa = float(values[0] / (values[-1] + PEFT_GUARD))
        if part and part[1].isdecimal():
            stack = name[: part.start()]
            if stack.rpartition(".")[2] in PEFT_EXPERTS:
                stacks.setdefault(stack, []).append(kappa)
        else:
            modules[_whole(name)] = [kappa]
    chosen, parameters = (_lowest(found, top_p) for found in (modules, stacks))
    return {"target_modules": chosen, "target_parameters": parameters or None}


def to_yaml(layers: str | Iterable[str], key: str = "lora_target_modules") -> str:
    """Layer names as a YAML list, for the configs of other trainers.

    Args:
        layers: names, such as from :func:`select_layers`.
        key: what the trainer calls them: axolotl "lora_target_modules", PEFT "target_modules".

    Raises:
        TypeError, ValueError: no names, or parts of a weight, which are no modules of their own.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.spectrum.to_yaml(["model.layers.0.mlp.up_proj"]))
        lora_target_modules:
          - "model.layers.0.mlp.up_proj"
    """
    names = patterns(layers, "layers")
    instance(key, str, "key", "a word, such as 'lora_target_modules'")
    if names is None:
        raise InputTypeError("layers must be names of layers, such as from select_layers, not None")
    return "\n".join([f"{key}:", *(f"  - {json.dumps(_whole(name))}" for name in names)])


def _measured(spectrum: Spectrum, by: str) -> float:
    values = spectrum.singular_values
    if by == "condition_number":
        return measures.condition_number(values)
    if by == "effective_rank":
        return measures.effective_rank(values) / spectrum.k
    edge = measures.marchenko_pastur(values, spectrum.shape)
    if by == "above_mp":
        return edge.above / spectrum.k
    signal, noise = float(values[: edge.above].sum()), float(values[edge.above :].sum())
    return signal / noise / float(values[0]) if noise > 0 else np.inf if signal > 0 else np.nan


def _lowest(kappas: dict[str, list[float]], top_p: float) -> list[str]:
    means = {name: sum(found) / len(found) for name, found in kappas.items()}
    return sorted(means, key=lambda name: means[name])[: max(1, int(len(means) * top_p))]


def _whole(name: str) -> str:
    """A name as it is; raises InputError for a part of a fused weight or of a stack of experts."""
    if PART.search(name):
        raise InputError(
            f"{listed([name])} is a part of a weight and no module that other trainers know; "
            "compute spectra without split_qkv, and leave experts out"
        )
    return name
