"""Elastic weight consolidation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lens._base.precision import autocast
from lora_lens._base.torch_tools import evaluating
from lora_lens.tasks.readouts import Readout, ask
from lora_lens.training.regularizers.base import LossTerm, Past, Regularizer, check_count, check_strength
from lora_lens.training.settings import Training


@dataclass(frozen=True)
class EWC(Regularizer):
    """Parameters that earlier tasks need stay near their values: elastic weight consolidation.

    The term is strength / 2 * sum_i F_i (theta_i - theta_old_i)^2 over the trained parameters of the model
    and of a shared head (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3). F is the diagonal of the
    Fisher information, the mean over examples of the squared gradient of log p(y | x) with y drawn from the
    model's own answers, summed over the tasks so far; theta_old are the values after the last of them (as
    Huszar 2018, arXiv 1712.03847, recommends), so it takes twice the trained parameters however many tasks
    there were. An example of a language task is a block, whose log p(y | x) is the sum over its tokens. The
    loss that the term is added to is the mean over tokens there, so lambda / tokens of a block weighs a
    language task as lambda weighs a classification.

    Attributes:
        strength: the weight of the term, lambda in the paper; 0 or more.
        examples: training examples of each task from which F is estimated, at least 1.

    Raises:
        ValueError: ``strength`` is negative or not finite, or ``examples`` less than 1; or a run starts with
            no earlier task.
        TypeError: ``examples`` is no whole number.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted, config = ll.attach(model, ll.Window.middle(4)), ll.Training(steps=2, batch_size=10)
        >>> regularizer = ll.training.EWC(10, examples=5)
        >>> run = ll.finetune(adapted, task, task, config, regularizer=regularizer, progress=False)
        >>> run.diverged
        False
        >>> print(ll.experiments.continual.Continued(ll.training.EWC(100)))
        continued, EWC 100
    """

    strength: float
    examples: int = 100

    def __post_init__(self) -> None:
        check_strength(self)
        check_count(self, "examples")

    def __str__(self) -> str:
        return f"EWC {self.strength:.15g}" + (
            "" if self.examples == EWC.examples else f", {self.examples} examples"
        )

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        past = past.known_to(self, model, config)
        parameters = _trained(model, past.scenario.shared())
        held = [
            (
                parameters[name.removeprefix("anchor ")],
                anchor,
                past.kept[name.replace("anchor ", "fisher ", 1)],
            )
            for name, anchor in past.kept.items()
            if name.startswith("anchor ")
        ]

        def extra() -> Tensor:
            # A head that has grown since keeps the rows it had.
            parts = [
                (f.to(p).flatten() * (p.flatten()[: a.numel()] - a.to(p).flatten()).square()).sum()
                for p, a, f in held
            ]
            return self.strength / 2 * sum(parts)

        return extra

    def keep(self, model: nn.Module, past: Past, config: Training) -> dict[str, Tensor]:
        task, readout = past.scenario.trained(past.place)
        parameters = _trained(model, past.scenario.shared())
        fisher = {name: torch.zeros_like(p, device="cpu") for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(task.train), generator=generator)[: self.examples]
        with evaluating(model), torch.enable_grad():
            for row in rows:
                with autocast(next(model.parameters()).device, config.precision):
                    logits, _ = ask(readout, model, task.train, row[None])
                logs = logits.float().log_softmax(-1)
                sampled = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
                log_likelihood = logs.gather(-1, sampled).sum()  # of the example: all of its tokens
                gradients = torch.autograd.grad(
                    log_likelihood, list(parameters.values()), materialize_grads=True
                )
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    total += gradient.detach().cpu().square() / len(rows)
        for name, before in past.kept.items():
            if name.startswith("fisher "):
                fisher[name.removeprefix("fisher ")].view(-1)[: before.numel()] += before.flatten()
        anchors = {f"anchor {name}": p.detach().cpu().clone() for name, p in parameters.items()}
        return anchors | {f"fisher {name}": value for name, value in fisher.items()}


def _trained(model: nn.Module, shared: Readout | None) -> dict[str, nn.Parameter]:
    parameters = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    if shared is not None:
        parameters |= {f"readout.{name}": p for name, p in shared.named_parameters()}
    return parameters
