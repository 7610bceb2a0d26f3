"""From rows of texts, as they were found, to a checked corpus without repeated texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index

import numpy as np

from lora_lens.corpus import Corpus, Texts, same_text
from lora_lens.errors import InputError, InputTypeError
from lora_lens.layers import listed

WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[+-]?[0-9]*\.?[0-9]+")
SHOWN = 60  # characters of a text in an error


@dataclass(frozen=True)
class Part:
    """Texts, their labels by name (None for plain text), and where each was found; as found until checked."""

    source: str
    unit: str  # what its numbers count, from 1: lines or rows
    numbers: Sequence[int]
    texts: list[str]
    labels: list[str] | None
    remedy: str = "leave them out"

    def at(self, rows: Sequence[int]) -> str:
        plural = "s" if len(rows) > 1 else ""
        return f"{self.unit}{plural} {listed([str(self.numbers[row]) for row in rows], most=5)}"

    def take(self, rows: Sequence[int]) -> Part:
        return replace(
            self,
            numbers=[self.numbers[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
        )


def generator(seed: int) -> np.random.Generator:
    if index(seed) < 0:
        raise InputError(f"seed must be at least 0, not {seed}")
    return np.random.default_rng(index(seed))


def require(source: str, columns: list[str], found: Iterable[str], rows: int) -> None:
    """Rows, and every one of these columns once."""
    found = list(found)
    if not found or rows == 0:
        raise InputError(f"{source} is empty: it has no rows{' under its header' if found else ''}")
    for column in columns:
        if found.count(column) != 1:
            how = "no column" if column not in found else f"{found.count(column)} columns"
            raise InputError(
                f"{source} has {how} {column!r}; its columns are {quoted(found)}, so pass text= and label= "
                "(label=None for texts without classes)"
            )


def check_texts(part: Part) -> None:
    for row, text in enumerate(part.texts):
        if not isinstance(text, str) and not _is_missing(text):
            raise InputTypeError(
                f"{part.source}, {part.at([row])}: a text must be a string, not {type(text).__name__} "
                f"{short(repr(text))}"
            )
    empty = [row for row, text in enumerate(part.texts) if _is_missing(text)]
    if empty:
        raise InputError(
            f"{part.source}: {len(empty)} of {len(part.texts)} texts are empty ({part.at(empty)}); "
            f"{part.remedy}"
        )
    for row, text in enumerate(part.texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{part.source}, {part.at([row])}: character {error.start} of the text is half of a pair "
                f"({text[error.start]!a}), which no tokenizer takes; remove it"
            ) from error


def labels_by_name(part: Part) -> list[str] | None:
    """As strings: whole numbers without a decimal point, strings as they are."""
    if part.labels is None:
        return None
    missing = [row for row, label in enumerate(part.labels) if _is_missing(label)]
    if missing:
        raise InputError(
            f"{part.source}: {len(missing)} of {len(part.labels)} labels are missing ({part.at(missing)}); "
            f"{part.remedy}, take a part that has them, or pass label=None for plain text"
        )
    for row, label in enumerate(part.labels):
        if isinstance(label, bool) or not isinstance(label, (str, int, float)):
            raise InputTypeError(
                f"{part.source}, {part.at([row])}: a label must be a string or a whole number, not "
                f"{type(label).__name__} {short(repr(label))}"
            )
    named = [row for row, label in enumerate(part.labels) if isinstance(label, str)]
    if named and len(named) < len(part.labels):
        number = next(row for row, label in enumerate(part.labels) if not isinstance(label, str))
        raise InputError(
            f"{part.source}: some labels are strings ({part.labels[named[0]]!r}, {part.at(named[:1])}) and "
            f"some are numbers ({part.labels[number]!r}, {part.at([number])}); write all of them as strings"
        )
    numbers = not named or all(DECIMAL.fullmatch(label) for label in part.labels)
    broken = [row for row, label in enumerate(part.labels) if numbers and not float(label).is_integer()]
    if broken:
        raise InputError(
            f"{part.source}: {len(broken)} labels are not whole, such as {part.labels[broken[0]]} "
            f"({part.at(broken)}); classes are strings or whole numbers"
        )
    return list(part.labels) if named else [str(int(label)) for label in part.labels]


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN


def found_classes(labels: list[str] | None) -> tuple[str, ...]:
    """The different labels, sorted; numbers by size."""
    names = set(labels or ())
    return tuple(sorted(names, key=int if all(map(WHOLE.fullmatch, names)) else None))


def once(part: Part) -> tuple[Part, int]:
    """The texts without repeated ones, and how many these were."""
    first: dict[str, int] = {}
    for row, text in enumerate(part.texts):
        known = first.setdefault(same_text(text), row)
        if part.labels is not None and part.labels[row] != part.labels[known]:
            raise InputError(
                f"{part.source}: the same text has two labels, {short(part.labels[known])!r} "
                f"({part.at([known])}) and {short(part.labels[row])!r} ({part.at([row])}): "
                f"{short(text)!r}; keep the right one"
            )
    return part.take(list(first.values())), len(part.texts) - len(first)


def corpus_of(name: str, classes: tuple[str, ...], train: Part, test: Part, repeated: int = 0) -> Corpus:
    """Without repeated texts, of which ``repeated`` are gone already."""
    test, in_test = once(test)
    tested = {same_text(text) for text in test.texts}
    kept = [row for row, text in enumerate(train.texts) if same_text(text) not in tested]
    shared = len(train.texts) - len(kept)
    if not kept:
        raise InputError(f"every text of {train.source} is a text of {test.source} as well; give two parts")
    train, in_train = once(train.take(kept))
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


def _indices(classes: tuple[str, ...], train: Part, test: Part) -> tuple[list[int], list[int]]:
    """The labels of both parts as places in ``classes``."""
    found = dict.fromkeys(train.labels)
    if lost := dict.fromkeys(label for label in test.labels if label not in found):
        rows = [row for row, label in enumerate(test.labels) if label in lost]
        raise InputError(
            f"the test part has classes of which the training part has no text: {quoted(lost)} "
            f"({test.source}, {test.at(rows)}); add training texts, draw more of them, or leave the class out"
        )
    if len(found) < 2:
        raise InputError(
            f"all training texts of {train.source} have the label {train.labels[0]!r}; expected at least two "
            "classes, or label=None for plain text"
        )
    places = {label: place for place, label in enumerate(classes)}
    by_place = all(map(WHOLE.fullmatch, found)) and not all(map(WHOLE.fullmatch, classes))
    if by_place and not places.keys() >= found.keys():
        places = {str(place): place for place in range(len(classes))}
    if strange := [label for label in found if label not in places]:
        row = train.labels.index(strange[0])
        raise InputError(
            f"{train.source}: labels that are not among the classes {quoted(classes)}: {quoted(strange)} "
            f"({train.at([row])})"
        )
    return [places[label] for label in train.labels], [places[label] for label in test.labels]


def quoted(names: Iterable[str]) -> str:
    return listed([repr(short(name)) for name in names])


def short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
