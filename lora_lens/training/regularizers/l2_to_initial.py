"""Stay near the pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.stacks import StackedLayer, matrices_of
from lora_lens.adapters.start import factor_matrix, is_dora
from lora_lens.training.regularizers.base import LossTerm, Past, Regularizer, check_strength
from lora_lens.training.settings import Training


@dataclass(frozen=True)
class L2ToInitial(Regularizer):
    """Weights stay near where they started: strength / 2 times the sum of ||dW||_F^2 over what is trained.

    dW is the change of the effective weight since the first step, s (B A - B_0 A_0) with s the adapter's
    scaling; it comes from the factors and is not formed. Without an adapter, dW is the change of each
    trainable parameter, biases and norms included. The new head is left out. This is L2-SP of Li, Grandvalet
    and Davoine (2018), arXiv 1802.01483, equation 3 without its term for the new layers.

    Attributes:
        strength: the weight of the term, 0 or more.

    Raises:
        ValueError: ``strength`` is negative or not finite; or a run starts with a DoRA adapter, whose change
            is no product of factors.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted, config = ll.attach(model, ll.Window.middle(4)), ll.Training(steps=2, batch_size=10)
        >>> regularizer = ll.training.L2ToInitial(0.1)
        >>> run = ll.finetune(adapted, task, task, config, regularizer=regularizer, progress=False)
        >>> abs(run.loss_rise) < 0.1  # nats
        True
    """

    strength: float

    def __post_init__(self) -> None:
        check_strength(self)

    def __str__(self) -> str:
        return f"L2 to initial {self.strength:.15g}"

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        parts = [part for layer in layers for part in matrices_of(layer)]
        if any(is_dora(layer) for layer in layers):
            raise InputError(
                "L2ToInitial measures the change of B A, and DoRA changes the lengths of the rows as well; "
                "train without dora, or under another regularizer"
            )
        adapted = [
            (part, factor_matrix(part.lora_B).clone(), factor_matrix(part.lora_A).clone()) for part in parts
        ]
        factors = {id(p) for x in layers for part in (x.lora_A, x.lora_B) for p in part.parameters()}
        others = [
            (p, p.detach().clone()) for p in model.parameters() if p.requires_grad and id(p) not in factors
        ]

        def extra() -> Tensor | float:
            moved = [squared_change(*start) for start in adapted]
            moved += [(now - before).square().sum() for now, before in others]
            return self.strength / 2 * sum(moved)

        return extra


def squared_change(layer: LoraLayer, b0: Tensor, a0: Tensor) -> Tensor:
    """||s (B A - B_0 A_0)||_F^2 of an adapted layer: a scalar with a gradient for the layer's factors.

    As B A - B_0 A_0 = [B - B_0, B_0] [A; A - A_0] = P Q, it is the sum of the entries of P^T P * Q Q^T,
    both (2 rank, 2 rank). Small changes lose nothing to rounding, as they would in the difference of
    ||B A||^2, ||B_0 A_0||^2 and their product.

    Args:
        layer: one of PEFT's, with one adapter, which is not DoRA.
        b0: the factor B at the start, (out_features, rank).
        a0: the factor A at the start, (rank, in_features).

    Raises:
        TypeError: ``layer`` is no such layer, or a factor is no tensor.
    """
    instance(layer, (LoraLayer, StackedLayer), "layer", "a layer with PEFT's adapter")
    for name, factor in (("b0", b0), ("a0", a0)):
        instance(factor, Tensor, name, "a factor at the start, a tensor")
    b, a = (part[ADAPTER].weight.flatten(1) for part in (layer.lora_B, layer.lora_A))
    left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
    return layer.scaling[ADAPTER] ** 2 * ((left.T @ left) * (right @ right.T)).sum()
