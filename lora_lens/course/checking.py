"""``check``: is a student's answer to an exercise right, and if not, what helps?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lora_lens._base.validate import choice, whole_number
from lora_lens.course.exercises import EXERCISES

_wrong: Counter[str] = Counter()  # answers to each exercise in this session


@dataclass(frozen=True)
class Verdict:
    """What :func:`check` found; in a notebook it shows as its text.

    Attributes:
        right: True if the answer is; ``bool(verdict)`` is the same, so that a grader can ``assert`` it.
        text: one line to read.
    """

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text


def check(exercise: str, answer: object) -> Verdict:
    """Whether an answer to an exercise of the course is right, in one line, with a hint where it is not.

    The first wrong answer of a session gets the first hint, every later one the better hint. A function is
    tried on cases that the exercise does not name; a model is judged by what it computes and by what in it
    is trained. The solution is never told: it is folded away in the notebook.

    Args:
        exercise: the notebook's number and the exercise's, such as "02-1".
        answer: what the exercise asks for, or ``...`` while there is none.

    Raises:
        ValueError: there is no such exercise to check, or a table lacks a column.
        TypeError: the answer is of another kind than the exercise asks for.
        FileNotFoundError: the exercise is about stored runs, and ``data/results`` is not there.

    Example:
        >>> import lora_lens as ll
        >>> ll.course.check("01-2", ...)
        01-2: not answered yet. It asks for a number. For a hint: ll.course.hint("01-2")
        >>> bool(ll.course.check("01-2", 48))
        False
    """
    asked = EXERCISES[choice(exercise, "exercise", EXERCISES)]
    if answer is ...:
        return Verdict(
            False,
            f"{exercise}: not answered yet. It asks for {asked.kind}. "
            f'For a hint: ll.course.hint("{exercise}")',
        )
    complaint = asked.complaint(answer)
    if not complaint:
        return Verdict(True, f"{exercise}: right{asked.precision}.")
    _wrong[exercise] += 1
    return Verdict(
        False, f"{exercise}: not yet. {complaint}. Hint: {hint(exercise, min(_wrong[exercise], 2))}"
    )


def hint(exercise: str, number: int = 1) -> str:
    """What helps with an exercise, without its solution.

    Args:
        exercise: as in :func:`check`.
        number: 1, or 2 for the better hint.

    Raises:
        ValueError: there is no such exercise, or no such hint.

    Example:
        >>> import lora_lens as ll
        >>> ll.course.hint("02-1")
        'An adapter adds two matrices to every weight: A of shape (r, in) and B of shape (out, r).'
    """
    hints = EXERCISES[choice(exercise, "exercise", EXERCISES)].hints
    return hints[whole_number(number, "number", least=1, most=len(hints)) - 1]
