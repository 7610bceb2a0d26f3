from __future__ import annotations

import numpy as np
import pytest

import lora_lens as ll
from lora_lens.tasks.corpus import same_text

GOOD, BAD = ll.tasks.Texts(["fine", "poor"], [1, 0]), ll.tasks.Texts(["great"], [1])


def test_texts_and_classes_are_kept_as_tuples():
    corpus = ll.tasks.Corpus("c", ["bad", "good"], GOOD, BAD)
    assert corpus.classes == ("bad", "good")
    assert (corpus.train.texts, corpus.train.labels, len(corpus.train)) == (("fine", "poor"), (1, 0), 2)
    of_numpy = ll.tasks.Texts(np.array(["fine", "poor"]), np.array([1, 0]))
    assert of_numpy.labels == (1, 0) and type(of_numpy.labels[0]) is int
    assert ll.tasks.Corpus("c", ("bad", "good"), of_numpy, BAD).fingerprint() == corpus.fingerprint()


@pytest.mark.parametrize(
    ("texts", "labels", "error", "message"),
    [
        ([], [], ValueError, "not 0 texts and 0 labels"),
        (["a", "b"], [0], ValueError, "as many labels as texts, not 2 texts and 1 labels"),
        ("ab", [0, 1], TypeError, "texts must be a sequence of strings, such as a list, not 'ab'"),
        (["a"], 0, TypeError, "labels must be a sequence of whole numbers, such as a list, not 0"),
        (["a", None], [0, 0], TypeError, "text 1 must be a string, not None"),
        (["a", "b"], [0, "1"], TypeError, "label of text 1 must be a whole number, not '1'"),
        (["a", "b"], [0, 1.0], TypeError, "label of text 1 must be a whole number, not 1.0"),
        (["a", "b"], [True, 0], TypeError, "label of text 0 must be a whole number, not True"),
        (["a", " \n", ""], [0, 0, 0], ValueError, r"2 of 3 texts are empty \(rows 1, 2\); leave them out"),
        ([""] * 9, [0] * 9, ValueError, r"9 of 9 texts are empty \(rows 0, 1, 2, 3, 4 and 4 more\)"),
    ],
)
def test_bad_texts_are_refused_by_their_row(texts, labels, error, message):
    with pytest.raises(error, match=message):
        ll.tasks.Texts(texts, labels)


@pytest.mark.parametrize(
    ("classes", "train", "test", "message"),
    [
        (("bad",), GOOD, BAD, "c: train labels run from 0 to 1, but there are 1 classes"),
        (
            ("a", "b"),
            GOOD,
            ll.tasks.Texts(["x"], [2]),
            "c: test labels run from 2 to 2, but there are 2 classes",
        ),
        (("a", "b"), ll.tasks.Texts(["x"], [-1]), BAD, "train labels run from -1 to -1"),
        ((), ll.tasks.Texts(["x"], [0]), BAD, "c: test labels run from 1 to 1, but there are 0 classes"),
        (
            ("a", "b"),
            GOOD,
            ll.tasks.Texts(["  FINE\n"], [1]),
            "1 test texts are training texts.*such as '  FINE",
        ),
    ],
)
def test_labels_without_a_class_and_shared_texts_are_refused(classes, train, test, message):
    with pytest.raises(ValueError, match=message):
        ll.tasks.Corpus("c", classes, train, test)


def test_plain_text_needs_no_classes():
    assert (
        ll.tasks.Corpus("plain", (), ll.tasks.Texts(["one"], [0]), ll.tasks.Texts(["two"], [0])).classes == ()
    )


def test_case_and_white_space_make_no_other_text():
    assert same_text(" Not\tBad\n") == same_text("not bad") != same_text("notbad")


def test_the_fingerprint_tells_any_two_corpora_apart():
    first = ll.tasks.Corpus("c", ("bad", "good"), GOOD, BAD)
    others = [
        ll.tasks.Corpus("c", ("bad", "great"), GOOD, BAD),
        ll.tasks.Corpus("c", ("bad", "good"), ll.tasks.Texts(["fine", "poor"], [1, 1]), BAD),
        ll.tasks.Corpus("c", ("bad", "good"), ll.tasks.Texts(["poor", "fine"], [1, 0]), BAD),
        ll.tasks.Corpus("c", ("bad", "good"), GOOD, ll.tasks.Texts(["great!"], [1])),
        ll.tasks.Corpus("c", ("bad", "good"), BAD, GOOD),
    ]
    assert len({corpus.fingerprint() for corpus in [first, *others]}) == 6
    assert first.fingerprint() == ll.tasks.Corpus("renamed", ["bad", "good"], GOOD, BAD).fingerprint()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, ("a", "b"), GOOD, BAD), "name must be a string"),
        (("c", "ab", GOOD, BAD), "classes must be a sequence of names"),
        (("c", (0, 1), GOOD, BAD), "a class's name must be a string, not 0"),
        (("c", ("a", "b"), ["fine"], BAD), "train must be Texts"),
    ],
)
def test_what_makes_no_corpus_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        ll.tasks.Corpus(*given)
