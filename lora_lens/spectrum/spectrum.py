"""The spectrum of a weight: its singular values and vectors, computed once and then sliced.

:func:`lora_lens.spectra` makes them; windows, adapters and plots read from them and never factorize again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind, listed
from lora_lens._base.validate import flag, instance, sequence
from lora_lens.spectrum import measures
from lora_lens.spectrum.window import Placement

WINDOW = "a window or other placement, such as ll.Window.middle(8)"


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The thin singular value decomposition W = U S V^T of one weight.

    Attributes:
        name: dotted module name, such as ``blocks.0.attn.qkv``.
        shape: (out_features, in_features) of the weight.
        singular_values: S, shape (k,), float64, descending; k = min(out, in), or
            the rank of an adapter's update.
        left: U, shape (out_features, c), float32, orthonormal columns; None if
            only the values were computed.
        right: V^T, shape (c, in_features), float32, orthonormal rows; or None.
        components: shape (c,), which components ``left`` and ``right`` hold,
            ascending; None if they hold all k.
        metric: None; or, of a spectrum in the metric of a layer's inputs, that metric in words and with a
            hash (see :class:`lora_lens.spectrum.Metric`). Then W C^p = U S V^T, and ``right`` is V^T C^-p:
            its rows are not orthonormal, but ``left @ diag(singular_values) @ right`` is W as ever.
        shrinkage: which share of C is a multiple of the identity, in [0, 1]; 0 without a metric.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> spectrum = ll.spectrum.factorize("fc", torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> spectrum
        <Spectrum of fc, 3 x 3: 3 singular values, the largest 4; all vectors>
        >>> window = ll.Window.last(rank=1)
        >>> spectrum.component(window)  # what the window holds of the weight
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 1.]])
        >>> round(spectrum.energy(window), 4)  # 1 / 21
        0.0476
    """

    name: str
    shape: tuple[int, int]
    singular_values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    components: Tensor | None = None
    metric: str | None = None
    shrinkage: float = 0.0

    def __repr__(self) -> str:
        held = "all" if self.has_all_vectors else 0 if self.left is None else self.left.shape[1]
        largest = f", the largest {self.singular_values[0]:.4g}" if self.k else ""
        shape = " x ".join(map(str, self.shape))
        within = f"; {self.metric}" if self.metric else ""
        return (
            f"<Spectrum of {self.name}, {shape}: {self.k} singular values{largest}; {held} vectors{within}>"
        )

    @property
    def k(self) -> int:
        """The number of components."""
        return len(self.singular_values)

    @property
    def has_all_vectors(self) -> bool:
        return self.left is not None and self.left.shape[1] == self.k

    @property
    def effective_rank(self) -> float:
        """See :func:`lora_lens.spectrum.measures.effective_rank`."""
        return measures.effective_rank(self.singular_values)

    @property
    def stable_rank(self) -> float:
        """See :func:`lora_lens.spectrum.measures.stable_rank`."""
        return measures.stable_rank(self.singular_values)

    def energy(self, window: Placement) -> float:
        """The share of the squared Frobenius norm, sum_w(s^2) / sum(s^2): in [0, 1].

        In a metric of power 1/2 that is the share of the layer's mean squared output on the metric's data.
        """
        squares = self.singular_values.square()
        total = squares.sum()
        part = self._part(window)
        return float(squares[part].sum() / total) if total > 0 else 0.0

    def components_of(self, window: Placement) -> Tensor:
        """The indices of a window's or another placement's components, shape (rank,), ascending.

        Raises:
            ValueError: the placement does not fit.
        """
        return torch.arange(self.k)[self._part(window)]

    def vectors(self, window: Placement) -> tuple[Tensor, Tensor]:
        """U_w, shape (out_features, rank), and V_w^T, shape (rank, in_features), float32.

        Raises:
            ValueError: the placement does not fit, or its vectors were not computed.
        """
        part = self._part(window)
        if self.left is None or self.right is None:
            raise InputError(
                f"the spectrum of {self.name} has no singular vectors; "
                "compute it with spectra(..., vectors=True)"
            )
        if self.components is not None:
            wanted = self.components_of(window)
            part = torch.searchsorted(self.components, wanted).clamp_max(len(self.components) - 1)
            if not torch.equal(self.components[part], wanted):
                raise InputError(
                    f"the spectrum of {self.name} holds vectors for other components than {_named(wanted)}; "
                    "compute it with spectra(..., vectors=True) for all"
                )
            if int(part[-1] - part[0]) == len(part) - 1:
                part = slice(int(part[0]), int(part[-1]) + 1)  # a view instead of a copy
        return self.left[:, part], self.right[part]

    def component(self, window: Placement) -> Tensor:
        """The part of the weight the window holds, U_w S_w V_w^T: (out_features, in_features), float32.

        In a metric U_w S_w V_w^T C^-p, which is U_w U_w^T W.

        Raises:
            ValueError: as :meth:`vectors`.
        """
        left, right = self.vectors(window)
        return left * self.singular_values[self._part(window)].float() @ right

    def _part(self, window: Placement) -> slice | Tensor:
        return instance(window, Placement, "window", WINDOW).components(self.singular_values, self.name)


def require_plain(spectrum: Spectrum, what: str) -> None:
    """Raise a ValueError if a spectrum is in a metric, where ``what`` would be wrong."""
    if spectrum.metric is not None:
        raise InputError(
            f"{what} needs the plain spectrum of {spectrum.name}, and this one is in the {spectrum.metric}: "
            "its right vectors are not orthonormal and its values not those of the weight; give "
            "ll.spectra(model) without metric="
        )


def _named(components: Tensor) -> str:
    first, last = int(components[0]), int(components[-1])
    if last - first == len(components) - 1:
        return f"[{first}, {last + 1})"
    return listed([str(int(i)) for i in components], most=6)


class SpectrumSet(Mapping[str, Spectrum]):
    """The spectra of a model's weights by module name, in the model's order.

    A mapping of names to :class:`Spectrum`; :meth:`table` describes them all.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> fc = ll.spectrum.factorize("fc", torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> spectra = ll.SpectrumSet([fc])
        >>> spectra
        SpectrumSet of 1 weights: fc
        >>> spectra.table()[["layer", "k", "largest", "stable_rank"]]
          layer  k  largest  stable_rank
        0    fc  3      4.0       1.3125
    """

    def __init__(self, spectra: Iterable[Spectrum]):
        """Raises TypeError, ValueError: something else is among them, one name twice, or two metrics."""
        self._spectra: dict[str, Spectrum] = {}
        for spectrum in sequence(spectra, "spectra", "Spectrum objects"):
            instance(spectrum, Spectrum, "spectra", "a sequence of Spectrum objects")
            if spectrum.name in self._spectra:
                raise InputError(f"two spectra are of one weight, {spectrum.name}; a set has one of each")
            self._spectra[spectrum.name] = spectrum
        if len(metrics := dict.fromkeys(spectrum.metric for spectrum in self.values())) > 1:
            kinds = listed([str(metric or "no metric") for metric in metrics])
            raise InputError(f"the spectra of a set are in one metric, not in {kinds}; make a set of each")

    @property
    def metric(self) -> str | None:
        """That of all spectra, see :class:`Spectrum`; None for plain ones."""
        return next((spectrum.metric for spectrum in self.values()), None)

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self._spectra:
            raise KeyError(f"no spectrum of {name!r}; there are spectra of {listed(self._spectra)}")
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def __repr__(self) -> str:
        within = f" in the {self.metric}" if self.metric else ""
        return f"SpectrumSet of {len(self)} weights{within}: {listed(self._spectra)}"

    def table(self, window: Placement | None = None, *, power_law: bool = False) -> pd.DataFrame:
        """One row per weight.

        Columns: layer (module name), block (first number in the name, or -1),
        kind (the name without that number), out, in, k, largest and smallest
        (singular values); effective_rank, stable_rank, participation_ratio,
        spectral_gap and condition_number; mp_edge and above_mp, the largest
        singular value of a random matrix with the same bulk and how many exceed
        it (Marchenko and Pastur); NaN in a metric, where there is no such law, and
        shrinkage in their place. With a ``window`` also start (of the window in
        this weight) and energy (its share, in [0, 1]). With ``power_law`` also
        alpha, distance and tail of the fit to the largest eigenvalues, which
        takes longer for large weights. All are defined in
        :mod:`lora_lens.spectrum.measures`.
        """
        flag(power_law, "power_law")
        if window is not None:
            instance(window, Placement, "window", WINDOW)
        rows = []
        for spectrum in self.values():
            block, kind = block_and_kind(spectrum.name)
            s = spectrum.singular_values
            in_metric = spectrum.metric is not None
            bulk = None if in_metric else measures.marchenko_pastur(s, spectrum.shape)
            row = {
                "layer": spectrum.name,
                "block": block,
                "kind": kind,
                "out": spectrum.shape[0],
                "in": spectrum.shape[1],
                "k": spectrum.k,
                "largest": float(s[0]),
                "smallest": float(s[-1]),
                "effective_rank": spectrum.effective_rank,
                "stable_rank": spectrum.stable_rank,
                "participation_ratio": measures.participation_ratio(s),
                "spectral_gap": measures.spectral_gap(s),
                "condition_number": measures.condition_number(s),
                "mp_edge": bulk.edge if bulk else math.nan,
                "above_mp": bulk.above if bulk else math.nan,
            }
            if in_metric:
                row["shrinkage"] = spectrum.shrinkage
            if window is not None:
                row["start"] = int(spectrum.components_of(window)[0])
                row["energy"] = spectrum.energy(window)
            if power_law:
                fit = measures.power_law(s)
                row |= {"alpha": fit.alpha, "distance": fit.distance, "tail": fit.tail}
            rows.append(row)
        return pd.DataFrame(rows)
