"""The spectrum of a weight: its singular values and vectors, computed once and then sliced.

``spectra(model)`` factorizes every matching weight; windows, adapters and
plots read from the result and never factorize again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from lora_lens.factorization import thin_svd
from lora_lens.layers import Targets, block_and_kind, check_finite, listed, target_layers
from lora_lens.progress import progress_bar
from lora_lens.window import Window


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The thin singular value decomposition W = U S V^T of one weight.

    Attributes:
        name: dotted module name, such as ``blocks.0.attn.qkv``.
        singular_values: S, shape (k,), float64, descending; k = min(out, in).
        left: U, shape (out_features, k), float32, orthonormal columns.
        right: V^T, shape (k, in_features), float32, orthonormal rows.
    """

    name: str
    singular_values: Tensor
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the weight."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def k(self) -> int:
        """The number of components, min(out_features, in_features)."""
        return len(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp(H(p)) with p_i = s_i / sum(s): between 1 and k.

        Roy and Vetterli 2007, "The effective rank: a measure of effective
        dimensionality", definition 1. 0 for a zero weight.
        """
        total = self.singular_values.sum()
        if total == 0:
            return 0.0
        p = self.singular_values / total
        return float(torch.special.entr(p).sum().exp())

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / ||W||_2^2 = sum(s^2) / s_0^2: between 1 and k.

        Rudelson and Vershynin 2007, "Sampling from large matrices". 0 for a
        zero weight.
        """
        largest = self.singular_values[0]
        return float((self.singular_values / largest).square().sum()) if largest > 0 else 0.0

    def energy(self, window: Window) -> float:
        """The window's share of the squared Frobenius norm, sum_w(s^2) / sum(s^2): in [0, 1]."""
        squares = self.singular_values.square()
        total = squares.sum()
        return float(squares[window.slice(self.k, self.name)].sum() / total) if total > 0 else 0.0

    def component(self, window: Window) -> Tensor:
        """The part of the weight the window holds, U_w S_w V_w^T: (out_features, in_features), float32."""
        part = window.slice(self.k, self.name)
        return self.left[:, part] * self.singular_values[part].float() @ self.right[part]


class SpectrumSet(Mapping[str, Spectrum]):
    """The spectra of a model's weights by module name, in the model's order."""

    def __init__(self, spectra: Sequence[Spectrum]):
        self._spectra = {s.name: s for s in spectra}

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self._spectra:
            raise KeyError(f"no spectrum of {name!r}; there are spectra of {listed(self._spectra)}")
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def __repr__(self) -> str:
        return f"SpectrumSet of {len(self)} weights: {listed(self._spectra)}"

    def table(self, window: Window | None = None) -> pd.DataFrame:
        """One row per weight.

        Columns: layer (module name), block (first number in the name, or -1),
        kind (the name without that number), out, in, k, largest and smallest
        (singular values), effective_rank, stable_rank; with a ``window`` also
        start (of the window in this weight) and energy (its share, in [0, 1]).
        """
        rows = []
        for spectrum in self.values():
            block, kind = block_and_kind(spectrum.name)
            row = {
                "layer": spectrum.name,
                "block": block,
                "kind": kind,
                "out": spectrum.shape[0],
                "in": spectrum.shape[1],
                "k": spectrum.k,
                "largest": float(spectrum.singular_values[0]),
                "smallest": float(spectrum.singular_values[-1]),
                "effective_rank": spectrum.effective_rank,
                "stable_rank": spectrum.stable_rank,
            }
            if window is not None:
                row["start"] = window.slice(spectrum.k, spectrum.name).start
                row["energy"] = spectrum.energy(window)
            rows.append(row)
        return pd.DataFrame(rows)


def spectra(model: nn.Module, targets: Targets = None, progress: bool = True) -> SpectrumSet:
    """Factorize every matching weight of ``model`` once.

    Args:
        model: any module with ``nn.Linear`` layers; it is only read.
        targets: which layers, see :func:`lora_lens.layers.target_layers`; default all but the classifier.
        progress: show a bar when it takes longer than a moment.

    Returns:
        One :class:`Spectrum` per weight, on the CPU, computed in float64.

    Raises:
        ValueError: no layer matches, a match is no ``nn.Linear``, or a weight
            holds NaN or infinite values.
    """
    layers = target_layers(model, targets)
    for name, layer in layers.items():
        check_finite(name, layer.weight)
    bar = progress_bar(layers.items(), shown=progress, desc="spectra", unit="weight", delay=0.5)
    return SpectrumSet([factorize(name, layer.weight) for name, layer in bar])


def factorize(name: str, weight: Tensor) -> Spectrum:
    """The spectrum of one (out_features, in_features) weight, exact to float64 rounding."""
    left, values, right = thin_svd(weight.detach().to("cpu", torch.float64))
    return Spectrum(name, values, left.float(), right.float())
