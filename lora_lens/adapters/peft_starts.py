"""PEFT's own initializations of LoRA, so that they stand in the same tables as windows.

Each is PEFT's, with PEFT's default settings; only corda is asked for its knowledge-preserving mode. What
needs data sees at most ``EXAMPLES`` training examples, drawn with the run's seed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from lora_lens._base.errors import InputError, MissingPackageError
from lora_lens._base.hashing import digest_of
from lora_lens._base.random_state import seeded
from lora_lens._base.torch_tools import call, evaluating
from lora_lens._base.wrappers import paths_of, submodule
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.injection import (
    Attachment,
    inject,
    lora_config,
    note_pretrained,
    planned_layers,
)
from lora_lens.adapters.low_rank import plan_layers
from lora_lens.adapters.peft_names import ADAPTER, peft_config, target_settings
from lora_lens.adapters.requests import Request
from lora_lens.adapters.stacks import require_no_stacks
from lora_lens.adapters.start import Residual
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.layer_weights import matrix_shape, weight_matrix, weight_of
from lora_lens.spectrum.refusals import unchangeable
from lora_lens.tasks.readouts import Inputs, ask, layer_inputs, real_positions, to_device
from lora_lens.tasks.task import Task

PEFT_STARTS = ("pissa", "olora", "orthogonal", "mica", "eva", "corda", "lora_ga")
EXAMPLES, BATCH = 256, 64
MOST_PASSES = 1000  # batches that eva may look at before its components stand still
TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga")  # PEFT subtracts their B A from the base
DATA = {"eva": "task", "lora_ga": "task", "corda": "retain"}


@dataclass(frozen=True)
class Start:
    """A :class:`lora_lens.PeftMethod` that is a start by name."""

    name: str
    rank: int

    def __str__(self) -> str:
        return f"PEFT's {self.name} of rank {self.rank}"


def plan_start(start: Start, request: Request) -> Mapping[str, Any]:
    """The start for each layer by name, after every check that needs no data.

    Raises:
        ValueError: there is a variant, or a layer is no ``nn.Linear`` or too small for the start.
    """
    if request.variant != Variant():
        raise InputError(f"{start} is built by PEFT and takes no variant, not {request.variant}")
    plan = plan_layers(start, request)
    require_no_stacks(request.model, plan, start)
    require_changeable(start, request, plan)
    for name in plan:
        layer = submodule(request.model, name)
        if type(layer) is not nn.Linear:
            raise InputError(
                f"{start} does not fit {name}, a {type(layer).__name__}: PEFT's starts are for nn.Linear; "
                "name other layers with targets="
            )
        most = _most_rank(start, matrix_shape(layer))
        if start.rank > most:
            raise InputError(
                f"{start} does not fit {name}, {matrix_shape(layer)}: it needs several times as many "
                f"directions as its rank there; use a rank of at most {most}"
            )
    return plan


def require_changeable(method: object, request: Request, plan: Iterable[str]) -> None:
    """Raise a ValueError if a weight is quantized or shared: PEFT would change it, or forms it of its own."""
    layers = {name: submodule(request.model, name) for name in plan}
    for name, why in unchangeable(request.model, layers).items():
        raise InputError(f"{method} does not fit {name}, which {why}; leave it out of the targets")


def attach_start(start: Start, request: Request, plan: Mapping[str, Any]) -> PeftModel:
    """A copy of the model with LoRA as PEFT starts it in the planned layers.

    Raises:
        ValueError: the task that the start needs is missing, a layer takes no part in the loss (lora_ga), too
            few inputs reach it, or its components do not settle (eva).
        MissingPackageError: corda's attrs is not installed.
    """
    model, seed = request.model, request.seed
    data = _checked_data(start, request, list(plan)) if start.name in DATA else None

    trainable, buffers = note_pretrained(model)
    originals = {name: weight_of(submodule(model, name)).detach() for name in plan}
    own = copy_around(model, [])
    config = peft_config(own, dict.fromkeys(plan, start.rank), request.alpha, Variant())
    config.init_lora_weights = cast(Any, start.name)  # PEFT's annotation has a name for each
    meant, paths = config.target_modules, paths_of(own, plan)
    config.target_modules = "|".join(map(re.escape, paths.values()))  # PEFT's preparations look for these
    if data is not None and start.name == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        _measure_covariances(own, model, config, list(plan), data, seed)
    elif data is not None and start.name == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        _measure_gradients(own, config, list(plan), data, seed)
    elif data is not None:
        config.eva_config = EvaConfig()
    config.target_modules = meant
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
        adapted = inject(own, config, plan, Variant(), seed)
    if data is not None and start.name == "eva":
        _fit_eva(adapted, start, data, seed)
        base = adapted.get_base_model()
        kept = tuple(name for name in plan if isinstance(submodule(base, name), LoraLayer))
        adapted.planned_layers = kept
        for key, value in target_settings(kept, model).items():
            setattr(adapted.peft_config[ADAPTER], key, value)

    starts, layers = {}, planned_layers(adapted)
    for name, original in originals.items() if start.name in TAKEN_OUT else ():
        components = torch.arange(start.rank if start.name == "pissa" else 0)
        digest = digest_of(weight_matrix(submodule(model, name)))
        starts[name] = Residual.noted(layers[name], components, digest, original)
    _forget_recipe(lora_config(adapted), start)
    adapted.attachment = Attachment(str(start), Variant(), starts, trainable, buffers)
    return adapted


def _most_rank(start: Start, shape: tuple[int, int]) -> int:
    if start.name == "lora_ga":  # A from one half of 2 rank singular vectors, B from the other
        return min(shape) // 2
    if start.name == "eva":  # up to 2 rank components of the input, by a randomized SVD of twice as many
        return shape[1] // 4
    return min(shape)


def _some_rows(examples: int, seed: int) -> Sequence[Tensor]:
    """Batches of nearly equal size, of EXAMPLES row numbers in all."""
    rows = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))[:EXAMPLES]
    return rows.tensor_split(-(-len(rows) // BATCH))


def _checked_data(start: Start, request: Request, names: list[str]) -> Task:
    """The task that a start is made from, whose examples reach the named layers."""
    model, data = request.model, request.task if DATA[start.name] == "task" else request.retain
    if data is None:
        raise InputError(f"{start} is made from data: give attach {DATA[start.name]}=")
    one = data.train.batch(torch.arange(1))
    called = layer_inputs(model, names, to_device(one, next(model.parameters()).device))
    for name in (n for n in names if n not in called):
        raise InputError(
            f"{start} needs the inputs of {name}, and the model makes its output without calling it; "
            "leave it out of the targets"
        )
    return data


def _measure_covariances(
    own: nn.Module, model: nn.Module, config: LoraConfig, names: list[str], retain: Task, seed: int
) -> None:
    """Leave what corda needs on the layers of ``own``.

    PEFT takes each call of a layer for one sample, (1, tokens, in_features). So the inputs are taken from
    passes of ``model`` and given to the layers of ``own`` one example at a time.
    """
    device = next(model.parameters()).device
    layers = {name: submodule(own, name) for name in names}

    def run() -> None:
        for rows in _some_rows(len(retain.train), seed):
            inputs = to_device(retain.train.batch(rows), device)
            for name, x in layer_inputs(model, names, inputs).items():
                x = x.reshape(len(rows), -1, x.shape[-1])  # (batch, tokens, in_features)
                samples = list(x)
                if (real := real_positions(inputs, x)) is not None:
                    samples = [sample[own] for sample, own in zip(x, real, strict=True)]
                for sample in samples if len(samples[0]) > 1 else torch.stack(samples).transpose(0, 1):
                    layers[name](sample[None])

    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:
        if error.name != "attr":
            raise
        raise MissingPackageError("PEFT's corda needs a package that PEFT does not install: attrs") from None
    preprocess_corda(own, config, run_model=run)


def _measure_gradients(own: nn.Module, config: LoraConfig, names: list[str], task: Task, seed: int) -> None:
    """Leave what lora_ga needs on the layers of ``own``."""
    device = next(own.parameters()).device
    readout = task.new_readout(own, seed).to(device)

    def train_step() -> None:
        with evaluating(own):
            for rows in _some_rows(len(task.train), seed):
                nn.functional.cross_entropy(*ask(readout, own, task.train, rows)).backward()

    def with_gradient(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        # PEFT's hooks fire where a gradient passes, and all weights are frozen.
        if not given[0].requires_grad:
            given[0].requires_grad_()

    handles = [submodule(own, name).register_forward_pre_hook(with_gradient) for name in names]
    try:
        preprocess_loraga(own, config, train_step)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not hasattr(submodule(own, name), "_peft_loraga_grad"):
            raise InputError(
                f"{name} takes no part in the new task's loss, so lora_ga has no gradient of it; "
                "leave it out of the targets"
            )


def _fit_eva(adapted: PeftModel, start: Start, task: Task, seed: int) -> None:
    """Give eva's A to the layers, and each its rank."""
    passes = count(1)

    def forward(model: nn.Module, inputs: Inputs) -> None:
        if next(passes) > MOST_PASSES:
            raise InputError(
                f"the components of {start} did not settle in {MOST_PASSES} batches of {task.name}; "
                "use a smaller rank or more training examples"
            )
        call(model, inputs)

    def rows_of(layer_input: tuple[Tensor, ...], inputs: Inputs, name: str) -> Tensor:
        x = layer_input[0]
        real = real_positions(inputs, x)
        rows = x.flatten(0, -2) if real is None else x[real]
        if len(rows) < 4 * start.rank:  # PEFT would wait for a larger batch forever
            name = name.removeprefix("base_model.model.")
            raise InputError(
                f"{start} needs batches with at least {4 * start.rank} inputs for each layer; {name} gets "
                f"{len(rows)}: use a smaller rank or more training examples"
            )
        return rows

    device = next(adapted.parameters()).device
    batches = [to_device(task.train.batch(rows), device) for rows in _some_rows(len(task.train), seed)]
    with seeded(seed, device), evaluating(adapted):
        initialize_lora_eva_weights(
            adapted,
            dataloader=batches,
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=rows_of,
            show_progress_bar=False,
        )


def _forget_recipe(config: LoraConfig, start: Start) -> None:
    """A config that is saved must not make PEFT start anew when it loads: only mica says what is trained."""
    if start.name != "mica":
        config.init_lora_weights = start.name not in TAKEN_OUT
        config.eva_config = config.corda_config = config.lora_ga_config = None
