"""Stay near the pretrained answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.precision import autocast
from lora_lens._base.torch_tools import evaluating
from lora_lens.tasks.batches import in_batches
from lora_lens.tasks.readouts import Readout, ask
from lora_lens.tasks.task import Examples, shuffled_rows
from lora_lens.training.regularizers.base import LossTerm, Past, Regularizer, check_strength, own_examples
from lora_lens.training.settings import Training

MOST_ANSWERS = 5e8  # numbers that are kept: 2 GB


@dataclass(frozen=True)
class KLAnchor(Regularizer):
    """Answers to examples of the retained task stay near the pretrained ones.

    Half of each batch (rounded down) are training examples of the retained task; on these the term
    is strength times the mean KL(p_pretrained || p_now) of the old head, in nats. So a step costs as
    much as without it, and sees half as many new examples. Li and Hoiem (2018), "Learning without
    forgetting" (arXiv 1606.09282), do the same on the new task's images; here the source data are at hand.
    The labels of the retained task are not used.

    The pretrained answers are those of the model as it starts, in evaluation mode, computed once for each
    example that the run will see, and kept.

    Attributes:
        strength: the weight of the term, 0 or more.

    Raises:
        ValueError: ``strength`` is negative or not finite; or a run starts without a retained task, with a
            batch of 1, which has no half, or with more answers to keep than fit into memory, as for a
            language model's whole vocabulary.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted, config = ll.attach(model, ll.Window.middle(4)), ll.Training(steps=2, batch_size=10)
        >>> regularizer = ll.training.KLAnchor(1.0)
        >>> run = ll.finetune(adapted, task, task, config, regularizer=regularizer, progress=False)
        >>> abs(run.loss_rise) < 0.1  # nats
        True
    """

    strength: float
    share: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_strength(self)

    def __str__(self) -> str:
        return f"KL anchor {self.strength:.15g}"

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        if (retain := past.retain) is None:
            raise InputError(
                "KLAnchor compares answers on the retained task, and there is none: give finetune retain="
            )
        half = own_examples(self, config)
        examples, readout = retain.to_guard(), retain.own_readout(model)
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
            found = in_batches(
                model,
                examples.take(used),
                lambda rows: _log_probabilities(model, readout, examples, used[rows], config.precision),
            )
            places_of_parts, parts = zip(*found, strict=True)
        order = torch.cat(places_of_parts).argsort()
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


def _log_probabilities(
    model: nn.Module, readout: Readout, examples: Examples, rows: Tensor, precision: str
) -> Tensor:
    """(examples, items of each, choices); one item each but for language tasks."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        logits, _ = ask(readout, model, examples, rows)
    return logits.float().log_softmax(-1).reshape(len(rows), -1, logits.shape[-1])
