"""Pictures of texts: what a person wrote, and how much of each token's features a window carries."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, numbers, sequence
from lora_lens.plots._style import house_style, literal, require_axes

COLOURS = "cividis"
MONO = "DejaVu Sans Mono"  # ships with matplotlib; every letter is as wide as every other
LETTER = 0.602  # its width, in sizes of the font
LINE = 3.1  # of tokens with their numbers, in sizes of the font
SIZES = np.arange(10, 5.9, -0.5)  # points; the largest with which all tokens fit is taken
LONGEST = 24  # letters of a token
UNSEEN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}", "": "\N{OPEN BOX}"}
TEXT_SIZE = 9.5
LETTERS_IN_A_LINE = 100  # of a text as wide as a notebook's figure


def token_shares(pieces: Sequence[str], shares: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """The tokens of one text, each with the window's share of the energy of its features.

    The number under a token is the share in percent; colours run from 0 to the largest. Spaces around a token
    are left out. Tokens for which there is no room are counted at the end.

    Args:
        pieces: the tokens in writing, such as ``task.test.pieces(0)``.
        shares: one for each, in [0, 1], such as ``split.position_shares[0]`` of
            :func:`lora_lens.forgetting.feature_split`.
        ax: to draw on; default a new pyplot figure, high enough for all tokens.

    Raises:
        ValueError: there are no pieces, not as many shares, or shares outside [0, 1].

    Example:
        >>> import lora_lens as ll
        >>> ax = ll.plots.token_shares(["Good", " day"], [0.25, 0.5])
        >>> [text.get_text() for text in ax.texts]
        ['Good', '25', 'day', '50']
    """
    require_axes(ax)
    pieces = sequence(pieces, "pieces", "tokens in writing")
    for piece in pieces:
        instance(piece, str, "each of pieces", "a token in writing, such as those of task.test.pieces(0)")
    shares = numbers(shares, "shares")
    if not len(pieces) or shares.shape != (len(pieces),):
        raise InputError(
            f"expected one share for each of {len(pieces)} tokens, at least one, not shares of shape "
            f"{shares.shape}"
        )
    if not (shares.min() >= 0 and shares.max() <= 1 + 1e-6):
        raise InputError(f"shares must be in [0, 1], not {shares.min():g} to {shares.max():g}")
    words, percents = [_visible(piece) for piece in pieces], [_percent(share) for share in shares]
    widths = [LETTER * max(len(w) + 0.6, 0.8 * len(n)) for w, n in zip(words, percents, strict=True)]
    with house_style():
        if ax is None:
            wide = plt.rcParams["figure.figsize"][0]
            lines = _places(widths, 0.95 * 72 * wide / SIZES[0])[-1][1] + 1
            ax = plt.subplots(figsize=(wide, 0.5 + LINE * SIZES[0] * lines / 72))[1]
        scale = ScalarMappable(Normalize(0, max(100 * shares.max(), 1e-9)), colormaps[COLOURS])
        ax.set_title("The window's share of the energy at each token (%)", fontsize=10.5)
        ax.axis("off")
        width, height = _size_in_points(ax)
        ax.set(xlim=(0, width), ylim=(height, 0))
        size, places = _fitted(widths, width, height)
        fits = [(line + 1) * LINE * size <= height for _, line in places]
        left_out = len(pieces) - sum(fits)
        if left_out:  # the last that fits gives its place to the count
            at = sum(fits) - 1
            left_out, fits[at] = left_out + 1, False
            left, line = places[at]
            _write(ax, left * size, (line + 0.35) * LINE * size, f"and {left_out} more", 0.8 * size)
        for word, number, wide, (left, line), share, fit in zip(
            words, percents, widths, places, shares, fits, strict=True
        ):
            if not fit:
                continue
            x, y = left * size, line * LINE * size
            box = Rectangle(
                (x, y), wide * size, 1.5 * size, facecolor=scale.to_rgba(100 * share), linewidth=0
            )
            ax.add_patch(box)
            ink = "white" if share < shares.max() / 2 else "black"
            middle = {"ha": "center", "va": "center"}
            _write(ax, x + wide * size / 2, y + 0.78 * size, word, size, color=ink, **middle)
            _write(ax, x + wide * size / 2, y + 2.1 * size, number, 0.8 * size, color="0.25", **middle)
    return ax


def show_text(ax: Axes, text: str, title: str) -> None:
    """One text under its title, wrapped, as much of it as the Axes have room for."""
    width, height = _size_in_points(ax)
    lines = max(1, int(height / (1.3 * TEXT_SIZE)))
    ax.axis("off")
    ax.set_title(literal(title), fontsize=TEXT_SIZE, loc="left", fontweight="bold")
    letters = min(LETTERS_IN_A_LINE, max(12, int(width / (0.52 * TEXT_SIZE))))
    shown = "\n".join(wrapped(text, letters, lines))
    written = ax.text(
        0, 1, shown, fontsize=TEXT_SIZE, va="top", transform=ax.transAxes, parse_math=False, linespacing=1.25
    )
    written.set_in_layout(False)


def text_axes(texts: Sequence[str], most_lines: int = 5) -> np.ndarray:
    """The Axes of a new figure, one under the other, each as high as its text; shape (texts, 1)."""
    heights = [len(wrapped(text, LETTERS_IN_A_LINE, most_lines)) * 1.4 * TEXT_SIZE / 72 for text in texts]
    size = (plt.rcParams["figure.figsize"][0], sum(heights) + 0.32 * len(texts))
    figure, axes = plt.subplots(
        len(texts), 1, figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.draw_without_rendering()  # so that the Axes have their size
    return axes


def wrapped(text: str, letters: int, lines: int) -> list[str]:
    """The first ``lines`` lines of at most ``letters`` each; an ellipsis says that more follows."""
    return wrap(text, letters, max_lines=lines, placeholder=" ...")


def _size_in_points(ax: Axes) -> tuple[float, float]:
    if ax.figure.get_layout_engine() is not None:
        ax.figure.draw_without_rendering()
    box = ax.get_window_extent()
    return 72 * box.width / ax.figure.dpi, 72 * box.height / ax.figure.dpi


def _fitted(widths: Sequence[float], width: float, height: float) -> tuple[float, list[tuple[float, int]]]:
    """The size of the font, and (left, line) of each token in sizes of the font."""
    for size in SIZES:
        places = _places(widths, width / size)
        if (places[-1][1] + 1) * LINE * size <= height:
            break
    return size, places


def _places(widths: Sequence[float], width: float) -> list[tuple[float, int]]:
    gap, places, left, line = 0.35, [], 0.0, 0
    for wide in widths:
        if places and left + wide > width:
            left, line = 0.0, line + 1
        places.append((left, line))
        left += wide + gap
    return places


def _write(ax: Axes, x: float, y: float, text: str, size: float, **look: object) -> None:
    ax.text(x, y, text, fontsize=size, family=MONO, parse_math=False, **look)


def _visible(piece: str) -> str:
    """A token as one word: what is white space alone has a sign, what is long an end that is cut off."""
    word = piece.strip() or UNSEEN.get(piece.strip(" ")) or UNSEEN[""]
    word = " ".join(word.split())
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"
