"""PEFT's own methods, so that they stand in the same tables as windows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft import PeftConfig, PeftType, PromptLearningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import listed
from lora_lens._base.random_state import seeded
from lora_lens._base.torch_tools import evaluating
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import named_modules, paths_of, submodule
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.low_rank import plan_layers
from lora_lens.adapters.methods import LoRA, Method
from lora_lens.adapters.peft_names import target_settings
from lora_lens.adapters.peft_starts import (
    DATA,
    PEFT_STARTS,
    Start,
    attach_start,
    plan_start,
    require_changeable,
)
from lora_lens.adapters.requests import Request
from lora_lens.adapters.stacks import require_no_stacks
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.layer_weights import matrix_shape, weight_of
from lora_lens.spectrum.window import validate_rank

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import PeftOnlyModel

# What would train otherwise than the method means, or not what the targets name.
REFUSED: dict[object, str] = {
    PeftType.ADALORA: "it shares out its ranks by calls in the training loop, which finetune does not make",
    PeftType.ADAPTION_PROMPT: "it adapts prompts, not weights",
    PeftType.LN_TUNING: "it trains norms, which are no targets here",
    PeftType.POLY: "each of its calls needs the number of a task",
    PeftType.TRAINABLE_TOKENS: "it trains embeddings, which are no targets here",
    PeftType.XLORA: "it mixes adapters that were trained before",
}
OF_EVERY_CONFIG = {f.name for f in fields(PeftConfig)}
MOST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True, eq=False)
class PeftMethod(Method):
    """A method of PEFT: LoRA from one of PEFT's initializations, chosen by name, or any config.

    By name, with PEFT's default settings except that corda runs in its knowledge-preserving mode:

    - pissa: the largest singular components (Meng et al. 2024, arXiv 2404.02948);
    - olora: the first columns of Q and rows of R of W = Q R (Buyukakyuz 2024, arXiv 2406.01775);
    - orthogonal: random factors with B A = 0 and neither of them 0; the rank must be even;
    - mica: B from the last left singular vectors and fixed, A = 0 (arXiv 2604.01694);
    - eva: A from the principal components of each layer's inputs in the new task, ranks shared out among the
      layers by explained variance, up to twice ``rank`` for one, or nothing and then no adapter (Paischer et
      al. 2024, arXiv 2410.07170);
    - corda: the smallest components of W C, where C is the covariance of the layer's inputs in the retained
      task: the knowledge-preserving mode (Yang et al. 2024, arXiv 2406.05223);
    - lora_ga: singular vectors of the first gradient on the new task, averaged over batches of 64, with the
      head that :func:`lora_lens.finetune` starts from at the same seed (Wang et al. 2024, arXiv 2407.05000).

    The last three see at most 256 training examples, drawn with the run's seed, in evaluation mode: give
    :func:`lora_lens.attach` ``task=`` or ``retain=``. What is attached is as from a window: finetune, drift,
    detach, save and export take it. For pissa, olora, corda and lora_ga the base is a residual, for the
    others it is the pretrained weight. Only pissa starts from components of the spectrum, so without a
    window :func:`lora_lens.forgetting.drift` has NaN for the shares of the others.

    A config, such as ``OFTConfig(oft_block_size=8)``, is attached by PEFT to the layers that attach's
    ``targets`` name. Most start at the pretrained function; attach warns of those that do not, such as KaSA,
    and notes by how much as ``start_change``. Save such a model with PEFT's ``save_pretrained``, and measure
    its drift with :func:`lora_lens.forgetting.drift_between` and PEFT's ``merge_and_unload``.

    Attributes:
        config: a name from ``lora_lens.adapters.PEFT_STARTS``, or a ``PeftConfig`` without target_modules.
        rank: of each layer's B A, at least 1; only with a name, since a config has its own.

    Raises:
        ValueError: there is no start of this name, the rank is below 1 or, for orthogonal, odd; the config
            names its own targets or trains no weights of layers; or there is a rank beside a config.
        TypeError: ``config`` is neither a name nor a config, or the rank is no whole number.

    Example:
        >>> import lora_lens as ll
        >>> from peft import OFTConfig
        >>> print(ll.PeftMethod("pissa", 8))
        PEFT's pissa of rank 8
        >>> print(ll.PeftMethod(OFTConfig(oft_block_size=8)))
        PEFT's OFT, oft_block_size=8
    """

    config: str | PeftConfig
    rank: int | None = None
    adapts_in_place: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.config, PeftConfig):
            _require_usable(self.config, self.rank)
            object.__setattr__(self, "config", copy.deepcopy(self.config))
            own = getattr(self.config, "r", None)
            object.__setattr__(self, "rank", own if isinstance(own, int) and own > 0 else None)
            return
        expected = "the name of one of PEFT's starts"
        validate.instance(self.config, str, "config", f"{expected}, such as 'pissa', or a config of PEFT's")
        validate.choice(self.config, expected, PEFT_STARTS)
        rank = validate_rank(self.rank)
        object.__setattr__(self, "rank", rank)
        if self.config == "orthogonal" and rank % 2:
            raise InputError(f"PEFT's orthogonal start needs an even rank, not {rank}")

    @property
    def is_start(self) -> bool:
        """True for LoRA from an initialization that is named."""
        return isinstance(self.config, str)

    @property
    def name(self) -> str:
        """PEFT's name for the start or the method."""
        return self.config if isinstance(self.config, str) else _kind(self.config)

    @property
    def sequential(self) -> bool:
        return self.name not in DATA

    def __str__(self) -> str:
        if isinstance(self.config, str):
            return str(self._start(self.config))
        return ", ".join([f"PEFT's {self.name}", *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def settings(self) -> dict[str, object]:
        """What a config sets otherwise than PEFT does by default."""
        if isinstance(self.config, str):
            return {}
        usual, given = type(self.config)().to_dict(), self.config.to_dict()
        return {k: v for k, v in given.items() if k not in OF_EVERY_CONFIG and v != usual.get(k)}

    def _content(self) -> tuple[object, ...]:
        settings = {} if isinstance(self.config, str) else self.config.to_dict()
        return type(self), self.name, self.rank, json.dumps(settings, sort_keys=True, default=repr)

    def _start(self, name: str) -> Start:
        return Start(name, validate_rank(self.rank))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeftMethod) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def plan(self, request: Request) -> Mapping[str, Any]:
        if request.modules_to_save:
            raise InputError(f"{self} takes no modules_to_save; a config may have its own")
        if request.inplace:
            raise InputError(f"{self} is attached to a copy: leave inplace=True out")
        if isinstance(self.config, str):
            return plan_start(self._start(self.config), request)
        if request.variant != Variant():
            raise InputError(f"{self} is built by PEFT and takes no variant, not {request.variant}")
        if request.alpha is not None:
            raise InputError(f"{self} takes its own settings from its config, and no alpha")
        # Its rank, if it has one, need not fit a spectrum: VeRA's is usually larger.
        plan = plan_layers(LoRA(1), request)
        require_no_stacks(request.model, plan, self)
        require_changeable(self, request, plan)
        return dict.fromkeys(plan, self)

    def attach(self, request: Request, plan: Mapping[str, Any]) -> nn.Module:
        if isinstance(self.config, str):
            return attach_start(self._start(self.config), request, plan)
        config = copy.deepcopy(self.config)
        own = copy_around(request.model, [])
        for key, value in target_settings(list(paths_of(own, plan).values()), own).items():
            setattr(config, key, value)
        try:
            with seeded(request.seed):
                adapted = cast("PeftOnlyModel", get_peft_model(own, config))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise InputError(f"PEFT cannot put {self} into these layers: {error}") from error
        base = adapted.get_base_model()
        found = {name for name, module in named_modules(base) if isinstance(module, BaseTunerLayer)}
        if wrong := sorted(found ^ set(plan)):
            raise InputError(
                f"PEFT did not adapt the planned layers and only these: {listed(wrong, most=4)} differ; "
                "choose other targets"
            )
        adapted.start_change = 0.0
        adapted.training = adapted.base_model.training = request.model.training
        for name in plan:
            submodule(base, name).train(submodule(request.model, name).training)
        _note_start(self, request.model, adapted, plan)
        return adapted


def _kind(config: PeftConfig) -> str:
    return PeftType(config.peft_type).value if config.peft_type else type(config).__name__


def _require_usable(config: PeftConfig, rank: object) -> None:
    kind = _kind(config)
    if isinstance(config, PromptLearningConfig) or not hasattr(config, "target_modules"):
        raise InputError(f"PEFT's {kind} trains no weights of layers, so it has no place beside windows")
    if why := REFUSED.get(config.peft_type):
        raise InputError(f"PEFT's {kind} has no place beside windows: {why}")
    if config.target_modules is not None or getattr(config, "target_parameters", None):
        raise InputError(
            f"this {type(config).__name__} names its own layers; leave target_modules and target_parameters "
            "out and give attach or sweep targets="
        )
    if config.inference_mode:
        raise InputError(f"this {type(config).__name__} is for inference: leave inference_mode out")
    if rank is not None:
        raise InputError(f"the rank is in the config: PeftMethod({type(config).__name__}(...)) without rank")


def _note_start(
    method: PeftMethod, model: nn.Module, adapted: PeftOnlyModel, names: Mapping[str, object]
) -> None:
    """Warn if a layer gives other outputs than before, tried on random inputs, and note by how much."""
    generator = torch.Generator().manual_seed(0)
    base = adapted.get_base_model()
    for name in names:
        before, after = submodule(model, name), submodule(base, name)
        weight = weight_of(before)
        if isinstance(before, _ConvNd):
            sizes = zip(before.kernel_size, before.dilation, strict=True)
            shape = (2, before.in_channels, *(d * (k - 1) + 1 for k, d in sizes))
        else:
            shape = (8, matrix_shape(before)[1])
        inputs = torch.randn(shape, generator=generator).to(weight)
        with torch.no_grad(), evaluating(before), evaluating(after):
            expected = before(inputs).float()
            error = torch.linalg.vector_norm(after(inputs).float() - expected)
        relative = float(error / torch.linalg.vector_norm(expected))
        if not relative <= MOST_ERROR.get(weight.dtype, 1e-3):
            adapted.start_change = relative
            warn(
                f"{method} changes {name} before the first step (by {relative:.1e} of its output). ll.sweep "
                "counts what is forgotten from the pretrained model all the same; give ll.finetune "
                "before=ll.training.Before(retain=ll.evaluate(model, retain)), or choose other settings",
            )
            return
