"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from lora_lens._base.precision import PRECISIONS
from lora_lens._base.validate import choice, instance, known_settings, number, seed_number, whole_number

MOST_STEPS, MOST_EXAMPLES = 10**9, 10**7  # of a step
LARGEST, MOST_DECAY = 1e30, 1e6  # whose product torch can still multiply a weight with


@dataclass(frozen=True)
class Training:
    """The settings of a run.

    Attributes:
        lr: AdamW's peak learning rate, for the adapter and the new head alike.
        steps: optimizer steps, at least 1.
        batch_size: examples per step, at least 1.
        warmup: share of the steps, in [0, 1), in which the rate rises linearly from 0;
            then it falls to 0 along a cosine.
        weight_decay: AdamW's (Loshchilov and Hutter 2019, arXiv 1711.05101). 0 by default: decaying the
            factors of a window would shrink pretrained components, which is forgetting by design.
        evaluations: how many times both tasks are tested, evenly spaced from
            before the first step to after the last; at least 2.
        seed: of the new head, of the order of the examples and of the model's dropout; 0 or more.
        precision: "float32", or "bfloat16" for matrix products in bfloat16, in training and in evaluation
            (autocast; weights, gradients and the optimizer stay as they are). Processors with such units
            are several times faster at it.

    Raises:
        ValueError: a number is out of its range, infinite or NaN, or there is no such precision.
        TypeError: a value is no number, or no whole one.

    Example:
        >>> import lora_lens as ll
        >>> ll.Training(steps=10, evaluations=3).evaluation_steps
        [0, 5, 10]
    """

    lr: float = 1e-3
    steps: int = 150
    batch_size: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.0
    evaluations: int = 5
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        plain = {
            "lr": number(number(self.lr, "lr", above=0), "lr", most=LARGEST),
            "steps": whole_number(self.steps, "steps", least=1, most=MOST_STEPS),
            "batch_size": whole_number(self.batch_size, "batch_size", least=1, most=MOST_EXAMPLES),
            "warmup": number(self.warmup, "warmup", least=0, below=1),
            "weight_decay": number(self.weight_decay, "weight_decay", least=0),
            "evaluations": whole_number(self.evaluations, "evaluations", least=2, most=MOST_STEPS),
            "seed": seed_number(self.seed),
            "precision": choice(self.precision, "precision", PRECISIONS),
        }
        number(plain["weight_decay"], "weight_decay", most=MOST_DECAY)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def evaluation_steps(self) -> list[int]:
        """The steps after which both tasks are tested, from 0 to ``steps``."""
        return sorted({round(s) for s in np.linspace(0, self.steps, self.evaluations)})


SETTINGS = tuple(f.name for f in fields(Training))


def training_with(
    settings: Mapping[str, object], where: str, config: Training | None = None, *, also: Iterable[str] = ()
) -> Training:
    """``config``, by default the usual settings, with those that were given to ``where`` by name.

    Args:
        also: what else ``where`` takes, which may have been meant.

    Raises:
        TypeError: there is no such setting; the message suggests the one that was meant.
        ValueError: as :class:`Training`.
    """
    known_settings(settings, (*SETTINGS, *also), where)
    config = Training() if config is None else instance(config, Training, "config", "an ll.Training")
    return replace(config, **settings)


def fastest_precision() -> str:
    """The fastest ``precision`` on this machine: "bfloat16" on GPUs and processors that multiply in it.

    Other processors, those without AVX-512, emulate it and are many times slower than in "float32".

    Example:
        >>> import lora_lens as ll
        >>> config = ll.Training(precision=ll.training.fastest_precision())
        >>> config.precision in ("float32", "bfloat16")
        True
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"
