"""Sentences with figures that hold on every machine: made from the table that stands above them.

A notebook's folded cell puts its text together from these functions and shows it with :func:`say`. The
figures are the table's, rounded as pandas rounds the table, and the words turn when a comparison turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance, numbers, sequence, shown
from lora_lens.forgetting.fair_comparison import seed_interval
from lora_lens.reports.page import decimal

if TYPE_CHECKING:
    from IPython.display import Markdown

SEEDS_BY_COLUMN = "a table with a row for each seed, such as by_seed(table, 'forgetting')[0.5]"
WORDS = ("more", "neither clearly more nor less", "less")


def by_seed(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """A score seed by seed: what the other functions here take a column of, or several.

    Args:
        table: from :func:`lora_lens.sweep`, with one rank and variant.
        score: the name of a column, such as "forgetting".

    Returns:
        One row per seed. The columns have two levels: the window's position, or the method's name where
        there is no position; and the learning rate. So ``[0.5]`` is a table of the middle window, one
        column per rate, and ``[0.5][0.01]`` is a Series.

    Raises:
        ValueError: a column is missing, or two runs share window, rate and seed.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> runs = pd.DataFrame({"method": ["window", "window", "LoRA", "LoRA"], "seed": [0, 1, 0, 1]})
        >>> runs = runs.assign(position=[0.5, 0.5, None, None], lr=0.01, forgetting=[0.1, 0.2, 0.3, 0.4])
        >>> forgetting = ll.reports.by_seed(runs, "forgetting")
        >>> forgetting["LoRA"][0.01].to_dict()
        {0: 0.3, 1: 0.4}
    """
    table = checked(table, ["method", "position", "lr", "seed", score], once=True)
    name = table["position"].astype(object).where(table["position"].notna(), table["method"])
    table = table.assign(name=name)
    twice = table.duplicated(["name", "lr", "seed"])
    if twice.any():
        row = table[twice].iloc[0]
        which = row["method"] if pd.isna(row["position"]) else f"the window at {row['position']:g}"
        raise InputError(
            f"two runs of {which} share learning rate {row['lr']:g} and seed {row['seed']}; "
            "keep one rank and variant, and one value of every other setting"
        )
    return table.pivot(index="seed", columns=["name", "lr"], values=score).sort_index(axis=1, level="lr")


def points(shares: ArrayLike, digits: int = 1) -> str:
    """The mean of shares in percent, or in percentage points; of a table that of each column.

    Args:
        shares: in [0, 1], one per seed; a table has several columns of them, such as one per rate.
        digits: after the point.

    Raises:
        ValueError: there are none, or one is not a share: 80% is 0.8.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> ll.reports.points([0.20, 0.25]), ll.reports.points(0.75, digits=0)
        ('22.5', '75')
        >>> ll.reports.points(pd.DataFrame({0.005: [0.02, 0.03], 0.01: [0.05, 0.07]}))
        '2.5 and 6.0'
    """
    found = numbers(shares, "shares")
    if not found.size or (np.abs(found) > 1).any():
        raise InputError(
            f"shares must be in [0, 1], where 80% is 0.8, or differences of such, not {shown(shares)}"
        )
    means = pd.DataFrame(np.atleast_1d(found)).mean()  # without the seeds that have none
    return listing(decimal(mean, digits) for mean in np.round(100 * means, digits))


def interval(shares: tuple[float, float], digits: int = 1) -> str:
    """An interval of a difference in percentage points, with signs.

    Args:
        shares: its ends, such as from :func:`lora_lens.forgetting.seed_interval`.
        digits: after the point.

    Raises:
        ValueError: they are not two shares.

    Example:
        >>> import lora_lens as ll
        >>> ll.reports.interval((0.003, 0.0624)), ll.reports.interval((-0.02, 0.0001))
        ('+0.3 to +6.2', '-2.0 to +0.0')
    """
    found = numbers(shares, "shares")
    if found.shape != (2,):
        raise InputError(f"shares must be the two ends of an interval, not {shown(shares)}")
    return " to ".join(f"{round(100 * end, digits) + 0.0:+.{digits}f}" for end in found)


def lowest_and_highest(shares: pd.DataFrame) -> pd.DataFrame:
    """Two columns of a table, those with the lowest and with the highest mean.

    Args:
        shares: one row per seed, one column per window.

    Raises:
        ValueError: it has no columns, or one without a value.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> forgetting = pd.DataFrame({0.0: [0.2, 0.3], 0.5: [0.02, 0.03], 1.0: [0.03, 0.04]})
        >>> "between " + ll.reports.points(ll.reports.lowest_and_highest(forgetting))
        'between 2.5 and 25.0'
    """
    means = instance(shares, pd.DataFrame, "shares", SEEDS_BY_COLUMN).mean()
    if means.empty or means.isna().any():
        raise InputError(
            f"every column of shares needs a value to be compared, but these are {shown(shares)}"
        )
    return shares[[means.idxmin(), means.idxmax()]]


def more_or_less(one: ArrayLike, other: ArrayLike, words: tuple[str, str, str] = WORDS) -> str:
    """The word for a comparison: the first if ``one`` is clearly more than ``other``, the last if less.

    Clearly means that the 95% interval of the difference's mean, seed by seed, leaves out 0 (see
    :func:`lora_lens.forgetting.seed_interval`). A single seed has no interval and gets the word
    between, which should not say that the two are equal; with two seeds, whose intervals are wide, that is
    the word for most.

    Args:
        one: a value for each seed.
        other: the same; two Series are paired by their index, anything else by place.
        words: for more, for neither, and for less.

    Raises:
        ValueError: they are not one value for each seed, or of different seeds.

    Example:
        >>> import lora_lens as ll
        >>> ll.reports.more_or_less([0.20, 0.28, 0.25], [0.02, 0.01, 0.03])
        'more'
        >>> ll.reports.more_or_less([0.03, 0.01], [0.02, 0.02], ("yes", "not clearly", "no"))
        'not clearly'
    """
    more, neither, less = words
    for name, values in {"one": one, "other": other}.items():
        if (found := numbers(values, name)).ndim != 1 or not found.size:
            raise InputError(f"{name} must hold a value for each seed, not {shown(values)}")
    if isinstance(one, pd.Series) and isinstance(other, pd.Series):
        paired = one.index.isin(other.index).any()
    else:
        one, other = numbers(one, "one"), numbers(other, "other")
        paired = len(one) == len(other)
    if not paired:
        raise InputError("one and other make no pairs; give a value of each for the same seeds")
    difference = pd.Series(one - other).dropna()
    low, high = seed_interval(difference) if len(difference) > 1 else (np.nan, np.nan)
    return more if low > 0 else less if high < 0 else neither


def at_each_rate(one: pd.DataFrame, other: pd.DataFrame, words: tuple[str, str, str] = WORDS) -> str:
    """The words of :func:`more_or_less`, each with the learning rates at which it holds.

    Args:
        one: a column of values for each rate, such as a window's of :func:`by_seed`.
        other: the same, at the same rates.
        words: for more, for neither, and for less.

    Raises:
        ValueError: the rates differ.

    Example:
        >>> import pandas as pd
        >>> import lora_lens as ll
        >>> first = pd.DataFrame({0.005: [0.20, 0.28, 0.25], 0.01: [0.5, 0.6, 0.6], 0.02: [0.7, 0.8, 0.9]})
        >>> middle = pd.DataFrame({0.005: [0.02, 0.01, 0.03], 0.01: [0.1, 0.1, 0.1], 0.02: [0.6, 0.9, 0.8]})
        >>> ll.reports.at_each_rate(first, middle)
        'more at 0.005 and 0.01, neither clearly more nor less at 0.02'
    """
    for name, values in {"one": one, "other": other}.items():
        instance(values, pd.DataFrame, name, SEEDS_BY_COLUMN)
    if list(one) != list(other):
        raise InputError(
            f"at the learning rates {list(one)} there is nothing to compare with those at {list(other)}; "
            "keep the rates that both have"
        )
    rates: dict[str, list[str]] = {}
    for rate in one:
        rates.setdefault(more_or_less(one[rate], other[rate], words), []).append(f"{rate:g}")
    return ", ".join(f"{word} at {listing(some)}" for word, some in rates.items())


def listing(items: Iterable[object]) -> str:
    """As in a sentence, with "and" before the last.

    Raises:
        ValueError: there are none.

    Example:
        >>> import lora_lens as ll
        >>> ll.reports.listing([0.005, 0.01, 0.02]), ll.reports.listing([0.005])
        ('0.005, 0.01 and 0.02', '0.005')
    """
    texts = [str(item) for item in sequence(items, "items", "things to list")]
    if not texts:
        raise InputError("there is nothing to list; say so in other words")
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def say(*lines: str) -> Markdown:
    """Lines of Markdown, shown as text under a notebook's cell.

    Example:
        >>> import lora_lens as ll
        >>> ll.reports.say("**What to notice.**", "- PiSSA forgets 23.9 points.").data
        '**What to notice.**\\n- PiSSA forgets 23.9 points.'
    """
    for line in lines:
        instance(line, str, "a line", "a text")
    from IPython.display import Markdown  # here, since only notebooks need it

    return Markdown("\n".join(lines))
