"""PEFT's layers under a window: how they get into a model, what they started from, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.wrappers import inner_model, named_modules, placed, unwrapped
from lora_lens.adapters.offset import start_in
from lora_lens.adapters.peft_names import ADAPTER, PREFIX, saved_modules
from lora_lens.adapters.planned_layers import injected
from lora_lens.adapters.stacks import (
    expanded,
    innermost,
    is_exchanged,
    layer_stack,
    packed,
    restore_order,
)
from lora_lens.adapters.start import Start, is_dora
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.layer_weights import weight_of
from lora_lens.spectrum.quantized_layers import keep_trainable
from lora_lens.spectrum.stacks import wrapped_names

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedLayer, AdaptedModel

AGAIN = "attach again, or undo that"


@dataclass(frozen=True, eq=False)
class Attachment:
    """What :func:`attach` notes on the model that it returns, as the attribute ``attachment``.

    Attributes:
        method: in words.
        variant: how the adapter was built.
        starts: by layer name; none for ordinary LoRA.
        trainable: the parameters of the pretrained model that required gradients.
        buffers: of the pretrained model, such as the statistics of batch norms, which training moves.
    """

    method: str
    variant: Variant
    starts: Mapping[str, Start]
    trainable: frozenset[str]
    buffers: Mapping[str, Tensor]

    def __deepcopy__(self, memo: dict[int, object]) -> Attachment:
        return self


def require_unadapted(model: nn.Module) -> None:
    """Raise a ValueError if PEFT is in the model: its weights may be residuals."""
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise InputError(
            "this model is adapted already; start from the pretrained model instead, or first take the "
            "adapter off (ll.detach, PEFT's unload) or in (PEFT's merge_and_unload)"
        )


def attached(adapted: nn.Module) -> tuple[AdaptedModel, Attachment]:
    """The PEFT model inside wrappers (compiled, distributed), and what attach noted on it.

    Raises:
        ValueError: it does not come from attach.
    """
    inner = inner_model(adapted) if isinstance(adapted, nn.Module) else None
    while not isinstance(inner, PeftModel):
        if not isinstance(held := getattr(inner, "module", None), nn.Module):
            break
        inner = inner_model(held)  # in a wrapper that we do not know
    if not isinstance(inner, PeftModel) or not hasattr(inner, "attachment"):
        raise InputError(
            f"expected a model from ll.attach or ll.load, not {type(adapted).__name__}; for a LoRA that "
            "PEFT made, call ll.adapters.adopt first; for another adapter that was made elsewhere, or from a "
            "config of PEFT's, use PEFT's own functions"
        )
    found = cast("AdaptedModel", inner)
    return found, found.attachment


def lora_layers(peft_model: AdaptedModel) -> dict[str, AdaptedLayer]:
    """The adapted layers by the names they have without PEFT and without wrappers.

    Raises:
        ValueError: what acts is not what attach made: a layer lost its adapter or got another one, another
            adapter is active, or its scaling is another. Other adapters that are not active, such as the
            reference of TRL's DPO, do not matter.
    """
    ours = wrapped_layers(peft_model)
    for name, layer in ours.items():
        active = list(layer.active_adapters)
        if ADAPTER not in layer.lora_A or active != [ADAPTER]:
            raise InputError(
                f"{name} has {listed(active) or 'no adapter'} active and not {ADAPTER!r}, which attach "
                f"made: call set_adapter({ADAPTER!r}), or attach again"
            )
        if (scaling := layer.scaling[ADAPTER]) != layer.planned_scaling:
            raise InputError(
                f"the scaling of {name} is {scaling:g}, and attach made it {layer.planned_scaling:g}: it "
                "scales the pretrained components of a window, too, so it is no part of what is trained; "
                f"undo it with PEFT's set_scale({ADAPTER!r}, 1)"
            )
        if start_in(layer) is not None and ADAPTER not in layer.lora_variant:
            raise InputError(
                f"PEFT forgot the start of {name}, so its adapter adds the window a second time: {AGAIN}"
            )
    matrices = expanded(ours)
    for name, layer in matrices.items():
        require_at_hand(name, layer)
    known = {id(layer) for layer in ours.values()}
    for path, module in base_of(peft_model).named_modules():
        other = isinstance(module, LoraLayer) and id(module) not in known
        if other and any(adapter in module.lora_A for adapter in module.active_adapters):
            raise InputError(f"{path} was adapted by something else after attach: {AGAIN}")
    return matrices


def planned_layers(peft_model: AdaptedModel) -> dict[str, AdaptedLayer]:
    """PEFT's layers that attach put in, by name, whatever happened to their adapters since.

    Where PEFT adapts a stack of experts, one for each of them.

    Raises:
        ValueError: some are no longer there.
    """
    return expanded(wrapped_layers(peft_model))


def wrapped_layers(peft_model: AdaptedModel) -> dict[str, AdaptedLayer]:
    """Likewise, as PEFT has them.

    Raises:
        ValueError: some are no longer there.
    """
    found: dict[str, AdaptedLayer] = {}
    for module in base_of(peft_model).modules():
        if isinstance(module, LoraLayer) and hasattr(module, "planned_name"):
            layer = cast("AdaptedLayer", module)
            found.setdefault(layer.planned_name, layer)
    planned = peft_model.planned_layers
    if missing := [name for name in planned if name not in found]:
        raise InputError(f"{listed(missing, most=3)} lost the adapter that attach gave: {AGAIN}")
    return {name: found[name] for name in planned}


def require_at_hand(name: str, layer: AdaptedLayer) -> None:
    """Raise a ValueError if tensors of a layer are elsewhere, as after offloading and sharding."""
    for module in (layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        tensor = weight_of(module)
        if tensor.is_meta or isinstance(tensor, DTensor):
            where = "sharded (a DTensor)" if isinstance(tensor, DTensor) else "offloaded (on the meta device)"
            raise InputError(
                f"the weights of {name} are {where} since attach; gather them first, as accelerate's "
                "remove_hook_from_submodules and FSDP's full state dict do"
            )


def base_of(peft_model: PeftModel) -> nn.Module:
    """The model inside PEFT's, also where the adapter that is active is another one or none."""
    return cast(nn.Module, peft_model.base_model.model)


def lora_config(peft_model: PeftModel) -> LoraConfig:
    return cast(LoraConfig, peft_model.peft_config[ADAPTER])


def whole_modules(peft_model: AdaptedModel) -> dict[str, ModulesToSaveWrapper]:
    """What PEFT trains in full (modules_to_save), by the names that it has without PEFT and wrappers.

    Raises:
        ValueError: they are not those that attach wrapped.
    """
    wrapped = {
        getattr(module, "planned_name", path): module
        for path, module in base_of(peft_model).named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    if changed := sorted(wrapped.keys() ^ set(peft_model.planned_whole)):
        raise InputError(f"{listed(changed, most=3)} was wrapped or unwrapped after attach: {AGAIN}")
    return cast(dict[str, ModulesToSaveWrapper], wrapped)


def adapter_state(peft_model: AdaptedModel) -> dict[str, Tensor]:
    """The adapter's tensors under the keys that PEFT gives them in files; they share the model's memory.

    Raises:
        ValueError: the adapted layers are not those that attach adapted.
    """
    state = {}
    lora_layers(peft_model)
    for layer in wrapped_layers(peft_model).values():
        name = layer.planned_path
        for key in ("lora_A", "lora_B"):
            state[f"{PREFIX}{name}.{key}.weight"] = weight_of(getattr(layer, key)[ADAPTER]).detach()
        if is_dora(layer):
            length = weight_of(layer.lora_magnitude_vector[ADAPTER])
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = length.detach()
    for name, wrapper in whole_modules(peft_model).items():
        own = wrapper.modules_to_save[ADAPTER].state_dict()
        state |= {f"{PREFIX}{name}.{unwrapped(key)}": tensor for key, tensor in own.items()}
    return state


def stacked_state(
    peft_model: AdaptedModel, factors: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """Factors (B, A) of each expert, by stack, as PEFT's tensors."""
    wrapped, state = wrapped_layers(peft_model), {}
    for name, each in factors.items():
        layer = wrapped[name]
        assert isinstance(layer, ParamWrapper)
        a, b = packed(layer_stack(layer), each)
        state[f"{PREFIX}{layer.planned_path}.lora_A.weight"] = a
        state[f"{PREFIX}{layer.planned_path}.lora_B.weight"] = b
    return state


def note_pretrained(model: nn.Module) -> tuple[frozenset[str], dict[str, Tensor]]:
    """Which parameters require gradients, and copies of the buffers: to be called before :func:`inject`."""
    trainable = frozenset(name for name, p in tensors_by_name(model, "parameters") if p.requires_grad)
    return trainable, {name: buffer.clone() for name, buffer in tensors_by_name(model, "buffers")}


def tensors_by_name(model: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    """A model's "parameters" or "buffers" by the names that they have without PEFT and without wrappers."""
    for name, module in named_modules(model):
        parts = [part for part in name.split(".") if part not in ("", "base_layer", "original_module")]
        for key, tensor in getattr(module, f"_{kind}").items():
            if tensor is not None:
                yield ".".join([*parts, key]), tensor


def inject(
    model: nn.Module, config: LoraConfig, names: Iterable[str], variant: Variant, seed: int = 0
) -> AdaptedModel:
    """PEFT's layers in place of exactly the named ones, ready for their :class:`Start`.

    Raises:
        ValueError: PEFT refuses a layer, or adapts others than these; then the model is as it was.
    """
    names, whole = wrapped_names(names), saved_modules(model, config.modules_to_save or ())
    adapted = cast("AdaptedModel", injected(model, config, names, whole, variant.dtype is None, seed))
    adapted.planned_layers, adapted.planned_whole = names, whole
    adapted.training = adapted.base_model.training = model.training
    for layer in wrapped_layers(adapted).values():
        layer.train(layer.get_base_layer().training)  # PEFT's are in training mode, so dropout would act
        if variant.dtype is not None:
            layer.lora_A.to(variant.dtype), layer.lora_B.to(variant.dtype)
        if variant.train != "both":
            turned = isinstance(layer, ParamWrapper) and is_exchanged(layer_stack(layer))
            fixed = "lora_B" if (variant.train == "A") != turned else "lora_A"
            layer.frozen_peft_weight_names = {ADAPTER: (fixed,)}  # PEFT's set_adapter would train it again
            getattr(layer, fixed).requires_grad_(False)
    keep_trainable(adapted.modules())
    return adapted


def require_unmerged(peft_model: AdaptedModel) -> None:
    """Raise a ValueError if an adapter is merged: its base is neither residual nor pretrained then."""
    for name, layer in lora_layers(peft_model).items():
        if layer.merged:
            raise InputError(f"the adapter of {name} is merged into its base; call unmerge_adapter() first")


def require_enabled(peft_model: AdaptedModel) -> None:
    """Raise a ValueError if an adapter does not act: then a model answers as its base, perhaps a residual."""
    for name, layer in lora_layers(peft_model).items():
        if layer.disable_adapters:
            raise InputError(f"the adapter of {name} is disabled: call enable_adapter_layers() first")


def moved_buffers(peft_model: PeftModel, record: Attachment) -> dict[str, Tensor]:
    """The buffers that are not as the pretrained model had them."""
    now, before = buffers_by_name(peft_model), record.buffers
    return {n: b for n, b in now.items() if n in before and not torch.equal(b, before[n].to(b.device))}


def buffers_by_name(peft_model: PeftModel) -> dict[str, Tensor]:
    """The model's buffers by the names that they have without PEFT and wrappers."""
    return dict(tensors_by_name(base_of(peft_model), "buffers"))


def without_peft(peft_model: PeftModel) -> nn.Module:
    """The base model without PEFT's modules, but with its own where PEFT trained copies; uses it up."""
    base = base_of(peft_model)
    kinds = (LoraLayer, ModulesToSaveWrapper)
    # Not by PEFT's unload, which takes a child of the model's own called base_layer for one of its own.
    for path, module in [(p, m) for p, m in base.named_modules() if isinstance(m, kinds)]:
        if path != innermost(path) and isinstance(module, ParamWrapper):
            continue  # the outer one, before it, took its place
        if isinstance(module, ParamWrapper):
            restore_order(module)
        parent, _, last = path.rpartition(".")
        own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
        base.get_submodule(parent)._modules[last] = own
        placed(base, path)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base
