"""Which layers of a model: those that patterns select, why some cannot be adapted, and the classifier."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import GROUPS, Targets, block_and_kind, listed
from lora_lens._base.random_state import seeded
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import inner_model, named_modules, submodule
from lora_lens.spectrum.heads import head_layers
from lora_lens.spectrum.patterns import ONE_EXPERT, matching, part_of, routers
from lora_lens.spectrum.quantized_layers import dequantized, quantized_as
from lora_lens.spectrum.sources.roles import holds_experts
from lora_lens.spectrum.stacks import Stack, StackedMatrix, stack_name, stacked_at, stacks_in, why_not
from lora_lens.spectrum.usage.kept_layers import memory
from lora_lens.spectrum.usage.weight_reads import used_otherwise
from lora_lens.spectrum.window import require_fit

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Module | StackedMatrix
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
PLAIN = LoraConfig()


@dataclass(frozen=True, eq=False)
class Adaptable:
    """What :func:`adaptable` finds out about a model.

    Attributes:
        layers: those whose weight can be given a window, by name.
        reasons: why each of the other modules with a weight cannot, in words that follow its name.
        unexpected: the names among ``reasons`` whose kind could be adapted, if the model used it as usual.
        groups: by group, the names of the layers of ``layers`` and of ``unexpected`` that belong to it.
        stacks: tensors of experts, by name; each expert that can be adapted is among ``layers``.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    reasons: Mapping[str, str]
    unexpected: Set[str]
    groups: Mapping[str, Set[str]]
    stacks: Mapping[str, Stack]


def target_layers(model: nn.Module, targets: Targets = None) -> dict[str, Layer]:
    """The layers that ``targets`` selects, by module name.

    They are ``nn.Linear``, GPT-2's ``Conv1D``, and ``nn.Conv1d``, ``2d`` and ``3d``, subclasses that
    compute the same, and experts that are stored as one tensor, each as ``...experts.down_proj[3]``.

    Args:
        targets: None for "all-linear"; or one or several of

            - a pattern, the end of a module name in whole dotted parts, with or without wildcards:
              ``"qkv"``, ``"attn.proj"``, ``"blocks.[0-11].mlp.*"``, see
              :func:`lora_lens.spectrum.patterns.matching`;
            - "all-linear": every linear layer but the head's and the routers of experts, see
              :func:`lora_lens.spectrum.heads.head_layers`; "all-attention" and "all-mlp": those of them that
              belong there by their names; "all-conv": every convolution; "all-experts": every expert, those
              that are layers and those that lie in one tensor, which "all-linear" leaves out. What cannot be
              adapted is left out of these groups.

    Raises:
        InputError: a pattern matches nothing, or a weight that cannot be adapted; the message has the
            reason: embeddings, unknown quantizations, a weight that its parent reads by itself, grouped or
            dilated convolutions, ...

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 8))
        >>> list(ll.spectrum.target_layers(model)), list(ll.spectrum.target_layers(model, "all-conv"))
        (['2'], ['0'])
    """
    validate.instance(model, nn.Module, "model", "a torch.nn.Module")
    return choose(adaptable(model), targets)[0]


def choose(
    found: Adaptable, targets: Targets = None, rank: int | None = None
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that ``targets`` selects, and the reasons by name of what groups leave out unexpectedly.

    Args:
        targets: as in :func:`target_layers`.
        rank: groups leave out the layers with fewer components; named ones stay.
    """
    model, able, reasons = found.model, found.layers, found.reasons
    modules: dict[str, object] = {name: m for name, m in named_modules(model) if name}
    modules |= found.stacks
    modules |= {name: able[name] for name in able if name not in modules}
    chosen: set[str] = set()
    left_out: dict[str, str] = {}
    for pattern in validate.patterns(targets) or ["all-linear"]:
        if pattern in GROUPS:
            members = found.groups[pattern]
            why = {n: reasons[n] for n in members & found.unexpected}
            small = {n: k for n in members & able.keys() if rank and (k := min(matrix_shape(able[n]))) < rank}
            why |= dict.fromkeys(small, f"has fewer components than the rank, {rank}")
            out = {n: why[n] for n in modules if n in why}
            if not members - out.keys():
                if rank and small:  # the message for the largest of them says what would fit
                    most = max((name for name in out if name in small), key=small.__getitem__)
                    require_fit(rank, small[most], most)
                raise InputError(_empty_group(found, pattern, out or reasons))
            left_out |= out
            chosen |= members - out.keys()
        else:
            named = matching(modules, pattern) or matching(reasons, pattern)
            if named & found.stacks.keys():
                named |= {name for name in found.groups["all-experts"] if stack_name(name) in named}
            _refuse(pattern, named, modules, able, reasons)
            chosen |= named & able.keys()
    layers = {name: m for name, m in able.items() if name in chosen}
    return layers, {name: why for name, why in left_out.items() if name not in chosen}


def warn_left_out(left_out: Mapping[str, str]) -> None:
    """One warning that names what groups leave out and why, at the line outside lora_lens that asked."""
    if not left_out:
        return
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    reasons = "; ".join(f"{listed(names, most=3)}: {why}" for why, names in by_reason.items())
    count = f"{len(left_out)} layer{'s' if len(left_out) > 1 else ''}"
    warn(f"{count} of the targets left out, which cannot be adapted: {reasons}")


def layers_at(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """The layers and experts of these names, in their order.

    Raises:
        AttributeError: there is none of that name.
    """
    names = list(names)
    experts = stacked_at(model, names)
    return {name: experts[name] if name in experts else submodule(model, name) for name in names}


def owner_of(layer: Layer) -> Tensor:
    """The parameter that holds a layer's weight, maybe together with others."""
    return layer.stack.parameter if isinstance(layer, StackedMatrix) else weight_of(layer)


def weight_of(layer: Layer) -> Tensor:
    """The layer's weight as it is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # what is no layer with a weight has been refused
    return weight


def weight_matrix(layer: Layer) -> Tensor:
    """The weight as (out_features, in_features), a view if possible; of a convolution (out, in * kh * kw).

    What is quantized is given dequantized.
    """
    if quantized_as(layer):
        return dequantized(layer)
    weight = weight_of(layer).detach()
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


@torch.no_grad()
def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write what :func:`weight_matrix` reads."""
    place, weight = weight_matrix(layer), weight_of(layer)
    place.copy_(matrix)
    if place.data_ptr() != weight.data_ptr():  # of a convolution in channels-last order it is a copy
        weight.copy_(place.view(weight.shape))


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out_features, in_features) of :func:`weight_matrix`."""
    if quantized_as(layer) and isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = weight_of(layer)
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def unchangeable(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Why the weights of some layers must stay as they are, by name, in words that follow the name."""
    shared, reasons = _shared(inner_model(model)), {}
    for name, layer in layers.items():
        if kind := quantized_as(layer):
            reasons[name] = f"is quantized ({type(layer).__name__} of {kind})"
        elif others := shared.get(stack_name(name)):
            reasons[name] = f"shares its weight with {listed(others, most=3)} (tied weights)"
    return reasons


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """By the names of modules, what else has their weight, by memory: tied by value is tied as well."""
    places: dict[object, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                place = name if key == "weight" else f"{name}.{key}".strip(".")
                places.setdefault(memory(parameter), []).append(place)
    return {name: [n for n in names if n != name] for names in places.values() for name in names}


def adaptable(model: nn.Module) -> Adaptable:
    """Which weights can be given a window, why the others cannot, and which groups they belong to."""
    model = inner_model(model)
    shared = _shared(model)
    modules = dict(named_modules(model))
    everywhere = dict(named_modules(model, remove_duplicate=False))
    weighted = {
        name: module
        for name, module in modules.items()
        if name
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and not is_lazy(weight)
        and weight.ndim > 1
    }
    layers = {n: m for n, m in weighted.items() if isinstance(m, LINEAR + CONVOLUTIONS)}
    used = used_otherwise(modules, layers)
    refused = _refused_by_peft(model, {name.rpartition(".")[2] for name in layers})
    able: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    unexpected: set[str] = set()
    for name, module in weighted.items():
        others = shared.get(name, [])
        kind = _reason(module, [n for n in others if everywhere.get(n) is module])
        reason = kind or used.get(name) or _touched(module) or refused.get(name.rpartition(".")[2])
        if not reason:
            able[name] = module
            continue
        reasons[name] = reason
        if not kind:
            unexpected.add(name)
    aside = head_layers(model)
    chooses = routers(modules)
    # Shared weights are adapted where somebody names them: a group cannot say which layer is meant.
    members = {n: weighted[n] for n in (*able, *unexpected) if n not in chooses and not shared.get(n)}
    members = {n: module for n, module in members.items() if module not in aside}
    linear = {n for n, m in members.items() if isinstance(m, LINEAR)}
    groups = {"all-linear": linear, "all-conv": members.keys() - linear}
    groups |= {f"all-{part}": {n for n in linear if part_of(n) == part} for part in ("attention", "mlp")}
    stacks, groups["all-experts"] = stacks_in(model), {n for n in linear if ONE_EXPERT.search(n)}
    for name, stack in stacks.items():
        others = shared.get(name, [])
        tied = f"shares its memory with {listed(others, most=3)}: a residual would change both"
        if reason := tied if others else why_not(stack, modules, FLOATS):
            reasons[name] = reason
            unexpected.add(name)
            if stack.parameter.ndim > 2:
                groups["all-experts"].add(name)
        else:
            reasons.pop(name, None)  # of the module, whose own weight it is
            able |= (matrices := stack.matrices())
            if stack.parameter.ndim > 2:
                groups["all-experts"] |= matrices.keys()
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            own = f"{name}.{key}" if name else key
            if key != "weight" and own not in stacks and parameter is not None and _is_matrix(parameter):
                reasons[own] = _no_layer(own, type(module).__name__)
    return Adaptable(model, able, reasons, unexpected, groups, stacks)


def _is_matrix(parameter: Tensor) -> bool:
    return not is_lazy(parameter) and parameter.ndim > 1


def _no_layer(name: str, kind: str) -> str:
    if holds_experts(name):
        return f"holds experts in a form in which nothing but the code of {kind} tells them apart"
    return f"is a parameter of {kind} and no layer's weight"


def _touched(layer: nn.Module) -> str:
    """What acts on this one layer besides its class, and would see the residual's output only."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has forward hooks, which would be given the output of the residual alone; remove them first"
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):  # accelerate's moves weights only
        return "has been given a forward of its own, which PEFT's LoRA layer does not reproduce"
    return ""


def _refused_by_peft(model: nn.Module, last: Iterable[str]) -> dict[str, str]:
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


def _reason(module: nn.Module, others: list[str]) -> str:
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


def _refuse(
    pattern: str,
    found: set[str],
    modules: Mapping[str, object],
    able: Mapping[str, Layer],
    reasons: Mapping[str, str],
) -> None:
    good, bad = found & able.keys(), sorted(found & reasons.keys())
    if good and not bad:
        return
    kinds = listed(sorted({block_and_kind(stack_name(name))[1] for name in able})) or "none"
    if good:
        raise InputError(
            f"target {pattern!r} also matches {bad[0]}, which {reasons[bad[0]]}; "
            f"write a longer pattern, such as {_longer(good)!r}"
        )
    if bad:
        raise InputError(
            f"target {pattern!r} matches {bad[0]}, which {reasons[bad[0]]}; these could match: {kinds}"
        )
    what = f"only {_described(modules, found)}" if found else "no module"
    raise InputError(
        f"target {pattern!r} matches {what}, and not one layer with a weight; these could match: {kinds}"
    )


def _empty_group(found: Adaptable, group: str, reasons: Mapping[str, str]) -> str:
    what = {
        "all-linear": "linear layer besides its head",
        "all-conv": "convolution",
        "all-attention": "linear layer whose name tells of attention",
        "all-mlp": "linear layer whose name tells of an MLP",
        "all-experts": "tensor of experts",
    }[group]
    kin = {"all-conv": (_ConvNd,), "all-experts": (Stack,)}.get(group, LINEAR)
    kinds: dict[str, object] = {**dict(named_modules(found.model)), **found.stacks}
    refused = (f"; {n} {why}" for n, why in reasons.items() if isinstance(kinds.get(n), kin))
    return f"{type(found.model).__name__} has no {what} that can be adapted{next(refused, '')}"


def _described(modules: Mapping[str, object], names: Iterable[str]) -> str:
    return listed([f"{n} ({type(modules[n]).__name__})" for n in sorted(names)], most=4)


def _longer(names: set[str]) -> str:
    return block_and_kind(stack_name(min(names)))[1]
