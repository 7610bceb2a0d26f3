"""What Python's own ways of asking for an attribute or an item by its name do: getattr, operator, eval.

Each takes the reading, what calls another callable, and the arguments as values; see
:mod:`lora_lens.spectrum.usage.calls`.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from lora_lens.spectrum.usage.values import (
    NOTHING,
    Many,
    Named,
    Row,
    Value,
    each,
    inside,
    item_at,
    union,
    wrapped,
)

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading

Call = Callable[[object, list[Value], dict[str, Value]], Value]
GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
DEEPEST_PATH = 8
_CUTTING = "split rsplit partition rpartition strip lstrip rstrip replace lower upper"
TEXT = frozenset([*_CUTTING.split(), "format", "join", "removeprefix", "removesuffix"])


@dataclass(frozen=True, eq=False)
class Getter:
    """An ``operator.attrgetter``, ``itemgetter`` or ``methodcaller`` with what it was made of."""

    kind: type
    args: list[Value]
    kwargs: Mapping[str, Value]


def known_call(callee: object) -> Callable[[Reading, Call, list[Value], dict[str, Value]], Value] | None:
    """What stands for a call of ``callee``, where it is one of these ways."""
    if isinstance(callee, _MADE):
        return partial(_got, callee)
    if isinstance(callee, type) and callee in GETTERS:
        return partial(_made_getter, callee)
    return _KNOWN.get(id(callee))


def text_of(item: str, name: str, args: list[Value]) -> Value:
    """A text's method of known texts; of others the result is not known."""
    given = [_text(value) for value in args]
    if name not in TEXT or None in given:
        return NOTHING
    try:
        return wrapped(getattr(item, name)(*given))
    except (TypeError, ValueError, LookupError):
        return NOTHING


def _text(value: Value) -> str | list[str] | None:
    if len(value) != 1:
        return None
    if isinstance(value[0], Row):
        parts = [_text(place) for place in value[0].places]
        return parts if all(isinstance(part, str) for part in parts) else None
    return value[0] if isinstance(value[0], str) else None


def _attributes(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    names = [name for name in args[1] if isinstance(name, str)] if len(args) > 1 else []
    found = [reading.reader.attribute(item, name, reading.where) for item in args[0] for name in names]
    if not names:
        found = [_any_of(reading, item) for item in args[0]]
    return union(*found, *args[2:3])


def _any_of(reading: Reading, item: object) -> Value:
    """What an attribute may be whose name is not known."""
    if id(item) in reading.reader.layers:
        return (reading.reader.weight_of(item),)
    return tuple(item.children()) if isinstance(item, nn.Module) else NOTHING


def _items(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    keys = [key for key in args[1] if isinstance(key, str)] or [None]
    return union(*(item_at(item, key) for item in args[0] for key in keys))


def _own(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if not args:
        return (Named.of(reading.env),)
    return union(*(reading.reader.attribute(item, "__dict__", reading.where) for item in args[0]))


def _dict(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    known = [item for value in args for item in value]
    if "**" in kwargs or not all(isinstance(item, Named) for item in known) or len(known) < len(args):
        return (Many(union(*(each(each(value)) or each(value) for value in args), *kwargs.values())),)
    places = {name: place for item in known for name, place in item.places.items()}
    return (Named.of(places | kwargs),)


def _reduced(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Along a row with known places step by step, otherwise until nothing new is found."""
    rows = [item.places for item in args[1] if isinstance(item, Row)]
    known = len(rows) == 1 == len(args[1]) and len(rows[0]) <= 64
    steps = list(rows[0]) if known else [each(args[1])] * DEEPEST_PATH
    now = args[2] if len(args) > 2 else steps.pop(0) if steps else NOTHING
    for step in steps:
        found = union(*(call(function, [now, step], {}) for function in args[0]))
        after = found if known else union(now, found)
        if not known and len(after) == len(now):
            break
        now = after
    return now


def _made_getter(
    kind: type, reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    return (Getter(kind, args, kwargs),)


def _got(callee: object, reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    getter = callee if isinstance(callee, Getter) else _as_read(callee)
    of = args[0] if args else NOTHING
    if getter.kind is operator.methodcaller:
        methods = _attributes(reading, call, [of, *getter.args[:1]], {})
        return union(*(call(method, getter.args[1:], dict(getter.kwargs)) for method in methods))
    if getter.kind is operator.itemgetter:
        found = [_items(reading, call, [of, key], {}) for key in getter.args]
    else:
        found = [_along(reading, call, of, path) for path in getter.args]
    return found[0] if len(found) == 1 else (Row(tuple(found)),)


def _as_read(callee: object) -> Getter:
    make, given = callee.__reduce__()[:2]
    kwargs = {}
    if isinstance(make, partial):
        given, kwargs = (*make.args, *given), make.keywords
    named = {name: wrapped(value) for name, value in kwargs.items()}
    return Getter(type(callee), [wrapped(value) for value in given], named)


def _along(reading: Reading, call: Call, of: Value, path: Value) -> Value:
    texts = [text for text in path if isinstance(text, str)]
    rows: list[Value] = [(Row(tuple((part,) for part in text.split("."))),) for text in texts]
    return union(*(_reduced(reading, call, [(getattr,), row, of], {}) for row in rows or [(Many(NOTHING),)]))


def _called(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return union(*(call(function, args[1:], kwargs) for function in args[0]))


def _evaluated(reading: Reading, call: Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """A text that is known is read as code; of any other nothing is known, and it may do all there is."""
    scopes = [item for value in (*args[1:], *kwargs.values()) for item in value]
    text = _text(args[0]) if args else None
    if isinstance(text, str) and all(isinstance(scope, Named) for scope in scopes):
        try:
            body = ast.parse(text.strip()).body
        except SyntaxError:
            return NOTHING
        for scope in scopes:
            reading.env = reading.env | scope.places
        reading.run(body[:-1])
        if body and isinstance(body[-1], ast.Expr):
            return reading.value(body[-1].value)
        reading.run(body[-1:])
        return NOTHING
    for value in (*reading.env.values(), *args, *kwargs.values(), *map(wrapped, reading.outer.values())):
        _doubt(reading, value)
    return NOTHING


def _doubt(reading: Reading, value: Value) -> None:
    for item in value:
        for below in item.modules() if isinstance(item, nn.Module) else ():
            if id(below) in reading.reader.layers:
                reading.reader.report(below, f"is perhaps bypassed: {reading.where} runs a text as code")
        for part in inside(item):
            _doubt(reading, part)


_MADE = (Getter, *GETTERS)
_KNOWN = {
    id(callee): handler
    for handler, callees in {
        _attributes: (getattr, nn.Module.__getattr__, object.__getattribute__, inspect.getattr_static),
        _items: (operator.getitem,),
        _own: (vars, locals),
        _dict: (dict,),
        _reduced: (functools.reduce,),
        _called: (operator.call,) if hasattr(operator, "call") else (),
        _evaluated: (builtins.eval, builtins.exec),
    }.items()
    for callee in callees
}
