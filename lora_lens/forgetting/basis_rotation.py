"""How far training turned the singular bases of a model's weights.

Quercia et al. (arXiv 2602.03493) hold this rotation responsible for forgetting.
"""

from __future__ import annotations

import pandas as pd
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.validate import choice, instance, number, whole_number
from lora_lens.adapters.injection import attached, lora_layers, require_unmerged
from lora_lens.adapters.start import effective_weight
from lora_lens.forgetting.weight_drift import (
    basis,
    require_finite,
    require_start_of,
    some_rows,
    start_rows,
    trained_layers,
)
from lora_lens.spectrum.comparison import Side, compare
from lora_lens.spectrum.factorizing import factorize
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Window


def rotations(
    adapted: nn.Module, spectra: SpectrumSet, *, threshold: float = 0.5, count: int = 10
) -> pd.DataFrame:
    """One row per adapted layer: how far its singular vectors turned, as :func:`turned` shows entry by entry.

    Columns: layer; stretch and rotation, the parts of the update in shares of ||W||_F, see
    :func:`lora_lens.spectrum.change`; turned_left and turned_right, 1 - the mean over i of
    <u_i, u'_i>^2 in [0, 1], which is 0 where every vector stayed in its place; first_left and first_right,
    the same for the ``count`` largest components only, whose values lie apart, so that their order
    means something; degrees_left and degrees_right, the largest angle between the subspaces that those span
    before and after; intruders, how many of the ``count`` largest components after resemble none before,
    see :func:`lora_lens.spectrum.intruder_dimensions`.

    Every adapted weight is formed and factorized.

    Args:
        adapted: from :func:`lora_lens.attach`.
        spectra: of the pretrained model, with all vectors.
        threshold: the cosine below which a new vector is an intruder, in [0, 1].
        count: how many of the largest components are looked at separately; all where there are fewer.

    Raises:
        ValueError, TypeError: as :func:`lora_lens.forgetting.drift`; ``threshold`` or ``count`` is out of its
            range.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> adapted = ll.attach(model, ll.Window.first(2), targets="0", spectra=spectra)
        >>> with torch.no_grad():  # in place of training: the window's singular values grow by a tenth
        ...     _ = adapted.get_parameter("base_model.model.0.lora_B.default.weight").mul_(1.1)
        >>> turns = ll.forgetting.rotations(adapted, spectra)
        >>> turns[["layer", "rotation", "turned_left", "intruders"]].round(3)
          layer  rotation  turned_left  intruders
        0     0       0.0          0.0          0
    """
    count, threshold = whole_number(count, "count", least=1), number(threshold, "threshold", least=0, most=1)
    rows = []
    for name, layer, _, old in trained_layers(adapted, spectra):
        new = _spectrum_now(name, layer)
        first = Window(min(count, old.k), start=0)
        found = compare(old, new, first, threshold=threshold, count=first.rank).iloc[0]
        row = {"layer": name, "stretch": found["stretch"], "rotation": found["rotation"]}
        for side in ("left", "right"):
            kept = (basis(old, side) * basis(new, side)).sum(0).square()
            row[f"turned_{side}"] = 1 - float(kept.mean())
            row[f"first_{side}"] = 1 - float(kept[: first.rank].mean())
            row[f"degrees_{side}"] = found[f"degrees_{side}"]
        rows.append(row | {"intruders": int(found["intruders"])})
    return pd.DataFrame(rows)


def turned(adapted: nn.Module, layer: str, spectrum: Spectrum, side: Side = "left") -> Tensor:
    """|cos| of the angles between one layer's singular vectors before and now: (k, k), float32, in [0, 1].

    Entry (i, j) is |<u_i, u'_j>|, for vectors u of the pretrained weight and u' of the weight with its
    adapter, by descending singular values: the identity where nothing turned or changed its order,
    about 1 / sqrt(dimension) everywhere for random bases. Vectors of nearly equal singular values turn
    freely within their plane. :func:`lora_lens.spectrum.overlap_matrix` is the same by bands.

    Args:
        adapted: from :func:`lora_lens.attach`.
        layer: the name of an adapted layer.
        spectrum: of its pretrained weight, with all vectors.
        side: left (columns of U, outputs) or right (rows of V^T, inputs).

    Raises:
        ValueError, TypeError: the layer is not adapted, ``side`` is another word, or as :func:`drift`.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> adapted = ll.attach(model, ll.Window.first(2), targets="0", spectra=spectra)
        >>> bool(ll.forgetting.turned(adapted, "0", spectra["0"]).allclose(torch.eye(4), atol=1e-5))
        True
    """
    choice(side, "side", ("left", "right"))
    instance(layer, str, "layer", "the name of an adapted layer")
    instance(spectrum, Spectrum, "spectrum", "that of the layer, ll.spectra(model)[layer]")
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    found = lora_layers(peft_model)
    if layer not in found:
        raise InputError(f"{layer!r} is not adapted; these layers are: {listed(found)}")
    start = record.starts.get(layer)
    require_start_of(spectrum, layer, start_rows(found[layer], start, some_rows(spectrum)))
    old, new = (basis(s, side) for s in (spectrum, _spectrum_now(layer, found[layer])))
    return (old.T @ new).abs().clamp_max(1)


def _spectrum_now(name: str, layer: LoraLayer) -> Spectrum:
    """The spectrum of the weight with its adapter."""
    weight = effective_weight(layer)
    require_finite(name, weight)
    return factorize(name, weight)
