"""What is checked on one model: its function at the start, its adapters' action, its export, its files."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

import lora_lens as ll
from lora_lens._base.errors import LoraLensError
from lora_lens.adapters.attaching import planned
from lora_lens.spectrum.adaptable_layers import adaptable

Inputs = Mapping[str, Tensor] | tuple[Tensor, ...]
RANK, TOLERANCE = 2, 1e-5
GROUPS = ("all-attention", "all-mlp", "all-conv")  # the default is all-linear
METHOD = ll.Window(RANK, position=0.5)
LOST = "on loading, and does not find them"  # in the message where plain PEFT would lose all adapters
NOTHING = " has no "  # in the message for a group without a layer
REFUSED = "PEFT cannot adapt these layers"


@dataclass
class Row:
    """What was seen of one model.

    Attributes:
        layers: adapted by default.
        error: the largest change of an output at the start, relative to the largest output; of all groups.
        idle: adapters without effect on this output, as their weights have none in the pretrained model.
        left_out: what attach said of layers that it left out.
        exported: error of the exported LoRA in plain PEFT, relative to what training changed.
        notes: what is not a fault, and good to know.
        problems: what should not be: empty if all is well.
    """

    layers: int = 0
    error: float = 0.0
    idle: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    exported: float | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(model: nn.Module, inputs: Inputs) -> Row:
    """Attach by default and to each group, export, and read the model's own file, on a copy each."""
    row, model = Row(), model.eval().requires_grad_(True)
    reference = outputs(model, inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            targets = None
            try:
                plan = planned(model, METHOD)
            except LoraLensError as error:
                if NOTHING not in str(error):
                    raise
                targets = "all-conv"
                plan = planned(model, METHOD, targets=targets)
            spectra = ll.spectra(model, list(plan), vectors=[METHOD], progress=False)
            adapted = ll.attach(model, METHOD, targets=targets, spectra=spectra)
        except Exception as error:
            nothing = isinstance(error, LoraLensError) and any(
                said in str(error) for said in (NOTHING, REFUSED)
            )
            (row.notes if nothing else row.problems).append(f"attach: {_said(error)}")
            return row
    row.left_out = list(dict.fromkeys(str(w.message) for w in said if isinstance(w.message, UserWarning)))
    row.layers = len(ll.summary(adapted))
    _check_function(row, targets, model, adapted, inputs, reference)
    _check_action(row, model, adapted, inputs)
    for group in GROUPS if targets is None else ():
        _check_group(row, group, model, inputs, reference, spectra)
    _check_export(row, model, adapted, inputs)
    _check_experts(row, model, inputs, reference)
    _check_spectra(row, model, targets)
    return row


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, LoraLensError) else f"raw {type(error).__name__}: {error}"


def _check_function(
    row: Row,
    targets: str | None,
    model: nn.Module,
    adapted: nn.Module,
    inputs: Inputs,
    reference: list[Tensor],
) -> None:
    error = difference(outputs(adapted, inputs), reference)
    if error > TOLERANCE:  # deep random models can enlarge rounding: in float64 nothing is left of that
        exact = copy.deepcopy(model).double()
        doubled = (
            tuple(_double(i) for i in inputs)
            if isinstance(inputs, tuple)
            else {k: _double(v) for k, v in inputs.items()}
        )
        try:
            again = ll.attach(exact, METHOD, targets=targets)
            if difference(outputs(again, doubled), outputs(exact, doubled)) < 1e-9:
                error = min(error, TOLERANCE)
        except (RuntimeError, LoraLensError):  # some models hold parts in float32
            pass
    row.error = max(row.error, error)
    if not error <= TOLERANCE:
        row.problems.append(f"{targets or 'default'}: the function changes by {error:.1e}")


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_action(row: Row, model: nn.Module, adapted: PeftModel, inputs: Inputs) -> None:
    layers = list(ll.summary(adapted)["layer"])
    try:
        _backward(model, inputs)
    except RuntimeError as error:  # RWKV writes its state in place
        row.notes.append(f"has no gradients in evaluation mode: {str(error).partition(':')[0]}")
        return
    _backward(adapted, inputs)
    base = adapted.get_base_model()
    for name in layers:
        reached = _moved(model.get_submodule(name).weight)
        layer = base.get_submodule(name)
        acts = any(_moved(f["default"].weight) for f in (layer.lora_A, layer.lora_B))
        if reached and not acts:
            row.problems.append(f"{name}: its weight acts on the output and its adapter does not")
        elif not acts:
            row.idle.append(name)
    model.zero_grad(set_to_none=True)
    adapted.zero_grad(set_to_none=True)


def _moved(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-30)


def _backward(model: nn.Module, inputs: Inputs) -> None:
    torch.manual_seed(0)
    with torch.enable_grad():
        found = [t for t in tensors(_call(model, inputs)) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        total = sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in found)
        if isinstance(total, Tensor):
            total.backward()


def _check_group(
    row: Row,
    group: str,
    model: nn.Module,
    inputs: Inputs,
    reference: list[Tensor],
    spectra: ll.SpectrumSet,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = ll.attach(
                model, METHOD, targets=group, spectra=None if group == "all-conv" else spectra
            )
        except Exception as error:
            if not (isinstance(error, LoraLensError) and NOTHING in str(error)):
                row.problems.append(f"{group}: {_said(error)}")
            return
        _check_function(row, group, model, adapted, inputs, reference)


def _check_experts(row: Row, model: nn.Module, inputs: Inputs, reference: list[Tensor]) -> None:
    """Those that lie in one tensor: no family of transformers' may be refused."""
    stacks = adaptable(model).stacks.values()
    if not any(stack.parameter.ndim == 3 for stack in stacks):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = ll.attach(model, METHOD, targets="all-experts")
        except Exception as error:
            row.problems.append(f"all-experts: {_said(error)}")
            return
    _check_function(row, "all-experts", model, adapted, inputs, reference)
    try:
        _check_export(row, model, adapted, inputs)
    except LoraLensError as error:
        (row.notes if LOST in str(error) else row.problems).append(f"all-experts: {error}")


def _check_export(row: Row, model: nn.Module, adapted: PeftModel, inputs: Inputs) -> None:
    before = outputs(adapted, inputs)
    generator = torch.Generator().manual_seed(2)
    for strength in (0.3, 10, 300):  # scales of layers can be as small as 1e-6
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=strength * (float(parameter.std(correction=0)) + 3e-3))
        trained = outputs(adapted, inputs)
        change = difference(trained, before)
        if change > 1e-3:
            break
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ll.export(adapted, folder + "/lora")
        plain = PeftModel.from_pretrained(copy.deepcopy(model), folder + "/lora").eval()
    wanted, found = _wrapped(adapted), _wrapped(plain)
    if found != wanted:
        row.problems.append(f"export: PEFT adapts {len(found)} layers, {len(wanted)} were trained")
    if whole := plain.peft_config["default"].modules_to_save:
        row.notes.append(f"export: {len(whole)} layers in full, as plain PEFT would lose their adapters")
    if change > 0:
        error = difference(outputs(plain, inputs), trained)
        row.exported = error / change
        if not error <= 1e-6 + change * (1e-3 if change > 1e-2 else 1e-2):
            row.problems.append(f"export: {row.exported:.1e} of the update is lost in plain PEFT")


def _wrapped(model: PeftModel) -> set[str]:
    """What PEFT adapts or trains in full; several tensors of one module count once."""
    modules = model.get_base_model().named_modules()
    found = {n for n, m in modules if hasattr(m, "lora_A") or isinstance(m, ModulesToSaveWrapper)}
    return {name for name in found if name.removesuffix(".base_layer") not in found - {name}}


def _check_spectra(row: Row, model: nn.Module, targets: str | None) -> None:
    options = {"targets": targets, "vectors": False, "progress": False}
    own = {n: s.singular_values for n, s in ll.spectra(model, **options).items()}
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            save_model(model, str(Path(folder) / "model.safetensors"))
        try:
            filed = {n: s.singular_values for n, s in ll.spectra(folder, **options).items()}
        except LoraLensError as error:
            row.problems.append(f"file: {error}")
            return
    same = [name for name in own if name in filed]
    if any(own[n].shape != filed[n].shape or not torch.allclose(own[n], filed[n], 1e-4, 1e-6) for n in same):
        row.problems.append("file: other singular values than in the model, under the same name")
    # transformers writes some types under names of older versions, and splits or joins weights on the way.
    if len(same) < max(len(own), len(filed)):
        ours, theirs = (sorted(round(float(v[0]), 4) for v in some.values()) for some in (own, filed))
        if len(own) == len(filed) and torch.allclose(torch.tensor(ours), torch.tensor(theirs), 1e-3, 1e-4):
            row.notes.append(f"files name {len(own) - len(same)} weights otherwise")
        elif len(same) == len(filed) and all(f"{n}.weight" in _tied(model) for n in own if n not in filed):
            row.notes.append(f"files leave out {len(own) - len(same)} tied weights")
        elif _converted(model):
            row.notes.append(f"files hold {len(filed)} weights in another form, the model {len(own)}")
        else:
            only, more = sorted(own.keys() - filed.keys()), sorted(filed.keys() - own.keys())
            row.problems.append(f"file: lacks {only[:3]} ({len(only)}), has {more[:3]} ({len(more)}) besides")


def _tied(model: nn.Module) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _converted(model: nn.Module) -> bool:
    """Whether transformers writes other tensors than the model holds."""
    if not hasattr(model, "save_pretrained"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = {key for file in Path(folder).glob("*.safetensors") for key in load_file(file)}
    return not names <= set(model.state_dict())


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating-point tensors in a model's output, as float64 copies."""
    torch.manual_seed(0)  # for masks and noise that some models draw in evaluation mode too
    return [t.double().clone() for t in tensors(_call(model, inputs))]


def difference(now: list[Tensor], before: list[Tensor]) -> float:
    """The largest change relative to the largest entry, of any of the tensors; infinite for other shapes."""
    if [t.shape for t in now] != [t.shape for t in before]:
        return float("inf")
    errors = [0.0]
    for a, b in zip(now, before, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        if finite.any():
            size = float(b[finite].abs().max())
            errors.append(float((a - b)[finite].abs().max()) / size if size > 0 else 0.0)
    return max(errors)


def tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def _call(model: nn.Module, inputs: Inputs) -> object:
    return model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
