"""Numbers that describe a spectrum: pure functions of the singular values of one weight.

Every function takes ``singular_values``, a float64 tensor of shape (k,), descending and not
negative; k is at least 1; anything else than a tensor of one axis raises InputTypeError or InputError.
None of the measures of dimension depends on the weight's scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance


def effective_rank(singular_values: Tensor) -> float:
    """exp(H(p)) with p_i = s_i / sum(s): in [1, k], or 0 for a zero weight.

    Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", definition 1.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> round(ll.spectrum.measures.effective_rank(torch.ones(8)), 3)  # eight directions of equal weight
        8.0
    """
    total = _checked(singular_values).sum()
    return float(torch.special.entr(singular_values / total).sum().exp()) if total > 0 else 0.0


def stable_rank(singular_values: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 = sum(s^2) / s_0^2: in [1, k], or 0 for a zero weight.

    Rudelson and Vershynin 2007, "Sampling from large matrices: an approach
    through geometric functional analysis".

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.measures.stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        1.5
    """
    return float(_relative(singular_values).square().sum())


def participation_ratio(singular_values: Tensor) -> float:
    """sum(s^2)^2 / sum(s^4): in [1, k], or 0 for a zero weight.

    How many eigenvalues s^2 of W^T W share in the squared Frobenius norm. Gao
    et al. 2017, "A theory of multineuronal dimensionality, dynamics and
    measurement", for the eigenvalues of a covariance.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.measures.participation_ratio(torch.tensor([2.0, 1.0, 1.0]))
        2.0
    """
    eigenvalues = _relative(singular_values).square()
    total = eigenvalues.sum()
    return float(total.square() / eigenvalues.square().sum()) if total > 0 else 0.0


def cumulative_energy(singular_values: Tensor) -> Tensor:
    """The share of ||W||_F^2 in components 0 to i, sum_{j <= i}(s_j^2) / sum(s^2): shape (k,).

    Rises to 1; all zeros for a zero weight.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.measures.cumulative_energy(torch.tensor([2.0, 1.0, 1.0])).tolist()  # 4, 5 and 6 of 6
        [0.6666666865348816, 0.8333333134651184, 1.0]
    """
    energy = _relative(singular_values).square().cumsum(0)
    return energy / energy[-1] if energy[-1] > 0 else energy


def spectral_gap(singular_values: Tensor) -> float:
    """1 - s_1 / s_0, the relative gap between the first two singular values: in [0, 1].

    1 for a weight of rank one, 0 where the first two are equal or the weight
    is zero. By Wedin 1972 a perturbation turns the first singular vectors by
    at most about its norm over s_0 - s_1, so a small gap means loose vectors.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.measures.spectral_gap(torch.tensor([4.0, 3.0, 1.0]))
        0.25
    """
    relative = _relative(singular_values)
    second = relative[1] if len(relative) > 1 else 0.0
    return float(relative[0] - second)


def condition_number(singular_values: Tensor) -> float:
    """s_0 / s_{k-1}: at least 1; inf if the smallest is zero, NaN for a zero weight.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.measures.condition_number(torch.tensor([4.0, 3.0, 1.0]))
        4.0
    """
    _checked(singular_values)
    return float(singular_values[0] / singular_values[-1])


@dataclass(frozen=True)
class PowerLaw:
    """A power law p(x) ~ x^-alpha fitted to the eigenvalues x = s^2 of W^T W from ``xmin`` on.

    Attributes:
        alpha: the exponent, above 1. Martin and Mahoney find 2 to 6 in
            well-trained networks; a smaller exponent is a heavier tail.
        xmin: the smallest eigenvalue of the tail.
        distance: the Kolmogorov-Smirnov distance between tail and fit, in
            [0, 1]. A small one says that a power law is possible, a large one that there is none.
        tail: how many eigenvalues are in the tail.
    """

    alpha: float
    xmin: float
    distance: float
    tail: int


def power_law(singular_values: Tensor) -> PowerLaw:
    """The power law that fits the largest eigenvalues of W^T W best.

    Martin and Mahoney 2021, "Implicit self-regularization in deep neural
    networks"; fitted as in Clauset, Shalizi and Newman 2009, "Power-law
    distributions in empirical data": for each eigenvalue as xmin,
    alpha = 1 + n / sum(log(x / xmin)) over the n from there on (equation 3.1);
    of these the fit with the least Kolmogorov-Smirnov distance (section 3.3).
    The empirical distribution at x counts the eigenvalues below x, as in the
    authors' own program, so that exponents compare with published ones. All
    NaN and an empty tail for fewer than two distinct positive values.

    Args:
        singular_values: shape (k,), descending, float64.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> eigenvalues = shares ** (-1 / 1.5)  # the quantiles of p(x) ~ x^-2.5 from 1 on
        >>> round(ll.spectrum.measures.power_law(eigenvalues.sqrt()).alpha, 1)
        2.5
    """
    eigenvalues = _checked(singular_values).numpy()[::-1] ** 2
    x = eigenvalues[eigenvalues > 0]
    n, below = len(x), np.searchsorted(x, x)
    starts = np.unique(below)[:-1]  # a tail of equal values has no exponent
    if len(starts) == 0:
        return PowerLaw(np.nan, np.nan, np.nan, 0)
    log_x = np.log(x / x[-1])  # relative to the largest, so that sums over short tails do not cancel
    sums = log_x[::-1].cumsum()[::-1]
    sizes = n - starts
    exponents = sizes / (sums[starts] - sizes * log_x[starts])  # alpha - 1
    distances = np.empty(len(starts))
    for i, (start, exponent) in enumerate(zip(starts, exponents, strict=True)):
        fitted = -np.expm1(exponent * (log_x[start] - log_x[start:]))
        distances[i] = np.abs(fitted - (below[start:] - start) / (n - start)).max()
    best = distances.argmin()
    return PowerLaw(
        alpha=float(1 + exponents[best]),
        xmin=float(x[starts[best]]),
        distance=float(distances[best]),
        tail=int(sizes[best]),
    )


@dataclass(frozen=True)
class MarchenkoPastur:
    """The random matrix whose bulk resembles a weight's.

    Attributes:
        sigma: the standard deviation of its independent entries.
        edge: its largest singular value, sigma * (sqrt(out) + sqrt(in)), but
            for fluctuations of relative size k^(-2/3).
        above: how many of the weight's singular values exceed the edge, and so
            what a random matrix cannot explain. A random matrix has 0 to 2.
    """

    sigma: float
    edge: float
    above: int


def marchenko_pastur(singular_values: Tensor, shape: tuple[int, int]) -> MarchenkoPastur:
    """What a random (out, in) matrix with the weight's median singular value would look like.

    The median, unlike the standard deviation of the entries, hardly moves when
    a few components stand out: sigma = median(s) / sqrt(max(out, in) * m), with
    m the median of the Marchenko-Pastur law of ratio min / max. Gavish and
    Donoho 2014, "The optimal hard threshold for singular values is 4/sqrt(3)",
    for unknown noise. Where a large share of the components stands out the median
    rises with them and sigma is too large, so ``above`` counts too few.

    Components beyond the k given, as of an adapter's update, count as zero;
    if those are most, sigma is 0 and all others are above the edge.

    Args:
        singular_values: shape (k,), descending, float64.
        shape: (out_features, in_features) of the weight.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> noise = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
        >>> planted = noise + torch.ones(200, 100)  # one direction that is no noise
        >>> s = ll.spectrum.factorize("w", planted).singular_values
        >>> ll.spectrum.measures.marchenko_pastur(s, (200, 100)).above
        1
    """
    _checked(singular_values)
    smaller, larger = sorted(shape)
    values = np.zeros(smaller)
    values[: len(singular_values)] = singular_values.numpy()
    sigma = float(np.median(values) / np.sqrt(larger * _median_of_law(smaller / larger)))
    edge = sigma * (smaller**0.5 + larger**0.5)
    return MarchenkoPastur(sigma, edge, int((values > edge).sum()))


@lru_cache(maxsize=128)
def _median_of_law(ratio: float) -> float:
    """The median of the Marchenko-Pastur law of unit variance: in [0.65, 1), to about 1e-6.

    Its density sqrt((b - x)(x - a)) / (2 pi ratio x) on [a, b] = (1 -+ sqrt(ratio))^2 becomes, with
    x = 1 + ratio - 2 sqrt(ratio) cos(t), the smooth 2 sin(t)^2 / (pi x) on [0, pi].
    """
    steps = 10_000
    t = (np.arange(steps) + 0.5) * (np.pi / steps)  # midpoints: at ratio 1 the ends are 0 / 0
    x = 1 + ratio - 2 * np.sqrt(ratio) * np.cos(t)
    mass = (2 * np.sin(t) ** 2 / (np.pi * x)).cumsum() * (np.pi / steps)  # up to the end of each step
    middle = np.interp(0.5, mass, t + 0.5 * np.pi / steps)
    return float(1 + ratio - 2 * np.sqrt(ratio) * np.cos(middle))


def _checked(singular_values: Tensor) -> Tensor:
    instance(singular_values, Tensor, "singular_values", "a tensor, such as spectrum.singular_values")
    if singular_values.ndim != 1 or not len(singular_values):
        raise InputError(f"singular_values must have shape (k,), not {tuple(singular_values.shape)}")
    return singular_values


def _relative(singular_values: Tensor) -> Tensor:
    """s / s_0, whose squares neither over- nor underflow; zeros for a zero weight."""
    largest = _checked(singular_values)[0]
    return singular_values / largest if largest > 0 else torch.zeros_like(singular_values)
