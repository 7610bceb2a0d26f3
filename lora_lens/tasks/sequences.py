"""Tasks to be learnt one after the other, and the orders to learn them in."""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

import numpy as np

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, seed_number, sequence, whole_number
from lora_lens.tasks import bundled, bundled_texts
from lora_lens.tasks.task import Task
from lora_lens.tasks.text import text_task
from lora_lens.tasks.tokenizing import Tokenizer
from lora_lens.tasks.transforms import class_index, corrupted, only_classes, rotated

MOST_TASKS = 1000  # whose orders can still be counted


def split(task: Task, groups: Sequence[Sequence[str | int]] | None = None, size: int = 2) -> list[Task]:
    """A task cut into tasks of some classes each, which are relabelled 0, 1, ... in every one of them.

    As Split MNIST of Zenke, Poole and Ganguli 2017, "Continual learning through synaptic intelligence" (ICML,
    section 5.1), where each of five tasks is to tell two digits apart.

    Args:
        task: the whole; images or texts that a head reads.
        groups: for each task its classes, by name or index; classes in no group
            are left out. Default: all classes in their order, ``size`` at a time.
        size: classes per task, where no groups are given.

    Raises:
        ValueError: the classes do not divide into groups of ``size``, ``size`` is
            below 2, there is no group, a class is in two of them, or a group is
            none that :func:`lora_lens.tasks.only_classes` takes.
        TypeError: ``size`` is not a whole number, or a group is no list of names or indices.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> [task.classes for task in ll.tasks.sequences.split(digits, size=5)]
        [('0', '1', '2', '3', '4'), ('5', '6', '7', '8', '9')]
    """
    instance(task, Task, "task", "a Task, as lora_lens.tasks.folder_task and text_task make them")
    if groups is None:
        size = whole_number(size, "size")
        if size < 2:
            raise InputError(f"{task.name}: a task needs at least two classes, so size cannot be {size}")
        count = len(task.classes)
        if over := task.classes[count - count % size :]:
            raise InputError(
                f"{task.name}: {count} classes do not divide into groups of {size}, {', '.join(over)} would "
                "be left over; use another size or give the groups"
            )
        groups = np.arange(count).reshape(-1, size).tolist()
    groups = sequence(groups, "groups", "lists of classes")
    if not groups:
        raise InputError(f"{task.name}: give at least one group of classes")
    parts = [only_classes(task, group) for group in groups]
    numbers = [class_index(task, given) for group in groups for given in group]
    if twice := [task.classes[i] for i in numbers if numbers.count(i) > 1]:
        raise InputError(f"{task.name}: class {twice[0]!r} is in two groups; a split has each class once")
    return parts


def rotations(task: Task, angles: Sequence[float]) -> list[Task]:
    """The same task at several angles: Rotated MNIST.

    Lopez-Paz and Ranzato 2017, "Gradient episodic memory for continual learning"
    (NeurIPS, section 4.1). The classes stay, so one head can serve all tasks.

    Args:
        task: inputs are images, (n, c, h, w), floating point.
        angles: in degrees, see :func:`lora_lens.tasks.rotated`; 0 is the task itself.

    Raises:
        ValueError: there is no angle, or two turn the images alike; as ``rotated``.
        TypeError: an angle is no number.

    Example:
        >>> import lora_lens as ll
        >>> digits = ll.tasks.bundled.digits().subset(train=100, test=50)
        >>> [task.name for task in ll.tasks.sequences.rotations(digits, [0, 90])]
        ['digits', 'digits, rotated by 90 degrees']
    """
    instance(task, Task, "task", "a Task, as lora_lens.tasks.folder_task makes it")
    angles = sequence(angles, "angles", "numbers")
    if not angles:
        raise InputError(f"{task.name}: give at least one angle")
    tasks = [rotated(task, angle) for angle in angles]
    turns = [float(angle) % 360 for angle in angles]
    for angle, turn, place in zip(angles, turns, range(len(turns)), strict=True):
        if (first := turns.index(turn)) < place:
            raise InputError(
                f"{task.name}: {angles[first]} and {angle} degrees are the same angle; give it once"
            )
    return tasks


def orders(count: int, number: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Different orders of ``count`` tasks: the given one first, then random ones.

    Results of continual learning depend on the order, so it is varied like a
    seed. With the same seed, fewer orders are the first of more.

    Args:
        count: tasks.
        number: orders.
        seed: of the random ones.

    Returns:
        ``number`` different permutations of 0 to ``count`` - 1.

    Raises:
        ValueError: ``count`` or ``number`` is below 1, more orders are asked for
            than there are, the seed is negative.
        TypeError: an argument is not a whole number.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.sequences.orders(3, number=2)
        [(0, 1, 2), (2, 0, 1)]
    """
    count, number = whole_number(count, "count", most=MOST_TASKS), whole_number(number, "number")
    seed = seed_number(seed)
    if count < 1 or number < 1:
        raise InputError(f"expected at least one task and one order, not {count} tasks and {number} orders")
    if number > factorial(count):
        raise InputError(
            f"{number} different orders were asked for, but {count} tasks have only {factorial(count)}"
        )
    rng = np.random.default_rng(seed)
    found = {tuple(range(count)): None}  # a dict keeps the order in which they are drawn
    while len(found) < number:
        found[tuple(rng.permutation(count).tolist())] = None
    return list(found)


def split_fashion(train: int = 2000, test: int = 400) -> list[Task]:
    """Fashion-MNIST in five tasks of two classes each, in the order of its classes.

    The model of :func:`lora_lens.tasks.bundled.vision_of_digits` has seen none of them.

    Args:
        train, test: examples of each task, at most 2,000 of each.

    Raises:
        ValueError: there are not as many examples; a file is damaged.
        FileNotFoundError: a file is missing.

    Example:
        >>> import lora_lens as ll
        >>> [task.classes for task in ll.tasks.sequences.split_fashion(train=100, test=20)][:2]
        [('T-shirt', 'trouser'), ('pullover', 'dress')]
    """
    return [task.first(train, test) for task in split(bundled.fashion())]


def fashion_digits_corrupted_rotated(train: int = 2000, test: int = 400) -> list[Task]:
    """Four tasks of ten classes each, whose images change in kind.

    Fashion-MNIST; digits; the same digits under Gaussian noise of severity 3;
    Fashion-MNIST turned by 90 degrees.

    Args:
        train, test: examples of each task, at most 7,500 and 2,500.

    Raises:
        ValueError: there are not as many examples; a file is damaged.
        FileNotFoundError: a file is missing.

    Example:
        >>> import lora_lens as ll
        >>> tasks = ll.tasks.sequences.fashion_digits_corrupted_rotated(train=100, test=20)
        >>> [len(task.classes) for task in tasks]
        [10, 10, 10, 10]
    """
    fashion, digits = (whole.first(train, test) for whole in (bundled.fashion(), bundled.digits()))
    return [fashion, digits, corrupted(digits, "gaussian_noise", 3), rotated(fashion, 90)]


def text_corpora(
    tokenizer: Tokenizer, train: int = 2000, test: int = 400, pooling: str = "mean"
) -> list[Task]:
    """Negative or positive: film reviews, product reviews, tweets and newspaper sentences.

    The corpora of :mod:`lora_lens.tasks.bundled_texts`. The classes are the same, so
    one head can serve all tasks.

    Args:
        tokenizer: the model's.
        train, test: texts of each task, at most 2,366 and 561.
        pooling: see :func:`lora_lens.tasks.text_task`.

    Raises:
        ValueError: there are not as many texts; a file is damaged; as ``text_task``.
        FileNotFoundError: a file is missing.

    Example:
        >>> import lora_lens as ll
        >>> tokenizer = ll.tasks.bundled.minilm_tokenizer()
        >>> [task.name for task in ll.tasks.sequences.text_corpora(tokenizer)]  # doctest: +SKIP
        ['movies', 'products', 'tweets', 'newspaper']
    """
    corpora = map(bundled_texts.sentiment, bundled_texts.CORPORA)
    return [text_task(corpus, tokenizer, pooling=pooling).first(train, test) for corpus in corpora]
