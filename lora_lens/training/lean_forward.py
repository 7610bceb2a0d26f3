"""LoRA layers that cost less while a model is trained and tested: the same function, one product.

PEFT computes W x + scaling B (A x), which takes three products forward, five backward, and passes over the
outputs between. Here W + scaling B A is formed first, by rank * out * in multiplications where a product with
N inputs takes N * out * in; then the layer is one product forward, and in a test it costs what a layer
without adapter costs. Only rounding differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_lens.adapters.injection import ADAPTER
from lora_lens.adapters.offset import Offset, start_in, widened

OPTIMIZED = torch._dynamo.OptimizedModule
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "parametrizations",
)  # fmt: skip


class _LowRankUpdate(torch.autograd.Function):
    """x (..., in) times (base + scaling B A)^T, plus bias; gradients for x, B and A.

    A start (B_0, A_0), if there is one, is taken off: base + scaling (B A - B_0 A_0).

    The summed weight is formed again for the backward pass: keeping it would take a second model's memory.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        base: Tensor,
        bias: Tensor | None,
        b: Tensor,
        a: Tensor,
        scaling: float,
        *start: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, base, b, a, *start)
        ctx.scaling = scaling
        return nn.functional.linear(x, _summed(base, b, a, scaling, *start), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: Tensor) -> tuple[Tensor | None, ...]:
        x, base, b, a, *start = ctx.saved_tensors
        of_x = of_b = of_a = None
        rows, inputs = outer.reshape(-1, outer.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0]:
            of_x = (rows @ _summed(base, b, a, ctx.scaling, *start)).view_as(x)
        # The rank comes first in each of these products: with it last they take three to five times as long.
        if ctx.needs_input_grad[3]:
            of_b = (a @ inputs.T @ rows).T.mul(ctx.scaling)
        if ctx.needs_input_grad[4]:
            of_a = (b.T @ rows.T @ inputs).mul_(ctx.scaling)
        return of_x, None, None, of_b, of_a, None, *(None for _ in start)


def _summed(base: Tensor, b: Tensor, a: Tensor, scaling: float, *start: Tensor) -> Tensor:
    if start:
        b, a = widened(b, a, *start)
    return torch.addmm(base, b, a, alpha=scaling)


@contextmanager
def lean_layers(model: nn.Module, precision: str) -> Iterator[None]:
    """While it lasts, those of ``model``'s LoRA layers for which it can be computed their output at once.

    Only in float32: in bfloat16 the sum of a weight and a small update would round the update away. Layers
    with dropout, DoRA, hooks inside or anything else that PEFT's own forward pass heeds stay PEFT's.
    """
    able = [] if precision != "float32" or _compiled(model) else list(filter(is_plain, model.modules()))
    for layer in able:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in able:
            del layer.forward


def _forward(layer: Linear, x: Tensor, *others: object, **named: object) -> Tensor:
    if x.dtype != torch.float32 or layer.disable_adapters or layer.merged or others or named:
        return type(layer).forward(layer, x, *others, **named)
    base = layer.base_layer
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    scaling, start = layer.scaling[ADAPTER], start_in(layer) or ()
    return _LowRankUpdate.apply(x, base.weight, base.bias, b, a, scaling, *start)


def _compiled(model: nn.Module) -> bool:
    return any(isinstance(module, OPTIMIZED) or module._compiled_call_impl for module in model.modules())


def is_plain(layer: nn.Module) -> bool:
    """Whether PEFT's forward pass does nothing else with this module than add the adapter's output."""
    if type(layer) is not Linear or "forward" in vars(layer) or not isinstance(layer, LoraLayer):
        return False
    if list(layer.active_adapters) != [ADAPTER] or ADAPTER not in layer.lora_A:
        return False
    if any(not isinstance(variant, Offset) for variant in layer.lora_variant.values()):
        return False
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    dropout = layer.lora_dropout[ADAPTER]
    parts = [base, a, b]
    if any(type(part) is not nn.Linear or "forward" in vars(part) for part in parts):
        return False
    if any(getattr(part, name, None) for part in (*parts, dropout) for name in HOOKS):
        return False
    tensors = [base.weight, a.weight, b.weight, *([] if base.bias is None else [base.bias])]
    return (
        getattr(dropout, "p", 0) == 0
        and a.bias is None
        and b.bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and all(type(t) is nn.Parameter and t.dtype == torch.float32 for t in tensors)
    )
