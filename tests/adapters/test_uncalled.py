from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.adapters.uncalled import noting_uncalled


class Hidden(nn.Module):
    """Reads a weight in a way that no reading of its code finds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.__dict__["near"] = weakref.proxy(self.a)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        return self.experts[0](self.b(x)) @ self.near.weight


def test_a_layer_that_is_never_called_is_named_where_its_input_is_at_hand():
    torch.manual_seed(0)
    model, x = Hidden().eval(), torch.randn(3, 8)
    adapted = ll.attach(model, ll.Window.first(4))
    with pytest.warns(UserWarning, match=r"^1 adapted layers were not called.*do nothing: a;") as said:
        assert ll.function_error(adapted, model, x) > 1e-3
    assert said[0].filename == __file__
    assert not any(module._forward_pre_hooks for module in adapted.modules())


def test_it_says_nothing_of_layers_that_ran_nor_of_modules_that_did_not(patch_vit, recwarn):
    adapted = ll.attach(patch_vit, ll.Window.middle(4))
    with noting_uncalled(adapted):
        adapted(torch.randn(1, 1, 28, 28))
    with noting_uncalled(adapted):
        pass
    assert not [w for w in recwarn if "not called" in str(w.message)]
