from __future__ import annotations

import math

import numpy as np
import powerlaw
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lora_lens.spectrum.measures import (
    MarchenkoPastur,
    PowerLaw,
    condition_number,
    cumulative_energy,
    effective_rank,
    marchenko_pastur,
    participation_ratio,
    power_law,
    spectral_gap,
    stable_rank,
)


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gaussian(out: int, inputs: int, seed: int, sigma: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sigma * torch.randn(out, inputs, generator=generator, dtype=torch.float64)


def pareto(k: int, exponent: float, seed: int) -> torch.Tensor:
    """Singular values whose squares are drawn from x^-exponent, x >= 1."""
    uniform = np.random.default_rng(seed).random(k)
    return torch.from_numpy(np.sort(uniform ** (-1 / (exponent - 1)))[::-1].copy()).sqrt()


DIMENSIONS = [effective_rank, stable_rank, participation_ratio]


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_dimensions_of_extreme_spectra(dimension):
    assert dimension(torch.full((16,), 0.3, dtype=torch.float64)) == pytest.approx(16)
    assert dimension(values(5, 0, 0)) == pytest.approx(1)
    assert dimension(values(5)) == pytest.approx(1)
    assert dimension(values(0, 0, 0)) == 0 == dimension(values(0))


def test_dimensions_by_hand():
    s = values(3, 1)
    assert effective_rank(s) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert stable_rank(s) == pytest.approx(10 / 9)
    assert participation_ratio(s) == pytest.approx(10**2 / 82)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@given(
    s=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    scale=st.sampled_from([1e-200, 1e-8, 1e8, 1e200]),
)
@settings(deadline=None)
def test_dimensions_lie_between_one_and_k_at_any_scale(dimension, s, scale):
    s = values(*sorted(s, reverse=True))
    assert 1 - 1e-9 <= dimension(s) <= len(s) + 1e-9
    assert dimension(s * scale) == pytest.approx(dimension(s))


def test_cumulative_energy():
    torch.testing.assert_close(cumulative_energy(values(2, 1, 1)), values(4, 5, 6) / 6)
    assert torch.equal(cumulative_energy(values(0, 0)), values(0, 0))
    assert torch.equal(cumulative_energy(values(7)), values(1))
    energy = cumulative_energy(torch.linalg.svdvals(gaussian(30, 20, 0)))
    assert (energy.diff() > 0).all() and energy[-1] == 1


def test_gap_and_condition_number():
    assert spectral_gap(values(4, 3, 1)) == pytest.approx(0.25)
    assert condition_number(values(4, 3, 1)) == pytest.approx(4)
    assert (spectral_gap(values(2, 2, 1)), spectral_gap(values(2, 0))) == (0, 1)
    assert (spectral_gap(values(2)), condition_number(values(2))) == (1, 1)
    assert condition_number(values(2, 0)) == math.inf
    assert spectral_gap(values(0, 0)) == 0 and math.isnan(condition_number(values(0, 0)))


@pytest.mark.filterwarnings("ignore")  # the package's, about single tails
@pytest.mark.parametrize(
    "s",
    [
        pareto(300, 2.0, 0),
        pareto(300, 4.5, 1),
        torch.linalg.svdvals(gaussian(200, 120, 2)),
        torch.linalg.svdvals(gaussian(96, 96, 3)),
        torch.cat([pareto(60, 2.5, 4), torch.zeros(20, dtype=torch.float64)]),
        pareto(80, 3.0, 5).mul(4).round().div(4),  # ties
    ],
    ids=["heavy", "light", "tall random", "square random", "with zeros", "with ties"],
)
def test_the_power_law_is_that_of_the_powerlaw_package(s):
    # Its own default allows no exponent above 3.
    expected = powerlaw.Fit(s.square().numpy(), verbose=0, parameter_ranges={"alpha": [1, None]})
    fit = power_law(s)
    assert fit.alpha == pytest.approx(expected.alpha, rel=1e-9)
    assert fit.xmin == pytest.approx(expected.xmin, rel=1e-12)
    assert fit.distance == pytest.approx(expected.D, rel=1e-9)
    assert fit.tail == (s.square() >= fit.xmin).sum()


@pytest.mark.parametrize("exponent", [2.0, 3.0, 5.0])
def test_the_exponent_of_a_true_power_law_is_found(exponent):
    fit = power_law(pareto(4000, exponent, 0))
    assert fit.alpha == pytest.approx(exponent, rel=0.1) and fit.distance < 0.03
    assert power_law(pareto(4000, exponent, 0) * 100).alpha == pytest.approx(fit.alpha)


@pytest.mark.parametrize("s", [values(0, 0), values(0), values(3), values(3, 0), values(2, 2, 2)])
def test_no_tail_no_exponent(s):
    fit = power_law(s)
    assert isinstance(fit, PowerLaw) and fit.tail == 0
    assert all(math.isnan(x) for x in (fit.alpha, fit.xmin, fit.distance))


def test_nearly_equal_values_have_a_steep_exponent():
    fit = power_law(torch.linalg.svdvals(torch.linalg.qr(gaussian(64, 64, 0)).Q))
    assert fit.tail == 0 or fit.alpha > 1e3


SHAPES = [(300, 300), (600, 150), (128, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_matrix_is_all_bulk(shape, seed):
    found = marchenko_pastur(torch.linalg.svdvals(gaussian(*shape, seed, sigma=0.02)), shape)
    assert found.sigma == pytest.approx(0.02, rel=0.015)
    assert found.edge == pytest.approx(found.sigma * (shape[0] ** 0.5 + shape[1] ** 0.5))
    assert found.above <= 2  # the largest value fluctuates about the edge (Tracy and Widom)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spikes", [1, 5, 12])
def test_planted_components_stand_above_the_edge_and_leave_sigma_alone(shape, spikes):
    noise = gaussian(*shape, seed=1, sigma=0.02)
    left = torch.linalg.qr(gaussian(shape[0], spikes, 2)).Q
    right = torch.linalg.qr(gaussian(shape[1], spikes, 3)).Q
    sizes = 0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5) * torch.linspace(20, 1.5, spikes, dtype=torch.float64)
    weight = noise + left * sizes @ right.T
    found = marchenko_pastur(torch.linalg.svdvals(weight), shape)
    assert found.above == spikes
    assert found.sigma == pytest.approx(0.02, rel=0.04)
    if spikes > 1:
        assert weight.std() > 1.5 * found.sigma


def test_the_median_of_the_law_gives_the_published_threshold():
    # Gavish and Donoho: threshold / median is 4 / sqrt(3 m) for square matrices, 2.858 in the abstract.
    square = marchenko_pastur(torch.ones(100, dtype=torch.float64), (100, 100))
    assert 4 / 3**0.5 * square.sigma * 10 == pytest.approx(2.858, abs=5e-4)
    # Table IV: 1.5194 at a ratio of 0.05 and 2.1711 at 0.5 for the ratio to the median.
    for ratio, published in [(0.05, 1.5194), (0.5, 2.1711)]:
        m = round(2000 * ratio)
        found = marchenko_pastur(torch.ones(m, dtype=torch.float64), (m, 2000))
        root = math.sqrt(ratio**2 + 14 * ratio + 1)
        known_noise = math.sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root))
        assert known_noise * found.sigma * math.sqrt(2000) == pytest.approx(published, abs=2e-3)


def test_edges_of_the_random_matrix():
    assert marchenko_pastur(values(0, 0), (2, 5)) == MarchenkoPastur(0, 0, 0)
    assert marchenko_pastur(values(3), (1, 1)).above == 0
    update = marchenko_pastur(values(3, 2), (64, 32))  # an adapter's, of rank 2
    assert (update.sigma, update.edge, update.above) == (0, 0, 2)


def test_the_embedded_model_is_neither_random_nor_of_low_rank(model, spectra):
    for name, spectrum in spectra.items():
        s = spectrum.singular_values
        random = marchenko_pastur(s, spectrum.shape)
        assert 10 < random.above < spectrum.k / 2
        assert random.sigma < model.get_submodule(name).weight.detach().std()
        fit = power_law(s)
        assert 1 < fit.alpha < 4 and fit.distance < 0.15 and fit.tail > 40
        assert 1 < stable_rank(s) < participation_ratio(s) < effective_rank(s) < spectrum.k
