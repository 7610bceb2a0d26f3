"""How a task's answers are read from a model: through a head on its features, or from its next tokens.

A readout is asked with a batch, and says which of the choices it takes for every item: for a
classification the items are the examples and the choices its classes; for a language model the items are
the tokens to predict and the choices its vocabulary. The loss of all of them is the cross-entropy between
the choices, in nats per item.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.torch_tools import (
    Inputs as Inputs,
    call,
    evaluating,
    real_positions as real_positions,
    seeing_inputs,
    taking as taking,
    to_device as to_device,
)
from lora_lens._base.validate import instance
from lora_lens._base.wrappers import submodule
from lora_lens.spectrum.heads import classifier

POOLINGS = ("model", "mean", "last")
REMEDY = "give a batch as the model takes it"
FITTING = "a transform gives images the model's size and channels, see folder_task"


class HeadReadout(nn.Module):
    """A linear head on a model's features, see :func:`pooled_features`.

    ``forward(model, inputs, labels)`` gives (logits (batch, classes), labels (batch,)).
    """

    def __init__(self, head: nn.Linear, pooling: str) -> None:
        super().__init__()
        self.head, self.pooling = head, pooling

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = pooled_features(model, inputs, self.pooling)
        return self.head(features.to(self.head.weight.dtype)), labels


class OwnHead(nn.Module):
    """The model's own classifier, as it is: what the model gives for a batch, (batch, classes)."""

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(call(model, own_padding(model, inputs)))
        if logits.ndim != 2 or not logits.is_floating_point():
            raise InputError(
                f"{type(inner_model(model)).__name__} answers a batch of {len(labels)} with {logits.dtype} "
                f"of shape {tuple(logits.shape)}, and a task is read from logits, (batch, classes): let the "
                "model return what its head gives, without argmax"
            )
        return logits, labels


class LabelWords(nn.Module):
    """The likelihoods of some words as the continuation of a prompt.

    The logits are log P(word | prompt), (batch, words), summed over the word's tokens. Their softmax
    compares the words among themselves, as in pattern-exploiting training (Schick and Schuetze 2021,
    arXiv 2001.07676, section 3.1), so the loss does not care what else might follow the prompt.

    Args:
        words: the token ids of each word.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.words = [torch.tensor(word) for word in words]

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids, lengths = inputs["input_ids"], lengths_of(inputs)
        rows = torch.arange(len(ids), device=ids.device)
        if all(len(word) == 1 for word in self.words):  # one pass serves them all
            logits = next_token_logits(model, inputs, lengths[:, None] - 1)[:, 0].float().log_softmax(-1)
            return logits[:, torch.cat(self.words).to(ids.device)], labels
        found = []
        for word in self.words:
            word = word.to(ids.device)
            places = lengths[:, None] + torch.arange(len(word), device=ids.device)  # (batch, tokens)
            longer = nn.functional.pad(ids, (0, len(word)))
            longer[rows[:, None], places] = word
            mask = torch.arange(longer.shape[1], device=ids.device) < lengths[:, None] + len(word)
            whole = {"input_ids": longer, "attention_mask": mask.long()}
            logits = next_token_logits(model, whole, places - 1).float().log_softmax(-1)
            found.append(logits.gather(-1, word.expand(len(ids), -1)[..., None])[..., 0].sum(-1))
        return torch.stack(found, dim=-1), labels


class NextTokens(nn.Module):
    """Every token of a block but the first, predicted from those before it.

    ``forward`` gives (logits (batch * (tokens - 1), vocabulary), ids (batch * (tokens - 1),)).
    """

    def forward(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(call(model, inputs))[:, :-1]
        return logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten()


Readout = HeadReadout | OwnHead | LabelWords | NextTokens


class Batches(Protocol):
    """Examples: inputs by their numbers, and labels."""

    @property
    def labels(self) -> Tensor: ...

    def batch(self, rows: Tensor) -> Inputs: ...


def ask(readout: Readout, model: nn.Module, examples: Batches, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the readout says of some examples, by their numbers, on the model's device."""
    device = next(model.parameters()).device
    return readout(model, to_device(examples.batch(rows), device), examples.labels[rows].to(device))


def pooled_features(model: nn.Module, inputs: Inputs, pooling: str) -> Tensor:
    """One vector for each example, (batch, features).

    Args:
        pooling: "model" takes what the model's own classifier reads; "mean" the mean of the last hidden
            states over the tokens of each text, as sentence encoders do; "last" that of each text's last
            token.

    Raises:
        ValueError: the model has no classifier, or never calls it (model), or no body that gives hidden
            states (mean, last).
    """
    if pooling == "model":
        head = classifier(inner_model(model))
        with features_of(head) as features:
            call(model, inputs)
        if not features:
            raise InputError(_never_called(inner_model(model), head))
        if isinstance(inputs, Mapping) and features[0].ndim > 2:
            raise InputError(
                f"the classifier of {type(inner_model(model)).__name__} reads every token by itself, so it "
                'gives no features of a whole text; make the task with pooling="last", or "mean"'
            )
        return features[0]
    hidden = hidden_states(model, inputs)  # (batch, tokens, features)
    lengths = lengths_of(inputs)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden * real[..., None]).sum(1) / lengths[:, None]


def _never_called(model: nn.Module, head: nn.Module) -> str:
    """The words for a head that a model holds and does not run."""
    name = next((name for name, module in model.named_modules() if module is head), "head")
    return (
        f"{type(model).__name__} never calls its head {name!r} when it runs, so there are no features that "
        f"it reads; if another layer answers, remove {name!r} or set it to None; if the model uses its "
        "weight, let it call the layer"
    )


def hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states of a transformers model, (batch, tokens, features), without its head."""
    body = getattr(inner_model(model), "base_model", None)
    found = getattr(body(**inputs), "last_hidden_state", None) if isinstance(body, nn.Module) else None
    if found is None:
        raise InputError(
            f"{type(inner_model(model)).__name__} has no base_model that gives last_hidden_state, as "
            "transformers' models have; texts are read from such a model's hidden states"
        )
    return found


def next_token_logits(model: nn.Module, inputs: Mapping[str, Tensor], places: Tensor) -> Tensor:
    """What the model says of the token after each place: (batch, places, vocabulary).

    Where the model allows it, the vocabulary's logits are computed for these places only.

    Args:
        places: (batch, places), token numbers from 0.
    """
    rows = torch.arange(len(places), device=places.device)[:, None]
    if "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters:
        needed, place = places.unique(return_inverse=True)
        return logits_of(model(**inputs, logits_to_keep=needed))[rows, place]
    return logits_of(model(**inputs))[rows, places]


def logits_of(output: object) -> Tensor:
    """A model's logits: its output, what that has as logits, or the first tensor of a tuple.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    named = isinstance(output, Mapping) and "logits" in output
    found = output["logits"] if named else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)):
        found = next((part for part in output if isinstance(part, Tensor)), None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model gives a {type(output).__name__} without logits; a task that is read from the model's "
            "own answers needs a model with a head, such as AutoModelForCausalLM's"
        )
    return found


def lengths_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """How many tokens each text of a batch has, (batch,); padding is on the right."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.full((len(ids),), ids.shape[1], device=ids.device) if mask is None else mask.sum(1)


def own_padding(model: nn.Module, inputs: Inputs) -> Inputs:
    """The batch padded with the model's own token, by which some models find where each text ends."""
    config = getattr(inner_model(model), "config", None)
    pad = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else None, "pad_token_id", None
    )
    if pad is None or not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        return inputs
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)}


def require_taken(model: nn.Module, inputs: Inputs, name: str) -> None:
    """One pass over a few of a task's inputs, before work begins.

    Raises:
        ValueError: the model does not take them, with its own reason.
    """
    model = getattr(model, "_orig_mod", model)  # else torch.compile would compile for this batch's size
    device = next(model.parameters()).device
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return  # which of them the inputs are to be of, only the run's own precision decides
    if isinstance(inputs, Tensor):
        described = f"inputs of shape {tuple(inputs.shape[1:])}"
        inputs = inputs.to(dtypes.pop())
        remedy = FITTING
    else:
        described, remedy = "texts", "the model's own tokenizer and settings are needed"
    with evaluating(model), torch.no_grad(), taking(model, f"{name}, which holds {described}", remedy):
        call(model, own_padding(model, to_device(inputs, device)))


def require_batch(inputs: object) -> int:
    """How many examples a batch holds, or a mapping of keyword arguments; anything else is refused.

    Raises:
        TypeError, ValueError: it is none.
    """
    instance(inputs, (Tensor, Mapping), "inputs", "a batch or a mapping of keyword arguments")
    some = next(iter(inputs.values()), ()) if isinstance(inputs, Mapping) else inputs
    if (isinstance(some, Tensor) and some.ndim == 0) or not len(some):
        raise InputError("inputs hold no examples; give at least one")
    return len(some)


def inner_model(model: nn.Module) -> nn.Module:
    """The model without what PEFT wraps around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def features_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """A list whose only item is always the last input that ``head`` was given, (batch, features).

    It turns any classifier into a feature extractor without knowing how the model pools its tokens.
    """
    features: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[:] = inputs[:1]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield features
    finally:
        handle.remove()


def layer_inputs(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, Tensor]:
    """The last input of each layer that one pass in evaluation mode reaches."""
    given: dict[str, Tensor] = {}
    layers = {name: submodule(model, name) for name in names}
    with (
        seeing_inputs(layers, given.__setitem__),
        evaluating(model),
        torch.no_grad(),
        taking(model, "these inputs", REMEDY),
    ):
        call(model, inputs)
    return given
