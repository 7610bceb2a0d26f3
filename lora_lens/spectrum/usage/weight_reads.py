"""Layers that a model uses in other ways than by calling them: under an adapter they would not be themselves.

PEFT puts a layer of its own around each one that is adapted. Whoever multiplies by the weight itself then
takes the residual for the weight, and the adapter never acts; whoever asks for what PEFT's layer lacks
fails. Both are found by reading the code of the modules above, see :mod:`lora_lens.spectrum.usage.reading`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from lora_lens.spectrum.usage.kept_layers import Keepers
from lora_lens.spectrum.usage.reading import CodeReader


def used_otherwise(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why each of the layers cannot be adapted that is not only called: reasons by name.

    Modules of the same classes inside and out are read once.

    Args:
        modules: all of a model, by name, itself included.
        layers: those of them that count.
    """
    names = {id(layer): name for name, layer in layers.items()}

    # By id: a number for the module's structure, and whether layers are below.
    shapes: dict[int, tuple[int, bool]] = {}
    known: dict[tuple[object, ...], int] = {}

    def shape(module: nn.Module) -> tuple[int, bool]:
        if id(module) not in shapes:
            children = [(n, *shape(c)) for n, c in module._modules.items() if c is not None]
            own = [v for v in module.__dict__.values() if isinstance(v, _CALLABLE)]
            structure = (type(module), *children, *map(id, [*own, *_hooks(module)]), id(module) in names)
            holds = id(module) in names or any(holds for *_, holds in children)
            shapes[id(module)] = known.setdefault(structure, len(known)), holds
        return shapes[id(module)]

    places = {id(module): path for path, module in modules.items()}
    keepers = Keepers(places, layers.values())
    reasons: dict[str, str] = {}
    known_reads: dict[int, list[_Reads]] = {}  # by structure; several where settings differ
    for path, module in modules.items():
        for layer, key in keepers.kept(module):
            reasons[names[id(layer)]] = f"is bypassed: {type(module).__name__} also keeps it as its {key}"
        structure, holds = shape(module)
        if not holds or id(module) in names:
            continue
        before = known_reads.setdefault(structure, [])
        reads = next((r for r in before if _hold(r.settings, path, modules)), None)
        if reads is None:
            reads = _read(path, module, layers, names, places)
            if reads.at_home:
                before.append(reads)
        for name, why in reads.reasons.items():
            reasons.setdefault(f"{path}.{name}".strip(".") if reads.at_home else name, why)
    return {name: reasons[name] for name in layers if name in reasons}


_CALLABLE = (types.FunctionType, types.MethodType, partial)


def _hooks(module: nn.Module) -> list[Callable[..., object]]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


@dataclass(frozen=True)
class _Reads:
    """What reading one module found.

    Attributes:
        reasons: by name of the layer, inside the module if ``at_home``, otherwise whole.
        settings: the (module, attribute, value) that conditions asked for, the module as a name inside.
        at_home: whether nothing outside the module is among both.
    """

    reasons: dict[str, str]
    settings: list[tuple[str, str, object]]
    at_home: bool


def _hold(settings: list[tuple[str, str, object]], path: str, modules: Mapping[str, nn.Module]) -> bool:
    named = ((modules[f"{path}.{inside}".strip(".")], key, value) for inside, key, value in settings)
    return all(vars(module).get(key, ...) == value for module, key, value in named)


def _read(
    path: str,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    names: Mapping[int, str],
    places: Mapping[int, str],
) -> _Reads:
    reader = CodeReader({i: layers[name] for i, name in names.items()})
    kind = type(module)
    forward = module.__dict__.get("forward") or types.MethodType(kind.forward, module)
    reader.use(reader.enter(forward, []), f"{kind.__name__}.forward")
    if kind.__call__ is not nn.Module.__call__:
        reader.enter(types.MethodType(kind.__call__, module), [])
    for hook in _hooks(module):
        reader.enter(hook, [(module,)])
    found = {names[i]: why for i, why in reader.reasons.items()}
    start = f"{path}." if path else ""
    asked = [(f"{places.get(id(m), '?')}.", key, value) for m, key, value in reader.asked]
    if all(name.startswith(start) for name in (*found, *(where for where, *_ in asked))):
        inside = {name[len(start) :]: why for name, why in found.items()}
        return _Reads(inside, [(w[len(start) :].strip("."), k, v) for w, k, v in asked], at_home=True)
    return _Reads(found, [], at_home=False)
