"""Spectra of all weights of a model or a file: each weight factorized once, or found in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lens._base.devices import checked_device
from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.naming import Targets
from lora_lens._base.progress import progress_bar
from lora_lens._base.torch_tools import check_finite
from lora_lens._base.validate import flag, instance, sequence, suggestion
from lora_lens.spectrum.cache import SpectrumCache, weight_key
from lora_lens.spectrum.in_parallel import side_by_side
from lora_lens.spectrum.metric import Metric, as_metric, power_of
from lora_lens.spectrum.sources.matrices import Weight, weights
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.svd import Factors, product_svd, singular_values, some_components, thin_svd
from lora_lens.spectrum.window import Placement, Window, require_fit

Vectors = bool | Sequence[Placement] | Mapping[str, Sequence[Placement]]
METHOD = "gram float64 by blocks, float32 vectors"  # change it when the factors change
CACHED_FROM = 256  # smaller matrices are factorized faster than looked up
WORTH_PICKING = 3  # computing some components pays when there are this many times more
RELIABLE = 1e-5  # of the longest row: what the rounding of float32 vectors leaves of a row that should be 0
SUM = 1e-4  # of the weight's norm: how far the sum of all components in a metric may be from it


def spectra(
    source: nn.Module | str | Path,
    targets: Targets = None,
    *,
    metric: Metric | Any = None,
    vectors: bool | Placement | Iterable[Placement] | Mapping[str, Iterable[Placement]] = True,
    split_qkv: bool = False,
    split_gate_up: bool = False,
    revision: str | None = None,
    device: torch.device | str | None = None,
    cache: bool = True,
    progress: bool = True,
) -> SpectrumSet:
    """Factorize every matching weight of ``source`` once.

    Args:
        source: a model, a ``.safetensors`` or ``.gguf`` file, a folder of shards or of a PEFT
            adapter, or the name of a model on the Hugging Face Hub, ``"org/model"``; see
            :func:`lora_lens.spectrum.weights`. Files are read one matrix at a time, quantized ones
            dequantized, and from the Hub come only the chosen matrices' bytes.
        targets: which layers, see there; default all linear layers but the classifier.
        metric: data in whose metric the spectra are taken, those of W C^(1/2) with C = E[x x^T] of each
            layer's inputs: a task, examples, or a batch as the model takes it; or a
            :class:`lora_lens.spectrum.Metric` of them, with other settings. The model runs on them in
            evaluation mode. Windows on these spectra start as exactly as on others. All vectors are computed
            where any are wanted, and nothing is cached.
        vectors: True for all singular vectors; windows or other placements for theirs alone, in less
            time and memory, or by weight name those for each; False for the singular values only, which
            is enough for tables and most pictures.
        split_qkv: fused q, k and v as three weights, see there.
        split_gate_up: fused gate and up as two weights, see there.
        revision: of a model on the Hub: a branch, a tag or a commit.
        device: where to compute; default where each weight lies. It needs float64, so the CPU
            stands in for "mps".
        cache: keep all factors of large weights on disk and find them there by the weight's
            content; see :class:`lora_lens.spectrum.cache.SpectrumCache`.
        progress: show a bar when it takes longer than a moment.

    Returns:
        One :class:`Spectrum` per weight, on the CPU, computed in float64. Weights of up to 4 M
        entries are factorized side by side, as many as ``torch.get_num_threads()``.

    Raises:
        TypeError, ValueError, FileNotFoundError: nothing matches, a weight holds NaN or infinite values,
            a window does not fit, ``device`` is not there, or as :func:`lora_lens.spectrum.weights`; with a
            metric also: ``source`` is a file, a layer's inputs cannot be observed or do not reach it, or they
            leave dimensions out and are not shrunk.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> spectra = ll.spectra(model)
        >>> spectra
        SpectrumSet of 2 weights: 0, 2
        >>> spectra["0"].left.shape, spectra["0"].right.shape
        (torch.Size([32, 16]), torch.Size([16, 16]))
        >>> ll.spectra(model, "0", vectors=False)["0"].has_all_vectors  # the singular values alone
        False
    """
    chosen, place = _checked_vectors(vectors), checked_device(device)
    metric = None if metric is None else as_metric(metric)
    cache, progress = flag(cache, "cache"), flag(progress, "progress")
    found = weights(source, targets, split_qkv, split_gate_up, revision)
    if isinstance(chosen, Mapping):
        for name in chosen.keys() - {weight.name for weight in found}:
            meant = suggestion(name, [weight.name for weight in found])
            raise InputError(f"vectors names {name!r}, which is not among the weights{meant}")
    live = isinstance(source, nn.Module)
    for weight in found:  # meet what is wrong before the work starts
        wanted = _wanted(chosen, weight.name)
        for placement in [] if weight.factors or isinstance(wanted, bool) else wanted:
            _require_room(placement, min(weight.shape), weight.name)
        if live:
            check_finite(weight.name, weight.load())
    if metric is None:
        kept = SpectrumCache() if cache and chosen else None
        work = partial(_spectrum, vectors=chosen, device=place, cache=kept, checked=live)
        parts = side_by_side(work, found, lambda weight: weight.shape)
    elif not isinstance(source, nn.Module):
        raise InputError(
            f"a metric needs a model that can run, and {source} is a file: load the model and give that"
        )
    else:
        parts = _spectra_in_metric(source, found, metric, chosen, place)
    done: dict[str, Spectrum] = {}
    with progress_bar(total=len(found), shown=progress, desc="spectra", unit="weight", delay=0.5) as bar:
        for spectrum in parts:
            done[spectrum.name] = spectrum
            bar.update()
    return SpectrumSet([done[weight.name] for weight in found])


def _checked_vectors(vectors: object) -> Vectors:
    if isinstance(vectors, (bool, np.bool_)):
        return bool(vectors)
    if isinstance(vectors, Mapping) and vectors:
        return {name: _placements(given, f"vectors[{name!r}]") for name, given in vectors.items()}
    return _placements(() if isinstance(vectors, Mapping) else vectors, "vectors")


def _placements(given: object, name: str) -> tuple[Placement, ...]:
    what = "windows or other placements"
    if given is None or isinstance(given, (str, int)):
        raise InputTypeError(
            f"{name} must be True, False or {what}, such as [ll.Window.middle(8)], not {given!r}"
        )
    found = sequence(given, name, what, one=Placement)
    for placement in found:
        instance(placement, Placement, name, f"{what}, such as [ll.Window.middle(8)]")
    if not found and name == "vectors":
        raise InputError("vectors is empty: give False for the singular values alone, or windows")
    return found


def _wanted(vectors: Vectors, name: str) -> bool | Sequence[Placement]:
    return vectors.get(name, ()) if isinstance(vectors, Mapping) else vectors


def _require_room(placement: Placement, k: int, name: str) -> None:
    """Before the singular values are known: whether the placement can fit at all."""
    require_fit(placement.rank, k, name)
    if isinstance(placement, Window):
        placement.slice(k, name)


def _union(placements: Sequence[Placement], values: Tensor, name: str) -> Tensor:
    every = torch.arange(len(values))
    together: Tensor = torch.cat([every[p.components(values, name)] for p in placements]).unique()
    return together


def factorize(name: str, weight: Tensor) -> Spectrum:
    """The spectrum of one (out_features, in_features) weight, exact to float64 rounding.

    Args:
        name: of the layer, for tables and messages.
        weight: shape (out_features, in_features), any floating dtype.

    Raises:
        TypeError: ``name`` is no string, or ``weight`` no tensor.
        ValueError: the weight is no matrix.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> ll.spectrum.factorize("fc", torch.tensor([[0.0, 3.0], [4.0, 0.0]])).singular_values
        tensor([4., 3.], dtype=torch.float64)
    """
    instance(name, str, "name", "the layer's name")
    instance(weight, Tensor, "weight", "a matrix, (out_features, in_features)")
    if weight.ndim != 2:
        raise InputError(f"weight must be a matrix, (out_features, in_features), not {tuple(weight.shape)}")
    return _packed(name, thin_svd(weight.detach()))


def _packed(name: str, factors: Factors, components: Tensor | None = None) -> Spectrum:
    # Contiguous, so that products with fresh factors round as with those from the cache.
    left, values, right = (factor.cpu() for factor in factors)
    shape = (left.shape[0], right.shape[1])
    return Spectrum(name, shape, values, left.float().contiguous(), right.float().contiguous(), components)


def _spectrum(
    weight: Weight,
    vectors: Vectors,
    device: torch.device | None,
    cache: SpectrumCache | None,
    checked: bool,
) -> Spectrum:
    wanted = _wanted(vectors, weight.name)
    if weight.factors is not None:
        b, a = (factor.to("cpu", torch.float64) for factor in weight.factors())
        check_finite(weight.name, b)
        check_finite(weight.name, a)
        factors = product_svd(b, a)
        return _packed(weight.name, factors) if wanted else Spectrum(weight.name, weight.shape, factors[1])
    matrix = weight.load().detach()
    if not checked:
        check_finite(weight.name, matrix)
    if not wanted:
        return Spectrum(weight.name, weight.shape, singular_values(_placed(matrix, device)).cpu())
    k = min(weight.shape)
    large = k >= CACHED_FROM
    cache = cache if large else None
    key = weight_key(matrix, _method(matrix, device)) if cache else ""
    if cache and (known := cache.get(key)) is not None:
        return _packed(weight.name, known)
    if large and not isinstance(wanted, bool) and WORTH_PICKING * sum(p.rank for p in wanted) <= k:
        choose = partial(_union, wanted, name=weight.name)
        return _packed(weight.name, *some_components(_placed(matrix, device), choose))
    left, values, right = (factor.cpu() for factor in thin_svd(_placed(matrix, device)))
    if cache:
        cache.put(key, left, values, right)
    return _packed(weight.name, (left, values, right))


def _spectra_in_metric(
    model: nn.Module, found: Sequence[Weight], metric: Metric, vectors: Vectors, device: torch.device | None
) -> Iterator[Spectrum]:
    """In the order of completion, as many layers at a time as there is memory for their inputs' moments."""
    from lora_lens.spectrum import layer_inputs  # files need neither peft nor transformers

    by_name, words = {weight.name: weight for weight in found}, str(metric)
    layer_inputs.observable(model, by_name)
    for names in layer_inputs.in_groups({name: weight.shape[1] for name, weight in by_name.items()}):
        known = layer_inputs.input_metrics(model, names, metric)
        work = partial(
            _in_metric, known=known, power=metric.power, words=words, vectors=vectors, device=device
        )
        yield from side_by_side(work, [by_name[name] for name in names], lambda weight: weight.shape)


def _in_metric(
    weight: Weight,
    known: Mapping[str, tuple[Tensor, float]],
    power: float,
    words: str,
    vectors: Vectors,
    device: torch.device | None,
) -> Spectrum:
    """W C^p = U S V^T, with V^T C^-p as the right vectors."""
    matrix = _placed(weight.load().detach(), device).double()
    moment, shrinkage = known[weight.name][0].to(matrix.device), known[weight.name][1]
    product = matrix @ power_of(moment, power, weight.name)
    if not _wanted(vectors, weight.name):
        values = singular_values(product).cpu()
        return Spectrum(weight.name, weight.shape, values, metric=words, shrinkage=shrinkage)
    left, values, right = thin_svd(product)
    rows = left.double().T @ matrix  # S V^T C^-p by another way, which divides by no small eigenvalue
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    sure = lengths > RELIABLE * lengths.max()
    if sure.all():
        right = rows / values[:, None]
    else:  # of a weight of lower rank
        right = right.double() @ power_of(moment, -power, weight.name)
        right = torch.where(sure, rows / values[:, None], right)
    error = torch.linalg.norm((left.double() * values) @ right - matrix)
    if not error <= SUM * torch.linalg.norm(matrix):
        raise InputError(
            f"the components of {weight.name} in the {words} do not sum to the weight: its inputs are too "
            f"uneven for the power {power:g}; give Metric more shrinkage, such as 0.01, or a smaller power"
        )
    return replace(_packed(weight.name, (left, values, right)), metric=words, shrinkage=shrinkage)


def _method(matrix: Tensor, device: torch.device | None) -> str:
    """What the factors depend on besides the matrix: accelerators round them otherwise."""
    kind = (matrix.device if device is None else device).type
    return METHOD if kind in ("cpu", "mps") else f"{METHOD}, {kind}"


def _placed(matrix: Tensor, device: torch.device | None) -> Tensor:
    place = matrix.device if device is None else device
    return matrix.cpu() if place.type == "mps" else matrix.to(place)
