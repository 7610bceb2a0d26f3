"""Where a sequence of tasks stands, and how that outlives a kill."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.files import write_bytes
from lora_lens._base.warning import warn
from lora_lens.forgetting.window_survival import WindowComponents
from lora_lens.tasks.scenarios import Scenario

PLAIN = ("after", "own", "rows", "drift", "seconds")  # parts of a state that are numbers and words


@dataclass(eq=False)
class State:
    """Where a sequence stands: all that the next task needs.

    Attributes:
        model: what the next task trains, or attaches to.
        scenario: the heads.
        kept: by the strategy's regularizer.
        window: the first task's window as it stood after that task, by layer.
        after: how many tasks are trained.
        own: of ``Separate``, each task's accuracy and loss under its own adapter.
        rows, drift, seconds: what was measured.
    """

    model: nn.Module
    scenario: Scenario
    kept: dict[str, Tensor] = field(default_factory=dict)
    window: dict[str, WindowComponents] = field(default_factory=dict)
    after: int = 0
    own: list[tuple[float, float]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    drift: list[dict[str, object]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def keep(state: State, pretrained: nn.Module, path: Path) -> None:
    """A checkpoint in place of the last one."""
    content = {
        "model": _changed(pretrained, state.model),
        "heads": state.scenario.state(),
        "kept": dict(state.kept),
        "window": {name: (w.left, w.values, w.right) for name, w in state.window.items()},
        **{name: getattr(state, name) for name in PLAIN},
        "run": path.stem,
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_bytes(path, stream.getvalue())


def _changed(pretrained: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What cannot be had again from the pretrained model: all that was trained, and buffers."""
    if isinstance(model, PeftModel):
        return dict(_trained_tensors(model))
    before = pretrained.state_dict()
    return {
        name: tensor.cpu()
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor.cpu(), before[name].cpu())
    }


def _trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach().cpu()
    for name, buffer in model.named_buffers():
        yield name, buffer.cpu()


def restored(path: Path, fresh: Callable[[], State]) -> State | None:
    """The state in a checkpoint; None where there is none, or it cannot be read.

    Args:
        fresh: makes the state before any training, which the checkpoint fills.
    """
    if not path.exists():
        return None
    try:
        content = _content(path)
    except InputError as error:
        warn(f"{path} is damaged ({error}); the sequence starts again")
        return None
    state = fresh()
    with torch.no_grad():
        state.model.load_state_dict(content["model"], strict=False)
    state.scenario.restore(content["heads"], state.model)
    state.kept = content["kept"]
    state.window = {name: WindowComponents(*parts) for name, parts in content["window"].items()}
    for name in PLAIN:
        setattr(state, name, content[name])
    return state


def _content(path: Path) -> dict[str, object]:
    """What :func:`keep` wrote.

    Raises:
        InputError: the file is damaged or another one. Nothing else means that: running out of memory, say,
            is no reason to lose hours of work.
    """
    try:
        with ZipFile(path) as parts:  # torch.load does not compare the checksums
            if not any(name.endswith("/data.pkl") for name in parts.namelist()):
                raise InputError("it is no checkpoint")
            if broken := parts.testzip():
                raise InputError(f"the checksum of {broken} is another")
    except (BadZipFile, zlib.error, EOFError, NotImplementedError) as error:  # of what is no zip any more
        raise InputError(str(error)) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise InputError("it holds other things than tensors and numbers") from None
    if not isinstance(content, dict) or not content.keys() >= {"model", "heads", "kept", "window", *PLAIN}:
        raise InputError("it is another file of torch's")
    if content.get("run", path.stem) != path.stem:
        raise InputError(f"it is that of {content['run']}")
    return content
