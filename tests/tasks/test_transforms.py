from __future__ import annotations

import pytest
import torch
from small_language import byte_tokenizer

import lora_lens as ll
from lora_lens.tasks.bundled_texts import genres, sentiment
from lora_lens.tasks.transforms import SEVERITIES, corrupted, few_shot, only_classes, permuted, rotated


@pytest.fixture(scope="module")
def small(digits) -> ll.Task:
    return digits.first(train=400, test=100)


def labelled(train: list[int], test: list[int], classes: tuple[str, ...] = ("a", "b", "c")) -> ll.Task:
    """A task whose inputs are the examples' numbers."""
    parts = (ll.Examples(torch.arange(float(len(x)))[:, None], torch.tensor(x)) for x in (train, test))
    return ll.Task("letters", classes, *parts)


@pytest.mark.parametrize("kind", SEVERITIES)
def test_every_severity_takes_the_images_further_from_the_clean_ones(small, kind):
    tasks = [corrupted(small, kind, s) for s in range(1, 6)]
    for part in ("train", "test"):
        clean = getattr(small, part)
        away = [float((getattr(t, part).inputs - clean.inputs).square().mean()) for t in tasks]
        assert away == sorted(set(away)) and away[0] > 0
        assert all(torch.equal(getattr(t, part).labels, clean.labels) for t in tasks)
    assert tasks[2].name == f"digits, {kind.replace('_', ' ')} 3" and tasks[2].classes == small.classes
    assert len({t.fingerprint() for t in tasks}) == 5


@pytest.mark.parametrize("kind", SEVERITIES)
def test_each_severity_costs_the_pretrained_model_accuracy_but_leaves_it_above_chance(pretrained, kind):
    model, source = pretrained
    source = source.first(train=500, test=500)
    with torch.inference_mode():
        scores = [
            float((model(t.test.inputs).argmax(-1) == t.test.labels).float().mean())
            for t in (source, *(corrupted(source, kind, s) for s in range(1, 6)))
        ]
    assert scores == sorted(set(scores), reverse=True)
    assert 0.3 < scores[-1] < scores[0] - 0.2


def test_noise_is_a_matter_of_the_seed_and_of_the_image_s_place_alone(small):
    noisy = corrupted(small, "gaussian_noise", 3)
    torch.manual_seed(7)
    assert corrupted(small, "gaussian_noise", 3).fingerprint() == noisy.fingerprint()
    assert corrupted(small, "gaussian_noise", 3, seed=1).fingerprint() != noisy.fingerprint()
    fewer = corrupted(small.first(test=7), "gaussian_noise", 3)
    assert torch.equal(fewer.test.inputs, noisy.test.inputs[:7])


def test_noise_has_the_stated_size_in_the_stated_range_and_differs_between_train_and_test():
    images = torch.zeros(102, 2, 9, 9)  # blank but for the last two, which set the deviation and the range
    images[100:] = torch.tensor([[-9.0, -900.0], [9.0, 900.0]])[:, :, None, None]
    part = ll.Examples(images, torch.zeros(102, dtype=torch.long))
    noisy = corrupted(ll.Task("blank", ("a",), part, part), "gaussian_noise", 5)
    for channel in (0, 1):
        expected = 0.30 * float(images[:, channel].std())
        assert float(noisy.train.inputs[:100, channel].std()) == pytest.approx(expected, rel=0.05)
        assert noisy.train.inputs[:, channel].abs().max() <= images[:, channel].max()
    assert not torch.equal(noisy.train.inputs, noisy.test.inputs)
    shared = (noisy.train.inputs[:100] * noisy.test.inputs[:100]).mean()
    assert abs(shared) < 0.05 * noisy.train.inputs[:100].square().mean()
    assert images[:100].abs().max() == 0  # the task given is left as it was


def test_blur_and_contrast_keep_each_image_s_mean_and_need_no_seed(small):
    for kind, tolerance in (("contrast", 1e-5), ("gaussian_blur", 0.05)):
        changed = corrupted(small, kind, 5, seed=3)
        assert changed.fingerprint() == corrupted(small, kind, 5).fingerprint()
        means = (changed.test.inputs.mean((1, 2, 3)), small.test.inputs.mean((1, 2, 3)))
        assert torch.allclose(*means, atol=tolerance)
    flat = corrupted(small, "contrast", 5).test.inputs
    assert torch.allclose(flat.std((1, 2, 3)), 0.05 * small.test.inputs.std((1, 2, 3)), rtol=1e-4)


def test_corruptions_that_do_not_exist_are_refused(small):
    with pytest.raises(ValueError, match=r"kind must be one of 'gaussian_noise', .*, not 'fog'"):
        corrupted(small, "fog", 3)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity must be 1 to 5, not {severity}; for clean inputs"):
            corrupted(small, "contrast", severity)
    with pytest.raises(TypeError):
        corrupted(small, "contrast", 2.5)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        corrupted(small, "gaussian_noise", 1, seed=-1)
    with pytest.raises(ValueError, match=r"letters: train inputs of shape \(2, 1\) .* are no images"):
        corrupted(labelled([0, 1], [0, 1]), "contrast", 1)
    dots = ll.Examples(torch.zeros(1, 1, 3, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="dots: images of 3 x 3 pixels are too small to be blurred"):
        corrupted(ll.Task("dots", ("a",), dots, dots), "gaussian_blur", 1)


def test_a_quarter_turn_is_counter_clockwise_and_four_are_the_task_itself(small):
    task = rotated(small, 90)
    assert task.name == "digits, rotated by 90 degrees" and task.classes == small.classes
    for part in ("train", "test"):
        clean, turned = getattr(small, part), getattr(task, part)
        assert torch.allclose(turned.inputs, clean.inputs.rot90(1, (2, 3)), atol=1e-4)
        assert torch.equal(turned.labels, clean.labels)
    assert rotated(small, 0) is small and rotated(small, -720.0) is small
    assert rotated(small, -22.5).name == "digits, rotated by -22.5 degrees"


def test_turning_back_restores_the_middle_of_an_image(small):
    there, back = rotated(small, 30), rotated(rotated(small, 30), -30)
    middle = (..., slice(9, 19), slice(9, 19))
    away = [(t.test.inputs - small.test.inputs)[middle].square().mean() for t in (there, back)]
    assert away[1] < 0.15 * away[0]  # what is left is the blur of two interpolations


def test_each_channel_s_least_training_input_comes_in_from_outside():
    images = torch.full((3, 2, 8, 8), 5.0)
    images[0, 0, 0, 0], images[1, 1, 3, 3] = -2.0, -7.0
    train = ll.Examples(images, torch.zeros(3, dtype=torch.long))
    test = ll.Examples(torch.full((1, 2, 8, 8), 5.0), torch.tensor([0]))
    turned = rotated(ll.Task("grey", ("a",), train, test), 45).test.inputs[0]
    for channel, background in ((0, -2.0), (1, -7.0)):
        corners = turned[channel, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert torch.allclose(corners, torch.tensor(background)) and turned[channel, 4, 4] == 5
        assert background - 1e-5 < turned[channel].min() and turned[channel].max() < 5 + 1e-5


def test_permuted_pixels_are_the_same_in_one_other_order(small):
    task = permuted(small, 3)
    assert task.name == "digits, permuted 3" and task.classes == small.classes
    marked = torch.arange(2 * 784.0).view(1, 2, 28, 28).expand(2, -1, -1, -1)
    part = ll.Examples(marked, torch.tensor([0, 0]))
    order = permuted(ll.Task("marked", ("a",), part, part), 3).train.inputs[0, 0].flatten().long()
    assert order.sort().values.tolist() == list(range(784)) != order.tolist()
    for name in ("train", "test"):
        clean, mixed = (getattr(t, name) for t in (small, task))
        assert torch.equal(mixed.inputs.flatten(1), clean.inputs.flatten(1)[:, order])
        assert torch.equal(mixed.labels, clean.labels)
    both = permuted(ll.Task("marked", ("a",), part, part), 3).test.inputs[1]
    assert torch.equal(both[0] + 784, both[1])


def test_the_order_of_the_pixels_is_a_matter_of_the_seed_alone(small):
    torch.manual_seed(7)
    first = permuted(small, 3)
    assert permuted(small, 3).fingerprint() == first.fingerprint() != permuted(small, 4).fingerprint()
    assert torch.equal(permuted(small.first(test=7), 3).test.inputs, first.test.inputs[:7])


def test_angles_seeds_and_tasks_that_cannot_be_are_refused(small):
    for angle in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"degrees must be finite, not {angle}"):
            rotated(small, angle)
    for angle in ("90", True, None):
        with pytest.raises(TypeError, match=f"degrees must be a number, not {angle!r}"):
            rotated(small, angle)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        permuted(small, -1)
    with pytest.raises(TypeError):
        permuted(small, 1.5)
    texts = ll.tasks.text_task(sentiment("tweets"), byte_tokenizer())
    for change in (lambda t: rotated(t, 90), lambda t: permuted(t, 0), lambda t: corrupted(t, "contrast", 1)):
        with pytest.raises(ValueError, match=r"letters: train inputs of shape \(2, 1\) .* are no images"):
            change(labelled([0, 1], [0, 1]))
        with pytest.raises(ValueError, match="tweets holds texts, and only images can be changed"):
            change(texts)


def test_a_changed_task_keeps_how_it_is_read(small, model):
    seen = ll.tasks.probed(model, small)
    for task in (rotated(seen, 30), permuted(seen, 0), corrupted(seen, "contrast", 1)):
        assert task.head is seen.head
    assert only_classes(seen, [3, 8]).head is None


def test_few_shots_are_as_many_different_examples_of_every_class_with_the_whole_test_set(digits):
    task = few_shot(digits, 5, seed=1)
    assert task.name == "digits, 5 per class" and task.classes == digits.classes
    assert torch.bincount(task.train.labels).tolist() == [5] * 10
    assert len(task.train.inputs.flatten(1).unique(dim=0)) == 50
    assert torch.equal(task.test.inputs, digits.test.inputs)
    assert few_shot(digits, 5, seed=1).fingerprint() == task.fingerprint()
    assert few_shot(digits, 5, seed=2).fingerprint() != task.fingerprint()


def test_few_shots_are_among_the_many_of_the_same_seed():
    task = labelled([0, 1, 2] * 20, [0, 1, 2])
    fewer, more = (few_shot(task, n).train for n in (4, 9))
    assert set(fewer.inputs.flatten().tolist()) < set(more.inputs.flatten().tolist())
    for part in (fewer, more):
        assert part.inputs.flatten().tolist() == sorted(part.inputs.flatten().tolist())
        assert torch.equal(part.labels, (part.inputs.flatten() % 3).long())


def test_the_class_with_too_few_examples_is_named():
    task = labelled([0, 0, 1, 2, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="letters: class 'b' has 1 training examples; asked for 2 per class"):
        few_shot(task, 2)
    with pytest.raises(ValueError, match="class 'c' has 0 training examples"):
        few_shot(labelled([0, 1], [0, 1]), 1)
    with pytest.raises(ValueError, match="per_class must be at least 1, not 0"):
        few_shot(task, 0)
    with pytest.raises(TypeError):
        few_shot(task, 1.5)


def test_some_classes_alone_are_relabelled_in_the_order_given():
    task = labelled([0, 1, 2, 2, 0], [2, 1, 0])
    part = only_classes(task, ["c", 0])
    assert part.name == "letters, only c, a" and part.classes == ("c", "a")
    assert part.train.inputs.flatten().tolist() == [0, 2, 3, 4] and part.train.labels.tolist() == [1, 0, 0, 1]
    assert part.test.inputs.flatten().tolist() == [0, 2] and part.test.labels.tolist() == [0, 1]
    assert only_classes(task, ["a", "b", "c"]).fingerprint() == task.fingerprint()


def test_many_classes_are_counted_in_the_name(small):
    assert only_classes(small, range(8)).name == "digits, only 8 of 10 classes"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "z"], "unknown class 'z': letters has the classes a, b, c"),
        (["a", 3], "unknown class 3, expected 0 to 2"),
        (["a", -1], "unknown class -1"),
        (["a", "b", 0], "class 'a' is given twice"),
        (["a"], "at least two classes, not 1"),
        ([], "at least two classes, not 0"),
        (["a", "b"], "no test examples of class 'b'"),
    ],
)
def test_classes_that_make_no_task_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        only_classes(labelled([0, 1, 2], [0, 2]), classes)


def test_classes_must_be_a_list():
    with pytest.raises(TypeError, match=r"must be a sequence of names or indices.*not 'ab'"):
        only_classes(labelled([0, 1, 2], [0, 2]), "ab")


def test_texts_of_some_classes_and_few_of_each_keep_their_words():
    whole = ll.tasks.text_task(genres(50), byte_tokenizer(), pooling="last")
    part = few_shot(only_classes(whole, ["tweets", "movies"]), 5)
    assert part.classes == ("tweets", "movies") and part.pooling == "last"
    own = {"tweets": set(sentiment("tweets").train.texts), "movies": set(sentiment("movies").train.texts)}
    kept = zip(part.train.texts, part.train.labels.tolist(), strict=True)
    assert sorted(part.train.labels.tolist()) == [0] * 5 + [1] * 5
    assert all(text not in own[part.classes[1 - label]] for text, label in kept)
    assert byte_tokenizer().decode(part.train._text(0)) == part.train.texts[0]


def test_classes_cannot_be_taken_out_of_a_task_read_from_words():
    task = ll.tasks.label_word_task(genres(50), byte_tokenizer())
    with pytest.raises(ValueError, match="genres is read from the model's own words"):
        only_classes(task, ["tweets", "movies"])


def test_variants_of_variants_can_be_learnt(model, digits):
    task = corrupted(few_shot(only_classes(digits, [3, 8]), 20), "gaussian_noise", 2).first(test=200)
    assert task.name == "digits, only 3, 8, 20 per class, gaussian noise 2"
    adapted = ll.attach(model, ll.Window(rank=4, position=0.5))
    run = ll.finetune(adapted, task, steps=20, lr=3e-3, evaluations=2, progress=False)
    assert run.head.out_features == 2 and run.accuracy > 0.7
