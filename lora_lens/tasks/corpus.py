"""Texts with classes, as people wrote them: what a text task is made of before a tokenizer has seen it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import listed
from lora_lens._base.validate import instance, sequence, whole_number


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts with one class each, by its index; all 0 where there are no classes.

    Raises:
        ValueError: no texts, different lengths, an empty text.
        TypeError: a text is no string, a label no whole number.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.Texts(["a fine film", "a waste of time"], [1, 0])
        <2 Texts, the first 'a fine film'>
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", sequence(self.texts, "texts", "strings"))
        object.__setattr__(self, "labels", sequence(self.labels, "labels", "whole numbers"))
        if not self.texts or len(self.texts) != len(self.labels):
            raise InputError(
                f"expected as many labels as texts, not {len(self.texts)} texts and {len(self.labels)} labels"
            )
        for row, (text, label) in enumerate(zip(self.texts, self.labels, strict=True)):
            if not isinstance(text, str):
                raise InputTypeError(f"text {row} must be a string, not {text!r}")
            whole_number(label, f"the label of text {row}")
        object.__setattr__(self, "texts", tuple(map(str, self.texts)))  # numpy's as Python's
        object.__setattr__(self, "labels", tuple(map(int, self.labels)))
        empty = [row for row, text in enumerate(self.texts) if not text.strip()]
        if empty:
            raise InputError(
                f"{len(empty)} of {len(self.texts)} texts are empty "
                f"(rows {listed(map(str, empty), most=5)}); leave them out, with their labels"
            )

    def __repr__(self) -> str:
        return f"<{len(self)} Texts, the first {shorten(self.texts[0], 60, placeholder=' ...')!r}>"

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and test texts; ``classes`` is empty for plain text.

    Raises:
        ValueError: a label outside ``classes``, two classes of one name, or a test text that is also a
            training text.
        TypeError: an attribute of another type.

    Example:
        >>> import lora_lens as ll
        >>> train = ll.tasks.Texts(["a fine film", "a waste of time"], [1, 0])
        >>> test = ll.tasks.Texts(["well played"], [1])
        >>> ll.tasks.Corpus("films", ("bad", "good"), train, test)
        <Corpus films: classes bad, good; 2 training, 1 test texts>
    """

    name: str
    classes: tuple[str, ...]
    train: Texts
    test: Texts

    def __repr__(self) -> str:
        classes = f"classes {listed(self.classes, most=4)}" if self.classes else "plain text"
        return f"<Corpus {self.name}: {classes}; {len(self.train)} training, {len(self.test)} test texts>"

    def __post_init__(self) -> None:
        instance(self.name, str, "name", "a string")
        object.__setattr__(self, "classes", class_names(self.name, self.classes))
        for part in ("train", "test"):
            instance(getattr(self, part), Texts, part, "Texts")
            labels = getattr(self, part).labels
            if min(labels) < 0 or max(labels) >= max(len(self.classes), 1):
                raise InputError(
                    f"{self.name}: {part} labels run from {min(labels)} to {max(labels)}, but there are "
                    f"{len(self.classes)} classes"
                )
        known = {same_text(text) for text in self.train.texts}
        shared = [text for text in self.test.texts if same_text(text) in known]
        if shared:
            raise InputError(
                f"{self.name}: {len(shared)} test texts are training texts as well, such as "
                f"{shared[0][:60]!r}; a test on them would tell what was memorized"
            )

    def fingerprint(self) -> str:
        """A hash of all that it holds."""
        parts = [(p.texts, p.labels) for p in (self.train, self.test)]
        return hashlib.sha256(repr((self.classes, parts)).encode()).hexdigest()[:16]


def class_names(what: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The names of ``what``'s classes, no two of them alike: no table or picture could tell those apart.

    Raises:
        TypeError: they are no strings.
        ValueError: there are two of one name.
    """
    names = sequence(classes, "classes", "names")
    for name in names:
        instance(name, str, "a class's name", "a string")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"{what} has several classes called {twice!r}, which could not be told apart; give each a name "
            f"of its own, such as {twice + ' 1'!r} and {twice + ' 2'!r}"
        )
    return names


def same_text(text: str) -> str:
    """What makes two texts the same: their words, whatever the case and the white space."""
    return " ".join(text.lower().split())
