"""Adapters on disk: to go on training, for anybody's PEFT, or with their residual base. Only safetensors.

A folder holds what PEFT writes, adapter_config.json and adapter_model.safetensors, and

lora_lens.json      which weights the adapter belongs to, by hash, and how it was made; its "kind" is
                    "adapter" if it fits these weights as they are, "window" if it fits their residual
start.safetensors   of a window: the factors that the residual lacks, <layer>.A and <layer>.B
buffers.safetensors if training moved them: what is no parameter, such as batch norms' statistics

PEFT's files of a window lie in the folder "on_residual", where PEFT does not find them by mistake:
without the residual they would give a wrong function.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lora_lens.checkpoint import read_json, read_safetensors
from lora_lens.errors import InputError, MissingFileError
from lora_lens.factorization import product_norm, product_svd
from lora_lens.fingerprint import digest_of
from lora_lens.injection import (
    ADAPTER,
    PREFIX,
    Attachment,
    adapter_state,
    attached,
    buffers_by_name,
    copy_around,
    inject,
    lora_layer,
    lora_layers,
    matrices_of,
    moved_buffers,
    note_pretrained,
    note_start,
    rank_settings,
    require_same,
    require_unadapted,
    require_unmerged,
    set_start,
    taken_off,
    trained_update,
    whole_modules,
)
from lora_lens.layers import listed, weight_matrix
from lora_lens.methods import Variant
from lora_lens.peft_names import lies_in
from lora_lens.plain_peft import for_plain_peft
from lora_lens.window import whole_rank
from lora_lens.wrappers import submodule, unwrapped

FORMAT = 1
ABOUT, WEIGHTS, START = "lora_lens.json", "adapter_model.safetensors", "start.safetensors"
BUFFERS, ON_RESIDUAL = "buffers.safetensors", "on_residual"


def save(adapted: nn.Module, folder: str | Path) -> None:
    """Keep an adapter as it is, to go on with :func:`load`: also before training, as the window's file.

    Next to PEFT's files it keeps the factors that the adapter started from, so that :func:`load`
    forms the same residual without factorizing anything. For people without lora_lens, see
    :func:`export` and :func:`export_residual`.

    Args:
        adapted: from :func:`lora_lens.attach`, trained or not.
        folder: a new folder, or one that lora_lens wrote, which is replaced when all is written.

    Raises:
        ValueError: ``adapted`` is none of attach's or merged; the folder holds something else.
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    starts = record.starts
    with _replaced(folder) as new:
        place = new / ON_RESIDUAL if starts else new
        place.mkdir(exist_ok=True)
        _write_adapter(place, peft_model.peft_config[ADAPTER], _state(peft_model))
        if starts:
            factors = {f"{name}.{key}": getattr(s, key.lower()) for name, s in starts.items() for key in "AB"}
            _write_tensors(new / START, factors)
        if moved := moved_buffers(peft_model, record):
            _write_tensors(new / BUFFERS, moved)
        digests = {name: start.digest for name, start in starts.items()} or _digests(peft_model)
        _write_about(new, "window" if starts else "adapter", record, digests)


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    inplace: bool = False,
) -> PeftModel:
    """Put an adapter from :func:`save` or :func:`export` on its pretrained model, if it is that.

    Args:
        model: the pretrained model, or for the adapter of :func:`export_residual` its residual base.
        folder: what lora_lens wrote.
        checkpoint: a folder that PEFT or a trainer wrote during training (with
            adapter_model.safetensors), whose factors replace those of ``folder``.
        inplace: adapt ``model`` itself instead of a copy.

    Returns:
        A model as :func:`lora_lens.attach` returns it, ready to be trained on.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, it is damaged or not lora_lens's, or
            a weight of the model is not the one that the adapter was made for.
    """
    folder = Path(folder)
    require_unadapted(model)
    about = _about(folder)
    place = folder / ON_RESIDUAL if about["kind"] == "window" else folder
    config = LoraConfig.from_pretrained(place)
    config.inference_mode = False
    state = read_safetensors(_checked(Path(checkpoint) if checkpoint else place) / WEIGHTS)
    moved = read_safetensors(folder / BUFFERS) if (folder / BUFFERS).is_file() else {}
    factors = read_safetensors(folder / START) if about["kind"] == "window" else {}
    names, variant = list(about["weights"]), _variant(about["variant"])
    read = matrices_of(model, names)
    for name, known in about["weights"].items():
        require_same(name, read[name](), known["digest"])

    originals = {name: submodule(model, name).weight for name in names}
    trainable, buffers = note_pretrained(model)
    base = model if inplace else copy_around(model, originals.values() if factors else [])
    adapted = inject(base, config, names, variant)
    starts = {}
    for name in names if factors else []:
        layer = lora_layer(adapted, name)
        set_start(layer, factors[f"{name}.B"], factors[f"{name}.A"], keep=not inplace)
        original = None if inplace else originals[name].detach()
        known = about["weights"][name]
        starts[name] = note_start(layer, torch.tensor(known["components"]), known["digest"], original)
    _fill(adapted, state, checkpoint or folder)
    adapted.attachment = Attachment(about["method"], variant, starts, trainable, buffers)
    for name, buffer in buffers_by_name(adapted).items():
        if name in moved:
            buffer.copy_(moved[name])
    return adapted


def export(adapted: nn.Module, folder: str | Path, rank: int | None = None) -> pd.DataFrame:
    """Write an ordinary LoRA (or DoRA) for the untouched pretrained model; any PEFT loads it.

    The trained function is W - scaling B_0 A_0 + scaling B A. Seen from W the update has rank 2r:
    scaling (B A - B_0 A_0) = scaling [B - B_0, B_0] [A; A - A_0], and rank r if one of the factors
    was not trained. A smaller ``rank`` keeps the largest singular components of each update.

    Args:
        adapted: from :func:`lora_lens.attach`.
        folder: as for :func:`save`.
        rank: None for the exact update; otherwise the largest rank to write.

    Returns:
        One row per layer: layer, rank (as written), update (Frobenius norm of the whole update),
        lost (share of its squared Frobenius norm that truncation left out, in [0, 1]).

    Raises:
        ValueError: ``adapted`` is none of attach's, is merged or holds NaN; or as :func:`save`.

    Warns:
        UserWarning: training moved buffers, such as batch norms' statistics: an adapter has no place
            for them, so only :func:`load` brings them back, and PEFT does not.
    """
    most = None if rank is None else whole_rank(rank)
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    layers = lora_layers(peft_model)
    state, ranks, rows = _state(peft_model), {}, []
    for name, layer in layers.items():
        b, a, norm, lost = _truncated(*trained_update(layer, record.starts.get(name)), most)
        if not torch.isfinite(norm):
            raise InputError(f"the adapter of {name} holds NaN or infinite values: the training diverged")
        ranks[name] = len(a)
        shapes = (layer.lora_B[ADAPTER].weight.shape, layer.lora_A[ADAPTER].weight.shape)
        state[f"{PREFIX}{name}.lora_B.weight"] = b.reshape(len(b), -1, *shapes[0][2:])
        state[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(len(a), *shapes[1][1:])
        rows.append({"layer": name, "rank": len(a), "update": float(norm), "lost": lost})
    if moved := moved_buffers(peft_model, record):
        warnings.warn(
            f"training moved {listed(moved, most=2)}, which an adapter cannot carry: with plain PEFT the "
            "function differs; use merge_and_unload to keep it all, or train with the norms in eval mode",
            stacklevel=2,
        )
    old = peft_model.peft_config[ADAPTER]
    settings, state, in_full = for_plain_peft(peft_model, state)
    config = LoraConfig(
        use_dora=old.use_dora,
        fan_in_fan_out=old.fan_in_fan_out,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        **settings,
        **rank_settings(
            {name: rank for name, rank in ranks.items() if not lies_in(name, in_full)},
            None,
            settings.get("target_parameters", ()),
        ),
    )
    digests = {name: start.digest for name, start in record.starts.items()} or _digests(peft_model)
    digests = {name: digest for name, digest in digests.items() if not lies_in(name, in_full)}
    with _replaced(folder) as new:
        _write_adapter(new, config, state)
        if moved:
            _write_tensors(new / BUFFERS, moved)
        _write_about(new, "adapter", record, digests)
    return pd.DataFrame(rows)


def export_residual(adapted: nn.Module, folder: str | Path) -> None:
    """Write the residual model and the adapter as it was before training, for trainers that want both.

    ``folder/base`` holds the residual model: of a transformers model with its configuration, for
    ``from_pretrained``; of any other model its state in model.safetensors. ``folder/adapter`` holds
    the window's factors as an ordinary PEFT adapter: load it trainable. To train over an 8- or 4-bit
    base, load ``folder/base`` with that quantization: then only the residual is rounded, as in
    QPiSSA (Meng et al. 2024).

    Args:
        adapted: from :func:`lora_lens.attach` with a window; what was trained since is left out.
        folder: as for :func:`save`.

    Raises:
        ValueError: ``adapted`` holds no window, or as :func:`save`.
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    if not record.starts:
        raise InputError(f"{record.method} has no residual base: use export, or PEFT's save_pretrained")
    state, digests = _state(peft_model), {}
    for name, start in record.starts.items():
        layer = lora_layer(peft_model, name)
        for key, factor in (("B", start.b), ("A", start.a)):
            like = getattr(layer, f"lora_{key}")[ADAPTER].weight
            state[f"{PREFIX}{name}.lora_{key}.weight"] = factor.reshape(like.shape)
        residual = weight_matrix(layer.get_base_layer())
        digests[name] = digest_of(residual)
        if record.variant.dora:
            key = f"{PREFIX}{name}.lora_magnitude_vector"
            whole = torch.addmm(
                residual.float(), start.b.float(), start.a.float(), alpha=layer.scaling[ADAPTER]
            )
            state[key] = torch.linalg.norm(whole, dim=1).reshape(state[key].shape).to(state[key].dtype)
    for name, module in whole_modules(peft_model).items():
        untrained = module.original_module.state_dict()
        state |= {f"{PREFIX}{name}.{unwrapped(key)}": tensor for key, tensor in untrained.items()}

    # Modules of its own around the same tensors, because taking the adapter off changes modules.
    tensors = {id(t): t for t in [*peft_model.parameters(), *peft_model.buffers()]}
    now = buffers_by_name(peft_model)
    before = {id(now[name]): buffer for name, buffer in record.buffers.items() if name in now}
    base = taken_off(copy.deepcopy(peft_model, tensors | before))
    with _replaced(folder) as new:
        (new / "base").mkdir()
        (new / "adapter").mkdir()
        if hasattr(base, "save_pretrained"):
            base.save_pretrained(new / "base")
        else:
            save_model(base, str(new / "base" / "model.safetensors"))
        _write_adapter(new / "adapter", peft_model.peft_config[ADAPTER], state)
        _write_about(new / "adapter", "adapter", record, digests)
        (new / ABOUT).write_text(
            json.dumps({"format": FORMAT, "kind": "residual base and adapter"}, indent=1)
        )


def _truncated(b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """The factors of at most ``rank``, the norm of the whole product, and the share of it left out."""
    norm = product_norm(b, a)
    if rank is None or rank >= len(a) or not torch.isfinite(norm):
        return b, a, norm, 0.0
    left, values, right = product_svd(b.double(), a.double())
    root, squares = values[:rank].sqrt(), values.square()
    lost = float(squares[rank:].sum() / squares.sum()) if squares.sum() > 0 else 0.0
    return (left[:, :rank] * root).to(b.dtype), (root[:, None] * right[:rank]).to(a.dtype), norm, lost


def _state(peft_model: PeftModel) -> dict[str, Tensor]:
    return adapter_state(peft_model)


def _fill(adapted: PeftModel, state: Mapping[str, Tensor], where: str | Path) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in _state(adapted).items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))[0]
        raise InputError(
            f"{where} does not hold the adapter that was saved: {wrong} has the shape {found.get(wrong)}, "
            f"expected {expected.get(wrong)}"
        )
    with torch.no_grad():
        for key, tensor in _state(adapted).items():
            tensor.copy_(state[key])


def _digests(peft_model: PeftModel) -> dict[str, str]:
    """Of base weights that no window has changed."""
    return {n: digest_of(weight_matrix(x.get_base_layer())) for n, x in lora_layers(peft_model).items()}


def _write_adapter(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
    _write_tensors(folder / WEIGHTS, state)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})


def _write_about(folder: Path, kind: str, record: Attachment, digests: Mapping[str, str]) -> None:
    components = {name: start.components.tolist() for name, start in record.starts.items()}
    about = {
        "format": FORMAT,
        "kind": kind,
        "method": record.method,
        "variant": {**asdict(record.variant), "dtype": str(record.variant.dtype).removeprefix("torch.")},
        "weights": {n: {"digest": d, "components": components.get(n)} for n, d in digests.items()},
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1))


def _checked(folder: Path) -> Path:
    """The folder, if it holds adapter weights; otherwise an error that says where there are some."""
    if not (folder / WEIGHTS).is_file():
        inside = sorted(f.parent.name for f in folder.glob(f"*/{WEIGHTS}"))
        hint = f"; give one of its folders: {listed(inside)}" if inside else ""
        raise MissingFileError(f"{folder} holds no {WEIGHTS} (pickled files are not opened){hint}")
    return folder


def _about(folder: Path) -> dict:
    if not (folder / ABOUT).is_file():
        raise MissingFileError(
            f"{folder} holds no {ABOUT}, so it was not written by lora_lens: "
            "load an ordinary adapter with PEFT's PeftModel.from_pretrained"
        )
    about = read_json(folder / ABOUT)
    if missing := {"format", "kind"} - about.keys():
        raise InputError(f"{folder / ABOUT} lacks {listed(sorted(missing))}: save the adapter again")
    if about.get("kind") not in ("adapter", "window"):
        raise InputError(f"{folder} holds a {about.get('kind')}: load what is in its folders")
    if about.get("format") != FORMAT:
        raise InputError(
            f"{folder / ABOUT} has format {about.get('format')}, expected {FORMAT}: update lora_lens"
        )
    if missing := {"method", "variant", "weights"} - about.keys():
        raise InputError(f"{folder / ABOUT} lacks {listed(sorted(missing))}: save the adapter again")
    return about


def _variant(values: Mapping[str, object]) -> Variant:
    dtype = values["dtype"]
    return Variant(**{**values, "dtype": None if dtype == "None" else getattr(torch, dtype)})


@contextmanager
def _replaced(folder: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` once all is written; until then that is untouched."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / ABOUT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and was not written by lora_lens; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid4().hex[:8]
    new, old = (folder.with_name(f".{folder.name}.{tag}.{state}") for state in ("new", "old"))
    try:
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
