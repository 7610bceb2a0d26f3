"""The weights of a model in memory, with and without PEFT around its layers."""

from __future__ import annotations

from collections.abc import Iterator, Set
from functools import partial

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lora_lens._base.wrappers import inner_model, named_modules
from lora_lens.spectrum.heads import head_layers
from lora_lens.spectrum.patterns import routers
from lora_lens.spectrum.quantized_layers import dequantized, quantized_as
from lora_lens.spectrum.sources.quantized import Signs, problem_in
from lora_lens.spectrum.sources.roles import ATTENTION, Stored
from lora_lens.spectrum.stacks import may_be_stack, which_way_round


def in_model(model: nn.Module) -> Iterator[Stored]:
    """Each matrix of the model, and each tensor of experts, by the name it has without PEFT."""
    model = inner_model(model.get_base_model()) if isinstance(model, PeftModel) else model
    modules = dict(named_modules(model))
    wrappers = {n for n, m in modules.items() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    heads, choosing = head_layers(model), routers(modules)
    looked_up = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    for path, module in modules.items():
        name = name_without_peft(path, wrappers)
        if name is None or path in wrappers:  # a wrapper shows its base layer's weight as its own
            continue
        linear = isinstance(module, (nn.Linear, Conv1D)) and "original_module" not in path.split(".")
        parent = path.rpartition(".")[0]
        while parent and parent in wrappers:
            parent = parent.rpartition(".")[0]
        # timm's MaxViT (head_first) and TinyViT (val_dim) mix q, k and v by head
        mixed = getattr(modules[parent], "head_first", False) or hasattr(modules[parent], "val_dim")
        found = _tensors(module, name)
        experts = {key for key, (_, t) in found.items() if may_be_stack(module, key, t)}
        shapes = {key: tuple(found[key][1].shape) for key in experts}
        turned, doubtful = which_way_round(module, shapes, model)
        tied = linear and id(module.weight) in looked_up
        for key, (own, tensor) in found.items():
            quantized = own == "weight" and bool(quantized_as(module))
            yield Stored(
                key,
                (module.out_features, module.in_features)
                if quantized and isinstance(module, nn.Linear)
                else tuple(tensor.shape),
                partial(_dequantized, module) if quantized else partial(_of_tensor, tensor),
                usual=(linear and module not in heads and path not in choosing and not tied)
                or key in experts,
                problem="" if quantized else problem_in(module, tensor, own),
                experts=key in experts,
                transposed=isinstance(module, Conv1D) or key in turned,
                doubtful=key in doubtful,
                interleaved=not getattr(module, "is_concatenated", True),
                thirds=(linear and not mixed) or own == "in_proj_weight",
            )


def _tensors(module: nn.Module, name: str) -> dict[str, tuple[str, Tensor]]:
    """A module's matrices with their own names in it, by the names they have in the model."""
    found = {name or "weight": ("weight", getattr(module, "weight", None))}
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if not isinstance(found[name or "weight"][1], Tensor):
        packed = Signs(f"layer.{key}" for key in own).payloads
        key = next((key for key in own if f"layer.{key}" in packed), "weight")
        found = {name or "weight": (key, own.get(key))}
    for key, tensor in own.items():
        whole = f"{name}.{key}" if name else key
        if key in ATTENTION and isinstance(module, nn.MultiheadAttention):
            found[whole] = (key, tensor)
        if key != "weight" and may_be_stack(module, whole, tensor):
            found[whole] = (key, tensor)
    return {
        k: (o, t) for k, (o, t) in found.items() if isinstance(t, Tensor) and not is_lazy(t) and t.ndim > 1
    }


def _of_tensor(tensor: Tensor, expert: int | None) -> Tensor:
    return tensor.detach() if expert is None else tensor.detach()[expert]


def _dequantized(layer: nn.Module, expert: int | None) -> Tensor:
    return dequantized(layer)


def name_without_peft(path: str, wrappers: Set[str]) -> str | None:
    """The name a module has without PEFT; None for what PEFT added."""
    parts, kept = path.split("."), []
    for i, part in enumerate(parts):
        if ".".join(parts[:i]) not in wrappers:
            kept.append(part)
        elif part not in ("base_layer", "original_module"):
            return None
    return ".".join(kept)
