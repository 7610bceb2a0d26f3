from __future__ import annotations

import pytest
import torch

import lora_lens as ll


def examples(labels: list[int]) -> ll.Examples:
    return ll.Examples(torch.arange(float(len(labels)))[:, None], torch.tensor(labels))


def test_subset_takes_the_first_examples():
    task = ll.Task("t", ("a", "b"), examples([0, 1, 1, 0]), examples([1, 0]))
    part = task.subset(train=2, test=1)
    assert part.train.labels.tolist() == [0, 1] and part.test.labels.tolist() == [1]
    assert task.subset().fingerprint() == task.fingerprint() != part.fingerprint()
    with pytest.raises(ValueError, match="t has 2 examples there; asked for 3"):
        task.subset(test=3)


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
        (torch.full((1, 2), torch.nan), torch.zeros(1, dtype=torch.long), "NaN or infinite"),
    ],
)
def test_bad_examples_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        ll.Examples(inputs, labels)
