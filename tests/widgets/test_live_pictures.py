"""A picture that only moves must look like one that is drawn anew."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import lora_lens as ll
from lora_lens.forgetting.features import feature_energies
from lora_lens.plots._image import drawn
from lora_lens.widgets._live_pictures import PIXELS, DecompositionPicture, FeatureMapsPicture, SpectrumPicture
from lora_lens.widgets._picture import fixed_row

WINDOWS = [ll.Window.last(8), ll.Window.first(8), ll.Window(96, start=0), ll.Window.middle(8)]


def pixels(html: str) -> np.ndarray:
    png = b64decode(re.search('base64,([^"]+)', html)[1])
    return np.asarray(Image.open(BytesIO(png)), dtype=int)


@pytest.fixture(scope="module")
def qkv(spectra) -> ll.Spectrum:
    return spectra["blocks.0.attn.qkv"]


def test_a_moved_decomposition_is_that_of_the_plot(spectra):
    spectrum = spectra["blocks.0.attn.proj"]
    picture = DecompositionPicture(spectrum)
    for window in WINDOWS:
        anew = drawn(
            lambda figure, w=window: ll.plots.decomposition(spectrum, w, fixed_row(figure, 3)), "", (9, 3.2)
        )
        assert np.array_equal(pixels(picture.html(window, "")), pixels(anew))


def test_large_matrices_are_thinned_and_small_ones_are_not(spectra, qkv):
    assert DecompositionPicture(spectra["blocks.0.attn.proj"]).whole.shape == (96, 96)
    thin = DecompositionPicture(qkv)
    assert thin.whole.shape == (96, 96) and max(thin.whole.shape) <= PIXELS


def test_moved_feature_maps_are_those_of_the_plot(model, source, qkv):
    images = source.test.inputs[:3]
    energies = feature_energies(model, qkv.name, qkv, images)
    size = (5, 4)
    picture = FeatureMapsPicture(images, energies.norms(WINDOWS[0]), None, size)
    first = pixels(picture.html(energies.norms(WINDOWS[0]), ""))
    for window in [*WINDOWS[1:], WINDOWS[0]]:
        norms = energies.norms(window)
        anew = FeatureMapsPicture(images, norms, None, size)
        assert np.array_equal(pixels(picture.html(norms, "")), pixels(anew.html(norms, "")))
    assert np.array_equal(pixels(picture.html(energies.norms(WINDOWS[0]), "")), first)


def test_the_lengths_are_those_of_the_split(model, source, qkv):
    images = source.test.inputs[:3]
    energies = feature_energies(model, qkv.name, qkv, images)
    for window in WINDOWS:
        split, norms = (
            ll.forgetting.feature_split(model, qkv.name, qkv, window, images),
            energies.norms(window),
        )
        scale = split.residual_norms.max() + split.window_norms.max()
        assert torch.allclose(norms.window_norms, split.window_norms, rtol=1e-4, atol=1e-5 * float(scale))
        assert torch.allclose(norms.residual_norms, split.residual_norms, rtol=1e-4, atol=1e-5 * float(scale))
        assert torch.allclose(norms.shares, split.shares, atol=1e-5)


def test_only_the_window_moves_over_a_spectrum(qkv):
    picture = SpectrumPicture(qkv)
    first, middle = (pixels(picture.html(ll.Window(8, start=s), "")) for s in (0, 44))
    assert np.array_equal(pixels(picture.html(ll.Window(8, start=0), "")), first)
    changed = np.flatnonzero((first != middle).any(axis=(0, 2)))
    across = picture.span.axes.transData.transform([[-0.5, 1], [7.5, 1], [43.5, 1], [51.5, 1]])[:, 0]
    inside = [(changed >= across[i] - 1) & (changed <= across[i + 1] + 1) for i in (0, 2)]
    assert inside[0].any() and inside[1].any() and (inside[0] | inside[1]).all()
