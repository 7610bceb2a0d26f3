"""A task: examples to train on and to test on, and how a model's answers to them are read.

Whatever trains or measures asks the task: for batches, for a new readout to train, for the readout of what
the model can do already. So the same loop serves images, texts and language modelling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import Digest, add_tensor
from lora_lens._base.random_state import seeded
from lora_lens._base.validate import choice, instance, seed_number, shown, whole_number
from lora_lens._base.warning import warn
from lora_lens.spectrum.heads import classifier
from lora_lens.tasks.corpus import class_names
from lora_lens.tasks.readouts import (
    POOLINGS,
    HeadReadout,
    Inputs,
    OwnHead,
    Readout,
    inner_model,
    require_taken,
)
from lora_lens.tasks.sampling import sampled_rows

EVALUATION_BATCH = 500  # examples at most; see lora_lens.tasks.batches for fewer


class Labelled:
    """What all kinds of examples have in common: labels, and batches of their numbers.

    Attributes:
        labels: (n,) int64.
        most: how many a batch without gradients has where memory allows it.
    """

    labels: Tensor
    most: ClassVar[int] = EVALUATION_BATCH

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Self:
        """The first ``count`` examples; all of them if there are fewer."""
        return self.take(torch.arange(min(count, len(self))))

    def sampled(self, count: int, seed: int = 0) -> Self:
        """``count`` examples that stand for all, see :func:`lora_lens.tasks.sampling.sampled_rows`."""
        return self if count >= len(self) else self.take(sampled_rows(self.labels, count, seed))

    def in_batches(self, most: int = EVALUATION_BATCH) -> Iterator[Tensor]:
        """The numbers of all examples, at most ``most`` of them, but at least one, in a batch."""
        return iter(torch.arange(len(self)).split(max(most, 1)))

    def largest(self) -> tuple[int, int]:
        """The number of an example that takes the most memory, and how much of ``most`` it takes."""
        return 0, 1

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches of numbers to train on; each comes once before any comes again."""
        return shuffled_rows(len(self), batch_size, seed)

    def check_fit(self, model: nn.Module) -> None:
        """What can be said before the model has seen a batch; nothing of images."""

    def losses(self, logits: Tensor, right: Tensor, rows: Tensor) -> Tensor:
        """One per item of some examples, (items,), in nats: -log of the probability of the right choice.

        Args:
            logits: (items, choices), float32.
            right: (items,), the right choices; what is below 0 is no item, and its loss is 0.
            rows: (batch,), the examples' numbers; each has as many items.
        """
        return nn.functional.cross_entropy(logits, right, reduction="none")

    def trial(self) -> Inputs:
        """A batch to try whether a model takes it."""
        return self.batch(torch.arange(min(2, len(self))))


@dataclass(frozen=True, eq=False)
class Examples(Labelled):
    """Inputs as the model takes them, with class labels.

    Args:
        inputs: (n, ...), floating point.
        labels: (n,), whole numbers from 0.

    Raises:
        ValueError: no examples, different lengths, inputs that are not finite,
            labels that are not whole numbers.
        TypeError: one of them is no tensor.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.Examples(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
        <4 Examples of shape (1, 8, 8)>
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name in ("inputs", "labels"):
            instance(getattr(self, name), Tensor, name, "a tensor (torch.as_tensor makes one of an array)")
        if not self.inputs.is_floating_point():
            raise InputError(
                f"inputs must be floating point, as the model takes them, not {self.inputs.dtype}"
            )
        if self.inputs.ndim == 0 or len(self.inputs) == 0 or len(self.inputs) != len(self.labels):
            raise InputError(
                f"expected as many labels as inputs, not {len(self.inputs)} inputs "
                f"and {len(self.labels)} labels"
            )
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise InputError(
                f"labels must be one whole number each, not {tuple(self.labels.shape)} of {self.labels.dtype}"
            )
        if not torch.isfinite(self.inputs).all():
            raise InputError("inputs hold NaN or infinite values")
        object.__setattr__(self, "labels", self.labels.long())

    def __repr__(self) -> str:
        return f"<{len(self)} Examples of shape {tuple(self.shape)}>"

    @property
    def shape(self) -> torch.Size:
        """Of one example's input."""
        return self.inputs.shape[1:]

    def take(self, rows: Tensor) -> Examples:
        """Some of the examples, by their numbers."""
        return Examples(self.inputs[rows], self.labels[rows])

    def joined(self, *others: Examples) -> Examples:
        """These examples, then those of the others."""
        parts = (self, *others)
        return Examples(torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))

    def batch(self, rows: Tensor) -> Tensor:
        """Some examples' inputs, as the model takes them."""
        return self.inputs[rows]

    def add_to(self, digest: Digest) -> None:
        """Hash all that they hold."""
        for tensor in (self.inputs, self.labels):
            add_tensor(digest, tensor)


@dataclass(frozen=True, eq=False)
class Task:
    """Classification with a fixed training and test set.

    Attributes:
        name, classes: what it is called and what its classes are.
        train, test: :class:`Examples`, or another kind of examples with the same methods.
        pooling: how the features of an example become one vector, see
            :func:`lora_lens.tasks.readouts.pooled_features`.
        head: what reads the task from the pretrained model's features, as :func:`lora_lens.tasks.probed` fits
            it; None where that is the model's own classifier.

    Raises:
        ValueError: a label outside ``classes``, two classes of one name, another pooling, or a head of
            another size.
        TypeError: an attribute of another type.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> digits = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> ll.Task("digits", ("0", "1", "2"), train=ll.Examples(*digits), test=ll.Examples(*digits))
        <Task digits: 3 classes; 6 training, 6 test examples>
    """

    name: str
    classes: tuple[str, ...]
    train: Examples
    test: Examples
    pooling: str = "model"
    head: nn.Linear | None = None

    def __repr__(self) -> str:
        kind, parts = type(self).__name__, f"{len(self.train)} training, {len(self.test)} test examples"
        return f"<{kind} {self.name}: {len(self.classes)} classes; {parts}>"

    def __post_init__(self) -> None:
        self._check_parts()
        for part in ("train", "test"):
            labels = getattr(self, part).labels
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"{self.name}: {part} labels run from {low} to {high}, outside the head's "
                    f"{len(self.classes)} classes (0 to {len(self.classes) - 1})"
                )
        choice(self.pooling, "pooling", POOLINGS)
        if self.head is not None:
            instance(self.head, nn.Linear, "head", "an nn.Linear, as lora_lens.tasks.probed fits it")
        if self.head is not None and self.head.out_features != len(self.classes):
            raise InputError(
                f"{self.name} has {len(self.classes)} classes, but its head has {self.head.out_features}"
            )

    def _check_parts(self) -> None:
        instance(self.name, str, "name", "a string")
        object.__setattr__(self, "classes", class_names(self.name, self.classes))
        for part in ("train", "test"):
            examples = getattr(self, part)
            if not hasattr(examples, "in_batches"):
                raise InputTypeError(
                    f"{self.name}: {part} must be ll.Examples, or texts from ll.tasks.text_task, not "
                    f"{shown(examples)}"
                )

    def new_readout(self, model: nn.Module, seed: int) -> Readout:
        """What is to be trained beside the model: a new head, which ``seed`` determines.

        Raises:
            ValueError: the examples do not fit the model, or it has no features to read.
        """
        self.check_fit(model)
        return HeadReadout(
            fresh_head(_feature_size(model, self.pooling), len(self.classes), seed), self.pooling
        )

    def own_readout(self, model: nn.Module) -> Readout:
        """How the pretrained model does this task: by its own classifier, or through ``head``.

        Raises:
            ValueError: it cannot.
        """
        self.check_fit(model)
        if self.head is not None:
            if self.head.in_features != (size := _feature_size(model, self.pooling)):
                raise InputError(
                    f"the head of {self.name} reads {self.head.in_features} features, and the model has "
                    f"{size}; fit it to this model with ll.tasks.probed"
                )
            return HeadReadout(self.head, self.pooling)
        own = classifier(inner_model(model))
        if own.out_features != len(self.classes):
            raise InputError(
                f"{self.name} has {len(self.classes)} classes, but the model's own head has "
                f"{own.out_features}; retain the task that the model was pretrained on, or fit a head to "
                "its features with ll.tasks.probed"
            )
        return OwnHead()

    def to_guard(self) -> Examples:
        """The training examples, for a regularizer that trains on what is retained."""
        return self.train

    def check_fit(self, model: nn.Module) -> None:
        """Raises ValueError where the examples cannot be this model's inputs, of which it sees one or two."""
        inner, seen = inner_model(instance(model, nn.Module, "model", "a torch model")), set()
        for examples in (self.train, self.test):
            examples.check_fit(inner)
            shape = getattr(examples, "shape", None)
            if self.pooling == "model" and shape not in seen:
                require_taken(inner, examples.trial(), self.name)
                seen.add(shape)

    def subset(self, train: int | None = None, test: int | None = None, *, seed: int = 0) -> Task:
        """The same task with fewer examples, drawn at random; every class keeps its share.

        Each class keeps at least one example where as many are asked for. The examples keep their order; a
        smaller subset is part of a larger one with the same seed.

        Args:
            train, test: how many training and test examples; None for all.
            seed: of the draw.

        Raises:
            ValueError: there are not as many examples, or a number is out of range.
            TypeError: a number is not whole.

        Example:
            >>> import lora_lens as ll
            >>> ll.tasks.bundled.digits().subset(train=100, test=50)
            <Task digits: 10 classes; 100 training, 50 test examples>
        """
        seed = seed_number(seed)
        return self._fewer(train, test, lambda examples, count: examples.sampled(count, seed))

    def first(self, train: int | None = None, test: int | None = None) -> Task:
        """The same task with its first ``train`` training and ``test`` test examples, whatever their classes.

        For data in an order without meaning, as the embedded tasks are; :meth:`subset` draws. It warns where
        examples sorted by class lose some of their classes.

        Raises:
            ValueError, TypeError: as :meth:`subset`.
        """
        return self._fewer(train, test, self._first_of)

    def _fewer(
        self, train: int | None, test: int | None, chosen: Callable[[Examples, int], Examples]
    ) -> Task:
        parts = {}
        for part, count in (("train", train), ("test", test)):
            if count is None:
                continue
            examples, count = getattr(self, part), whole_number(count, part, least=1)
            if count > len(examples):
                raise InputError(f"{self.name} has {len(examples)} {part} examples; asked for {count}")
            parts[part] = chosen(examples, count)
        return replace(self, **parts)

    def _first_of(self, examples: Examples, count: int) -> Examples:
        found, labels = examples.first(count), examples.labels
        lost = len(labels.unique()) - len(found.labels.unique())
        if lost and bool((labels.diff() >= 0).all()):
            warn(
                f"the examples of {self.name} are sorted by class, and the first {count} lack {lost} of the "
                "classes; subset draws from all",
            )
        return found

    def fingerprint(self) -> str:
        """A hash of the classes, all examples and the readout, equal exactly when the tasks are."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for examples in (self.train, self.test):
            examples.add_to(digest)
        digest.update(self._reading().encode())
        for tensor in () if self.head is None else self.head.state_dict().values():
            add_tensor(digest, tensor)
        return digest.hexdigest()[:16]

    def _reading(self) -> str:
        return "" if self.pooling == "model" else self.pooling


def require_examples(value: object, name: str) -> None:
    """Refuse what holds no examples.

    Raises:
        TypeError: it is a whole task, or something else.
    """
    if isinstance(value, Task):
        raise InputTypeError(f"{name} must be examples, not the task {value.name!r}; pass task.test")
    if isinstance(value, type) or not hasattr(value, "in_batches"):
        raise InputTypeError(f"{name} must be ll.Examples, such as task.test, not {shown(value)}")


def fresh_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A new linear classifier; the global random state stays."""
    with seeded(seed):
        return nn.Linear(features, classes, dtype=torch.float32)


def shuffled_rows(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of row numbers below ``count``; every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        batch, rows = rows[:batch_size], rows[batch_size:]
        yield batch


def _feature_size(model: nn.Module, pooling: str) -> int:
    inner = inner_model(model)
    if pooling == "model":
        return classifier(inner).in_features
    size = getattr(getattr(inner, "config", None), "hidden_size", None)
    if size is None:
        raise InputError(
            f"{type(inner).__name__} has no config.hidden_size, as transformers' models have; "
            "texts are read from such a model's hidden states"
        )
    return size
