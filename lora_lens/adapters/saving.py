"""Adapters on disk as they are, to go on training.

See :mod:`lora_lens.adapters.adapter_files` for what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens._base.validate import flag, instance
from lora_lens._base.wrappers import inner_model, submodule, unwrapped
from lora_lens.adapters.adapter_files import Saved, read_saved, write_adapter, write_record, write_tensors
from lora_lens.adapters.copying import copy_around
from lora_lens.adapters.injection import (
    Attachment,
    adapter_state,
    attached,
    buffers_by_name,
    inject,
    lora_config,
    lora_layers,
    moved_buffers,
    note_pretrained,
    require_unadapted,
    require_unmerged,
)
from lora_lens.adapters.offset import START_A, START_B
from lora_lens.adapters.peft_names import PREFIX, saved_modules, target_settings
from lora_lens.adapters.pretrained import matrices_of, require_same
from lora_lens.adapters.replacing import BUFFERS, ON_RESIDUAL, START, replaced
from lora_lens.adapters.stacks import is_exchanged, peft_keys
from lora_lens.adapters.start import form_for, set_factors
from lora_lens.spectrum.layer_weights import layers_at, owner_of, weight_matrix, weight_of
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.spectrum.refusals import unchangeable
from lora_lens.spectrum.stacks import stack_name, stacks_planned, wrapped_names

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedModel


def save(adapted: nn.Module, folder: str | Path) -> None:
    """Write an adapter as it is, for :func:`load`, which continues from there; before training, too.

    Beside PEFT's files it writes the factors that the adapter started from, so that :func:`load`
    forms the same residual without factorizing anything. For people without lora_lens, see
    :func:`export` and :func:`export_residual`.

    Files of other programs are safe: in ``folder`` only files are replaced or removed that lora_lens wrote
    and that were not changed since, by the list of names and hashes in lora_lens.json (folders of earlier
    versions have no list: there by name). Everything else stays as it is, and if one of those files has the
    name of a new one, an error is raised before anything is written. The old files stay valid until all new
    ones are complete on the disk, and then one step switches to these: after a full disk or a kill at any
    moment :func:`load` reads either all the old or all the new files. PEFT itself may find no adapter in the
    milliseconds after that step, or after a kill in them; the next :func:`load` or :func:`save` repairs
    that. Processes that save to one folder at the same time wait for each other.

    Args:
        adapted: from :func:`lora_lens.attach`, trained or not.
        folder: a new or empty folder, or one that lora_lens wrote.

    Raises:
        ValueError: ``adapted`` does not come from :func:`lora_lens.attach`, or is merged; the folder holds
            something else, or another program's file with the name of a new one.
        TypeError: ``folder`` is no path.
        OSError: the folder cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, ll.Window.first(2))
        >>> with TemporaryDirectory() as folder:
        ...     ll.save(adapted, folder)
        ...     again = ll.load(model, folder)
        >>> ll.function_error(again, adapted, torch.randn(5, 8))
        0.0
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    starts = record.starts
    state, moved = adapter_state(peft_model), moved_buffers(peft_model, record)
    kind = "window" if starts else "adapter"
    with replaced(folder, kind) as new:
        place = new / ON_RESIDUAL if starts else new
        place.mkdir(exist_ok=True)
        write_adapter(place, lora_config(peft_model), state)
        if starts:
            factors = {}
            for name, layer in lora_layers(peft_model).items():
                # What acts, not what was noted: in the offset form a checkpoint brings a start of its own.
                factors[f"{name}.B"], factors[f"{name}.A"] = starts[name].taken(layer)
            write_tensors(new / START, factors)
        if moved:
            write_tensors(new / BUFFERS, moved)
        write_record(new, kind, record, weight_digests(peft_model, record))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    inplace: bool = False,
) -> PeftModel:
    """Attach an adapter from :func:`save` or :func:`export` to the pretrained model that it was made for.

    Args:
        model: the pretrained model, or for the adapter of :func:`export_residual` its residual base.
        folder: a folder that lora_lens wrote.
        checkpoint: a folder that PEFT or a trainer wrote during training (with
            adapter_model.safetensors), or that file, whose factors replace those of ``folder``. Embeddings
            that PEFT put there, because they were resized, must be those of ``model``.
        inplace: adapt ``model`` itself instead of a copy.

    Returns:
        A model as :func:`lora_lens.attach` returns it, ready for further training.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is damaged or lora_lens did not write it, or a weight of the model is not the
            one that the adapter was made for; nothing is changed then.
        TypeError: an argument is of another type.

    Warns:
        UserWarning: another program changed PEFT's files since, or a later PEFT wrote them.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> with TemporaryDirectory() as folder:
        ...     ll.save(ll.attach(model, ll.Window.first(2)), folder)
        ...     adapted = ll.load(model, folder)
        >>> ll.summary(adapted)["rank"].tolist()
        [2, 2]
    """
    model = inner_model(instance(model, nn.Module, "model", "the pretrained model"))
    inplace = flag(inplace, "inplace")
    require_unadapted(model)
    saved = read_saved(folder, checkpoint)
    read = matrices_of(model, list(saved.weights))
    layers = layers_at(model, list(saved.weights))
    for name, known in saved.weights.items():
        require_same(name, read[name](), known["digest"], quantized_as(layers[name]))
    names, shapes = list(saved.weights), {name: _shape(read[name]()) for name in saved.weights}
    state = _fitting(saved, shapes, model)
    factors = _fitting_start(saved, shapes)

    fixed = unchangeable(model, layers)
    trainable, buffers = note_pretrained(model)
    base = model if inplace else copy_around(model, map(owner_of, layers.values()) if factors else [])
    for key, value in target_settings(names, model).items():
        setattr(saved.config, key, value)
    adapted = inject(base, saved.config, names, saved.variant)
    starts = {}
    for name, layer in lora_layers(adapted).items() if factors else ():
        original = None if inplace or quantized_as(layers[name]) else weight_of(layers[name]).detach()
        known = saved.weights[name]
        form = form_for(name, layers[name], fixed, known.get("base", "residual"))
        set_factors(layer, factors[f"{name}.B"], factors[f"{name}.A"])
        form.put(layer, saved.config, keep=not inplace)
        starts[name] = form.noted(layer, torch.tensor(known["components"]), known["digest"], original)
    with torch.no_grad():
        for key, tensor in adapter_state(adapted).items():  # these are the parameters' own values
            tensor.copy_(state[key].reshape(tensor.shape))
    adapted.attachment = Attachment(saved.method, saved.variant, starts, trainable, buffers)
    for name, buffer in buffers_by_name(adapted).items():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
    return adapted


def weight_digests(peft_model: AdaptedModel, record: Attachment) -> dict[str, str]:
    """Of the pretrained weight of each adapted layer; without a window that is the base's."""
    layers = lora_layers(peft_model)
    if record.starts:
        return {name: start.digest_in(name, layers[name]) for name, start in record.starts.items()}
    return {name: digest_of(weight_matrix(layer.get_base_layer())) for name, layer in layers.items()}


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def _fitting(saved: Saved, shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, if they are those that this model's adapter will have."""
    expected: dict[str, tuple[int, ...]] = {}
    stacks = stacks_planned(model, wrapped_names(shapes))
    for name, path in peft_keys(stacks).items():
        rank, inside = saved.rank(name), list(stacks[name].matrices())
        count = len(inside)
        columns, rows = shapes[inside[0]][:: 1 if is_exchanged(stacks[name]) else -1]
        key = f"{PREFIX}{path}.lora_"
        expected |= {f"{key}A.weight": (count * rank, columns), f"{key}B.weight": (rows, rank * count)}
    for name, (rows, columns) in shapes.items():
        if stack_name(name) in stacks:
            continue
        key, rank = f"{PREFIX}{name}.lora_", saved.rank(name)
        expected |= {f"{key}A.weight": (rank, columns), f"{key}B.weight": (rows, rank)}
        if saved.config.use_dora:
            expected[f"{key}magnitude_vector"] = (rows,)
    factors = dict.fromkeys(expected)
    for name in saved_modules(model, saved.config.modules_to_save or ()):
        own = submodule(model, name).state_dict()
        expected |= {f"{PREFIX}{name}.{unwrapped(key)}": tuple(t.shape) for key, t in own.items()}
    found = {}
    for key, tensor in saved.state.items():
        if _is_start(key, tensor, saved):
            continue
        if key not in expected and _is_in(model, key.removeprefix(PREFIX), tensor, saved.where):
            continue
        if key not in factors:
            found[key] = tuple(tensor.shape)
        else:  # a magnitude is a vector, a factor a matrix, whatever the kind of layer makes of them
            found[key] = (
                (tensor.numel(),)
                if key.endswith("vector")
                else tuple(tensor.flatten(min(tensor.ndim - 1, 1)).shape)
            )
    if wrong := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        raise InputError(
            f"{saved.where} does not hold the adapter that was saved: {wrong[0]} has the shape "
            f"{found.get(wrong[0])}, expected {expected.get(wrong[0])}"
        )
    for key in factors:
        if not saved.state[key].is_floating_point():
            raise InputError(
                f"{saved.where} holds {key} as {saved.state[key].dtype}, expected floating point"
            )
    return {key: saved.state[key] for key in expected}


def _is_start(key: str, tensor: Tensor, saved: Saved) -> bool:
    """Whether it is a start in the offset form, which PEFT writes beside a layer's adapter.

    Raises:
        ValueError: it is another one than was saved.
    """
    name, _, last = key.removeprefix(PREFIX).rpartition(".")
    if last not in (START_B, START_A) or saved.factors is None:
        return False
    own = saved.factors.get(f"{name}.{'B' if last == START_B else 'A'}")
    if own is None or not torch.equal(own.cpu(), tensor.flatten(1).to(own)):
        raise InputError(
            f"{saved.where} started from other factors than were saved: it is of another adapter"
        )
    return True


def _is_in(model: nn.Module, name: str, tensor: Tensor, where: Path) -> bool:
    """Whether the model holds an embedding of a checkpoint: PEFT writes it along if it was resized."""
    layers = [getattr(model, f"get_{side}put_embeddings", lambda: None)() for side in ("in", "out")]
    module, _, key = name.rpartition(".")
    try:
        layer = submodule(model, module)
    except AttributeError:
        return False
    own = layer.state_dict().get(key)
    if own is None or not any(layer is other for other in layers):
        return False
    if own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to(own.dtype)):
        return True
    now = "other values than in" if own.shape == tensor.shape else f"{len(own)} in"
    raise InputError(
        f"{where} holds {name} with {len(tensor)} rows, {now} this model: the embeddings were resized before "
        f"training. Make the model as it was then: model.resize_token_embeddings({len(tensor)}), and "
        f"model.load_state_dict({{{name!r}: ...}}, strict=False) with the tensor {PREFIX}{name} of that file"
    )


def _fitting_start(saved: Saved, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A window's factors, if they are those of the layers; nothing for other adapters."""
    if saved.factors is None:
        return {}
    expected = {f"{n}.A": (saved.rank(n), shape[1]) for n, shape in shapes.items()}
    expected |= {f"{n}.B": (shape[0], saved.rank(n)) for n, shape in shapes.items()}
    found = {key: tuple(tensor.shape) for key, tensor in saved.factors.items() if tensor.is_floating_point()}
    for key in sorted(expected.keys() | saved.factors.keys()):
        if expected.get(key) != found.get(key):
            raise InputError(
                f"{saved.where}: {key} of {START} has the shape {found.get(key)}, expected floats of "
                f"{expected.get(key)}"
            )
    for name, shape in shapes.items():
        components = saved.weights[name]["components"]
        if components and (len(components) != saved.rank(name) or max(components) >= min(shape)):
            raise InputError(
                f"{saved.where}: the components of {name} are not {saved.rank(name)} of {min(shape)}"
            )
    return saved.factors
