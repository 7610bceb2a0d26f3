"""Names that survive wrappers: compiled, distributed and checkpointed modules put segments into names.

``torch.compile`` of a block makes ``blocks.0.attn`` into ``blocks.0._orig_mod.attn``, DDP makes ``fc`` into
``module.fc``. Everywhere in lora_lens a layer has the name that it has without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

# No name of a layer by itself: whatever class has a child of this name is looked through.
SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
# These names are common, so only in classes that are known to be wrappers, also by subclasses.
BY_CLASS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "_forward_module",
    "GradSampleModule": "_module",
}


def unwrapped(name: str) -> str:
    """A dotted name of a module or tensor without the segments that wrappers put into it.

    Only what cannot be a layer's own name is taken out: a leading ``module.`` stays, because the name alone
    does not tell it from a layer that is called so. :func:`named_modules` looks at the classes as well.
    """
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers around the whole of it; the model itself if there are none."""
    while (wrapped := _wrapped(model)) is not None:
        model = wrapped
    return model


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """As ``model.named_modules()`` without the wrappers and without their segments in the names."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        while True:
            if remove_duplicate and id(module) in seen:
                return
            seen.add(id(module))
            if (wrapped := _wrapped(module)) is None:
                break
            module = wrapped
        found.append((name, module))
        for child, inner in module._modules.items():
            if inner is not None:
                visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return found


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, as :func:`named_modules` gives it.

    Raises:
        AttributeError: as ``model.get_submodule``.
    """
    module = inner_model(model)
    for part in name.split(".") if name else ():
        if (inner := module._modules.get(part)) is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r}, looked for as {name}")
        module = inner_model(inner)
    return module


def paths_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where the named modules lie for ``model.get_submodule``, with the segments of wrappers."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(submodule(model, name))] for name in names}


def placed(model: nn.Module, path: str) -> None:
    """Put what lies at ``path`` in the place of wrappers around nothing else.

    A compiled module keeps calling what it was made for, also when its child is replaced.
    """
    module, outer = model.get_submodule(path), path
    while outer and _wrapped(model.get_submodule(outer.rpartition(".")[0])) is model.get_submodule(outer):
        outer = outer.rpartition(".")[0]
    if outer and outer != path:
        model.set_submodule(outer, module)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The one child that a wrapper wraps; None if the module is no wrapper."""
    if children := module._modules:
        for key in _keys_of(type(module).__mro__):
            if (child := children.get(key)) is not None:
                return child
    return None


@lru_cache(maxsize=4096)
def _keys_of(kin: tuple[type, ...]) -> tuple[str, ...]:
    if torch.jit.ScriptModule in kin:
        return ()
    return SEGMENTS + tuple(BY_CLASS[base.__name__] for base in kin if base.__name__ in BY_CLASS)
