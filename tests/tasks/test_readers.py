from __future__ import annotations

import csv
import gzip
import sys

import pandas as pd
import pytest
from text_rows import GOOD, held_out, parquet, write

from lora_lens._base.errors import InputError
from lora_lens.tasks.readers import text_corpus

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


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.tsv", "a.jsonl", "a.json", "A.CSV", "a.csv.gz", "a.tsv.bz2", "a.jsonl.xz"],
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


def test_what_spreadsheets_and_pandas_write_is_read(tmp_path):
    excel = tmp_path / "excel.csv"
    excel.write_bytes("\ufefftext,label\r\nÄrger,neg\r\n\r\nFreude,pos\r\n".encode())
    assert text_corpus(excel, held_out(tmp_path)).train.texts == ("Ärger", "Freude")
    frame = pd.DataFrame(GOOD, columns=["text", "label"])
    frame.to_csv(tmp_path / "p.csv")  # with a column of numbers that has no name
    frame.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    assert (
        text_corpus(tmp_path / "p.csv", held_out(tmp_path)).fingerprint()
        == text_corpus(tmp_path / "p.jsonl", held_out(tmp_path)).fingerprint()
    )
    long = "word " * 60_000  # beyond the csv module's own limit, which is to be as before
    before = csv.field_size_limit()
    corpus = text_corpus(write(tmp_path / "long.csv", [(long, "neg"), ("b", "pos")]), held_out(tmp_path))
    assert corpus.train.texts[0] == long and csv.field_size_limit() == before
    (tmp_path / "unicode.tsv").write_bytes("text\tlabel\r\nÄrger\tneg\r\nFreude\tpos\r\n".encode("utf-16"))
    corpus = text_corpus(tmp_path / "unicode.tsv", held_out(tmp_path))
    assert corpus.train.texts == ("Ärger", "Freude")
    (tmp_path / "german.csv").write_text("label;text\nneg;Ärger, viel\npos;Freude\n", encoding="utf-8")
    corpus = text_corpus(tmp_path / "german.csv", held_out(tmp_path))
    assert corpus.train.texts == ("Ärger, viel", "Freude") and corpus.train.labels == (0, 1)


def test_an_array_of_objects_is_the_same_as_their_lines(tmp_path):
    frame = pd.DataFrame(GOOD, columns=["text", "label"])
    frame.to_json(tmp_path / "a.json", orient="records", indent=2)
    frame.to_json(tmp_path / "b.json", orient="records", lines=True)
    corpora = [text_corpus(tmp_path / name, held_out(tmp_path)) for name in ("a.json", "b.json")]
    assert corpora[0].fingerprint() == corpora[1].fingerprint() and corpora[0].train.texts[0] == "good one"


def test_parquet_of_categories_and_booleans_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = parquet(
        tmp_path / "a.parquet",
        text=pa.array([text for text, _ in GOOD]).dictionary_encode(),
        label=pa.array([label for _, label in GOOD]).dictionary_encode(),
        flag=[label == "pos" for _, label in GOOD],
    )
    corpus = text_corpus(path, held_out(tmp_path))
    assert corpus.train.texts == tuple(text for text, _ in GOOD) and corpus.train.labels == (1, 0, 1, 0)
    test = write(tmp_path / "t.csv", [("fine", "true"), ("poor", "FALSE")], ("text", "flag"))
    truth = text_corpus(path, test, label="flag")
    assert truth.classes == ("False", "True") and truth.train.labels == (1, 0, 1, 0)
    assert truth.test.labels == (1, 0)


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty: it has no rows$"),
        ("a.jsonl", "\n \n", "is empty: it has no rows$"),
        ("a.csv", "text,label\n", "is empty: it has no rows under its header$"),
        ("a.csv", "review;stars\na;1\n", "no column 'text'; its columns are 'review;stars', so pass text="),
        ("a.csv", "text;label\na;x;\n", r"line 2, has 3 cells, .* a text with ';', line breaks"),
        ("a.tsv", "text\tstars\na\t1\n", "no column 'label'; its columns are 'text', 'stars'"),
        ("a.csv", "text,label,text\na,b,c\n", "has 2 columns 'text'"),
        ("a.jsonl", '{"body": "a", "stars": 1}\n', "no column 'text'; its columns are 'body', 'stars'"),
        ("a.csv", "text,label\na,x\nb,x,y\n", "line 3, has 3 cells, but the first line names 2 columns"),
        ("a.csv", "text,label\na,x\nb\n", "line 3, has 1 cells"),
        ("a.csv", 'text,label\n"a\nb",x\n"c,y\nd,z\n', r"line 4, is damaged: .* pass quoting=False\)"),
        ("a.csv", 'text,label\na,x\n"b" c,y\n', "line 3, is damaged: .* doubled"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", \n',
            r"line 2, is no JSON: .* at character 15; .* one object",
        ),
        ("a.json", '[\n{"text": "a"]\n', r"begins as a JSON array, but is none: .* on line 2"),
        ("a.json", '["a", "b"]\n', r"row 1: expected a JSON object, such as .*, not \"a\""),
        ("a.jsonl", '["a", "b"]\n["c", "d"]', r"line 1: expected a JSON object on every line.*, not \[\"a\""),
        ("a.jsonl", "[" * 100_000, "begins as a JSON array, but is none"),
        ("a.json", '{"text": "a",\n"label": 1}', "line 1, is no JSON.*or one array of such objects"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": 1}', "line 1: an object has the key 'text' twice"),
        ("a.csv", "text,label\na,x\nb,x\nc,y\n", "class 'y' has 1 text, line 4; splitting takes at least 2"),
    ],
)
def test_files_that_hold_no_table_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=message) as error:
        text_corpus(path)
    assert str(path) in str(error.value)


def test_another_encoding_is_named_by_its_byte(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes(b"text,label\ngood,x\nK\xe4se,y\n")  # 11 bytes, 7 and the K before it
    with pytest.raises(ValueError, match=r"not UTF-8: byte 19 \(line 3\) is 0xe4; write it anew as UTF-8"):
        text_corpus(path)
    path.write_bytes(b"\xef\xbb\xbftext,label\ngood,x\nK\xe4se,y\n")
    with pytest.raises(ValueError, match=r"byte 22 \(line 3\)"):
        text_corpus(path)
    path.write_bytes("text,label\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"damaged: not readable as UTF-16"):
        text_corpus(path)
    for encoding in ("utf-16-le", "utf-32"):
        path.write_bytes("text,label\ngood,x\n".encode(encoding))
        with pytest.raises(ValueError, match=r"latin\.csv is not UTF-8: its first line holds zero bytes"):
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
        with pytest.raises(ValueError, match=r"a\.csv\.gz is damaged: not readable as gz"):
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


def test_paths_that_are_no_such_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.csv"):
        text_corpus(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.csv"):
        text_corpus(held_out(tmp_path), tmp_path / "nowhere.csv")
    with pytest.raises(IsADirectoryError, match=r"is a folder; give one file, \.jsonl, "):
        text_corpus(tmp_path)
    for name in ("a.txt", "a.pkl", "a", "a.parquet.gz", "a.gz", "a.csv.zst"):
        (tmp_path / name).write_text("text,label\n")
        with pytest.raises(ValueError, match=r"expected a file that ends in \.jsonl, "):
            text_corpus(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1}, r"test_share must be in \(0, 1\), not 1"),
        ({"conflicts": "droop"}, "conflicts must be one of 'refuse', .* did you mean 'drop'"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"classes": ["pos"]}, "at least two different strings"),
        ({"classes": ["pos", "pos"]}, "at least two different strings"),
        ({"classes": [0, 1]}, r"at least two different strings, not \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        text_corpus(write(tmp_path / "a.csv", GOOD), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"classes": "pos"}, {"test_share": "0.2"}, {"seed": 1.5}, {"quoting": "no"}, {"text": None},
        {"label": ["label"]}, {"conflicts": None},
    ],
)  # fmt: skip
def test_settings_of_other_types_are_refused(tmp_path, options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
        text_corpus(write(tmp_path / "a.csv", GOOD), **options)
    with pytest.raises(TypeError, match="a file must be a path, not None"):
        text_corpus(None)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    table = parquet(tmp_path / "a.parquet", text=["a"], label=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # which makes the import fail
    with pytest.raises(ImportError, match=r"a\.parquet needs the pyarrow package: pip install pyarrow"):
        text_corpus(table)


def test_classes_that_differ_in_case_only_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'Pos' if i % 2 else 'pos'}\n" for i in range(8)))
    with pytest.warns(UserWarning, match="a: 'Pos' and 'pos' differ in case only"):
        assert text_corpus(path).classes == ("Pos", "pos")


@pytest.mark.parametrize("quoting", [True, False])
def test_files_without_quotation_marks_take_no_quoting(tmp_path, quoting):
    file = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(InputError, match=r"quoting is of \.csv and \.tsv files.*a\.jsonl has none"):
        text_corpus(file, quoting=quoting)
    text_corpus(write(tmp_path / "a.csv", GOOD), write(tmp_path / "b.jsonl", [("else", "pos")]), quoting=True)
