"""The metric of a layer's inputs: a spectrum of the weight as data sees it.

With x the layer's input on some data and C = E[x x^T] its second moment, W C^p = U S V^T is the spectrum of
W in the metric of these inputs. Component i of W itself is then u_i s_i (v_i^T C^-p) = u_i (u_i^T W): what
W gives along the output direction u_i. So all components sum to W, whatever the metric, and the left
vectors stay orthonormal; the right ones do not. For p = 1/2, s_i^2 is the mean square of the layer's
outputs, without bias, along u_i, and the u_i are the principal axes of these outputs. p = 0 is the plain
spectrum, and p = 1 that of CorDA (Yang et al. 2024, arXiv 2406.05223).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import add_tensor
from lora_lens._base.torch_tools import Inputs
from lora_lens._base.validate import number, seed_number, share, shown, whole_number

LEDOIT_WOLF = "ledoit-wolf"
BATCH = 32  # examples in a pass
LEAST = 1e-12  # of the largest eigenvalue: below it an inverse power is rounding


@dataclass(frozen=True, eq=False)
class Metric:
    """The inputs of layers on some data, as a metric for :func:`lora_lens.spectra`.

    C is the mean over examples of the mean over positions of x x^T (but for positions that an attention
    mask masks), shrunk towards the identity and scaled to a trace of in_features, so that the units of the
    inputs do not enter: white inputs have C = I, which is the plain spectrum. Windows on W C^p share one
    axis with the methods that choose components by data: without a metric the first and last window are
    PiSSA and MiLoRA; with power 1 the last is CorDA's mode that preserves knowledge, and the first its
    other mode; and where the inputs leave directions out, the last window reads from these alone, as
    LoRA-Null does (Tang et al. 2025, arXiv 2503.02659), whose B differs: it holds all that W makes of these
    directions, and a window only what no other component makes as well.

    Attributes:
        data: a task (some of its training examples are drawn), examples, or a batch as the model takes it,
            which goes through it as a whole.
        relative_to: the same of other data, with second moment R: then R^(-1/2) C R^(-1/2) takes the place
            of C. Up to scale its eigenvalues are those of the generalized problem C v = lambda R v. So the
            first components are those that are large on ``data`` compared to ``relative_to``; where both
            give the same inputs, it is the plain spectrum.
        power: p, in [-2, 2].
        shrinkage: the share of the identity in C (and in R), in [0, 1]; or "ledoit-wolf", which estimates
            it from two or more examples (Ledoit and Wolf 2004, "A well-conditioned estimator for large-
            dimensional covariance matrices", section 3, about zero and not the mean). All positions of an
            example count as one observation. PEFT's CorDA has 0.01 / 1.01.
        examples: how many are drawn of a task or of examples; all if there are fewer.
        seed: of the draw.

    Raises:
        TypeError, ValueError: the data are none of these, or a number is out of its range.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> x = torch.randn(50, 6)
        >>> ll.spectrum.Metric(x, power=1)
        <Metric of 50 inputs, power 1>
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> spectrum = ll.spectra(model, metric=ll.spectrum.Metric(x, shrinkage=0.0))["0"]
        >>> whole = spectrum.component(ll.Window(4, start=0))
        >>> bool(whole.allclose(model[0].weight, atol=1e-5))  # all components together are the weight
        True
    """

    data: Any
    relative_to: Any = None
    power: float = 0.5
    shrinkage: float | str = LEDOIT_WOLF
    examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "relative_to"):
            if name == "data" or self.relative_to is not None:
                _require_data(getattr(self, name), "metric" if name == "data" else name)
        shrinkage = self.shrinkage
        if isinstance(shrinkage, str) and shrinkage != LEDOIT_WOLF:
            raise InputError(f"shrinkage must be {LEDOIT_WOLF!r} or a share in [0, 1], not {shrinkage!r}")
        values = {
            "power": number(self.power, "power", least=-2, most=2),
            "shrinkage": shrinkage if isinstance(shrinkage, str) else share(shrinkage, "shrinkage"),
            "examples": whole_number(self.examples, "examples", least=1),
            "seed": seed_number(self.seed),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<Metric of {self._words}>"

    def __str__(self) -> str:
        """In words, with a hash of the data and of all settings: no two metrics have the same text."""
        return f"metric of {self._words} ({self._digest})"

    def batches(self, data: Any) -> Iterator[Inputs]:
        """Inputs of ``data`` as the model takes them, the same in every call."""
        if isinstance(data, (Tensor, Mapping)):
            yield data
            return
        chosen = getattr(data, "train", data).sampled(self.examples, self.seed)
        for rows in torch.arange(len(chosen)).split(BATCH):
            yield chosen.batch(rows)

    @property
    def _words(self) -> str:
        words = self._named(self.data)
        if self.relative_to is not None:
            words += f" relative to {self._named(self.relative_to)}"
        return words if self.power == 0.5 else f"{words}, power {self.power:g}"

    def _named(self, data: Any) -> str:
        if isinstance(data, (Tensor, Mapping)):
            return f"{_size(data)} inputs"
        return str(getattr(data, "name", None) or f"{min(len(data), self.examples)} examples")

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"metric 1 {self.power!r} {self.shrinkage!r}".encode())
        for data in (self.data, self.relative_to):
            for inputs in () if data is None else self.batches(data):
                parts = sorted(inputs.items()) if isinstance(inputs, Mapping) else [("", inputs)]
                for name, tensor in parts:
                    digest.update(name.encode())
                    add_tensor(digest, tensor)
            digest.update(b"end")
        return digest.hexdigest()[:16]


def as_metric(given: object) -> Metric:
    """A metric, or the data of one.

    Raises:
        TypeError, ValueError: it is neither.
    """
    return given if isinstance(given, Metric) else Metric(given)


class Moments:
    """Sums over examples of what one layer was given.

    Attributes:
        second: the sum of the examples' second moments, (in, in), float64.
        squares: the sum of their squared Frobenius norms.
        count: of examples.
    """

    def __init__(self) -> None:
        self.second: Tensor = torch.zeros(())
        self.squares, self.count = 0.0, 0

    def add(self, x: Tensor) -> None:
        """Some examples: (examples, positions, in), float64, scaled so that x^T x is an example's moment."""
        few = x.shape[1] < x.shape[2]
        each = x @ x.mT if few else x.mT @ x  # of one norm
        rows = x.flatten(0, 1)
        self.second = self.second.to(x) + (rows.T @ rows if few else each.sum(0))
        self.squares += float(each.square().sum())
        self.count += len(x)

    def shrunk(self, shrinkage: float | str, name: str) -> tuple[Tensor, float]:
        """The second moment with a trace of in_features, and the share of the identity in it.

        Raises:
            ValueError: there is none: no examples, zeros, NaN, or one example where two are needed.
        """
        if not self.count:
            raise InputError(
                f"no input reached {name}: the model makes its output without calling it, so it has no "
                "spectrum in the metric of its inputs; leave it out with targets="
            )
        moment, size = self.second / self.count, len(self.second)
        scale = float(moment.trace()) / size
        if not torch.isfinite(moment).all():
            raise InputError(f"the inputs of {name} hold NaN or infinite values on these data")
        if scale == 0:
            raise InputError(f"only zeros reach {name} on these data, so its inputs are no metric")
        moment, squares = moment / scale, self.squares / self.count / scale**2
        if isinstance(shrinkage, str):
            shrinkage = self._ledoit_wolf(moment, squares, name)
        shrunk = (1 - shrinkage) * moment
        shrunk.diagonal().add_(shrinkage)
        return shrunk, shrinkage

    def _ledoit_wolf(self, moment: Tensor, squares: float, name: str) -> float:
        """Of a moment whose mean eigenvalue is 1: its expected squared error, over its distance to I."""
        if self.count < 2:
            raise InputError(
                f"one example reached {name}, and Ledoit-Wolf shrinkage needs two or more; give more "
                "examples, or shrinkage= as a number"
            )
        norm = float(moment.square().sum())
        distance, error = norm - len(moment), (squares - norm) / self.count
        return min(max(error, 0.0) / distance, 1.0) if distance > 0 else 0.0


def relative(moment: Tensor, other: Tensor, name: str) -> Tensor:
    """other^(-1/2) moment other^(-1/2), with a trace of in_features."""
    whitening = power_of(other, -0.5, name)
    found = whitening @ moment @ whitening
    found = (found + found.T) / 2
    return found * (len(found) / found.trace())


def power_of(moment: Tensor, power: float, name: str) -> Tensor:
    """A power of a positive definite matrix.

    Raises:
        ValueError: to float64's rounding it is not definite.
    """
    values, vectors = torch.linalg.eigh(moment)
    if not (values[0] / values[-1]) ** max(abs(power), 1) > LEAST:
        rank = int((values > LEAST * values[-1]).sum())
        raise InputError(
            f"the inputs of {name} span {rank} of its {len(values)} dimensions on these data, so their "
            f"metric has no inverse without shrinkage: give Metric a number, such as 0.01, or {LEDOIT_WOLF!r}"
        )
    found: Tensor = vectors * values.pow(power) @ vectors.T
    return found


def _require_data(data: object, name: str) -> None:
    if isinstance(data, (Tensor, Mapping)):
        if not _size(data):
            raise InputError(f"{name} holds no inputs; give at least one")
        return
    if isinstance(data, type) or not hasattr(getattr(data, "train", data), "in_batches"):
        raise InputTypeError(
            f"{name} must be a task, examples, or a batch as the model takes it (a tensor, or a mapping of "
            f"keyword arguments), not {shown(data)}"
        )


def _size(batch: Inputs) -> int:
    some = next(iter(batch.values()), ()) if isinstance(batch, Mapping) else batch
    return len(some) if not isinstance(some, Tensor) or some.ndim else 0
