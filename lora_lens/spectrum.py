"""The spectrum of a weight: its singular values and vectors, computed once and then sliced.

``spectra(model)`` factorizes every matching weight; windows, adapters and
plots read from the result and never factorize again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from lora_lens.cache import SpectrumCache, weight_key
from lora_lens.factorization import product_svd, singular_values, thin_svd
from lora_lens.layers import Targets, block_and_kind, check_finite, listed
from lora_lens.progress import progress_bar
from lora_lens.weights import Weight, weights
from lora_lens.window import Window

METHOD = "gram float64, float32 vectors"  # change it when the factors change
CACHED_FROM = 256  # smaller matrices are factorized faster than looked up


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The thin singular value decomposition W = U S V^T of one weight.

    Attributes:
        name: dotted module name, such as ``blocks.0.attn.qkv``.
        shape: (out_features, in_features) of the weight.
        singular_values: S, shape (k,), float64, descending; k = min(out, in), or
            the rank of an adapter's update.
        left: U, shape (out_features, k), float32, orthonormal columns; None if
            only the values were computed.
        right: V^T, shape (k, in_features), float32, orthonormal rows; or None.
    """

    name: str
    shape: tuple[int, int]
    singular_values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def k(self) -> int:
        """The number of components."""
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

    def vectors(self, window: Window) -> tuple[Tensor, Tensor]:
        """U_w, shape (out_features, rank), and V_w^T, shape (rank, in_features), float32.

        Raises:
            ValueError: the window does not fit, or only the values were computed.
        """
        if self.left is None or self.right is None:
            raise ValueError(
                f"the spectrum of {self.name} has no singular vectors; "
                "compute it with spectra(..., vectors=True)"
            )
        part = window.slice(self.k, self.name)
        return self.left[:, part], self.right[part]

    def component(self, window: Window) -> Tensor:
        """The part of the weight the window holds, U_w S_w V_w^T: (out_features, in_features), float32.

        Raises:
            ValueError: as :meth:`vectors`.
        """
        left, right = self.vectors(window)
        return left * self.singular_values[window.slice(self.k, self.name)].float() @ right


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


def spectra(
    source: nn.Module | str | Path,
    targets: Targets = None,
    *,
    vectors: bool = True,
    split_qkv: bool = False,
    cache: bool = True,
    progress: bool = True,
) -> SpectrumSet:
    """Factorize every matching weight of ``source`` once.

    Args:
        source: a model, a ``.safetensors`` or ``.gguf`` file, a folder of shards or of a PEFT
            adapter; see :func:`lora_lens.weights.weights`. Files are read one matrix at a time.
        targets: which layers, see there; default all linear layers but the classifier.
        vectors: False computes the singular values only, in less time and memory; enough for
            tables and pictures, not for windows.
        split_qkv: fused q, k and v as three weights, see there.
        cache: keep factors of large weights on disk and find them there by the weight's content;
            see :class:`lora_lens.cache.SpectrumCache`.
        progress: show a bar when it takes longer than a moment.

    Returns:
        One :class:`Spectrum` per weight, on the CPU, computed in float64.

    Raises:
        ValueError, FileNotFoundError: nothing matches, a weight holds NaN or infinite values, or
            as :func:`lora_lens.weights.weights`.
    """
    found = weights(source, targets, split_qkv)
    if isinstance(source, nn.Module):  # all are at hand: meet a bad one before the work starts
        for weight in found:
            check_finite(weight.name, weight.load())
    kept = SpectrumCache() if cache and vectors else None
    bar = progress_bar(found, shown=progress, desc="spectra", unit="weight", delay=0.5)
    return SpectrumSet([_spectrum(weight, vectors, kept) for weight in bar])


def factorize(name: str, weight: Tensor) -> Spectrum:
    """The spectrum of one (out_features, in_features) weight, exact to float64 rounding."""
    left, values, right = thin_svd(weight.detach().to("cpu", torch.float64))
    # Contiguous, so that products with fresh factors round as with those from the cache.
    left, right = left.float().contiguous(), right.float().contiguous()
    return Spectrum(name, tuple(weight.shape), values, left, right)


def _spectrum(weight: Weight, vectors: bool, cache: SpectrumCache | None) -> Spectrum:
    if weight.factors is not None:
        b, a = (factor.to("cpu", torch.float64) for factor in weight.factors())
        check_finite(weight.name, b)
        check_finite(weight.name, a)
        left, values, right = product_svd(b, a)
        factors = (left.float(), right.float()) if vectors else ()
        return Spectrum(weight.name, weight.shape, values, *factors)
    matrix = weight.load()
    check_finite(weight.name, matrix)
    if not vectors:
        return Spectrum(weight.name, weight.shape, singular_values(matrix.detach().to("cpu", torch.float64)))
    if cache is None or min(weight.shape) < CACHED_FROM:
        return factorize(weight.name, matrix)
    key = weight_key(matrix, METHOD)
    if (known := cache.get(key)) is not None:
        left, values, right = known
        return Spectrum(weight.name, weight.shape, values, left, right)
    spectrum = factorize(weight.name, matrix)
    cache.put(key, spectrum.left, spectrum.singular_values, spectrum.right)
    return spectrum
