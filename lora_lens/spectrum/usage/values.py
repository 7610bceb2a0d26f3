"""What an expression in code may be, as real objects.

They are the values of :mod:`lora_lens.spectrum.usage.reading`.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading

Value = tuple[object, ...]  # what an expression may be, no object twice
NOTHING: Value = ()
UNKNOWN = object()  # what is decided only when the code runs


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a layer."""

    layer: nn.Module


@dataclass(frozen=True, eq=False)
class Many:
    """Something to iterate over, each of whose elements is any of ``elements``."""

    elements: Value


@dataclass(frozen=True, eq=False)
class Named(Many):
    """A dict whose keys are known texts."""

    places: Mapping[str, Value]

    @classmethod
    def of(cls, places: Mapping[str, Value]) -> Named:
        return cls(union(*places.values()), dict(places))


@dataclass(frozen=True, eq=False)
class Row(Many):
    """A tuple or list with known places."""

    places: tuple[Value, ...]

    @classmethod
    def of(cls, *places: Value) -> Row:
        return cls(union(*places), places)


@dataclass(frozen=True, eq=False)
class Made:
    """An object that code makes of a class that is no module; any attribute may be what it was made with."""

    kind: type
    held: Value


@dataclass(frozen=True, eq=False)
class Super:
    """``super()`` in a method of ``owner``."""

    owner: type
    of: object


@dataclass(frozen=True, eq=False)
class MethodOf:
    """A method that torch or Python has for ``item``, such as ``children`` or ``values``."""

    item: object
    name: str


@dataclass(frozen=True, eq=False)
class InnerFunction:
    """A function or lambda that is defined inside ``call``."""

    call: Reading
    names: ast.arguments
    body: list[ast.stmt] | ast.expr


def each(value: Value) -> Value:
    """What iterating over ``value`` gives."""
    found: list[Value] = []
    for item in value:
        if isinstance(item, Many):
            found.append(item.elements)
        elif isinstance(item, Weight):
            found.append((item,))
        elif isinstance(item, nn.Module):
            found.append(tuple(item.children()))
        elif isinstance(item, tuple):  # a named one
            found += map(wrapped, item)
    return union(*found)


def item_at(item: object, at: object) -> Value:
    """``item[at]``, where a number or a text is known."""
    if isinstance(item, nn.Module):
        children = item._modules
        key = str(at % len(children) if isinstance(at, int) and children else at)
        some = [children[key]] if key in children else list(children.values())
        return tuple(module for module in some if module is not None)
    if isinstance(item, Named) and isinstance(at, str) and at in item.places:
        return item.places[at]
    if isinstance(item, (Row, tuple)) and isinstance(at, int):
        places = item.places if isinstance(item, Row) else tuple(map(wrapped, item))
        return places[at] if -len(places) <= at < len(places) else NOTHING
    return each((item,))


def items_at(value: Value, at: Value) -> Value:
    """``value[at]``, whatever item where no text is known."""
    keys: list[object] = [*texts_in(at)] or [None]
    return union(*(item_at(item, key) for item in value for key in keys))


def with_item(held: Value, at: Value, value: Value) -> Value:
    """Dicts after an item is put into them: with a known name, otherwise with any."""
    name = text_of(at)
    found: list[object] = []
    for item in held:
        if isinstance(item, Named):
            known = Named.of({**item.places, name: value}) if name is not None else None
            item = known or Many(union(item.elements, value))
        found.append(item)
    return tuple(found)


def texts_in(value: Value) -> list[str]:
    return [item for item in value if isinstance(item, str)]


def text_of(value: Value) -> str | None:
    """The one text that it can be."""
    return value[0] if len(value) == 1 and isinstance(value[0], str) else None


def joined(values: Iterable[Value]) -> Value:
    """The text of several, where each is known."""
    parts = [text_of(value) for value in values]
    known = [part for part in parts if part is not None]
    return ("".join(known),) if len(known) == len(parts) else NOTHING


def union(*values: Value) -> Value:
    if len(values) == 1:
        return values[0]
    return tuple({id(item): item for value in values for item in value}.values())


def inside(item: object) -> Value:
    return item.elements if isinstance(item, Many) else NOTHING


def matters(value: Value) -> bool:
    """Whether there is a module or a weight in it."""
    return any(
        isinstance(item, (nn.Module, Weight, types.MethodType, MethodOf, InnerFunction, Made))
        or matters(inside(item))
        for item in value
    )


def holds(owner: object) -> bool:
    """Whether the methods of an object may reach modules."""
    kept = (*getattr(owner, "__dict__", {}).values(), *closure_of(owner).values())
    return isinstance(owner, (nn.Module, Made)) or any(isinstance(held, nn.Module) for held in kept)


def closure_of(function: object) -> dict[str, object]:
    """What a function keeps of the variables around its definition, by name."""
    found = {}
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars if code and cells else (), cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found


def ids(value: Value) -> tuple[object, ...]:
    """What tells values apart whose objects are made anew each time."""
    return tuple(_identity(item) for item in value)


def named_ids(places: Mapping[str, Value]) -> tuple[object, ...]:
    """Of what is known; of the rest only the name that torch's layers have for their input counts."""
    return tuple((name, ids(value)) for name, value in places.items() if value or name == "input")


def _identity(item: object) -> object:
    if isinstance(item, Named):
        return (Named, *named_ids(item.places))
    if isinstance(item, Row):
        return (Row, *map(ids, item.places))
    if isinstance(item, Many):
        return (Many, ids(item.elements))
    if isinstance(item, types.MethodType):
        return (id(item.__self__), id(item.__func__))
    if isinstance(item, MethodOf):
        return (_identity(item.item), item.name)
    if isinstance(item, Made):
        return (item.kind, ids(item.held))
    return item if isinstance(item, str) else id(item)


def wrapped(found: object) -> Value:
    """A real object as a value."""
    if found is None or isinstance(found, (bool, int, float, Tensor, torch.dtype, torch.device)):
        return NOTHING
    if isinstance(found, (list, tuple)) and not hasattr(found, "_fields"):
        return (Row.of(*map(wrapped, found[:64])),)
    if isinstance(found, dict):
        places = {key: wrapped(item) for key, item in islice(found.items(), 64)}
        named = {key: value for key, value in places.items() if isinstance(key, str)}
        return (Named.of(named) if len(named) == len(found) else Many(union(*places.values())),)
    return (found,)
