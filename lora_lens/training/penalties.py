"""Penalties against forgetting, added to the loss of the new task.

They are the usual answers to forgetting that need no choice of a window: stay near the pretrained
weights, or near the pretrained answers. Give one to :func:`lora_lens.finetune`, or to
:class:`lora_lens.adapters.Penalized` for a sweep. The strength 0 trains as without a penalty, except that
:class:`KLAnchor` still spends half of each batch on the retained task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.precision import autocast
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.validate import instance
from lora_lens.adapters.injection import ADAPTER, factor_matrix, is_dora
from lora_lens.adapters.methods import Penalty
from lora_lens.tasks.readouts import Readout, ask
from lora_lens.tasks.task import Examples, Task, shuffled_rows
from lora_lens.training.settings import Training

MOST_ANSWERS = 5e8  # numbers that KLAnchor keeps: 2 GB


@dataclass(frozen=True)
class L2ToInitial(Penalty):
    """Weights stay near where they started: strength / 2 times the sum of ||dW||_F^2 over what is trained.

    dW is the change of the effective weight since the first step, s (B A - B_0 A_0) with s the adapter's
    scaling; it comes from the factors and is not formed. Without an adapter, dW is the change of each
    trainable parameter, biases and norms included. The new head is left out. This is L2-SP of Li, Grandvalet
    and Davoine (2018), arXiv 1802.01483, equation 3 without its term for the new layers.

    Raises:
        ValueError: :meth:`begin` meets a DoRA adapter, whose change is no product of factors.
    """

    def __str__(self) -> str:
        return f"L2 to initial {self.strength:.15g}"

    def begin(self, model: nn.Module, retain: Task | None, config: Training) -> Callable[[], Tensor | float]:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if any(is_dora(layer) for layer in layers):
            raise InputError(
                "L2ToInitial measures the change of B A, and DoRA changes the lengths of the rows as well; "
                "train without dora, or under another penalty"
            )
        adapted = [
            (layer, factor_matrix(layer.lora_B).clone(), factor_matrix(layer.lora_A).clone())
            for layer in layers
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


@dataclass(frozen=True)
class KLAnchor(Penalty):
    """Answers on the retained task stay near the pretrained ones, seen on examples from it.

    Of each batch the half (rounded down) are training examples of the retained task; on these the penalty
    is strength times the mean KL(p_pretrained || p_now) of the old head, in nats. So a step costs as
    much as without it, and sees half as many new examples. Li and Hoiem (2018), "Learning without
    forgetting" (arXiv 1606.09282), do the same on the new task's images; here the source data are at hand.
    The labels of the retained task are not used.

    The pretrained answers are those of the model as it starts, in evaluation mode, computed once for each
    example that the run will see, and kept.

    Raises:
        ValueError: :meth:`begin` has no retained task, a batch of 1, which has no half, or more answers to
            keep than fit a memory, as for a language model's whole vocabulary.
    """

    share: ClassVar[float] = 0.5

    def __str__(self) -> str:
        return f"KL anchor {self.strength:.15g}"

    def begin(self, model: nn.Module, retain: Task | None, config: Training) -> Callable[[], Tensor]:
        if retain is None:
            raise InputError(
                "KLAnchor compares answers on the retained task, and there is none: give finetune retain="
            )
        half = int(config.batch_size * self.share)
        if half < 1:
            raise InputError(
                f"KLAnchor needs half of each batch, and batch_size is {config.batch_size}: use 2 or more"
            )
        examples, readout = retain.train, retain.own_readout(model)
        readout.to(next(model.parameters()).device)
        batches = torch.stack(
            list(islice(shuffled_rows(len(examples), half, config.seed), config.steps))
        )  # (steps, half)
        used, places = batches.unique(return_inverse=True)
        with evaluating(model), torch.no_grad():
            one = _log_probabilities(model, readout, examples, used[:1], config.precision)
            if (size := one.numel() * len(used)) > MOST_ANSWERS:
                raise InputError(
                    f"KLAnchor keeps the pretrained answers to the {len(used)} examples of {retain.name} "
                    f"that the run will see, and these are {size:.1e} numbers, more than "
                    f"{MOST_ANSWERS:.0e}; retain a task with fewer choices, or take L2ToInitial"
                )
            batches_of_used = list(examples.take(used).in_batches())
            parts = [
                _log_probabilities(model, readout, examples, used[rows], config.precision)
                for rows in batches_of_used
            ]
        order = torch.cat(batches_of_used).argsort()
        pretrained = torch.cat(parts)[order]  # (examples used, items, choices)
        steps = iter(places)

        def extra() -> Tensor:
            place = next(steps)
            now = _log_probabilities(model, readout, examples, used[place], config.precision)
            target = pretrained[place]
            kl = nn.functional.kl_div(
                now.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
            )
            return self.strength * kl

        return extra


def squared_change(layer: LoraLayer, b0: Tensor, a0: Tensor) -> Tensor:
    """||s (B A - B_0 A_0)||_F^2 of an adapted layer: a scalar with a gradient for the layer's factors.

    As B A - B_0 A_0 = [B - B_0, B_0] [A; A - A_0] = P Q, it is the sum of the entries of P^T P * Q Q^T,
    both (2 rank, 2 rank). Small changes lose nothing to rounding, as they would in the difference of
    ||B A||^2, ||B_0 A_0||^2 and their product.

    Args:
        layer: PEFT's, with one adapter, no DoRA.
        b0, a0: the factors at the start, (out_features, rank) and (rank, in_features).

    Raises:
        TypeError: they are no such layer and tensors.
    """
    instance(layer, LoraLayer, "layer", "a layer with PEFT's adapter")
    for name, factor in (("b0", b0), ("a0", a0)):
        instance(factor, Tensor, name, "a factor at the start, a tensor")
    b, a = (part[ADAPTER].weight.flatten(1) for part in (layer.lora_B, layer.lora_A))
    left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
    return layer.scaling[ADAPTER] ** 2 * ((left.T @ left) * (right @ right.T)).sum()


def _log_probabilities(
    model: nn.Module, readout: Readout, examples: Examples, rows: Tensor, precision: str
) -> Tensor:
    """(examples, items of each, choices); one item each but for language tasks."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        logits, _ = ask(readout, model, examples, rows)
    return logits.float().log_softmax(-1).reshape(len(rows), -1, logits.shape[-1])
