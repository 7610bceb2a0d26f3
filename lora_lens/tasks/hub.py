"""Texts with classes from data sets of the Hugging Face hub, or of its ``datasets`` package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lens._base.errors import InputError, InputTypeError, MissingPackageError
from lora_lens._base.validate import instance, seed_number, whole_number
from lora_lens.tasks.corpus import Corpus
from lora_lens.tasks.corpus_checks import (
    Part,
    check_columns,
    check_texts,
    corpus_of,
    found_classes,
    labels_by_name,
    quoted,
    require,
)
from lora_lens.tasks.sampling import sampled_rows

if TYPE_CHECKING:
    from datasets import Dataset


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
    conflicts: str = "refuse",
) -> Corpus:
    """Texts from a data set of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` reads::

        imdb = hub_corpus("stanfordnlp/imdb", most=2000)
        sst2 = hub_corpus("nyu-mll/glue", "sst2", text="sentence", test="validation")

    Nothing in a data set is executed: those that are Python scripts are refused. To leave out texts first, or
    to correct labels, load the data set yourself and pass its parts to :func:`dataset_corpus`.

    Args:
        dataset: its name, or a folder.
        config: which of its configurations, where there are several.
        train, test: the names of its splits.
        text: the column of the texts.
        label: that of the labels; None for plain text.
        revision: a commit or tag, for the same texts next year.
        most, seed, conflicts: as in :func:`dataset_corpus`.

    Raises:
        ImportError: datasets 4 or newer is not installed.
        ValueError: no such split, or as :func:`dataset_corpus`.
        TypeError: as :func:`dataset_corpus`.
        datasets.exceptions.DatasetNotFoundError: there is no such data set.
        RuntimeError: it is a Python script.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.hub_corpus("stanfordnlp/imdb", most=2000)  # doctest: +SKIP
        <Corpus imdb: classes neg, pos; 2000 training, 2000 test texts>
    """
    most, seed = _checked(text, label, most, seed, conflicts)
    instance(
        dataset,
        (str, Path),
        "dataset",
        "the name of a data set, or a folder; dataset_corpus takes a loaded one",
    )
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError('reading a data set of the hub needs: pip install "datasets>=4"') from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise MissingPackageError(
            f"datasets {datasets.__version__} may execute code that comes with a data set; "
            'pip install -U "datasets>=4"'
        )
    loaded = datasets.load_dataset(str(dataset), config, revision=revision)
    if missing := [split for split in (train, test) if split not in loaded]:
        raise InputError(
            f"{dataset} has no split {quoted(missing)}; it has {quoted(loaded)}, so pass train= and test="
        )
    name = Path(dataset).absolute().name + (f" {config}" if config else "")
    sources = {f"{name} (split {split!r})": loaded[split] for split in (train, test)}
    return _corpus(name, sources, text, label, most, seed, conflicts)


def dataset_corpus(
    train: Dataset,
    test: Dataset,
    name: str,
    *,
    text: str = "text",
    label: str | None = "label",
    most: int | None = None,
    seed: int = 0,
    conflicts: str = "refuse",
) -> Corpus:
    """Texts from two loaded data sets of the ``datasets`` package, such as filtered ones::

        parts = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        parts = parts.filter(lambda row: row["text"].strip())
        corpus = dataset_corpus(parts["train"], parts["test"], "WikiText-2", label=None)

    The same texts are kept once, as by :func:`lora_lens.tasks.text_corpus`.

    Args:
        train, test: the texts to train and to test on.
        name: of the corpus.
        text: the column of the texts.
        label: that of the labels, with names (ClassLabel) as they are, where -1 means missing; or strings or
            whole numbers, whose classes are what the training part holds, sorted. None for plain text.
        most: texts of each part, at most. They are drawn at random, each class in proportion, as by
            :meth:`lora_lens.Task.subset`; the fewer are among the more. Repeated ones are left out after
            that.
        seed: of that draw.
        conflicts: what is done with texts that have several labels, as in
            :func:`lora_lens.tasks.text_corpus`.

    Raises:
        ValueError: no such column, no rows; texts, labels and classes as in
            :func:`lora_lens.tasks.text_corpus`; an argument out of range.
        TypeError: a part is no ``datasets.Dataset``, a text no string, or a label neither a string nor a
            number.

    Example:
        >>> import datasets
        >>> import lora_lens as ll
        >>> train = datasets.Dataset.from_dict({"text": ["a fine film", "a waste of time"], "label": [1, 0]})
        >>> test = datasets.Dataset.from_dict({"text": ["well played"], "label": [1]})
        >>> ll.tasks.dataset_corpus(train, test, "films")
        <Corpus films: classes 0, 1; 2 training, 1 test texts>
    """
    most, seed = _checked(text, label, most, seed, conflicts)
    instance(name, str, "name", "the name of the corpus")
    return _corpus(
        name, {f"{name} (train)": train, f"{name} (test)": test}, text, label, most, seed, conflicts
    )


def _checked(
    text: str, label: str | None, most: int | None, seed: int, conflicts: str
) -> tuple[int | None, int]:
    check_columns(text, label, conflicts)
    return None if most is None else whole_number(most, "most", least=1), seed_number(seed)


def _corpus(
    name: str,
    sources: dict[str, Dataset],
    text: str,
    label: str | None,
    most: int | None,
    seed: int,
    conflicts: str,
) -> Corpus:
    (classes, to_train), (_, to_test) = (
        _drawn(part, source, text, label, most, seed) for source, part in sources.items()
    )
    return corpus_of(name, classes, to_train, to_test, conflicts)


def _drawn(
    data: Dataset, source: str, text: str, label: str | None, most: int | None, seed: int
) -> tuple[tuple[str, ...], Part]:
    """The classes of all of a data set, and at most so many of its texts."""
    from datasets import ClassLabel, Dataset

    if not isinstance(data, Dataset):
        raise InputTypeError(
            f"{source} must be one datasets.Dataset, such as a split, not {type(data).__name__}"
        )
    require(source, [text] if label is None else [text, label], data.column_names, len(data))
    kind = None if label is None else data.features[label]
    labels = None if label is None else _column(data, label)
    if isinstance(kind, ClassLabel):
        labels = [None if number == -1 else number for number in labels]
    remedy = "leave them out, with Dataset.filter and dataset_corpus"
    whole = Part(source, "row", range(1, len(data) + 1), [], labels, remedy)
    labels = labels_by_name(whole)
    if isinstance(kind, ClassLabel):
        classes = tuple(kind.names)
        labels = [classes[int(number)] for number in labels]
    else:
        classes = found_classes(labels)
    rows = list(range(len(data))) if most is None else _some_rows(labels, len(data), most, seed)
    part = replace(
        whole,
        numbers=[row + 1 for row in rows],
        texts=_column(data.select(rows), text),
        labels=None if labels is None else [labels[row] for row in rows],
    )
    check_texts(part)
    return classes, part


def _some_rows(labels: list[str] | None, count: int, most: int, seed: int) -> list[int]:
    places = np.zeros(count, int) if labels is None else np.unique(labels, return_inverse=True)[1]
    return sampled_rows(torch.from_numpy(places), min(most, count), seed).tolist()


def _column(data: Dataset, name: str) -> list:
    """A column as it is stored, whatever format the data set was given."""
    return data.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()
