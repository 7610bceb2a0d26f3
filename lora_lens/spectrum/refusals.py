"""Why a layer cannot be adapted, or its weight not be changed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd

from lora_lens._base.naming import listed
from lora_lens._base.random_state import seeded
from lora_lens._base.wrappers import inner_model
from lora_lens.spectrum.layer_weights import (
    CONVOLUTIONS,
    FLOATS,
    LINEAR,
    Layer,
    shared_weights,
    weight_of,
)
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.spectrum.sources.roles import holds_experts
from lora_lens.spectrum.stacks import stack_name

PLAIN = LoraConfig()


def unchangeable(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Why the weights of some layers must stay as they are, by name, in words that follow the name."""
    shared, reasons = shared_weights(inner_model(model)), {}
    for name, layer in layers.items():
        if kind := quantized_as(layer):
            reasons[name] = f"is quantized ({type(layer).__name__} of {kind})"
        elif others := shared.get(stack_name(name)):
            reasons[name] = f"shares its weight with {listed(others, most=3)} (tied weights)"
    return reasons


def no_layer(name: str, kind: str) -> str:
    """Why a matrix among a module's own parameters, of a class called ``kind``, cannot be adapted."""
    if holds_experts(name):
        return f"holds experts in a form in which nothing but the code of {kind} tells them apart"
    return f"is a parameter of {kind} and no layer's weight"


def touched(layer: nn.Module) -> str:
    """What acts on this one layer besides its class, and would see the residual's output only."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks, which would be given the output of the residual alone; remove them first"
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):  # accelerate's moves weights only
        return "has been given a forward of its own, which PEFT's LoRA layer does not reproduce"
    return ""


def refused_by_peft(model: nn.Module, last: Iterable[str]) -> dict[str, str]:
    """By the last parts of names, what PEFT's own check before it adapts a layer refuses, as in Mamba."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is None or not hasattr(model, "config"):
        return {}
    kind, refused = getattr(model.config, "model_type", None), {}
    for name in last:
        try:
            check(None, PLAIN, model, name)
        except ValueError:
            refused[name] = f"is refused by PEFT in models of type {kind}"
    return refused


def _adds_nothing(layer: nn.Module) -> bool:
    """Whether a subclass computes what its base does, so that PEFT's layer around it is exact."""
    kind = type(layer)
    base = next((b for b in (*LINEAR, *CONVOLUTIONS) if issubclass(kind, b)), None)
    if base is None or set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules:
        return False
    ways = ("forward", "_conv_forward", "__call__", "_call_impl", "__getattr__")
    if all(getattr(kind, way, None) is getattr(base, way, None) for way in ways):
        return True
    usual = {"training", "in_features", "out_features"}
    extra = [key for key in vars(layer) if not key.startswith("_") and key not in usual]
    return base is nn.Linear and not extra and _takes_one(kind) and _is_product(kind.__mro__)


def _takes_one(kind: type[nn.Module]) -> bool:
    """Whether a call of a class's layers has the input as its only argument: others may change the result."""
    ways = [kind.forward, *(() if kind.__call__ is nn.Module.__call__ else (kind.__call__,))]
    try:
        taken = [list(inspect.signature(way, follow_wrapped=False).parameters.values()) for way in ways]
    except (TypeError, ValueError):
        return False
    plain = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return all(len(names) == 2 and {name.kind for name in names} <= plain for names in taken)


@lru_cache(maxsize=256)
def _is_product(kin: tuple[type[nn.Linear], ...]) -> bool:
    """Whether a class, given with those it inherits from, computes x W^T + b: tried in float64."""
    tried = kin[0].__new__(kin[0])
    with torch.no_grad(), seeded(0):
        nn.Linear.__init__(tried, 5, 3, dtype=torch.float64)
        for training, bias, scale in itertools.product((True, False), (True, False), (1e-3, 1.0, 1e3)):
            tried.train(training)
            if not bias:
                tried.register_parameter("bias", None)
            elif tried.bias is None:
                tried.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
            x = scale * torch.randn(2, 4, 5, dtype=torch.float64)
            expected = nn.functional.linear(x, tried.weight, tried.bias)
            try:
                found = tried(x)
            except Exception:  # whatever a stranger's forward raises on plain input, it is no plain product
                return False
            same = isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == x.dtype
            if not same or not torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * scale):
                return False
    return True


def reason_against(module: nn.Module, others: list[str]) -> str:
    """Why such a layer cannot be adapted; empty where it can. ``others`` are names of the same one."""
    weight, kind = weight_of(module), type(module).__name__
    if isinstance(module, BaseTunerLayer):
        return "is adapted already; merge or unload its adapter first"
    if quantized_as(module):
        return _twice(others)
    plain = type(weight.data) is Tensor and type(weight) in (nn.Parameter, Tensor)
    if isinstance(weight, DTensor):
        return "is distributed (a DTensor): attach to the model first, and shard the result"
    if not plain or (not weight.is_floating_point() and not weight.is_complex()):
        what = kind if plain else f"{kind} of {type(weight).__name__}"
        return (
            f"is quantized ({what}) without what gives its values back; move bitsandbytes' layers to their "
            "device first, or attach to the model in full precision"
        )
    if isinstance(module, nn.Embedding):
        return "is an embedding (nn.Embedding): its rows are looked up, and no product with it is ever formed"
    if others:
        return _twice(others)
    if "weight" not in module._parameters:
        return f"computes its weight ({kind} under weight or spectral norm): remove the norm first"
    if type(module) not in LINEAR + CONVOLUTIONS and not _adds_nothing(module):
        return (
            f"is a {kind}, and a window fits nn.Linear, Conv1D and plain convolutions only, or a subclass "
            "that computes the same"
        )
    if weight.is_meta:
        return "is on the meta device, with a shape but no values; load the model's weights first"
    if weight.dtype not in FLOATS:
        return f"holds {weight.dtype} values: expected float64, float32, bfloat16 or float16"
    if isinstance(module, _ConvNd):
        unpadded = module.padding in ("valid", (0,) * len(module.kernel_size))
        settings = {
            "groups": module.groups != 1,  # PEFT's connects all inputs with all outputs, and has no merge
            "dilation": any(d != 1 < k for d, k in zip(module.dilation, module.kernel_size, strict=True)),
            "padding_mode": module.padding_mode != "zeros" and not unpadded,
        }
        for setting in (name for name, other in settings.items() if other):
            value = getattr(module, setting)
            return f"is a convolution with {setting}={value!r}, which PEFT's LoRA layer does not reproduce"
    return ""


def _twice(others: list[str]) -> str:
    return (
        f"is also {listed(others, most=3)}, one layer in several places, of which PEFT adapts one"
        if others
        else ""
    )
