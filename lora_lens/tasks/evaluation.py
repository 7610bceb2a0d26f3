"""What a model answers to examples: one pass without gradients over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lora_lens._base.precision import PRECISIONS, autocast
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.validate import choice, instance
from lora_lens.tasks.batches import in_batches
from lora_lens.tasks.readouts import FITTING, Readout, ask, inner_model, pooled_features, taking, to_device
from lora_lens.tasks.task import Examples, Task, require_examples


@dataclass(frozen=True, eq=False)
class Answers:
    """One entry per item, in the examples' order; a language task's items are its predicted tokens.

    Attributes:
        labels: the right choice.
        predicted: the choice that the model takes.
        losses: -log of the probability of the right choice, in nats; of an agreement, see
            :func:`lora_lens.tasks.agreement`, the divergence from the pretrained answer, in nats.

    Example:
        >>> import numpy as np
        >>> import lora_lens as ll
        >>> answers = ll.tasks.Answers(np.array([0, 1]), np.array([0, 0]), np.array([0.2, 1.8]))
        >>> answers.accuracy, answers.loss
        (0.5, 1.0)
    """

    labels: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of items that the model gets right, in [0, 1]; NaN is no answer, so it is wrong."""
        answered = np.where(np.isnan(self.losses), -1, self.predicted)
        return float((answered == self.labels).mean())

    @property
    def loss(self) -> float:
        """The mean loss, in nats per item: per example, or of a language task per token."""
        return float(self.losses.mean())


def evaluate(
    model: nn.Module,
    task: Task,
    readout: Readout | None = None,
    *,
    examples: Examples | None = None,
    precision: str = "float32",
) -> Answers:
    """What ``model`` answers to a task's test examples.

    The mean loss of a :class:`lora_lens.tasks.text.LanguageTask` is the logarithm of the model's perplexity,
    and its rise over training is what PEFT's method comparison calls forgetting.

    Args:
        model: pretrained or adapted; it runs in evaluation mode and is left as it was.
        task: what is asked.
        readout: how the answers are read; default as the pretrained model does the task.
        examples: others than the task's test examples.
        precision: "float32", or "bfloat16" for matrix products in bfloat16 (autocast).

    Raises:
        ValueError: the task does not fit the model.
        TypeError: an argument of another type.

    Example:
        >>> import lora_lens as ll
        >>> model, task = ll.tasks.bundled.vision()
        >>> ll.evaluate(model, task, examples=task.test.first(50)).accuracy
        0.88
    """
    instance(model, nn.Module, "model", "a torch model")
    instance(task, Task, "task", "a Task, as lora_lens.tasks.text_task and folder_task make them")
    choice(precision, "precision", PRECISIONS)
    instance(readout, (nn.Module, type(None)), "readout", "what task.own_readout(model) gives, or None")
    if examples is not None:
        require_examples(examples, "examples")
    device = next(model.parameters()).device
    readout = (task.own_readout(model) if readout is None else readout).to(device)
    examples = task.test if examples is None else examples
    order, parts = [], []
    with evaluating(model), torch.inference_mode(), autocast(device, precision):
        for rows, (logits, right) in in_batches(model, examples, partial(ask, readout, model, examples)):
            losses = examples.losses(logits.float(), right, rows)
            real = right >= 0  # -100 stands where a shorter text has no item, as in torch's cross-entropy
            order.append(rows.repeat_interleave(len(right) // len(rows))[real.cpu()])
            parts.append([x[real].cpu() for x in (right, logits.argmax(-1), losses)])
    place = torch.cat(order).argsort(stable=True)
    return Answers(*(torch.cat(column)[place].numpy() for column in zip(*parts, strict=True)))


def answers_from(head: nn.Linear, features: Tensor, labels: Tensor) -> Answers:
    """What a head answers to features that are at hand, (n, features), with labels (n,)."""
    with torch.inference_mode():
        logits = head(features.to(head.weight.dtype)).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return Answers(labels.numpy(), logits.argmax(-1).numpy(), losses.numpy())


def check_examples(model: nn.Module, task: Task, readout: Readout, *, precision: str = "float32") -> None:
    """Ask ``model`` for one training and one test example of ``task``, before work begins.

    Raises:
        ValueError: it cannot take them, as images of another size or number of channels.
    """
    device = next(model.parameters()).device
    row = torch.tensor([0])
    for part in ("train", "test"):
        examples = getattr(task, part)
        given = examples.batch(row)
        shape = f"inputs of shape {tuple(given.shape[1:])}" if isinstance(given, torch.Tensor) else "texts"
        fitting = taking(inner_model(model), f"{task.name}, which holds {shape}", FITTING)
        with evaluating(model), torch.inference_mode(), autocast(device, precision), fitting:
            ask(readout.to(device), model, examples, row)


def example_features(
    model: nn.Module, task: Task, examples: Examples, *, precision: str = "float32"
) -> Tensor:
    """One feature vector of each example, pooled as the task reads it: (n, features), float32, on the CPU.

    Raises:
        ValueError: as :func:`lora_lens.tasks.readouts.pooled_features`.
    """
    device = next(model.parameters()).device

    def features(rows: Tensor) -> Tensor:
        inputs = to_device(examples.batch(rows), device)
        return pooled_features(model, inputs, task.pooling).float().cpu()

    with evaluating(model), torch.inference_mode(), autocast(device, precision):
        order, parts = zip(*in_batches(model, examples, features), strict=True)
    return torch.cat(parts)[torch.cat(order).argsort()].clone()
