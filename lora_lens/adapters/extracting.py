"""A LoRA from two checkpoints: the largest singular components of what changed between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens._base.naming import Targets, listed
from lora_lens._base.progress import progress_bar
from lora_lens._base.torch_tools import check_finite
from lora_lens._base.validate import flag, number
from lora_lens._base.warning import warn
from lora_lens.adapters.adapter_files import write_adapter, write_record
from lora_lens.adapters.injection import Attachment, require_unadapted
from lora_lens.adapters.peft_names import MOVED, PREFIX, rank_settings, target_settings
from lora_lens.adapters.pretrained import require_weights
from lora_lens.adapters.replacing import replaced
from lora_lens.adapters.variant import Variant
from lora_lens.spectrum.in_parallel import side_by_side
from lora_lens.spectrum.patterns import ONE_EXPERT
from lora_lens.spectrum.sources.matrices import Weight, weights
from lora_lens.spectrum.sources.roles import is_embedding
from lora_lens.spectrum.svd import some_components
from lora_lens.spectrum.window import validate_rank

Source = nn.Module | str | Path


def extract(
    before: Source,
    after: Source,
    folder: str | Path,
    rank: int | float = 16,
    *,
    targets: Targets = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Write an ordinary LoRA that takes ``before`` to ``after``, as far as its rank allows; PEFT loads it.

    Of each layer's change the largest singular components are kept, the best approximation of that rank
    (Eckart and Young 1936). At most one pair of weights for each thread is read at a time, so checkpoints may
    be larger than memory.

    Args:
        before, after: two states of one model, each a model or what :func:`lora_lens.spectra` reads: a
            file, a folder, a model on the Hub. Quantized ones are dequantized.
        folder: as for :func:`save`.
        rank: a whole number for each layer; or a share of the change's energy (its squared Frobenius norm)
            in (0, 1), such as 0.9: then each layer gets the smallest rank that holds it.
        targets: which linear layers, as for :func:`lora_lens.spectrum.weights`; what else differs (norms,
            embeddings, heads) a LoRA of these layers does not hold.
        progress: show a bar when it takes longer than a moment.

    Returns:
        One row per layer: layer, rank (as written, 0 for a layer that did not change and is left out), update
        (Frobenius norm of the whole change), lost (share of its energy that is left out, in [0, 1]).

    Raises:
        TypeError, ValueError, FileNotFoundError: one is adapted or an adapter, which :func:`export` writes;
            the two do not hold the same layers, nothing changed, a weight is not finite, an embedding, an
            expert or a convolution is chosen; or as :func:`lora_lens.spectrum.weights` and :func:`save`.

    Warns:
        UserWarning: experts, of which no LoRA is written, are left out because no ``targets`` are given.

    Example:
        >>> from copy import deepcopy
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> before = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> after = deepcopy(before)
        >>> with torch.no_grad():
        ...     _ = after[0].weight.add_(torch.ones(6, 1) @ torch.ones(1, 8))
        >>> with TemporaryDirectory() as folder:
        ...     ll.extract(before, after, folder, rank=0.99)[["layer", "rank"]]
          layer  rank
        0     0     1
        1     2     0
    """
    most = None if isinstance(rank, float) else validate_rank(rank)
    share = 1.0 if most else number(rank, "rank", above=0, below=1)
    progress = flag(progress, "progress")
    pairs = _paired(before, after, targets)
    work = partial(_largest, most=most, share=share)
    found: dict[str, _Part] = {}
    with progress_bar(total=len(pairs), shown=progress, desc="extract", unit="weight", delay=0.5) as bar:
        for part in side_by_side(work, pairs, lambda pair: pair[0].shape):
            found[part.layer] = part
            bar.update()
    parts = [found[old.name] for old, _ in pairs]
    state = {}
    for part in (kept := [part for part in parts if len(part.a)]):
        state[f"{PREFIX}{part.layer}.lora_B.weight"] = part.b
        state[f"{PREFIX}{part.layer}.lora_A.weight"] = part.a
    ranks = {part.layer: len(part.a) for part in kept}
    digests = {part.layer: part.digest for part in kept}
    if not ranks:
        raise InputError(f"none of the {len(pairs)} layers differs between before and after")
    named = (
        before if isinstance(before, str) else getattr(getattr(before, "config", None), "_name_or_path", None)
    )
    model = next((source for source in (before, after) if isinstance(source, nn.Module)), None)
    settings = _settings_of_files(ranks, before) if model is None else target_settings(list(ranks), model)
    config = LoraConfig(
        base_model_name_or_path=named or None,
        **settings,
        **rank_settings(ranks, None, settings.get("target_parameters", ())),
    )
    record = Attachment("LoRA extracted from two checkpoints", Variant(), {}, frozenset(), {})
    with replaced(folder, "adapter") as new_folder:
        write_adapter(new_folder, config, state)
        write_record(new_folder, "adapter", record, digests)
    rows = [(part.layer, len(part.a), part.norm, part.lost) for part in parts]
    return pd.DataFrame(rows, columns=["layer", "rank", "update", "lost"])


def _paired(before: Source, after: Source, targets: Targets) -> list[tuple[Weight, Weight]]:
    """The same weights of both, in the order of the first."""
    for source in (before, after):
        if isinstance(source, nn.Module):
            require_unadapted(source)
    first, second = ({w.name: w for w in weights(source, targets)} for source in (before, after))
    for found, source in ((first, before), (second, after)):
        require_weights(found.values(), source)
    files = not any(isinstance(source, nn.Module) for source in (before, after))
    if targets is None and (experts := [name for name in first if _is_expert(name, files)]):
        first = {name: weight for name, weight in first.items() if name not in experts}
        second = {name: weight for name, weight in second.items() if not _is_expert(name, files)}
        warn(
            f"left out {listed(experts, most=2)}: no LoRA is written for experts, which are parameters of "
            "their module",
        )
    if alone := sorted(first.keys() ^ second.keys()):
        where = "before" if alone[0] in first else "after"
        raise InputError(f"only {where} has {listed(alone, most=3)}; both must be states of one model")
    for name, weight in first.items():
        if weight.shape != second[name].shape:
            shapes = f"{weight.shape} before and {second[name].shape} after"
            raise InputError(f"{name} has shape {shapes}; both must be states of one model")
        kinds = {
            "an embedding": is_embedding(name),
            "an expert, a parameter of its module": _is_expert(name, files),
            "a convolution": weight.convolution,
        }
        for what in (what for what, holds in kinds.items() if holds):
            raise InputError(f"{name} is {what}, for which no LoRA is written; choose linear layers by name")
    return [(weight, second[name]) for name, weight in first.items()]


def _is_expert(name: str, file: bool) -> bool:
    """Whether it is a matrix of a tensor of experts in the model, also where a file holds them one by one."""
    return "[" in name or (file and ONE_EXPERT.search(name) is not None)


def _settings_of_files(layers: Iterable[str], source: Source) -> dict[str, list[str]]:
    """PEFT's settings that name these layers of a model of which there are only the files."""
    moved = [name for name in layers if name.rpartition(".")[2] in MOVED]
    try:
        _ = moved and weights(source, "all-experts")
    except InputError:  # no mixture of experts, where PEFT leaves these names alone
        moved = []
    settings = {"target_modules": [name for name in layers if name not in moved]}
    return settings | ({"target_parameters": [f"{name}.weight" for name in moved]} if moved else {})


def _change(old: Weight, new: Weight) -> tuple[Tensor, Tensor]:
    """The weight before, and what was added to it since, in at least float32."""
    before, after = old.load().detach(), new.load().detach()
    for name, matrix in ((f"{old.name} before", before), (f"{new.name} after", after)):
        check_finite(name, matrix)
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return before, after.to(before.device, dtype) - before.to(dtype)


@dataclass(frozen=True)
class _Part:
    """A layer's part of the LoRA; ``digest`` is of its weight before, empty where nothing changed."""

    layer: str
    b: Tensor
    a: Tensor
    norm: float
    lost: float
    digest: str


def _largest(pair: tuple[Weight, Weight], most: int | None, share: float) -> _Part:
    """B and A of the largest components, the norm of the whole, and the share of its energy left out."""
    before, change = _change(*pair)
    name, norm = pair[0].name, float(torch.linalg.norm(change.double()))
    if norm == 0:
        b, a = change.new_empty(len(change), 0), change.new_empty(0, change.shape[1])
        return _Part(name, b, a, 0.0, 0.0, "")

    def choose(values: Tensor) -> Tensor:
        energy = values.square().cumsum(0) / values.square().sum()
        enough = int((energy < share).sum()) + 1
        return torch.arange(min(most or enough, len(values)))

    (left, values, right), kept = some_components(change, choose)
    root, squares = values[kept].sqrt().float(), values.square()
    lost = float(squares[len(kept) :].sum() / squares.sum())
    return _Part(name, left * root, root[:, None] * right, norm, lost, digest_of(before))
