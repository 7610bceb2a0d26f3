from __future__ import annotations

import csv
import gzip
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from lora_lens.corpus import same_text
from lora_lens.text_files import dataset_corpus, hub_corpus, text_corpus

if TYPE_CHECKING:
    from datasets import Dataset

ODD = [
    "NA",
    "null",
    "001",
    "1e5",
    "nan",
    "True",
    'said "no", then\nleft\r\nfor good',
    "tab\there \u2028 Käse 🧀",
]
ODD_LABELS = ["no", "yes"] * 4
GOOD = [("good one", "pos"), ("bad one", "neg"), ("good two", "pos"), ("bad two", "neg")]


def write(path: Path, rows: list[tuple], columns: tuple[str, ...] = ("text", "label")) -> Path:
    """Rows as CSV, TSV or JSON lines, by the suffix, compressed if it ends in .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name or ".json" in path.name:
            for row in rows:
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
        else:
            writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
            writer.writerows([columns, *rows])
    return path


def parquet(path: Path, **columns: list) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def held_out(tmp_path) -> Path:
    return write(tmp_path / "held_out.csv", [("a fine film", "pos"), ("a poor film", "neg")])


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.tsv", "a.jsonl", "a.json", "A.CSV", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz"],
)
def test_texts_and_labels_come_out_as_they_were_written(tmp_path, name):
    test = write(tmp_path / "test.jsonl", [("other", "yes")])
    corpus = text_corpus(write(tmp_path / name, list(zip(ODD, ODD_LABELS, strict=True))), test)
    assert corpus.train.texts == tuple(ODD) and corpus.train.labels == (0, 1) * 4
    assert corpus.classes == ("no", "yes") and corpus.name == name.split(".")[0]
    assert corpus.test.texts == ("other",) and corpus.test.labels == (1,)


def test_parquet_comes_out_as_it_was_written(tmp_path):
    folder = tmp_path / "label=0"  # which looks like a partition of a larger table
    folder.mkdir()
    path = parquet(folder / "odd.parquet", review=ODD, stars=[2, 10] * 4, other=[0.5] * 8)
    test = parquet(folder / "test.parquet", review=["other"], stars=[10.0])
    corpus = text_corpus(path, test, text="review", label="stars", name="films")
    assert corpus.train.texts == tuple(ODD) and corpus.train.labels == (0, 1) * 4
    assert corpus.classes == ("2", "10") and corpus.test.labels == (1,) and corpus.name == "films"


def test_what_spreadsheets_and_pandas_write_is_read(tmp_path, held_out):
    excel = tmp_path / "excel.csv"
    excel.write_bytes("\ufefftext,label\r\nÄrger,neg\r\n\r\nFreude,pos\r\n".encode())
    assert text_corpus(excel, held_out).train.texts == ("Ärger", "Freude")
    frame = pd.DataFrame(GOOD, columns=["text", "label"])
    frame.to_csv(tmp_path / "p.csv")  # with a column of numbers that has no name
    frame.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    assert (
        text_corpus(tmp_path / "p.csv", held_out).fingerprint()
        == text_corpus(tmp_path / "p.jsonl", held_out).fingerprint()
    )
    long = "word " * 60_000  # beyond the csv module's own limit, which is to be as before
    before = csv.field_size_limit()
    corpus = text_corpus(write(tmp_path / "long.csv", [(long, "neg"), ("b", "pos")]), held_out)
    assert corpus.train.texts[0] == long and csv.field_size_limit() == before


def test_classes_are_sorted_numbers_by_size(tmp_path):
    rows = [(f"text {i}", i) for i in (10, 9, -1)]
    for name in ("a.csv", "a.jsonl"):
        corpus = text_corpus(write(tmp_path / name, rows), write(tmp_path / "t.jsonl", [("other", 9.0)]))
        assert corpus.classes == ("-1", "9", "10") and corpus.train.labels == (2, 1, 0)
        assert corpus.test.labels == (1,)
    padded = write(tmp_path / "padded.csv", [("a", "002"), ("b", "010"), ("c", "002")])
    assert text_corpus(padded, write(tmp_path / "t.csv", [("d", "010")])).classes == ("002", "010")


def test_named_classes_are_in_the_given_order(tmp_path, held_out):
    corpus = text_corpus(write(tmp_path / "a.csv", GOOD), held_out, classes=["pos", "unsure", "neg"])
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
        text_corpus(tmp_path / "a.csv", held_out, classes=["pos", "bad"])


def test_one_file_is_split_by_class_without_overlap(tmp_path):
    rows = [(f"text {i}", "a" if i < 10 else "b" if i < 15 else "c") for i in range(17)]
    path = write(tmp_path / "one.csv", rows)
    corpus = text_corpus(path, test_share=0.2)
    assert [corpus.train.labels.count(c) for c in range(3)] == [8, 4, 1]
    assert [corpus.test.labels.count(c) for c in range(3)] == [2, 1, 1]
    assert sorted(corpus.train.texts + corpus.test.texts) == sorted(text for text, _ in rows)
    of_text = dict(rows)
    for part in (corpus.train, corpus.test):
        assert [corpus.classes[label] for label in part.labels] == [of_text[text] for text in part.texts]
    assert text_corpus(path).fingerprint() == corpus.fingerprint()
    assert text_corpus(path, seed=1).fingerprint() != corpus.fingerprint()


def test_plain_text_has_no_classes(tmp_path):
    path = write(tmp_path / "plain.jsonl", [(f"text {i}",) for i in range(10)], ("text",))
    corpus = text_corpus(path, label=None, test_share=0.3)
    assert corpus.classes == () and len(corpus.train) == 7 and len(corpus.test) == 3
    assert set(corpus.train.labels + corpus.test.labels) == {0}
    with pytest.raises(ValueError, match=r"no column 'label'; its columns are 'text'.*label=None"):
        text_corpus(path)
    with pytest.raises(ValueError, match="leave classes out, or name the label"):
        text_corpus(path, label=None, classes=["a", "b"])
    with pytest.raises(ValueError, match=r"there is 1 text, line 1; .*add texts, or give a test file"):
        text_corpus(write(tmp_path / "single.jsonl", [("only",)], ("text",)), label=None)


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


def test_clean_files_warn_of_nothing(tmp_path, held_out):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_corpus(write(tmp_path / "a.csv", GOOD), held_out)


def test_one_text_with_two_labels_is_refused(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", [*GOOD, ("Bad ONE", "pos")])
    message = r"a\.jsonl: the same text has two labels, 'neg' \(line 2\) and 'pos' \(line 5\): 'Bad ONE'"
    for test in (None, held_out):
        with pytest.raises(ValueError, match=message):
            text_corpus(path, test)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty: it has no rows$"),
        ("a.jsonl", "\n \n", "is empty: it has no rows$"),
        ("a.csv", "text,label\n", "is empty: it has no rows under its header$"),
        ("a.csv", "review;stars\na;1\n", "no column 'text'; its columns are 'review;stars', so pass text="),
        ("a.tsv", "text\tstars\na\t1\n", "no column 'label'; its columns are 'text', 'stars'"),
        ("a.csv", "text,label,text\na,b,c\n", "has 2 columns 'text'"),
        ("a.jsonl", '{"body": "a", "stars": 1}\n', "no column 'text'; its columns are 'body', 'stars'"),
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
            r"strings \('1', line 2\) and some are numbers \(0, line 1\)",
        ),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"1 labels are not whole, such as 0\.5 \(line 1\)"),
        ("a.csv", "text,label\na,1\nb,.5\nc,2.75\n", r"2 labels are not whole, such as \.5 \(lines 3, 4\)"),
        ("a.csv", "text,label\na,x\nb,x,y\n", "line 3, has 3 cells, but the first line names 2 columns"),
        ("a.csv", "text,label\na,x\nb\n", "line 3, has 1 cells"),
        ("a.csv", 'text,label\n"a\nb",x\n"c,y\nd,z\n', "row that begins on line 4 is damaged"),
        ("a.csv", 'text,label\na,x\n"b" c,y\n', "row that begins on line 3 is damaged .* doubled"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", \n',
            r"line 2, is no JSON: .* at character 15; .* one object",
        ),
        ("a.json", '[\n{"text": "a"}]\n', r"line 1, is no JSON"),
        ("a.json", '[{"text": "a", "label": 1}]\n', r"line 1: expected a JSON object .*, not \[\{\"text\""),
        ("a.jsonl", "[" * 100_000, "line 1, is no JSON"),
        (
            "a.jsonl",
            '{"text": "ab\\ud83d", "label": 1}\n',
            "line 1: character 2 of the text is half of",
        ),
        ("a.csv", "text,label\na,x\nb,x\n", "have the label 'x'; expected at least two classes"),
        ("a.csv", "text,label\na,x\nb,x\nc,y\n", "class 'y' has 1 text, line 4; splitting takes at least 2"),
    ],
)
def test_files_that_make_no_corpus_are_refused(tmp_path, name, content, message):
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
        ('{"text": "a", "label": true}', "line 1: a label must be a string or a whole number, not bool True"),
        ('{"text": "a", "label": [1, 2]}', r"line 1: a label must be .*, not list \[1, 2\]"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TypeError, match=message):
        text_corpus(tmp_path / "a.jsonl")


def test_another_encoding_is_named_by_its_byte(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes(b"text,label\ngood,x\nK\xe4se,y\n")  # 11 bytes, 7 and the K before it
    with pytest.raises(ValueError, match=r"not UTF-8: byte 19 \(line 3\) is 0xe4; write it anew as UTF-8"):
        text_corpus(path)
    path.write_bytes(b"\xef\xbb\xbftext,label\ngood,x\nK\xe4se,y\n")
    with pytest.raises(ValueError, match=r"byte 22 \(line 3\)"):
        text_corpus(path)
    path.write_bytes("text,label\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"byte 0 \(line 1\) is 0xff"):
        text_corpus(path)
    packed = tmp_path / "latin.csv.gz"
    packed.write_bytes(gzip.compress(b"text,label\nK\xe4se,y\n"))
    with pytest.raises(ValueError, match=r"byte 12 uncompressed \(line 2\)"):
        text_corpus(packed)


def test_damaged_archives_and_tables_are_named(tmp_path):
    packed = tmp_path / "a.csv.gz"
    whole = gzip.compress(b"text,label\na,x\n" * 100)
    for content in (b"text,label\na,x\n", whole[:-9], whole[:20] + b"\xff" * 9 + whole[29:]):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.csv\.gz is damaged: not readable as gzip"):
            text_corpus(packed)
    table = parquet(tmp_path / "a.parquet", text=["a"], label=["x"])
    table.write_bytes(table.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: not readable as Parquet"):
        text_corpus(table)


def test_parquet_is_checked_as_well(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 texts are empty \(rows 2, 3\)"):
        text_corpus(parquet(tmp_path / "a.parquet", text=["a", None, ""], label=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"1 of 2 labels are missing \(row 2\)"):
        text_corpus(parquet(tmp_path / "a.parquet", text=["a", "b"], label=[1, None]))
    with pytest.raises(TypeError, match="row 1: a text must be a string, not int 3"):
        text_corpus(parquet(tmp_path / "a.parquet", text=[3], label=[1]))
    with pytest.raises(TypeError, match="row 1: a text must be a string, not bytes"):
        text_corpus(parquet(tmp_path / "a.parquet", text=[b"\xff"], label=[1]))
    with pytest.raises(ValueError, match="no column 'label'; its columns are 'text', 'stars'"):
        text_corpus(parquet(tmp_path / "a.parquet", text=["a"], stars=[1]))
    with pytest.raises(ValueError, match="is empty"):
        text_corpus(parquet(tmp_path / "a.parquet", text=[], label=[]))


def test_paths_that_are_no_such_files_are_refused(tmp_path, held_out):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.csv"):
        text_corpus(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.csv"):
        text_corpus(held_out, tmp_path / "nowhere.csv")
    with pytest.raises(IsADirectoryError, match=r"is a folder; give one file, \.jsonl, "):
        text_corpus(tmp_path)
    for name in ("a.txt", "a.pkl", "a", "a.parquet.gz", "a.gz"):
        (tmp_path / name).write_text("text,label\n")
        with pytest.raises(ValueError, match=r"expected a file that ends in \.jsonl, "):
            text_corpus(tmp_path / name)


def test_a_class_of_the_test_part_only_is_refused(tmp_path):
    train = write(tmp_path / "a.csv", [*GOOD, ("meh", "unsure")])
    test = write(tmp_path / "b.csv", [("fine", "pos"), ("what", "odd"), ("MEH", "unsure")])
    # the only training text of 'unsure' is a test text, too, so it leaves the training part
    message = r"no text: 'odd', 'unsure' \(.*b\.csv, lines 3, 4\)"
    with pytest.warns(UserWarning, match="1 training texts"), pytest.raises(ValueError, match=message):
        text_corpus(train, test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1}, "test_share must be between 0 and 1, not 1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"classes": "pos"}, "at least two different strings, not 'pos'"),
        ({"classes": ["pos"]}, "at least two different strings"),
        ({"classes": ["pos", "pos"]}, "at least two different strings"),
        ({"classes": [0, 1]}, r"at least two different strings, not \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        text_corpus(write(tmp_path / "a.csv", GOOD), **options)


def loaded(texts: list, labels: list, names: list[str] | None = None) -> Dataset:
    """A data set in memory, its classes with names if these are given."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    return data if names is None else data.cast_column("label", datasets.ClassLabel(names=names))


@pytest.fixture
def news() -> Dataset:
    return loaded(["x", "y"], [1, 0], ["world", "sports"])


def test_a_data_set_s_own_names_are_the_classes(news):
    train = loaded(["a", "b", "c"], [1, 0, 1], ["world", "sports"])
    corpus = dataset_corpus(train, news, "news")
    assert corpus.name == "news" and corpus.classes == ("world", "sports")
    assert corpus.train.texts == ("a", "b", "c") and corpus.train.labels == (1, 0, 1)
    assert corpus.test.texts == ("x", "y") and corpus.test.labels == (1, 0)
    as_numpy = train.with_format("numpy").map(lambda row: row).filter(lambda row: row["text"] != "b")
    swapped = loaded(["a", "d"], [1, 0], ["1", "0"])  # the label 0 is called "1"
    assert dataset_corpus(swapped, swapped.map(lambda r: {"text": r["text"] + "!"}), "n").train.labels == (
        1,
        0,
    )
    with pytest.raises(ValueError, match=r"no text: 'world' \(news \(test\), row 2\)"):
        dataset_corpus(as_numpy, news, "news")


def test_a_data_set_without_names_has_its_labels_as_classes():
    test = loaded(["x"], [3])
    assert dataset_corpus(loaded(["a", "b"], [12, 3]), test, "n").classes == ("3", "12")
    words = dataset_corpus(loaded(["a", "b"], ["up", "down"]), loaded(["x"], ["up"]), "n")
    assert words.classes == ("down", "up") and words.train.labels == (1, 0)
    plain = dataset_corpus(loaded(["a", "b"], [0, 0]), test, "n", label=None)
    assert plain.classes == () and plain.train.labels == (0, 0)


def test_at_most_so_many_texts_are_drawn_with_the_seed():
    train = loaded([f"text {i}" for i in range(100)], [i % 2 for i in range(100)])
    test = loaded([f"test {i}" for i in range(15)], [i % 2 for i in range(15)])
    corpus = dataset_corpus(train, test, "n", most=20)
    assert len(corpus.train) == 20 and len(corpus.test) == 15
    numbers = [int(text.split()[1]) for text in corpus.train.texts]
    assert numbers == sorted(numbers) and corpus.train.labels == tuple(i % 2 for i in numbers)
    assert numbers != list(range(20))
    again, other = (dataset_corpus(train, test, "n", most=20, seed=seed) for seed in (0, 1))
    assert again.fingerprint() == corpus.fingerprint() != other.fingerprint()
    assert set(dataset_corpus(train, test, "n", most=10).train.texts) < set(corpus.train.texts)
    assert dataset_corpus(train, test, "n", most=1000).train.texts == tuple(train["text"])


def test_data_sets_are_checked_as_files_are(news):
    with pytest.warns(UserWarning, match=r"^n: left out 1 training .* and 1 repeated texts$") as caught:
        dataset_corpus(loaded(["a", "b", "A", "X"], [0, 1, 0, 0]), loaded(["x"], [1]), "n")
    assert caught[0].filename == __file__
    train = loaded(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match=r"n \(train\): the same text has two labels, '0' \(row 1\)"):
        dataset_corpus(loaded(["a", "A"], [0, 1]), news, "n")
    empty = loaded(["a", "", "b", None], [0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"n \(train\): 2 of 4 .* empty \(rows 2, 4\); .*Dataset\.filter"):
        dataset_corpus(empty, news, "n")
    hidden = loaded(["x", "y"], [-1, -1], ["0", "1"])
    with pytest.raises(ValueError, match=r"n \(test\): 2 of 2 labels are missing .*a part that has them"):
        dataset_corpus(train, hidden, "n")
    with pytest.raises(ValueError, match=r"n \(test\): 1 labels are not whole, such as 0\.5 \(row 1\)"):
        dataset_corpus(train, loaded(["x"], [0.5]), "n")
    with pytest.raises(TypeError, match=r"row 1: a label must be .*, not list \[0, 1\]"):
        dataset_corpus(loaded(["a"], [[0, 1]]), news, "n")
    with pytest.raises(ValueError, match=r"n \(train\) has no column 'sentence'; its columns are 'text'"):
        dataset_corpus(train, news, "n", text="sentence")
    with pytest.raises(ValueError, match=r"n \(train\) is empty"):
        dataset_corpus(train.select([]), news, "n")
    with pytest.raises(TypeError, match=r"n \(train\) must be one datasets\.Dataset.*not DatasetDict"):
        dataset_corpus(pytest.importorskip("datasets").DatasetDict(train=train), news, "n")
    with pytest.raises(ValueError, match="most must be at least 1 text per part, not 0"):
        dataset_corpus(train, news, "n", most=0)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A local data set of CSV files, as ``load_dataset`` finds them by their names."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "films").mkdir()
    write(tmp_path / "films" / "train.csv", [*GOOD, ("Good one", "pos")])
    write(tmp_path / "films" / "test.csv", [("a fine film", "pos")])
    return tmp_path / "films"


def test_a_local_folder_is_loaded_as_a_hub_s_data_set(folder):
    with pytest.warns(UserWarning, match="^films: left out 1 repeated texts$") as caught:
        corpus = hub_corpus(folder)
    assert caught[0].filename == __file__
    assert corpus.name == "films" and corpus.classes == ("neg", "pos")
    assert corpus.train.texts == tuple(text for text, _ in GOOD) and corpus.train.labels == (1, 0, 1, 0)
    assert corpus.test.texts == ("a fine film",) and corpus.test.labels == (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = hub_corpus(folder, most=4, label=None)
    assert 3 <= len(drawn.train) <= 4 and drawn.classes == ()


def test_a_missing_split_is_named_with_those_there_are(folder):
    with pytest.raises(ValueError, match=r"films has no split 'valid'; it has 'train', 'test', so"):
        hub_corpus(str(folder), test="valid")
    with pytest.raises(ValueError, match="most must be at least 1"):
        hub_corpus(folder, most=0)


def test_a_data_set_s_own_code_is_not_run(folder):
    (folder / "films.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(RuntimeError, match=r"scripts are no longer supported.*films\.py"):
        hub_corpus(folder)
    assert not (folder / "ran").exists()


def test_a_missing_or_older_package_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.__version__", "3.6.0")
    with pytest.raises(ImportError, match=r"datasets 3\.6\.0 may execute .*pip install -U \"datasets>=4\""):
        hub_corpus(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)  # which makes the import fail
    with pytest.raises(ImportError, match=r"pip install \"datasets>=4\""):
        hub_corpus(folder)
    table = parquet(tmp_path / "a.parquet", text=["a"], label=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs the pyarrow package: pip install pyarrow"):
        text_corpus(table)
