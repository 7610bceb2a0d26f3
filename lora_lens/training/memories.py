"""What is kept of earlier tasks while the next one is learnt: the usual remedies against forgetting.

Each adds a term to the loss of the new task. What it keeps does not grow with the number of tasks. The
other remedies need no memory: a window, or :class:`lora_lens.training.L2ToInitial`, which in a sequence
holds the weights near where the last task left them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.precision import autocast
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.validate import number, whole_number
from lora_lens.adapters.injection import ADAPTER, factor_matrix, lora_layers
from lora_lens.tasks.readouts import Readout, ask
from lora_lens.tasks.scenarios import Scenario
from lora_lens.training.settings import Training

Kept = Mapping[str, Tensor]
Term = Callable[[], Tensor | float]


@dataclass(frozen=True)
class Memory:
    """What a strategy keeps of the tasks before.

    Attributes:
        share: of each batch's examples, which are taken from earlier tasks instead of the new one.
    """

    share: ClassVar[float] = 0.0

    def term(self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training) -> Term:
        """What gives the term to add to the loss at each step of the task at ``place``, never the first.

        Args:
            kept: what :meth:`learnt` returned after the task before.
            model: the one that is trained, as it starts.
        """
        raise NotImplementedError

    def learnt(
        self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training
    ) -> dict[str, Tensor]:
        """What to keep once the task at ``place`` is trained; ``model`` still has its adapter."""
        raise NotImplementedError


@dataclass(frozen=True)
class EWC(Memory):
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
        strength: lambda.
        examples: training examples of each task from which F is estimated.
    """

    strength: float
    examples: int = 100

    def __post_init__(self) -> None:
        _require_strength(self)
        _require_count(self, "examples")

    def __str__(self) -> str:
        return f"EWC {self.strength:.15g}" + (
            "" if self.examples == EWC.examples else f", {self.examples} examples"
        )

    def term(self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training) -> Term:
        parameters = _trained(model, scenario.shared())
        held = [
            (parameters[name.removeprefix("anchor ")], anchor, kept[name.replace("anchor ", "fisher ", 1)])
            for name, anchor in kept.items()
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

    def learnt(
        self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training
    ) -> dict[str, Tensor]:
        task, readout = scenario.trained(place)
        parameters = _trained(model, scenario.shared())
        fisher = {name: torch.zeros_like(p, device="cpu") for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(task.train), generator=generator)[: self.examples]
        with evaluating(model), torch.enable_grad():
            for row in rows:
                with autocast(next(model.parameters()).device, config.precision):
                    logits, _ = ask(readout, model, task.train, row[None])
                logs = logits.float().log_softmax(-1)
                drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
                log_likelihood = logs.gather(-1, drawn).sum()  # of the example: all of its tokens
                gradients = torch.autograd.grad(
                    log_likelihood, list(parameters.values()), materialize_grads=True
                )
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    total += gradient.detach().cpu().square() / len(rows)
        for name, before in kept.items():
            if name.startswith("fisher "):
                fisher[name.removeprefix("fisher ")].view(-1)[: before.numel()] += before.flatten()
        anchors = {f"anchor {name}": p.detach().cpu().clone() for name, p in parameters.items()}
        return anchors | {f"fisher {name}": value for name, value in fisher.items()}


@dataclass(frozen=True)
class Replay(Memory):
    """A few examples of earlier tasks are trained on again: experience replay.

    Of each batch half (rounded down) is taken from the buffer, which holds as many examples of every task so
    far; each step replays one of these tasks, chosen at random, through its own readout. The term is their
    cross-entropy, with the weight of the new examples' (Chaudhry et al. 2019, "On tiny episodic memories in
    continual learning", arXiv 1902.10486). Where there are more tasks than room, the buffer holds one example
    of each of some tasks, and every task is as likely to be among them (reservoir sampling, Vitter 1985).

    Attributes:
        size: examples in the buffer, of all tasks together.
    """

    size: int
    share: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        _require_count(self, "size")

    def __str__(self) -> str:
        return f"replay {self.size}"

    def term(self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training) -> Term:
        count = int(config.batch_size * self.share)
        generator = torch.Generator().manual_seed(config.seed)
        earlier = sorted(int(name) for name in kept)
        readouts = {there: scenario.trained(there) for there in earlier}
        device = next(model.parameters()).device
        for _, readout in readouts.values():
            readout.to(device)

        def extra() -> Tensor:
            there = earlier[int(torch.randint(len(earlier), (1,), generator=generator))]
            rows = kept[str(there)]
            rows = rows[torch.randint(len(rows), (count,), generator=generator)]
            task, readout = readouts[there]
            with autocast(device, config.precision):
                logits, labels = ask(readout, model, task.train, rows)
            return nn.functional.cross_entropy(logits.float(), labels)

        return extra

    def learnt(
        self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training
    ) -> dict[str, Tensor]:
        task, _ = scenario.trained(place)
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(task.train), generator=generator)
        if place < self.size:
            quota = self.size // (place + 1)
            # In the order drawn, so what is left of an earlier task is a smaller draw of it.
            return {name: old[:quota].clone() for name, old in kept.items()} | {str(place): rows[:quota]}
        replaced = int(torch.randint(place + 1, (1,), generator=generator))
        stay = {name: old.clone() for number, (name, old) in enumerate(kept.items()) if number != replaced}
        return stay | ({str(place): rows[:1]} if replaced < len(kept) else {})


@dataclass(frozen=True)
class Orthogonal(Memory):
    """Each task's LoRA reads other directions of the input than the earlier ones: O-LoRA.

    The term is strength * sum_i ||A_i A^T||_F^2 over the earlier tasks i and all layers, with A (rank, in) of
    the task that is learnt (Wang et al. 2023, "Orthogonal subspace learning for language model continual
    learning", arXiv 2310.14152, equation 8). It is the trace of A G A^T with G = sum_i A_i^T A_i, so one
    (in, in) matrix per layer is kept however many tasks there were. The earlier adapters stay in the weights.

    Attributes:
        strength: lambda_1.
    """

    strength: float

    def __post_init__(self) -> None:
        _require_strength(self)

    def __str__(self) -> str:
        return f"O-LoRA {self.strength:.15g}"

    def term(self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training) -> Term:
        pairs = [
            (layer.lora_A[ADAPTER].weight, kept[name].to(layer.lora_A[ADAPTER].weight))
            for name, layer in _lora_layers(model).items()
        ]

        def extra() -> Tensor:
            return self.strength * sum(((a.flatten(1) @ gram) * a.flatten(1)).sum() for a, gram in pairs)

        return extra

    def learnt(
        self, kept: Kept, model: nn.Module, scenario: Scenario, place: int, config: Training
    ) -> dict[str, Tensor]:
        grams = {}
        for name, layer in _lora_layers(model).items():
            a = factor_matrix(layer.lora_A).float().cpu()
            grams[name] = a.T @ a + kept.get(name, 0)
        return grams


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return lora_layers(model) if isinstance(model, PeftModel) else {}


def _trained(model: nn.Module, shared: Readout | None) -> dict[str, nn.Parameter]:
    parameters = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    if shared is not None:
        parameters |= {f"readout.{name}": p for name, p in shared.named_parameters()}
    return parameters


def _require_strength(memory: EWC | Orthogonal) -> None:
    object.__setattr__(memory, "strength", number(memory.strength, "a memory's strength", least=0))


def _require_count(memory: EWC | Replay, name: str) -> None:
    object.__setattr__(memory, name, whole_number(getattr(memory, name), name, least=1))
