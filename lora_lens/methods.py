"""What can be trained of a model: placements of a window, the baselines, and how an adapter is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_lens.window import Placement, whole_rank


@dataclass(frozen=True)
class LoRA:
    """Ordinary LoRA (Hu et al. 2022): random A, zero B, base untouched."""

    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole_rank(self.rank))

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


Method = Placement | Mapping[str, Placement] | LoRA | LinearProbe | FullFineTuning


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
        ValueError: another split or train, dropout outside [0, 1), or a dtype that is no float.
    """

    rslora: bool = False
    dora: bool = False
    split: str = "balanced"
    train: str = "both"
    dropout: float = 0.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.split not in ("balanced", "A", "B"):
            raise ValueError(f"split must be 'balanced', 'A' or 'B', not {self.split!r}")
        if self.train not in ("both", "A", "B"):
            raise ValueError(f"train must be 'both', 'A' or 'B', not {self.train!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"the adapter's dtype must be a floating one, not {self.dtype}")

    def __str__(self) -> str:
        parts = [name for name in ("rslora", "dora") if getattr(self, name)]
        parts += [f"S in {self.split}"] if self.split != "balanced" else []
        parts += [f"only {self.train} trained"] if self.train != "both" else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype else []
        return ", ".join(parts) or "plain"
