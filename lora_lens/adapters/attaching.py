"""The bridge to PEFT: a model of which a method trains its part, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from lora_lens._base.naming import Targets
from lora_lens.adapters.injection import (
    attached,
    planned_layers,
    require_at_hand,
    tensors_by_name,
    without_peft,
)
from lora_lens.adapters.methods import MethodLike, as_method
from lora_lens.adapters.pretrained import matrices_of
from lora_lens.adapters.requests import Request
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.tasks.task import Task


def attach(
    model: nn.Module,
    method: MethodLike,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    variant: Variant | None = None,
    modules_to_save: str | Sequence[str] = (),
    inplace: bool = False,
    seed: int = 0,
    task: Task | None = None,
    retain: Task | None = None,
) -> PeftModel | nn.Module:
    """Make ``method`` the trainable part of ``model`` without changing the function that it computes.

    For a :class:`Window` or another placement, with W = U S V^T and scaling = alpha / rank, every
    target weight gets a PEFT adapter with B = U_w (S_w / scaling)^(1/2) and
    A = (S_w / scaling)^(1/2) V_w^T over the frozen residual W - scaling B A; for the first window this is
    PiSSA (Meng et al. 2024, arXiv 2404.02948), for the last MiLoRA (Wang et al. 2024, arXiv 2406.09044).
    The residual is formed from the factors as they are stored, in float32 or
    more, so base plus adapter equals W up to rounding in the base's dtype;
    :func:`function_error` and :func:`summary` measure it. With ``Variant(base="offset")``, and for weights
    that are quantized or shared, the base stays W and the layer takes the start off instead.

    Exactly the planned layers are adapted. If anything is refused, ``model`` stays as it was, in place, too.

    Args:
        model: the pretrained model, with linear layers, GPT-2's ``Conv1D`` or convolutions. A wrapper around
            the whole model (``torch.compile``, DDP) is removed: compile or distribute the result. Wrappers of
            blocks stay, and names of layers are those without them.
        method: a window or another placement; a mapping of target patterns to placements (see
            :class:`lora_lens.spectrum.ByLayer`); or a baseline: LoRA, LinearProbe, FullFineTuning, or one of
            PEFT's methods (:class:`lora_lens.PeftMethod`).
        targets: which layers, see :func:`lora_lens.spectrum.target_layers`; default all linear layers
            but the classifier, as far as ``spectra`` has them. With a mapping: those of them that
            a pattern matches, by default all that do.
        alpha: LoRA's alpha, from 1e-6 to 1e6; default the rank, so scaling is 1 (sqrt(rank) with rsLoRA).
        spectra: of this model, to factorize nothing twice; or to start in a metric, see
            :func:`lora_lens.spectra`. Then A = (S_w / scaling)^(1/2) V_w^T C^-p, and drifts and rotations are
            measured with plain spectra.
        variant: how the adapter is built: rsLoRA, DoRA, the split of the singular values, ...
        modules_to_save: modules by the end of their names, in whole dotted parts, that PEFT trains and
            saves in full, such as a new classifier; no adapters are put into them.
        inplace: adapt ``model`` itself instead of a copy. Without it the copy shares what it can, and
            keeps the pretrained weights in memory for :func:`detach`; in the offset form it goes on sharing
            the adapted weights, so train the given model no further.
        seed: of what is random in the start, such as ordinary LoRA's A, and of the choice of examples.
        task: the new task, for those of PEFT's starts that are computed from its examples.
        retain: the retained task, likewise.

    Returns:
        A ``PeftModel`` for placements, LoRA and PEFT's methods, otherwise a plain module.

    Raises:
        ValueError: a placement or rank does not fit a weight, the targets match
            nothing or something that cannot be adapted, a weight is not finite, the model is
            adapted already, ``spectra`` are another model's or lack a layer, PEFT refuses a layer, or a task
            that the method needs is missing.
        TypeError: an argument is of another type than above.

    Warns:
        UserWarning: dropout over a window; a window of zeros, which never learns; a group of targets, or the
            default, leaves out layers whose weight the model also reads without calling the layer, or that
            are smaller than the rank.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, ll.Window.first(2))
        >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)  # 2 * (8 + 6) + 2 * (6 + 4)
        48
    """
    variant = Variant() if variant is None else variant
    request = Request(model, targets, alpha, spectra, variant, modules_to_save, inplace, seed, task, retain)
    method = as_method(method)
    return method.attach(request, method.plan(request))


def planned(
    model: nn.Module,
    method: MethodLike,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    variant: Variant | None = None,
) -> Mapping[str, Any]:
    """What each layer would get, by name, after every check that :func:`attach` can make before its work.

    Empty for baselines without adapters. Copies and changes nothing.
    """
    variant = Variant() if variant is None else variant
    return as_method(method).plan(Request(model, targets, alpha, spectra, variant))


def detach(adapted: nn.Module, original: nn.Module | str | Path | None = None) -> nn.Module:
    """Remove the adapter and restore the pretrained weights, bit for bit.

    Args:
        adapted: from :func:`attach`, trained or not, possibly compiled or wrapped; it cannot be used any
            more.
        original: the pretrained model or its file; needed if the base holds a residual and the model was
            adapted in place, or if the pretrained model was trained meanwhile.

    Returns:
        The pretrained model without PEFT, its parameters requiring gradients as before. The
        trained update is discarded: use PEFT's ``merge_and_unload`` to keep it in the weights.

    Raises:
        ValueError: ``adapted`` does not come from :func:`attach`, the pretrained weights are not available,
            or ``original`` is another model; nothing is changed then.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> again = ll.detach(ll.attach(model, ll.Window.first(2)))
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    peft_model, record = attached(adapted)
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "")
    found = {} if original is None else matrices_of(original, list(record.starts), prefix)
    layers = planned_layers(peft_model)
    for name, start in record.starts.items():
        require_at_hand(name, layers[name])
        start.require_restorable(name, layers[name], found[name]() if name in found else None)
    for name, start in record.starts.items():
        start.restore(name, layers[name], found[name]() if name in found else None)
    base = without_peft(peft_model)
    for name, parameter in tensors_by_name(base, "parameters"):
        parameter.requires_grad_(name in record.trainable)
    for name, buffer in tensors_by_name(base, "buffers"):
        buffer.copy_(record.buffers[name])
    return base
