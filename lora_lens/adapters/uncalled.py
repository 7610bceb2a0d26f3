"""Adapted layers that a pass through the model does not reach, whatever its code looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from lora_lens._base.naming import listed
from lora_lens._base.warning import warn


@contextmanager
def noting_uncalled(adapted: nn.Module) -> Iterator[None]:
    """Warn at the end if an adapted layer was not called although the module that holds it ran.

    Experts count only where they ran: those that no token was sent to are left alone. Compiled models are
    not looked at, because hooks would compile them again.

    Warns:
        UserWarning: names the layers, whose adapters did nothing.
    """
    modules: dict[str, nn.Module] = dict(adapted.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    holders = {name: _holder(name, modules) for name in layers}
    called: set[int] = set()
    compiled = any("_orig_mod" in name.split(".") for name in modules)
    watched: set[nn.Module] = set() if compiled else {*layers.values(), *holders.values()}
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    missed = [n for n, layer in layers.items() if id(layer) not in called and id(holders[n]) in called]
    missed = [name.removeprefix("base_model.model.") for name in missed if "expert" not in name]
    if missed:
        warn(
            f"{len(missed)} adapted layers were not called, although the modules that hold them ran, so for "
            f"this input their adapters do nothing: {listed(missed, most=4)}; if that is no choice of the "
            "model's, leave them out of targets=, because it uses their residual in place of their weight",
        )


def _holder(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The next module above that has a forward."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
            break
    return modules[name]
