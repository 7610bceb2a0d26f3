"""Texts with classes from people's own files, and from data sets of the Hugging Face hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_lens.corpus import Corpus, Texts, same_text
from lora_lens.layers import listed

if TYPE_CHECKING:
    from datasets import Dataset

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json")
SUFFIXES = (*JSON_LINES, *DELIMITERS, ".parquet")
WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[+-]?[0-9]*\.?[0-9]+")
LISTED = 5  # names in an error
SHOWN = 60  # characters of a text in an error


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
        raise ValueError(f"test_share must be between 0 and 1, not {test_share}")
    random = _random(seed)
    names = _class_names(classes, label)
    files = [_file(train)] if test is None else [_file(train), _file(test)]
    parts = [_read(file, text, label) for file in files]
    if name is None:
        name = Path(files[0].stem).stem if _is_compressed(files[0]) else files[0].stem
    if names is None:
        names = _found_classes(parts[0])
    if test is not None:
        return _corpus(name, names, *parts)
    whole, repeated = _once(parts[0])
    return _corpus(name, names, *_split(whole, test_share, random), repeated)


def hub_corpus(
    dataset: str | Path,
    config: str | None = None,
    *,
    train: str = "train",
    test: str = "test",
    text: str = "text",
    label: str | None = "label",
    revision: str | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Texts from a data set of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` reads::

        imdb = hub_corpus("stanfordnlp/imdb", most=2000)
        sst2 = hub_corpus("nyu-mll/glue", "sst2", text="sentence", test="validation")

    Nothing in a data set is executed: those that are Python scripts are refused. To leave out
    texts first, or to mend labels, load the data set yourself and pass its parts to :func:`dataset_corpus`.

    Args:
        dataset: its name, or a folder.
        config: which of its configurations, where there are several.
        train, test: the names of its splits.
        text: the column of the texts.
        label: that of the labels; None for plain text.
        revision: a commit or tag, for the same texts next year.
        most, seed: as in :func:`dataset_corpus`.

    Raises:
        ImportError: datasets 4 or newer is not installed.
        ValueError: no such split, or as :func:`dataset_corpus`.
        TypeError: as :func:`dataset_corpus`.
        datasets.exceptions.DatasetNotFoundError: there is no such data set.
        RuntimeError: it is a Python script.
    """
    random = _random(seed)
    _check_most(most)
    try:
        import datasets
    except ImportError as error:
        raise ImportError('reading a data set of the hub needs: pip install "datasets>=4"') from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(
            f"datasets {datasets.__version__} may execute code that comes with a data set; "
            'pip install -U "datasets>=4"'
        )
    loaded = datasets.load_dataset(str(dataset), config, revision=revision)
    if missing := [split for split in (train, test) if split not in loaded]:
        raise ValueError(
            f"{dataset} has no split {_quoted(missing)}; it has {_quoted(loaded)}, so pass train= and test="
        )
    name = re.split(r"[/\\]", str(dataset).rstrip("/\\"))[-1] + (f" {config}" if config else "")
    parts = [
        _drawn(loaded[split], f"{name} (split {split!r})", text, label, most, random)
        for split in (train, test)
    ]
    return _corpus(name, parts[0][0], parts[0][1], parts[1][1])


def dataset_corpus(
    train: Dataset,
    test: Dataset,
    name: str,
    *,
    text: str = "text",
    label: str | None = "label",
    most: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Texts from two loaded data sets of the ``datasets`` package, such as filtered ones::

        parts = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        parts = parts.filter(lambda row: row["text"].strip())
        corpus = dataset_corpus(parts["train"], parts["test"], "WikiText-2", label=None)

    The same texts are kept once, as by :func:`text_corpus`.

    Args:
        train, test: the texts to train and to test on.
        name: of the corpus.
        text: the column of the texts.
        label: that of the labels, with names (ClassLabel) as they are, where -1 means missing; or strings or
            whole numbers, whose classes are what the training part holds, sorted. None for plain text.
        most: texts of each part, at most. They are drawn at random; the fewer are among the more. Repeated
            ones are left out after that.
        seed: of that draw.

    Raises:
        ValueError: no such column, no rows; texts, labels and classes as in :func:`text_corpus`; an argument
            out of range.
        TypeError: a part is no ``datasets.Dataset``, a text no string, or a label neither a string nor a
            number.
    """
    random = _random(seed)
    _check_most(most)
    parts = [
        _drawn(part, f"{name} ({which})", text, label, most, random)
        for part, which in ((train, "train"), (test, "test"))
    ]
    return _corpus(name, parts[0][0], parts[0][1], parts[1][1])


@dataclass(frozen=True)
class _Part:
    """Texts, their labels by name (None for plain text), and where each was found; as found until checked."""

    source: str
    unit: str  # what its numbers count, from 1: lines or rows
    numbers: Sequence[int]
    texts: list[str]
    labels: list[str] | None
    remedy: str = "leave them out"

    def at(self, rows: Sequence[int]) -> str:
        plural = "s" if len(rows) > 1 else ""
        return f"{self.unit}{plural} {listed([str(self.numbers[row]) for row in rows], most=LISTED)}"

    def take(self, rows: Sequence[int]) -> _Part:
        return replace(
            self,
            numbers=[self.numbers[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
        )


# Reading files


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file, {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if _suffix(path) not in SUFFIXES or (_suffix(path) == ".parquet" and _is_compressed(path)):
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or in .gz after one of these but "
            ".parquet"
        )
    return path


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _read(path: Path, text: str, label: str | None) -> _Part:
    columns = [text] if label is None else [text, label]
    suffix = _suffix(path)
    if suffix == ".parquet":
        unit, (numbers, *values) = "row", _parquet(path, columns)
    elif suffix in JSON_LINES:
        unit, (numbers, *values) = "line", _json_lines(path, columns)
    else:
        unit, (numbers, *values) = "line", _table(path, columns, DELIMITERS[suffix])
    part = _Part(str(path), unit, numbers, values[0], None if label is None else values[1])
    return replace(part, texts=_checked_texts(part), labels=_checked_labels(part))


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if _is_compressed(path):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: not readable as gzip ({error})") from error
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0  # which Excel writes
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        unpacked = " uncompressed" if _is_compressed(path) else ""
        raise ValueError(
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
            raise ValueError(
                f"{path}, line {number}, is no JSON: {where}; expected one object on every line, "
                'such as {"text": "...", "label": "..."}'
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object on every line, such as "
                f'{{"text": "...", "label": "..."}}, not {_short(line.strip())}'
            )
        found.update(dict.fromkeys(record))
        numbers.append(number)
        for column, of_column in zip(columns, values, strict=True):
            of_column.append(record.get(column))
    _require(str(path), columns, found, len(numbers))
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
        raise ValueError(
            f"{path}: the row that begins on line {before + 1} is damaged ({error}); a text with quotation "
            "marks, delimiters or line breaks must be in quotation marks, and those within it doubled"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = rows[0] if rows else []
    _require(str(path), columns, header, max(len(rows) - 1, 0))
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != len(header):
            raise ValueError(
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
        raise ImportError(f"reading {path} needs the pyarrow package: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:  # read_table would take columns from the names of folders
            _require(str(path), columns, file.schema_arrow.names, file.metadata.num_rows)
            table = file.read(columns=columns)
        table.validate(full=True)  # of the strings' encoding, too
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged: not readable as Parquet ({error})") from error
    return [range(1, table.num_rows + 1), *(table.column(column).to_pylist() for column in columns)]


def _require(source: str, columns: list[str], found: Iterable[str], rows: int) -> None:
    found = list(found)
    if not found or rows == 0:
        raise ValueError(f"{source} is empty: it has no rows{' under its header' if found else ''}")
    for column in columns:
        if found.count(column) != 1:
            how = "no column" if column not in found else f"{found.count(column)} columns"
            raise ValueError(
                f"{source} has {how} {column!r}; its columns are {_quoted(found)}, so pass text= and label= "
                "(label=None for texts without classes)"
            )


# Reading data sets


def _drawn(
    data: Dataset, source: str, text: str, label: str | None, most: int | None, random: np.random.Generator
) -> tuple[tuple[str, ...], _Part]:
    """The classes of all of a data set, and at most so many of its texts."""
    from datasets import ClassLabel, Dataset

    if not isinstance(data, Dataset):
        raise TypeError(f"{source} must be one datasets.Dataset, such as a split, not {type(data).__name__}")
    _require(source, [text] if label is None else [text, label], data.column_names, len(data))
    remedy = "leave them out, with Dataset.filter and dataset_corpus"
    numbers = range(1, len(data) + 1)
    whole = _Part(source, "row", numbers, [], None if label is None else _column(data, label), remedy)
    if label is None:
        classes = ()
    elif isinstance(kind := data.features[label], ClassLabel):
        classes = tuple(kind.names)
        whole = replace(whole, labels=[None if number == -1 else number for number in whole.labels])
        whole = replace(whole, labels=[classes[int(number)] for number in _checked_labels(whole)])
    else:
        whole = replace(whole, labels=_checked_labels(whole))
        classes = _found_classes(whole)
    rows = sorted(random.permutation(len(data))[:most].tolist())
    part = replace(
        whole,
        numbers=[numbers[row] for row in rows],
        texts=_column(data if most is None else data.select(rows), text),
        labels=None if label is None else [whole.labels[row] for row in rows],
    )
    return classes, replace(part, texts=_checked_texts(part))


def _column(data: Dataset, name: str) -> list:
    """A column as it is stored, whatever format the data set was given."""
    return data.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()


# Checking


def _checked_texts(part: _Part) -> list[str]:
    for row, text in enumerate(part.texts):
        if not isinstance(text, str) and not _is_missing(text):
            raise TypeError(
                f"{part.source}, {part.at([row])}: a text must be a string, not {type(text).__name__} "
                f"{_short(repr(text))}"
            )
    empty = [row for row, text in enumerate(part.texts) if _is_missing(text)]
    if empty:
        raise ValueError(
            f"{part.source}: {len(empty)} of {len(part.texts)} texts are empty ({part.at(empty)}); "
            f"{part.remedy}"
        )
    for row, text in enumerate(part.texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{part.source}, {part.at([row])}: character {error.start} of the text is half of a pair "
                f"({text[error.start]!a}), which no tokenizer takes; remove it"
            ) from error
    return part.texts


def _checked_labels(part: _Part) -> list[str] | None:
    """The labels by name."""
    if part.labels is None:
        return None
    missing = [row for row, label in enumerate(part.labels) if _is_missing(label)]
    if missing:
        raise ValueError(
            f"{part.source}: {len(missing)} of {len(part.labels)} labels are missing ({part.at(missing)}); "
            f"{part.remedy}, take a part that has them, or pass label=None for plain text"
        )
    for row, label in enumerate(part.labels):
        if isinstance(label, bool) or not isinstance(label, (str, int, float)):
            raise TypeError(
                f"{part.source}, {part.at([row])}: a label must be a string or a whole number, not "
                f"{type(label).__name__} {_short(repr(label))}"
            )
    named = [row for row, label in enumerate(part.labels) if isinstance(label, str)]
    if named and len(named) < len(part.labels):
        number = next(row for row, label in enumerate(part.labels) if not isinstance(label, str))
        raise ValueError(
            f"{part.source}: some labels are strings ({part.labels[named[0]]!r}, {part.at(named[:1])}) and "
            f"some are numbers ({part.labels[number]!r}, {part.at([number])}); write all of them as strings"
        )
    numbers = not named or all(DECIMAL.fullmatch(label) for label in part.labels)
    broken = [row for row, label in enumerate(part.labels) if numbers and not float(label).is_integer()]
    if broken:
        raise ValueError(
            f"{part.source}: {len(broken)} labels are not whole, such as {part.labels[broken[0]]} "
            f"({part.at(broken)}); classes are strings or whole numbers"
        )
    return list(part.labels) if named else [str(int(label)) for label in part.labels]


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN


def _random(seed: int) -> np.random.Generator:
    if index(seed) < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")
    return np.random.default_rng(index(seed))


def _check_most(most: int | None) -> None:
    if most is not None and index(most) < 1:
        raise ValueError(f"most must be at least 1 text per part, not {most}")


def _class_names(classes: Sequence[str] | None, label: str | None) -> tuple[str, ...] | None:
    """As given; None where they are still to be found."""
    if label is None:
        if classes is not None:
            raise ValueError("texts without labels have no classes; leave classes out, or name the label")
        return ()
    if classes is None:
        return None
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes must be at least two different strings, not {classes!r}")
    return names


def _found_classes(part: _Part) -> tuple[str, ...]:
    if part.labels is None:
        return ()
    names = set(part.labels)
    return tuple(sorted(names, key=int if all(map(WHOLE.fullmatch, names)) else None))


# From texts to a corpus


def _once(part: _Part) -> tuple[_Part, int]:
    """The texts without repeated ones, and how many these were."""
    first: dict[str, int] = {}
    for row, text in enumerate(part.texts):
        known = first.setdefault(same_text(text), row)
        if part.labels is not None and part.labels[row] != part.labels[known]:
            raise ValueError(
                f"{part.source}: the same text has two labels, {_short(part.labels[known])!r} "
                f"({part.at([known])}) and {_short(part.labels[row])!r} ({part.at([row])}): "
                f"{_short(text)!r}; keep the right one"
            )
    return part.take(list(first.values())), len(part.texts) - len(first)


def _split(part: _Part, share: float, random: np.random.Generator) -> tuple[_Part, _Part]:
    """For training and for testing, every class by itself."""
    labels = part.labels or [""] * len(part.texts)
    for_test: set[int] = set()
    for label in dict.fromkeys(labels):
        rows = [row for row, of_row in enumerate(labels) if of_row == label]
        if len(rows) < 2:
            what = f"class {_short(label)!r} has" if part.labels else "there is"
            raise ValueError(
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


def _corpus(name: str, classes: tuple[str, ...], train: _Part, test: _Part, repeated: int = 0) -> Corpus:
    """Without repeated texts, of which ``repeated`` are gone already."""
    test, in_test = _once(test)
    tested = {same_text(text) for text in test.texts}
    kept = [row for row, text in enumerate(train.texts) if same_text(text) not in tested]
    shared = len(train.texts) - len(kept)
    if not kept:
        raise ValueError(f"every text of {train.source} is a text of {test.source} as well; give two parts")
    train, in_train = _once(train.take(kept))
    repeated += in_test + in_train
    if shared or repeated:
        left = [f"{shared} training texts that are test texts as well"] * (shared > 0)
        left += [f"{repeated} repeated texts"] * (repeated > 0)
        warnings.warn(f"{name}: left out {' and '.join(left)}", stacklevel=3)
    if train.labels is None:
        of_train, of_test = [0] * len(train.texts), [0] * len(test.texts)
    else:
        of_train, of_test = _indices(classes, train, test)
    return Corpus(name, classes, Texts(train.texts, of_train), Texts(test.texts, of_test))


def _indices(classes: tuple[str, ...], train: _Part, test: _Part) -> tuple[list[int], list[int]]:
    """The labels of both parts as places in ``classes``."""
    found = dict.fromkeys(train.labels)
    if lost := dict.fromkeys(label for label in test.labels if label not in found):
        rows = [row for row, label in enumerate(test.labels) if label in lost]
        raise ValueError(
            f"the test part has classes of which the training part has no text: {_quoted(lost)} "
            f"({test.source}, {test.at(rows)}); add training texts, draw more of them, or leave the class out"
        )
    if len(found) < 2:
        raise ValueError(
            f"all training texts of {train.source} have the label {train.labels[0]!r}; expected at least two "
            "classes, or label=None for plain text"
        )
    places = {label: place for place, label in enumerate(classes)}
    by_place = all(map(WHOLE.fullmatch, found)) and not all(map(WHOLE.fullmatch, classes))
    if by_place and not places.keys() >= found.keys():
        places = {str(place): place for place in range(len(classes))}
    if strange := [label for label in found if label not in places]:
        row = train.labels.index(strange[0])
        raise ValueError(
            f"{train.source}: labels that are not among the classes {_quoted(classes)}: {_quoted(strange)} "
            f"({train.at([row])})"
        )
    return [places[label] for label in train.labels], [places[label] for label in test.labels]


def _quoted(names: Iterable[str]) -> str:
    return listed([repr(_short(name)) for name in names])


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
