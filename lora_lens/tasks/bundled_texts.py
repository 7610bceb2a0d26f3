"""Texts that need no download while running: four corpora that people rated from negative to positive.

Film reviews, product reviews, tweets and newspaper articles, by Hutto and Gilbert 2014, "VADER: a
parsimonious rule-based model for sentiment analysis of social media text" (ICWSM); see
``data/README.md``. A fifth of each is for testing, the same texts in all that is made of them here: a
training text of one corpus is a test text of none. Sentences of one review or article are on one side.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from functools import cache

import pandas as pd

from lora_lens._base.errors import InputError
from lora_lens._base.validate import choice, whole_number
from lora_lens.tasks.bundled import _verified
from lora_lens.tasks.corpus import Corpus, Texts

CORPORA = ("movies", "products", "tweets", "newspaper")
SENTIMENTS = ("negative", "positive")
CLEAR = 0.5  # the least mean rating, of 4, that counts as a sentiment


def ratings(name: str) -> pd.DataFrame:
    """A corpus as it was rated.

    Args:
        name: one of ``CORPORA``.

    Returns:
        One row per text, in the order of the source: text; rating, the mean of at least 20 people's, from -4
        (extremely negative) over 0 (neutral) to 4 (extremely positive), to two decimals; group, the number
        of the review, article, tweet or snippet it is of; test, whether it is a test text.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or another ``name``.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled_texts.ratings("tweets").columns.tolist()
        ['text', 'rating', 'group', 'test']
    """
    held = _held()[choice(name, "name", CORPORA)]
    return pd.DataFrame(
        {
            "text": held["texts"],
            "rating": held["ratings"],
            "group": held["groups"],
            "test": [bool(value) for value in held["test"]],
        }
    )


def sentiment(name: str) -> Corpus:
    """Negative (0) and positive (1) texts, by the sign of the mean rating.

    Those whose rating is below 0.5 in size are left out, since people see little sentiment in them or
    do not agree. There remain, for training and testing:

    - movies: 8,060 and 2,010
    - products: 2,389 and 587
    - tweets: 2,705 and 667
    - newspaper: 2,366 and 561

    Args:
        name: one of ``CORPORA``.

    Returns:
        The corpus, called ``name``, its texts in an order without meaning.

    Raises:
        FileNotFoundError, ValueError: as :func:`ratings`.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled_texts.sentiment("tweets")
        <Corpus tweets: classes negative, positive; 2705 training, 667 test texts>
    """
    table = ratings(name)
    clear = table[table["rating"].abs() >= CLEAR]
    return _corpus(name, SENTIMENTS, clear.assign(label=(clear["rating"] > 0).astype(int)))


def genres(per_genre: int = 3000) -> Corpus:
    """Which of ``CORPORA`` a text is from, whatever its rating.

    Args:
        per_genre: texts from each; a fifth of them, rounded down, are test texts. More include the fewer.

    Returns:
        The corpus "genres", with as many texts of each class for training and as many for testing, in an
        order without meaning.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or ``per_genre`` is below 5 or above
            3,599, for which the smallest corpus has no more texts.
        TypeError: ``per_genre`` is no whole number.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled_texts.genres(per_genre=100)
        <Corpus genres: classes movies, products, tweets, newspaper; 320 training, 80 test texts>
    """
    tables = [_mixed(ratings(name), name).assign(label=label) for label, name in enumerate(CORPORA)]
    test_texts = min(int(table["test"].sum()) for table in tables)
    training_texts = min(int((~table["test"]).sum()) for table in tables)
    most = min(5 * test_texts + 4, 5 * training_texts // 4)
    per_genre = whole_number(per_genre, "per_genre")
    if not 5 <= per_genre <= most:
        raise InputError(
            f"per_genre must be 5 to {most}, as many as the smallest corpus has, not {per_genre}"
        )
    testing = per_genre // 5
    drawn = [
        part
        for table in tables
        for part in (table[~table["test"]].head(per_genre - testing), table[table["test"]].head(testing))
    ]
    return _corpus("genres", CORPORA, pd.concat(drawn))


def articles() -> Corpus:
    """Ordinary running English without classes: each newspaper article is one text.

    Its sentences are joined in their order by single spaces. The source lacks some sentences, and those
    that repeat an earlier one are dropped.

    Returns:
        The corpus "newspaper articles", its articles in an order without meaning.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled_texts.articles().classes
        ()
    """
    sentences = ratings("newspaper").groupby("group", sort=False)
    whole = sentences.agg(text=("text", " ".join), test=("test", "first"))
    return _corpus("newspaper articles", (), whole.assign(label=0))


@cache
def _held() -> dict[str, dict[str, list]]:
    return json.loads(lzma.decompress(_verified("corpora.json.xz").read_bytes()))


def _corpus(name: str, classes: tuple[str, ...], table: pd.DataFrame) -> Corpus:
    """The rows of a table of texts, labels and sides."""
    mixed = _mixed(table, name)
    parts = (mixed[~mixed["test"]], mixed[mixed["test"]])
    return Corpus(name, classes, *(Texts(part["text"], part["label"].tolist()) for part in parts))


def _mixed(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows in an order without meaning, the same everywhere: the source's begins with one class.

    Each name has its own order. In a common one, genres would begin with the texts of the largest corpus,
    whose drawn texts are the first of more.
    """
    return table.sort_values("text", key=lambda texts: texts.map(lambda text: _hashed(f"{name} {text}")))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
