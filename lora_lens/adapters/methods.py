"""What can be trained of a model, against which penalty, and how an adapter is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens.spectrum.adaptable_layers import FLOATS
from lora_lens.spectrum.placement import ByLayer
from lora_lens.spectrum.window import Placement, validate_rank

PEFT_STARTS = ("pissa", "olora", "orthogonal", "mica", "eva", "corda", "lora_ga")


@dataclass(frozen=True)
class LoRA:
    """Ordinary LoRA (Hu et al. 2022): random A, zero B, base untouched."""

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate_rank(self.rank))

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}"


@dataclass(frozen=True)
class LinearProbe:
    """Nothing but the new head is trained: the bound on retention."""

    def __str__(self) -> str:
        return "linear probe"


@dataclass(frozen=True)
class FullFineTuning:
    """Every weight is trained."""

    def __str__(self) -> str:
        return "full fine-tuning"


@dataclass(frozen=True)
class PeftStart:
    """LoRA from one of PEFT's own initializations, by PEFT's name; :mod:`lora_lens.adapters.peft_starts`
    attaches it.

    - pissa: the largest singular components (Meng et al. 2024, arXiv 2404.02948);
    - olora: the first columns of Q and rows of R of W = Q R (Buyukakyuz 2024, arXiv 2406.01775);
    - orthogonal: random factors with B A = 0 and neither of them 0; the rank must be even;
    - mica: B from the last left singular vectors and fixed, A = 0 (arXiv 2604.01694);
    - eva: A from the principal components of each layer's inputs in the new task, ranks shared out among
      the layers by explained variance (Paischer et al. 2024, arXiv 2410.07170);
    - corda: the smallest components of W C, where C is the covariance of the layer's inputs in the
      retained task: the knowledge-preserving mode (Yang et al. 2024, arXiv 2406.05223);
    - lora_ga: singular vectors of the first gradient on the new task (Wang et al. 2024, arXiv 2407.05000).

    Raises:
        ValueError: another name, a rank below 1, or an odd one for orthogonal.
    """

    name: str
    rank: int

    def __post_init__(self) -> None:
        validate.choice(self.name, "name of PEFT's start", PEFT_STARTS)
        object.__setattr__(self, "rank", validate_rank(self.rank))
        if self.name == "orthogonal" and self.rank % 2:
            raise InputError(f"PEFT's orthogonal start needs an even rank, not {self.rank}")

    def __str__(self) -> str:
        return f"PEFT's {self.name} of rank {self.rank}"


@dataclass(frozen=True)
class Penalty:
    """What a run adds to the loss of the new task against forgetting: see
    :mod:`lora_lens.training.penalties`.

    Raises:
        ValueError: a strength that is negative or not finite.
    """

    strength: float
    share: ClassVar[float] = 0.0  # of each batch's examples, which the penalty spends on its own

    def __post_init__(self) -> None:
        strength = validate.number(self.strength, "a penalty's strength", least=0)
        object.__setattr__(self, "strength", strength)

    def begin(self, model: nn.Module, retain: Any, config: Any) -> Callable[[], Tensor | float]:
        """Note what must be known before the first step; the result gives the loss to add at each step.

        Args:
            model: the one that is trained, as it starts.
            retain: the retained :class:`lora_lens.Task`, or None.
            config: the run's :class:`lora_lens.Training`.

        Raises:
            ValueError: the penalty does not fit the model, the settings or what is retained.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Penalized:
    """A method that is trained under a penalty.

    Raises:
        TypeError: no method that trains weights of the model, or no penalty.
    """

    method: Placement | Mapping[str, Placement] | LoRA | FullFineTuning | PeftStart
    penalty: Penalty

    def __post_init__(self) -> None:
        if isinstance(self.method, Mapping):
            object.__setattr__(self, "method", ByLayer(self.method))
        if not isinstance(self.method, (Placement, ByLayer, LoRA, FullFineTuning, PeftStart)):
            raise InputTypeError(
                "expected a placement, LoRA, FullFineTuning or PeftStart to train under a penalty, "
                f"not {self.method!r}"
            )
        if not isinstance(self.penalty, Penalty):
            raise InputTypeError(f"expected a penalty such as KLAnchor(1.0), not {self.penalty!r}")

    @property
    def rank(self) -> int | None:
        """The inner method's; None where it has no single one."""
        return getattr(self.method, "rank", None)

    def __str__(self) -> str:
        return f"{self.method}, {self.penalty}"


Method = Placement | Mapping[str, Placement] | LoRA | LinearProbe | FullFineTuning | PeftStart | Penalized


def inner_method(method: Method) -> Method:
    """What is trained, without the penalty it is trained under."""
    return method.method if isinstance(method, Penalized) else method


def penalty_of(method: Method) -> Penalty | None:
    """The penalty a method is trained under, if any."""
    return method.penalty if isinstance(method, Penalized) else None


@dataclass(frozen=True)
class Variant:
    """How an adapter is built, whichever components it starts from.

    Attributes:
        rslora: scaling = alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023).
        dora: train the length of each weight row apart from its direction (Liu et al. 2024, DoRA).
        split: where the singular values go: "balanced" gives each factor sqrt(S / scaling); "A"
            makes A = (S / scaling) V^T and B = U, orthonormal; "B" the reverse. B A is the same, its
            gradients are not: those of one factor are proportional to the other.
        train: "both", or one factor alone, "A" or "B", while the other stays as it started. "A" with
            split "A" trains the right side of fixed left vectors, as MiCA does (arXiv 2604.01694),
            there with A = 0.
        dropout: of the adapter's input while training. A window's adapter is not zero at the start,
            so dropout perturbs even the pretrained function; :func:`lora_lens.attach` warns.
        dtype: of A and B. None leaves it to PEFT: the base's, but float32 over bfloat16 and float16.

    Raises:
        ValueError, TypeError: another split or train, dropout outside [0, 1), or a dtype of no such values.
    """

    rslora: bool = False
    dora: bool = False
    split: str = "balanced"
    train: str = "both"
    dropout: float = 0.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("rslora", "dora"):
            object.__setattr__(self, name, validate.flag(getattr(self, name), name))
        validate.choice(self.split, "split", ("balanced", "A", "B"))
        validate.choice(self.train, "train", ("both", "A", "B"))
        dropout = validate.number(self.dropout, "dropout", least=0, below=1)
        object.__setattr__(self, "dropout", dropout)
        if self.dtype is not None:
            validate.instance(self.dtype, torch.dtype, "dtype", "a torch.dtype, such as torch.float32")
            if self.dtype not in FLOATS:
                raise InputError(f"the adapter's dtype must be a floating one, not {self.dtype}")

    def __str__(self) -> str:
        parts = [name for name in ("rslora", "dora") if getattr(self, name)]
        parts += [f"S in {self.split}"] if self.split != "balanced" else []
        parts += [f"only {self.train} trained"] if self.train != "both" else []
        parts += [f"dropout {float(self.dropout)!r}"] if self.dropout else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype else []
        return ", ".join(parts) or "plain"
