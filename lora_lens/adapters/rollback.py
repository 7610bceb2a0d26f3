"""A model whose modules are changed in place is as it was before if the change fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, afterwards the model has the modules, hooks and attributes that it had.

    That is what PEFT changes when it injects: children, ``requires_grad``, forward hooks, attributes of
    modules and of the model's config. Values of parameters are not noted, so they must not be written inside.
    """
    holders = [*model.modules(), *([model.config] if hasattr(model, "config") else [])]
    before = [(vars(holder), *_contents(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes, values, inside in before:
            attributes.clear()
            attributes.update(values)
            for key, contents in inside.items():
                value = values[key]
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _contents(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes, and copies of what those hold that hold something: dicts of children, hooks, ..."""
    inside = {key: value.copy() for key, value in attributes.items() if isinstance(value, _HOLDERS)}
    return attributes.copy(), inside


_HOLDERS = (dict, list, set)
