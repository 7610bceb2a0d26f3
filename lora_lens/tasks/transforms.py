"""New tasks out of one that is there: changed images, few examples, some of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, gaussian_blur, rotate

from lora_lens._base.errors import InputError
from lora_lens._base.validate import choice, instance, number, seed_number, sequence, suggestion, whole_number
from lora_lens.tasks.task import Examples, Task

# Hendrycks and Dietterich's contrasts; their noise (0.08 to 0.38 of the pixel range) and blur (1 to 6 of 224
# pixels) suit photographs. These grade the embedded model on its own 28 x 28 images.
SEVERITIES = {
    "gaussian_noise": (0.10, 0.15, 0.20, 0.25, 0.30),  # standard deviations of the training inputs
    "gaussian_blur": (0.03, 0.04, 0.05, 0.06, 0.075),  # of the images' shorter side
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share of the contrast that is left
}
LISTED_CLASSES = 6  # more of them make a name unreadable
CHUNK = 1000  # images blurred or rotated at once, which bounds the memory


def corrupted(task: Task, kind: str, severity: int, seed: int = 0) -> Task:
    """The same task with corrupted training and test images.

    In the spirit of ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to
    common corruptions and perturbations", arXiv 1903.12261), but for inputs that are normalised already,
    whose pixel values are not known. Severities 1 to 5 are, by kind:

    - ``"gaussian_noise"``: 0.10, 0.15, 0.20, 0.25, 0.30 standard deviations of
      the training inputs, channel by channel, added to every pixel; then cut
      off at the least and the largest training input of the channel, as a
      camera would.
    - ``"gaussian_blur"``: a standard deviation of 0.03, 0.04, 0.05, 0.06, 0.075
      of the image's shorter side, cut off at four of them; the image is
      reflected at its edges.
    - ``"contrast"``: 0.4, 0.3, 0.2, 0.1, 0.05 of the distance to each image's
      own mean, channel by channel.

    Every image is corrupted once, before training, so every pass sees the same noise, however it is batched.
    Training and test images get different noise; the noise of an image depends on the seed, its part and its
    place there, not on how many images follow.

    Args:
        task: inputs are images, (n, c, h, w), floating point.
        kind: one of the above.
        severity: 1 to 5; for severity 0, take the task itself.
        seed: of the noise; blur and contrast do not use it.

    Raises:
        ValueError: the kind or severity is none of the above, the seed is
            negative, the inputs are no images or too small to be blurred.
        TypeError: the severity or seed is not a whole number.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> ll.tasks.corrupted(digits, "gaussian_noise", 3)
        <Task digits, gaussian noise 3: 10 classes; 100 training, 50 test examples>
    """
    strengths = SEVERITIES[choice(kind, "kind", SEVERITIES)]
    severity, seed = whole_number(severity, "severity"), seed_number(seed)
    if not 1 <= severity <= len(strengths):
        raise InputError(
            f"severity must be 1 to {len(strengths)}, not {severity}; for clean inputs take the task itself"
        )
    task = _in_memory(task)
    strength = strengths[severity - 1]
    if kind == "gaussian_noise":
        train, test = _noisy(task, strength, seed)
    elif kind == "gaussian_blur":
        train, test = (_blurred(task.name, e.inputs, strength) for e in (task.train, task.test))
    else:
        train, test = (_flattened(e.inputs, strength) for e in (task.train, task.test))
    return _with_images(task, f"{kind.replace('_', ' ')} {severity}", train, test)


def rotated(task: Task, degrees: float) -> Task:
    """The same task with all images turned counter-clockwise about their centre.

    Pixels are interpolated bilinearly. What comes in from outside the image is its background: the least
    training input of the channel. Corners that are turned out of the image are lost.

    Args:
        task: inputs are images, (n, c, h, w), floating point.
        degrees: the angle; for a multiple of 360, the task itself is returned.

    Raises:
        ValueError: the angle is not finite, or the inputs are no images.
        TypeError: the angle is no number.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> ll.tasks.rotated(digits, 90)
        <Task digits, rotated by 90 degrees: 10 classes; 100 training, 50 test examples>
    """
    degrees = number(degrees, "degrees")
    images = _in_memory(task)
    if degrees % 360 == 0:
        return task
    background = images.train.inputs.amin((0, 2, 3))[:, None, None]  # (c, 1, 1)
    # torchvision's own fill is blended twice along the edge, which zeros are safe from.
    train, test = (
        torch.cat(
            [
                rotate(x - background, degrees, InterpolationMode.BILINEAR) + background
                for x in examples.inputs.split(CHUNK)
            ]
        )
        for examples in (images.train, images.test)
    )
    return _with_images(images, f"rotated by {degrees:g} degrees", train, test)


def permuted(task: Task, seed: int) -> Task:
    """The same task with the pixels of all images in one other order, which hides what is next to what.

    Permuted MNIST: Goodfellow et al. 2013, "An empirical investigation of catastrophic forgetting in
    gradient-based neural networks" (arXiv 1312.6211), and Kirkpatrick et al. 2017, "Overcoming catastrophic
    forgetting in neural networks" (PNAS 114, section 2.2). The order is the same for training and test images
    and for all channels; it depends on the seed and the images' size alone.

    Args:
        task: inputs are images, (n, c, h, w), floating point.
        seed: of the order.

    Raises:
        ValueError: the seed is negative, or the inputs are no images.
        TypeError: the seed is not a whole number.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> ll.tasks.permuted(digits, seed=0)
        <Task digits, permuted 0: 10 classes; 100 training, 50 test examples>
    """
    seed = seed_number(seed)
    task = _in_memory(task)
    height, width = task.train.inputs.shape[-2:]
    order = torch.randperm(height * width, generator=_generator(seed, 0))
    train, test = (
        examples.inputs.flatten(2)[..., order].view_as(examples.inputs)
        for examples in (task.train, task.test)
    )
    return _with_images(task, f"permuted {seed}", train, test)


def few_shot(task: Task, per_class: int, seed: int = 0) -> Task:
    """The same task with ``per_class`` training examples of every class; the test set stays whole.

    They are drawn without replacement and keep their order. With the same
    seed, the examples of a smaller ``per_class`` are among those of a larger.

    Raises:
        ValueError: a class has too few training examples, ``per_class`` is
            below 1, the seed is negative.
        TypeError: ``per_class`` or the seed is not a whole number.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> ll.tasks.few_shot(digits, 5)
        <Task digits, 5 per class: 10 classes; 50 training, 50 test examples>
    """
    _require_task(task)
    per_class, seed = whole_number(per_class, "per_class", least=1), seed_number(seed)
    counts = torch.bincount(task.train.labels, minlength=len(task.classes)).tolist()
    for name, count in zip(task.classes, counts, strict=True):
        if count < per_class:
            raise InputError(
                f"{task.name}: class {name!r} has {count} training examples; asked for {per_class} per class"
            )
    drawn = []
    for label in range(len(task.classes)):
        rows = torch.nonzero(task.train.labels == label)[:, 0]
        # One generator per class: what is drawn of a class does not depend on the size of another.
        drawn.append(rows[torch.randperm(len(rows), generator=_generator(seed, label))[:per_class]])
    rows = torch.cat(drawn).sort().values
    return replace(task, name=f"{task.name}, {per_class} per class", train=task.train.take(rows))


def only_classes(task: Task, classes: Sequence[str | int]) -> Task:
    """The training and test examples of some classes alone, relabelled 0, 1, ... in the order given.

    For a split within one data set: pretrain on some classes, adapt to the others. The model's own head then
    has as many classes as the first split, which is the task to retain.

    Args:
        task: the whole; images or texts that a head reads.
        classes: at least two, each by its name or by its index in ``task.classes``.

    Raises:
        ValueError: a class is unknown, its name ambiguous, or it is given
            twice; fewer than two are given; one has no training or no test
            examples; the task is read from the model's own words.
        TypeError: classes is one string, or a class is neither a name nor an index.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> ll.tasks.only_classes(digits, ["3", "8"]).classes
        ('3', '8')
    """
    _require_task(task)
    classes = sequence(classes, "classes", "names or indices")
    if type(task) is not Task:
        raise InputError(
            f"{task.name} is read from the model's own words, which belong to all of its classes; make a "
            "corpus of some classes first, and the task of that"
        )
    old = [class_index(task, c) for c in classes]
    names = tuple(task.classes[i] for i in old)
    if len(set(old)) < len(old):
        twice = next(task.classes[i] for i in old if old.count(i) > 1)
        raise InputError(f"{task.name}: class {twice!r} is given twice")
    if len(old) < 2:
        raise InputError(f"{task.name}: a task needs at least two classes, not {len(old)}")
    for part in ("train", "test"):
        present = set(getattr(task, part).labels.unique().tolist())
        missing = [n for n, i in zip(names, old, strict=True) if i not in present]
        if missing:
            raise InputError(f"{task.name}: no {part} examples of class {missing[0]!r}; leave it out")
    new = torch.full((len(task.classes),), -1)
    new[old] = torch.arange(len(old))
    listed = (
        ", ".join(names) if len(names) <= LISTED_CLASSES else f"{len(names)} of {len(task.classes)} classes"
    )
    return replace(
        task,
        name=f"{task.name}, only {listed}",
        classes=names,
        train=_relabelled(task.train, new),
        test=_relabelled(task.test, new),
        head=None,
    )


def class_index(task: Task, given: str | int) -> int:
    """The index of a class that is given by its name or its index.

    Raises:
        ValueError: it is unknown.
        TypeError: it is neither a name nor an index.
    """
    _require_task(task)
    known = f"{task.name} has the classes {', '.join(task.classes[:20])}"
    known += f" and {len(task.classes) - 20} more" if len(task.classes) > 20 else ""
    if isinstance(given, str):
        if given not in task.classes:
            raise InputError(f"unknown class {given!r}{suggestion(given, task.classes)}: {known}")
        return task.classes.index(given)
    place = whole_number(given, "a class that is not given by its name")
    if not 0 <= place < len(task.classes):
        raise InputError(f"unknown class {place}, expected 0 to {len(task.classes) - 1}: {known}")
    return place


def _relabelled(examples: Examples, new: Tensor) -> Examples:
    """The examples whose ``new`` label, (classes,), is not -1, with that label."""
    labels = new[examples.labels]
    rows = torch.nonzero(labels >= 0)[:, 0]
    return replace(examples.take(rows), labels=labels[rows])


def _require_task(task: Task) -> None:
    instance(task, Task, "task", "a Task, as lora_lens.tasks.folder_task and text_task make them")


def _in_memory(task: Task) -> Task:
    """A task of images, with all of them read.

    Raises:
        ValueError: it holds something else.
    """
    _require_task(task)
    parts = {}
    for part in ("train", "test"):
        examples = getattr(task, part)
        if not hasattr(examples, "shape"):
            raise InputError(f"{task.name} holds texts, and only images can be changed like that")
        if not isinstance(examples, Examples):
            examples = Examples(examples.inputs, examples.labels)
        if (inputs := examples.inputs).ndim != 4:
            raise InputError(
                f"{task.name}: {part} inputs of shape {tuple(inputs.shape)} and type {inputs.dtype} are no "
                "images; expected floating point, (n, c, h, w)"
            )
        parts[part] = examples
    return replace(task, **parts)


def _with_images(task: Task, what: str, train: Tensor, test: Tensor) -> Task:
    """The task with other inputs, and ``what`` was done to them in its name."""
    return replace(
        task,
        name=f"{task.name}, {what}",
        train=replace(task.train, inputs=train),
        test=replace(task.test, inputs=test),
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    """Independent numbers for every stream of one seed."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # a torch seed has 63 bits


def _noisy(task: Task, strength: float, seed: int) -> list[Tensor]:
    channels = task.train.inputs.transpose(0, 1).flatten(1)  # (c, n * h * w)
    low, high, std = (x[:, None, None] for x in (channels.amin(1), channels.amax(1), channels.std(1)))
    noisy = []
    for stream, examples in enumerate((task.train, task.test)):
        generator = _generator(seed, stream)
        inputs = examples.inputs.clone()
        # One by one: the numbers in a large torch.randn depend on how many are asked for.
        for image in inputs:
            noise = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image)
            image.add_(strength * std.to(image) * noise).clamp_(low, high)
        noisy.append(inputs)
    return noisy


def _blurred(name: str, inputs: Tensor, strength: float) -> Tensor:
    height, width = inputs.shape[-2:]
    sigma = strength * min(height, width)
    radius = int(4 * sigma + 0.5)
    if not 1 <= radius < min(height, width):
        raise InputError(f"{name}: images of {height} x {width} pixels are too small to be blurred")
    blurred = []
    for part in inputs.split(CHUNK):
        for size in ([2 * radius + 1, 1], [1, 2 * radius + 1]):  # one axis at a time, far cheaper than both
            part = gaussian_blur(part, size, [sigma, sigma])
        blurred.append(part)
    return torch.cat(blurred)


def _flattened(inputs: Tensor, strength: float) -> Tensor:
    mean = inputs.mean((2, 3), keepdim=True)
    return mean + strength * (inputs - mean)
