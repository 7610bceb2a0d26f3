from __future__ import annotations

from itertools import permutations

import pytest
import torch
from small_language import byte_tokenizer

import lora_lens as ll
from lora_lens.tasks.bundled_texts import CORPORA, genres, sentiment
from lora_lens.tasks.sequences import (
    fashion_digits_corrupted_rotated,
    orders,
    rotations,
    split,
    split_fashion,
    text_corpora,
)


@pytest.fixture(scope="module")
def small(digits) -> ll.Task:
    return digits.first(train=400, test=100)


def test_a_split_has_every_example_once_with_its_class(small):
    parts = split(small)
    assert [p.classes for p in parts] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")]
    assert [p.name for p in parts][:2] == ["digits, only 0, 1", "digits, only 2, 3"]
    for side in ("train", "test"):
        whole = getattr(small, side)
        true = {
            x.numpy().tobytes(): small.classes[y] for x, y in zip(whole.inputs, whole.labels, strict=True)
        }
        assert sum(len(getattr(p, side)) for p in parts) == len(whole) == len(true)
        for part in parts:
            examples = getattr(part, side)
            assert set(examples.labels.tolist()) == {0, 1}
            for image, label in zip(examples.inputs, examples.labels, strict=True):
                assert true[image.numpy().tobytes()] == part.classes[label]


def test_groups_may_be_given_by_name_or_number_in_any_order(small):
    parts = split(small, [["7", 1, "4"], [0, 9]])
    assert [p.classes for p in parts] == [("7", "1", "4"), ("0", "9")]
    assert [len(p.classes) for p in split(small, size=5)] == [5, 5]


def test_texts_can_be_split():
    parts = split(ll.tasks.text_task(genres(50), byte_tokenizer()))
    assert [p.classes for p in parts] == [("movies", "products"), ("tweets", "newspaper")]
    assert parts[1].train.texts[0] in set(genres(50).train.texts) and len(parts[1].train) == 80


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 3}, "10 classes do not divide into groups of 3, 9 would be left over"),
        ({"size": 4}, "10 classes do not divide into groups of 4, 8, 9 would be left over"),
        ({"size": 1}, "at least two classes, so size cannot be 1"),
        ({"groups": []}, "at least one group"),
        ({"groups": [[0, 1], [2]]}, "at least two classes, not 1"),
        ({"groups": [[0, 1], ["1", 2]]}, "class '1' is in two groups"),
        ({"groups": [[0, 1], [2, 10]]}, "unknown class 10"),
    ],
)
def test_splits_that_cannot_be_are_refused(small, given, message):
    with pytest.raises(ValueError, match=message):
        split(small, **given)


def test_a_group_is_a_list_and_a_size_a_whole_number(small):
    with pytest.raises(TypeError, match=r"must be a sequence of names or indices.*not '01'"):
        split(small, ["01", "23"])
    with pytest.raises(TypeError):
        split(small, size=2.0)


def test_rotations_begin_with_the_task_itself_and_end_where_told(small):
    tasks = rotations(small, [0, 30, 60.0])
    assert tasks[0] is small
    assert [t.name for t in tasks[1:]] == ["digits, rotated by 30 degrees", "digits, rotated by 60 degrees"]
    away = [float((t.test.inputs - small.test.inputs).square().mean()) for t in tasks]
    assert away[0] == 0 < away[1] < away[2]


def test_angles_that_make_no_sequence_are_refused(small):
    with pytest.raises(ValueError, match="at least one angle"):
        rotations(small, [])
    with pytest.raises(ValueError, match="-90 and 270 degrees are the same angle"):
        rotations(small, [0, -90, 30, 270, 360])
    with pytest.raises(ValueError, match="degrees must be finite"):
        rotations(small, [0, float("nan")])


def test_orders_differ_and_begin_with_the_given_one():
    found = orders(5, 20, seed=3)
    assert found[0] == (0, 1, 2, 3, 4) and len(set(found)) == len(found) == 20
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in found)
    assert found == orders(5, 20, seed=3) != orders(5, 20, seed=4)
    assert orders(5, 7, seed=3) == found[:7]
    assert all(type(place) is int for place in found[-1])


def test_all_orders_can_be_had_but_not_more():
    assert set(orders(4, 24)) == set(permutations(range(4))) and orders(1, 1) == [(0,)]
    with pytest.raises(ValueError, match="25 different orders were asked for, but 4 tasks have only 24"):
        orders(4, 25)


@pytest.mark.parametrize(("count", "number"), [(0, 1), (3, 0), (-1, 1)])
def test_no_tasks_and_no_orders_are_refused(count, number):
    with pytest.raises(ValueError, match="at least one task and one order"):
        orders(count, number)


def test_orders_take_whole_numbers_and_a_seed_of_at_least_zero():
    for arguments in ((3.0, 2), (3, 2.0), (3, 2, 1.5)):
        with pytest.raises(TypeError):
            orders(*arguments)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        orders(3, 2, seed=-1)


def test_fashion_is_split_into_five_pairs_of_the_size_asked_for():
    tasks = split_fashion()
    assert [c for t in tasks for c in t.classes] == list(ll.tasks.bundled.FASHION_CLASSES)
    assert {(len(t.classes), len(t.train), len(t.test)) for t in tasks} == {(2, 2000, 400)}
    assert all(150 <= n <= 250 for t in tasks for n in t.test.labels.bincount().tolist())
    assert {(len(t.train), len(t.test)) for t in split_fashion(train=50, test=20)} == {(50, 20)}
    with pytest.raises(ValueError, match="only T-shirt, trouser has 2000 train examples; asked for 2001"):
        split_fashion(train=2001)


def test_four_tasks_of_changing_images_have_the_names_and_sizes_stated(source, digits):
    tasks = fashion_digits_corrupted_rotated(train=300, test=100)
    assert [t.name for t in tasks] == [
        "fashion_mnist", "digits", "digits, gaussian noise 3", "fashion_mnist, rotated by 90 degrees",
    ]  # fmt: skip
    assert {(len(t.classes), len(t.train), len(t.test)) for t in tasks} == {(10, 300, 100)}
    assert torch.equal(tasks[0].test.inputs, source.test.inputs[:100])
    assert torch.allclose(tasks[3].test.inputs, tasks[0].test.inputs.rot90(1, (2, 3)), atol=1e-4)
    assert torch.equal(tasks[1].train.inputs, digits.train.inputs[:300])
    assert torch.equal(tasks[2].train.labels, tasks[1].train.labels)


def test_text_corpora_share_their_classes_and_are_of_the_size_asked_for():
    tasks = text_corpora(byte_tokenizer(), train=60, test=30, pooling="last")
    assert tuple(t.name for t in tasks) == CORPORA == ("movies", "products", "tweets", "newspaper")
    assert {t.classes for t in tasks} == {("negative", "positive")}
    assert {(len(t.train), len(t.test), t.pooling) for t in tasks} == {(60, 30, "last")}
    for task in tasks:
        corpus = sentiment(task.name)
        assert task.test.texts == corpus.test.texts[:30]
        assert task.train.labels.tolist() == list(corpus.train.labels[:60])


def test_a_model_of_digits_learns_the_tasks_of_a_sequence():
    model, _ = ll.tasks.bundled.vision_of_digits()
    first, last = (split_fashion(train=200, test=100)[place] for place in (0, 4))
    for task in (first, last):
        adapted = ll.attach(model, ll.Window(rank=4, position=0.5))
        run = ll.finetune(adapted, task, steps=20, batch_size=16, lr=3e-3, evaluations=2, progress=False)
        assert run.head.out_features == 2 and run.accuracy > 0.8
        model = ll.detach(adapted)
