"""A task that a model's own answers make: what was answered, how it was read, and how far answers moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import Digest
from lora_lens._base.torch_tools import call
from lora_lens.tasks.readouts import Inputs, OwnHead, Readout, logits_of, own_padding, pooled_features
from lora_lens.tasks.sampling import sampled_rows
from lora_lens.tasks.task import Examples, Labelled, Task

ROUNDING = 1e-5  # nats; a smaller divergence is that of float32
TEMPERATURE = 0.05  # of cosines, as in SimCSE (Gao et al. 2021, arXiv 2104.08821, section 3)


@dataclass(frozen=True, eq=False)
class Answered(Labelled):
    """Inputs with a model's own answers in place of labels.

    What else the inputs have, such as ``shape`` or ``texts``, they have as well.

    Attributes:
        asked: the inputs.
        labels: the model's first choice of each, (n,); of texts answered token by token, (n, tokens), with
            -100 where a text has no token any more; of features, see :class:`Nearest`, the input's number.
        choices: the likeliest choices of each item, (n, items, kept).
        logs: the logarithms of their probabilities, likewise.
        rest: of that of all others together, (n, items); -inf where there are none.
        among: how many choices there are.
    """

    asked: Labelled
    labels: Tensor
    choices: Tensor
    logs: Tensor
    rest: Tensor
    among: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "asked":  # as while it is unpickled
            raise AttributeError(name)
        return getattr(self.asked, name)

    def __repr__(self) -> str:
        return f"<answers to {self.asked!r}>"

    @property
    def most(self) -> int:
        return self.asked.most

    def take(self, rows: Tensor) -> Answered:
        """Some of the inputs, by their numbers, with their answers."""
        parts = {name: getattr(self, name)[rows] for name in ("labels", "choices", "logs", "rest")}
        return replace(self, asked=self.asked.take(rows), **parts)

    def sampled(self, count: int, seed: int = 0) -> Answered:
        """``count`` inputs that stand for all; where each has one answer, by the first choices."""
        one_each = self.labels if self.labels.ndim == 1 else torch.zeros(len(self))
        return self if count >= len(self) else self.take(sampled_rows(one_each, count, seed))

    def batch(self, rows: Tensor) -> Inputs:
        """Some of the inputs, as the model takes them."""
        return self.asked.batch(rows)

    def in_batches(self, *most: int) -> Iterator[Tensor]:
        """As of the inputs."""
        return self.asked.in_batches(*most)

    def largest(self) -> tuple[int, int]:
        """As of the inputs."""
        return self.asked.largest()

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """As of the inputs."""
        return self.asked.shuffled(batch_size, seed)

    def check_fit(self, model: nn.Module) -> None:
        """As of the inputs."""
        self.asked.check_fit(model)

    def trial(self) -> Inputs:
        """As of the inputs."""
        return self.asked.trial()

    def losses(self, logits: Tensor, right: Tensor, rows: Tensor) -> Tensor:
        """The divergence KL(answer kept || answer now) of each item, (items,), in nats.

        Where only some choices were kept, the others count as one, so it is never above the whole one's.
        """
        if logits.shape[-1] != self.among:
            raise InputError(
                f"the answers that are retained choose among {self.among}, and this model's answers among "
                f"{logits.shape[-1]}: make the agreement with the model that is trained"
            )
        items = len(right) // len(rows)
        choices, logs = (
            kept[rows, :items].flatten(0, 1).to(logits.device) for kept in (self.choices, self.logs)
        )
        rest = self.rest[rows, :items].flatten().to(logits.device)
        now = logits.log_softmax(-1)
        found = (logs.exp() * (logs - now.gather(-1, choices.long()))).sum(-1)
        if bool((some := rest > -torch.inf).any()):
            others = now.scatter(-1, choices.long(), -torch.inf).logsumexp(-1)
            found = found + torch.where(some, rest.exp() * (rest - others), 0)
        return torch.where(found < ROUNDING, 0, found)  # NaN stays

    def add_to(self, digest: Digest) -> None:
        """Hash the inputs; what the model answers to them hangs on its weights, see AgreementTask."""
        blank = torch.zeros(len(self), dtype=torch.long)
        replace(self.asked, labels=blank).add_to(digest)


class EveryToken(nn.Module):
    """A model's choice at every token of a text: what comes next, of a causal language model.

    ``forward`` gives (logits (batch * tokens, choices), first choices (batch * tokens,)).
    """

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(call(model, own_padding(model, inputs)))  # (batch, tokens, choices)
        return logits.flatten(0, 1), labels[:, : logits.shape[1]].flatten()


class Nearest(nn.Module):
    """Which of the other inputs is nearest to one, as in an index that the pretrained model has filled.

    ``forward`` gives (logits (batch, inputs), nearest inputs (batch,)), given the inputs' own numbers. The
    logits are cosines of features with the pretrained ones, divided by ``TEMPERATURE``.

    Args:
        index: the pretrained features of all inputs, (inputs, features).
        first: which is nearest to each, (inputs,).
        pooling: see :func:`lora_lens.tasks.readouts.pooled_features`.
    """

    def __init__(self, index: Tensor, first: Tensor, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.register_buffer("index", nn.functional.normalize(index, dim=-1))
        self.register_buffer("first", first)

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.normalize(pooled_features(model, inputs, self.pooling).float(), dim=-1)
        logits = features @ self.index.T / TEMPERATURE
        return logits.scatter(-1, labels[:, None], -torch.inf), self.first[labels]


@dataclass(frozen=True, eq=False)
class AgreementTask(Task):
    """What :func:`agreement` makes: the pretrained model's own answers, to be retained.

    Attributes:
        model: a hash of the weights of the model that was asked.
        like: the task as which the answers are read; None for the model's own reading.
        index: where features are read, what :class:`Nearest` compares with; None elsewhere.
        may_train: whether ``train`` are other inputs than those that are tested.
    """

    model: str = ""
    like: Task | None = None
    index: Nearest | None = None
    may_train: bool = False

    def __repr__(self) -> str:
        unit = "inputs" if self.test.labels.ndim == 1 else "texts, token by token"
        what = "nearest others" if self.index is not None else "own answers"
        return f"<AgreementTask {self.name}: a model's {what} to {len(self.test)} {unit}>"

    def __post_init__(self) -> None:
        self._check_parts()

    def new_readout(self, model: nn.Module, seed: int) -> Readout:
        """There is nothing to learn.

        Raises:
            ValueError: always.
        """
        raise InputError(
            f"{self.name} holds what the pretrained model answers already; retain= or watch= it, and learn "
            "another task"
        )

    def own_readout(self, model: nn.Module) -> Readout:
        """How the pretrained model was asked."""
        self.check_fit(model)
        if self.like is not None:
            return self.like.own_readout(model)
        if self.index is not None:
            return self.index
        return OwnHead() if self.test.labels.ndim == 1 else EveryToken()

    def to_guard(self) -> Examples:
        """The training inputs.

        Raises:
            ValueError: they are those that are tested.
        """
        if not self.may_train:
            raise InputError(
                f"a regularizer would train on the inputs on which {self.name} measures forgetting, and they "
                "would seem remembered; give it others with ll.tasks.agreement(model, inputs, train=...)"
            )
        return self.train

    def _reading(self) -> str:
        like = "" if self.like is None else self.like.fingerprint()
        return f"agreement {self.model} {self.pooling} {like}"
