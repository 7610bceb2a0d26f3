"""Layers that a model uses in other ways than by calling them: under an adapter they would not be themselves.

PEFT puts a layer of its own around each one that is adapted. Whoever multiplies by the weight itself then
takes the residual for the weight, and the adapter never acts; whoever asks for what PEFT's layer lacks
fails. Both are found by reading the code of the modules above, see :mod:`lora_lens.code_reading`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import partial

from torch import nn

from lora_lens.code_reading import CodeReader


def used_otherwise(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why each of the layers cannot be adapted that is not only called: reasons by name.

    Modules of the same classes inside and out are read once.

    Args:
        layers: of ``model``, by name.
    """
    names = {id(layer): name for name, layer in layers.items()}
    modules = dict(model.named_modules())
    shapes: dict[
        int, tuple[int, bool]
    ] = {}  # by id: a number for its structure, and whether layers are below
    known: dict[tuple, int] = {}

    def shape(module: nn.Module) -> tuple[int, bool]:
        if id(module) not in shapes:
            children = [(n, *shape(c)) for n, c in module._modules.items() if c is not None]
            own = [v for v in module.__dict__.values() if isinstance(v, _CALLABLE)]
            own += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            structure = (type(module), tuple(children), tuple(map(id, own)), id(module) in names)
            holds = id(module) in names or any(holds for *_, holds in children)
            shapes[id(module)] = known.setdefault(structure, len(known)), holds
        return shapes[id(module)]

    reasons: dict[str, str] = {}
    done: dict[int, dict[str, str] | None] = {}  # by structure, by name inside; None if it reached outside
    for path, module in modules.items():
        structure, holds = shape(module)
        if not holds or id(module) in names:
            continue
        found = done.get(structure)
        if found is None:
            found = _read(module, layers, names)
            inside = {n.removeprefix(f"{path}." if path else ""): why for n, why in found.items()}
            at_home = all(not path or name.startswith(f"{path}.") for name in found)
            done[structure] = inside if at_home else None
            found = inside if at_home else {}
            for name, why in () if at_home else _read(module, layers, names).items():
                reasons.setdefault(name, why)
        for name, why in found.items():
            reasons.setdefault(f"{path}.{name}" if path else name, why)
    return {name: reasons[name] for name in layers if name in reasons}


_CALLABLE = (types.FunctionType, types.MethodType, partial)


def _read(module: nn.Module, layers: Mapping[str, nn.Module], names: Mapping[int, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    reader = CodeReader(
        {i: layers[name] for i, name in names.items()},
        lambda layer, why: found.setdefault(names[id(layer)], why),
    )
    kind = type(module)
    forward = module.__dict__.get("forward") or types.MethodType(kind.forward, module)
    reader.use(reader.enter(forward, []), f"{kind.__name__}.forward")
    if kind.__call__ is not nn.Module.__call__:
        reader.enter(types.MethodType(kind.__call__, module), [])
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        reader.enter(hook, [(module,)])
    for why, layer in _held(module, names):
        found.setdefault(names[id(layer)], why)
    return found


def _held(module: nn.Module, names: Mapping[int, str]) -> list[tuple[str, nn.Module]]:
    """Layers that a module also keeps in an attribute: PEFT puts its own only in the submodule's place."""
    held = []
    for key, value in module.__dict__.items():
        if key == "_modules" or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if isinstance(value, (list, tuple, set)):
            items = list(value)
        else:
            items = list(value.values()) if isinstance(value, dict) else [value]
        for item in items:
            item = getattr(item, "func", item) if isinstance(item, partial) else item
            item = item.__self__ if isinstance(item, types.MethodType) else item
            if isinstance(item, nn.Module) and id(item) in names:
                held.append((f"{type(module).__name__} also keeps it in its attribute {key}", item))
    return held
