"""What a model's frozen features can tell already: a linear head fitted to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, whole_number
from lora_lens.tasks.evaluation import example_features
from lora_lens.tasks.task import Examples, Task, fresh_head

DECAY = 1e-3  # of the head's weights, so that separable classes have a head of finite size
ITERATIONS = 100


def probed(model: nn.Module, task: Task, examples: int | None = None) -> Task:
    """The same task with a head that reads it from the pretrained model's features, and is not trained again.

    A logistic regression with a small L2 penalty on the features of the training examples: a linear probe.
    What it scores on the test examples the model could do before; retained, it tells what an adapted model's
    features have lost.

    Args:
        model: the pretrained model; it is left as it was.
        task: a classification.
        examples: how many training examples to fit it to, drawn as :meth:`lora_lens.Task.subset` does;
            default all.

    Raises:
        ValueError: the task is no classification by a head, or does not fit the model.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> noise = torch.randn(40, 1, 28, 28)
        >>> images = ll.Examples(noise + (torch.arange(40) % 2)[:, None, None, None], torch.arange(40) % 2)
        >>> task = ll.tasks.probed(model, ll.Task("brightness", ("dark", "light"), images, images))
        >>> ll.evaluate(model, task).accuracy > 0.8
        True
    """
    instance(task, Task, "task", "a Task, as lora_lens.tasks.text_task and folder_task make them")
    if type(task) is not Task:
        raise InputError(
            f"{task.name} is read from the model's own words, so no head is fitted to it; retain it as it is"
        )
    if examples is not None:
        examples = whole_number(examples, "examples", least=1)
    task.check_fit(model)
    some = task.train if examples is None else task.train.sampled(examples)
    return replace(
        task, head=fitted_head(example_features(model, task, some), some.labels, len(task.classes))
    )


def fitted_head(inputs: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A logistic regression, from zero: convex, so it needs no seed.

    Args:
        inputs: (n, features).
        labels: (n,), below ``classes``.
    """
    head = fresh_head(inputs.shape[1], classes, seed=0).to(inputs.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        [head.weight, head.bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(inputs), labels) + DECAY / 2 * head.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return head.requires_grad_(False)


def drawn(examples: Examples, count: int, seed: int) -> Examples:
    """``count`` of the examples, drawn without replacement; all, in another order, where there are fewer."""
    return examples.take(torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count])
