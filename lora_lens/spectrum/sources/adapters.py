"""The updates in an adapter's file: PEFT's, lora_lens's own, other programs' where the scale is known.

The update of a layer is scaling * B @ A relative to the pretrained weight, or the product that LoHa or LoKr
forms. Where it is something else, because its base is a residual or its method needs the base weight (DoRA,
VeRA, OFT, IA3), it is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lens._base.errors import InputError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens._base.validate import flag, number, whole_number
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import unwrapped
from lora_lens.spectrum.sources.checkpoint import headers, json_object, metadata, read_json, read_tensor
from lora_lens.spectrum.sources.factor_pairs import (
    STRONG,
    Pair,
    factors_of,
    is_adapter_key,
    pairs_among,
    stored_pair,
)
from lora_lens.spectrum.sources.other_updates import Product, is_product, product_of, stored_product
from lora_lens.spectrum.sources.roles import Stored

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
ABOUT, START, ON_RESIDUAL = "lora_lens.json", "start.safetensors", "on_residual"
PREFIX = "base_model.model."
PREFIXES = ("base_model.", "lora_", "lycoris_")  # of all keys of PEFT, of kohya's scripts and LyCORIS
# PEFT's starts that leave the base as it is; the others subtract from it what the adapter starts with.
PLAIN_STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
# Settings with which the layer does not compute W + scaling * B @ A.
OTHER_METHODS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
}

Shapes = Mapping[str, tuple[tuple[int, ...], str]]


def is_adapter(tensors: Iterable[str]) -> bool:
    """Whether a file holds an adapter without its base model.

    With it, each adapted layer's own weight is there; of an embedding PEFT writes it to either kind of file.
    """
    keys = list(tensors)
    factors = [key for key in keys if is_adapter_key(key)]
    bases = (key for key in keys if ".base_layer." in key and not is_adapter_key(key))
    based = tuple(f"{key.partition('.base_layer.')[0]}." for key in bases)
    if not factors:
        return bool(keys) and not based and all(key.startswith(PREFIXES) for key in keys)
    factors = [key for key in factors if "lora_embedding" not in key]
    return not factors or not all(key.startswith(based) for key in factors)


def without_adapter(tensors: Iterable[str]) -> dict[str, str]:
    """The keys of a model's own tensors, by the names that they have without PEFT around them."""
    keys = list(tensors)
    if not any(".base_layer." in key for key in keys):
        return {key: key for key in keys}
    own = (key for key in keys if not is_adapter_key(key) and ".modules_to_save." not in key)
    return {re.sub(r"(\.(base_layer|original_module))+\.", ".", k.removeprefix(PREFIX)): k for k in own}


def saved_by_lora_lens(folder: Path) -> list[Stored] | None:
    """The updates in a folder of :func:`lora_lens.save`, if its adapter fits a residual; otherwise None.

    Raises:
        ValueError: the folder is one of :func:`lora_lens.export_residual`.
    """
    for place in (folder, folder.parent):
        kind = read_json(place / ABOUT).get("kind") if (place / ABOUT).is_file() else None
        if kind == "window" and folder in (place, place / ON_RESIDUAL):
            return _of_window(place)
        if kind == "residual base and adapter" and folder in (place, place / "adapter"):
            raise InputError(
                f"{place} holds a residual model, in base, and the adapter that it lacks, as it was before "
                "training: no update; for what training changed, give the folder of ll.export or ll.save"
            )
    return None


def in_peft_folder(folder: Path) -> list[Stored]:
    """The updates of an adapter that PEFT saved.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are none of LoRA's.
    """
    path = folder / FILE
    if not path.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1 or not is_adapter(headers(found[0])):
            raise MissingFileError(
                f"{folder} holds no {FILE} (a pickled adapter_model.bin is not opened, "
                "because a pickle can run code); save the adapter again as safetensors"
            )
        path = found[0]
    return of_adapter_file(path, headers(path), metadata(path))


def of_adapter_file(path: Path, tensors: Shapes, about: Mapping[str, str]) -> list[Stored]:
    """The updates in one file, scaled as the config beside it or the file itself says.

    Raises:
        ValueError: nothing says how they are scaled, or they are no updates of LoRA.
    """
    if (saved := saved_by_lora_lens(path.parent)) is not None:
        return saved
    config = path.parent / CONFIG
    settings = read_json(config) if config.is_file() else {}
    of_products = settings.get("peft_type") in ("LOHA", "LOKR")
    if not of_products and ("peft_type" in settings or (settings and "lora_parameters" not in settings)):
        _require_plain_lora(path.parent, settings)
    if any(key.endswith(".start_b") for key in tensors):
        raise InputError(
            f"{path} is what PEFT writes of an adapter in lora_lens's offset form, whose update is not B A "
            "alone: give the folder of ll.export or ll.save"
        )
    if settings.get("init_lora_weights", True) is False and not of_products:
        warn(
            f"{path.parent} has init_lora_weights=False, as has what a trainer writes of a window from "
            "ll.attach: if it is that, it fits a residual, and B A is no update of the pretrained weights; "
            "give the folder of ll.export or ll.save"
        )
    found, others = pairs_among(tensors)
    if of_products and found:  # which that method has not
        _require_plain_lora(path.parent, settings)
    products = {layer: kinds for layer, kinds in others.items() if is_product(kinds)}
    if len(names := {pair.adapter for pair in found}) > 1:
        raise InputError(f"{path} holds several adapters, {listed(sorted(names))}; save them one by one")
    if not found and not products:
        kinds = sorted({kind for kinds in others.values() for kind in kinds} or {k[-40:] for k in tensors})
        what = listed(kinds, most=3)
        raise InputError(
            f"{path} holds an adapter without LoRA's factors, lora_A and lora_B ({what}): only LoRA's update "
            "is scaling * B @ A; merge it into its model and compare the weights before and after"
        )
    read = partial(read_tensor, path)
    if of_products:
        scaling = partial(_of_peft, {**settings, "lora_alpha": settings.get("alpha")}, config)
    elif settings.get("lora_parameters"):
        scaling = partial(_of_mlx, settings["lora_parameters"], config)
    elif settings:
        scaling = partial(_of_peft, settings, config)
    elif "lora_adapter_metadata" in about:
        packed = json_object(about["lora_adapter_metadata"], f"{path}: lora_adapter_metadata in its header")
        scaling = partial(_of_diffusers, packed, path)
    else:
        scaling = partial(_of_alpha, tensors, read, path, about)
    stored: dict[str, Stored] = {}
    for layer, kinds in products.items():
        if layer not in {pair.layer for pair in found}:
            name = unwrapped(layer.removeprefix(PREFIX).replace(".base_layer", ""))
            product = product_of(layer, kinds, tensors)
            factor = scaling(product, name)[0] if product.rank or of_products else 1.0
            stored[name] = stored_product(layer, name, kinds, tensors, read, factor)
    for layer in others.keys() - products.keys() - {pair.layer for pair in found}:
        if touched := [what for what in others[layer] if STRONG.search(what) or what == "diff"]:
            problem = f"is adapted by other than B @ A ({listed(touched, most=3)}); merge it into its model"
            stored[layer] = Stored(layer, (1, 1), partial(read, layer), problem=problem)
    for pair in found:
        name = unwrapped(pair.layer.removeprefix(PREFIX).replace(".base_layer", ""))
        if more := others.get(pair.layer):
            problem = f"is adapted by more than B @ A ({listed(more, most=3)}); merge it into its model"
            stored[name] = stored_pair(pair, name, 1.0, read, problem=problem)
            continue
        value, rank = scaling(pair, name)
        problem = ""
        if rank and _is_of(name, settings.get("target_parameters"), of_one=pair.rank == rank):
            problem = (
                "is adapted through target_parameters: whether its factors fit (in, out) or (out, in) is not "
                "stored; merge the adapter into its model and compare the weights before and after"
            )
        elif ".base_layer.out_proj" in pair.layer:
            problem = (
                "is the output of nn.MultiheadAttention, whose update PEFT applies twice (0.21 at least); "
                "merge the adapter into its model and compare the weights before and after"
            )
        if problem:
            stored[name] = replace(stored_pair(pair, name, value, read, problem=problem), usual=False)
        else:
            stored[name] = stored_pair(pair, name, value, read, rank=rank)
    return list(stored.values())


def _is_of(name: str, parameters: object, of_one: bool) -> bool:
    """Whether one of the parameters, such as mlp.experts.gate_up_proj, belongs to the module of that name.

    Args:
        of_one: whether the factors are of one matrix; then a layer's weight is adapted as by its name.
    """
    texts = [p for p in parameters if isinstance(p, str)] if isinstance(parameters, list) else []
    places = [p.rpartition(".")[0] for p in texts if not (of_one and p.endswith(".weight"))]
    return any(f".{name}".endswith(f".{place}") for place in places)


def _require_plain_lora(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = next((name for key, name in OTHER_METHODS.items() if settings.get(key)), settings.get("peft_type"))
    if kind == "VERA":
        raise InputError(
            f"{folder} holds a VeRA adapter, whose matrices are shared and cut to each layer's size, which "
            "only the base knows: merge it into its model and compare the weights before and after"
        )
    if kind != "LORA":
        raise InputError(
            f"{folder} holds a {kind} adapter; only LoRA's update is scaling * B @ A: merge this one into "
            "its model and compare the weights before and after"
        )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{folder} holds an adapter with init_lora_weights={settings['init_lora_weights']!r}: it fits a "
            "base from which its start was taken, so scaling * B @ A is not its update of the pretrained "
            "weights; save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) "
            "or with ll.export"
        )


# --- where the scaling is found: each returns it with the rank that it is for ---


def _of_peft(
    settings: Mapping[str, Any], where: Path, pair: Pair | Product, name: str
) -> tuple[float, int | None]:
    from peft.utils.other import get_pattern_key  # seconds, and no other file needs it

    try:
        ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
        rank = whole_number(ranks.get(get_pattern_key([*ranks], name), settings["r"]), "r", least=1)
        alpha = number(alphas.get(get_pattern_key([*alphas], name), settings["lora_alpha"]), "lora_alpha")
        stabilized = flag(settings.get("use_rslora") or False, "use_rslora")
        scaling = float(alpha / (math.sqrt(rank) if stabilized else rank))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, re.error) as error:
        raise InputError(f"{where} gives no scaling of {name} ({error!r}); save it again") from error
    return _finite(scaling, where, name), rank


def _of_diffusers(
    packed: Mapping[str, Any], where: Path, pair: Pair | Product, name: str
) -> tuple[float, int | None]:
    """Of the header in which diffusers keeps one LoraConfig for each part of a pipeline, by prefix."""
    prefix = name.partition(".")[0]
    settings = {k.removeprefix(f"{prefix}."): v for k, v in packed.items() if k.startswith(f"{prefix}.")}
    settings = settings or dict(packed)
    _require_plain_lora(where, {"peft_type": "LORA"} | settings)
    return _of_peft(settings, where, pair, name.removeprefix(f"{prefix}."))


def _of_mlx(
    parameters: Mapping[str, Any], where: Path, pair: Pair | Product, name: str
) -> tuple[float, int | None]:
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise InputError(f"{where} gives no scaling of {name}: expected a number scale in lora_parameters")
    return _finite(float(scale), where, name), parameters.get("rank")


def _of_alpha(
    tensors: Shapes,
    read: Callable[[str], Tensor],
    path: Path,
    about: Mapping[str, str],
    pair: Pair | Product,
    name: str,
) -> tuple[float, int | None]:
    """Of the number alpha that kohya's and similar programs keep beside each pair: alpha / rank."""
    key = f"{pair.layer}.alpha"
    if re.search(r"rs_?lora\W+(true|1)", " ".join(about.values()), re.IGNORECASE):
        raise InputError(f"{path} speaks of rank-stabilized LoRA, whose scaling it does not say for certain")
    if key not in tensors:
        raise InputError(
            f"{path} holds LoRA factors, and nothing says how B @ A of {name} is scaled: expected {CONFIG} "
            "beside it, as PEFT writes it, or in it a number alpha for each layer, as kohya's scripts do"
        )
    if math.prod(tensors[key][0]) != 1:
        raise InputError(f"{path}: {key} is no single number but of shape {tensors[key][0]}")
    return _finite(float(read(key)) / max(pair.rank, 1), path, name), None


def _finite(scaling: float, where: Path, name: str) -> float:
    if not math.isfinite(scaling):
        raise InputError(f"{where} gives no scaling of {name}: {scaling}; save it again")
    return scaling


# --- what ll.save wrote of a window ---


def _of_window(folder: Path) -> list[Stored]:
    """The trained factors minus those that the residual lacks: scaling (B A - B_0 A_0)."""
    path, start = folder / ON_RESIDUAL / FILE, folder / START
    settings, tensors = read_json(path.parent / CONFIG), headers(path)
    _require_plain_lora(path.parent, {**settings, "init_lora_weights": True})
    taken, stored = headers(start), []
    for pair in pairs_among(tensors)[0]:
        name = pair.layer.removeprefix(PREFIX)
        found = {f"{name}.A", f"{name}.B"} <= taken.keys()
        plain = name.replace(".base_layer", "")
        if not found and _is_of(plain, settings.get("target_parameters"), of_one=False):
            problem = (
                "is adapted as a parameter: load it with ll.load, and take the spectra of what training "
                "changed from ll.forgetting.drift or from the merged model"
            )
            stored.append(
                replace(
                    stored_pair(pair, plain, 1.0, partial(read_tensor, path), problem=problem), usual=False
                )
            )
            continue
        if not found:
            raise InputError(f"{start} lacks the factors of {name}; save the adapter again")
        scaling, rank = _of_peft(settings, path.parent / CONFIG, pair, name)
        read = partial(read_tensor, path)
        factors = partial(_since_start, read, pair, start, name, scaling)
        stored.append(stored_pair(pair, name, scaling, read, rank=rank, factors=factors))
    return stored


def _since_start(
    read: Callable[[str], Tensor], pair: Pair, start: Path, name: str, scaling: float
) -> tuple[Tensor, Tensor]:
    b, a = factors_of(pair, scaling, read)
    b0, a0 = (read_tensor(start, f"{name}.{key}").flatten(1).to(b.dtype) for key in "BA")
    return torch.cat([b, -scaling * b0], dim=1), torch.cat([a, a0])
