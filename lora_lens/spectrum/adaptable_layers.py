"""Which layers of a model can be adapted, and which of them patterns and groups select."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import GROUPS, Targets, block_and_kind, listed
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import inner_model, named_modules
from lora_lens.spectrum.heads import head_layers
from lora_lens.spectrum.layer_weights import (
    CONVOLUTIONS,
    FLOATS,
    LINEAR,
    Layer,
    matrix_shape,
    shared_weights,
)
from lora_lens.spectrum.patterns import ONE_EXPERT, matching, part_of, routers
from lora_lens.spectrum.refusals import no_layer, reason_against, refused_by_peft, touched
from lora_lens.spectrum.stacks import Stack, stack_name, stacks_in, why_not
from lora_lens.spectrum.usage.weight_reads import used_otherwise
from lora_lens.spectrum.window import require_fit


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


def adaptable(model: nn.Module) -> Adaptable:
    """Which weights can be given a window, why the others cannot, and which groups they belong to."""
    model = inner_model(model)
    shared = shared_weights(model)
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
    refused = refused_by_peft(model, {name.rpartition(".")[2] for name in layers})
    able: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    unexpected: set[str] = set()
    for name, module in weighted.items():
        others = shared.get(name, [])
        kind = reason_against(module, [n for n in others if everywhere.get(n) is module])
        reason = kind or used.get(name) or touched(module) or refused.get(name.rpartition(".")[2])
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
                reasons[own] = no_layer(own, type(module).__name__)
    return Adaptable(model, able, reasons, unexpected, groups, stacks)


def _is_matrix(parameter: Tensor) -> bool:
    return not is_lazy(parameter) and parameter.ndim > 1


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
