"""What a call in code does, as far as modules and weights go; see :mod:`lora_lens.spectrum.usage.reading`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Container
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import Linear
from torch import nn

from lora_lens.spectrum.usage.operators import known_call, text_of
from lora_lens.spectrum.usage.values import (
    NOTHING,
    InnerFunction,
    Made,
    Many,
    MethodOf,
    Named,
    Row,
    Super,
    Value,
    each,
    holds,
    item_at,
    matters,
    union,
)

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading


def called(reading: Reading, callee: object, args: list[Value], kwargs: dict[str, Value]) -> Value:
    reader, given = reading.reader, (*args, *kwargs.values())
    known = callee if isinstance(callee, (type, types.BuiltinFunctionType)) else None
    if (run := known_call(callee)) is not None:
        return run(reading, partial(called, reading), args, kwargs)
    if (method := _unbound(callee)) is not None and args:
        return _of_each(reading, method, args, kwargs)
    if isinstance(callee, MethodOf):
        return _method(reading, callee, args, kwargs)
    if isinstance(callee, InnerFunction):
        return callee.call.of_inner(callee, args, kwargs)
    if isinstance(callee, nn.Module):
        if id(callee) in reader.layers:
            _check_keywords(reading, callee, args, kwargs)
        elif any(map(matters, given)) or (kwargs and _passes_on(callee, reader.layers)):
            return reader.enter(types.MethodType(type(callee).forward, callee), args, kwargs)
    elif isinstance(callee, Made):
        calls = [f for f in reader.attribute(callee, "__call__", reading.where) if f not in callee.held]
        return union(*(called(reading, function, args, kwargs) for function in calls))
    elif known is super:
        owner = next((kind for kind in args[0] if isinstance(kind, type)), None) if args else None
        this = args[1] if len(args) > 1 else next(iter(reading.env.values()), NOTHING)
        owner = owner or reading.outer.get("__class__")
        return tuple(Super(owner, item) for item in this if owner)
    elif known is type and len(args) == 1:
        for layer in (item for item in args[0] if id(item) in reader.layers):
            reader.report(layer, f"is needed as it is: {reading.where} asks for its type")
        return union(*((type(item),) for item in args[0] if isinstance(item, nn.Module)))
    elif known is isinstance and len(args) == 2:
        kinds = [k for item in args[1] for k in (each((item,)) or (item,)) if isinstance(k, type)]
        for layer in (item for item in args[0] if id(item) in reader.layers):
            if isinstance(layer, tuple(kinds)) and not issubclass(Linear, tuple(kinds)):
                name = type(layer).__name__
                reader.report(layer, f"is needed as it is: {reading.where} asks whether it is a {name}")
    elif known in (partial, map, filter) and args:
        rest = args[1:] if known is partial else [each(value) for value in args[1:]]
        found = union(*(called(reading, function, rest, kwargs) for function in args[0]))
        return NOTHING if known is partial else (Many(rest[0] if known is filter and rest else found),)
    elif known in _PASSING:
        return _PASSING[known](args)
    elif known is hasattr and len(args) > 1:
        for item in (i for i in args[0] if id(i) in reader.layers):
            for name in (n for n in args[1] if isinstance(n, str)):
                reader.attribute(item, name, reading.where)
    elif known in _ASKING:
        return NOTHING
    elif isinstance(callee, (types.FunctionType, types.MethodType, partial)):
        owner = getattr(callee, "__self__", None)
        if holds(owner) or holds(callee) or isinstance(callee, partial) or any(map(matters, given)):
            return reader.enter(callee, args, kwargs)
    elif known is None and isinstance(run := vars(type(callee)).get("__call__"), types.FunctionType):
        return called(reading, types.MethodType(run, callee), args, kwargs)
    else:
        for value in given:
            reader.hand_over(value, reading.where)
        foreign = isinstance(callee, type) and not issubclass(callee, (nn.Module, torch.Tensor))
        if foreign and any(map(matters, given)):
            return (Made(callee, union(*given)),)
    return NOTHING


def _passes_on(module: nn.Module, layers: Container[int]) -> bool:
    """Whether a module takes whatever it is given, as those do that stand around one layer."""
    if not any(id(child) in layers for child in module._modules.values()):
        return False
    flags = getattr(getattr(type(module).forward, "__code__", None), "co_flags", 0)
    return bool(flags & inspect.CO_VARARGS and flags & inspect.CO_VARKEYWORDS)


def _unbound(callee: object) -> str | None:
    """The name of a method that is called with what it is a method of, as ``dict.get(table, key)`` is."""
    if isinstance(callee, (types.MethodDescriptorType, types.WrapperDescriptorType)):
        return callee.__name__
    name = callee.__name__ if isinstance(callee, types.FunctionType) else None
    return name if name in _OF_MODULES and vars(nn.Module).get(name) is callee else None


def _of_each(reading: Reading, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
    owners = [item for item in args[0] if isinstance(item, (Many, Row, nn.Module, str))]
    if not owners:
        for value in (*args, *kwargs.values()):
            reading.reader.hand_over(value, reading.where)
    return union(*(_method(reading, MethodOf(item, name), args[1:], kwargs) for item in owners))


def _check_keywords(reading: Reading, layer: nn.Module, args: list[Value], kwargs: dict[str, Value]) -> None:
    """PEFT's layer names its input x, whatever the layer's own forward does."""
    code = getattr(type(layer).forward, "__code__", None)
    name = code.co_varnames[1] if code is not None and code.co_argcount > 1 else "x"
    if name != "x" and (name in kwargs or ("**" in kwargs and not args)):
        why = f"is called by keyword: {reading.where} gives it {name}=, which PEFT's layer does not take"
        reading.reader.report(layer, why)


def _method(reading: Reading, of: MethodOf, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Calls of torch's own methods of modules, and of lists' and dicts'."""
    reader, item, name = reading.reader, of.item, of.name
    if isinstance(item, type):  # MyFunction.apply, a torch.autograd.Function
        context = [NOTHING] if item.setup_context is torch.autograd.Function.setup_context else []
        return reader.enter(item.forward, [*context, *args])
    if isinstance(item, str):
        return NOTHING if kwargs else text_of(item, name, args)
    if not isinstance(item, nn.Module):
        for value in args:  # what is put into a list is not followed
            reader.use(value, reading.where)
        return _of_container(item, name, args)
    if name in ("forward", "__call__") and id(item) in reader.layers:
        _check_keywords(reading, item, args, kwargs)
    if name in ("parameters", "named_parameters", "state_dict", "get_parameter"):
        below = tuple(reader.weight_of(m) for m in item.modules() if id(m) in reader.layers)
        if name == "get_parameter" and args:
            names = [n.rpartition(".")[0] for n in args[0] if isinstance(n, str)]
            known = dict(item.named_modules()) if names else {}
            return tuple(w for w in below if not names or w.layer in [known.get(n) for n in names])
        return (Many((Row((NOTHING, below)),) if name == "named_parameters" else below),)
    if name == "get_submodule":
        names = [n for n in args[0] if isinstance(n, str)] if args else []
        known = dict(item.named_modules())
        return tuple(known[n] for n in names if n in known) or tuple(item.modules())
    if name in ("children", "named_children", "modules", "named_modules", "__iter__"):
        some = tuple(item.modules() if "modules" in name else item.children())
        return (Many((Row((NOTHING, some)),) if "named" in name else some),)
    if name in ("__getattr__", "__getattribute__") and args:
        return union(*(reader.attribute(item, n, reading.where) for n in args[0] if isinstance(n, str)))
    if name == "apply" and args:
        for function in args[0]:
            called(reading, function, [tuple(item.modules())], {})
        return (item,)
    for value in args:
        reader.hand_over(value, reading.where)
    # to(), half() and the like return the module itself
    return (item,) if name in ("to", "float", "half", "bfloat16", "double", "eval", "train") else NOTHING


def _of_container(item: object, name: str, args: list[Value]) -> Value:
    elements = each((item,))
    if name == "items":
        return (Many((Row((NOTHING, elements)),)),)
    if name == "keys":
        return (Many(tuple(item.places) if isinstance(item, Named) else elements),)
    if name in ("get", "pop", "setdefault", "__getitem__"):
        keys = [key for key in args[0] if isinstance(key, str)] if args else []
        return union(*(item_at(item, key) for key in keys or [None]), *args[1:2])
    return (Many(elements),)


def _zipped(args: list[Value]) -> Value:
    return (Many((Row(tuple(each(value) for value in args)),)),)


_PASSING: dict[object, Callable[[list[Value]], Value]] = {
    zip: _zipped,
    enumerate: lambda args: (Many((Row((NOTHING, each(args[0]))),)),),
    next: lambda args: each(args[0]),
    **dict.fromkeys(
        (list, tuple, set, reversed, iter, sorted), lambda args: (Many(each(args[0]) if args else NOTHING),)
    ),
}
_BELOW = "parameters named_parameters children named_children modules named_modules state_dict"
_OF_MODULES = frozenset([*_BELOW.split(), "get_parameter", "get_submodule", "apply", "__getattr__"])
_ASKING = {issubclass, len, id, callable, print, str, repr, bool, range, int, float}
