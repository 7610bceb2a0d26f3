"""Small modules that ask for a layer's weight by its name, in Python's several ways."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable

import torch.nn.functional as F
from reading_models import Layers
from torch import Tensor, nn

WEIGHT_OF_B = operator.attrgetter("b.weight")


def along(module: nn.Module, path: str) -> Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    return module


class Net(nn.Module):
    """``ask(self)`` is the weight of inner.b, by which it multiplies; and it calls inner.a."""

    path, key = "inner.b.weight", "b"

    def __init__(self, ask: Callable[[Net], Tensor]) -> None:
        super().__init__()
        self.inner, self.ask, self.name = Layers(), ask, "b"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner.a(x), self.ask(self))


# By id, how; where the names are not known, other layers than b are refused as well.
EXACT = {
    "reduce": lambda s: functools.reduce(getattr, ["inner", "b", "weight"], s),
    "reduce of a split": lambda s: functools.reduce(getattr, "inner.b.weight".split("."), s),  # noqa: SIM905
    "reduce of an attribute": lambda s: functools.reduce(getattr, s.path.split("."), s),
    "reduce of a lambda": lambda s: functools.reduce(lambda o, n: getattr(o, n), s.path.split("."), s),
    "loop": lambda s: along(s, "inner.b.weight"),
    "joined": lambda s: getattr(getattr(s.inner, f"{s.name}"), "wei" + "ght"),
    "formatted": lambda s: along(s, "inner.{}.weight".format(s.name)),  # noqa: UP032
    "attrgetter": lambda s: operator.attrgetter("inner.b.weight")(s),
    "attrgetter of several": lambda s: operator.attrgetter("path", "inner.b.weight")(s)[1],
    "attrgetter made before": lambda s: WEIGHT_OF_B(s.inner),
    "mapped attrgetter": lambda s: next(map(operator.attrgetter("weight"), [s.inner.b])),
    "methodcaller": lambda s: operator.methodcaller("get_parameter", "weight")(s.inner.b),
    "itemgetter": lambda s: operator.itemgetter("b")(s.inner._modules).weight,
    "getitem": lambda s: operator.getitem(s.inner._modules, "b").weight,
    "a dict's get": lambda s: s.inner._modules.get("b").weight,
    "dict.get": lambda s: dict.get(s.inner._modules, s.key).weight,
    "default": lambda s: getattr(s.inner, "missing", s.inner.b).weight,
    "vars": lambda s: vars(s.inner.b)["_parameters"]["weight"],
    "vars of the parent": lambda s: vars(s.inner)["_modules"]["b"].weight,
    "__dict__": lambda s: s.inner.b.__dict__["_parameters"]["weight"],
    "__dict__ of the parent": lambda s: s.inner.__dict__["_modules"]["b"].weight,
    "object's": lambda s: object.__getattribute__(s.inner.b, "_parameters")["weight"],
    "its own": lambda s: s.inner.b.__getattribute__("_parameters")["weight"],
    "static": lambda s: inspect.getattr_static(s.inner.b, "_parameters")["weight"],
    "Module's": lambda s: nn.Module.__getattr__(s.inner.b, "weight"),
    "Module's of the parent": lambda s: nn.Module.__getattr__(s.inner, "b").weight,
    "__getattr__": lambda s: s.inner.b.__getattr__("weight"),
    "its class's": lambda s: type(s.inner.b).__getattr__(s.inner.b, "weight"),
    "Module's get_parameter": lambda s: nn.Module.get_parameter(s.inner, "b.weight"),
    "locals": lambda s: locals()["s"].inner.b.weight,
    "eval": lambda s: eval("s.inner.b.weight"),
    "eval of names": lambda s: eval("net.b.weight", {"net": s.inner}),
}
UNKNOWN = {
    "split at a number": lambda s: along(s, s.path.rsplit(".", 1)[0]).weight,
    "eval of an unknown text": lambda s: eval("s.inner.b" + ".weight"[: len(s.path)]),
    "compiled": lambda s: eval(compile("s.inner.b.weight", "<text>", "eval")),
    "a name in capitals": lambda s: getattr(s.inner, "B".swapcase()).weight,
}


class Executed(Layers):
    def forward(self, x):
        found = {}
        exec("found['w'] = self.b.weight", {"self": self, "found": found})
        return F.linear(self.a(x), found["w"])


class HarmlessAsking(Layers):
    def forward(self, x):
        first = functools.reduce(getattr, ["a"], self)
        x = operator.attrgetter("b")(self)(first(x)).to(operator.attrgetter("a.weight.dtype")(self))
        for layer in operator.itemgetter(0, 1)(self.layers):
            x = operator.methodcaller("forward", x)(layer)
        return eval("x + 1") * operator.itemgetter("scale")({"scale": 2})
