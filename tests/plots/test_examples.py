"""Confusion and forgotten images show what the answers say, on the task's own images."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_language import byte_tokenizer, part_of

import lora_lens as ll


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def answers(source) -> pd.DataFrame:
    """Two runs on the first ten images: both forget item 3, one forgets item 5."""
    labels = source.test.labels[:10].numpy()
    runs = []
    for run, wrong in (("a", [3]), ("b", [3, 5])):
        after = labels.copy()
        after[wrong] = (after[wrong] + 1) % 10
        runs.append(
            pd.DataFrame({"run": run, "item": range(10), "label": labels, "before": labels, "after": after})
        )
    return pd.concat(runs, ignore_index=True)


def test_confusion_is_in_percent_of_the_true_class():
    ax = ll.plots.confusion(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["cat", "dog", "owl"])
    cells = ax.collections[0].get_array().reshape(3, 3)
    np.testing.assert_allclose(cells[:2], [[75, 25, 0], [0, 100, 0]])
    assert np.ma.getmaskarray(cells)[2].all()  # no owls: nothing to say of them
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["75", "25", "100"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "owl"]
    assert ax.get_xlabel() == "predicted" and len(ax.figure.axes) == 1


def test_confusion_of_many_classes_is_told_by_a_colour_bar_and_not_by_numbers():
    ax = ll.plots.confusion(np.eye(30, dtype=int), [f"class {i}" for i in range(30)])
    assert not ax.texts and [bar.get_ylabel() for bar in ax.figure.axes[1:]] == ["% of the true class"]
    np.testing.assert_allclose(ax.collections[0].get_array().reshape(30, 30), 100 * np.eye(30))


def test_confusion_of_answers_fits_the_task_s_classes(answers, source):
    counts = ll.forgetting.confusion(answers, len(source.classes))
    cells = ll.plots.confusion(counts, source.classes).collections[0].get_array().reshape(10, 10)
    seen = sorted(answers["label"].unique())
    np.testing.assert_allclose(cells[seen].sum(1), 100)
    with pytest.raises(ValueError, match=r"expected counts of shape \(3, 3\), not \(10, 10\)"):
        ll.plots.confusion(counts, ["a", "b", "c"])


def test_confusion_of_nothing_is_empty_and_on_the_axes_given(source):
    figure, ax = plt.subplots()
    before = dict(plt.rcParams)
    assert ll.plots.confusion(np.zeros((10, 10), int), source.classes, ax=ax) is ax
    figure.canvas.draw()
    assert np.ma.getmaskarray(ax.collections[0].get_array()).all()
    assert not any(text.get_text() for text in ax.texts)
    assert plt.get_fignums() == [figure.number] and dict(plt.rcParams) == before


def test_cells_of_less_than_half_a_percent_hold_no_number():
    counts = np.array([[997, 3], [6, 994]])
    ax = ll.plots.confusion(counts, ["cat", "dog"])
    assert [text.get_text() for text in ax.texts] == ["100", "", "1", "99"]


def test_forgotten_examples_show_the_image_what_it_became_and_for_how_many_runs(answers, source):
    forgotten = ll.forgetting.forgotten_by(answers)
    axes = ll.plots.forgotten_examples(source, forgotten, 2)
    assert axes.shape == (1, 2)
    for ax, item, share in zip(axes[0], (3, 5), ("100% of runs", "50% of runs"), strict=True):
        label = int(source.test.labels[item])
        assert ax.get_title().split("\n") == [
            source.classes[label], f"\N{RIGHTWARDS ARROW} {source.classes[(label + 1) % 10]}", share,
        ]  # fmt: skip
        pixels, image = ax.images[0].get_array(), source.test.inputs[item, 0].numpy()
        np.testing.assert_allclose(pixels, (image - image.min()) / np.ptp(image), atol=1e-6)


def test_images_that_nobody_forgot_have_no_other_class(answers, source):
    never = ll.forgetting.forgotten_by(answers).query("forgotten == 0").head(1)
    (ax,) = ll.plots.forgotten_examples(source, never).ravel()
    assert ax.get_title() == f"{source.classes[int(never['label'].iloc[0])]}\n0% of runs"


def test_images_fill_rows_and_empty_the_axes_that_are_left(answers, source):
    forgotten = ll.forgetting.forgotten_by(answers)
    own = ll.plots.forgotten_examples(source, forgotten, 10)
    assert own.shape == (2, 8) and sum(len(ax.images) for ax in own.flat) == 10
    assert not any(ax.axison for ax in own.flat)
    axes = plt.subplots(1, 3)[1]
    assert ll.plots.forgotten_examples(source, forgotten, 2, axes=axes) is axes
    assert [len(ax.images) for ax in axes] == [1, 1, 0] and not axes[2].axison


def test_one_forgotten_image_of_one_run_is_one_picture(answers, source):
    alone = ll.forgetting.forgotten_by(answers[answers["run"] == "a"])
    axes = ll.plots.forgotten_examples(source, alone[alone["forgotten"] > 0])
    assert axes.shape == (1, 1) and axes[0, 0].get_title().endswith("100% of runs")


def test_images_of_one_brightness_and_in_colour_can_be_shown(answers):
    inputs = torch.rand(10, 3, 4, 5, generator=torch.manual_seed(0))
    inputs[3] = 0.5
    examples = ll.Examples(inputs, torch.arange(10))
    task = ll.Task("colour", tuple("abcdefghij"), examples, examples)
    plain, coloured = ll.plots.forgotten_examples(task, ll.forgetting.forgotten_by(answers), 2).ravel()
    assert np.ptp(plain.images[0].get_array()) == 0
    assert coloured.images[0].get_array().shape == (4, 5, 3)


def test_images_refuse_what_they_cannot_show(answers, source):
    forgotten = ll.forgetting.forgotten_by(answers)
    with pytest.raises(ValueError, match="none was forgotten"):
        ll.plots.forgotten_examples(source, forgotten.iloc[:0])
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        ll.plots.forgotten_examples(source, forgotten, 0)
    with pytest.raises(ValueError, match="item 3 is not among the 3 test images"):
        ll.plots.forgotten_examples(source.first(test=3), forgotten, 1)
    with pytest.raises(ValueError, match="there are 10 images but only 1 axes"):
        ll.plots.forgotten_examples(source, forgotten, 10, axes=plt.subplots()[1])
    with pytest.raises(ValueError, match="no column instead"):
        ll.plots.forgotten_examples(source, forgotten.drop(columns="instead"))


def test_forgotten_texts_show_the_text_what_it_became_and_for_how_many_runs():
    movies = ll.tasks.text_task(part_of("movies", 4, 10), byte_tokenizer())
    right = movies.test.labels.numpy()
    after = right.copy()
    after[3] = 1 - after[3]
    answers = pd.DataFrame({"run": "a", "item": range(10), "label": right, "before": right, "after": after})
    axes = ll.plots.forgotten_examples(movies, ll.forgetting.forgotten_by(answers), 2)
    assert axes.shape == (2, 1)
    first, second = axes.ravel()
    old, new = (movies.classes[i] for i in (right[3], after[3]))
    assert first.get_title(loc="left") == f"{old}  \N{RIGHTWARDS ARROW} {new}  100% of runs"
    assert first.texts[0].get_text().replace("\n", " ") == " ".join(movies.test.texts[3].split())
    assert (
        second.get_title(loc="left").endswith("0% of runs")
        and "\N{RIGHTWARDS ARROW}" not in second.get_title()
    )
    own = plt.subplots(1, 3)[1]
    assert ll.plots.forgotten_examples(movies, ll.forgetting.forgotten_by(answers), 2, axes=own) is own
    assert [len(ax.texts) for ax in own] == [1, 1, 0] and not own[2].axison
    with pytest.raises(ValueError, match="not among the 3 test texts"):
        ll.plots.forgotten_examples(movies.first(test=3), ll.forgetting.forgotten_by(answers), 1)


def test_tokens_and_vectors_are_no_examples_to_show(answers, source):
    forgotten = ll.forgetting.forgotten_by(answers)
    running = ll.tasks.language_task(part_of("movies", 20, 20), byte_tokenizer(), block=16)
    with pytest.raises(ValueError, match="movies has no classes: its items are the tokens"):
        ll.plots.forgotten_examples(running, forgotten)
    vectors = ll.Examples(source.test.inputs[:10].flatten(1), source.test.labels[:10])
    task = ll.Task("vectors", source.classes, vectors, vectors)
    with pytest.raises(ValueError, match="vectors are neither images"):
        ll.plots.forgotten_examples(task, forgotten)
