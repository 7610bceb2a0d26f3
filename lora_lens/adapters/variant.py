"""How an adapter is built, whichever components it starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens.spectrum.layer_weights import FLOATS


@dataclass(frozen=True)
class Variant:
    """How an adapter is built, whichever components it starts from.

    Attributes:
        rslora: scaling = alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732).
        dora: train the length of each weight row apart from its direction (DoRA, Liu et al. 2024,
            arXiv 2402.09353).
        split: where the singular values go: "balanced" gives each factor sqrt(S / scaling); "A"
            makes A = (S / scaling) V^T and B = U, orthonormal; "B" the reverse. B A is the same, its
            gradients are not: those of one factor are proportional to the other.
        train: "both", or one factor alone, "A" or "B", while the other stays as it started. "A" with
            split "A" trains the right side of fixed left vectors, as MiCA does (arXiv 2604.01694),
            there with A = 0.
        dropout: the probability, in [0, 1), that an input of the adapter is zeroed while training. A window's
            adapter is not zero at the start, so over a residual it perturbs even the pretrained function;
            :func:`lora_lens.attach` warns. In the offset form it drops inputs of what was learned alone.
        base: what the frozen base holds under a window. "residual": W minus the window, so that base and
            adapter add up to W, rounded to the base's dtype. "offset": W as it is, while the layer computes
            W x + scaling (B A - B_0 A_0) x with the frozen start (B_0, A_0): the same function with the same
            gradients, at the start exact to the last bit in every dtype; nothing is copied, and without its
            adapter the model is the pretrained one. Weights that must not change, because they are quantized
            or shared with another layer, get the offset form in any case.
        dtype: of A and B. None leaves it to PEFT: the base's, but float32 over bfloat16 and float16.

    Raises:
        ValueError: ``split``, ``train`` or ``base`` is none of these, ``dropout`` is outside [0, 1),
            ``dtype`` is not a floating one, or there is DoRA in the offset form.
        TypeError: a value is of another type.

    Example:
        >>> import lora_lens as ll
        >>> print(ll.Variant(rslora=True, train="A"))
        rslora, only A trained
    """

    rslora: bool = False
    dora: bool = False
    split: str = "balanced"
    train: str = "both"
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    base: str = "residual"

    def __post_init__(self) -> None:
        for name in ("rslora", "dora"):
            object.__setattr__(self, name, validate.flag(getattr(self, name), name))
        validate.choice(self.split, "split", ("balanced", "A", "B"))
        validate.choice(self.train, "train", ("both", "A", "B"))
        validate.choice(self.base, "base", ("residual", "offset"))
        if self.dora and self.base == "offset":
            raise InputError(
                'DoRA has no offset form, because it scales the rows of the base: use base="residual"'
            )
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
        parts += [f"{self.base} base"] if self.base != "residual" else []
        return ", ".join(parts) or "plain"
