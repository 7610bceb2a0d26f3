"""From rows of texts, as they were found, to a checked corpus without repeated texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import listed
from lora_lens._base.validate import choice, instance
from lora_lens._base.warning import warn
from lora_lens.tasks.corpus import Corpus, Texts, same_text

WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
WITH_ZEROS = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
KINDS = {"booleans": bool, "strings": str, "numbers": (int, float)}  # a bool is an int as well
SHOWN = 60  # characters of a text in an error
CONFLICTS = ("refuse", "drop", "majority")  # what becomes of texts with several labels


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


def check_columns(text: str, label: str | None, conflicts: str) -> None:
    """The arguments that files and data sets share."""
    instance(text, str, "text", "the name of a column")
    if label is not None:
        instance(label, str, "label", "the name of a column, or None for plain text")
    choice(conflicts, "conflicts", CONFLICTS)


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
    """As strings without white space around them: whole numbers without a decimal point, True and False."""
    if part.labels is None:
        return None
    missing = [row for row, label in enumerate(part.labels) if _is_missing(label)]
    if missing:
        raise InputError(
            f"{part.source}: {len(missing)} of {len(part.labels)} labels are missing ({part.at(missing)}); "
            f"{part.remedy}, take a part that has them, or pass label=None for plain text"
        )
    kinds: dict[str, int] = {}  # and the first row of each
    for row, label in enumerate(part.labels):
        kind = next((kind for kind, types in KINDS.items() if isinstance(label, types)), None)
        if kind is None:
            raise InputTypeError(
                f"{part.source}, {part.at([row])}: a label must be a string, a whole number, true or "
                f"false, not {type(label).__name__} {short(repr(label))}"
            )
        kinds.setdefault(kind, row)
    if len(kinds) > 1:
        of_kinds = [f"{kind} ({part.labels[row]!r}, {part.at([row])})" for kind, row in kinds.items()]
        raise InputError(
            f"{part.source}: some labels are {' and some are '.join(of_kinds)}; write all of them as strings"
        )
    if "booleans" in kinds:
        return [str(label) for label in part.labels]
    named = [label.strip() for label in part.labels] if "strings" in kinds else None
    if named and all(label.lower() in ("true", "false") for label in named):
        return [label.capitalize() for label in named]  # as the booleans of other files
    numbers = named is None or all(map(DECIMAL.fullmatch, named))
    broken = [row for row, label in enumerate(part.labels) if numbers and not float(label).is_integer()]
    if broken:
        raise InputError(
            f"{part.source}: {len(broken)} labels are not whole, such as {part.labels[broken[0]]} "
            f"({part.at(broken)}); classes are strings or whole numbers"
        )
    if named is None:
        return [str(int(label)) for label in part.labels]
    return _numbers_alike(part, named) if numbers else named


def _numbers_alike(part: Part, labels: list[str]) -> list[str]:
    """1.0 as 1; codes such as 007 as they are, unless another spelling of the same number occurs."""
    alike = [found[1] if (found := WITH_ZEROS.fullmatch(label)) else label for label in labels]
    first: dict[float, int] = {}
    for row, label in enumerate(alike):
        known = first.setdefault(float(label), row)
        if label != alike[known]:
            raise InputError(
                f"{part.source}: the labels {alike[known]!r} ({part.at([known])}) and {label!r} "
                f"({part.at([row])}) are the same number; write them alike, or as words"
            )
    return alike


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN


def found_classes(labels: list[str] | None) -> tuple[str, ...]:
    """The different labels, sorted; numbers by size."""
    names = set(labels or ())
    return tuple(sorted(names, key=int if all(map(WHOLE.fullmatch, names)) else None))


def once(part: Part, conflicts: str, left: Counter[str]) -> Part:
    """Every text once, with one label; ``left`` counts what is left out."""
    copies: dict[str, list[int]] = {}
    for row, text in enumerate(part.texts):
        copies.setdefault(same_text(text), []).append(row)
    labels = part.labels or [""] * len(part.texts)
    torn = [rows for rows in copies.values() if len({labels[row] for row in rows}) > 1]
    if torn and conflicts == "refuse":
        shown = [
            f"{short(part.texts[rows[0]])!r} ({part.at(rows)}: {quoted([labels[row] for row in rows])})"
            for rows in torn
        ]
        many = f"{len(torn)} texts have" if len(torn) > 1 else "one text has"
        raise InputError(
            f"{part.source}: {many} several labels: {listed(shown, most=3)}; keep the right ones, or pass "
            'conflicts="drop" or conflicts="majority"'
        )
    lost = set()
    for rows in torn:
        (label, most), (_, next_most) = Counter(labels[row] for row in rows).most_common(2)
        kept = label if conflicts == "majority" and most > next_most else None
        lost.update(row for row in rows if labels[row] != kept)
    if len(lost) == len(part.texts):
        raise InputError(f"{part.source}: every text has several labels, so none is left")
    kept = [next((row for row in rows if row not in lost), None) for rows in copies.values()]
    kept = [row for row in kept if row is not None]
    left["rows whose texts have several labels"] += len(lost)
    left["repeated texts"] += len(part.texts) - len(lost) - len(kept)
    return part.take(kept)


def corpus_of(
    name: str,
    classes: tuple[str, ...] | None,
    train: Part,
    test: Part,
    conflicts: str,
    left: Counter[str] | None = None,
) -> Corpus:
    """Every text once, with one of ``classes``; None for those that the training part has.

    Args:
        conflicts: one of ``CONFLICTS``.
        left: counts of what is left out already.
    """
    left = Counter() if left is None else left
    test = once(test, conflicts, left)
    tested = {same_text(text) for text in test.texts}
    kept = [row for row, text in enumerate(train.texts) if same_text(text) not in tested]
    left["training texts that are test texts as well"] += len(train.texts) - len(kept)
    if not kept:
        raise InputError(f"every text of {train.source} is a text of {test.source} as well; give two parts")
    train = once(train.take(kept), conflicts, left)
    if counted := [f"{count} {what}" for what, count in sorted(left.items(), reverse=True) if count]:
        warn(f"{name}: left out {' and '.join(counted)}")
    if classes is None:
        classes = found_classes(train.labels)
        spelt: dict[str, str] = {}
        if twins := [(a, c) for c in classes if (a := spelt.setdefault(c.casefold(), c)) != c]:
            warn(
                f"{name}: {listed([f'{a!r} and {b!r}' for a, b in twins], most=3)} differ in case only, and "
                "count as different classes; write them alike if they are one",
            )
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
