"""What makes a run this run and no other: the exact content of all that it was made with."""

from __future__ import annotations

import builtins
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from inspect import signature
from pathlib import PurePath
from types import CodeType, FunctionType

import numpy as np
import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedConfig

from lora_lens._base.errors import InputTypeError
from lora_lens._base.hashing import add_tensor, digest_of
from lora_lens._base.validate import shown
from lora_lens.adapters.methods import FullFineTuning, LinearProbe, LoRA, MethodLike
from lora_lens.adapters.peft_methods import PeftMethod
from lora_lens.spectrum.placement import AtEffectiveRank, RandomComponents, SpreadComponents
from lora_lens.spectrum.window import Window
from lora_lens.tasks.evaluation import evaluate
from lora_lens.tasks.task import Task
from lora_lens.training.regularizers.base import trained_part

METHOD_NAMES = {
    Window: "window",
    LoRA: "LoRA",
    LinearProbe: "linear probe",
    FullFineTuning: "full fine-tuning",
}
# The table's columns tell these apart to the last digit, so their runs keep the names that earlier versions
# gave them. The text of any other method is for people, and may be the same for two.
EXACT_BY_COLUMNS = (*METHOD_NAMES, RandomComponents, SpreadComponents, AtEffectiveRank)
WITHOUT_SPECTRA = (LoRA, LinearProbe, FullFineTuning, PeftMethod)  # all others may start from given spectra
MODEL_SETTINGS, ANSWERS = "settings of the model", "loss of the model on the first retained examples"
OF_NO_MATTER = (  # in a config: where the model came from, and what it returns beside its answers
    "_name_or_path", "transformers_version", "architectures", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
PLAIN = (bool, int, float, str, tuple, list, type(None))  # a set's text is another one in each process
ADDRESS = re.compile(" at 0x[0-9a-f]+")


def run_name(settings: Mapping[str, object], exact_parts: Mapping[str, object] | None = None) -> str:
    """The name of a run: a hash of its settings, with ``exact_parts`` in place of the texts for people."""
    text = json.dumps({**settings, **(exact_parts or {})}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_record(settings: Mapping[str, object], exact_parts: Mapping[str, object]) -> dict[str, object]:
    """The beginning of a run's record: its name, its settings, and exactly what these only describe."""
    record = {"run": run_name(settings, exact_parts), "settings": dict(settings)}
    return record | ({"exact": dict(exact_parts)} if exact_parts else {})


def named_method(method: MethodLike) -> dict[str, object]:
    """The columns that describe a method in a table."""
    return {
        "method": METHOD_NAMES.get(type(method)) or str(method),
        "rank": getattr(method, "rank", None),
        "position": getattr(method, "position", None),
        "start": getattr(method, "start", None),
    }


def reads_spectra(method: MethodLike) -> bool:
    """Whether a method, be it under a regularizer, may start from the spectra that it is given."""
    return type(trained_part(method)) not in WITHOUT_SPECTRA


def exact_method(method: MethodLike) -> dict[str, object]:
    """What a run's name takes in place of :func:`named_method`'s text; nothing where that is exact."""
    exact_already = type(method) in EXACT_BY_COLUMNS or (type(method) is PeftMethod and method.is_start)
    return {} if exact_already else {"method": exact(method, f"the method {shown(method)}")}


def exact(value: object, name: str) -> object:
    """``value`` as values that JSON can hold, equal only for equal content.

    Objects are told apart by their type and all fields of their dataclass; those of a class from outside of
    lora_lens also by the code of its methods, since a rule that was edited is another rule.

    Args:
        name: what it is, for the message.

    Raises:
        InputTypeError: something in it is no plain value, such as a function or an object of a class that is
            no dataclass.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return {"type": _type_name(type(value)), "name": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, range, torch.dtype, torch.device, PurePath)):
        return {"type": type(value).__name__, "text": str(value)}
    if isinstance(value, (list, tuple)):
        return [exact(item, name) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"type": "set", "items": sorted(json.dumps(exact(item, name)) for item in value)}
    if isinstance(value, Mapping) and not is_dataclass(value):
        items = [[exact(key, name), exact(item, name)] for key, item in value.items()]
        return {"type": _type_name(type(value)), "items": items}
    if isinstance(value, torch.Tensor):
        return {"type": "Tensor", "content": digest_of(value)}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"type": "ndarray", "content": f"{value.dtype.str} {value.shape} {content}"}
    if isinstance(value, PeftConfig):
        return {"type": _type_name(type(value)), "fields": exact(_settings_of_peft(value), name)}
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: exact(getattr(value, f.name), f"{f.name} of {name}") for f in fields(value)}
        return {"type": _type_name(type(value)), "fields": found} | _code_of_class(type(value), name)
    raise InputTypeError(
        f"{name} has nothing that tells it from others for sure, so its runs cannot be kept apart: "
        f"{shown(value)}; use a frozen dataclass whose fields are numbers, words, tuples, arrays or other "
        "such dataclasses, and no functions"
    )


def _settings_of_peft(config: PeftConfig) -> dict[str, object]:
    """All but the version of PEFT, which its next release would change."""
    return {key: value for key, value in config.to_dict().items() if key != "peft_version"}


def _type_name(kind: type) -> str:
    """Without the module for our own classes, which may move from one to another."""
    own = kind.__module__.partition(".")[0] == "lora_lens"
    return f"lora_lens.{kind.__qualname__}" if own else f"{kind.__module__}.{kind.__qualname__}"


def _code_of_class(kind: type, name: str) -> dict[str, object]:
    """A hash of the methods and plain class attributes that a user's class adds; nothing for our own."""
    parts = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("lora_lens", "abc", "typing") or _is_builtin(base):
            continue
        for key, value in sorted(vars(base).items()):
            if key.startswith("__") and key != "__post_init__":  # also all that dataclass writes
                continue
            function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if isinstance(function, FunctionType):
                parts.append([key, _code(function.__code__), _outside_of(function, f"{key} of {name}")])
            elif value is None or isinstance(value, (bool, int, float, str, tuple)):
                parts.append([key, exact(value, f"{key} of {name}")])
    return {"code": hashlib.sha256(json.dumps(parts).encode()).hexdigest()} if parts else {}


def _is_builtin(kind: type) -> bool:
    return getattr(builtins, kind.__name__, None) is kind


def _code(code: CodeType) -> list[object]:
    constants = [
        _code(c) if isinstance(c, CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants]


def _outside_of(function: FunctionType, name: str) -> list[object]:
    """What a function brings along beside its code: defaults, and variables of the function around it."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    around = [_type_name(value) if isinstance(value, type) else exact(value, name) for value in cells]
    return [exact([function.__defaults__, function.__kwdefaults__], name), around]


def experiment_identity(
    model: nn.Module, task: Task, retain: Task, watch: Sequence[Task] = ()
) -> dict[str, str]:
    """What must be equal for runs to belong into one folder."""
    watched = "; ".join(f"{t.name} {t.fingerprint()}" for t in watch)
    return {
        "lora_lens": version("lora_lens"),
        **model_identity(model),
        ANSWERS: sample_loss(model, retain),
        "task": f"{task.name} {task.fingerprint()}",
        "retain": f"{retain.name} {retain.fingerprint()}",
        **({"watch": watched} if watched else {}),
    }


def model_identity(model: nn.Module) -> dict[str, str]:
    """What must be equal for two models to be one: all weights, and what else their function depends on."""
    return {"model": _weights_of(model), MODEL_SETTINGS: _settings_of(model)}


def sample_loss(model: nn.Module, task: Task) -> str:
    """Tells models apart that hooks, changed attributes or a forward of their own make others."""
    return f"{evaluate(model, task, examples=task.test.first(8)).loss:.6g}"


def _settings_of(model: nn.Module) -> str:
    """A hash of kinds of modules, their settings such as dropout and number of heads, and passing buffers."""
    parts: list[object] = [repr(model)]
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        parts += [(key, str(value)) for key, value in config.to_dict().items() if key not in OF_NO_MATTER]
    for name, module in model.named_modules():
        given = signature(type(module).__init__).parameters
        own = vars(module).items()
        parts += [(name, key, value) for key, value in own if key in given and isinstance(value, PLAIN)]
    digest = hashlib.sha256(ADDRESS.sub("", repr(parts)).encode())
    for name, tensor in model.named_buffers():
        digest.update(name.encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def _weights_of(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()[:16]
