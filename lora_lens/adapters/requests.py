"""What somebody asks :func:`lora_lens.attach` for, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import Targets
from lora_lens._base.wrappers import inner_model
from lora_lens.adapters.injection import require_unadapted
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Request:
    """The model and the choices that go with a method; ``model`` is without what wraps the whole of it.

    Attributes:
        model, targets, alpha, spectra, variant, modules_to_save, inplace, seed, task, retain: as for
            :func:`lora_lens.attach`.

    Raises:
        ValueError, TypeError: one of them is impossible, or the model is adapted already.
    """

    model: nn.Module
    targets: Targets = None
    alpha: float | None = None
    spectra: SpectrumSet | None = None
    variant: Variant = field(default_factory=Variant)
    modules_to_save: Sequence[str] = ()
    inplace: bool = False
    seed: int = 0
    task: Task | None = None
    retain: Task | None = None

    def __post_init__(self) -> None:
        validate.instance(
            self.model, nn.Module, "model", "a torch.nn.Module, such as timm's and transformers' models"
        )
        require_unadapted(self.model)
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            raise InputError(
                f"{type(self.model).__name__} holds TorchScript modules, which PEFT cannot put adapters "
                "beside; build the model from Python modules"
            )
        validate.patterns(self.targets)
        if self.alpha is not None:
            validate.number(self.alpha, "alpha", above=0)
            # Beyond, factors or scaling leave float16.
            validate.number(self.alpha, "alpha", least=1e-6, most=1e6)
        for name, kind, expected in (
            ("spectra", SpectrumSet, "what ll.spectra(model) gives"),
            ("variant", Variant, "an ll.Variant, such as ll.Variant(dora=True)"),
            ("task", Task, "an ll.Task"),
            ("retain", Task, "an ll.Task"),
        ):
            if (given := getattr(self, name)) is not None:
                validate.instance(given, kind, name, expected)
        plain = {
            "model": inner_model(self.model),
            "modules_to_save": validate.sequence(
                self.modules_to_save, "modules_to_save", "names of modules", one=str
            ),
            "inplace": validate.flag(self.inplace, "inplace"),
            "seed": validate.whole_number(self.seed, "seed", least=0, most=2**63),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
