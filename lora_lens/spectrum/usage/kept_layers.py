"""Layers that something else than their place in the model keeps: PEFT puts its own only in that place.

Lists, dicts, functions, and objects of ordinary Python classes are looked into, as far as they are small.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice

from torch import Tensor, nn

from lora_lens.spectrum.usage.source import mentioned
from lora_lens.spectrum.usage.values import closure_of

DEEPEST, MOST = 8, 4000  # levels of objects in objects, and how many of them one attribute is searched for
SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None)})
ROWS = (list, tuple, set, frozenset, deque)
FOREIGN = {"torch", "numpy", "accelerate", "torchgen"}  # optimizers, hooks and the like keep what they act on
OF_PYTHON = 1 << 9  # the flag of classes that a class statement made


def memory(weight: Tensor) -> object:
    """Where the values of a tensor lie, by which views and copies by reference are known."""
    plain = type(weight.data) is Tensor and not weight.is_meta and weight.numel()
    return (weight.device, weight.data_ptr()) if plain else id(weight)


class Keepers:
    """Finds the layers that modules also keep in their attributes, or whose weights they keep.

    Args:
        modules: the ids of all modules of the model: PEFT's layers come to be in these.
        layers: those that count.
    """

    def __init__(self, modules: Iterable[int], layers: Iterable[nn.Module]) -> None:
        self.modules = frozenset(modules)
        self.layers = {id(layer): layer for layer in layers}
        weights = ((layer.weight, layer) for layer in self.layers.values())
        self.weights = {memory(weight): layer for weight, layer in weights if isinstance(weight, Tensor)}
        self.known: dict[int, list[nn.Module]] = {}  # an object that many modules keep is searched once

    def kept(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """(layer, attribute) for each layer other than the module that it keeps besides its submodules."""
        for key, value in vars(module).items():
            if type(value) in SIMPLE or key in ("_modules", "_parameters"):
                continue
            if isinstance(value, dict) and not value:
                continue
            if id(value) not in self.known:
                self.known[id(value)] = list(self._within(value))
            yield from ((layer, key) for layer in self.known[id(value)] if layer is not module)

    def _within(self, value: object) -> Iterator[nn.Module]:
        seen: set[int] = set()
        level = [value]
        for _ in range(DEEPEST):
            after: list[object] = []
            for item in level:
                if type(item) in SIMPLE or id(item) in seen or len(seen) > MOST:
                    continue
                seen.add(id(item))
                layer = self.layers.get(id(item))
                if layer is None and isinstance(item, Tensor):
                    layer = self.weights.get(memory(item))
                if layer is not None:
                    yield layer
                elif id(item) not in self.modules:
                    after += _inside(item)
            level = after


def _inside(item: object) -> Iterator[object]:
    """What an object keeps, as far as that is known."""
    if isinstance(item, (dict, types.MappingProxyType)):
        for pair in islice(item.items(), 1000):
            yield from pair
    elif isinstance(item, ROWS):
        yield from islice(item, 1000)
    elif isinstance(item, partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, types.MethodType):
        yield item.__self__
    elif isinstance(item, types.FunctionType):
        yield from (item.__defaults__, item.__kwdefaults__)
        for held in closure_of(item).values():
            yield from mentioned(item.__code__, held) if isinstance(held, nn.Module) else ()
            yield held
    elif type(item) is weakref.ref:
        yield item()
    if _is_plain(type(item).__mro__) or type(item) is types.SimpleNamespace:
        yield from getattr(item, "__dict__", {}).values()
        yield from gc.get_referents(item)  # what is in slots


@lru_cache(maxsize=4096)
def _is_plain(kin: tuple[type, ...]) -> bool:
    """Whether a class statement made the class, of objects that do not keep what a whole model is made of."""
    kind = kin[0]
    known = kind.__module__.partition(".")[0] in FOREIGN and not issubclass(kind, nn.Module)
    return bool(kind.__flags__ & OF_PYTHON) and not known and not issubclass(kind, (type, Tensor))
