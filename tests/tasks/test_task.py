from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_lens as ll
from lora_lens.tasks.sampling import sampled_rows


def examples(labels: list[int]) -> ll.Examples:
    return ll.Examples(torch.arange(float(len(labels)))[:, None], torch.tensor(labels))


def test_first_takes_the_first_examples():
    task = ll.Task("t", ("a", "b"), examples([0, 1, 1, 0]), examples([1, 0]))
    part = task.first(train=2, test=1)
    assert part.train.labels.tolist() == [0, 1] and part.test.labels.tolist() == [1]
    assert task.first().fingerprint() == task.subset().fingerprint() == task.fingerprint()
    by_class = ll.Task("sorted", ("a", "b"), examples([0, 0, 1, 1]), examples([0, 1]))
    with pytest.warns(UserWarning, match="first 2 lack 1 of the classes; subset draws") as caught:
        assert by_class.first(train=2).train.labels.tolist() == [0, 0]
    assert caught[0].filename == __file__


def test_a_subset_of_examples_sorted_by_class_has_every_class_in_proportion():
    sizes = [60, 30, 9, 1]
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    task = ll.Task("t", tuple("abcd"), examples(labels), examples([0] * 50 + [1] * 50))
    part = task.subset(train=20, test=4)
    assert torch.bincount(part.train.labels).tolist() == [11, 6, 2, 1]
    assert part.test.labels.tolist() == [0, 0, 1, 1]
    rows = part.train.inputs[:, 0].tolist()
    assert rows == sorted(rows) and len(set(rows)) == 20
    assert [labels[int(row)] for row in rows] == part.train.labels.tolist()
    assert rows[:11] != list(range(11))  # drawn within each class
    assert task.subset(train=4).train.labels.tolist() == [0, 1, 2, 3]
    assert len(task.subset(train=3).train.labels.unique()) == 3
    assert set(task.subset(train=7).train.inputs[:, 0].tolist()) < set(rows)
    assert part.fingerprint() == task.subset(np.int64(20), test=4).fingerprint()
    assert part.fingerprint() != task.subset(train=20, test=4, seed=1).fingerprint() != task.fingerprint()
    assert torch.equal(task.subset(train=100).train.labels, task.train.labels)


def test_a_draw_is_the_same_on_every_machine():
    assert sampled_rows(torch.arange(12) % 3, 5, seed=3).tolist() == [0, 2, 7, 10, 11]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"test": 3}, ValueError, "t has 2 test examples; asked for 3"),
        ({"train": 0}, ValueError, "train must be at least 1, not 0"),
        ({"train": 1.5}, TypeError, r"train must be a whole number, not 1\.5"),
        ({"train": "2"}, TypeError, "train must be a whole number, not '2'"),
        ({"test": True}, TypeError, "test must be a whole number, not True"),
    ],
)
@pytest.mark.parametrize("how", ["subset", "first"])
def test_numbers_of_examples_that_there_are_not_are_refused(how, asked, error, message):
    task = ll.Task("t", ("a", "b"), examples([0, 1, 1, 0]), examples([1, 0]))
    with pytest.raises(error, match=message):
        getattr(task, how)(**asked)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        task.subset(seed=-1)


def test_joined_examples_follow_one_another():
    first, second, third = examples([0, 1]), examples([2]), examples([1, 1, 0])
    whole = first.joined(second, third)
    assert whole.labels.tolist() == [0, 1, 2, 1, 1, 0]
    assert whole.inputs[:, 0].tolist() == [0, 1, 0, 0, 1, 2]
    alone = second.joined()
    assert torch.equal(alone.inputs, second.inputs) and torch.equal(alone.labels, second.labels)
    assert len(first) == 2


def test_a_label_outside_the_head_is_refused_before_training():
    with pytest.raises(ValueError, match="digits: test labels run from 0 to 2, outside the head's 2 classes"):
        ll.Task("digits", ("a", "b"), examples([0, 1]), examples([0, 2]))
    with pytest.raises(ValueError, match="train labels run from -1 to 1"):
        ll.Task("digits", ("a", "b"), examples([-1, 1]), examples([0, 1]))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "0 inputs"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "3 inputs and 2 labels"),
        (torch.zeros(3, 2), torch.zeros(3), "one whole number each"),
        (torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3).long(), "floating point.*not torch.uint8"),
        (torch.full((1, 2), torch.nan), torch.zeros(1, dtype=torch.long), "NaN or infinite"),
    ],
)
def test_bad_examples_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        ll.Examples(inputs, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": None}, TypeError, "name must be a string, not None"),
        ({"classes": "ab"}, TypeError, "classes must be a sequence of names"),
        ({"classes": [0, 1]}, TypeError, "a class's name must be a string, not 0"),
        ({"train": None}, TypeError, r"t: train must be ll\.Examples, or texts"),
        ({"test": torch.zeros(2)}, TypeError, "t: test must be"),
        ({"pooling": "means"}, ValueError, "pooling must be .* did you mean 'mean'"),
        ({"head": 3}, TypeError, r"head must be an nn\.Linear"),
    ],
)
def test_what_makes_no_task_is_refused(change, error, message):
    given = {"name": "t", "classes": ["a", "b"], "train": examples([0, 1]), "test": examples([1, 0])}
    assert ll.Task(**given).classes == ("a", "b")
    with pytest.raises(error, match=message):
        ll.Task(**given | change)


@pytest.mark.parametrize("inputs", [np.zeros((2, 3)), [[0.0], [1.0]], None])
def test_examples_are_tensors(inputs):
    with pytest.raises(TypeError, match=r"inputs must be a tensor \(torch\.as_tensor makes one"):
        ll.Examples(inputs, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="labels must be a tensor"):
        ll.Examples(torch.zeros(2, 3), [0, 1])


@pytest.mark.parametrize("given", [None, "digits", torch.zeros(3)])
def test_what_is_no_task_or_model_is_refused(given):
    task = ll.Task("t", ("a", "b"), examples([0, 1]), examples([1, 0]))
    model = torch.nn.Linear(1, 2)
    variants = ll.tasks
    for ask in (
        lambda: ll.evaluate(model, given),
        lambda: ll.tasks.probed(model, given),
        lambda: variants.rotated(given, 90),
        lambda: variants.permuted(given, 0),
        lambda: variants.corrupted(given, "contrast", 1),
        lambda: variants.few_shot(given, 1),
        lambda: variants.only_classes(given, [0, 1]),
        lambda: ll.tasks.sequences.split(given),
        lambda: ll.tasks.sequences.rotations(given, [0]),
    ):
        with pytest.raises(TypeError, match="task must be a Task"):
            ask()
    for ask in (lambda: ll.evaluate(given, task), lambda: ll.tasks.probed(given, task)):
        with pytest.raises(TypeError, match="model must be a torch model"):
            ask()
