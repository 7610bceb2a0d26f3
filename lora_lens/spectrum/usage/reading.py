"""What a function's code does with the modules that it is given, by reading it instead of running it.

A small abstract interpreter over syntax trees. A value is the set of real objects that an expression may
be, as far as they matter here: modules, weights of layers, functions, and what holds them; of everything
else nothing is known, and the value is empty. Both branches of every condition are followed.
"""

from __future__ import annotations

import functools
import types
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from lora_lens.spectrum.usage.source import HARMLESS, inside_decorator
from lora_lens.spectrum.usage.steps import Reading
from lora_lens.spectrum.usage.values import (
    NOTHING,
    UNKNOWN,
    InnerFunction,
    Made,
    Many,
    MethodOf,
    Named,
    Super,
    Value,
    Weight,
    ids,
    inside,
    named_ids,
    union,
    wrapped,
)

FORWARDED = {"weight", "bias", "in_features", "out_features"}  # PEFT's layer answers these as its base does
COMMON = vars(nn.Module()).keys() - {"_parameters", "_buffers"}  # every module has them
CHANGING = {"training", "gradient_checkpointing"}  # settings that are other ones from call to call
SLOTS = (types.MemberDescriptorType, type(vars(namedtuple("Pair", "one"))["one"]))
OF_C = (types.MethodDescriptorType, types.WrapperDescriptorType)
DEEPEST = 40


class CodeReader:
    """Follows functions from where a model's forward enters them.

    Args:
        layers: by the id of the module; only what is done with these is reported.

    Attributes:
        reasons: by the id of a layer, how it is used in another way than by calling it.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self.layers = layers
        self.reasons: dict[int, str] = {}
        self.weights: dict[int, Weight] = {}
        self.seen: dict[tuple[object, ...], Value] = {}
        self.depth = 0

    def enter(
        self, function: object, args: Sequence[Value], kwargs: Mapping[str, Value] | None = None
    ) -> Value:
        """What a call of a Python function returns; empty for any other callable."""
        if isinstance(function, types.MethodType):
            return self.enter(function.__func__, [(function.__self__,), *args], kwargs)
        given, name = union(*args, *(kwargs or {}).values()), getattr(function, "__qualname__", "a function")
        if (inner := inside_decorator(function)) is not None:
            self.use(given, name)  # transformers' decorators swap kernels in
            if isinstance(function, types.FunctionType) and not is_of_library(function):
                Reading(self, function, args, kwargs or {}).result()
            return self.enter(inner, args, kwargs)
        if isinstance(function, partial):
            return self.enter(function.func, [*map(wrapped, function.args), *args], kwargs)
        if not isinstance(function, types.FunctionType) or is_of_torch(function) or self.depth > DEEPEST:
            self.hand_over(given, name)
            return NOTHING
        key = (function, tuple(ids(v) for v in args), named_ids(kwargs or {}))
        if key not in self.seen:
            self.seen[key] = NOTHING
            self.depth += 1
            self.seen[key] = Reading(self, function, args, kwargs or {}).result()
            self.depth -= 1
        return self.seen[key]

    def report(self, layer: nn.Module, why: str) -> None:
        self.reasons.setdefault(id(layer), why)

    def weight_of(self, layer: nn.Module) -> Weight:
        return self.weights.setdefault(id(layer), Weight(layer))

    def layers_in(self, value: Iterable[object]) -> list[nn.Module]:
        return [self.layers[id(item)] for item in value if id(item) in self.layers]

    def use(self, value: Value, where: str) -> None:
        """Note that the values of the weights in ``value`` count from here on."""
        for item in value:
            if isinstance(item, Weight):
                self.report(item.layer, f"is bypassed: {where} reads its weight without calling it")
            self.use(inside(item), where)

    def hand_over(self, value: Value, where: str) -> None:
        """Give ``value`` to something that cannot be read: it uses weights, and calls what can be called."""
        self.use(value, where)
        for item in value:
            if isinstance(item, types.MethodType) and isinstance(item.__self__, nn.Module):
                self.use(self.enter(item, []), where)
            elif isinstance(item, InnerFunction):
                self.use(item.call.of_inner(item, [], {}), where)

    def attribute(self, item: object, name: str, where: str) -> Value:
        """What ``item.name`` may be."""
        if isinstance(item, Weight):
            if name == "data":
                return (item,)
            if name not in HARMLESS:
                self.use((item,), where)
            return NOTHING
        if isinstance(item, Made):
            return union(self._of_class(item.kind.__mro__, name, item), item.held)
        if isinstance(item, nn.Module) and name == "__class__":
            return (type(item),)
        if isinstance(item, nn.Module) and id(item) in self.layers:
            return self._of_layer(item, name, where)
        if isinstance(item, nn.Module):
            if name == "__dict__":
                return wrapped(vars(item))
            if name == "_modules":
                return (Named.of({key: wrapped(part) for key, part in item._modules.items()}),)
            if name in item._modules:
                return wrapped(item._modules[name])
            if name in item._parameters or name in item._buffers:
                return NOTHING
        if isinstance(item, Super):
            kin = type(item.of).__mro__
            after = kin[kin.index(item.owner) + 1 :] if item.owner in kin else ()
            return self._of_class(after, name, item.of)
        if isinstance(item, types.ModuleType):
            return wrapped(item.__dict__.get(name))
        if isinstance(item, type) and issubclass(item, torch.autograd.Function) and name == "apply":
            return (MethodOf(item, name),)
        if isinstance(item, type):
            return self._of_class(item.__mro__, name, item)
        if isinstance(item, Many):
            return (MethodOf(item, name),)
        own = getattr(item, "__dict__", {})
        if name == "__dict__":
            return wrapped(own)
        if name in own:
            return wrapped(own[name])
        found = self._of_class(type(item).__mro__, name, item)
        rest = getattr(type(item), "__getattr__", None)
        if found or hasattr(type(item), name) or rest in (None, nn.Module.__getattr__):
            return found
        return self.enter(rest, [(item,), (name,)])

    def setting(self, owners: Value, name: str) -> object:
        """A number, text, flag or None that the only one of ``owners`` has."""
        own = getattr(owners[0], "__dict__", {}) if len(owners) == 1 else {}
        value = own.get(name, UNKNOWN)
        plain = value is None or isinstance(value, (bool, int, float, str))
        return value if plain and name not in CHANGING else UNKNOWN

    def _of_layer(self, layer: nn.Module, name: str, where: str) -> Value:
        if name == "weight":
            return (self.weight_of(layer),)
        if hasattr(nn.Module, name) and name != "__dict__":
            return (MethodOf(layer, name),)
        if name not in FORWARDED and name not in COMMON and hasattr(layer, name):
            self.report(layer, f"is needed as it is: {where} reads its {name}, which PEFT's layer lacks")
        return NOTHING

    def _of_class(self, kin: Iterable[type], name: str, of: object) -> Value:
        found = next((vars(kind)[name] for kind in kin if name in vars(kind)), None)
        if isinstance(of, nn.Module) and found is not None and found is vars(nn.Module).get(name):
            return (MethodOf(of, name),)
        if isinstance(found, (property, functools.cached_property)):
            read = found.fget if isinstance(found, property) else found.func
            return NOTHING if isinstance(of, type) else self.enter(read, [(of,)])
        if isinstance(found, SLOTS) and not isinstance(of, type):
            return wrapped(getattr(of, name, None))
        if isinstance(found, staticmethod):
            return wrapped(found.__func__)
        if isinstance(found, classmethod):
            kind = of if isinstance(of, type) else type(of)
            return (types.MethodType(found.__func__, kind),)
        if isinstance(found, types.FunctionType) and not isinstance(of, type):
            return (types.MethodType(found, of),)
        if isinstance(found, OF_C) and not isinstance(of, type):
            return (MethodOf(of, name),)
        return wrapped(found)


def is_of_library(decorator: object) -> bool:
    """Decorators of torch and transformers give on what they are given; others may do anything."""
    known = getattr(decorator, "__globals__", {"__name__": "torch"})["__name__"]
    return known.partition(".")[0] in ("torch", "transformers", "accelerate", "contextlib", "functools")


def is_of_torch(function: types.FunctionType) -> bool:
    """torch's own functions take what they are given; of its modules those with layers inside are read."""
    module = function.__module__ or ""
    return module.partition(".")[0] in ("torch", "torchgen") and not module.startswith("torch.nn.modules.")
