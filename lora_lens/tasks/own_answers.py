"""Forgetting without labels: a task whose right answers are those of the pretrained model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import Digest, add_tensor
from lora_lens._base.torch_tools import call, evaluating
from lora_lens._base.validate import instance, shown
from lora_lens.tasks.batches import in_batches
from lora_lens.tasks.corpus import Texts
from lora_lens.tasks.evaluation import example_features
from lora_lens.tasks.readouts import (
    Inputs,
    OwnHead,
    Readout,
    ask,
    inner_model,
    logits_of,
    own_padding,
    pooled_features,
    taking,
    to_device,
)
from lora_lens.tasks.sampling import sampled_rows
from lora_lens.tasks.task import Examples, Labelled, Task
from lora_lens.tasks.text import LanguageTask, tokenized, whole_texts
from lora_lens.tasks.tokenizing import Tokenizer

ALL_KEPT = 1024  # choices; where there are more, as in a vocabulary,
KEPT = 256  # the likeliest are kept of each answer, and the others as one
ROUNDING = 1e-5  # nats; a smaller divergence is that of float32
TEMPERATURE = 0.05  # of cosines, as in SimCSE (Gao et al. 2021, arXiv 2104.08821, section 3)
LEAST = 3  # inputs, of which one may be nearer than the other
NO_ITEM = -100
FITTING = "give inputs as this model takes them: images of its size, texts with its own tokenizer"


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


def agreement(
    model: nn.Module,
    inputs: Tensor | Sequence[str] | Examples | Task,
    *,
    tokenizer: Tokenizer | None = None,
    most_tokens: int | None = None,
    train: Tensor | Sequence[str] | Examples | None = None,
    name: str = "agreement",
) -> AgreementTask:
    """Retain what the pretrained model itself answers to ``inputs``, which need no labels.

    The task goes wherever ``retain=`` or ``watch=`` are. Its accuracy is then the share of items to which a
    model gives the pretrained first choice, 1 before training; its loss is the mean divergence KL(pretrained
    answer || answer now) in nats, 0 before training; so forgetting is 1 - agreement, and the rise of the loss
    the divergence. The divergence also sees what changes no first choice. What counts as an answer:

    - a classifier's classes: one item per input;
    - at every token of a text the choice among the vocabulary: of a causal language model what comes next.
      Of more than 1024 choices the 256 likeliest are kept, and the others count as one: the divergence is
      never above that of all choices, and takes 2 kB per token;
    - of a model without a head, such as a sentence encoder, the nearest of the other inputs by the cosine of
      mean features, where those of the others stay the pretrained ones, as in an index filled before
      training; the cosines' softmax has a temperature of 0.05 (Gao et al. 2021, arXiv 2104.08821);
    - of a task, what it makes of its examples, through its own head or its label words, without its labels.

    A sweep also measures how far the features of the inputs moved, see :meth:`lora_lens.Sweep.drifts`. A
    change is not a loss: where the pretrained model was wrong, it may be for the better. For classes, 1 -
    agreement is at least the loss of accuracy on the same inputs.

    Args:
        model: the pretrained model, without an adapter; it is left as it was.
        inputs: images as the model takes them, (n, ...); texts or prompts, with ``tokenizer``; examples such
            as ``task.test``; or a task.
        tokenizer: the model's.
        most_tokens: longer texts lose their end, with a warning; default what the tokenizer allows.
        train: other inputs, for regularizers that train on what is retained (Replay, KLAnchor, EWC); default
            none for these.
        name: what the task is called.

    Raises:
        ValueError: there are no inputs, the model cannot read them or gives no answers, or it is adapted
            already (what an adapted model answers are not the pretrained answers).
        TypeError: an argument of another type.

    Example:
        >>> import lora_lens as ll
        >>> model, fashion = ll.tasks.bundled.vision()
        >>> known = ll.tasks.agreement(model, fashion.test.inputs[:40])  # no labels
        >>> known
        <AgreementTask agreement: a model's own answers to 40 inputs>
        >>> answers = ll.evaluate(model, known)
        >>> answers.accuracy, answers.loss
        (1.0, 0.0)
    """
    instance(model, nn.Module, "model", "a torch model")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError(
            "this model is adapted already, so its answers are not the pretrained ones: make the agreement "
            "with the pretrained model, before ll.attach, or with what ll.detach gives back"
        )
    instance(name, str, "name", "a string")
    like = inputs if type(inputs) is not LanguageTask and isinstance(inputs, Task) else None
    if isinstance(inputs, Task):
        if train is not None:
            raise InputError("a task has its own training examples; leave train= out")
        inputs, train = inputs.test, inputs.train
    given = {"inputs": inputs} | ({} if train is None else {"train": train})
    if texts := {role: found for role, part in given.items() if (found := _texts(role, part)) is not None}:
        if tokenizer is None or len(texts) < len(given):
            raise InputError("inputs are texts, so give the model's tokenizer=, and train= as texts, too")
        asked = tokenized(texts, tokenizer, *whole_texts(tokenizer, most_tokens, texts["inputs"].texts[0]))
    else:
        asked = [_examples(role, part) for role, part in given.items()]
    pooling, per_token, index = _reading(model, asked[0], like)
    blank, first = [], 0
    for part in asked:
        part.check_fit(inner_model(model))
        blank.append(_blank(part, per_token, first if index else None))
        first += len(part)
    task = AgreementTask(
        name,
        classes=(),
        train=blank[-1],
        test=blank[0],
        pooling=pooling,
        head=None if like is None else like.head,
        model=_hash(model, blank if index else ()),
        like=like,
        may_train=len(blank) > 1,
    )
    if index:
        if first < LEAST:
            raise InputError(
                f"{type(inner_model(model)).__name__} has no head, so the answer to an input is the nearest "
                f"of the others; give at least {LEAST} inputs, not {first}"
            )
        features = torch.cat([example_features(model, task, part) for part in blank])
        task = replace(task, index=Nearest(features, torch.zeros(first, dtype=torch.long), pooling))
    readout = task.own_readout(model).to(next(model.parameters()).device)
    answered = [_answered(model, readout, part) for part in blank]
    if index:
        nearest = torch.cat([part.choices[:, 0, 0] for part in answered]).long()
        task = replace(task, index=Nearest(features, nearest, pooling))
    classes = () if per_token or index else _classes(model, like, answered[0].among)
    return replace(task, test=answered[0], train=answered[-1], classes=classes)


def _texts(name: str, inputs: object) -> Texts | None:
    """The inputs if they are texts."""
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(text, str) for text in inputs):
        return None
    if not inputs:
        raise InputError(f"{name} hold nothing; give at least one input")
    return Texts(tuple(inputs), (0,) * len(inputs))


def _examples(name: str, inputs: object) -> Labelled:
    """The inputs as examples, whatever their labels."""
    if isinstance(inputs, Answered):
        return inputs.asked
    if isinstance(inputs, Labelled):
        return inputs
    if not isinstance(inputs, Tensor):
        expected = "images as a tensor, texts as a list of strings, or examples such as task.test"
        raise InputTypeError(f"{name} must be {expected}, not {shown(inputs)}")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise InputError(f"{name} hold nothing; give at least one input")
    return Examples(inputs, torch.zeros(len(inputs), dtype=torch.long))


def _reading(model: nn.Module, examples: Labelled, like: Task | None) -> tuple[str, bool, bool]:
    """How the features are pooled; whether there is an answer at every token; whether features are read."""
    if like is not None:
        return like.pooling, False, False
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(), taking(inner_model(model), "these inputs", FITTING):
        output = call(model, own_padding(model, to_device(examples.trial(), device)))
    try:
        logits = logits_of(output)
    except InputError:
        logits = None
    # A bare body gives its hidden states as the first of a tuple or by name.
    if logits is None or (isinstance(output, (tuple, list)) and logits.ndim == 3):
        return "mean", False, True
    if logits.ndim not in (2, 3) or not logits.is_floating_point():
        raise InputError(
            f"{type(inner_model(model)).__name__} answers with {logits.dtype} of shape "
            f"{tuple(logits.shape)}; an agreement is read from logits, (batch, classes) or (batch, tokens, "
            "choices), or from features"
        )
    return ("model", False, False) if logits.ndim == 2 else ("mean", True, False)


def _blank(examples: Labelled, per_token: bool, first: int | None) -> Answered:
    """The inputs before they were asked; where features are read, numbered from ``first``."""
    labels = torch.zeros(len(examples), dtype=torch.long)
    if first is not None:
        labels = torch.arange(first, first + len(examples))
    if per_token:
        there = torch.arange(int(examples.lengths.max())) < examples.lengths[:, None]
        labels = torch.where(there, 0, NO_ITEM)
    nothing = torch.empty(len(examples), 0)
    return Answered(examples, labels, nothing, nothing, nothing, 0)


def _answered(model: nn.Module, readout: Readout, blank: Answered) -> Answered:
    """The inputs with the model's answers."""
    labels = blank.labels.clone()
    items = 1 if labels.ndim == 1 else labels.shape[1]
    itself = 1 if isinstance(readout, Nearest) else 0  # never one of its own choices
    choices = logs = rest = None
    asked = partial(ask, readout, model, blank)
    with evaluating(model), torch.inference_mode():
        for rows, (logits, _) in in_batches(model, blank, asked):
            among = logits.shape[-1]
            kept = (among if among <= ALL_KEPT else KEPT) - itself
            if choices is None:
                choices = torch.zeros(len(blank), items, kept, dtype=torch.int32)
                logs, rest = torch.zeros(choices.shape), torch.zeros(len(blank), items)
            now = logits.float().log_softmax(-1)
            top = now.topk(kept, dim=-1)
            others = now.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
            there = logits.shape[0] // len(rows)
            for tensor, found in ((choices, top.indices), (logs, top.values), (rest, others)):
                tensor[rows, :there] = found.unflatten(0, (len(rows), there)).to(tensor)
            if not itself:
                first = logits.argmax(-1).unflatten(0, (len(rows), there)).cpu()
                real = blank.labels[rows].reshape(len(rows), -1)[:, :there] >= 0
                first = torch.where(real, first, NO_ITEM)
                if labels.ndim == 1:
                    labels[rows] = first[:, 0]
                else:
                    labels[rows, :there] = first
    if not bool(torch.isfinite(logs).all()):
        raise InputError(
            f"{type(inner_model(model)).__name__} answers some of the inputs with NaN or infinite values, so "
            "there is nothing to agree with"
        )
    return replace(blank, labels=labels, choices=choices, logs=logs, rest=rest, among=among)


def _classes(model: nn.Module, like: Task | None, count: int) -> tuple[str, ...]:
    """What the task or the model's config calls the classes; their numbers where neither says."""
    if like is not None:
        return like.classes
    names = getattr(getattr(inner_model(model), "config", None), "id2label", None) or {}
    named = tuple(map(str, names.values()))
    return named if len(set(named)) == count else tuple(map(str, range(count)))


def _hash(model: nn.Module, index: Sequence[Labelled]) -> str:
    """Of the model's weights, and of the inputs that are compared with one another."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        add_tensor(digest, tensor)
    for part in index:
        part.add_to(digest)
    return digest.hexdigest()[:16]
