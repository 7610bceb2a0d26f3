"""Names that survive wrappers: compiled, distributed and checkpointed modules put segments into names.

``torch.compile`` of a block makes ``blocks.0.attn`` into ``blocks.0._orig_mod.attn``, DDP makes ``fc`` into
``module.fc``. Everywhere in lora_lens a layer has the name that it has without them.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    while (key := _wrapped(model)) is not None:
        model = model._modules[key]
    return model


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()`` without the wrappers and without their segments in the names."""
    clean: dict[str, str] = {}
    through: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        parent, _, child = path.rpartition(".")
        before = clean.get(parent, "")
        clean[path] = before if path in through else f"{before}.{child}" if before else child
        if (key := _wrapped(module)) is not None:
            through.add(f"{path}.{key}" if path else key)
        else:
            yield clean[path], module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, as :func:`named_modules` gives it.

    Raises:
        AttributeError: as ``model.get_submodule``.
    """
    module = inner_model(model)
    for part in name.split(".") if name else ():
        module = inner_model(module.get_submodule(part))
    return module


def _wrapped(module: nn.Module) -> str | None:
    """The name of the one child that a wrapper wraps; None if the module is no wrapper."""
    keys = [key for key in SEGMENTS if key in module._modules]
    keys += [BY_CLASS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in BY_CLASS]
    return next((key for key in keys if isinstance(module._modules.get(key), nn.Module)), None)
