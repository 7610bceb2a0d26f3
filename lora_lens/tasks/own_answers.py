"""Forgetting without labels: the pretrained model is asked, and its answers are what should be retained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import add_tensor
from lora_lens._base.torch_tools import call, evaluating
from lora_lens._base.validate import instance, shown
from lora_lens.tasks.agreement_task import AgreementTask, Answered, Nearest
from lora_lens.tasks.batches import in_batches
from lora_lens.tasks.corpus import Texts
from lora_lens.tasks.evaluation import Answers, example_features
from lora_lens.tasks.readouts import Readout, ask, inner_model, logits_of, own_padding, taking, to_device
from lora_lens.tasks.task import Examples, Labelled, Task
from lora_lens.tasks.text import LanguageTask, tokenized, whole_texts
from lora_lens.tasks.tokenizing import Tokenizer

ALL_KEPT = 1024  # choices; where there are more, as in a vocabulary,
KEPT = 256  # the likeliest are kept of each answer, and the others as one
LEAST = 3  # inputs, of which one may be nearer than the other
LEAST_OWN = 0.5  # of the answers that a model gives again
NO_ITEM = -100
FITTING = "give inputs as this model takes them: images of its size, texts with its own tokenizer"


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


def require_own_answers(task: Task, before: Answers) -> None:
    """Raise a ValueError where a task retains the answers of another model than the pretrained one.

    Rounding, or a base that was quantized meanwhile, changes some of the first choices, but not most.
    """
    if isinstance(task, AgreementTask) and before.accuracy < LEAST_OWN:
        raise InputError(
            f"the pretrained model gives only {before.accuracy:.0%} of the answers that {task.name} retains, "
            "so they are another model's: make the agreement with the model that is trained"
        )


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
    if not inputs.is_floating_point():
        raise InputError(
            f"{name} are {inputs.dtype}; give images as the floating-point numbers that the model takes, and "
            "texts as strings with tokenizer=, not as numbers of tokens"
        )
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
