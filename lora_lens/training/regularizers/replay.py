"""Experience replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lens._base.precision import autocast
from lora_lens.tasks.readouts import ask
from lora_lens.training.regularizers.base import LossTerm, Past, Regularizer, check_count, own_examples
from lora_lens.training.settings import Training


@dataclass(frozen=True)
class Replay(Regularizer):
    """The model trains on a few examples of earlier tasks again: experience replay.

    Of each batch half (rounded down) is taken from the buffer, which holds as many examples of every task so
    far; each step replays one of these tasks, chosen at random, through its own readout. The term is their
    cross-entropy, with the weight of the new examples' (Chaudhry et al. 2019, "On tiny episodic memories in
    continual learning", arXiv 1902.10486). Where there are more tasks than room, the buffer holds one example
    of each of some tasks, and every task is as likely to be among them (reservoir sampling, Vitter 1985).

    Attributes:
        size: examples in the buffer, of all tasks together, at least 1.

    Raises:
        ValueError: ``size`` is less than 1; or a run starts with nothing to replay, or with a batch of 1,
            which has no half.
        TypeError: ``size`` is no whole number.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted, config = ll.attach(model, ll.Window.middle(4)), ll.Training(steps=2, batch_size=10)
        >>> regularizer = ll.training.Replay(6)
        >>> run = ll.finetune(adapted, task, task, config, regularizer=regularizer, progress=False)
        >>> run.diverged
        False
        >>> print(ll.experiments.continual.Continued(ll.training.Replay(200)))
        continued, replay 200
    """

    size: int
    share: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_count(self, "size")

    def __str__(self) -> str:
        return f"replay {self.size}"

    def begin(self, model: nn.Module, past: Past, config: Training) -> LossTerm:
        past = past.known_to(self, model, config)
        kept, count = past.kept, own_examples(self, config)
        generator = torch.Generator().manual_seed(config.seed)
        earlier = sorted(int(name) for name in kept)
        readouts = {there: past.scenario.trained(there) for there in earlier}
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

    def keep(self, model: nn.Module, past: Past, config: Training) -> dict[str, Tensor]:
        kept, place = past.kept, past.place
        task, _ = past.scenario.trained(place)
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(len(task.train), generator=generator)
        if place < self.size:
            quota = self.size // (place + 1)
            # In the order drawn, so what is left of an earlier task is a smaller draw of it.
            return {name: old[:quota].clone() for name, old in kept.items()} | {str(place): rows[:quota]}
        replaced = int(torch.randint(place + 1, (1,), generator=generator))
        stay = {name: old.clone() for number, (name, old) in enumerate(kept.items()) if number != replaced}
        return stay | ({str(place): rows[:1]} if replaced < len(kept) else {})
