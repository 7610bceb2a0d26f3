"""The bridge to PEFT: a model whose windows are trained, the way back, and how exact both are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lens.errors import InputError, InputTypeError
from lora_lens.factorization import product_norm
from lora_lens.fingerprint import digest_of
from lora_lens.injection import (
    ADAPTER,
    Attachment,
    Start,
    attached,
    copy_around,
    inject,
    lora_layer,
    lora_layers,
    matrices_of,
    note_pretrained,
    note_start,
    peft_config,
    require_same,
    require_unadapted,
    set_start,
    taken_off,
)
from lora_lens.layers import (
    Targets,
    adaptable,
    block_and_kind,
    check_finite,
    choose,
    matrix_shape,
    set_weight_matrix,
    warn_left_out,
    weight_matrix,
)
from lora_lens.methods import FullFineTuning, LinearProbe, LoRA, Method, Variant
from lora_lens.placement import ByLayer
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.uncalled import noting_uncalled
from lora_lens.window import Placement, Window, require_fit


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    variant: Variant | None = None,
    modules_to_save: Sequence[str] = (),
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

    Args:
        model: the pretrained model, with linear layers, GPT-2's ``Conv1D`` or convolutions.
        method: a window or another placement; a mapping of target patterns to placements (see
            :class:`lora_lens.placement.ByLayer`); or a baseline: LoRA, LinearProbe, FullFineTuning.
        targets: which layers, see :func:`lora_lens.layers.target_layers`; default all linear layers
            but the classifier, as far as ``spectra`` has them. With a mapping: those of them that
            a pattern matches, by default all that do.
        alpha: LoRA's alpha; default the rank, so scaling is 1 (sqrt(rank) with rsLoRA).
        spectra: of this model, to factorize nothing twice.
        variant: how the adapter is built: rsLoRA, DoRA, the split of the singular values, ...
        modules_to_save: modules by the end of their names that PEFT trains and saves in full, such
            as a new classifier; no adapters are put into them.
        inplace: adapt ``model`` itself instead of a copy. Without it the copy shares what it can, and
            keeps the pretrained weights in memory for :func:`detach`.
        seed: of ordinary LoRA's random A.

    Returns:
        A ``PeftModel`` for placements and LoRA, otherwise a plain module.

    Raises:
        ValueError: a placement or rank does not fit a weight, the targets match
            nothing or something that cannot be adapted, a weight is not finite, the model is
            adapted already, or ``spectra`` are another model's.
        TypeError: ``method`` is none of the above.

    Warns:
        UserWarning: dropout over a window; a group of targets, or the default, leaves out layers that the
            model does not only call, or that are smaller than the rank.
    """
    variant = variant or Variant()
    plan = planned(model, method, targets=targets, alpha=alpha, spectra=spectra, variant=variant)
    modules = dict(model.named_modules())
    saved = {m: [n for n in modules if f".{n}".endswith(f".{m}")] for m in modules_to_save}
    for wanted in (m for m, found in saved.items() if not found):
        raise InputError(f"modules_to_save names {wanted!r}, and {type(model).__name__} has no such module")
    whole = tuple(f"{n}." for found in saved.values() for n in found)
    plan = {name: placement for name, placement in plan.items() if not f"{name}.".startswith(whole)}

    if not plan and modules_to_save:
        raise InputError(f"modules_to_save={list(modules_to_save)} leaves no layer to adapt")
    windows = {name: placement for name, placement in plan.items() if isinstance(placement, Placement)}
    if windows and spectra is None:
        spectra = compute_spectra(model, list(windows), vectors={name: [p] for name, p in windows.items()})
    for name, placement in windows.items():
        placement.select(spectra[name].singular_values, name)
    if windows and variant.dropout:
        warnings.warn(
            f"dropout={variant.dropout:g} also drops inputs of the pretrained components in the windows, so "
            "in training mode the model does not start from its pretrained function (in eval mode it does)",
            stacklevel=2,
        )

    # Windows give these weights new values anyway, and copying them twice is most of the time.
    adapted = model if inplace else copy_around(model, [modules[name].weight for name in windows])
    if isinstance(method, (LinearProbe, FullFineTuning)):
        return adapted.requires_grad_(isinstance(method, FullFineTuning))
    trainable, buffers = note_pretrained(model)
    originals = {} if inplace else {name: modules[name].weight.detach() for name in windows}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(digest_of, [weight_matrix(modules[name]) for name in windows])
        digests = dict(zip(windows, digests, strict=True))
    config = peft_config(model, plan, alpha, variant, modules_to_save)
    adapted = inject(adapted, config, plan, variant, seed)

    starts = {}
    for name, placement in windows.items():
        layer = lora_layer(adapted, name)
        b, a = _factors(spectra[name], placement, layer.scaling[ADAPTER], variant.split)
        set_start(layer, b, a, keep=not inplace)
        starts[name] = note_start(
            layer, spectra[name].components_of(placement), digests[name], originals.get(name)
        )
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
    require_unadapted(model)
    if isinstance(method, (LinearProbe, FullFineTuning)):
        return {}
    if not isinstance(method, (Placement, LoRA, Mapping)):
        raise InputTypeError(
            "expected a Window or another placement, a mapping of patterns to placements, LoRA, LinearProbe "
            f"or FullFineTuning, not {method!r}"
        )
    if alpha is not None and not alpha > 0:
        raise InputError(f"alpha must be positive, not {alpha!r}")
    variant = variant or Variant()
    if isinstance(method, LoRA) and (variant.split != "balanced" or variant.train == "A"):
        raise InputError(f"ordinary LoRA starts at B = 0, which leaves no sense in the variant: {variant}")

    plan = _by_layer(model, method, targets, spectra)
    for name, placement in plan.items():
        layer = model.get_submodule(name)
        k = min(matrix_shape(layer))
        check_finite(name, layer.weight)
        require_fit(placement.rank, k, name)
        if isinstance(placement, Window):
            placement.slice(k, name)
        if isinstance(placement, Placement) and spectra is not None:
            check_belongs(spectra[name], placement, layer)
    return plan


def chosen_layers(model: nn.Module, targets: Targets, spectra: SpectrumSet | None) -> dict[str, nn.Module]:
    """The layers that ``targets`` name; without targets, the usual ones as far as there are spectra of them.

    Raises:
        ValueError: as :func:`lora_lens.layers.target_layers`, or nothing is left.
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
    found = {} if original is None else matrices_of(original, list(record.starts))
    for name, start in record.starts.items():
        if original is None:
            start.weight(name)
        else:
            require_same(name, found[name](), start.digest)
    base = taken_off(peft_model)
    for name, start in record.starts.items():
        layer = base.get_submodule(name)
        if original is None:
            layer.weight.data = start.weight(name).to(layer.weight.device, copy=True)
        else:
            set_weight_matrix(layer, found[name]())
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in record.trainable)
    for name, buffer in base.named_buffers():
        buffer.copy_(record.buffers[name])
    return base


def summary(adapted: nn.Module) -> pd.DataFrame:
    """What is adapted, and how exactly: one row per layer.

    Columns: layer, kind, rank, first and last (the lowest and highest component; missing for
    ordinary LoRA and PEFT's own starts), energy (the share of ||W||_F^2 that these components hold, in
    [0, 1]; NaN where the adapter took its start from the weight, but not from components), scaling,
    base_dtype, adapter_dtype, and start_error: the relative error of the weight at the start,
    ||base + scaling B A - W||_F / ||W||_F with the factors as attached; NaN if the pretrained
    weight was not kept (inplace=True).

    Raises:
        ValueError: ``adapted`` does not come from :func:`attach`.
    """
    peft_model, record = attached(adapted)
    rows = []
    for name, layer in lora_layers(peft_model).items():
        start = record.starts.get(name)
        components = start.components.tolist() if start else []
        rows.append(
            {
                "layer": name,
                "kind": block_and_kind(name)[1],
                "rank": layer.r[ADAPTER],
                "first": components[0] if components else None,
                "last": components[-1] if components else None,
                "energy": 0.0 if start is None else _start_energy(layer, start),
                "scaling": float(layer.scaling[ADAPTER]),
                "base_dtype": str(layer.get_base_layer().weight.dtype).removeprefix("torch."),
                "adapter_dtype": str(layer.lora_A[ADAPTER].weight.dtype).removeprefix("torch."),
                "start_error": 0.0 if start is None else _start_error(layer, start),
            }
        )
    return pd.DataFrame(rows)


@torch.inference_mode()
def function_error(adapted: nn.Module, model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> float:
    """The largest output difference between two models, relative to the largest output.

    max |f_adapted(x) - f(x)| / max |f(x)| over a batch; what :func:`attach`
    promises to keep at the rounding level of the base's dtype.

    Args:
        adapted, model: the two models, on the inputs' device.
        inputs: a batch, or a mapping of keyword arguments such as a tokenizer gives. Of outputs with
            several tensors the first counts, which is the logits where the model has them. Outputs
            at positions that an ``attention_mask`` among the inputs masks are left out.

    Warns:
        UserWarning: adapted layers that were not called although the module that holds them ran.
    """
    with evaluating(adapted), evaluating(model), noting_uncalled(adapted):
        reference, now = (_first_output(m, inputs) for m in (model, adapted))
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None and reference.shape[:-1] == mask.shape:
        reference, now = reference[mask.bool()], now[mask.bool()]
    return float((now - reference).abs().max() / reference.abs().max())


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
    plan = {n: plan[n] for n, _ in model.named_modules() if n in plan and (allowed is None or n in allowed)}
    if not plan:
        raise InputError(f"no layer that targets={targets!r} selects has a placement: {ByLayer(method)}")
    return plan


def _factors(spectrum: Spectrum, placement: Placement, scaling: float, split: str) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) in float64."""
    left, right = spectrum.vectors(placement)
    values = spectrum.singular_values[placement.select(spectrum.singular_values, spectrum.name)] / scaling
    ones = torch.ones_like(values)
    of_b, of_a = {"balanced": (values.sqrt(),) * 2, "A": (ones, values), "B": (values, ones)}[split]
    return left.double() * of_b, of_a[:, None] * right.double()


def check_belongs(spectrum: Spectrum, placement: Placement, layer: nn.Module) -> None:
    """W V_w must be U_w S_w, tried on a sample of rows: cheap, and wrong for any other or later weight."""
    belongs = spectrum.shape == matrix_shape(layer)
    if belongs:
        part = placement.select(spectrum.singular_values, spectrum.name)
        left, right = spectrum.vectors(placement)
        rows = slice(None, None, max(spectrum.shape[0] // 64, 1))
        some = weight_matrix(layer)[rows].to("cpu", torch.float32)
        expected = left[rows] * spectrum.singular_values[part].float()
        tolerance = 1e-3 * torch.linalg.norm(expected) + 1e-5 * torch.linalg.norm(some)
        belongs = bool(torch.linalg.norm(some @ right.T - expected) <= tolerance)
    if not belongs:
        raise InputError(
            f"the spectrum of {spectrum.name} is not that of this model's weight; "
            "the model changed or the spectra are another model's: call spectra(model) again"
        )


def _start_energy(layer: LoraLayer, start: Start) -> float:
    """Window and residual are orthogonal, so their squared norms add up to that of the weight."""
    if not len(start.components):
        return float("nan")
    window = layer.scaling[ADAPTER] ** 2 * float(product_norm(start.b, start.a)) ** 2
    whole = window + float(torch.linalg.norm(weight_matrix(layer.get_base_layer()).float())) ** 2
    return window / whole if whole > 0 else 0.0


def _start_error(layer: LoraLayer, start: Start) -> float:
    if start.original is None:
        return float("nan")
    base = layer.get_base_layer()
    original = start.original.to(base.weight.device)
    original = (original.T if isinstance(base, Conv1D) else original.flatten(1)).double()
    effective = torch.addmm(
        weight_matrix(base).double(), start.b.double(), start.a.double(), alpha=layer.scaling[ADAPTER]
    )
    norm = torch.linalg.norm(original)
    return float(torch.linalg.norm(effective - original) / norm) if norm > 0 else 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> object:
    """What the model makes of a batch, or of a mapping of keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _first_output(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    output = call(model, inputs)
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        output = output[0] if logits is None else logits
    return output.double()
