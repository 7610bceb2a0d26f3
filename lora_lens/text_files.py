"""Texts with classes from people's own files: JSON lines, CSV, TSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_lens.corpus import Corpus
from lora_lens.corpus_checks import (
    Part,
    check_texts,
    corpus_of,
    found_classes,
    generator,
    labels_by_name,
    once,
    require,
    short,
)
from lora_lens.errors import InputError, MissingFileError, MissingPackageError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json")
SUFFIXES = (*JSON_LINES, *DELIMITERS, ".parquet")


def text_corpus(
    train: str | Path,
    test: str | Path | None = None,
    *,
    text: str = "text",
    label: str | None = "label",
    name: str | None = None,
    classes: Sequence[str] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> Corpus:
    """Texts from a file: JSON lines (.jsonl, .json), .csv, .tsv or .parquet.

    All but Parquet may be compressed (.csv.gz). Files are UTF-8; tables begin with the names of their
    columns. Texts are taken as they stand: "NA", "null" and "001" are texts. Nothing in a file is executed::

        reviews = text_corpus("reviews.csv", text="review", label="stars")
        plain = text_corpus("chapters.jsonl", label=None)

    Texts are the same if their words are, whatever the case and the white space. Of the same texts with the
    same label one is kept, and no test text stays in the training part; one warning says how many went.

    Args:
        train: the file to train on; without ``test`` also to test on.
        test: the file to test on.
        text: the column, or JSON key, of the texts.
        label: that of the labels, which are strings or whole numbers; None for plain text.
        name: of the corpus; by default the training file's, without its suffix.
        classes: their names, in the order of the labels. Names that are no numbers may also stand for
            the labels 0, 1, 2 and so on. By default what the training file holds, sorted; numbers by size.
        test_share: without ``test``, the share of every class to test on, in (0, 1), drawn at random. It is
            rounded to whole texts, and every class keeps at least one on either side.
        seed: of that draw.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file, or a folder.
        ValueError: another suffix, a file that is empty, damaged or not UTF-8, no such column; empty texts,
            missing labels, labels of both kinds or not whole; one text with two labels in one part; fewer
            than two classes, one that is not among ``classes`` or in the test part only; an argument out of
            range.
        TypeError: a text that is no string, or a label that is neither a string nor a number.
        ImportError: reading Parquet needs pyarrow.
    """
    if not 0 < test_share < 1:
        raise InputError(f"test_share must be between 0 and 1, not {test_share}")
    random = generator(seed)
    names = _class_names(classes, label)
    files = [_file(train)] if test is None else [_file(train), _file(test)]
    parts = [_read(file, text, label) for file in files]
    if name is None:
        name = _unpacked(files[0]).stem
    if names is None:
        names = found_classes(parts[0].labels)
    if test is not None:
        return corpus_of(name, names, *parts)
    whole, repeated = once(parts[0])
    return corpus_of(name, names, *_split(whole, test_share, random), repeated)


def _class_names(classes: Sequence[str] | None, label: str | None) -> tuple[str, ...] | None:
    """As given; None where they are still to be found."""
    if label is None:
        if classes is not None:
            raise InputError("texts without labels have no classes; leave classes out, or name the label")
        return ()
    if classes is None:
        return None
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise InputError(f"classes must be at least two different strings, not {classes!r}")
    return names


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file, {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    suffix = _suffix(path)
    if suffix not in SUFFIXES or (suffix == ".parquet" and _is_compressed(path)):
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or in .gz after one of these but "
            ".parquet"
        )
    return path


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if _is_compressed(path) else path


def _suffix(path: Path) -> str:
    return _unpacked(path).suffix.lower()


def _read(path: Path, text: str, label: str | None) -> Part:
    columns = [text] if label is None else [text, label]
    suffix = _suffix(path)
    if suffix == ".parquet":
        unit, (numbers, *values) = "row", _parquet(path, columns)
    elif suffix in JSON_LINES:
        unit, (numbers, *values) = "line", _json_lines(path, columns)
    else:
        unit, (numbers, *values) = "line", _table(path, columns, DELIMITERS[suffix])
    part = Part(str(path), unit, numbers, values[0], None if label is None else values[1])
    check_texts(part)
    return replace(part, labels=labels_by_name(part))


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if _is_compressed(path):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is damaged: not readable as gzip ({error})") from error
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0  # which Excel writes
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        unpacked = " uncompressed" if _is_compressed(path) else ""
        raise InputError(
            f"{path} is not UTF-8: byte {offset}{unpacked} (line {line}) "
            f"is 0x{data[offset]:02x}; write it anew as UTF-8, in Python: open(new, 'w', encoding='utf-8')"
            ".write(open(old, encoding='cp1252').read()), or whatever its encoding is"
        ) from error


def _json_lines(path: Path, columns: list[str]) -> list[list]:
    """The numbers of the lines, and the values of each column; None where a line lacks it."""
    numbers, values, found = [], [[] for _ in columns], {}
    for number, line in enumerate(_decoded(path).split("\n"), 1):  # splitlines would cut at U+2028 as well
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            in_line = isinstance(error, json.JSONDecodeError)
            where = f"{error.msg} at character {error.colno}" if in_line else error
            raise InputError(
                f"{path}, line {number}, is no JSON: {where}; expected one object on every line, "
                'such as {"text": "...", "label": "..."}'
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object on every line, such as "
                f'{{"text": "...", "label": "..."}}, not {short(line.strip())}'
            )
        found.update(dict.fromkeys(record))
        numbers.append(number)
        for column, of_column in zip(columns, values, strict=True):
            of_column.append(record.get(column))
    require(str(path), columns, found, len(numbers))
    return [numbers, *values]


def _table(path: Path, columns: list[str], delimiter: str) -> list[list]:
    """The numbers of the lines on which rows begin, and the values of each column."""
    content = _decoded(path)
    numbers, rows, before = [], [], 0
    # pandas would leave out what is beyond the last column, and take quotes within a text out of it
    limit = csv.field_size_limit(min(max(len(content), csv.field_size_limit()), 2**31 - 1))
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                numbers.append(before + 1)
                rows.append(row)
            before = reader.line_num
    except csv.Error as error:
        raise InputError(
            f"{path}: the row that begins on line {before + 1} is damaged ({error}); a text with quotation "
            "marks, delimiters or line breaks must be in quotation marks, and those within it doubled"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = rows[0] if rows else []
    require(str(path), columns, header, max(len(rows) - 1, 0))
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {number}, has {len(row)} cells, but the first line names {len(header)} "
                f"columns; a text with {'commas' if delimiter == ',' else 'tabs'} must be in quotation marks"
            )
    places = [header.index(column) for column in columns]
    return [numbers[1:], *([row[place] for row in rows[1:]] for place in places)]


def _parquet(path: Path, columns: list[str]) -> list[Sequence]:
    """The numbers of the rows, and the values of each column; None where there is none."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"reading {path} needs the pyarrow package: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:  # read_table would take columns from the names of folders
            require(str(path), columns, file.schema_arrow.names, file.metadata.num_rows)
            table = file.read(columns=columns)
        table.validate(full=True)  # of the strings' encoding, too
    except pa.ArrowException as error:
        raise InputError(f"{path} is damaged: not readable as Parquet ({error})") from error
    return [range(1, table.num_rows + 1), *(table.column(column).to_pylist() for column in columns)]


def _split(part: Part, share: float, random: np.random.Generator) -> tuple[Part, Part]:
    """For training and for testing, every class by itself."""
    labels = part.labels or [""] * len(part.texts)
    for_test: set[int] = set()
    for label in dict.fromkeys(labels):
        rows = [row for row, of_row in enumerate(labels) if of_row == label]
        if len(rows) < 2:
            what = f"class {short(label)!r} has" if part.labels else "there is"
            raise InputError(
                f"{part.source}: {what} 1 text, {part.at(rows)}; splitting takes at least 2, so add texts, "
                f"{'leave it out, ' if part.labels else ''}or give a test file"
            )
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        for_test.update(rows[i] for i in random.permutation(len(rows))[:count].tolist())
    everything = range(len(part.texts))
    return (
        part.take([row for row in everything if row not in for_test]),
        part.take([row for row in everything if row in for_test]),
    )
