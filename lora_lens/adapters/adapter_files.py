"""What lies in an adapter's folder: PEFT's two files, lora_lens.json, and a window's start. Only safetensors.

lora_lens.json      which weights the adapter belongs to, by hash, and how it was made; its "kind" is
                    "adapter" if it fits these weights as they are, "window" if it fits their residual
start.safetensors   of a window: the factors that the residual lacks, <layer>.A and <layer>.B
buffers.safetensors if training moved them: what is no parameter, such as batch norms' statistics
README.md           of an export: its card, which people may change or remove

PEFT's files of a window lie in the folder "on_residual", where PEFT does not find them by mistake:
without the residual they would give a wrong function.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_lens._base.errors import InputError, LoraLensError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens._base.validate import choice, flag, number, shown, whole_number
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import unwrapped
from lora_lens.adapters.injection import Attachment
from lora_lens.adapters.peft_names import ADAPTER, PREFIX
from lora_lens.adapters.replacing import (
    ABOUT,
    BUFFERS,
    CARD,
    CONFIG,
    FILES,
    ON_RESIDUAL,
    START,
    WEIGHTS,
    changed_files,
    place_of,
    settled,
    unchanged,
    write_about,
)
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.sources.checkpoint import read_json, read_safetensors
from lora_lens.spectrum.stacks import stack_name

FORMAT = 1
DTYPES = ("None", "float32", "float64", "bfloat16", "float16")
# What decides the function of an adapter, and what PEFT only notes; lora_lens leaves all else as it is.
DECIDING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
KEPT = (*DECIDING, "lora_dropout", "modules_to_save", "init_lora_weights", "task_type")
TARGETS = ("target_modules", "target_parameters", "exclude_modules")  # lora_lens.json says which layers
NOTED = (
    *TARGETS,
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


@dataclass(frozen=True, eq=False)
class Saved:
    """What was read and checked of a folder that :func:`lora_lens.save` or :func:`lora_lens.export` wrote.

    Attributes:
        method, variant: as in the :class:`lora_lens.adapters.injection.Attachment`.
        weights: by layer, the digest of the weight it was made for and the window's components.
        config: PEFT's.
        state: PEFT's tensors.
        factors: of a window, its start: ``<layer>.A`` and ``<layer>.B``; None of another adapter.
        buffers: those that training moved.
        where: the folder of the tensors, for messages.
    """

    method: str
    variant: Variant
    weights: dict[str, dict[str, Any]]
    config: LoraConfig
    state: dict[str, Tensor]
    factors: dict[str, Tensor] | None
    buffers: dict[str, Tensor]
    where: Path

    def rank(self, name: str) -> int:
        """Of the adapter of this layer."""
        ranks: dict[str, int] = self.config.rank_pattern or {}
        return ranks.get(get_pattern_key(list(ranks), stack_name(name)), self.config.r)


def write_adapter(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """PEFT's two files."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_tensors(folder / WEIGHTS, state)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; tensors that share memory, as tied weights do, are written each in full."""
    own, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    try:
        save_file(own, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


def write_record(folder: Path, kind: str, record: Attachment, digests: Mapping[str, str]) -> None:
    """The last file of a folder, lora_lens.json."""
    components = {name: start.components.tolist() for name, start in record.starts.items()}
    # As earlier versions wrote it, where all is of the form that they knew.
    bases = {n: {} if s.changes_base else {"base": s.form} for n, s in record.starts.items()}
    variant = {**asdict(record.variant), "dtype": str(record.variant.dtype).removeprefix("torch.")}
    if variant["base"] == "residual":
        del variant["base"]
    about = {
        "format": FORMAT,
        "kind": kind,
        "method": record.method,
        "variant": variant,
        "weights": {
            n: {"digest": d, "components": components.get(n), **bases.get(n, {})} for n, d in digests.items()
        },
    }
    write_about(folder, about)


def read_saved(folder: str | Path, checkpoint: str | Path | None) -> Saved:
    """Read and check all that can be checked without the model.

    Raises:
        MissingFileError, InputError: a file is missing, damaged or foreign.

    Warns:
        UserWarning: another program wrote PEFT's files since.
    """
    folder = place_of(folder)
    elsewhere = None if checkpoint is None else _checkpoint(checkpoint)
    with settled(folder) as find:
        about = _about(find(ABOUT), folder)
        window = about["kind"] == "window"
        within = f"{ON_RESIDUAL}/" if window else ""
        theirs = {f"{within}{name}" for name in (CONFIG, WEIGHTS)}
        changed = changed_files(
            find, about, folder, but={f"{within}{WEIGHTS}", CARD} if elsewhere else {CARD}
        )
        if own := changed - theirs:
            raise InputError(f"{folder / min(own)} is not as lora_lens wrote it: save the adapter again")
        config = _config(find(f"{within}{CONFIG}"), folder)
        state = _adapter_tensors(elsewhere or find(f"{within}{WEIGHTS}"), folder)
        factors = read_safetensors(find(START)) if window else None
        moved = BUFFERS in about["files"] if "files" in about else find(BUFFERS).is_file()
        buffers = read_safetensors(find(BUFFERS)) if moved else {}
    if changed:
        warn(
            f"{folder / min(changed)} was changed since lora_lens wrote it, as by a trainer that saves into "
            "the same folder; it is taken as it is",
        )
    if elsewhere is not None:
        _require_like(elsewhere.parent, config, about["kind"])
    where = folder if elsewhere is None else elsewhere
    return Saved(about["method"], about["variant"], about["weights"], config, state, factors, buffers, where)


def _about(path: Path, folder: Path) -> dict[str, Any]:
    """The content of lora_lens.json, each field of the type that it must have, the variant as a Variant."""
    if not path.is_file():
        raise MissingFileError(
            f"{folder} holds no {ABOUT}, so it was not written by lora_lens: "
            "load an ordinary adapter with PEFT's PeftModel.from_pretrained"
        )
    about = read_json(path)
    if missing := {"format", "kind"} - about.keys():
        raise InputError(f"{path} lacks {listed(sorted(missing))}: save the adapter again")
    if about["format"] != FORMAT or isinstance(about["format"], bool):
        raise InputError(f"{path} has format {about['format']}, expected {FORMAT}: update lora_lens")
    if about["kind"] not in ("adapter", "window"):
        inside = (
            f": load what is in its folders, {folder / 'adapter'}" if about["kind"] in list(FILES) else ""
        )
        raise InputError(f"{folder} holds a {about['kind']}{inside}, expected an adapter or a window")
    if missing := {"method", "variant", "weights"} - about.keys():
        raise InputError(f"{path} lacks {listed(sorted(missing))}: save the adapter again")
    if not unchanged(about):
        raise InputError(
            f"{path} was changed since lora_lens wrote it: put it back or save the adapter again"
        )
    weights = about["weights"]
    if not isinstance(about["method"], str):
        raise InputError(f"{path} has the method {shown(about['method'])}, expected a text")
    if not isinstance(weights, dict) or not weights:
        raise InputError(
            f"{path} has the weights {shown(weights)}, expected an object with the adapted layers"
        )
    for name, known in weights.items():
        if not _is_known(known, about["kind"] == "window"):
            raise InputError(
                f"{path} says {shown(known)} of {name}, expected the digest of its weight (64 hex digits) "
                "and its components (whole numbers): save the adapter again"
            )
    return {**about, "variant": _variant(about["variant"], path)}


def _is_known(known: object, window: bool) -> bool:
    if not isinstance(known, dict) or not re.fullmatch("[0-9a-f]{64}", str(known.get("digest"))):
        return False
    components = known.get("components")
    if known.get("base", "residual") not in ("residual", "offset"):
        return False
    if components is None:
        return not window
    return isinstance(components, list) and all(type(c) is int and c >= 0 for c in components)


def _variant(values: object, path: Path) -> Variant:
    known = {f.name for f in fields(Variant)}
    if not isinstance(values, dict) or values.keys() | {"base"} != known:
        raise InputError(
            f"{path} has the variant {shown(values)}, expected {listed(sorted(known))}: update lora_lens"
        )
    if values["dtype"] not in DTYPES:
        raise InputError(f"{path} has the variant's dtype {shown(values['dtype'])}, expected one of {DTYPES}")
    dtype = None if values["dtype"] == "None" else getattr(torch, values["dtype"])
    try:
        for name in ("rslora", "dora"):
            flag(values[name], name)
        number(values["dropout"], "dropout", least=0, below=1)
        return Variant(**{**values, "dtype": dtype})
    except LoraLensError as error:
        raise InputError(f"{path} has a variant that is none: {error}") from error


def _config(path: Path, folder: Path) -> LoraConfig:
    """PEFT's config of a folder, without its targets, and without asking the hub for what is missing."""
    if not path.is_file():
        raise MissingFileError(f"{folder} lacks {path.name}: copy it there or save the adapter again")
    values = read_json(path)
    default = LoraConfig().to_dict()
    try:
        kept = _checked_settings({key: values.get(key, default[key]) for key in KEPT})
    except LoraLensError as error:
        raise InputError(f"{path}: {error}") from error
    if values.get("peft_type") != "LORA":
        raise InputError(f"{path} is of a {shown(values.get('peft_type'))} adapter, expected LORA")
    other = {k: v for k, v in values.items() if k not in (*KEPT, *NOTED) and v != default.get(k)}
    for key, value in other.items():
        if key in default and (value or default[key]):
            raise InputError(
                f"{path} has {key}={shown(value)}, which no adapter of lora_lens has: load it with PEFT's "
                "PeftModel.from_pretrained"
            )
    if later := [f"{key}={shown(value)}" for key, value in other.items() if key not in default and value]:
        warn(
            f"{path} was written by a later version of PEFT, and this one does not know "
            f"{listed(later, most=3)}; it is ignored: update peft if the adapter was trained with it",
        )
    return LoraConfig(**kept)


def _checked_settings(kept: dict[str, Any]) -> dict[str, Any]:
    whole_number(kept["r"], "r", least=1)
    number(kept["lora_alpha"], "lora_alpha", above=0)
    number(kept["lora_dropout"], "lora_dropout", least=0, below=1)
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        flag(kept[key], key)
    for key in ("rank_pattern", "alpha_pattern"):
        kept[key] = {} if kept[key] is None else kept[key]
        if not isinstance(kept[key], dict):
            raise InputError(f"{key} must be an object, not {shown(kept[key])}")
        for name, value in kept[key].items():
            _require_pattern(name, key)
            whole_number(value, f"{key} of {name}", least=1) if key == "rank_pattern" else number(
                value, f"{key} of {name}", above=0
            )
    if not isinstance(kept["init_lora_weights"], bool) and kept["init_lora_weights"] != "mica":
        raise InputError(
            f"init_lora_weights={shown(kept['init_lora_weights'])} makes a start of its own; none is saved so"
        )
    saved = kept["modules_to_save"]
    if saved is not None and not (isinstance(saved, list) and all(isinstance(m, str) and m for m in saved)):
        raise InputError(f"modules_to_save must be a list of names, not {shown(saved)}")
    if kept["task_type"] is not None:
        choice(kept["task_type"], "task_type", [str(kind.value) for kind in TaskType])
    return kept


def _require_pattern(text: str, key: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"{key} has {text!r}, which is no pattern ({error})") from error


def _require_like(folder: Path, config: LoraConfig, kind: str) -> None:
    """Raise if a trainer's checkpoint was trained with other settings, or for another base."""
    if (folder / ABOUT).is_file() and (other := read_json(folder / ABOUT).get("kind")) != kind:
        raise InputError(
            f"{folder} holds what ll.save or ll.export wrote, kind {other!r}, which does not go on from this "
            f"{kind}: load it by itself"
        )
    if not (folder / CONFIG).is_file():
        return
    theirs = read_json(folder / CONFIG)
    for key in DECIDING:
        ours = getattr(config, key)
        if key in theirs and (theirs[key] or ours) and theirs[key] != ours:
            raise InputError(
                f"{folder} was trained with {key}={shown(theirs[key])}, and the adapter that was saved has "
                f"{shown(ours)}: it is the checkpoint of another one"
            )


def _checkpoint(given: str | Path) -> Path:
    """The file with the tensors of a checkpoint, given that file or its folder."""
    path = place_of(given, "checkpoint")
    if path.is_file():
        return path
    if not path.exists():
        raise MissingFileError(f"there is no file or folder {path} to take the checkpoint from")
    for folder in (path, path / ADAPTER):
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
    inside = sorted(f.parent.name for f in path.glob(f"[!.]*/{WEIGHTS}"))
    hint = f"; give one of its folders: {listed(inside)}" if inside else ""
    raise MissingFileError(f"{path} holds no {WEIGHTS} (pickled files are not opened){hint}")


def _adapter_tensors(path: Path, folder: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no {path.name} (pickled files are not opened)")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no .safetensors file (pickled checkpoints are not opened: a pickle can run code)"
        )
    state = {}
    for key, tensor in read_safetensors(path).items():
        name = re.sub(rf"(\.lora_(?:A|B|magnitude_vector))\.{ADAPTER}(?=\.weight$|$)", r"\1", unwrapped(key))
        state[name[name.find(PREFIX) :] if PREFIX in name else name] = tensor
    return state
