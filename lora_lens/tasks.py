"""A task: labelled examples to train on and to test on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lens.fingerprint import add_tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs as the model takes them, (n, ...) floating point, with class labels, (n,) integer.

    Raises:
        ValueError: no examples, different lengths, inputs that are not finite,
            labels that are not whole numbers.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) == 0 or len(self.inputs) != len(self.labels):
            raise ValueError(
                f"expected as many labels as inputs, not {len(self.inputs)} inputs "
                f"and {len(self.labels)} labels"
            )
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise ValueError(
                f"labels must be one whole number each, not {tuple(self.labels.shape)} of {self.labels.dtype}"
            )
        if not torch.isfinite(self.inputs).all():
            raise ValueError("inputs hold NaN or infinite values")
        object.__setattr__(self, "labels", self.labels.long())

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Examples:
        """The first ``count`` examples; all of them if there are fewer."""
        return Examples(self.inputs[:count], self.labels[:count])


@dataclass(frozen=True, eq=False)
class Task:
    """Classification with a fixed training and test set.

    Raises:
        ValueError: a label outside ``classes``.
    """

    name: str
    classes: tuple[str, ...]
    train: Examples
    test: Examples

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            labels = getattr(self, part).labels
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"{self.name}: {part} labels run from {low} to {high}, outside the head's "
                    f"{len(self.classes)} classes (0 to {len(self.classes) - 1})"
                )

    def subset(self, train: int | None = None, test: int | None = None) -> Task:
        """The same task with the first ``train`` training and ``test`` test examples."""
        for asked, examples in ((train, self.train), (test, self.test)):
            if asked is not None and not 1 <= asked <= len(examples):
                raise ValueError(f"{self.name} has {len(examples)} examples there; asked for {asked}")
        return replace(
            self,
            train=self.train if train is None else self.train.first(train),
            test=self.test if test is None else self.test.first(test),
        )

    def fingerprint(self) -> str:
        """A hash of the classes and all examples, equal exactly when the tasks are."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for examples in (self.train, self.test):
            for tensor in (examples.inputs, examples.labels):
                add_tensor(digest, tensor)
        return digest.hexdigest()[:16]
