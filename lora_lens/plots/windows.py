"""Pictures of what a window cuts out: of a weight, and of the features that it makes of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, whole_number
from lora_lens.forgetting.features import FeatureNorms, FeatureSplit, patch_grid
from lora_lens.plots._style import house_style, some_axes
from lora_lens.plots.spectra import FLOOR, HEAT
from lora_lens.spectrum.spectrum import Spectrum
from lora_lens.spectrum.window import Placement, Window

SIGNED = "RdBu_r"  # colours of what may be negative
ROUNDING = 1e-5  # norms below this share of the others are what float32 leaves of zero


def decomposition(spectrum: Spectrum, window: Window, axes: np.ndarray | None = None) -> np.ndarray:
    """The weight, the slice that the window holds and the residual that stays, as three heat maps.

    The colours of weight and residual share one scale; the slice has its own, written in its title.

    Returns:
        The three Axes, shape (3,).

    Args:
        spectrum: of one weight, with vectors.
        window: the components of the slice.
        axes: to draw on, at least three; default a new pyplot figure.

    Raises:
        ValueError: the window does not fit the weight, or there are fewer than three ``axes``.

    Example:
        >>> import lora_lens as ll, torch
        >>> spectrum = ll.spectrum.factorize("fc", torch.randn(6, 4))
        >>> axes = ll.plots.decomposition(spectrum, ll.Window.middle(2))
        >>> axes[0].get_title().splitlines()[0]
        'weight W'
    """
    instance(spectrum, Spectrum, "spectrum", "that of one weight, such as ll.spectra(model)[layer]")
    instance(window, Placement, "window", "a Window, such as ll.Window.middle(8)")
    if axes is not None:
        axes = some_axes(axes, 3, "pictures")[:3]
    whole = spectrum.component(Window(spectrum.k, start=0)).numpy()
    part = spectrum.component(window).numpy()
    scale = np.abs(whole).max()
    with house_style():
        if axes is None:
            axes = plt.subplots(1, 3, figsize=(10, 3.4))[1]
        pictures = {
            "weight W": (whole, scale),
            "slice": (part, np.abs(part).max()),
            "residual W - slice": (whole - part, scale),
        }
        for ax, (title, (matrix, top)) in zip(axes, pictures.items(), strict=True):
            ax.imshow(matrix, cmap=SIGNED, vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
            ax.set(title=f"{title}\n(colours ±{top:.2g})", xlabel="input feature")
            ax.title.set_fontsize(10.5)
            ax.grid(False)
        axes[0].set_ylabel("output feature")
    return axes


@dataclass(frozen=True, eq=False)
class PartMaps:
    """What one part, the window's or the residual's, has at the patches of every image.

    Attributes:
        title: the part and the scale of its colours.
        top: the largest length, at which the colours end.
        norms: the part's length at each patch, (images, side, side).
        labels: its share of the energy of each image, in words.
    """

    title: str
    top: float
    norms: np.ndarray
    labels: list[str]


def part_maps(split: FeatureSplit | FeatureNorms, prefix: int | None = None) -> list[PartMaps]:
    """The window's and the residual's maps; see :func:`feature_maps`."""
    parts = {"window": split.window_norms, "residual": split.residual_norms}
    lead, side = patch_grid(parts["window"].shape[1], prefix)
    maps = {name: norms[:, lead:].reshape(-1, side, side).numpy() for name, norms in parts.items()}
    energy = {name: np.square(norms).sum((1, 2)) for name, norms in maps.items()}  # (n,) each
    whole = np.maximum(sum(energy.values()), FLOOR)
    seen = ROUNDING * max(norms.max() for norms in maps.values())
    found = []
    for name, norms in maps.items():
        top = float(norms.max())
        scale = f"colours 0 to {top:.2g}" if top > seen else "zero up to rounding"
        shares = energy[name] / whole if top > seen else np.zeros(len(norms))
        labels = [f"{_percent(share)} of energy" for share in shares]
        found.append(PartMaps(f"{name}\n({scale})", top if top > seen else 1.0, norms, labels))
    return found


def feature_maps(
    images: Tensor,
    split: FeatureSplit | FeatureNorms,
    *,
    prefix: int | None = None,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """What a window and its residual carry of images' features, as maps over the patches.

    One row per image: the image; the length of the window's part at each token, ||W_w x||; that of
    the residual's part. Under each map stands the part's share of the energy of these tokens. The
    colours of a column run from 0 to its largest value, written above it, so images compare and the
    two columns do not: the shares compare them.

    Args:
        images: (n, channels, height, width), as the model took them.
        split: of the same images, from :func:`lora_lens.forgetting.feature_split`, or only the lengths, from
            :func:`lora_lens.forgetting.feature_energies`; the tokens of an image are a square grid, row by
            row.
        prefix: how many tokens lead without a place in the image (class token, registers); default
            one if that leaves a square, else none.
        axes: to draw on, (n, 3), all in one figure; default a new pyplot figure.

    Returns:
        The Axes, shape (n, 3).

    Raises:
        ValueError: these are no images, not as many as were split, the tokens are no square, or
            ``axes`` have another shape.

    Example:
        >>> import lora_lens as ll, torch
        >>> images = torch.rand(2, 1, 8, 8)
        >>> norms = ll.forgetting.FeatureNorms(window_norms=torch.rand(2, 4), residual_norms=torch.rand(2, 4))
        >>> ll.plots.feature_maps(images, norms).shape
        (2, 3)
    """
    instance(images, Tensor, "images", "a tensor (n, channels, height, width)")
    instance(split, (FeatureSplit, FeatureNorms), "split", "what ll.forgetting.feature_split returns")
    prefix = None if prefix is None else whole_number(prefix, "prefix", least=0)
    count = len(split.window_norms)
    if images.ndim != 4 or len(images) != count:
        raise InputError(
            f"expected {count} images, (n, channels, height, width), as many as were split, "
            f"not a tensor of shape {tuple(images.shape)}"
        )
    maps = part_maps(split, prefix)
    with house_style():
        if axes is None:
            axes = plt.subplots(count, 3, figsize=(5.4, 1.75 * count + 0.5), squeeze=False)[1]
        if np.shape(axes) != (count, 3):
            raise InputError(f"expected axes of shape {(count, 3)}, not {np.shape(axes)}")
        axes = np.asarray(axes)
        some_axes(axes, 3 * count, "pictures")
        for ax, image in zip(axes[:, 0], images, strict=True):
            show_image(ax, image)
        axes[0, 0].set_title("image", fontsize=10.5, loc="center")
        for column, part in zip(axes[:, 1:].T, maps, strict=True):
            column[0].set_title(part.title, fontsize=10.5, loc="center")
            for ax, norms, label in zip(column, part.norms, part.labels, strict=True):
                _patch_map(ax, norms, part.top, images.shape[2:])
                ax.set_xlabel(label, fontsize=9)
    return axes


def show_image(ax: Axes, image: Tensor) -> None:
    """One image, (channels, height, width), from its darkest to its brightest value, without axes."""
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp_min(FLOOR)).permute(1, 2, 0).cpu().numpy()
    ax.imshow(
        pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0],
        cmap="gray",
        extent=(0, *pixels.shape[1::-1], 0),
    )
    ax.axis("off")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 1e-3 else f"{100 * share:.1g} %"


def _patch_map(ax: Axes, values: np.ndarray, top: float, size: Sequence[int]) -> None:
    """Values of patches, (side, side), where the patches lie on an image of ``size`` (height, width)."""
    extent = (0, size[1], size[0], 0)
    ax.imshow(values, cmap=HEAT, vmin=0, vmax=top, interpolation="nearest", extent=extent)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)
