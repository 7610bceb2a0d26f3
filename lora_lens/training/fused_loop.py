"""Several runs as one program: they differ in their adapters, rates and seeds, and share all that is frozen.

The runs' batches stand one behind another in one batch. What is frozen sees no difference; an adapted layer
multiplies each run's part by its own W + scaling (B A - B_0 A_0), the pretrained weight plus what this run
has learnt, where B_0 A_0 is what a window has taken out of the weight (0 for ordinary LoRA). So the numbers
are those of runs by themselves up to rounding, and beside the model it takes their factors, gradients and
optimizer states, the activations of their batches, and one adapted weight for each run at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_lens._base.errors import InputError
from lora_lens._base.processes import accelerator
from lora_lens._base.random_state import seeded
from lora_lens._base.wrappers import submodule
from lora_lens.adapters.copying import copied
from lora_lens.adapters.injection import ADAPTER, attached, lora_layers
from lora_lens.adapters.start import product_change
from lora_lens.spectrum.svd import product_norm
from lora_lens.tasks.readouts import HeadReadout, pooled_features, to_device
from lora_lens.training.lean_forward import is_plain
from lora_lens.training.loop import optimizer_and_schedule, set_training_mode
from lora_lens.training.prefix_cache import frozen_prefix, random_states
from lora_lens.training.record import Record
from lora_lens.training.run import Run

AGREEMENT = 1e-4  # of a run's features with those of the run by itself, relative
DISTURBANCE = 0.02  # of the factors, for that comparison


@dataclass(frozen=True, eq=False)
class Factors:
    """An adapter's factors in one layer.

    Attributes:
        b, a: (out_features, rank) and (rank, in_features).
        start: the product that the base lacks, as two factors; None where it lacks none.
        scaling: of the product.
    """

    b: Tensor
    a: Tensor
    start: tuple[Tensor, Tensor] | None
    scaling: float


class CannotFuse(InputError):
    """These runs cannot be one program; each can be trained by itself."""


def factors_of(adapted: nn.Module) -> dict[str, Factors]:
    """Copies of the factors of a model from :func:`lora_lens.attach`, by layer.

    Raises:
        CannotFuse: more is trained than A and B, or a layer does more than add their product.
    """
    if not isinstance(adapted, PeftModel) or not hasattr(adapted, "attachment"):
        raise CannotFuse("only adapters of two factors can be trained together")
    record, layers = attached(adapted)[1], lora_layers(adapted)
    trained = {id(p) for p in adapted.parameters() if p.requires_grad}
    found = {}
    for name, layer in layers.items():
        if not is_plain(layer):
            raise CannotFuse(f"{name} does more than add B A to its weight")
        b, a = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
        if not {id(b), id(a)} <= trained:
            raise CannotFuse(f"{name} trains one factor alone")
        trained -= {id(b), id(a)}
        start = record.starts.get(name)
        taken = None if start is None else (start.b.detach(), start.a.detach())
        found[name] = Factors(b.detach().clone(), a.detach().clone(), taken, layer.scaling[ADAPTER])
    if trained:
        raise CannotFuse("more is trained than A and B")
    return found


def set_factors(adapted: PeftModel, factors: Mapping[str, Factors]) -> None:
    """Give a model from :func:`lora_lens.attach` the factors that a run ended with."""
    with torch.no_grad():
        for name, layer in lora_layers(adapted).items():
            layer.lora_B[ADAPTER].weight.copy_(factors[name].b)
            layer.lora_A[ADAPTER].weight.copy_(factors[name].a)


class _LowRankUpdates(torch.autograd.Function):
    """Each run's rows of x times its (W + B A)^T, plus bias; gradients for x and what is trained of B and A.

    The adapted weights are formed again for the backward pass, so that they are not kept for all layers.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, a: Tensor, rank: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, b, a)
        ctx.rank = rank
        rows = x.reshape(len(a), -1, x.shape[-1])  # (runs, inputs, in_features)
        adapted = torch.baddbmm(weight, b, a).transpose(1, 2)
        result = torch.bmm(rows, adapted) if bias is None else torch.baddbmm(bias, rows, adapted)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, b, a = ctx.saved_tensors
        rows = x.reshape(len(a), -1, x.shape[-1])
        outer = outer.reshape(len(a), -1, outer.shape[-1])
        of_x = of_b = of_a = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(outer, torch.baddbmm(weight, b, a)).view_as(x)
        if ctx.needs_input_grad[3]:
            of_b = torch.zeros_like(b)
            through = torch.bmm(a[:, : ctx.rank], rows.transpose(1, 2))
            of_b[..., : ctx.rank] = torch.bmm(through, outer).transpose(1, 2)
        if ctx.needs_input_grad[4]:
            of_a = torch.zeros_like(a)
            through = torch.bmm(b[..., : ctx.rank].transpose(1, 2), outer.transpose(1, 2))
            of_a[:, : ctx.rank] = torch.bmm(through, rows)
        return of_x, None, None, of_b, of_a, None


class SharedLinear(nn.Module):
    """A linear layer with the adapters of several runs.

    Attributes:
        active: the runs whose batches stand one behind another in the input, in this order.
    """

    def __init__(self, base: nn.Linear, factors: Sequence[Factors]) -> None:
        super().__init__()
        self.base = base
        self.b = nn.ParameterList(nn.Parameter(f.b) for f in factors)
        self.a = nn.ParameterList(nn.Parameter(f.a) for f in factors)
        self.scalings = [f.scaling for f in factors]
        self.starts = [f.start for f in factors]
        # What each base lacks, or zeros: (runs, out, rank) and (runs, rank, in); None where none lacks any.
        taken = [f.start or (torch.zeros_like(f.b), torch.zeros_like(f.a)) for f in factors]
        lacking = any(f.start for f in factors)
        signed = [-f.scaling * b for f, (b, _) in zip(factors, taken, strict=True)]
        self.register_buffer("fixed_b", torch.stack(signed).to(factors[0].b) if lacking else None)
        self.register_buffer(
            "fixed_a", torch.stack([a for _, a in taken]).to(factors[0].a) if lacking else None
        )
        self.active: Sequence[int] = range(len(factors))

    def forward(self, x: Tensor) -> Tensor:
        """x: (runs * examples, ..., in_features)."""
        trained_b = torch.stack([self.scalings[run] * self.b[run] for run in self.active])
        trained_a = torch.stack([self.a[run] for run in self.active])
        rank = trained_a.shape[1]
        if self.fixed_b is not None:
            trained_b = torch.cat([trained_b, self.fixed_b[list(self.active)]], dim=2)
            trained_a = torch.cat([trained_a, self.fixed_a[list(self.active)]], dim=1)
        return _LowRankUpdates.apply(x, self.base.weight, self.base.bias, trained_b, trained_a, rank)

    def norm(self, run: int) -> float:
        """||dW||_F of what a run has learnt."""
        b, a = self.b[run].detach(), self.a[run].detach()
        if self.starts[run] is not None:
            b, a = product_change(b, a, *(f.to(b) for f in self.starts[run]))
        return float(product_norm(self.scalings[run] * b, a))


class FusedLoop:
    """Runs that are trained together: one model, one new task that a head reads, one number of steps.

    Attributes:
        running: the numbers of the runs that have not diverged.
        step: steps done.
    """

    def __init__(
        self, model: nn.Module, factors: Sequence[Mapping[str, Factors]], records: Sequence[Record]
    ) -> None:
        """Put the adapters into a copy of ``model`` that shares its weights.

        Args:
            model: the pretrained model, wherever it is; the copy goes to the device that accelerate picks.
            factors: of each run.
            records: of each run; their settings differ in rate and seed alone.

        Raises:
            CannotFuse: the runs or the model are not of the kind that can be trained together, or a run's
                features depend on those beside it.
        """
        self.records, self.config = records, records[0].config
        self.task, readout = records[0].new
        self._check(model, factors)
        self.pooling = readout.pooling
        # data instead of detach(): the copy's are parameters of its own over the same memory.
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
        self.model = copied(model, shared)
        self.layers = {
            name: SharedLinear(submodule(self.model, name), [f[name] for f in factors]) for name in factors[0]
        }
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        self.heads = [record.new[1].head for record in records]
        set_training_mode(self.model)  # in which frozen batch norms keep their statistics
        self.device = accelerator().device
        for part in (self.model, *self.heads):
            part.to(self.device)
        self.running = list(range(len(records)))
        self.step = 0

    def _check(self, model: nn.Module, factors: Sequence[Mapping[str, Factors]]) -> None:
        if not all(isinstance(record.new[1], HeadReadout) for record in self.records):
            raise CannotFuse("only tasks that a new head reads can be trained together")
        if self.config.precision != "float32":
            raise CannotFuse("only float32 runs can be trained together")
        shapes = {tuple((n, f.a.shape, f.b.shape) for n, f in one.items()) for one in factors}
        if len(shapes) > 1:
            raise CannotFuse("the runs adapt different layers or have different ranks")
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise CannotFuse("the model draws dropout, which would be another draw in each run")

    def run(self) -> list[Run]:
        """All steps of all runs, and their tests: one :class:`lora_lens.Run` for each, in their order."""
        started, config, count = time.monotonic(), self.config, len(self.records)
        rates = [record.config.lr for record in self.records]
        optimizer, schedule = optimizer_and_schedule(map(self.parameters_of, range(count)), rates, config)
        for run in range(count):
            with self.alone(run) as model:
                self.records[run].begin(model, self.norms(run))
        with seeded(config.seed, self.device):
            batches = [
                self.task.train.shuffled(config.batch_size, record.config.seed) for record in self.records
            ]
            visits = config.steps * config.batch_size * count
            with self.alone(0) as model:
                prefix = frozen_prefix(model, self.records[0].new[1], self.task.train, visits=visits)
            while self.step < config.steps and self.running:
                rows = [next(batches[run]) for run in self.running]
                self._activate(self.running)
                with prefix.of(torch.cat(rows)):
                    losses = self.losses(rows)
                values = losses.tolist()
                finite = torch.isfinite(losses.detach())
                optimizer.zero_grad()
                if finite.any():
                    losses[finite].sum().backward()
                self._keep_finite(values)
                if self.running:
                    optimizer.step()
                schedule.step()
                self.step += 1
                if self.step in config.evaluation_steps:
                    for run in self.running:
                        with self.alone(run) as model:
                            self.records[run].evaluate(model, self.step, self.norms(run))
        runs = []
        for run, record in enumerate(self.records):
            with self.alone(run) as model:
                runs.append(record.end(model, started, diverged=run not in self.running))
        return [replace(run, seconds=run.seconds / count) for run in runs]  # each its share

    def losses(self, rows: Sequence[Tensor]) -> Tensor:
        """The mean loss of each active run on its batch of row numbers, (runs,), in nats."""
        inputs = to_device(self.task.train.batch(torch.cat(list(rows))), self.device)
        features = pooled_features(self.model, inputs, self.pooling)
        weights = torch.stack([self.heads[run].weight for run in self.running])
        biases = torch.stack([self.heads[run].bias for run in self.running])
        features = features.to(weights.dtype).reshape(len(rows), -1, features.shape[-1])
        logits = torch.baddbmm(biases[:, None], features, weights.transpose(1, 2))
        labels = self.task.train.labels[torch.cat(list(rows))].to(self.device)
        each = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none")
        return each.view(len(rows), -1).mean(1)

    def parameters_of(self, run: int) -> list[nn.Parameter]:
        """What a run trains: its factors and its head."""
        factors = [p for layer in self.layers.values() for p in (layer.a[run], layer.b[run])]
        return [*factors, *self.heads[run].parameters()]

    def factors(self, run: int) -> dict[str, Factors]:
        """A run's factors as they are now."""
        return {
            name: Factors(
                layer.b[run].detach(), layer.a[run].detach(), layer.starts[run], layer.scalings[run]
            )
            for name, layer in self.layers.items()
        }

    @contextmanager
    def alone(self, run: int) -> Iterator[nn.Module]:
        """The model with one run's adapter, for batches of this run alone."""
        self._activate([run])
        try:
            yield self.model
        finally:
            self._activate(self.running)

    def norms(self, run: int) -> dict[str, float]:
        """||dW||_F of each layer's update of one run."""
        return {name: layer.norm(run) for name, layer in self.layers.items()}

    def require_agreement(self) -> None:
        """Raise if a run's features are others than by itself, with all factors a little off their start.

        Raises:
            CannotFuse: examples of one batch see each other, or a layer's input does not begin with them.
        """
        trained = [p for layer in self.layers.values() for p in (*layer.a, *layer.b)]
        kept = [p.detach().clone() for p in trained]
        rows = torch.arange(2 * len(self.records)) % len(self.task.train)
        try:
            with torch.no_grad(), seeded(0, self.device):
                for p in trained:
                    p.add_(torch.randn_like(p), alpha=DISTURBANCE)
                drawn, single = random_states(self.device), []
                for run, part in enumerate(rows.split(2)):
                    with self.alone(run) as model:
                        inputs = to_device(self.task.train.batch(part), self.device)
                        single.append(pooled_features(model, inputs, self.pooling))
                self._activate(range(len(self.records)))
                inputs = to_device(self.task.train.batch(rows), self.device)
                together = pooled_features(self.model, inputs, self.pooling)
                draws = random_states(self.device) != drawn
        except (RuntimeError, ValueError) as error:
            if should_reduce_batch_size(error):
                raise
            raise CannotFuse(f"the runs' batches do not pass the model together: {error}") from error
        finally:
            with torch.no_grad():
                for p, before in zip(trained, kept, strict=True):
                    p.copy_(before)
            self._activate(self.running)
        if draws:
            raise CannotFuse("the model draws random numbers, which would be others in each run")
        expected = torch.cat(single)
        if not float((together - expected).norm()) <= AGREEMENT * float(expected.norm()):
            raise CannotFuse("examples of one batch change each other's features")

    def _activate(self, runs: Sequence[int]) -> None:
        for layer in self.layers.values():
            layer.active = list(runs)

    def _keep_finite(self, values: Sequence[float]) -> None:
        """Note the losses; a run whose loss is not finite takes no more steps."""
        for run, value in zip(list(self.running), values, strict=True):
            record = self.records[run]
            record.losses.append(value)
            if not np.isfinite(value):
                for p in self.parameters_of(run):
                    p.grad = None
                self.running.remove(run)
                with self.alone(run) as model:
                    record.evaluate(model, self.step + 1)
