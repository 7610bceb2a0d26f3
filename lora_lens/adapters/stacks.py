"""PEFT's adapter of a parameter, seen as one adapter for each matrix in it.

PEFT adapts a parameter of three dimensions (``target_parameters``) by one A (experts * rank, columns) and one
B (rows, rank * experts): in A the expert counts slowest, in B fastest. Rows and columns are those of the
parameter as PEFT takes it, (experts, rows, columns), unless the module says ``is_transposed``, which gpt-oss
does. Llama 4 stores (experts, in, out) as well and does not say so: there A acts on outputs and B on inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.stacks import Stack, StackedMatrix, stack_name, stacked_at

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedLayer, AdaptedParameter


def is_exchanged(stack: Stack) -> bool:
    """Whether PEFT's A acts on the outputs of the experts, and its B on their inputs."""
    return stack.transposed and not getattr(stack.module, "is_transposed", False)


@dataclass(frozen=True, eq=False)
class Factor:
    """A (rank, in) or B (out, rank) of one expert, like the layer in which PEFT keeps a factor."""

    wrapper: ParamWrapper
    of_a: bool
    index: int  # 0 where the parameter is one matrix

    @property
    def weight(self) -> Tensor:
        """A view, with the gradients of PEFT's tensor."""
        return _view(getattr(self.wrapper, f"lora_{'A' if self.of_a else 'B'}")[ADAPTER].weight, self)


@dataclass(frozen=True, eq=False)
class StackedLayer:
    """One expert with its adapter, like one of PEFT's layers with an adapter."""

    wrapper: ParamWrapper
    matrix: StackedMatrix

    @property
    def lora_A(self) -> dict[str, Any]:
        return {ADAPTER: self._factor(of_a=not is_exchanged(self.matrix.stack))}

    @property
    def lora_B(self) -> dict[str, Any]:
        return {ADAPTER: self._factor(of_a=is_exchanged(self.matrix.stack))}

    @property
    def scaling(self) -> Mapping[str, float]:
        return cast(Mapping[str, float], self.wrapper.scaling)

    @property
    def r(self) -> Mapping[str, int]:
        return cast(Mapping[str, int], self.wrapper.r)

    @property
    def merged(self) -> bool:
        return bool(self.wrapper.merged)

    @property
    def disable_adapters(self) -> bool:
        return bool(self.wrapper.disable_adapters)

    @property
    def lora_variant(self) -> Mapping[str, object]:
        return {}

    def get_base_layer(self) -> StackedMatrix:
        return self.matrix

    def _factor(self, of_a: bool) -> Factor | _Turned:
        factor = Factor(self.wrapper, of_a, self.matrix.index or 0)
        return _Turned(factor) if is_exchanged(self.matrix.stack) else factor

    @torch.no_grad()
    def subtract_start(self, keep: bool) -> None:
        """Have the base hold the residual: to be called for the experts of a stack in their order.

        Args:
            keep: the stack's values go to new memory before the first is changed.
        """
        stack, index = self.matrix.stack, self.matrix.index or 0
        whole = stack.parameter
        if keep and index == 0:
            whole.data = whole.data.clone()
        exact = torch.promote_types(whole.dtype, torch.float32)
        # In the parameter's dtype, because there PEFT rounds the factors of experts at each call.
        used_b, used_a = (
            factor[ADAPTER].weight.to(whole.dtype).to(exact) for factor in (self.lora_B, self.lora_A)
        )
        weight = self.matrix.weight
        weight.copy_(torch.addmm(weight.to(exact), used_b, used_a, alpha=-self.scaling[ADAPTER]))
        if index == self.wrapper.num_experts - 1:
            _require_layout(self)


@dataclass(frozen=True, eq=False)
class _Turned:
    factor: Factor

    @property
    def weight(self) -> Tensor:
        return self.factor.weight.T


def _view(tensor: Tensor, factor: Factor) -> Tensor:
    count = factor.wrapper.num_experts
    if factor.of_a:
        return tensor.view(count, -1, tensor.shape[-1])[factor.index]
    return tensor.view(len(tensor), -1, count)[..., factor.index]


def _require_layout(layer: StackedLayer) -> None:
    """Raise if PEFT adds something else to an expert than its B A: the places in A and B are PEFT's own."""
    name, index = layer.matrix.stack.name, layer.matrix.index or 0
    added = layer.wrapper.get_delta_weight(ADAPTER)
    added = (added if added.ndim == 3 else added[None])[index].float()
    ours = layer.scaling[ADAPTER] * (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).float()
    ours = ours.T if layer.matrix.stack.transposed else ours
    if ours.shape != added.shape or torch.linalg.norm(ours - added) > 0.05 * torch.linalg.norm(ours):
        raise InputError(
            f"PEFT lays out the factors of the experts {name} in another way than lora_lens knows: take the "
            "version of peft that lora_lens was tested with"
        )


def matrices_of(layer: LoraLayer) -> list[LoraLayer | StackedLayer]:
    """One of PEFT's layers, or where it is PEFT's adapter of a parameter, those of the matrices in that.

    Raises:
        ValueError: attach did not make it, so nothing says which way round the matrices are.
    """
    if not isinstance(layer, ParamWrapper):
        return [layer]
    if not hasattr(layer, "planned_transposed"):
        raise InputError(
            f"PEFT adapts the parameter {layer.parameter_name} here: attach with ll.attach instead"
        )
    return [StackedLayer(layer, matrix) for matrix in layer_stack(layer).matrices().values()]


def expanded(layers: Mapping[str, AdaptedLayer]) -> dict[str, AdaptedLayer]:
    """PEFT's layers by name, with its adapters of stacks as one for each expert."""
    found: dict[str, AdaptedLayer] = {}
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            parts = zip(layer_stack(layer).matrices(), matrices_of(layer), strict=True)
            found |= {part_name: cast("AdaptedLayer", part) for part_name, part in parts}
        else:
            found[name] = layer
    return found


def layer_stack(wrapper: ParamWrapper) -> Stack:
    """What a wrapper of PEFT's wraps, as attach noted it."""
    noted, key = cast("AdaptedParameter", wrapper), wrapper.parameter_name
    holder = noted.planned_name.removesuffix(f".{key}")
    return Stack(noted.planned_name, holder, wrapper.get_base_layer(), key, noted.planned_transposed)


def restore_order(wrapper: ParamWrapper) -> None:
    """Put the parameters of a module in the order that they had before PEFT wrapped it.

    Each pass through PEFT's wrapper takes its parameter out and puts it behind the others, and this order
    decides how the wrappers of several parameters lie in each other, and so the keys of a saved adapter.
    """
    parameters = wrapper.get_base_layer()._parameters
    for key in cast("AdaptedParameter", wrapper).planned_order:
        parameters[key] = parameters.pop(key)


def innermost(path: str) -> str:
    """The path of a module that PEFT wrapped once or several times."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def adapted_parameter(path: str, wrapper: ParamWrapper) -> str:
    """The name of the stack that a wrapper at this path adapts."""
    key = wrapper.parameter_name
    return innermost(path) if key == "weight" else f"{innermost(path)}.{key}"


def peft_keys(stacks: Mapping[str, Stack]) -> dict[str, str]:
    """The paths at which PEFT keeps the adapters of stacks: several of one module lie in each other.

    The parameter that the module made last is outermost.
    """
    by_holder: dict[str, list[str]] = {}
    for name, stack in stacks.items():
        by_holder.setdefault(stack.holder, []).append(name)
    paths: dict[str, str] = {}
    for holder, names in by_holder.items():
        order = list(stacks[names[0]].module._parameters)
        names.sort(key=lambda name: order.index(stacks[name].key), reverse=True)
        paths |= {name: holder + ".base_layer" * depth for depth, name in enumerate(names)}
    return paths


def packed(stack: Stack, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """PEFT's A and B of a stack, from (B, A) of each expert, filled up with zeros to one rank."""
    rank = max(len(a) for _, a in factors)
    bs = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for b, _ in factors])  # (E, out, rank)
    pad = nn.functional.pad
    as_ = torch.stack([pad(a, (0, 0, 0, rank - len(a))) for _, a in factors])  # (E, rank, in)
    if is_exchanged(stack):
        as_, bs = bs.transpose(1, 2), as_.transpose(1, 2)
    return as_.flatten(0, 1), bs.permute(1, 2, 0).flatten(1)


def require_whole_stacks(plan: Mapping[str, Any], layers: Mapping[str, object], variant: Variant) -> None:
    """Raise a ValueError if PEFT's adapter of a parameter cannot be what is planned for stacks.

    Args:
        plan: what each layer gets, with its rank.
        layers: all that can be adapted.
    """
    planned: dict[str, dict[str, int]] = {}
    for name in plan:
        if isinstance(layers[name], StackedMatrix):
            planned.setdefault(stack_name(name), {})[name] = plan[name].rank
    for value, why in (
        (variant.dora, "dora=True: PEFT has no DoRA for parameters"),
        (variant.dropout, f"dropout={variant.dropout:g}: PEFT adds B A to a parameter, whose input it lacks"),
        (
            variant.base == "offset",
            'base="offset": PEFT adds B A to a parameter and has no place for a start',
        ),
    ):
        if value and planned:
            raise InputError(f"{listed(planned, most=2)} takes no {why}; leave it out of the targets")
    inside: dict[str, list[str]] = {}
    for name in layers if planned else ():
        inside.setdefault(stack_name(name), []).append(name)
    for stack, ranks in planned.items():
        if missing := [name for name in inside[stack] if name not in ranks]:
            raise InputError(
                f"{listed(missing, most=2)} would be left out, and PEFT adapts all experts of a tensor "
                f"together: name {stack} without a number"
            )
        if len(several := sorted(set(ranks.values()))) > 1:
            raise InputError(
                f"the experts of {stack} would get the ranks {listed(map(str, several))}, and PEFT's adapter "
                "of a tensor has one: choose placements of one rank for them"
            )


def require_no_stacks(model: nn.Module, plan: Iterable[str], what: object) -> None:
    """Raise a ValueError if a method that PEFT has for modules only is planned for a parameter."""
    if stacked := list(stacked_at(model, plan)):
        raise InputError(
            f"{what} is for layers, and {stacked[0]} is a parameter or in one that is no layer's weight, for "
            "which PEFT has LoRA alone; leave it out of the targets"
        )
