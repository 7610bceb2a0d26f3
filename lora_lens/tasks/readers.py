"""Texts with classes from people's own files: JSON lines, CSV, TSV and Parquet."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_lens._base.errors import InputError, LoraLensError, MissingFileError, MissingPackageError
from lora_lens._base.validate import flag, instance, number, seed_number, sequence
from lora_lens.tasks.corpus import Corpus
from lora_lens.tasks.corpus_checks import (
    Part,
    check_columns,
    check_texts,
    corpus_of,
    labels_by_name,
    once,
    require,
    short,
)
from lora_lens.tasks.delimited import DELIMITERS, read_table
from lora_lens.tasks.sampling import held_out

UNPACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
EXAMPLE = '{"text": "...", "label": "..."}'
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
    quoting: bool | None = None,
    conflicts: str = "refuse",
) -> Corpus:
    """Texts from a file: JSON lines or an array of objects (.jsonl, .json), .csv, .tsv or .parquet.

    All but Parquet may be compressed (.gz, .bz2, .xz). Files are UTF-8; tables begin with the names of their
    columns, and are delimited by commas or tabs, or by whatever else gives the columns asked for. Texts are
    taken as they stand: "NA", "null" and "001" are texts. Nothing in a file is executed::

        reviews = text_corpus("reviews.csv", text="review", label="stars")
        plain = text_corpus("chapters.jsonl", label=None)

    Texts are the same if their words are, whatever the case and the white space. Of the same texts with the
    same label one is kept, and no test text stays in the training part; one warning says how many went.

    Args:
        train: the file to train on; without ``test`` also to test on.
        test: the file to test on.
        text: the column, or JSON key, of the texts.
        label: that of the labels, which are strings, whole numbers or true and false; None for plain text.
            White space around them does not count, and 1.0 is 1.
        name: of the corpus; by default the training file's, without its suffix.
        classes: their names, in the order of the labels. Names that are no numbers may also stand for
            the labels 0, 1, 2 and so on. By default what the training file holds, sorted; numbers by size.
        test_share: without ``test``, the share of every class to test on, in (0, 1), drawn at random. It is
            rounded to whole texts, and every class keeps at least one on either side.
        seed: of that draw.
        quoting: of .csv and .tsv, whether quotation marks around a cell enclose it (True) or belong to its
            text (False). By default found out: a file that would be another table under the other reading
            is refused if nothing tells which is meant.
        conflicts: what is done with texts that have several labels in one part: "refuse" raises, "drop"
            leaves all their copies out, "majority" keeps the label that most copies have, and drops ties.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file, or a folder.
        ValueError: another suffix, a file that is empty, damaged or not UTF-8, no such column; empty texts,
            missing labels, labels of several kinds or not whole; one text with two labels in one part; fewer
            than two classes, one that is not among ``classes`` or in the test part only; an argument out of
            range.
        TypeError: a text that is no string, or a label that is neither a string nor a number.
        ImportError: reading Parquet needs pyarrow.

    Example:
        >>> import os, tempfile
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> films = {"text": ["a fine film", "well played", "a waste", "so slow"], "label": [1, 1, 0, 0]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pd.DataFrame(films).to_csv(path := os.path.join(folder, "films.csv"), index=False)
        ...     ll.tasks.text_corpus(path)
        <Corpus films: classes 0, 1; 2 training, 2 test texts>
    """
    test_share = number(test_share, "test_share", above=0, below=1)
    random = np.random.default_rng(seed_number(seed))
    check_columns(text, label, conflicts)
    if quoting is not None:
        quoting = flag(quoting, "quoting")
    names = _class_names(classes, label)
    files = [_file(train)] if test is None else [_file(train), _file(test)]
    if quoting is not None and not any(_suffix(file) in DELIMITERS for file in files):
        raise InputError(
            f"quoting is of {' and '.join(DELIMITERS)} files, and {files[0]} has none; leave it out"
        )
    parts = [_read(file, text, label, quoting) for file in files]
    if name is None:
        name = _unpacked(files[0]).stem
    if test is not None:
        return corpus_of(name, names, *parts, conflicts)
    whole = once(parts[0], conflicts, left := Counter())
    return corpus_of(name, names, *_split(whole, test_share, random), conflicts, left)


def _class_names(classes: Sequence[str] | None, label: str | None) -> tuple[str, ...] | None:
    """As given; None where they are still to be found."""
    if label is None:
        if classes is not None:
            raise InputError("texts without labels have no classes; leave classes out, or name the label")
        return ()
    if classes is None:
        return None
    names = sequence(classes, "classes", "at least two different strings")
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise InputError(f"classes must be at least two different strings, not {classes!r}")
    return names


def _file(path: str | Path) -> Path:
    instance(path, (str, Path), "a file", "a path")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file, {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    suffix = _suffix(path)
    if suffix not in SUFFIXES or (suffix == ".parquet" and _is_compressed(path)):
        raise InputError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or in {', '.join(UNPACKED)} after "
            "one of these but .parquet"
        )
    return path


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in UNPACKED


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if _is_compressed(path) else path


def _suffix(path: Path) -> str:
    return _unpacked(path).suffix.lower()


def _read(path: Path, text: str, label: str | None, quoting: bool | None) -> Part:
    columns = [text] if label is None else [text, label]
    suffix = _suffix(path)
    if suffix == ".parquet":
        unit, (numbers, *values) = "row", _parquet(path, columns)
    elif suffix in JSON_LINES:
        unit, numbers, values = _json(path, columns)
    else:
        table = read_table(str(path), _decoded(path), DELIMITERS[suffix], columns, quoting)
        header, *rows = table.rows or [[]]
        require(str(path), columns, header, len(rows))
        places = [header.index(column) for column in columns]
        unit, numbers = "line", table.lines[1:]
        values = [[row[place] for row in rows] for place in places]
    part = Part(str(path), unit, numbers, values[0], None if label is None else values[1])
    check_texts(part)
    return replace(part, labels=labels_by_name(part))


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if _is_compressed(path):
        suffix = path.suffix.lower()
        try:
            data = UNPACKED[suffix](data)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"{path} is damaged: not readable as {suffix[1:]} ({error})") from error
    utf16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if data.startswith(utf16) and not data.startswith(codecs.BOM_UTF32_LE):  # Excel's "Unicode text"
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is damaged: not readable as UTF-16 ({error})") from error
    if b"\0" in data.partition(b"\n")[0]:
        raise InputError(
            f"{path} is not UTF-8: its first line holds zero bytes, as UTF-16 and UTF-32 do; write it anew "
            "as UTF-8"
        )
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


def _json(path: Path, columns: list[str]) -> tuple[str, list[int], list[list]]:
    """What the records' numbers count, these, and the values of each column; None where a record lacks it."""
    unit, numbers, values, found = "line", [], [[] for _ in columns], {}
    records = _json_array(path, content := _decoded(path))
    if records is None:
        records = _json_lines(path, content)
    else:
        unit, records = "row", enumerate(records, 1)
    for place, record in records:
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, {unit} {place}: expected a JSON object{' on every line' * (unit == 'line')}, such "
                f"as {EXAMPLE}, not {short(json.dumps(record))}"
            )
        found.update(dict.fromkeys(record))
        numbers.append(place)
        for column, of_column in zip(columns, values, strict=True):
            of_column.append(record.get(column))
    require(str(path), columns, found, len(numbers))
    return unit, numbers, values


def _json_array(path: Path, content: str) -> list | None:
    """The items of a file that is one JSON array; None for any other, such as lines of JSON."""
    if not content.lstrip().startswith("["):
        return None
    try:
        return json.loads(content, object_pairs_hook=partial(_object, str(path)))
    except LoraLensError:
        raise
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # after the end of a first line's array
            return None
        where = f"{error.msg} on line {error.lineno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{path} begins as a JSON array, but is none: {where}") from error


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, object]]:
    for place, line in enumerate(content.split("\n"), 1):  # splitlines would cut at U+2028 as well
        if not line.strip():
            continue
        where = f"{path}, line {place}"
        try:
            record = json.loads(line, object_pairs_hook=partial(_object, where))
        except LoraLensError:
            raise
        except (ValueError, RecursionError) as error:
            in_line = isinstance(error, json.JSONDecodeError)
            what = f"{error.msg} at character {error.colno}" if in_line else error
            raise InputError(
                f"{where}, is no JSON: {what}; expected one object on every line, such as {EXAMPLE}, or one "
                "array of such objects"
            ) from error
        yield place, record


def _object(source: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, whose keys must differ: json would keep the last of the same."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{source}: an object has the key {twice!r} twice; which of the values is meant?")
    return found


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
        for_test.update(rows[i] for i in held_out(len(rows), share, random))
    everything = range(len(part.texts))
    return (
        part.take([row for row in everything if row not in for_test]),
        part.take([row for row in everything if row in for_test]),
    )
