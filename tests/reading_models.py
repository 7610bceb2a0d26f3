"""Small modules that use their layers in every way but calling them, and some that only look so."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 8


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def by_weight(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight)


def by_weight(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


def times(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight.T


def rows_of(weight: Tensor) -> int:
    return weight.shape[0]


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, layer: nn.Module) -> Tensor:
        return x @ layer.weight


class Alias(Layers):
    def forward(self, x):
        layer = self.a
        w = layer.weight
        return F.linear(self.b(x), w)


class Loop(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight)
        return self.a(x)


class Index(Layers):
    def forward(self, x):
        return F.linear(self.layers[0](x), self.layers[-1].weight)


class ByName(Layers):
    def forward(self, x):
        return F.linear(x, getattr(self, "a").weight) @ getattr(self.b, "weight")  # noqa: B009


class Inherited(Layers):
    def forward(self, x):
        return super().by_weight(x) + self.b(x)


class Handed(Layers):
    def forward(self, x):
        return by_weight(self.a, x) + times(self.layers[0].weight, x) + rows_of(self.b.weight)


class Property(Layers):
    @property
    def matrix(self):
        return self.a.weight

    def forward(self, x):
        return F.linear(x, self.matrix)


class Grandparent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layers()

    def forward(self, x):
        return F.linear(x, self.inner.a.weight)


class Zipped(Layers):
    def forward(self, x):
        for norm, layer in zip([self.norm, self.norm], [self.a, self.b], strict=True):
            x = F.linear(F.layer_norm(x, (D,), norm.weight), layer.weight)
        return self.layers[0](x)


class Inside(Layers):
    def forward(self, x):
        def of_a(y):
            return y @ self.a.weight

        return torch.utils.checkpoint.checkpoint(of_a, x) + (lambda y: y @ self.b.weight)(x)


class Checkpointed(Layers):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.by_weight, x)


class Stacked(Layers):
    def forward(self, x):
        return F.linear(x, torch.cat([layer.weight for layer in (self.a, self.b)]))


class Keywords(Layers):
    def forward(self, x):
        return F.linear(**{"input": x, "weight": self.a.weight}) + functools.partial(by_weight, self.b)(x)


class OwnFunction(Layers):
    def forward(self, x):
        return Product.apply(x, self.a)


class Norm(Layers):
    def forward(self, x):
        return self.a(x) / self.a.weight.norm()


class Scale(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.a.scale = 2

    def forward(self, x):
        return self.a.scale * self.a(x)


class OtherModule(nn.Module):
    def forward(self, x, layer):
        return F.linear(x, layer.weight)


class Sibling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other = nn.Linear(D, D), OtherModule()

    def forward(self, x):
        return self.other(x, layer=self.a)


class Kept(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.beside = [self.a]

    def forward(self, x):
        return self.beside[0](x)


class Hooked(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, inputs: (F.linear(inputs[0], module.a.weight),))

    def forward(self, x):
        return self.b(x)


class Generator(Layers):
    def some(self):
        yield self.a

    def forward(self, x):
        for layer in self.some():
            x = x @ layer.weight
        return x


class Everything(Layers):
    def forward(self, x):
        return self.a(x) + sum(p.sum() for p in self.parameters())


class Reduced(Layers):
    def forward(self, x):
        return functools.reduce(lambda h, layer: F.linear(h, layer.weight), self.layers, self.a(x))


class Matched(Layers):
    def forward(self, x):
        match self.a:
            case nn.Module(weight=w):
                x = F.linear(x, w)
        return self.b(x)


class Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


class Made(Layers):
    def forward(self, x):
        return Helper(self.a)(self.b(x))


class Applied(Layers):
    def forward(self, x):
        found = []
        self.apply(lambda module: found.append(getattr(module, "weight", None)))
        return F.linear(self.b(x), found[0])


def projected(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        return forward(self, F.linear(x, self.a.weight))

    return wrapper


class Collected(Layers):
    def forward(self, x):
        weights = []
        for layer in self.layers:
            weights.append(layer.weight)
        return F.linear(self.a(x), torch.cat(weights))


class Decorated(Layers):
    @projected
    def forward(self, x):
        return self.b(x)


class OwnGetattr(Layers):
    def __getattr__(self, name):
        return super().__getattr__("a").weight if name == "matrix" else super().__getattr__(name)

    def forward(self, x):
        return F.linear(self.b(x), self.matrix)


class OfClass(Layers):
    @classmethod
    def product(cls, layer, x):
        return F.linear(x, layer.weight)

    def forward(self, x):
        return type(self).product(self.a, self.b(x))


class KeptWeight(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.beside = [self.a.weight, self.b.weight.detach()]

    def forward(self, x):
        return F.linear(F.linear(self.layers[0](x), self.beside[0]), self.beside[1])


class Enclosed(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.product = lambda x: self.a(x)  # copies of the model keep calling this one

    def forward(self, x):
        return self.product(self.b(x))


class AskedForKind(Layers):
    def forward(self, x):
        x = self.layers[0](x) if type(self.b) is nn.Linear else x
        return self.layers[1](x) if isinstance(self.a, nn.Linear) else x


class Unpacked(Layers):
    def forward(self, x):
        first, *between, last = [self.layers[0], self.layers[1], self.b, self.a]
        for layer in between:
            x = layer(x)
        return F.linear(first(x), last.weight)


class Harmless(Layers):
    def forward(self, x):
        x = x.to(self.a.weight.dtype).to(next(self.parameters()).device)
        weight = self.b.weight
        if weight is not None and isinstance(self.a, nn.Module) and not hasattr(self.b, "qweight"):
            x = x + x.new_zeros(weight.size(0), dtype=weight.dtype)
        for norm, layer in zip([self.norm], [self.a], strict=True):
            x = layer(F.layer_norm(x, (D,), norm.weight, norm.bias))
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return self.b(x)

    def init_weights(self):
        nn.init.zeros_(self.a.weight)
        self.b.weight.data.mul_(2)


USED = {
    Alias: {"a"},
    Loop: {"layers.0", "layers.1"},
    Index: {"layers.1"},
    ByName: {"a", "b"},
    Inherited: {"a"},
    Handed: {"a", "layers.0"},
    Property: {"a"},
    Grandparent: {"inner.a"},
    Zipped: {"a", "b"},
    Inside: {"a", "b"},
    Checkpointed: {"a"},
    Stacked: {"a", "b"},
    Keywords: {"a", "b"},
    OwnFunction: {"a"},
    Norm: {"a"},
    Scale: {"a"},
    Sibling: {"a"},
    Kept: {"a"},
    Hooked: {"a"},
    Generator: {"a"},
    Everything: {"a", "b", "layers.0", "layers.1"},
    Reduced: {"layers.0", "layers.1"},
    Matched: {"a"},
    Made: {"a"},
    Applied: {"a", "b", "layers.0", "layers.1"},
    Collected: {"layers.0", "layers.1"},
    Decorated: {"a"},
    OwnGetattr: {"a"},
    OfClass: {"a"},
    KeptWeight: {"a", "b"},
    Enclosed: {"a"},
    AskedForKind: {"a", "b"},
    Unpacked: {"a"},
    Harmless: set(),
}
