"""Which layers of a model are its head: what turns features into answers, and is new for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_lens._base.errors import InputError
from lora_lens.spectrum.patterns import NAMES, NEW_HEADS


def classifier(model: nn.Module, required: bool = True) -> nn.Linear | None:
    """The linear layer that turns a model's features into its logits.

    Asks timm's ``get_classifier`` or transformers' ``get_output_embeddings``, else takes the usual attribute
    (``head``, ``heads``, ``classifier``, ``score``, ``fc``), of several layers in it the last one, or the
    last layer outside the base model of a transformers model for a task.

    Raises:
        InputError: ``required`` and the model has none.
    """
    named = [module for module in (getattr(model, name, None) for name in NAMES) if module is not None]
    for module in (*_asked(model), *named):
        if isinstance(module, nn.Linear):
            return module
    # In transformers' models without a task a "head" pools, and is pretrained.
    foreign = () if isinstance(model, PreTrainedModel) else named
    within = [list(module.modules()) for module in foreign if isinstance(module, nn.Module)]
    for inside in ([*_new_layers(model).values()], *within):
        linear = [module for module in inside if isinstance(module, nn.Linear)]
        if linear:
            return linear[-1]
    if required:
        raise InputError(
            f"{type(model).__name__} has no linear classifier: expected get_classifier() as in timm, "
            "a transformers model with a head, or an nn.Linear in head, heads, classifier, score or fc"
        )
    return None


def head_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that no window is put into unless they are named: the classifier, and what is new around it.

    These are what the model says its classifiers or output embeddings are (distilled models have two), in
    transformers' models for classification and the like every layer outside the base model, and otherwise
    :func:`classifier`.
    """
    found = {module for part in _asked(model) for module in part.modules() if _is_layer(module)}
    found |= set(_new_layers(model).values())
    # Language models in parts have one for each part, which the whole does not name.
    found |= {m for n, m in model.named_modules() if n.rpartition(".")[2] == "lm_head" and _is_layer(m)}
    last = classifier(model, required=False)
    return found | ({last} if last is not None else set())


def _asked(model: nn.Module) -> Iterator[nn.Module]:
    """What timm's or transformers' model says that its head is."""
    for name in ("get_classifier", "get_output_embeddings"):
        ask = getattr(model, name, None)
        answer = ask() if callable(ask) else None
        if isinstance(answer, Mapping):
            answer = tuple(answer.values())
        parts = answer if isinstance(answer, (tuple, list)) else [answer]
        yield from (part for part in parts if isinstance(part, nn.Module))


def _new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers outside the base model of a transformers model whose head is made for the user's task."""
    kinds = (kind.__name__ for kind in type(model).__mro__)
    if not isinstance(model, PreTrainedModel) or not any(map(NEW_HEADS.search, kinds)):
        return {}
    base = model.base_model
    if base is model:
        return {}
    inside = {id(module) for module in base.modules()}
    return {n: m for n, m in model.named_modules() if _is_layer(m) and id(m) not in inside}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, _ConvNd))
