"""Small modules with an object beside that keeps one of their layers, and some that keep none."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

from reading_models import D, Layers
from torch import Tensor, nn

Pair = namedtuple("Pair", "layer scale")


class Branch:
    def __init__(self, layer: object) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Data:
    layers: dict[str, object] = field(default_factory=dict)


class Slots:
    __slots__ = ("__hidden", "layer")

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.__hidden = None, layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.__hidden(x)


class Derived(Slots):
    pass


def through(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def in_closure(*kept: object):
    return lambda x: kept[0].layer(x)


# What b is kept in, and how it is called from there.
KEPT = {
    "object": (Branch, lambda kept, x: kept.layer(x)),
    "object in object": (lambda b: Branch(Branch(b)), lambda kept, x: kept.layer.layer(x)),
    "dataclass": (lambda b: Data({"b": b}), lambda kept, x: kept.layers["b"](x)),
    "objects in a dict of lists": (lambda b: {"all": [Branch(b)]}, lambda kept, x: kept["all"][0].layer(x)),
    "namedtuple": (lambda b: Pair(b, 1), lambda kept, x: kept.layer(x)),
    "namespace": (lambda b: SimpleNamespace(layer=b), lambda kept, x: kept.layer(x)),
    "slots": (Slots, lambda kept, x: kept(x)),
    "inherited slots": (Derived, lambda kept, x: kept(x)),
    "deque": (lambda b: deque([b]), lambda kept, x: kept[0](x)),
    "ordered": (lambda b: OrderedDict(b=(b,)), lambda kept, x: kept["b"][0](x)),
    "key": (lambda b: {b: 1}, lambda kept, x: next(iter(kept))(x)),
    "weak": (weakref.ref, lambda kept, x: kept()(x)),
    "module beside": (lambda b: [nn.Sequential(b)], lambda kept, x: kept[0](x)),
    "partial": (lambda b: functools.partial(through, b), lambda kept, x: kept(x)),
    "method": (lambda b: Branch(b).run, lambda kept, x: kept(x)),
    "default": (lambda b: lambda x, layer=b: layer(x), lambda kept, x: kept(x)),
    "closure": (lambda b: in_closure(Branch(b)), lambda kept, x: kept(x)),
    "weight": (lambda b: Branch(b.weight), lambda kept, x: x @ kept.layer.T),
}


class Keeper(Layers):
    def __init__(self, how: str) -> None:
        super().__init__()
        keep, self.run = KEPT[how]
        self.__dict__["branch"] = keep(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.branch, self.a(x))


class Parent:
    """Knows the whole model, whose own modules PEFT replaces."""

    __slots__ = ("names", "net", "sizes")

    def __init__(self, net: nn.Module) -> None:
        self.net, self.sizes, self.names = net, list(range(D)), {"b": "b"}


class Knowing(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.parent, self.counts = Parent(self), Branch({i: [i] for i in range(9)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parent.net.b(self.a(x))


class ReadThroughParent(Knowing):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.parent.net.b.weight
