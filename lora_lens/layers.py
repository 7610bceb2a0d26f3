"""Which layers of a model: those that patterns select, why some cannot be adapted, and the classifier."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from lora_lens import validate
from lora_lens.errors import InputError
from lora_lens.wrappers import inner_model, named_modules, submodule

Targets = str | Sequence[str] | None

GROUPS = ("all-linear", "all-conv", "all-attention", "all-mlp")
LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense|intermediate|(^|\.)(fc\d|linear\d|w[io](_\d)?|output)(\.|$)", re.I
)


def target_layers(model: nn.Module, targets: Targets = None) -> dict[str, nn.Module]:
    """The layers that ``targets`` selects, by module name.

    They are ``nn.Linear``, GPT-2's ``Conv1D``, and ``nn.Conv1d``, ``2d`` and ``3d`` themselves, not
    subclasses, whose forward may do more.

    Args:
        targets: None for "all-linear"; or one or several of

            - a pattern, the end of a module name in whole dotted parts, with or without wildcards:
              ``"qkv"``, ``"attn.proj"``, ``"blocks.[0-2].mlp.*"``;
            - "all-linear": every linear layer but the classifier; "all-attention" and "all-mlp": those
              of them that belong there by their names; "all-conv": every convolution. What cannot be
              adapted is left out of these groups.

    Raises:
        ValueError: a pattern matches nothing, or a weight that cannot be adapted; the message has the
            reason: embeddings, tied weights, quantized values, grouped or dilated convolutions, ...
    """
    modules = {name: m for name, m in named_modules(model) if name}
    able, reasons = _adaptable(model)
    chosen: set[str] = set()
    for pattern in validate.patterns(targets) or ["all-linear"]:
        if pattern in GROUPS:
            found = _group(model, able, pattern)
            if not found:
                raise InputError(_empty_group(model, pattern, reasons))
        else:
            found = matching(modules, pattern)
            _refuse(pattern, found, modules, able, reasons)
        chosen |= found & able.keys()
    return {name: m for name, m in able.items() if name in chosen}


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as (out_features, in_features), a view if possible; of a convolution (out, in * kh * kw)."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


@torch.no_grad()
def set_weight_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Write what :func:`weight_matrix` reads."""
    place = weight_matrix(layer)
    place.copy_(matrix)
    if place.data_ptr() != layer.weight.data_ptr():  # of a convolution in channels-last order it is a copy
        layer.weight.copy_(place.view(layer.weight.shape))


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of :func:`weight_matrix`."""
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def part_of(name: str) -> str:
    """ "attention", "mlp" or "other", by the usual names of layers."""
    return "attention" if ATTENTION.search(name) else "mlp" if MLP.search(name) else "other"


def _group(model: nn.Module, able: Mapping[str, nn.Module], group: str) -> set[str]:
    if group == "all-conv":
        return {n for n, m in able.items() if isinstance(m, CONVOLUTIONS)}
    output = classifier(model, required=False)
    linear = {n for n, m in able.items() if isinstance(m, LINEAR) and m is not output}
    return linear if group == "all-linear" else {n for n in linear if f"all-{part_of(n)}" == group}


def _adaptable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules whose weight can be given a window, and why the other modules with a weight cannot."""
    places: dict[int, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None and not is_lazy(weight):
            places.setdefault(id(weight), []).append(name)
    able, reasons = {}, {}
    for name, module in named_modules(model):
        weight = getattr(module, "weight", None)
        if not name or not isinstance(weight, Tensor) or is_lazy(weight) or weight.ndim < 2:
            continue
        parent, _, child = name.rpartition(".")
        others = [n for n in places.get(id(weight), []) if n != name]
        reader = type(submodule(model, parent))
        if _passed_by(reader, child):
            reasons[name] = f"is passed by: {reader.__name__} reads its weight without calling it"
        else:
            reasons[name] = _reason(module, others)
        if not reasons[name]:
            able[name] = module
    return able, {name: reason for name, reason in reasons.items() if reason}


def _reason(module: nn.Module, others: list[str]) -> str:
    weight, kind = module.weight, type(module).__name__
    if isinstance(module, BaseTunerLayer):
        return "is adapted already; merge or unload its adapter first"
    plain = type(weight.data) is Tensor and type(weight) in (nn.Parameter, Tensor)
    if not plain or (not weight.is_floating_point() and not weight.is_complex()):
        what = kind if plain else f"{kind} of {type(weight).__name__}"
        return (
            f"is quantized ({what}), and its residual would lose what rounding takes; attach to the model in "
            "full precision, write it with export_residual, and quantize the base that is written"
        )
    if isinstance(module, nn.Embedding):
        return "is an embedding (nn.Embedding): its rows are looked up, and no product with it is ever formed"
    if others:
        return f"shares its weight with {listed(others, most=3)} (tied weights): a residual would change both"
    if "weight" not in module._parameters:
        return f"computes its weight ({kind} under weight or spectral norm): remove the norm first"
    if type(module) not in LINEAR + CONVOLUTIONS:
        return f"is a {kind}, and a window fits nn.Linear, Conv1D and plain convolutions only"
    if weight.is_meta:
        return "is on the meta device, with a shape but no values; load the model's weights first"
    if weight.dtype not in FLOATS:
        return f"holds {weight.dtype} values: expected float64, float32, bfloat16 or float16"
    if isinstance(module, _ConvNd):
        settings = {
            "groups": module.groups != 1,
            "dilation": any(d != 1 for d in module.dilation),
            "padding_mode": module.padding_mode != "zeros",
        }
        for setting in (name for name, other in settings.items() if other):
            value = getattr(module, setting)
            return f"is a convolution with {setting}={value!r}, which PEFT's LoRA layer does not reproduce"
    return ""


@lru_cache(maxsize=4096)
def _passed_by(parent: type[nn.Module], child: str) -> bool:
    """Whether a forward hands its child's weight to a function, as attention with separate biases does."""
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return False
    return bool(
        re.search(
            rf"(linear|conv\dd|matmul|einsum|attention_forward|encoder_layer_fwd)\([^()]*self\.{re.escape(child)}\.weight\b",
            source,
        )
    )


def _refuse(
    pattern: str,
    found: set[str],
    modules: Mapping[str, nn.Module],
    able: Mapping[str, nn.Module],
    reasons: Mapping[str, str],
) -> None:
    good, bad = found & able.keys(), sorted(found & reasons.keys())
    if good and not bad:
        return
    kinds = listed(sorted({block_and_kind(name)[1] for name in able})) or "none"
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


def _empty_group(model: nn.Module, group: str, reasons: Mapping[str, str]) -> str:
    what = {
        "all-linear": "linear layer besides its classifier",
        "all-conv": "convolution",
        "all-attention": "linear layer whose name tells of attention",
        "all-mlp": "linear layer whose name tells of an MLP",
    }[group]
    kin = _ConvNd if group == "all-conv" else LINEAR
    said = [f"; {n} {why}" for n, why in reasons.items() if isinstance(submodule(model, n), kin)]
    refused = said[0] if said else ""
    return f"{type(model).__name__} has no {what} that can be adapted{refused}"


def classifier(model: nn.Module, required: bool = True) -> nn.Linear | None:
    """The linear layer that turns a model's features into its logits.

    Asks timm's ``get_classifier`` or transformers' ``get_output_embeddings``,
    else takes the usual attribute names (``head``, ``classifier``, ``score``, ``fc``).

    Raises:
        ValueError: ``required`` and the model has none.
    """
    model = inner_model(model)
    ask = getattr(model, "get_classifier", getattr(model, "get_output_embeddings", lambda: None))
    found = ask()
    for name in ("head", "classifier", "score", "fc"):
        found = inner_model(found) if isinstance(found, nn.Module) else found
        if isinstance(found, nn.Linear):
            return found
        found = getattr(model, name, None)
    found = inner_model(found) if isinstance(found, nn.Module) else found
    if isinstance(found, nn.Linear):
        return found
    if required:
        raise InputError(
            f"{type(model).__name__} has no linear classifier: expected get_classifier() as in timm, "
            "or an nn.Linear named head, classifier, score or fc"
        )
    return None


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """The names that end in ``pattern``, in whole dotted parts; it may hold wildcards."""
    return {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}


def block_and_kind(name: str) -> tuple[int, str]:
    """``"blocks.3.attn.qkv"`` -> ``(3, "attn.qkv")``; without a number the block is -1."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1 :]) or name
    return -1, name


def check_finite(name: str, weight: Tensor) -> None:
    # The sum is faster than asking each, and copies nothing; it may be infinite by itself.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise InputError(
            f"{name}.weight holds NaN or infinite values, so it has no spectrum; "
            "load the model again or mend the checkpoint"
        )


def listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _described(modules: Mapping[str, nn.Module], names: Iterable[str]) -> str:
    return listed([f"{n} ({type(modules[n]).__name__})" for n in sorted(names)], most=4)


def _longer(names: set[str]) -> str:
    return block_and_kind(min(names))[1]
