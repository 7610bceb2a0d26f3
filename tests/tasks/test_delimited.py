from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from lora_lens.tasks.readers import text_corpus

REVIEWS = [(f"review {i}", "pos" if i % 2 else "neg") for i in range(20)]


def plain(folder: Path, rows: list[tuple], name: str = "a.tsv", end: str = "\n") -> Path:
    """As many programs write TSV: nothing is put into quotation marks."""
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = [delimiter.join(row) + end for row in [("text", "label"), *rows]]
    (folder / name).write_bytes("".join(lines).encode())
    return folder / name


def texts(path: Path, **options: object) -> list[str]:
    corpus = text_corpus(path, **options)
    return sorted(corpus.train.texts + corpus.test.texts)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ('"It opens here', 'and closes here"'),  # one cell over seven lines, for a reader of quotes
        ('"Great film" they said', "so so"),
        ('"never closed', "so so"),
        ('"a whole quote"', 'and "one" within'),
    ],
)
def test_quotation_marks_of_a_tsv_without_quoting_belong_to_the_texts(tmp_path, first, last, end):
    rows = [*REVIEWS]
    rows[3], rows[9] = (first, "neg"), (last, "pos")
    assert texts(plain(tmp_path, rows, end=end)) == sorted(text for text, _ in rows)
    assert texts(tmp_path / "a.tsv", quoting=False) == sorted(text for text, _ in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("odd", ['"whole"', 'said "no"', "two\nlines", "tab\tand, comma", '""', "plain"])
def test_what_the_csv_module_writes_is_read(tmp_path, odd, name, quoting, end):
    file = io.StringIO()
    delimiter = "\t" if name == "a.tsv" else ","
    rows = [("text", "label"), *REVIEWS, (odd, "pos")]
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    (tmp_path / name).write_bytes(file.getvalue().encode())
    assert texts(tmp_path / name) == sorted(text for text, _ in rows[1:])


def test_a_spreadsheet_s_tsv_has_quotation_marks_around_commas(tmp_path):
    rows = [*REVIEWS, ('"good, really"', "pos"), ('"bad, ""really"""', "neg")]
    found = texts(plain(tmp_path, rows))
    assert "good, really" in found and 'bad, "really"' in found


def test_two_readings_that_nothing_tells_apart_are_refused(tmp_path):
    same = plain(tmp_path, [*REVIEWS, ('"odd"', "pos"), ("not, quoted", "pos")])
    with pytest.raises(ValueError, match=r"two ways: the same rows, .*pass quoting=True .* quoting=False"):
        text_corpus(same)
    assert "odd" in texts(same, quoting=True) and '"odd"' in texts(same, quoting=False)
    lines = tmp_path / "one.tsv"
    lines.write_text('text\n"one\ntwo"\nthree\nfour\n')
    with pytest.raises(ValueError, match=r"one\.tsv can be read in two ways: 3 rows .* else 4; pass quoting"):
        text_corpus(lines, label=None)
    assert texts(lines, label=None, quoting=True) == ["four", "one\ntwo", "three"]
    commas = plain(tmp_path, [('"one', "pos"), ('two"', "neg"), *REVIEWS], "a.csv")
    with pytest.raises(ValueError, match=r"a\.csv can be read in two ways: 21 rows .* else 22"):
        text_corpus(commas)
    assert len(texts(commas, quoting=False)) == 22
