"""What is trained: a window of each spectrum, or one of the baselines, on any model PEFT can adapt."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens.layers import Targets, check_finite, target_layers
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.window import Window


@dataclass(frozen=True)
class LoRA:
    """Ordinary LoRA (Hu et al. 2022): random A, zero B, base untouched."""

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", Window.first(self.rank).rank)  # the same rules for every rank

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}"


@dataclass(frozen=True)
class LinearProbe:
    """Nothing but the new head is trained: the bound on retention."""

    def __str__(self) -> str:
        return "linear probe"


@dataclass(frozen=True)
class FullFineTuning:
    """Every weight is trained."""

    def __str__(self) -> str:
        return "full fine-tuning"


Method = Window | LoRA | LinearProbe | FullFineTuning


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
    inplace: bool = False,
    seed: int = 0,
) -> PeftModel | nn.Module:
    """Make ``method`` the trainable part of ``model``, leaving its function as it is.

    For a :class:`Window`, with W = U S V^T and scaling = alpha / rank, every
    target weight gets a PEFT adapter with B = U_w (S_w / scaling)^(1/2) and
    A = (S_w / scaling)^(1/2) V_w^T over the frozen residual W - scaling B A.
    The residual is formed from the factors as they are stored, in float32 or
    more, so base plus adapter equals W up to rounding.

    Args:
        model: the pretrained model.
        method: a window, or a baseline: LoRA, LinearProbe, FullFineTuning.
        targets: which layers, see :func:`lora_lens.layers.target_layers`;
            default all linear layers but the classifier, as far as ``spectra`` has them.
        alpha: LoRA's alpha; default the rank, so scaling is 1.
        spectra: of this model, to factorize nothing twice.
        inplace: adapt ``model`` itself instead of a copy.
        seed: of ordinary LoRA's random A.

    Returns:
        A ``PeftModel`` for windows and LoRA, otherwise a plain module.

    Raises:
        ValueError: the window or rank does not fit a weight, the targets match
            nothing, a weight is not finite, or ``spectra`` are another model's.
        TypeError: ``method`` is none of the above.
    """
    layers = fitting_layers(model, method, targets=targets, alpha=alpha, spectra=spectra)
    if isinstance(method, Window) and spectra is None:
        spectra = compute_spectra(model, list(layers), vectors=[method])
    # Windows give these weights new values anyway, and copying them twice is most of the time.
    replaced = [layer.weight for layer in layers.values()] if isinstance(method, Window) else []
    adapted = model if inplace else _copy_around(model, replaced)
    if isinstance(method, (LinearProbe, FullFineTuning)):
        return adapted.requires_grad_(isinstance(method, FullFineTuning))

    config = LoraConfig(
        r=method.rank,
        lora_alpha=alpha or method.rank,
        target_modules=list(layers),
        init_lora_weights=isinstance(method, LoRA),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(adapted, config)
    if isinstance(method, Window):
        for name in layers:
            _start_from_window(adapted.base_model.model.get_submodule(name), spectra[name], method, inplace)
    return adapted


def chosen_layers(model: nn.Module, targets: Targets, spectra: SpectrumSet | None) -> dict[str, nn.Linear]:
    """The layers that ``targets`` name; without targets, the usual ones as far as there are spectra of them.

    Raises:
        ValueError: as :func:`lora_lens.layers.target_layers`, or nothing is left.
    """
    layers = target_layers(model, targets)
    if targets is None and spectra is not None:
        layers = {name: layer for name, layer in layers.items() if name in spectra}
        if not layers:
            raise ValueError(
                f"none of the spectra is of a layer that is adapted by default ({spectra!r}); "
                "name the layers with targets=, or take the spectra of this model"
            )
    return layers


def fitting_layers(
    model: nn.Module,
    method: Method,
    *,
    targets: Targets = None,
    alpha: float | None = None,
    spectra: SpectrumSet | None = None,
) -> dict[str, nn.Linear]:
    """The layers that ``method`` would adapt, by name, after every check that :func:`attach` makes.

    Empty for baselines without adapters. Copies and changes nothing.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, LoraLayer) for m in model.modules()):
        raise ValueError("this model is adapted already; attach to the pretrained model instead")
    if isinstance(method, (LinearProbe, FullFineTuning)):
        return {}
    if not isinstance(method, (Window, LoRA)):
        raise TypeError(f"expected a Window, LoRA, LinearProbe or FullFineTuning, not {method!r}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be positive, not {alpha!r}")

    layers = chosen_layers(model, targets, spectra)
    window = method if isinstance(method, Window) else Window.first(method.rank)
    for name, layer in layers.items():
        check_finite(name, layer.weight)
        window.slice(min(layer.weight.shape), name)
        if isinstance(method, Window) and spectra is not None:
            _check_belongs(spectra[name], method, layer.weight)
    return layers


def _copy_around(model: nn.Module, shared: list[nn.Parameter]) -> nn.Module:
    """A deep copy of all but the values of ``shared``."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in shared})


@torch.no_grad()
def _start_from_window(layer: LoraLayer, spectrum: Spectrum, window: Window, inplace: bool) -> None:
    part = window.slice(spectrum.k, spectrum.name)
    scaling = layer.scaling["default"]
    root = (spectrum.singular_values[part] / scaling).sqrt()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    left, right = spectrum.vectors(window)
    b.copy_(left.double() * root)  # (out, rank)
    a.copy_(root[:, None] * right.double())  # (rank, in)
    weight = layer.get_base_layer().weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    values = weight.data if inplace else weight.data.clone()
    if values.dtype == exact:
        values.addmm_(b.to(exact), a.to(exact), alpha=-scaling)
    else:
        values.copy_(torch.addmm(values.to(exact), b.to(exact), a.to(exact), alpha=-scaling))
    weight.data = values


def _check_belongs(spectrum: Spectrum, window: Window, weight: Tensor) -> None:
    """W V_w must be U_w S_w, tried on a sample of rows: cheap, and wrong for any other or later weight."""
    part = window.slice(spectrum.k, spectrum.name)
    left, right = spectrum.vectors(window)
    belongs = spectrum.shape == tuple(weight.shape)
    if belongs:
        rows = slice(None, None, max(len(weight) // 64, 1))
        some = weight.detach()[rows].to("cpu", torch.float32)
        expected = left[rows] * spectrum.singular_values[part].float()
        tolerance = 1e-3 * torch.linalg.norm(expected) + 1e-5 * torch.linalg.norm(some)
        belongs = bool(torch.linalg.norm(some @ right.T - expected) <= tolerance)
    if not belongs:
        raise ValueError(
            f"the spectrum of {spectrum.name} is not that of this model's weight; "
            "the model changed or the spectra are another model's: call spectra(model) again"
        )


@torch.inference_mode()
def function_error(adapted: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    """The largest output difference between two models, relative to the largest output.

    max |f_adapted(x) - f(x)| / max |f(x)| over a batch ``inputs``; what
    :func:`attach` promises to keep at rounding level.
    """
    was_training = adapted.training, model.training
    adapted.eval(), model.eval()
    reference = model(inputs)
    error = float((adapted(inputs) - reference).abs().max() / reference.abs().max())
    adapted.train(was_training[0]), model.train(was_training[1])
    return error
