"""Adapters for others: an ordinary LoRA for anybody's PEFT, or the residual base and its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import cast

import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_lens._base.errors import InputError
from lora_lens._base.hashing import digest_of
from lora_lens._base.naming import listed
from lora_lens._base.warning import warn
from lora_lens._base.wrappers import submodule, unwrapped
from lora_lens.adapters.adapter_files import FORMAT, write_adapter, write_record, write_tensors
from lora_lens.adapters.copying import copied
from lora_lens.adapters.injection import (
    adapter_state,
    attached,
    base_of,
    buffers_by_name,
    lora_config,
    lora_layers,
    moved_buffers,
    planned_layers,
    require_unmerged,
    stacked_state,
    whole_modules,
    without_peft,
)
from lora_lens.adapters.model_card import Score, TrainedRun, scores_of, write_card
from lora_lens.adapters.peft_names import ADAPTER, PREFIX, lies_in, rank_settings
from lora_lens.adapters.plain_peft import for_plain_peft
from lora_lens.adapters.replacing import BASE_AND_ADAPTER, BUFFERS, replaced, write_about
from lora_lens.adapters.saving import weight_digests
from lora_lens.adapters.stacks import StackedLayer
from lora_lens.adapters.start import trained_update
from lora_lens.spectrum.layer_weights import set_weight_matrix, weight_of
from lora_lens.spectrum.refusals import unchangeable
from lora_lens.spectrum.stacks import stack_name
from lora_lens.spectrum.svd import product_norm, product_svd
from lora_lens.spectrum.window import validate_rank
from lora_lens.tasks.task import Task


def export(
    adapted: nn.Module,
    folder: str | Path,
    rank: int | None = None,
    *,
    run: TrainedRun | None = None,
    task: Task | None = None,
    retain: Task | None = None,
) -> pd.DataFrame:
    """Write an ordinary LoRA (or DoRA) for the unchanged pretrained model; PEFT alone can load it.

    The trained function is W - scaling B_0 A_0 + scaling B A. Seen from W the update has rank 2r:
    scaling (B A - B_0 A_0) = scaling [B - B_0, B_0] [A; A - A_0], and rank r if one of the factors
    was not trained. A smaller ``rank`` keeps the largest singular components of each update. README.md is
    a card in the hub's format: what was trained, and with ``run`` what it learned and forgot (at its last
    step, at full rank); :func:`lora_lens.adapters.push_to_hub` uploads both.

    Args:
        adapted: from :func:`lora_lens.attach`.
        folder: as for :func:`save`.
        rank: the largest rank to write, at least 1; default None, the exact update.
        run: what :func:`lora_lens.finetune` returned, for the card.
        task: the task that it learned, for its name.
        retain: the task that was retained, likewise.

    Returns:
        One row per layer: layer, rank (as written), update (Frobenius norm of the whole update),
        lost (share of its squared Frobenius norm that truncation left out, in [0, 1]).

    Raises:
        ValueError: ``adapted`` does not come from :func:`lora_lens.attach`, is merged or holds NaN; or as
            :func:`save`.

    Warns:
        UserWarning: training changed buffers, such as batch norms' statistics: an adapter has no place
            for them, so only :func:`load` restores them, and PEFT does not.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> adapted = ll.attach(model, ll.Window.first(2))
        >>> with torch.no_grad():  # in place of training
        ...     _ = adapted.get_parameter("base_model.model.0.lora_B.default.weight").mul_(1.1)
        >>> with TemporaryDirectory() as folder:
        ...     written = ll.export(adapted, folder, rank=1)
        >>> written["rank"].tolist(), (written["lost"] > 0).tolist()  # the second layer was not trained
        ([1, 1], [True, False])
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    layers = lora_layers(peft_model).items()
    updates = {name: trained_update(layer, record.starts.get(name)) for name, layer in layers}
    if run is None:
        return write_updates(adapted, updates, folder, rank, {}, [])
    scores, used = scores_of(run, task, retain), run.config
    training = {"learning rate": used.lr, "steps": used.steps, "batch size": used.batch_size}
    return write_updates(adapted, updates, folder, rank, training, scores)


def write_updates(
    adapted: nn.Module,
    updates: Mapping[str, tuple[Tensor, Tensor]],
    folder: str | Path,
    rank: int | None,
    training: Mapping[str, object],
    scores: Sequence[Score],
) -> pd.DataFrame:
    """As :func:`export`, with other updates than those trained: factors (out, R) and (R, in) by layer."""
    most = None if rank is None else validate_rank(rank)
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    state, ranks, rows = adapter_state(peft_model), {}, []
    stacked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in lora_layers(peft_model).items():
        b, a, norm, lost = _truncated(*updates[name], most)
        if not torch.isfinite(norm):
            raise InputError(f"the adapter of {name} holds NaN or infinite values: the training diverged")
        rows.append({"layer": name, "rank": len(a), "update": float(norm), "lost": lost})
        if isinstance(layer, StackedLayer):
            stacked.setdefault(stack_name(name), []).append((b, a))
            continue
        ranks[name] = len(a)
        shapes = [weight_of(factor[ADAPTER]).shape for factor in (layer.lora_B, layer.lora_A)]
        state[f"{PREFIX}{name}.lora_B.weight"] = b.reshape(len(b), -1, *shapes[0][2:])
        state[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(len(a), *shapes[1][1:])
    ranks |= {name: max(len(a) for _, a in factors) for name, factors in stacked.items()}
    state |= stacked_state(peft_model, stacked)
    if moved := moved_buffers(peft_model, record):
        warn(
            f"training moved {listed(moved, most=2)}, which an adapter cannot carry: with plain PEFT the "
            "function differs; use merge_and_unload to keep it all, or train with the norms in eval mode",
        )
    old = lora_config(peft_model)
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
    digests = weight_digests(peft_model, record)
    digests = {name: digest for name, digest in digests.items() if not lies_in(name, in_full)}
    with replaced(folder, "adapter") as new:
        write_adapter(new, config, state)
        if moved:
            write_tensors(new / BUFFERS, moved)
        write_card(new, peft_model, ranks, training, scores)
        write_record(new, "adapter", record, digests)
    return pd.DataFrame(rows)


def export_residual(adapted: nn.Module, folder: str | Path) -> None:
    """Write the residual model and the adapter as it was before training, for trainers that need both.

    ``folder/base`` holds the residual model: of a transformers model with its configuration, for
    ``from_pretrained``; of any other model its state in model.safetensors. ``folder/adapter`` holds
    the window's factors as an ordinary PEFT adapter: load it trainable. To train over an 8- or 4-bit
    base, load ``folder/base`` with that quantization: then only the residual is rounded, as in
    QPiSSA (Meng et al. 2024).

    Args:
        adapted: from :func:`lora_lens.attach` with a window, in either form; what was trained since is left
            out.
        folder: as for :func:`save`.

    Raises:
        ValueError: there is no residual, as under ordinary LoRA, or for weights that are quantized or shared;
            or as :func:`save`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> with TemporaryDirectory() as folder:
        ...     ll.export_residual(ll.attach(model, ll.Window.first(2)), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter', 'base', 'lora_lens.json']
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    if not record.starts:
        raise InputError(f"{record.method} has no residual base: use export, or PEFT's save_pretrained")
    bases = {f"{n}.base_layer": layer.get_base_layer() for n, layer in planned_layers(peft_model).items()}
    for name, why in unchangeable(base_of(peft_model), bases).items():
        raise InputError(f"{name.removesuffix('.base_layer')} {why}, so it has no residual; use export")
    state, digests, residuals = adapter_state(peft_model), {}, {}
    layers = lora_layers(peft_model)
    stacked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, start in record.starts.items():
        layer = layers[name]
        b, a = start.taken(layer)
        if isinstance(layer, StackedLayer):
            stacked.setdefault(stack_name(name), []).append((b, a))
        for key, factor in () if isinstance(layer, StackedLayer) else (("B", b), ("A", a)):
            like = getattr(layer, f"lora_{key}")[ADAPTER].weight
            state[f"{PREFIX}{name}.lora_{key}.weight"] = factor.reshape(like.shape)
        residual = residuals[name] = start.residual(layer)
        digests[name] = digest_of(residual)
        if record.variant.dora:
            key = f"{PREFIX}{name}.lora_magnitude_vector"
            whole = torch.addmm(residual.float(), b.float(), a.float(), alpha=layer.scaling[ADAPTER])
            state[key] = torch.linalg.norm(whole, dim=1).reshape(state[key].shape).to(state[key].dtype)
    state |= stacked_state(peft_model, stacked)
    for name, module in whole_modules(peft_model).items():
        untrained = module.original_module.state_dict()
        state |= {f"{PREFIX}{name}.{unwrapped(key)}": tensor for key, tensor in untrained.items()}

    # Modules of its own around the same tensors, because taking the adapter off changes modules.
    tensors = {id(t): t for t in [*peft_model.parameters(), *peft_model.buffers()]}
    now = buffers_by_name(peft_model)
    before = {id(now[name]): buffer for name, buffer in record.buffers.items() if name in now}
    base = without_peft(cast(PeftModel, copied(peft_model, tensors | before)))
    for name, start in record.starts.items():
        if not start.changes_base:
            plain = submodule(base, name)
            plain.weight = nn.Parameter(torch.empty_like(weight_of(plain)), requires_grad=False)
            set_weight_matrix(plain, residuals[name])
    with replaced(folder, BASE_AND_ADAPTER) as new:
        (new / "base").mkdir()
        (new / "adapter").mkdir()
        _write_base(new / "base", base)
        write_adapter(new / "adapter", lora_config(peft_model), state)
        write_record(new / "adapter", "adapter", record, digests)
        write_about(new, {"format": FORMAT, "kind": BASE_AND_ADAPTER})


def _write_base(folder: Path, base: nn.Module) -> None:
    """A whole model, without what wraps its blocks; memory is shared only where reading ties it again."""
    state = {unwrapped(key): tensor.detach() for key, tensor in base.state_dict().items()}
    if isinstance(base, PreTrainedModel):
        ties = base.get_expanded_tied_weights_keys(all_submodels=True)  # by its config
        tied = {unwrapped(key) for key in [*ties, *ties.values()]}
        base.save_pretrained(folder, state_dict=_own_memory(state, but=tied))
    elif callable(save_pretrained := getattr(base, "save_pretrained", None)):
        save_pretrained(folder)
    else:
        write_tensors(folder / "model.safetensors", _without_aliases(state))


def _own_memory(state: Mapping[str, Tensor], but: Set[str]) -> dict[str, Tensor]:
    seen: set[int] = set()
    own = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if place in seen and key not in but else tensor
        seen.add(place)
    return own


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name for each tensor, as ``safetensors.torch.load_model`` expects it for tied weights."""
    first: dict[tuple[object, ...], str] = {}
    for key, tensor in state.items():
        first.setdefault((tensor.data_ptr() or key, tensor.shape, tensor.stride(), tensor.dtype), key)
    return {key: state[key] for key in first.values()}


def _truncated(b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """The factors of at most ``rank``, the norm of the whole product, and the share of it left out."""
    norm = product_norm(b, a)
    if rank is None or rank >= len(a) or not torch.isfinite(norm):
        return b, a, norm, 0.0
    left, values, right = product_svd(b.double(), a.double())
    root, squares = values[:rank].sqrt(), values.square()
    lost = float(squares[rank:].sum() / squares.sum()) if squares.sum() > 0 else 0.0
    return (left[:, :rank] * root).to(b.dtype), (root[:, None] * right[:rank]).to(a.dtype), norm, lost
