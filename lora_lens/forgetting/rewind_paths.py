"""Ways back from a trained adapter to the pretrained model: which part of the update is scaled by t.

On every path the weight of a layer at t is W + t dW + (1 - t) K, where K is what the path keeps of the update
dW = scaling (B A - B_0 A_0): trained at t = 1, all but what is kept undone at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import Targets, listed
from lora_lens.forgetting.weight_drift import basis
from lora_lens.spectrum.comparison import intruder_dimensions
from lora_lens.spectrum.factorizing import factorize
from lora_lens.spectrum.patterns import matching
from lora_lens.spectrum.spectrum import Spectrum
from lora_lens.spectrum.svd import product_norm, product_svd
from lora_lens.spectrum.window import require_fit


@dataclass(frozen=True, eq=False)
class Moved:
    """What training did to one weight.

    Attributes:
        b, a: factors (out_features, R) and (R, in_features) of dW, float32 or more, on the CPU.
        weight: computes the pretrained weight W, (out_features, in_features), float64.
        spectrum: that of W, with all vectors, computed when it is first asked for.
    """

    b: Tensor
    a: Tensor
    weight: Callable[[], Tensor]
    spectrum: Callable[[], Spectrum]


@dataclass(frozen=True, eq=False)
class Part:
    """What a path keeps of one update, or what it drops of it, as factors; none where that is nothing.

    Attributes:
        drops: whether the factors are those of dW - K, not of K.
        b, a: (out_features, R) and (R, in_features).
    """

    drops: bool
    b: Tensor | None = None
    a: Tensor | None = None

    def coefficients(self, t: float) -> tuple[float, float]:
        """Of dW and of the factors in the update at ``t``."""
        return (1.0, t - 1) if self.drops else (t, 1 - t)


NOTHING_KEPT, ALL_KEPT = Part(drops=False), Part(drops=True)


class RewindPath(Protocol):
    """One way back."""

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        """What it keeps or drops of each layer's update."""
        ...


@dataclass(frozen=True)
class WholeUpdate:
    """Scale the whole update by t, of all layers or of some; the others stay as trained.

    Attributes:
        targets: names or patterns of layers as for :func:`lora_lens.spectrum.target_layers`, but for its
            groups; None is for all, and for the modules that PEFT trains in full (modules_to_save).

    Raises:
        ValueError, TypeError: ``targets`` are no names.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.forgetting.WholeUpdate(), "|", ll.forgetting.WholeUpdate("mlp.fc1"))
        whole update | update of mlp.fc1
    """

    targets: Targets = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", validate.patterns(self.targets))

    def __str__(self) -> str:
        return "whole update" if self.targets is None else f"update of {listed(self.targets, most=3)}"

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        if self.targets is None:
            return dict.fromkeys(layers, NOTHING_KEPT)
        chosen: set[str] = set()
        for pattern in self.targets:
            if not (found := matching(layers, pattern)):
                raise InputError(
                    f"no adapted layer is called {pattern!r}; these are adapted: {listed(layers)}"
                )
            chosen |= found
        return {name: NOTHING_KEPT if name in chosen else ALL_KEPT for name in layers}


@dataclass(frozen=True)
class MostMoved:
    """Scale by t the updates of the layers that training moved most; the others stay as trained.

    Attributes:
        count: how many, by ||dW||_F / ||W||_F.

    Raises:
        ValueError, TypeError: ``count`` is no whole number from 1.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.forgetting.MostMoved(6))
        update of the 6 layers that moved most
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", validate.whole_number(self.count, "count", least=1))

    def __str__(self) -> str:
        return f"update of the {self.count} layers that moved most"

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        if self.count > len(layers):
            raise InputError(f"count must be at most {len(layers)}, the adapted layers, not {self.count}")
        far = {n: product_norm(x.b, x.a) / torch.linalg.norm(x.weight()) for n, x in layers.items()}
        chosen = sorted(far, key=lambda name: -float(far[name]))[: self.count]
        return {name: NOTHING_KEPT if name in chosen else ALL_KEPT for name in layers}


@dataclass(frozen=True)
class FirstComponents:
    """Scale by t what the update has in the first components of the pretrained weight.

    With P = U_k U_k^T and Q = V_k V_k^T the projections on its first k singular vectors, K is
    (1 - P) dW (1 - Q): what has neither its output nor its input there.

    Attributes:
        count: k.

    Raises:
        ValueError, TypeError: ``count`` is no whole number from 1.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.forgetting.FirstComponents(8))
        update in the first 8 components
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", validate.whole_number(self.count, "count", least=1))

    def __str__(self) -> str:
        return f"update in the first {self.count} components"

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        return {name: self._part(name, layer) for name, layer in layers.items()}

    def _part(self, name: str, layer: Moved) -> Part:
        spectrum = layer.spectrum()
        require_fit(self.count, spectrum.k, name)
        u, v = (basis(spectrum, side)[:, : self.count].double() for side in ("left", "right"))
        b, a = layer.b.double(), layer.a.double()
        return Part(False, b - u @ (u.T @ b), a - (a @ v) @ v.T)


@dataclass(frozen=True)
class SmallValues:
    """Scale by t all of the update but its largest singular components.

    Attributes:
        keep: how many components of each layer's update stay as trained.

    Raises:
        ValueError, TypeError: ``keep`` is no whole number from 1.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.forgetting.SmallValues(keep=4))
        update but its 4 largest components
    """

    keep: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", validate.whole_number(self.keep, "keep", least=1))

    def __str__(self) -> str:
        return f"update but its {self.keep} largest components"

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        most = max(min(layer.b.shape[1], layer.b.shape[0], layer.a.shape[1]) for layer in layers.values())
        if self.keep >= most:
            raise InputError(
                f"keep must be below {most}, the rank of the updates, not {self.keep}: t would scale nothing"
            )
        found = {}
        for name, layer in layers.items():
            left, values, right = product_svd(layer.b.double(), layer.a.double())
            found[name] = Part(False, (left * values)[:, : self.keep], right[: self.keep])
        return found


@dataclass(frozen=True)
class Intruders:
    """Scale by t the components of the trained weight that resemble none of the pretrained weight.

    W + dW - (1 - t) sum_j s'_j u'_j v'_j^T over the intruders j among the ``count`` largest components, see
    :func:`lora_lens.spectrum.intruder_dimensions`; t is lambda in section 5 of Shuttleworth et al. 2024
    (arXiv 2410.21228) and ``mitigation_lambda`` of PEFT's ``reduce_intruder_dimension``, which then keeps
    the adapter's rank: give :meth:`Rewound.export` that rank for the same. The pretrained weight is W under a
    window, too, where PEFT's function would take the residual for it.

    Attributes:
        count: how many of the largest components are asked.
        threshold: the cosine below which one is new, in [0, 1].

    Raises:
        ValueError, TypeError: ``count`` is no whole number from 1, or ``threshold`` is out of its range.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.forgetting.Intruders())
        intruders among the 10 largest components
    """

    count: int = 10
    threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", validate.whole_number(self.count, "count", least=1))
        threshold = validate.number(self.threshold, "threshold", least=0, most=1)
        object.__setattr__(self, "threshold", threshold)

    def __str__(self) -> str:
        below = "" if self.threshold == 0.5 else f" below {self.threshold:g}"
        return f"intruders{below} among the {self.count} largest components"

    def parts(self, layers: Mapping[str, Moved]) -> dict[str, Part]:
        return {name: self._part(name, layer) for name, layer in layers.items()}

    def _part(self, name: str, layer: Moved) -> Part:
        now = factorize(name, torch.addmm(layer.weight(), layer.b.double(), layer.a.double()))
        new = intruder_dimensions(layer.spectrum(), now, self.threshold, self.count)
        if not len(new):
            return ALL_KEPT
        left, right = (basis(now, side)[:, new].double() for side in ("left", "right"))
        return Part(True, left * now.singular_values[new], right.T)
