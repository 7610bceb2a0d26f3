"""Small modules that give a layer its input by keyword: the name that PEFT's layer has for it is another."""

from __future__ import annotations

import functools

from reading_models import D, Layers
from torch import nn
from transformers.pytorch_utils import Conv1D


class Named(Layers):
    def forward(self, x):
        return self.b(input=self.a(x))


class OfForward(Layers):
    def forward(self, x):
        return self.b.forward(input=self.a(x))


class OfDict(Layers):
    def forward(self, x):
        return self.b(**{"input": self.a(x)})


class OfMadeDict(Layers):
    def forward(self, x):
        given = dict(input=self.a(x))  # noqa: C408
        return self.b(**given)


class OfFilledDict(Layers):
    def forward(self, x):
        given = {}
        given["in" + "put"] = self.a(x)
        return self.b(**given)


class OfUpdatedDict(Layers):
    def forward(self, x):
        given = {}
        given.update(input=self.a(x))
        return self.b(**given)


class OfPartial(Layers):
    def forward(self, x):
        return functools.partial(self.b, input=self.a(x))()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(D, D)

    def forward(self, *args, **kwargs):
        return self.b(*args, **kwargs)


class OfOneAround(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.b = Around()

    def forward(self, x):
        return self.b(input=self.a(x))


class Positional(OfOneAround):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(Conv1D(D, D))

    def forward(self, x):
        given = {}
        return self.layers[2](x=self.b(self.a(x, **given)))


OF_B = (Named, OfForward, OfDict, OfMadeDict, OfFilledDict, OfUpdatedDict, OfPartial)
BY_KEYWORD = dict.fromkeys(OF_B, "b")
BY_KEYWORD[OfOneAround] = "b.b"
