"""The bridge to PEFT: a model whose windows are trained, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import digest_of
from lora_lens._base.naming import Targets, frames_inside, listed
from lora_lens._base.precision import as_double
from lora_lens._base.torch_tools import check_finite
from lora_lens._base.wrappers import inner_model, named_modules, submodule
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.injection import (
    Attachment,
    attached,
    inject,
    lora_layers,
    matrices_of,
    note_pretrained,
    note_start,
    planned_layers,
    require_at_hand,
    require_same,
    require_unadapted,
    set_start,
    taken_off,
    tensors_by_name,
)
from lora_lens.adapters.methods import FullFineTuning, LinearProbe, LoRA, Method, Variant
from lora_lens.adapters.peft_names import lies_in, peft_config, saved_modules
from lora_lens.spectrum.adaptable_layers import (
    adaptable,
    choose,
    matrix_shape,
    set_weight_matrix,
    warn_left_out,
    weight_matrix,
)
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Placement, Window, require_fit


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    variant: Variant | None = None,
    modules_to_save: str | Sequence[str] = (),
    inplace: bool = False,
    seed: int = 0,
) -> PeftModel | nn.Module:
    """Make ``method`` the trainable part of ``model``, leaving its function as it is.

    For a :class:`Window` or another placement, with W = U S V^T and scaling = alpha / rank, every
    target weight gets a PEFT adapter with B = U_w (S_w / scaling)^(1/2) and
    A = (S_w / scaling)^(1/2) V_w^T over the frozen residual W - scaling B A.
    The residual is formed from the factors as they are stored, in float32 or
    more, so base plus adapter equals W up to rounding in the base's dtype;
    :func:`function_error` and :func:`summary` measure it.

    Exactly the planned layers are adapted. What is refused leaves ``model`` as it was, in place, too.

    Args:
        model: the pretrained model, with linear layers, GPT-2's ``Conv1D`` or convolutions. What wraps the
            whole of it (``torch.compile``, DDP) is taken off: compile or distribute the result. Wrappers of
            blocks stay, and names of layers are those without them.
        method: a window or another placement; a mapping of target patterns to placements (see
            :class:`lora_lens.spectrum.ByLayer`); or a baseline: LoRA, LinearProbe, FullFineTuning.
        targets: which layers, see :func:`lora_lens.spectrum.target_layers`; default all linear layers
            but the classifier, as far as ``spectra`` has them. With a mapping: those of them that
            a pattern matches, by default all that do.
        alpha: LoRA's alpha, from 1e-6 to 1e6; default the rank, so scaling is 1 (sqrt(rank) with rsLoRA).
        spectra: of this model, to factorize nothing twice.
        variant: how the adapter is built: rsLoRA, DoRA, the split of the singular values, ...
        modules_to_save: modules by the end of their names, in whole dotted parts, that PEFT trains and
            saves in full, such as a new classifier; no adapters are put into them.
        inplace: adapt ``model`` itself instead of a copy. Without it the copy shares what it can, and
            keeps the pretrained weights in memory for :func:`detach`.
        seed: of ordinary LoRA's random A.

    Returns:
        A ``PeftModel`` for placements and LoRA, otherwise a plain module.

    Raises:
        ValueError: a placement or rank does not fit a weight, the targets match
            nothing or something that cannot be adapted, a weight is not finite, the model is
            adapted already, ``spectra`` are another model's or lack a layer, or PEFT refuses a layer.
        TypeError: an argument is of another type than above.

    Warns:
        UserWarning: dropout over a window; a window of zeros, which never learns; a group of targets, or the
            default, leaves out layers that the model does not only call, or that are smaller than the rank.
    """
    saved = validate.sequence(modules_to_save, "modules_to_save", "names of modules", one=str)
    inplace = validate.flag(inplace, "inplace")
    seed = validate.whole_number(seed, "seed", least=0, most=2**63)
    plan = planned(model, method, targets=targets, alpha=alpha, spectra=spectra, variant=variant)
    model, variant = inner_model(model), variant or Variant()
    whole = saved_modules(model, saved)
    plan = {name: placement for name, placement in plan.items() if not lies_in(name, whole)}

    if isinstance(method, LinearProbe) and saved:
        raise InputError("a linear probe trains nothing of the model, so it takes no modules_to_save")
    if not plan and saved and not isinstance(method, FullFineTuning):
        raise InputError(f"modules_to_save={list(saved)} leaves no layer to adapt")
    windows = {name: placement for name, placement in plan.items() if isinstance(placement, Placement)}
    layers = {name: submodule(model, name) for name in windows}
    if windows and spectra is None:
        spectra = compute_spectra(model, list(windows), vectors={name: [p] for name, p in windows.items()})
    if windows and variant.dropout:
        warnings.warn(
            f"dropout={variant.dropout:g} also drops inputs of the pretrained components in the windows, so "
            "in training mode the model does not start from its pretrained function (in eval mode it does)",
            stacklevel=2,
        )

    if isinstance(method, (LinearProbe, FullFineTuning)):
        adapted = model if inplace else copy_around(model, [])
        return adapted.requires_grad_(isinstance(method, FullFineTuning))
    config = peft_config(model, plan, alpha, variant, saved)
    # All that may fail comes before the first change of a weight.
    factors = {name: _factors(spectra[name], p, alpha, variant) for name, p in windows.items()}
    components = {name: spectra[name].components_of(placement) for name, placement in windows.items()}
    _warn_of_zeros({name: spectra[name].singular_values[places] for name, places in components.items()})
    trainable, buffers = note_pretrained(model)
    originals = {} if inplace else {name: layer.weight.detach() for name, layer in layers.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Hashing is a third of the work, and goes on beside the injection, which writes no values.
        digests = pool.map(digest_of, [weight_matrix(layer) for layer in layers.values()])
        # Windows give these weights new values anyway, and copying them twice is most of the time.
        adapted = model if inplace else copy_around(model, [layer.weight for layer in layers.values()])
        adapted = inject(adapted, config, plan, variant, seed)
        digests = dict(zip(windows, digests, strict=True))

    starts = {}
    for name, layer in lora_layers(adapted).items() if windows else ():
        set_start(layer, *factors.pop(name), keep=not inplace)
        starts[name] = note_start(layer, components[name], digests[name], originals.get(name))
    described = ByLayer(method) if isinstance(method, Mapping) else method
    adapted.attachment = Attachment(str(described), variant, starts, trainable, buffers)
    return adapted


def planned(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    variant: Variant | None = None,
) -> dict[str, Placement | LoRA]:
    """What each layer would get, by name, after every check that :func:`attach` can make before its work.

    Empty for baselines without adapters. Copies and changes nothing.
    """
    validate.instance(model, nn.Module, "model", "a torch.nn.Module, such as timm's and transformers' models")
    require_unadapted(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} holds TorchScript modules, which PEFT cannot put adapters beside; "
            "build the model from Python modules"
        )
    validate.patterns(targets)
    if alpha is not None:
        validate.number(alpha, "alpha", above=0)
        validate.number(alpha, "alpha", least=1e-6, most=1e6)  # beyond, factors or scaling leave float16
    if spectra is not None:
        validate.instance(spectra, SpectrumSet, "spectra", "what ll.spectra(model) gives")
    if variant is not None:
        validate.instance(variant, Variant, "variant", "an ll.Variant, such as ll.Variant(dora=True)")
    if isinstance(method, (LinearProbe, FullFineTuning)):
        return {}
    if not isinstance(method, (Placement, LoRA, Mapping)):
        raise InputTypeError(
            "expected a Window or another placement, a mapping of patterns to placements, LoRA, LinearProbe "
            f"or FullFineTuning, not {method!r}"
        )
    variant = variant or Variant()
    if isinstance(method, LoRA) and (variant.split != "balanced" or variant.train == "A"):
        raise InputError(f"ordinary LoRA starts at B = 0, which leaves no sense in the variant: {variant}")

    plan = _by_layer(model, method, targets, spectra)
    for name, placement in plan.items():
        layer = submodule(model, name)
        k = min(matrix_shape(layer))
        check_finite(name, layer.weight)
        require_fit(placement.rank, k, name)
        if isinstance(placement, Window):
            placement.slice(k, name)
        if isinstance(placement, Placement) and spectra is not None:
            if name not in spectra:
                raise InputError(
                    f"there is no spectrum of {name} ({spectra!r}); take ll.spectra of this model with the "
                    "same targets, or leave the layer out"
                )
            check_belongs(spectra[name], placement, layer)
    return plan


def chosen_layers(model: nn.Module, targets: Targets, spectra: SpectrumSet | None) -> dict[str, nn.Module]:
    """The layers that ``targets`` name; without targets, the usual ones as far as there are spectra of them.

    Raises:
        ValueError: as :func:`lora_lens.spectrum.target_layers`, or nothing is left.
    """
    return _usual(choose(adaptable(model), targets)[0], targets, spectra)


def _usual(
    layers: dict[str, nn.Module], targets: Targets, spectra: SpectrumSet | None
) -> dict[str, nn.Module]:
    if targets is None and spectra is not None:
        layers = {name: layer for name, layer in layers.items() if name in spectra}
        if not layers:
            raise InputError(
                f"none of the spectra is of a layer that is adapted by default ({spectra!r}); "
                "name the layers with targets=, or take the spectra of this model"
            )
    return layers


def detach(adapted: nn.Module, original: nn.Module | str | Path | None = None) -> nn.Module:
    """Take the adapter off and put the pretrained weights back, bit for bit.

    Args:
        adapted: from :func:`attach`, trained or not, possibly compiled or wrapped; it is used up.
        original: the pretrained model or its file; needed if the model was adapted in place, or if
            the pretrained model was trained meanwhile.

    Returns:
        The pretrained model without PEFT, its parameters requiring gradients as before. What was
        trained is dropped: use PEFT's ``merge_and_unload`` to keep it in the weights.

    Raises:
        ValueError: ``adapted`` is none of attach's, the pretrained weights are not at hand, or
            ``original`` is another model; then nothing was changed.
    """
    peft_model, record = attached(adapted)
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "")
    found = {} if original is None else matrices_of(original, list(record.starts), prefix)
    layers = planned_layers(peft_model)
    for name, start in record.starts.items():
        if original is None:
            weight = start.weight(name)
        else:
            weight = found[name]()
            require_same(name, weight, start.digest)
        require_at_hand(name, layers[name])
        if (now := layers[name].get_base_layer().weight.dtype) != weight.dtype:
            raise InputError(
                f"{name} was cast from {weight.dtype} to {now} after attach, so what else the model holds "
                "was rounded and is not the pretrained model any more; take that one itself"
            )
    base = taken_off(peft_model)
    for name, start in record.starts.items():
        layer = submodule(base, name)
        if original is None:
            layer.weight.data = start.weight(name).to(layer.weight.device, copy=True)
        else:
            set_weight_matrix(layer, found[name]())
    for name, parameter in tensors_by_name(base, "parameters"):
        parameter.requires_grad_(name in record.trainable)
    for name, buffer in tensors_by_name(base, "buffers"):
        buffer.copy_(record.buffers[name])
    return base


def _by_layer(
    model: nn.Module, method: Method, targets: Targets, spectra: SpectrumSet | None
) -> dict[str, Placement | LoRA]:
    able = adaptable(model)
    left_out: dict[str, str] = {}
    if not isinstance(method, Mapping):
        layers, left_out = choose(able, targets, method.rank)
        if targets is None and spectra is not None:
            left_out = {name: why for name, why in left_out.items() if name in spectra}
        warn_left_out(left_out)
        return dict.fromkeys(_usual(layers, targets, spectra), method)
    allowed = None if targets is None else choose(able, targets)[0]
    plan: dict[str, Placement] = {}
    for pattern, placement in ByLayer(method).items():
        layers, without = choose(able, pattern, placement.rank)
        left_out |= without
        for name in layers:
            plan.setdefault(name, placement)
    warn_left_out({name: why for name, why in left_out.items() if name not in plan})
    plan = {n: plan[n] for n, _ in named_modules(model) if n in plan and (allowed is None or n in allowed)}
    if not plan:
        raise InputError(f"no layer that targets={targets!r} selects has a placement: {ByLayer(method)}")
    return plan


def _warn_of_zeros(values: Mapping[str, Tensor]) -> None:
    if still := [name for name, some in values.items() if not some.any()]:
        warnings.warn(
            f"all components in the window are zero in {listed(still, most=3)}, so A and B start at zero, "
            "where neither has a gradient: these layers will not learn; choose another window or ll.LoRA "
            "for them",
            stacklevel=frames_inside(),
        )


def _factors(
    spectrum: Spectrum, placement: Placement, alpha: float | None, variant: Variant
) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) in float64."""
    rank = placement.rank
    scaling = (alpha or rank) / (rank**0.5 if variant.rslora else rank)  # as PEFT has it
    left, right = spectrum.vectors(placement)
    values = spectrum.singular_values[placement.components(spectrum.singular_values, spectrum.name)] / scaling
    ones = torch.ones_like(values)
    of_b, of_a = {"balanced": (values.sqrt(),) * 2, "A": (ones, values), "B": (values, ones)}[variant.split]
    factors = as_double(left) * of_b, of_a[:, None] * as_double(right)
    most = torch.finfo(variant.dtype or torch.float32).max
    # Singular vectors hold nothing above 1, so that mostly the values alone tell.
    if torch.cat([of_b, of_a]).max() > most and any(factor.abs().max() > most for factor in factors):
        raise InputError(
            f"the factors of {spectrum.name} would be larger than {variant.dtype or torch.float32} can hold, "
            f"with alpha={alpha} and rank {rank}; use a larger alpha or another dtype"
        )
    return factors


def check_belongs(spectrum: Spectrum, placement: Placement, layer: nn.Module) -> None:
    """W V_w must be U_w S_w, tried on a sample of rows: cheap, and wrong for any other or later weight."""
    belongs = spectrum.shape == matrix_shape(layer)
    if belongs:
        part = placement.components(spectrum.singular_values, spectrum.name)
        left, right = spectrum.vectors(placement)
        rows = slice(None, None, max(spectrum.shape[0] // 64, 1))
        some = weight_matrix(layer)[rows].to("cpu", torch.float32)
        expected = left[rows] * spectrum.singular_values[part].float()
        norm = torch.linalg.vector_norm
        belongs = bool(norm(some @ right.T - expected) <= 1e-3 * norm(expected) + 1e-5 * norm(some))
    if not belongs:
        raise InputError(
            f"the spectrum of {spectrum.name} is not that of this model's weight; "
            "the model changed or the spectra are another model's: call spectra(model) again"
        )
