"""Layers that a model uses in other ways than by calling them: under an adapter they would not be themselves.

PEFT puts a layer of its own around each one that is adapted. Whoever multiplies by the weight itself then
takes the residual for the weight, and the adapter never acts; whoever asks for what PEFT's layer lacks
fails. Both are found by reading the code of the modules above, see :mod:`lora_lens.spectrum.usage.reading`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from torch import nn

from lora_lens.spectrum.usage.kept_layers import Keepers
from lora_lens.spectrum.usage.reading import CodeReader


def used_otherwise(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why each of the layers cannot be adapted that is not only called: reasons by name.

    Args:
        modules: all of a model, by name, itself included.
        layers: those of them that count.
    """
    by_id = {id(layer): layer for layer in layers.values()}
    keepers = Keepers(map(id, modules.values()), layers.values())
    kept: dict[int, str] = {}
    read: dict[int, str] = {}
    for module in modules.values():
        for layer, key in keepers.kept(module):
            kept[id(layer)] = f"is bypassed: {type(module).__name__} also keeps it as its {key}"
        if id(module) not in by_id and any(id(below) in by_id for below in module.modules()):
            read = _read(module, by_id) | read  # what is read first counts
    reasons = read | kept
    return {name: reasons[id(layer)] for name, layer in layers.items() if id(layer) in reasons}


def _read(module: nn.Module, layers: Mapping[int, nn.Module]) -> dict[int, str]:
    """What the code of one module does with layers, by their ids."""
    reader = CodeReader(layers)
    kind = type(module)
    forward = module.__dict__.get("forward") or types.MethodType(kind.forward, module)
    reader.use(reader.enter(forward, []), f"{kind.__name__}.forward")
    if kind.__call__ is not nn.Module.__call__:
        reader.enter(types.MethodType(kind.__call__, module), [])
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        reader.enter(hook, [(module,)])
    return reader.reasons
