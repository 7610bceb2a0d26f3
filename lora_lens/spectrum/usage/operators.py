"""What Python's own functions do with modules: getattr, super, isinstance, zip, operator, functools, eval.

Each takes the reading and the arguments as values; see :mod:`lora_lens.spectrum.usage.calls`.
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
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import Linear
from torch import nn

from lora_lens.spectrum.usage.values import (
    NOTHING,
    Many,
    Named,
    Row,
    Super,
    Value,
    each,
    inside,
    items_at,
    text_of,
    texts_in,
    union,
    wrapped,
)

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading

Args = list[Value]
Kwargs = dict[str, Value]
Known = Callable[["Reading", Args, Kwargs], Value]
DEEPEST_PATH = 8
_CUTTING = "split rsplit partition rpartition strip lstrip rstrip replace lower upper"
TEXT = frozenset([*_CUTTING.split(), "format", "join", "removeprefix", "removesuffix"])


@dataclass(frozen=True, eq=False)
class Getter:
    """An ``operator.attrgetter``, ``itemgetter`` or ``methodcaller`` with what it was made of."""

    kind: type
    args: Args
    kwargs: Mapping[str, Value]


def known_call(callee: object) -> Known | None:
    """What stands for a call of ``callee``, where it is one of these."""
    if isinstance(callee, (Getter, *GETTERS)):
        return partial(_got, callee if isinstance(callee, Getter) else _as_read(callee))
    return _KNOWN.get(id(callee))


def method_of_text(item: str, name: str, args: Args) -> Value:
    """A text's method of known texts; of others the result is not known."""
    given = [_text_or_texts(value) for value in args]
    if name not in TEXT or None in given:
        return NOTHING
    try:
        return wrapped(getattr(item, name)(*given))
    except (TypeError, ValueError, LookupError):
        return NOTHING


def _text_or_texts(value: Value) -> str | list[str] | None:
    if len(value) == 1 and isinstance(row := value[0], Row):
        parts = [part for part in map(text_of, row.places) if part is not None]
        return parts if len(parts) == len(row.places) else None
    return text_of(value)


# --- attributes and items by name ---


def _attributes(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    names = texts_in(args[1]) if len(args) > 1 else []
    found = [reading.reader.attribute(item, name, reading.where) for item in args[0] for name in names]
    if not names:
        found = [_any_of(reading, item) for item in args[0]]
    return union(*found, *args[2:3])


def _any_of(reading: Reading, item: object) -> Value:
    """What an attribute may be whose name is not known."""
    for layer in reading.reader.layers_in((item,)):
        return (reading.reader.weight_of(layer),)
    return tuple(item.children()) if isinstance(item, nn.Module) else NOTHING


def _has(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    for layer in reading.reader.layers_in(args[0]):
        for name in texts_in(union(*args[1:])):
            reading.reader.attribute(layer, name, reading.where)
    return NOTHING


def _items(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    return items_at(args[0], args[1])


def _own(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    if not args:
        return (Named.of(reading.env),)
    return union(*(reading.reader.attribute(item, "__dict__", reading.where) for item in args[0]))


def _made_getter(kind: type, reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    return (Getter(kind, args, kwargs),)


def _as_read(callee: Any) -> Getter:
    make, given = callee.__reduce__()[:2]
    named: Mapping[str, object] = {}
    if isinstance(make, partial):
        given, named = (*make.args, *given), make.keywords
    return Getter(
        type(callee), [*map(wrapped, given)], {name: wrapped(value) for name, value in named.items()}
    )


def _got(getter: Getter, reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    of = args[0] if args else NOTHING
    if getter.kind is operator.methodcaller:
        methods = _attributes(reading, [of, *getter.args[:1]], {})
        return union(*(reading.called(method, getter.args[1:], dict(getter.kwargs)) for method in methods))
    if getter.kind is operator.itemgetter:
        found = [_items(reading, [of, key], {}) for key in getter.args]
    else:
        found = [_along(reading, of, path) for path in getter.args]
    return found[0] if len(found) == 1 else (Row.of(*found),)


def _along(reading: Reading, of: Value, path: Value) -> Value:
    rows: list[Many] = [Row.of(*((part,) for part in text.split("."))) for text in texts_in(path)]
    return union(*(_reduced(reading, [(getattr,), (row,), of], {}) for row in rows or [Many(NOTHING)]))


# --- classes ---


def _super(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    kinds = [kind for kind in args[0] if isinstance(kind, type)] if args else []
    this = args[1] if len(args) > 1 else next(iter(reading.env.values()), NOTHING)
    owner = kinds[0] if kinds else reading.outer.get("__class__")
    return tuple(Super(owner, item) for item in this) if isinstance(owner, type) else NOTHING


def _type(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    if len(args) != 1:
        return _used(reading, args, kwargs)
    for layer in reading.reader.layers_in(args[0]):
        reading.reader.report(layer, f"is needed as it is: {reading.where} asks for its type")
    return union(*((type(item),) for item in args[0] if isinstance(item, nn.Module)))


def _is_instance(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    asked = (kind for item in union(*args[1:]) for kind in (each((item,)) or (item,)))
    kinds = tuple(kind for kind in asked if isinstance(kind, type))
    for layer in reading.reader.layers_in(args[0]):
        if isinstance(layer, kinds) and not issubclass(Linear, kinds):
            name = type(layer).__name__
            reading.reader.report(layer, f"is needed as it is: {reading.where} asks whether it is a {name}")
    return NOTHING


# --- functions of functions ---


def _partial(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    _called(reading, args, kwargs)
    return NOTHING


def _mapped(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    return (Many(_called(reading, [*args[:1], *map(each, args[1:])], kwargs)),)


def _filtered(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    kept = [each(value) for value in args[1:]]
    found = _called(reading, [*args[:1], *kept], kwargs)
    return (Many(kept[0] if kept else found),)


def _reduced(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    """Along a row with known places step by step, otherwise until nothing new is found."""
    rows = [item.places for item in args[1] if isinstance(item, Row)]
    known = len(rows) == 1 == len(args[1]) and len(rows[0]) <= 64
    steps = list(rows[0]) if known else [each(args[1])] * DEEPEST_PATH
    now = args[2] if len(args) > 2 else steps.pop(0) if steps else NOTHING
    for step in steps:
        found = _called(reading, [args[0], now, step], {})
        after = found if known else union(now, found)
        if not known and len(after) == len(now):
            break
        now = after
    return now


def _called(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    return union(*(reading.called(function, args[1:], kwargs) for value in args[:1] for function in value))


# --- containers ---


def _dict(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    items = [item for value in args for item in value]
    known = [item for item in items if isinstance(item, Named)]
    if "**" in kwargs or len(known) < max(len(items), len(args)):
        return (Many(union(*(each(each(value)) or each(value) for value in args), *kwargs.values())),)
    places = {name: place for item in known for name, place in item.places.items()}
    return (Named.of({**places, **kwargs}),)


def _used(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    reading.reader.hand_over(union(*args, *kwargs.values()), reading.where)
    return NOTHING


# --- texts as code ---


def _evaluated(reading: Reading, args: Args, kwargs: Kwargs) -> Value:
    """A text that is known is read as code; of any other nothing is known, and it may do all there is."""
    scopes = union(*args[1:], *kwargs.values())
    named = [scope for scope in scopes if isinstance(scope, Named)]
    text = text_of(args[0]) if args else None
    if text is not None and len(named) == len(scopes):
        try:
            body = ast.parse(text.strip()).body
        except SyntaxError:
            return NOTHING
        for scope in named:
            reading.env = {**reading.env, **scope.places}
        reading.run(body[:-1])
        if body and isinstance(body[-1], ast.Expr):
            return reading.value(body[-1].value)
        reading.run(body[-1:])
        return NOTHING
    _doubt(
        reading, union(*reading.env.values(), *args, *kwargs.values(), *map(wrapped, reading.outer.values()))
    )
    return NOTHING


def _doubt(reading: Reading, value: Value) -> None:
    for item in value:
        for layer in reading.reader.layers_in(item.modules()) if isinstance(item, nn.Module) else ():
            reading.reader.report(layer, f"is perhaps bypassed: {reading.where} runs a text as code")
        _doubt(reading, inside(item))


GETTERS: tuple[type, ...] = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_CALLEES: dict[Known, tuple[object, ...]] = {
    _attributes: (getattr, nn.Module.__getattr__, object.__getattribute__, inspect.getattr_static),
    _has: (hasattr,),
    _items: (operator.getitem,),
    _own: (vars, locals),
    **{partial(_made_getter, kind): (kind,) for kind in GETTERS},
    _super: (super,),
    _type: (type,),
    _is_instance: (isinstance,),
    _partial: (partial,),
    _mapped: (map,),
    _filtered: (filter,),
    _reduced: (functools.reduce,),
    _called: (operator.call,) if hasattr(operator, "call") else (),
    _dict: (dict,),
    lambda _, args, kwargs: (Many((Row.of(*map(each, args)),)),): (zip,),
    lambda _, args, kwargs: (Many((Row.of(NOTHING, each(union(*args[:1]))),)),): (enumerate,),
    lambda _, args, kwargs: each(union(*args[:1])): (next,),
    lambda _, args, kwargs: (Many(each(union(*args[:1]))),): (list, tuple, set, reversed, iter, sorted),
    lambda _, args, kwargs: NOTHING: (
        issubclass,
        len,
        id,
        callable,
        print,
        str,
        repr,
        bool,
        range,
        int,
        float,
    ),
    _evaluated: (builtins.eval, builtins.exec),
}
_KNOWN = {id(callee): known for known, callees in _CALLEES.items() for callee in callees}
