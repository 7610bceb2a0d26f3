"""Models that a copy is made of, as they come."""

import threading

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_lens as ll


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head, self.state = nn.Linear(6, 6), nn.Linear(6, 2), None

    def forward(self, x):
        self.state = self.block(x)
        return self.head(self.state)


X = torch.randn(3, 6)


def test_outputs_of_an_earlier_call_are_no_hindrance(tmp_path):
    model = Net()
    before = model(X)
    adapted = ll.attach(model, ll.Window.first(2), targets="block")
    assert torch.allclose(adapted(X), before, atol=1e-6)
    ll.export_residual(adapted, tmp_path / "residual")
    assert model.state.grad_fn is not None


def test_what_has_no_copy_is_named():
    model = Net()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Net cannot be copied \(cannot pickle '_thread.lock' object\)"):
        ll.attach(model, ll.Window.first(2), targets="block")
    assert ll.attach(model, ll.Window.first(2), targets="block", inplace=True)(X).shape == (3, 2)


def test_torchscript_is_refused_in_words():
    model = Net()
    model.head = torch.jit.script(model.head)
    with pytest.raises(ValueError, match="TorchScript"):
        ll.attach(model, ll.Window.first(2), targets="block")


def test_accelerates_hooks_on_layers_stay():
    model = Net()
    attach_align_device_hook(model, execution_device="cpu")
    adapted = ll.attach(model, ll.Window.first(2), targets="block")
    with torch.no_grad():
        before = model(X)
        assert torch.allclose(adapted(X), before, atol=1e-6)
        adapted.base_model.model.block.lora_B["default"].weight.mul_(2)
        assert not torch.allclose(adapted(X), before, atol=1e-3)


def test_wrappers_around_adapted_layers_come_off_with_them():
    model = Net()
    adapted = ll.attach(model, ll.Window.first(2), targets="block")
    inner = adapted.base_model.model
    inner.block = checkpoint_wrapper(inner.block)
    base = ll.detach(adapted)
    assert type(base.block) is nn.Linear
    assert torch.equal(base.block.weight, model.block.weight)


@pytest.mark.filterwarnings("ignore:dropout")
def test_adapters_are_in_the_mode_of_their_model():
    model, variant = Net().eval(), ll.Variant(dropout=0.5)
    adapted = ll.attach(model, ll.Window.first(2), targets="block", variant=variant)
    assert not any(module.training for module in adapted.modules())
    assert torch.allclose(adapted(X), model(X), atol=1e-6)
    model.train()
    adapted = ll.attach(model, ll.Window.first(2), targets="block", variant=variant)
    assert all(module.training for module in adapted.modules())
