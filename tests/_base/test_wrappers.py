"""Names of modules in wrapped models are those of the plain model, and lead to the same modules."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from lora_lens._base.wrappers import inner_model, named_modules, submodule, unwrapped


class Net(nn.Module):
    """With a layer of its own that is called like a wrapper's child."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.module = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.module(x)


def compile_regions(net):
    from accelerate.utils import compile_regions

    return compile_regions(net)


def wrap_blocks(wrap):
    def wrapped(net):
        net.blocks = nn.ModuleList([wrap(block) for block in net.blocks])
        return net

    return wrapped


WRAPPED = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "blocks compiled": wrap_blocks(torch.compile),
    "blocks checkpointed": wrap_blocks(checkpoint_wrapper),
    "blocks offloaded": wrap_blocks(offload_wrapper),
    "blocks parallel": wrap_blocks(nn.DataParallel),
    "all at once": lambda net: torch.compile(
        nn.DataParallel(wrap_blocks(lambda b: checkpoint_wrapper(torch.compile(b)))(net))
    ),
    "regions": compile_regions,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_are_those_without_wrappers(wrap):
    expected = {name: type(module) for name, module in Net().named_modules()}
    model = wrap(Net())
    found = dict(named_modules(model))
    assert {name: type(module) for name, module in found.items()} == expected
    assert list(found) == list(expected)
    assert all(submodule(model, name) is module for name, module in found.items())
    assert type(inner_model(model)) is Net


def test_shared_modules_have_one_name_or_all():
    net = nn.ModuleDict({"a": nn.Linear(2, 2)})
    net["b"] = torch.compile(net["a"])
    assert [name for name, _ in named_modules(net)] == ["", "a"]
    assert [name for name, _ in named_modules(net, remove_duplicate=False)] == ["", "a", "b"]


def test_names_alone():
    assert unwrapped("_orig_mod.blocks.0._checkpoint_wrapped_module.fc.weight") == "blocks.0.fc.weight"
    assert unwrapped("module.fc.weight") == "module.fc.weight"


def test_no_such_module():
    with pytest.raises(AttributeError, match="nothing"):
        submodule(torch.compile(Net()), "blocks.0.nothing")
