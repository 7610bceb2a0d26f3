"""A model whose modules are changed in place is as it was before if the change fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, afterwards the model has the modules, hooks and attributes that it had.

    That is what PEFT changes when it injects: children, ``requires_grad``, forward hooks, attributes of
    modules and of the model's config. Values of parameters are not noted, so they must not be written inside.
    """
    holders = [*model.modules(), *([model.config] if hasattr(model, "config") else [])]
    before = [(holder, _contents(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for holder, contents in before:
            attributes = vars(holder)
            attributes.clear()
            for key, (value, inside) in contents.items():
                attributes[key] = value
                if inside is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(inside)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _contents(attributes: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Each attribute with a copy of what it holds, if it holds something: dicts of children, hooks, ..."""
    return {
        key: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for key, value in attributes.items()
    }
