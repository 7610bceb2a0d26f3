"""Checks at the door of public functions; each returns the plain type that the code inside trusts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from lora_lens._base.errors import InputError, InputTypeError

T = TypeVar("T")
MOST_SEED = 2**63 - 1
MOST_RESAMPLES = 100_000


def whole_number(value: object, name: str, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int; numpy's integers and arrays or tensors of one element without axes count.

    Raises:
        InputTypeError: it is no whole number (2.0 and True are none).
        InputError: it is below ``least`` or above ``most``.
    """
    value = _scalar(value)
    if not isinstance(value, Integral) or isinstance(value, (bool, np.bool_)):
        raise InputTypeError(f"{name} must be a whole number, not {shown(value)}")
    found = int(value)
    if least is not None and found < least:
        raise InputError(f"{name} must be at least {least}, not {shown(found)}")
    if most is not None and found > most:
        raise InputError(f"{name} must be at most {most}, not {shown(found)}")
    return found


def seed_number(value: object, name: str = "seed") -> int:
    """``value`` as a seed that numpy and torch both take.

    Raises:
        InputTypeError: it is no whole number.
        InputError: it is below 0 or above 2^63 - 1.
    """
    return whole_number(value, name, least=0, most=MOST_SEED)


def resample_count(value: object) -> int:
    """``value`` as a number of resamples, of which each takes memory.

    Raises:
        InputTypeError: it is no whole number.
        InputError: it is below 1 or above 100000.
    """
    return whole_number(value, "resamples", least=1, most=MOST_RESAMPLES)


def number(
    value: object,
    name: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a finite float, in [``least``, ``most``] or (``above``, ``below``).

    Raises:
        InputTypeError: it is no number (True and "1e-3" are none).
        InputError: it is NaN, infinite or outside the range.
    """
    value = _scalar(value)
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise InputTypeError(f"{name} must be a number, not {shown(value)}")
    try:
        value = float(value)
    except OverflowError:  # an int of more than 308 digits
        value = math.inf
    inside = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not math.isfinite(value) or not inside:
        raise InputError(f"{name} must be {_range(least, above, most, below)}, not {value!r}")
    return value


def share(value: object, name: str) -> float:
    """``value`` as a share in [0, 1].

    Raises:
        InputTypeError: it is no number.
        InputError: it is another one, such as a percentage.
    """
    value = number(value, name)
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be a share in [0, 1], not {value!r}; 80% is 0.8")
    return value


def numbers(values: object, name: str) -> np.ndarray:
    """``values`` as an array of float64: nested lists, arrays, tensors, columns of a table; NaN for None.

    Raises:
        InputTypeError: they are None, words or objects, or lists of different lengths.
    """
    plain = values.detach().cpu().double() if hasattr(values, "detach") else values
    try:
        found = np.asarray(plain)
    except ValueError:  # numpy's, for lists of different lengths
        raise InputTypeError(f"{name} must be numbers in rows of one length, not {shown(values)}") from None
    objects = found.dtype.kind == "O" and found.ndim > 0
    if not (objects and all(v is None or isinstance(v, Real) for v in found.flat)) and (
        found.dtype.kind not in "biuf"
    ):
        raise InputTypeError(f"{name} must be numbers, not {shown(values)}")
    return found.astype(float)


def share_matrix(values: object, name: str, source: str) -> np.ndarray:
    """``values`` as an array of float64 with two axes, whose entries are in [0, 1] but for rounding.

    Raises:
        InputTypeError: they are a table or no numbers.
        InputError: they are no matrix, or not in [0, 1].
    """
    if hasattr(values, "columns"):
        raise InputTypeError(f"{name} must be what {source} returns, an array, not {shown(values)}")
    found = numbers(values, name)
    if found.ndim != 2 or not found.size:
        raise InputError(f"{name} must be a matrix, from {source}, not an array of shape {found.shape}")
    if not (-1e-6 <= found.min() <= found.max() <= 1 + 1e-6):
        raise InputError(f"{name} must have entries in [0, 1], from {source}, not {shown(values)}")
    return found


def flag(value: object, name: str) -> bool:
    """``value`` if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputTypeError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def choice(value: object, name: str, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options``; the message suggests the one that was meant."""
    options = list(options)
    if not isinstance(value, str):
        raise InputTypeError(f"{name} must be one of {', '.join(map(repr, options))}, not {shown(value)}")
    if value not in options:
        allowed, meant = ", ".join(map(repr, options)), suggestion(value, options)
        raise InputError(f"{name} must be one of {allowed}, not {value!r}{meant}")
    return value


def sequence(value: object, name: str, of: str, one: type | tuple[type, ...] = ()) -> tuple[Any, ...]:
    """``value`` as a tuple: a list, range, 1-D array or anything else that is iterated in a fixed order.

    Args:
        of: what it holds, for the message, such as "learning rates".
        one: types of a single element, which counts as a sequence of one.

    Raises:
        InputTypeError: it is a string (which would be taken letter by letter), a mapping, a set,
            an array with several axes, or nothing that can be iterated.
    """
    if one and isinstance(value, one):
        return (value,)
    ndim = getattr(value, "ndim", 1)
    if (
        isinstance(value, (str, bytes, Mapping, set, frozenset))
        or not isinstance(value, Iterable)
        or ndim != 1
    ):
        raise InputTypeError(f"{name} must be a sequence of {of}, such as a list, not {shown(value)}")
    return tuple(value)


def patterns(value: object, name: str = "targets") -> tuple[str, ...] | None:
    """Names or patterns of layers: None, one string, or a sequence of at least one.

    Raises:
        InputTypeError: it is anything else.
        InputError: it is empty.
    """
    if value is None:
        return None
    found = sequence(value, name, "names or patterns of layers", one=str)
    for pattern in found:
        if not isinstance(pattern, str):
            raise InputTypeError(f"{name} must hold names or patterns of layers, not {shown(pattern)}")
    if not found or "" in found:
        raise InputError(
            f"{name} must name at least one layer, not {shown(value)}; None is for the usual ones"
        )
    return found


def instance(value: T, kinds: type | tuple[type, ...], name: str, expected: str) -> T:
    """``value`` if it is of ``kinds``; ``expected`` says in the message what that is and where to get it."""
    if not isinstance(value, kinds):
        raise InputTypeError(f"{name} must be {expected}, not {shown(value)}")
    return value


def known_settings(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise for the first of ``given`` that is not among ``known``, and suggest the one that was meant.

    Raises:
        InputTypeError: as Python does for an unexpected keyword argument.
    """
    for name in given:
        if name not in known:
            hint = suggestion(name, known)
            rest = "" if hint else f"; there are {', '.join(known)}"
            raise InputTypeError(f"{where} has no setting {name!r}{hint}{rest}")


# What other libraries call a setting, and its name here: too far apart for a comparison of spellings.
SYNONYMS = {
    "learning_rate": "lr",
    "epochs": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "bs": "batch_size",
    "warmup_ratio": "warmup",
    "wd": "weight_decay",
    "random_state": "seed",
    "dtype": "precision",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "target_modules": "targets",
    "n_jobs": "jobs",
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """The words "; did you mean 'lr'?" if a known name is close, or is what other libraries call so."""
    known = list(known)
    meant = [SYNONYMS[name]] if SYNONYMS.get(name) in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {meant[0]!r}?" if meant else ""


def shown(value: object) -> str:
    """``value`` on one line of at most about 80 characters, for a message."""
    text = " ".join(repr(value).split())
    if len(text) > 80 or type(value).__module__.partition(".")[0] in ("torch", "pandas", "numpy"):
        shape = getattr(value, "shape", None)
        text = f"{type(value).__name__} {text[:60]}" + ("..." if len(text) > 60 else "")
        text += f" of shape {tuple(shape)}" if shape else ""
    return text


def _scalar(value: object) -> object:
    """The element of an array or tensor without axes; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _range(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    low, high = least if least is not None else above, most if most is not None else below
    if low is not None and high is not None:
        return f"in {'[' if least is not None else '('}{low:g}, {high:g}{']' if most is not None else ')'}"
    if low == 0 and above is not None:
        return "positive and finite"
    if low is not None:
        return f"{'at least' if least is not None else 'above'} {low:g} and finite"
    if high is not None:
        return f"{'at most' if most is not None else 'below'} {high:g} and finite"
    return "finite"
