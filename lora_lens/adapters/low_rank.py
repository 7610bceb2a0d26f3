"""Adapters of two factors: a placement's or LoRA's, planned for each layer and put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens._base.naming import Targets, listed
from lora_lens._base.precision import as_double
from lora_lens._base.torch_tools import check_finite
from lora_lens._base.warning import warn
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.injection import (
    Attachment,
    inject,
    lora_layers,
    note_pretrained,
)
from lora_lens.adapters.peft_names import lies_in, peft_config, saved_modules
from lora_lens.adapters.requests import Request
from lora_lens.adapters.stacks import require_whole_stacks
from lora_lens.adapters.start import form_for, set_factors
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.adaptable_layers import Adaptable, adaptable, choose, warn_left_out
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.layer_weights import (
    Layer,
    layers_at,
    matrix_shape,
    owner_of,
    weight_matrix,
    weight_of,
)
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.spectrum.refusals import unchangeable
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Placement, Window, require_fit


class _HasRank(Protocol):
    @property
    def rank(self) -> int: ...


Ranked = ByLayer | _HasRank


def plan_layers(method: Ranked, request: Request) -> dict[str, Any]:
    """What each layer gets, by name: ``method`` itself, or of :class:`ByLayer` the placement for it.

    Args:
        method: a placement, a :class:`ByLayer`, or whatever else has a rank.

    Raises:
        ValueError: it does not fit a weight, the targets or the spectra.
    """
    able = adaptable(request.model)
    plan = _by_layer(method, request, able)
    require_whole_stacks(plan, able.layers, request.variant)
    for name, placement in plan.items():
        layer = able.layers[name]
        k = min(matrix_shape(layer))
        check_finite(name, weight_matrix(layer))
        require_fit(placement.rank, k, name)
        if isinstance(placement, Window):
            placement.slice(k, name)
        if isinstance(placement, Placement) and request.spectra is not None:
            if name not in request.spectra:
                raise InputError(
                    f"there is no spectrum of {name} ({request.spectra!r}); take ll.spectra of this model "
                    "with the same targets, or leave the layer out"
                )
            check_belongs(request.spectra[name], placement, layer)
    return plan


def attach_factors(method: object, request: Request, plan: Mapping[str, Any]) -> PeftModel:
    """PEFT's layers with their first factors, as :func:`plan_layers` planned them.

    Raises:
        ValueError: PEFT refuses a layer, factors leave the range of their dtype, or no layer is left.
    """
    model, variant = request.model, request.variant
    whole = saved_modules(model, request.modules_to_save)
    plan = {name: placement for name, placement in plan.items() if not lies_in(name, whole)}
    if not plan:
        raise InputError(f"modules_to_save={list(request.modules_to_save)} leaves no layer to adapt")
    windows = {name: placement for name, placement in plan.items() if isinstance(placement, Placement)}
    layers = layers_at(model, windows)
    spectra: Mapping[str, Spectrum] = {} if request.spectra is None else request.spectra
    if windows and request.spectra is None:
        spectra = compute_spectra(model, list(windows), vectors={name: [p] for name, p in windows.items()})
    random = len(windows) < len(plan)
    ranks = {name: placement.rank for name, placement in plan.items()}
    config = peft_config(model, ranks, request.alpha, variant, request.modules_to_save, random=random)
    metric = next((spectra[name].metric for name in windows), None)
    words = f"{method} in the {metric}" if metric else str(method)
    # All that may fail comes before the first change of a weight.
    factors = {name: _factors(spectra[name], p, request.alpha, variant) for name, p in windows.items()}
    components = {name: spectra[name].components_of(placement) for name, placement in windows.items()}
    _warn_of_zeros({name: spectra[name].singular_values[places] for name, places in components.items()})
    fixed = unchangeable(model, layers)
    forms = {name: form_for(name, layer, fixed, variant.base) for name, layer in layers.items()}
    for name in (name for name in fixed if variant.dora):
        raise InputError(f"{name} {fixed[name]}, so its base cannot be the residual of DoRA: leave dora out")
    if variant.dropout and any(form.changes_base for form in forms.values()):
        warn(
            f"dropout={variant.dropout:g} also drops inputs of the pretrained components in the windows, so "
            "in training mode the model does not start from its pretrained function (in eval mode it does)",
        )
    # The number of a component in a metric means nothing to what asks for those of the plain spectrum.
    noted = {name: places[:0] if metric else places for name, places in components.items()}
    trainable, buffers = note_pretrained(model)
    kept = {} if request.inplace else {n: layer for n, layer in layers.items() if not quantized_as(layer)}
    originals = {name: weight_of(layer).detach() for name, layer in kept.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Hashing is a third of the work, and goes on beside the injection, which writes no values.
        changing = {name: layer for name, layer in layers.items() if forms[name].changes_base}
        hashing = pool.map(digest_of, [weight_matrix(layer) for layer in changing.values()])
        # Windows give these weights new values anyway, and copying them twice is most of the time.
        own = model if request.inplace else copy_around(model, map(owner_of, layers.values()))
        adapted = inject(own, config, plan, variant, request.seed)
        digests = dict(zip(changing, hashing, strict=True))

    starts = {}
    for name, layer in lora_layers(adapted).items() if windows else ():
        set_factors(layer, *factors.pop(name))
        forms[name].put(layer, config, keep=not request.inplace)
        starts[name] = forms[name].noted(layer, noted[name], digests.get(name, ""), originals.get(name))
    adapted.attachment = Attachment(words, variant, starts, trainable, buffers)
    return adapted


def chosen_layers(model: nn.Module, targets: Targets, spectra: SpectrumSet | None) -> dict[str, Layer]:
    """The layers that ``targets`` name; without targets, the usual ones as far as there are spectra of them.

    Raises:
        ValueError: as :func:`lora_lens.spectrum.target_layers`, or nothing is left.
    """
    return _usual(choose(adaptable(model), targets)[0], targets, spectra)


def _usual(layers: dict[str, Layer], targets: Targets, spectra: SpectrumSet | None) -> dict[str, Layer]:
    if targets is None and spectra is not None:
        layers = {name: layer for name, layer in layers.items() if name in spectra}
        if not layers:
            raise InputError(
                f"none of the spectra is of a layer that is adapted by default ({spectra!r}); "
                "name the layers with targets=, or take the spectra of this model"
            )
    return layers


def _by_layer(method: Ranked, request: Request, able: Adaptable) -> dict[str, Any]:
    targets, spectra = request.targets, request.spectra
    left_out: dict[str, str] = {}
    if not isinstance(method, ByLayer):
        layers, left_out = choose(able, targets, method.rank)
        if targets is None and spectra is not None:
            left_out = {name: why for name, why in left_out.items() if name in spectra}
        warn_left_out(left_out)
        return dict.fromkeys(_usual(layers, targets, spectra), method)
    allowed = None if targets is None else choose(able, targets)[0]
    plan: dict[str, Any] = {}
    for pattern, placement in method.items():
        layers, without = choose(able, pattern, placement.rank)
        left_out |= without
        for name in layers:
            plan.setdefault(name, placement)
    warn_left_out({name: why for name, why in left_out.items() if name not in plan})
    plan = {n: plan[n] for n in able.layers if n in plan and (allowed is None or n in allowed)}
    if not plan:
        raise InputError(f"no layer that targets={targets!r} selects has a placement: {method}")
    return plan


def _warn_of_zeros(values: Mapping[str, Tensor]) -> None:
    if still := [name for name, some in values.items() if not some.any()]:
        warn(
            f"all components in the window are zero in {listed(still, most=3)}, so A and B start at zero, "
            "where neither has a gradient: these layers will not learn; choose another window or ll.LoRA "
            "for them",
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
    # Singular vectors hold nothing above 1, so mostly the values alone tell; right ones in a metric may.
    doubtful = spectrum.metric is not None or torch.cat([of_b, of_a]).max() > most
    if doubtful and any(factor.abs().max() > most for factor in factors):
        raise InputError(
            f"the factors of {spectrum.name} would be larger than {variant.dtype or torch.float32} can hold, "
            f"with alpha={alpha} and rank {rank}; use a larger alpha or another dtype"
        )
    return factors


def check_belongs(spectrum: Spectrum, placement: Placement, layer: Layer) -> None:
    """U_w^T W must be S_w V_w^T, in a metric, too, tried on a sample of columns: wrong for other weights."""
    belongs = spectrum.shape == matrix_shape(layer)
    if belongs:
        part = placement.components(spectrum.singular_values, spectrum.name)
        left, right = spectrum.vectors(placement)
        columns = slice(None, None, max(spectrum.shape[1] // 64, 1))
        some = weight_matrix(layer)[:, columns].to("cpu", torch.float32)
        expected = spectrum.singular_values[part, None].float() * right[:, columns]
        norm = torch.linalg.vector_norm
        belongs = bool(norm(left.T @ some - expected) <= 1e-3 * norm(expected) + 1e-5 * norm(some))
    if not belongs:
        raise InputError(
            f"the spectrum of {spectrum.name} is not that of this model's weight; "
            "the model changed or the spectra are another model's: call spectra(model) again"
        )
