"""What a window carries of an input's features: a layer's product with one batch, split in two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, whole_number
from lora_lens._base.wrappers import submodule
from lora_lens.adapters.low_rank import check_belongs
from lora_lens.spectrum.layer_weights import LINEAR, Layer, weight_matrix
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.spectrum.spectrum import Spectrum
from lora_lens.spectrum.stacks import StackedMatrix, stacked_at
from lora_lens.spectrum.window import Placement, Window
from lora_lens.tasks.readouts import Inputs, layer_inputs, real_positions, require_batch


class _Shares:
    """What two parts' lengths at each position, (batch, positions), say about their shares of the energy."""

    window_norms: Tensor
    residual_norms: Tensor

    @property
    def position_shares(self) -> Tensor:
        """The window's share of the energy at each position, shape (batch, positions), in [0, 1].

        ||W_w x||^2 / ||W x||^2; 0 where W x is zero.
        """
        return _share(self.window_norms.square(), self.residual_norms.square())

    @property
    def shares(self) -> Tensor:
        """The window's share of the energy in each example, all positions together: (batch,), in [0, 1]."""
        return _share(self.window_norms.square().sum(1), self.residual_norms.square().sum(1))


@dataclass(frozen=True, eq=False)
class FeatureNorms(_Shares):
    """The lengths of both parts of a layer's product, see :class:`FeatureSplit`.

    Attributes:
        window_norms: ||W_w x|| at each position, shape (batch, positions), float32, on the CPU.
        residual_norms: ||(W - W_w) x||, likewise.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> norms = ll.forgetting.FeatureNorms(torch.tensor([[3.0]]), torch.tensor([[4.0]]))
        >>> round(norms.shares.item(), 2)
        0.36
    """

    window_norms: Tensor
    residual_norms: Tensor


@dataclass(frozen=True, eq=False)
class FeatureSplit(_Shares):
    """A layer's product W x, without bias, as the sum of a window's and of the residual's part.

    W_w = U_w S_w V_w^T and W - W_w have orthogonal column spaces, so at every position
    ||W x||^2 = ||W_w x||^2 + ||(W - W_w) x||^2: the two parts share the energy and nothing is
    counted twice. That holds for any components, next to each other or not. At positions that hold padding
    both parts are zero, so it has no share in anything.

    Attributes:
        layer: the module's name.
        window: W_w x, shape (batch, positions, out_features), float32, on the CPU.
        residual: (W - W_w) x, likewise.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> x, window = torch.randn(5, 6), ll.Window.first(1)
        >>> split = ll.forgetting.feature_split(model, "0", spectra["0"], window, x)
        >>> split.window.shape, split.shares.shape
        (torch.Size([5, 1, 4]), torch.Size([5]))
    """

    layer: str
    window: Tensor
    residual: Tensor

    @property
    def window_norms(self) -> Tensor:
        """||W_w x|| at each position, shape (batch, positions)."""
        return torch.linalg.vector_norm(self.window, dim=-1)

    @property
    def residual_norms(self) -> Tensor:
        """||(W - W_w) x|| at each position, shape (batch, positions)."""
        return torch.linalg.vector_norm(self.residual, dim=-1)


@dataclass(frozen=True, eq=False)
class FeatureEnergies:
    """What each component carries of a layer's product: s_i^2 (v_i^T x)^2, as the u_i are orthonormal.

    From it the lengths of any window's part follow without another product, fast enough for a slider.

    Attributes:
        spectrum: of the layer's weight.
        energies: shape (batch, positions, k), float32, on the CPU; zero at positions that hold padding.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> energies = ll.forgetting.feature_energies(model, "0", spectra["0"], torch.randn(5, 6))
        >>> energies.norms(ll.Window.first(4)).shares
        tensor([1., 1., 1., 1., 1.])
    """

    spectrum: Spectrum
    energies: Tensor

    def norms(self, window: Placement) -> FeatureNorms:
        """The lengths of the window's and of the residual's part.

        Raises:
            ValueError: the placement does not fit.
        """
        part = window.components(self.spectrum.singular_values, self.spectrum.name)
        rest = self.energies.clone()
        rest[..., part] = 0  # not whole minus window: where that is nearly all, only rounding would be left
        return FeatureNorms(self.energies[..., part].sum(-1).sqrt(), rest.sum(-1).sqrt())


@torch.no_grad()
def feature_split(
    model: nn.Module, layer: str, spectrum: Spectrum, window: Placement, inputs: Inputs
) -> FeatureSplit:
    """Run the model once, and split what one of its linear layers makes of its input.

    Args:
        model: the pretrained model, not an adapted one; it runs in evaluation mode and is left as it was.
        layer: name of an ``nn.Linear``, quantized or not, or of GPT-2's ``Conv1D``, whose input is (batch,
            positions, in_features) or (batch, in_features), which counts as one position. Further
            dimensions between the first and the last are positions, too. If the model calls the layer
            several times, the last call counts.
        spectrum: of this layer's weight, with the window's vectors.
        window: a window or any other placement.
        inputs: a batch as the model takes it, or a mapping of keyword arguments; on the model's device.

    Raises:
        ValueError: there is no such layer, it is none of these (a convolution, an adapted layer), the
            model does not call it or gives it something other than a batch, the placement does not
            fit, ``spectrum`` is another weight's, or the model does not take ``inputs``.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> x = torch.randn(5, 6)
        >>> split = ll.forgetting.feature_split(model, "0", spectra["0"], ll.Window.first(1), x)
        >>> bool((split.window + split.residual)[:, 0].allclose(x @ model[0].weight.T, atol=1e-5))
        True
    """
    instance(spectrum, Spectrum, "spectrum", "that of the layer, such as ll.spectra(model)[layer]")
    instance(window, Placement, "window", "a window, such as ll.Window.middle(8)")
    x = _tokens(model, layer, inputs)
    check_belongs(spectrum, window, submodule(model, layer))
    left, right = (factor.to(x.device) for factor in spectrum.vectors(window))
    part = window.components(spectrum.singular_values, spectrum.name)
    carried = x @ right.T * spectrum.singular_values[part].float().to(x.device) @ left.T
    whole = x @ weight_matrix(submodule(model, layer)).float().T
    return FeatureSplit(layer, carried.cpu(), (whole - carried).cpu())


@torch.no_grad()
def feature_energies(model: nn.Module, layer: str, spectrum: Spectrum, inputs: Inputs) -> FeatureEnergies:
    """Run the model once, and return what each component carries of one of its layers' products.

    Args:
        model: as for :func:`feature_split`.
        layer: as for :func:`feature_split`.
        spectrum: of this layer's weight, with all vectors.
        inputs: as for :func:`feature_split`.

    Raises:
        ValueError, TypeError: as :func:`feature_split`; the spectrum lacks vectors.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> ll.forgetting.feature_energies(model, "0", spectra["0"], torch.randn(5, 6)).energies.shape
        torch.Size([5, 1, 4])
    """
    instance(model, nn.Module, "model", "a torch.nn.Module, the pretrained model")
    instance(spectrum, Spectrum, "spectrum", "that of the layer, such as ll.spectra(model)[layer]")
    x = _tokens(model, layer, inputs)
    everything = Window(spectrum.k, start=0)
    check_belongs(spectrum, everything, submodule(model, layer))
    right = spectrum.vectors(everything)[1].to(x.device)
    along = x @ right.T * spectrum.singular_values.float().to(x.device)
    return FeatureEnergies(spectrum, along.square().cpu())


def _tokens(model: nn.Module, layer: str, inputs: Inputs) -> Tensor:
    """What the layer is given in one pass, (batch, positions, in_features), float32; zero at padding."""
    instance(model, nn.Module, "model", "a pretrained model")
    instance(layer, str, "layer", "the name of a linear layer")
    batch = require_batch(inputs)
    module = _linear(model, layer)
    given = layer_inputs(model, [layer], inputs)
    if layer not in given:
        raise InputError(f"{type(model).__name__} made its output without calling {layer}")
    x = given[layer]
    if not _is_batch(x, batch):
        raise InputError(
            f"{layer} was given an input of shape {tuple(x.shape)} for a batch of {batch}: expected "
            "(batch, positions, in_features) or (batch, in_features)"
        )
    x = x.to(weight_matrix(module).device).float().reshape(batch, -1, x.shape[-1])
    real = real_positions(inputs, x)
    return x if real is None else x * real[..., None]


def splittable(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, int]:
    """Those of the named layers that :func:`feature_split` takes, with their number of positions."""
    batch = require_batch(inputs)
    linear = [name for name, layer in _layers(model, names).items() if _is_linear(layer)]
    given = layer_inputs(model, linear, inputs)
    found = {name: given[name] for name in linear if name in given}
    return {name: x[0].numel() // x.shape[-1] for name, x in found.items() if _is_batch(x, batch)}


def patch_grid(positions: int, prefix: int | None = None) -> tuple[int, int]:
    """How an image's tokens lie on it: how many lead without a place on it, and the side of the square.

    Args:
        positions: how many tokens there are.
        prefix: how many lead, such as a class token and registers; None to find out whether one does.

    Returns:
        (how many lead, the square's side in patches).

    Raises:
        ValueError: the others form no square.
        TypeError: an argument is no whole number.

    Example:
        >>> import lora_lens as ll
        >>> ll.forgetting.patch_grid(197)  # a class token and 14 x 14 patches
        (1, 14)
    """
    positions = whole_number(positions, "positions", least=0)
    prefix = None if prefix is None else whole_number(prefix, "prefix", least=0)
    for lead in (0, 1) if prefix is None else (prefix,):
        side = isqrt(max(positions - lead, 0))
        if side > 0 and side * side == positions - lead:
            return lead, side
    leading = "with or without a class token" if prefix is None else f"after {prefix} leading tokens"
    raise InputError(
        f"{positions} positions are no square grid of patches, {leading}; prefix= says how many tokens lead"
    )


def _share(part: Tensor, rest: Tensor) -> Tensor:
    whole = part + rest
    return torch.where(whole > 0, part / whole, torch.zeros_like(whole))


def _layers(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    names = list(names)
    found: dict[str, Layer] = dict(stacked_at(model, names))
    for name in names:
        try:
            found[name] = found.get(name) or submodule(model, name)
        except AttributeError:
            raise InputError(f"{type(model).__name__} has no layer {name!r}") from None
    return found


def _linear(model: nn.Module, name: str) -> nn.Module:
    module = _layers(model, [name])[name]
    if isinstance(module, StackedMatrix):
        raise InputError(
            f"{name} is no layer but a parameter or a part of one, such as an expert of many, whose inputs "
            "cannot be seen from outside; features are split for nn.Linear and Conv1D only"
        )
    if not _is_linear(module):
        raise InputError(
            f"{name} is a {type(module).__module__.partition('.')[0]} {type(module).__name__}, and features "
            "are split for nn.Linear and Conv1D of a pretrained model only, which multiply every position "
            "by the same matrix"
        )
    return module


def _is_linear(layer: Layer) -> bool:
    return type(layer) in LINEAR or quantized_as(layer) != ""


def _is_batch(x: Tensor, batch: int) -> bool:
    return x.ndim >= 2 and len(x) == batch
