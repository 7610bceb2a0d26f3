"""What a call in code does, as far as modules and weights go; see :mod:`lora_lens.spectrum.usage.reading`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Container
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_lens.spectrum.usage.operators import Args, Kwargs, known_call, method_of_text
from lora_lens.spectrum.usage.values import (
    NOTHING,
    InnerFunction,
    Made,
    Many,
    MethodOf,
    Named,
    Row,
    Value,
    each,
    holds,
    items_at,
    matters,
    texts_in,
    union,
)

if TYPE_CHECKING:
    from lora_lens.spectrum.usage.steps import Reading


def called(reading: Reading, callee: object, args: Args, kwargs: Kwargs) -> Value:
    reader, given = reading.reader, union(*args, *kwargs.values())
    if (run := known_call(callee)) is not None:
        return run(reading, args, kwargs)
    if (method := _unbound(callee)) is not None and args:
        return _of_each(reading, method, args, kwargs)
    if isinstance(callee, MethodOf):
        return _method(reading, callee, args, kwargs)
    if isinstance(callee, InnerFunction):
        return callee.call.of_inner(callee, args, kwargs)
    if isinstance(callee, nn.Module):
        if id(callee) in reader.layers:
            _check_keywords(reading, callee, args, kwargs)
        elif matters(given) or (kwargs and _passes_on(callee, reader.layers)):
            return reader.enter(types.MethodType(type(callee).forward, callee), args, kwargs)
    elif isinstance(callee, Made):
        calls = [f for f in reader.attribute(callee, "__call__", reading.where) if f not in callee.held]
        return union(*(called(reading, function, args, kwargs) for function in calls))
    elif isinstance(callee, (types.FunctionType, types.MethodType, partial)):
        owner = getattr(callee, "__self__", None)
        if holds(owner) or holds(callee) or isinstance(callee, partial) or matters(given):
            return reader.enter(callee, args, kwargs)
    elif not isinstance(callee, (type, types.BuiltinFunctionType)) and isinstance(
        run := vars(type(callee)).get("__call__"), types.FunctionType
    ):
        return called(reading, types.MethodType(run, callee), args, kwargs)
    else:
        reader.hand_over(given, reading.where)
        foreign = callee if isinstance(callee, type) else nn.Module
        if not issubclass(foreign, (nn.Module, torch.Tensor)) and matters(given):
            return (Made(foreign, given),)
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


def _of_each(reading: Reading, name: str, args: Args, kwargs: Kwargs) -> Value:
    owners = [item for item in args[0] if isinstance(item, (Many, nn.Module, str))]
    if not owners:
        reading.reader.hand_over(union(*args, *kwargs.values()), reading.where)
    return union(*(_method(reading, MethodOf(item, name), args[1:], kwargs) for item in owners))


def _check_keywords(reading: Reading, layer: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """PEFT's layer names its input x, whatever the layer's own forward does."""
    code = getattr(type(layer).forward, "__code__", None)
    name = code.co_varnames[1] if code is not None and code.co_argcount > 1 else "x"
    if name != "x" and (name in kwargs or ("**" in kwargs and not args)):
        why = f"is called by keyword: {reading.where} gives it {name}=, which PEFT's layer does not take"
        reading.reader.report(layer, why)


def _method(reading: Reading, of: MethodOf, args: Args, kwargs: Kwargs) -> Value:
    """Calls of torch's own methods of modules, and of lists' and dicts'."""
    reader, item, name = reading.reader, of.item, of.name
    if isinstance(item, type) and issubclass(item, torch.autograd.Function):  # MyFunction.apply
        context = [NOTHING] if item.setup_context is torch.autograd.Function.setup_context else []
        return reader.enter(item.forward, [*context, *args])
    if isinstance(item, str):
        return NOTHING if kwargs else method_of_text(item, name, args)
    if not isinstance(item, nn.Module):
        reader.use(union(*args), reading.where)  # what is put into a list is not followed
        return _of_container(item, name, args)
    names = texts_in(args[0]) if args else []
    if name in ("forward", "__call__") and id(item) in reader.layers:
        _check_keywords(reading, item, args, kwargs)
    if name in ("parameters", "named_parameters", "state_dict", "get_parameter"):
        below = tuple(map(reader.weight_of, reader.layers_in(item.modules())))
        if name == "get_parameter" and args:
            known = dict(item.named_modules())
            asked = [known.get(n.rpartition(".")[0]) for n in names]
            return tuple(weight for weight in below if not names or weight.layer in asked)
        return (Many((Row.of(NOTHING, below),) if name == "named_parameters" else below),)
    if name == "get_submodule":
        known = dict(item.named_modules())
        return tuple(known[n] for n in names if n in known) or tuple(item.modules())
    if name in ("children", "named_children", "modules", "named_modules", "__iter__"):
        some = tuple(item.modules() if "modules" in name else item.children())
        return (Many((Row.of(NOTHING, some),) if "named" in name else some),)
    if name in ("__getattr__", "__getattribute__") and args:
        return union(*(reader.attribute(item, n, reading.where) for n in names))
    if name == "apply" and args:
        for function in args[0]:
            called(reading, function, [tuple(item.modules())], {})
        return (item,)
    reader.hand_over(union(*args), reading.where)
    # to(), half() and the like return the module itself
    return (item,) if name in ("to", "float", "half", "bfloat16", "double", "eval", "train") else NOTHING


def _of_container(item: object, name: str, args: Args) -> Value:
    elements = each((item,))
    if name == "items":
        return (Many((Row.of(NOTHING, elements),)),)
    if name == "keys":
        return (Many(tuple(item.places) if isinstance(item, Named) else elements),)
    if name in ("get", "pop", "setdefault", "__getitem__"):
        return union(items_at((item,), union(*args[:1])), *args[1:2])
    return (Many(elements),)


_BELOW = "parameters named_parameters children named_children modules named_modules state_dict"
_OF_MODULES = frozenset([*_BELOW.split(), "get_parameter", "get_submodule", "apply", "__getattr__"])
