"""Matrices that are no layer's weight: experts in one tensor, and q, k and v of nn.MultiheadAttention.

Each of them takes the place of a layer, and PEFT adapts them as parameters (``target_parameters``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lora_lens._base.wrappers import inner_model, named_modules
from lora_lens.spectrum.sources.quantized import problem_in
from lora_lens.spectrum.sources.roles import ATTENTION, holds_experts, transposed_experts

OF_WRAPPERS = {*dir(nn.Module), "num_experts"}


@dataclass(frozen=True, eq=False)
class Stack:
    """The matrices of one parameter: of three dimensions one for each expert, of two dimensions one.

    Attributes:
        name: of the parameter, such as ``model.layers.0.mlp.experts.down_proj``; without ``.weight``.
        holder: the name of the module that holds it.
        module: that module.
        key: the parameter's name there.
        transposed: whether it holds (experts, in, out) instead of (experts, out, in).
    """

    name: str
    holder: str
    module: nn.Module
    key: str
    transposed: bool

    @property
    def parameter(self) -> Tensor:
        tensor = getattr(self.module, self.key)
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return f"{self.holder}.{self.key}" if self.holder else self.key

    def matrices(self) -> dict[str, StackedMatrix]:
        if self.parameter.ndim == 2:
            return {self.name: StackedMatrix(self, None)}
        return {f"{self.name}[{i}]": StackedMatrix(self, i) for i in range(len(self.parameter))}


@dataclass(frozen=True, eq=False)
class StackedMatrix:
    """One matrix of a stack, whose ``weight`` (out, in) is a view of the model's memory."""

    stack: Stack
    index: int | None

    @property
    def weight(self) -> Tensor:
        whole = self.stack.parameter
        matrix = whole if self.index is None else whole[self.index]
        return matrix.T if self.stack.transposed else matrix


def stack_name(name: str) -> str:
    """The name of the parameter that holds an expert of this name; of any other layer its own."""
    return re.sub(r"\[\d+\]$", "", name)


def is_expert(name: str) -> bool:
    return stack_name(name) != name


def stacks_in(model: nn.Module) -> dict[str, Stack]:
    """The stacks of experts of a model, by name; also under PEFT, by the names they have without it."""
    model = inner_model(model)
    found: dict[str, Stack] = {}
    for path, module in named_modules(model):
        if not isinstance(module, BaseTunerLayer):
            holder = re.sub(r"(\.base_layer)+$", "", path)
            found |= {stack.name: stack for stack in stacks_of(module, holder, model)}
    return found


def stacks_of(module: nn.Module, holder: str, model: nn.Module) -> Iterator[Stack]:
    """The stacks that one module holds.

    Args:
        holder: its name.
        model: the whole model, whose config may say which way round they are.
    """
    if isinstance(module, nn.MultiheadAttention):
        for key in ATTENTION:
            if holder and module._parameters.get(key) is not None:
                yield Stack(f"{holder}.{key}", holder, module, key, transposed=False)
        return
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, tensor in module._parameters.items():
        name = holder if key == "weight" and holder else f"{holder}.{key}" if holder else key
        if tensor is not None and may_be_stack(module, name, tensor):
            found[name] = (key, tuple(tensor.shape))
    turned, _ = which_way_round(module, {name: shape for name, (_, shape) in found.items()}, model)
    for name, (key, _) in found.items():
        yield Stack(name, holder, module, key, name in turned)


def which_way_round(
    module: nn.Module, experts: Mapping[str, tuple[int, ...]], model: nn.Module
) -> tuple[set[str], set[str]]:
    """Those of a module's experts that it multiplies as (in, out), and those that it may."""
    if not experts:
        return set(), set()
    if isinstance(known := getattr(module, "is_transposed", None), bool):
        return (set(experts) if known else set()), set()
    facts: Mapping[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return transposed_experts(experts, facts)


def stacked_at(model: nn.Module, names: Iterable[str]) -> dict[str, StackedMatrix]:
    """Those of the names that are matrices of stacks of the model."""
    names = list(names)
    stacks = stacks_planned(model, wrapped_names(names))
    found = {n: matrix for stack in stacks.values() for n, matrix in stack.matrices().items()}
    return {name: found[name] for name in names if name in found}


def wrapped_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names of layers and parameters that PEFT wraps, for those of layers and experts, in their order."""
    return tuple(dict.fromkeys(map(stack_name, names)))


def stacks_planned(model: nn.Module, names: Iterable[str]) -> dict[str, Stack]:
    """Those of the names of :func:`wrapped_names` that are stacks of experts of the model."""
    wanted = set(names)
    modules = dict(named_modules(model))
    three = {
        n for n in wanted if n not in modules or getattr(getattr(modules[n], "weight", None), "ndim", 0) == 3
    }
    found = stacks_in(model) if three else {}
    return {name: stack for name, stack in found.items() if name in wanted}


def why_not(stack: Stack, modules: Mapping[str, nn.Module], floats: Iterable[object]) -> str:
    """Why PEFT's adapter of a parameter (``target_parameters``) does not fit a stack, or "".

    Args:
        modules: all of the model, by name.
        floats: the dtypes that can be adapted.
    """
    parameter, kind = stack.parameter, type(stack.module).__name__
    if isinstance(parameter, DTensor):
        return "is distributed (a DTensor): attach to the model first, and shard the result"
    if problem := problem_in(stack.module, parameter, stack.key):
        return problem
    if parameter.dtype not in floats:
        return f"holds {parameter.dtype} values: expected float64, float32, bfloat16 or float16"
    if not stack.holder:
        return "is a parameter of the model itself, and PEFT adapts parameters of the modules in it only"
    if len(parameter) == 1 < parameter.ndim - 1 and getattr(stack.module, "is_transposed", False):
        return "holds a single expert as (in, out), and PEFT adds its update as (out, in) (0.21 at least)"
    if stack.module._forward_hooks or stack.module._forward_pre_hooks:
        return "has forward hooks around its experts, which would be given the residual's output; remove them"
    if "forward" not in vars(stack.module) and type(stack.module).forward is nn.Module.forward:
        return f"is bypassed: other modules read it, because {kind} has no forward of its own"
    *above, child = stack.holder.split(".")
    reads = rf"\.{child}\.weight\b" if stack.key == "weight" else rf"(?<!\bself)\.{stack.key}\b"
    holders = [type(modules[".".join(above[:depth])]) for depth in range(len(above), -1, -1)]
    for holder in holders:
        if re.search(reads, _code(holder.__mro__)):
            return f"is bypassed: {holder.__name__} reads it without calling {kind}, which PEFT wraps"
    caller = next((h for h in holders if h not in (nn.ModuleList, nn.ModuleDict, nn.Sequential)), nn.Module)
    if other := [a for a in re.findall(rf"\.{child}\.(\w+)", _code(caller.__mro__)) if a not in OF_WRAPPERS]:
        return f"is used otherwise: {caller.__name__} reads {kind}.{other[0]}, which PEFT's wrapper lacks"
    if re.search(rf"\.{child}\(\s*\w+\s*=[^=]", _code(caller.__mro__)):
        return (
            f"is called by {caller.__name__} with named arguments alone, which PEFT's wrapper does not take"
        )
    return ""


@lru_cache(maxsize=1024)
def _code(kin: tuple[type, ...]) -> str:
    """The code of a class, given with those it inherits from, without the methods that set it up."""
    methods: dict[str, Any] = {}
    for base in reversed(kin):
        if issubclass(base, nn.Module) and base is not nn.Module:
            methods |= {key: value for key, value in vars(base).items() if inspect.isfunction(value)}
    found = []
    for name, method in methods.items():
        if not re.match(r"_*(init|reset)", name):
            with suppress(OSError, TypeError):  # written in a notebook, or generated
                found.append(inspect.getsource(method))
    return "\n".join(found)


def may_be_stack(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a module holds experts, by its name or its module's."""
    if is_lazy(tensor) or tensor.ndim != 3 or isinstance(module, (_ConvNd, nn.Bilinear)):
        return False
    return holds_experts(name) or "expert" in type(module).__name__.lower()
