"""Two spectra of the same weight side by side: before and after training, or model A and model B.

Singular vectors are known up to sign, and within equal singular values up to any rotation. Signs
never enter. :func:`change` depends on the weights alone; angles and overlaps on
subspaces, so they mean little where a window's or band's edge cuts through near equal values;
:func:`intruder_dimensions` on single vectors.

A spectrum in a metric has subspaces as well, so :func:`principal_angles` and :func:`overlap` compare its
windows with plain ones; what needs orthonormal right vectors refuses it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind, listed
from lora_lens._base.validate import choice, instance, number, whole_number
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet, require_plain
from lora_lens.spectrum.window import Placement, Window

Side = Literal["left", "right"]


def principal_angles(before: Spectrum, after: Spectrum, window: Window, side: Side = "left") -> Tensor:
    """The angles between the subspaces that the window's vectors span: (rank,), ascending, radians.

    In [0, pi / 2]; all 0 for the same subspace, pi / 2 where a direction is
    new. Björck and Golub 1973, "Numerical methods for
    computing angles between linear subspaces": cos(theta_i) = s_i(A^T B), and,
    where the cosine is too flat to tell small angles, sin(theta_i) from
    B - A A^T B. Exact to the vectors' float32 rounding, about 1e-7.

    Args:
        before: the spectrum of a weight.
        after: that of the same weight at another time.
        window: whose vectors are compared.
        side: the output side (left, columns of U) or the input side (right, rows of V^T).

    Raises:
        ValueError: shapes differ, the window does not fit, or vectors are missing.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> after = ll.spectrum.factorize("w", torch.diag(torch.tensor([1.0, 2.0, 4.0])))  # turned round
        >>> ll.spectrum.principal_angles(before, after, ll.Window.first(2)).rad2deg()
        tensor([ 0., 90.], dtype=torch.float64)
    """
    _check_shapes(before, after)
    _require_window(window)
    # Orthonormal to float64, not float32, or identical subspaces would be at an angle.
    a, b = (torch.linalg.qr(_vectors(s, window, side).double()).Q for s in (before, after))
    products = a.T @ b
    cosines = torch.linalg.svdvals(products).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ products).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def overlap(before: Spectrum, after: Spectrum, window: Window, side: Side = "left") -> float:
    """||U_w^T U'_w||_F^2 / rank, the mean squared cosine of the principal angles: in [0, 1].

    1 for the same subspace, 0 for orthogonal ones, on average rank / dimension
    for a random one. Hu et al. 2022, "LoRA: low-rank adaptation of large
    language models", equation 4.

    Args:
        before, after, window, side: as for :func:`principal_angles`.

    Raises:
        ValueError: as :func:`principal_angles`.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> after = ll.spectrum.factorize("w", torch.diag(torch.tensor([1.0, 2.0, 4.0])))  # turned round
        >>> round(ll.spectrum.overlap(before, after, ll.Window.first(2)), 3)  # one of two directions stays
        0.5
    """
    return _mean_squared_cosine(principal_angles(before, after, window, side))


def overlap_matrix(before: Spectrum, after: Spectrum, bins: int = 32, side: Side = "left") -> np.ndarray:
    """How much of each band of components lies in each band after: (bins, bins), float64, in [0, 1].

    Entry (i, j) is ||U_i^T U'_j||_F^2 / n_i for the n_i consecutive components
    of band i before and those of band j after: the identity where nothing
    turned between bands, n_j / dimension for random bases. A row sums to the
    share of its band within the space of all components after, which is 1
    where their number is the dimension. What turns within a band is not seen.

    Args:
        before: the spectrum of a weight, with all vectors.
        after: that of the same weight at another time, with all vectors.
        bins: how many bands of nearly equal size, in [1, k].
        side: as for :func:`principal_angles`.

    Raises:
        ValueError: shapes differ, vectors are missing, bins is not in [1, k].

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> after = ll.spectrum.factorize("w", torch.diag(torch.tensor([1.0, 2.0, 4.0])))  # turned round
        >>> ll.spectrum.overlap_matrix(before, after, bins=3).round(3)
        array([[0., 0., 1.],
               [0., 1., 0.],
               [1., 0., 0.]])
    """
    _check_shapes(before, after)
    _require_orthonormal(before, after, side)
    rows, columns = _bands(before, bins), _bands(after, bins)
    others = _vectors(after, _all_of(after), side)
    basis = _vectors(before, _all_of(before), side)
    matrix = np.empty((bins, bins))
    for i, (start, stop) in enumerate(pairwise(rows)):
        squares = (basis[:, start:stop].T @ others).square().double().sum(0).numpy()
        matrix[i] = np.add.reduceat(squares, columns[:-1]) / (stop - start)
    return matrix


class Change(NamedTuple):
    """How a weight W became W', as shares of ||W||_F; update^2 = stretch^2 + rotation^2.

    What :func:`change` returns.

    Attributes:
        update: ||W' - W||_F / ||W||_F, all that changed.
        stretch: ||s' - s|| / ||s||, the change of the singular values.
        rotation: the rest, the change of the singular vectors.
    """

    update: float
    stretch: float
    rotation: float


def change(before: Spectrum, after: Spectrum) -> Change:
    """The relative update of a weight, split into what its singular values and its vectors did.

    ||W' - W||^2 = ||s' - s||^2 + 2 (<s, s'> - <W, W'>), and the last term is
    not negative by von Neumann's trace inequality (Mirsky 1975, "A trace
    inequality of John von Neumann"). It is zero only if W and W' share singular
    vectors in the same order, so it is what the rotation of the singular basis
    moved. Signs and the basis chosen within equal singular values do not enter;
    swapping components of near equal value counts for as little as it does to
    the weight. All are at least 0; while s stays, rotation is at most 2, and
    about sqrt(2) for a random basis. Inf or NaN if W is zero. The float32
    vectors' rounding adds about 1e-7 to the update, and to the rotation up to
    1 % of the update where nothing turned.

    Args:
        before: the spectrum of a weight, with all vectors.
        after: that of the same weight at another time, with all vectors.

    Raises:
        ValueError: shapes differ, or vectors are missing.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 3.0])))
        >>> after = ll.spectrum.factorize("w", torch.diag(torch.tensor([4.0, 2.0])))
        >>> update, stretch, rotation = ll.spectrum.change(before, after)
        >>> round(update, 3), round(stretch, 3), round(rotation, 3)
        (0.2, 0.2, 0.0)
    """
    _check_shapes(before, after)
    for spectrum in (before, after):
        require_plain(spectrum, "how much of an update is rotation")
    size = max(before.k, after.k)
    s, t = (torch.nn.functional.pad(x.singular_values, (0, size - x.k)) for x in (before, after))
    difference = after.component(_all_of(after)) - before.component(_all_of(before))
    norm = torch.linalg.vector_norm(s)
    update = torch.linalg.vector_norm(difference, dtype=torch.float64) / norm
    stretch = torch.linalg.vector_norm(t - s) / norm
    rotation = (update.square() - stretch.square()).clamp(min=0).sqrt()
    return Change(float(update), float(stretch), float(rotation))


def intruder_dimensions(
    before: Spectrum, after: Spectrum, threshold: float = 0.5, count: int | None = None, side: Side = "left"
) -> Tensor:
    """The indices of components after that resemble no component before, ascending.

    Component j is an intruder if max_i |cos(u_i, u'_j)| < threshold over all
    singular vectors u_i before. Shuttleworth et al. 2024, "LoRA vs full
    fine-tuning: an illusion of equivalence", algorithm 1, which asks for new
    directions among the largest singular values: give their ``count``. Among
    the others singular values are close, and a vector that evenly
    mixes more than 1 / threshold^2 old neighbours counts as an intruder, too.

    Args:
        before, after: spectra of the same weight, all vectors before and the first ``count`` after.
        threshold: cosine in [0, 1].
        count: how many of the largest components after to ask; all if None or more than there are.
        side: left as in the paper, or right.

    Returns:
        Shape (intruders,), integers.

    Raises:
        ValueError: shapes differ, or vectors are missing.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> w = torch.zeros(4, 2)
        >>> w[0, 0], w[1, 1] = 4.0, 2.0
        >>> trained = w.clone()
        >>> trained[3, 1] = 8.0  # towards an output that no component before points to
        >>> before, after = ll.spectrum.factorize("w", w), ll.spectrum.factorize("w", trained)
        >>> ll.spectrum.intruder_dimensions(before, after)
        tensor([0])
    """
    _check_shapes(before, after)
    _require_orthonormal(before, after, side)
    threshold = number(threshold, "threshold", least=0, most=1)
    count = None if count is None else whole_number(count, "count", least=1)
    largest = Window(after.k if count is None else min(count, after.k), start=0)
    cosines = _vectors(before, _all_of(before), side).T @ _vectors(after, largest, side)
    return (cosines.abs().amax(0) < threshold).nonzero().flatten()


def compare(
    before: SpectrumSet | Spectrum,
    after: SpectrumSet | Spectrum,
    window: Window | None = None,
    *,
    threshold: float = 0.5,
    count: int | None = 10,
) -> pd.DataFrame:
    """One row per weight: what changed from ``before`` to ``after``.

    Columns: layer (module name), block and kind as in
    :meth:`lora_lens.spectrum.SpectrumSet.table`; update, stretch and rotation,
    as shares of the norm before, see :func:`change`; intruders, how many of the
    ``count`` largest components after are new, see :func:`intruder_dimensions`;
    with a ``window`` also start (of the window before), overlap_left and
    overlap_right (of the window's subspaces, in [0, 1]), degrees_left and
    degrees_right (the largest angle between them).

    Args:
        before: spectra with all vectors, such as of the pretrained model; or the spectrum of one weight.
        after: those of the same weights at another time.
        window: whose subspaces are compared as well; or None.
        threshold: the cosine in [0, 1] below which a component is new.
        count: how many of the largest components after are asked; all if None.

    Raises:
        ValueError: names or shapes differ, vectors are missing, or the window does not fit.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> w = torch.diag(torch.tensor([4.0, 3.0]))
        >>> before = ll.spectrum.factorize("blocks.0.fc", w)
        >>> after = ll.spectrum.factorize("blocks.0.fc", 2 * w)
        >>> ll.compare(before, after)[["layer", "update", "rotation", "intruders"]].round(3)
                 layer  update  rotation  intruders
        0  blocks.0.fc     1.0       0.0          0
    """
    for name, given in (("before", before), ("after", after)):
        instance(given, (Spectrum, SpectrumSet), name, "what ll.spectra returns, or a Spectrum of it")
    if window is not None:
        instance(window, Window, "window", "a Window, such as ll.Window.middle(8)")
    before, after = (SpectrumSet([s]) if isinstance(s, Spectrum) else s for s in (before, after))
    if alone := sorted(set(before) ^ set(after)):
        raise InputError(
            f"only one of the two has a spectrum of {listed(alone)}; compare spectra of the same layers"
        )
    rows = []
    for name, old in before.items():
        new = after[name]
        block, kind = block_and_kind(name)
        row = {"layer": name, "block": block, "kind": kind, **change(old, new)._asdict()}
        row["intruders"] = len(intruder_dimensions(old, new, threshold, count))
        if window is not None:
            row["start"] = window.slice(old.k, name).start
            angles = {side: principal_angles(old, new, window, side) for side in ("left", "right")}
            row |= {f"overlap_{side}": _mean_squared_cosine(a) for side, a in angles.items()}
            row |= {f"degrees_{side}": float(a[-1].rad2deg()) for side, a in angles.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_squared_cosine(angles: Tensor) -> float:
    return float(angles.cos().square().mean())


def _require_window(window: object) -> None:
    instance(window, Placement, "window", "a Window, such as ll.Window.middle(8)")


def _check_shapes(before: Spectrum, after: Spectrum) -> None:
    for name, given in (("before", before), ("after", after)):
        instance(given, Spectrum, name, "the Spectrum of one weight, such as ll.spectra(model)[layer]")
    if before.shape != after.shape:
        raise InputError(
            f"{before.name} has shape {before.shape} before and {after.name} has {after.shape} after; "
            "only spectra of one weight compare"
        )


def _require_orthonormal(before: Spectrum, after: Spectrum, side: Side) -> None:
    for spectrum in (before, after) if side == "right" else ():
        require_plain(spectrum, "a comparison of single right vectors")


def _all_of(spectrum: Spectrum) -> Window:
    return Window(spectrum.k, start=0)


def _vectors(spectrum: Spectrum, window: Window, side: Side) -> Tensor:
    """The window's vectors as columns: (out_features or in_features, rank), float32."""
    choice(side, "side", ("left", "right"))
    left, right = spectrum.vectors(window)
    return left if side == "left" else right.T


def _bands(spectrum: Spectrum, bins: int) -> np.ndarray:
    """The bounds of ``bins`` bands of nearly equal size: (bins + 1,), from 0 to k."""
    if not 1 <= whole_number(bins, "bins") <= spectrum.k:
        raise InputError(
            f"{bins} bins do not fit {spectrum.name}: its spectrum has {spectrum.k} components; "
            f"use 1 to {spectrum.k} bins"
        )
    return np.linspace(0, spectrum.k, bins + 1).astype(int)
