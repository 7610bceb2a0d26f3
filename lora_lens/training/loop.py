"""The training loop: its state, a step, the tests between, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import get_cosine_schedule_with_warmup

from lora_lens._base.errors import InputError
from lora_lens._base.precision import autocast
from lora_lens._base.processes import average_gradients
from lora_lens._base.random_state import seeded
from lora_lens.tasks.readouts import ask
from lora_lens.training.lean_forward import lean_layers
from lora_lens.training.prefix_cache import FrozenPrefix, frozen_prefix
from lora_lens.training.record import Record
from lora_lens.training.regularizers.base import Past, Regularizer
from lora_lens.training.run import Progress, Run
from lora_lens.training.settings import Training

OWN_DROPOUT = 2**20  # between the seeds of two processes, whose dropout would be the same otherwise
Callback = Callable[[Progress], object]


class TrainingLoop:
    """One run of a model, its readout and a task that fit each other, which nobody checks here.

    Attributes:
        step: steps done.
        record: the tests so far.
        diverged: the loss is not finite any more.
        stopped: a callback asked to stop before the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        accelerator: Accelerator,
        *,
        regularizer: Regularizer | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Note what the regularizer must know, and start all processes alike.

        Args:
            model: as the readouts on the accelerator's device.
            record: of the run: what is learnt, what is tested besides, and their readouts.
            callbacks: called before the first step and after each; the run ends where one returns
                something true in any process.

        Raises:
            ValueError: there is nothing to train, or the regularizer does not fit.
        """
        self.model, self.record, self.accelerator, self.callbacks = model, record, accelerator, callbacks
        self.config = config = record.config
        task, readout = record.new
        self.batch_size = new_examples(config, regularizer)
        self.parameters = [p for p in [*model.parameters(), *readout.parameters()] if p.requires_grad]
        if not self.parameters:
            raise InputError(
                f"there is nothing to train: {task.name} has no head of its own, and all of the model is "
                "frozen; attach an adapter first"
            )
        if accelerator.num_processes > 1:
            for p in self.parameters:  # all start as the main process does, whatever each has drawn
                p.data = broadcast(p.data)
        past = Past(None if record.retained is None else record.retained[0])
        self.added_loss = regularizer.begin(model, past, config) if regularizer else lambda: 0.0
        self.optimizer, self.schedule = optimizer_and_schedule([self.parameters], [config.lr], config)
        self.step, self.diverged, self.stopped = 0, False, False

    def run(self) -> Run:
        """All steps, or as many as are wanted, and the tests."""
        started = time.monotonic()
        config, (task, readout) = self.config, self.record.new
        device, process = self.accelerator.device, self.accelerator.process_index
        set_training_mode(self.model)
        with lean_layers(self.model, config.precision):
            self.record.begin(self.model)
            with seeded(config.seed + OWN_DROPOUT * process, device):
                batches = task.train.shuffled(self.batch_size, config.seed)
                visits = config.steps * self.batch_size
                prefix = frozen_prefix(
                    self.model, readout, task.train, visits=visits, precision=config.precision
                )
                self.stopped = self.tell(float("nan"))
                while self.step < config.steps and not (self.stopped or self.diverged):
                    self.advance(batches, prefix)
            run = self.record.end(self.model, started, diverged=self.diverged, stopped=self.stopped)
        self.model.eval()
        return run

    def advance(self, batches: Iterator[Tensor], prefix: FrozenPrefix) -> None:
        """One step, with the evaluation that is due after it, and the callbacks."""
        value = self.take_step(next(batches), prefix)
        self.step += 1
        self.diverged = not np.isfinite(value)
        if self.diverged or self.step in self.config.evaluation_steps:
            self.record.evaluate(self.model, self.step)
        wanted = self.tell(value)
        self.stopped = wanted and self.step < self.config.steps and not self.diverged
        if self.stopped and self.record.rows[-1]["step"] < self.step:
            self.record.evaluate(self.model, self.step)

    def take_step(self, batch: Tensor, prefix: FrozenPrefix) -> float:
        """Learn from a batch of row numbers, unless its loss is not finite: the loss, in nats."""
        accelerator, (task, readout) = self.accelerator, self.record.new
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        with autocast(accelerator.device, self.config.precision), prefix.of(mine):
            logits, labels = ask(readout, self.model, task.train, mine)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss = loss * (len(mine) * accelerator.num_processes / len(batch))  # their mean is the batch's
        self.record.losses.append(accelerator.reduce(loss.detach(), "mean").item())
        loss = loss + self.added_loss()
        value = accelerator.reduce(loss.detach(), "mean").item()
        if np.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()
            average_gradients(accelerator, self.parameters)
            self.optimizer.step()
            self.schedule.step()
        return value

    def tell(self, loss: float) -> bool:
        """Call the callbacks; True if one of them, in any process, asks to stop."""
        if not self.callbacks:
            return False
        progress = Progress(self.step, self.config.steps, loss, tuple(self.record.rows))
        wishes = [bool(callback(progress)) for callback in self.callbacks]
        total = torch.tensor(float(any(wishes)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(total, "sum").item())


def optimizer_and_schedule(
    groups: Iterable[Sequence[Tensor]], rates: Sequence[float], config: Training
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW for groups of parameters, each with its own peak rate, and what warms it up and lets it fall."""
    groups = [{"params": list(group), "lr": lr} for group, lr in zip(groups, rates, strict=True)]
    everything = [p for group in groups for p in group["params"]]
    kinds = {(p.device.type, type(p.data), p.dtype.is_floating_point) for p in everything}
    # One kernel may take the step of all, where they are plain ones on one device that has it.
    fused = len(kinds) == 1 and kinds <= {(kind, Tensor, True) for kind in ("cpu", "cuda")}
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)
    warmup = round(config.warmup * config.steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, config.steps)


def new_examples(config: Training, regularizer: Regularizer | None) -> int:
    """How many examples of a batch are of the new task."""
    return config.batch_size - int(config.batch_size * (regularizer.share if regularizer else 0))


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for batch norms with frozen parameters: their statistics are pretrained, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
