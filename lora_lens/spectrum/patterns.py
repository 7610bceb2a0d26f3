"""Names of layers that a pattern matches, and names that say what a layer is for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.validate import shown

MOST_NUMBERS = 10_000
NUMBERS = re.compile(r"\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*")
ROUTER = re.compile(r"(^|[._])router([._]|$)|(^|\.)(shared_expert_gate|ffn_gate_inp(_shexp)?)$")
EXPERTS = re.compile(r"(^|\.)\w*experts?(\.|$)")
ONE_EXPERT = re.compile(r"(^|\.)experts?\.([a-z]+_)?\d+\.")  # a layer of it
GATE = re.compile(r"(^|\.)gate(\.wg)?$")
NAMES = ("head", "heads", "classifier", "score", "fc")
# transformers' classes whose layers outside the base model are made anew for the user's task.
NEW_HEADS = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|XVector|CTC)|DoubleHeads"
)
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense|intermediate|(^|\.)(fc\d|linear\d|w[io](_\d)?|output)(\.|$)", re.I
)


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """The names that end in ``pattern``, in whole dotted parts.

    ``*`` stands for anything, ``?`` for one character, ``[0-11]`` or ``[0,3,8-11]`` for a whole number,
    ``[05]`` for 0 or 5, ``[!0]`` for every other number, ``[qkv]`` for one of these letters, and ``{q,k}``
    for one of these texts.

    Raises:
        InputError: ``pattern`` is a regular expression, or a bracket in it has no end or no sense.
    """
    names = set(names)
    plain = {n for n in names if n == pattern or n.endswith(f".{pattern}")}
    if plain or not re.search(r"[][*?{}()|^$+\\]|^\.", pattern):
        return plain
    fits = _compiled(pattern).fullmatch
    return {name for name in names if fits(name)}


def part_of(name: str) -> str:
    """Which part of a block a layer belongs to, by its name: "attention", "mlp" or "other".

    Args:
        name: of the layer, dotted.

    Raises:
        InputTypeError: the name is no string.

    Example:
        >>> import lora_lens as ll
        >>> ll.spectrum.part_of("blocks.0.attn.qkv"), ll.spectrum.part_of("model.layers.3.mlp.up_proj")
        ('attention', 'mlp')
    """
    if not isinstance(name, str):
        raise InputTypeError(f"a layer's name must be a string, not {shown(name)}")
    return "attention" if ATTENTION.search(name) else "mlp" if MLP.search(name) else "other"


def routers(names: Iterable[str]) -> set[str]:
    """The names of what chooses between experts: too small for a window, and not what fine-tuning adapts.

    A ``gate`` is one where there are experts beside it: attention has gates as well.

    Args:
        names: of all modules or tensors of a model, whole.
    """
    names = list(names)
    beside = {name[: found.start()] for name in names if (found := EXPERTS.search(name))}
    gates = {n for n in names if (found := GATE.search(n)) and n[: found.start()] in beside}
    return gates | {name for name in names if ROUTER.search(name)}


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    foreign = re.search(r"[()|$+\\]|^\^|^\.", pattern)
    if foreign:
        raise InputError(
            f"target {pattern!r} looks like a regular expression ({foreign[0]!r}); a pattern is the end of "
            "a layer's name, in which * stands for anything, ? for one character, [0-11] for a number and "
            "{q,k} for one of several texts; give several patterns as a list"
        )
    return re.compile(rf"(?s:(?:.*\.)?{_regex(pattern, pattern)})")


def _regex(pattern: str, whole: str) -> str:
    parts, i = [], 0
    while i < len(pattern):
        sign, i = pattern[i], i + 1
        if sign in "[{":
            end = pattern.find("]" if sign == "[" else "}", i + 1)
            if end < 0:
                raise InputError(f"target {whole!r} opens {sign!r} without closing it")
            inside, i = pattern[i:end], end + 1
            parts.append(_bracket(inside, whole) if sign == "[" else _either(inside, whole))
        elif sign in "]}":
            raise InputError(f"target {whole!r} closes {sign!r} without opening it")
        else:
            parts.append({"*": ".*", "?": "."}.get(sign, re.escape(sign)))
    return "".join(parts)


def _either(inside: str, whole: str) -> str:
    if "{" in inside or ".." in inside or "," not in inside:
        raise InputError(
            f"target {whole!r}: {{{inside}}} must list texts between commas, as {{q,k,v}}; "
            "numbers are written [0-11]"
        )
    return f"(?:{'|'.join(_regex(part.strip(), whole) for part in inside.split(','))})"


def _bracket(inside: str, whole: str) -> str:
    other = inside[:1] in ("!", "^")
    inside = inside[1:] if other else inside
    if not NUMBERS.fullmatch(inside):
        if re.search(r"\d\d", inside) or not inside or ".." in inside:
            raise InputError(
                f"target {whole!r}: [{inside}] is neither whole numbers, as [0-11] or [0,3,8-11], "
                "nor single characters, as [qkv]"
            )
        letters = inside.replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
        return f"[{'^' if other else ''}{letters}]"
    numbers: set[int] = set()
    for part in inside if inside.isdigit() else inside.split(","):  # [05] is 0 or 5, as in any glob
        first, _, last = (piece.strip() for piece in part.partition("-"))
        low, high = int(first), int(last or first)
        if low > high or high - low >= MOST_NUMBERS:
            raise InputError(
                f"target {whole!r}: [{inside}] must go from a lower number to a higher one, in at most "
                f"{MOST_NUMBERS} steps"
            )
        numbers |= set(range(low, high + 1))
    listed = "|".join(map(str, sorted(numbers, reverse=True)))
    return rf"(?!(?:{listed})(?!\d))\d+" if other else rf"(?:{listed})(?!\d)"
