"""What the controls of an explorer are set to, as the keyword arguments of Python that set them so."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from keyword import iskeyword

import numpy as np
from IPython import get_ipython
from ipywidgets import HTML, Checkbox, Widget as Control
from traitlets import TraitError

from lora_lens._base.errors import InputError


class Setting:
    """One control, or several boxes to tick as one; its value is what Python would write.

    Args:
        name: as a keyword argument.
        control: with the value, or None where there are boxes.
        boxes: each with what it stands for as its description.
        trait: of the control, that holds the value.
        title: as people read it; nothing of what they do not see.
    """

    def __init__(
        self,
        name: str,
        control: Control | None,
        boxes: Iterable[Checkbox] = (),
        trait: str = "value",
        title: str = "",
    ) -> None:
        self.name, self._control, self._boxes, self._trait = name, control, list(boxes), trait
        self.title = title

    @property
    def value(self) -> object:
        if self._control is None:
            return tuple(literal_eval(box.description) for box in self._boxes if box.value)
        value = plain(getattr(self._control, self._trait))
        return rounded(value) if hasattr(self._control, "step") else value

    def set(self, value: object) -> None:
        """Move the control.

        Raises:
            ValueError: it cannot have this value.
        """
        wanted = plain(value)
        try:
            if self._control is None:
                for box in self._boxes:
                    box.value = literal_eval(box.description) in wanted
                wanted = tuple(sorted(wanted))
            else:
                setattr(self._control, self._trait, wanted)
            fits = self.value == rounded(wanted)  # a slider takes the nearest that it has, and says nothing
        except (TraitError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{self.name} cannot be {value!r}; choose {self._offers()}")

    def in_words(self) -> str:
        """Such as "learning rates: 0.01, 0.02"."""
        value = getattr(self._control, "label", None) or self.value
        several = value if isinstance(value, tuple) else (value,)
        words = [f"{one:.3g}" if isinstance(one, float) else str(one) for one in several]
        if len(words) == len(getattr(self._control, "options", self._boxes)) > 1:
            words = ["all"]
        return f"{self.title}: {(' to ' if hasattr(self._control, 'step') else ', ').join(words)}"

    def _offers(self) -> str:
        if self._control is None:
            return "some of " + ", ".join(box.description for box in self._boxes)
        if hasattr(self._control, "options"):
            options = (option for option in self._control.options)
            values = [option[1] if isinstance(option, tuple) else option for option in options]
            return "one of " + ", ".join(written(plain(v)) for v in values)
        if hasattr(self._control, "min"):
            return f"from {self._control.min:g} to {self._control.max:g}"
        return "a text"


def settings_of(rows: Iterable[Iterable[Control]]) -> dict[str, Setting]:
    """Of all controls in rows, by name: its description as a keyword, such as lr for "learning rate".

    Boxes to tick are one setting, whose name is the text before them.
    """
    found = []
    for row in rows:
        title, boxes = "", []
        for control in row:
            if isinstance(control, HTML):
                title = control.value
            elif isinstance(control, Checkbox):
                boxes.append(control)
            elif hasattr(control, "value"):
                found.append(Setting(_name(control.description), control, title=control.description))
        if boxes:
            found.append(Setting(_name(title), None, boxes, title=title))
    return {setting.name: setting for setting in found}


def call(
    function: str, given: Mapping[str, object], required: Iterable[str], view: Mapping[str, object]
) -> str:
    """The line of Python that makes an explorer as it is.

    Args:
        function: its name in ``ll.widgets``.
        given: the arguments it was made with. Objects go by the name that the notebook has for them, or else
            by that of the argument.
        required: which of them are written without their names.
        view: its settings that are others than at first.
    """
    arguments = {name: written(value, name) for name, value in given.items()}
    arguments |= {name: written(value, name) for name, value in view.items()}
    places = [arguments.pop(name) for name in required]
    return f"ll.widgets.{function}({', '.join([*places, *(f'{n}={v}' for n, v in arguments.items())])})"


def plain(value: object) -> object:
    """Without types of numpy's."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(one) for one in value)
    return value.item() if isinstance(value, np.generic) else value


def written(value: object, name: str = "value") -> str:
    """As Python writes it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(written(one, name) for one in value)}]"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    notebook = get_ipython()
    known = {} if notebook is None else notebook.user_ns
    return next((n for n, one in known.items() if one is value and not n.startswith("_")), name)


def rounded(value: object) -> object:
    """A slider's sums of steps as they are meant: 0.85 for 0.8500000000000001."""
    if isinstance(value, tuple):
        return tuple(rounded(one) for one in value)
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _name(description: str) -> str:
    short = re.sub(r" *\(.*\)", "", description)  # without a unit
    name = re.sub("learning rates?", "lr", short).replace(" ", "_")
    return name + "_" * iskeyword(name)
