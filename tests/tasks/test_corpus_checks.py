from __future__ import annotations

import warnings

import pytest
from text_rows import GOOD, held_out, write

from lora_lens.tasks.corpus import same_text
from lora_lens.tasks.readers import text_corpus


def test_classes_are_sorted_numbers_by_size(tmp_path):
    rows = [(f"text {i}", i) for i in (10, 9, -1)]
    for name in ("a.csv", "a.jsonl"):
        corpus = text_corpus(write(tmp_path / name, rows), write(tmp_path / "t.jsonl", [("other", 9.0)]))
        assert corpus.classes == ("-1", "9", "10") and corpus.train.labels == (2, 1, 0)
        assert corpus.test.labels == (1,)
    padded = write(tmp_path / "padded.csv", [("a", "002"), ("b", "010"), ("c", "002")])
    assert text_corpus(padded, write(tmp_path / "t.csv", [("d", "010")])).classes == ("002", "010")


def test_named_classes_are_in_the_given_order(tmp_path):
    corpus = text_corpus(
        write(tmp_path / "a.csv", GOOD), held_out(tmp_path), classes=["pos", "unsure", "neg"]
    )
    assert corpus.classes == ("pos", "unsure", "neg")
    assert corpus.train.labels == (0, 2, 0, 2) and corpus.test.labels == (0, 2)
    numbered = [(text, int(label == "pos")) for text, label in GOOD]
    test = write(tmp_path / "t.csv", [("a fine film", 1)])
    for name in ("n.csv", "n.jsonl"):
        path = write(tmp_path / name, numbered)
        assert text_corpus(path, test, classes=["negative", "positive"]).train.labels == (1, 0, 1, 0)
        assert text_corpus(path, test, classes=["1", "0"]).train.labels == (0, 1, 0, 1)  # by name
        with pytest.raises(ValueError, match=r"not among the classes '1', '2': '0' \(line [23]\)"):
            text_corpus(path, test, classes=["1", "2"])
    with pytest.raises(ValueError, match=r"a\.csv: .*not among the classes 'pos', 'bad': 'neg' \(line 3\)"):
        text_corpus(tmp_path / "a.csv", held_out(tmp_path), classes=["pos", "bad"])


def test_no_text_is_in_both_parts_or_twice_in_one(tmp_path):
    train = [*GOOD, ("Good  ONE", "pos"), ("shared", "pos"), ("SHARED", "neg"), ("bad one", "neg")]
    test = [("shared ", "neg"), ("fresh", "pos"), ("Fresh", "pos")]
    train, test = write(tmp_path / "a.csv", train), write(tmp_path / "b.csv", test)
    with pytest.warns(UserWarning, match=".*") as caught:
        corpus = text_corpus(train, test)
    assert [str(w.message) for w in caught] == [
        "a: left out 2 training texts that are test texts as well and 3 repeated texts"
    ]
    assert caught[0].filename == __file__
    assert corpus.train.texts == ("good one", "bad one", "good two", "bad two")
    assert corpus.test.texts == ("shared ", "fresh") and corpus.test.labels == (0, 1)
    with pytest.raises(ValueError, match=r"every text of .*b\.csv is a text of .*b\.csv as well"):
        text_corpus(test, test)


def test_repeated_texts_of_one_file_stay_together(tmp_path):
    path = write(
        tmp_path / "a.csv", [(f"{word} {i}", "ab"[i % 2]) for i in range(20) for word in ("x", " X ")]
    )
    with pytest.warns(UserWarning, match="^a: left out 20 repeated texts$"):
        corpus = text_corpus(path, test_share=0.5)
    assert len(corpus.train) == len(corpus.test) == 10
    assert len({same_text(text) for text in corpus.train.texts + corpus.test.texts}) == 20


def test_clean_files_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_corpus(write(tmp_path / "a.csv", GOOD), held_out(tmp_path))


def test_one_text_with_two_labels_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, ("Bad ONE", "pos")])
    message = (
        r"a\.jsonl: one text has several labels: 'bad one' \(lines 2, 5: 'neg', 'pos'\); .*conflicts=\"drop\""
    )
    for test in (None, held_out(tmp_path)):
        with pytest.raises(ValueError, match=message):
            text_corpus(path, test)
    many = [(f"{i % 9} text", "ab"[i // 9]) for i in range(18)]
    with pytest.raises(ValueError, match=r"9 texts have several labels: '0 text' .* and 6 more; keep"):
        text_corpus(write(tmp_path / "many.csv", many))


def test_texts_with_several_labels_are_dropped_or_keep_the_majority_s(tmp_path):
    torn = [("so so", "pos"), ("So so", "neg"), ("SO SO", "pos"), ("tie", "neg"), ("tie", "pos")]
    path = write(tmp_path / "a.csv", [*torn, *GOOD])
    with pytest.warns(UserWarning, match="^a: left out 5 rows whose texts have several labels$"):
        corpus = text_corpus(path, held_out(tmp_path), conflicts="drop")
    assert corpus.train.texts == tuple(text for text, _ in GOOD)
    with pytest.warns(UserWarning, match="^a: left out 3 rows whose .* labels and 1 repeated texts$"):
        corpus = text_corpus(path, held_out(tmp_path), conflicts="majority")
    assert corpus.train.texts[0] == "so so" and corpus.train.labels[0] == 1 and len(corpus.train) == 5
    only = write(tmp_path / "only.csv", torn)
    with pytest.raises(ValueError, match="every text has several labels, so none is left"):
        text_corpus(only, conflicts="drop")


def test_the_same_number_is_one_class_however_it_is_written(tmp_path):
    test = write(tmp_path / "t.jsonl", [("d", 1)])
    path = write(tmp_path / "a.csv", [("a", "1.0"), ("b", " 0"), ("c", "1 ")])
    assert text_corpus(path, test).classes == ("0", "1")
    path = write(tmp_path / "b.csv", [("a", "01"), ("b", "0"), ("c", "1")])
    with pytest.raises(ValueError, match=r"labels '01' \(line 2\) and '1' \(line 4\) are the same number"):
        text_corpus(path, test)


def test_true_and_false_are_labels_in_every_kind_of_file(tmp_path):
    rows = [("a", True), ("b", False), ("c", True)]
    for train, test in ((".csv", ".jsonl"), (".jsonl", ".csv")):
        corpus = text_corpus(
            write(tmp_path / f"a{train}", rows), write(tmp_path / f"t{test}", [("d", True), ("e", False)])
        )
        assert corpus.classes == ("False", "True") and corpus.train.labels == (1, 0, 1)
        assert corpus.test.labels == (1, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\n"a\nb",x\n,y\n" ",z\n', r"2 of 3 texts are empty \(lines 4, 5\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"label": 1}\n', r"1 of 2 texts are empty \(line 3\)"),
        ("a.jsonl", '{"text": NaN, "label": 1}\n', r"1 of 1 texts are empty \(line 1\)"),
        ("a.jsonl", '{"text": null, "label": 1}\n' * 7, r"7 of 7 .* \(lines 1, 2, 3, 4, 5 and 2 more\)"),
        ("a.csv", "text,label\na,x\nb,\n", r"1 of 2 labels are missing \(line 3\); leave them out"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"1 of 2 labels are missing \(line 2\)"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', r"1 of 1 labels are missing"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label": "1"}\n',
            r"numbers \(0, line 1\) and some are strings \('1', line 2\); write all",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": true}\n{"text": "b", "label": 1}\n',
            r"some labels are booleans \(True, line 1\) and some are numbers \(1, line 2\)",
        ),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"1 labels are not whole, such as 0\.5 \(line 1\)"),
        ("a.csv", "text,label\na,1\nb,.5\nc,2.75\n", r"2 labels are not whole, such as \.5 \(lines 3, 4\)"),
        (
            "a.jsonl",
            '{"text": "ab\\ud83d", "label": 1}\n',
            "line 1: character 2 of the text is half of",
        ),
        ("a.csv", "text,label\na,x\nb,x\n", "have the label 'x'; expected at least two classes"),
    ],
)
def test_rows_that_make_no_corpus_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=message) as error:
        text_corpus(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 12, "label": 1}', "line 1: a text must be a string, not int 12"),
        ('{"text": ["a"], "label": 1}', r"line 1: a text must be a string, not list \['a'\]"),
        ('{"text": "a", "label": [1, 2]}', r"line 1: a label must be .*, not list \[1, 2\]"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TypeError, match=message):
        text_corpus(tmp_path / "a.jsonl")


def test_a_class_of_the_test_part_only_is_refused(tmp_path):
    train = write(tmp_path / "a.csv", [*GOOD, ("meh", "unsure")])
    test = write(tmp_path / "b.csv", [("fine", "pos"), ("what", "odd"), ("MEH", "unsure")])
    # the only training text of 'unsure' is a test text, too, so it leaves the training part
    message = r"no text: 'odd', 'unsure' \(.*b\.csv, lines 3, 4\)"
    with pytest.warns(UserWarning, match="1 training texts"), pytest.raises(ValueError, match=message):
        text_corpus(train, test)
