"""What training did to a model's features of the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.torch_tools import call, evaluating
from lora_lens._base.validate import instance, sequence
from lora_lens._base.wrappers import named_modules
from lora_lens.spectrum.heads import classifier
from lora_lens.tasks.readouts import REMEDY, Inputs, require_batch, taking

CONSTANT = 1e-12  # of the features' norm: less around the mean is the rounding of that mean


@torch.no_grad()
def feature_change(
    before: nn.Module, after: nn.Module, inputs: Inputs, layers: Sequence[str] | None = None
) -> pd.DataFrame:
    """How far two models' features of one batch are apart: one row per layer.

    Columns: layer; cka, see :func:`cka`, which no rotation, scale or shift of the features
    changes; relative_change, ||F' - F||_F / ||F||_F, which all of them change (inf or NaN for zero
    features). All that a layer gives for one example is one row of F, (batch, features); CKA
    needs many examples, more than features if possible.

    Args:
        before: one state of a model, adapted or not, on the inputs' device; it runs in evaluation mode and
            is left as it was.
        after: another state of it, likewise.
        inputs: a batch as the models take it, or a mapping of keyword arguments.
        layers: modules by their names without PEFT, whose outputs are compared (of several outputs the
            first, of several calls the last); default the classifier's input, under its name.

    Raises:
        TypeError: ``before`` or ``after`` is no model, ``inputs`` no batch, or ``layers`` no names.
        ValueError: there are no inputs, or a model does not take them; it has no such layer or does not call
            it, what it gives is no batch or has another shape in the other model, or there is no classifier.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> before, after = (torch.nn.Sequential(torch.nn.Linear(4, 3)) for _ in range(2))
        >>> with torch.no_grad():  # features of twice the size: the same but for a scale
        ...     for new, old in zip(after.parameters(), before.parameters()):
        ...         _ = new.copy_(2 * old)
        >>> ll.forgetting.feature_change(before, after, torch.randn(20, 4), layers=["0"]).round(3)
          layer  cka  relative_change
        0     0  1.0              1.0
    """
    for name, model in (("before", before), ("after", after)):
        instance(model, nn.Module, name, "a model")
    batch = require_batch(inputs)
    if layers is not None:
        layers = _names(layers)
    old, new = (_features(model, inputs, layers) for model in (before, after))
    rows = []
    for (name, x), (_, y) in zip(old.items(), new.items(), strict=True):
        if x.shape != y.shape or x.ndim < 2 or len(x) != batch:
            raise InputError(
                f"the features of {name} have shape {tuple(x.shape)} before and {tuple(y.shape)} after for a "
                f"batch of {batch}: expected the same (batch, ...) from both"
            )
        rows.append({"layer": name, **difference(x.cpu().flatten(1), y.cpu().flatten(1))})
    return pd.DataFrame(rows)


def _names(layers: object) -> tuple[str, ...]:
    """The names of at least one module."""
    names = sequence(layers, "layers", "names of modules", one=str)
    for name in names:
        instance(name, str, "each of layers", "a module's name")
    if not names:
        raise InputError("layers is empty; name the modules to compare, or leave it out")
    return names


def difference(x: Tensor, y: Tensor) -> dict[str, float]:
    """cka and relative_change of two sets of features of the same examples, both (n, features)."""
    x, y = x.double(), y.double()
    return {
        "cka": cka(x, y),
        "relative_change": float(torch.linalg.norm(y - x) / torch.linalg.norm(x)),
    }


def cka(x: Tensor, y: Tensor) -> float:
    """The linear centred kernel alignment of two sets of features of the same n examples: in [0, 1].

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) with centred columns. Kornblith et al. 2019, "Similarity of
    neural network representations revisited", section 3. It is 1 for features that differ by an
    orthogonal transform, a scale and a shift; independent noise of p and q features scores about
    sqrt(p q / ((n + p)(n + q))), close to 0 only for many examples. NaN where features are constant.
    In float64, through the Gram matrices of the examples where there are fewer of them than features.

    Args:
        x, y: (n, p) and (n, q).

    Raises:
        ValueError: they are no matrices of as many rows.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(
            f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (n, p) and (n, q), "
            "one row for each of the same n examples"
        )
    x, y = x.double(), y.double()
    sizes = [torch.linalg.norm(z) for z in (x, y)]
    x, y = x - x.mean(0), y - y.mean(0)
    if any(torch.linalg.norm(z) <= CONSTANT * size for z, size in zip((x, y), sizes, strict=True)):
        return float("nan")
    if len(x) <= max(x.shape[1], y.shape[1]):
        # ||Y^T X||^2 = <X X^T, Y Y^T>, and ||X^T X|| = ||X X^T||
        x, y = x @ x.T, y @ y.T
        shared = (x * y).sum()
    else:
        shared = (y.T @ x).square().sum()
        x, y = x.T @ x, y.T @ y
    return float(shared / (torch.linalg.norm(x) * torch.linalg.norm(y)))


def _features(model: nn.Module, inputs: Inputs, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """By layer what one pass in evaluation mode gives there, (batch, ...)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(named_modules(inner))
    head = None
    if layers is None:
        head = classifier(inner, required=False)
        if head is None:
            raise InputError(
                f"{type(inner).__name__} has no linear classifier whose input could be compared; name the "
                "modules to compare with layers="
            )
        layers = [next(name for name, module in modules.items() if module is head)]
    if missing := [name for name in layers if name not in modules]:
        raise InputError(f"{type(inner).__name__} has no module {missing[0]!r}; layers= takes module names")
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple, output: object) -> None:
        value = given[0] if module is head else output
        found[name] = value if isinstance(value, Tensor) else value[0]

    with ExitStack() as during:
        for name in layers:
            during.enter_context(modules[name].register_forward_hook(partial(keep, name)))
        during.enter_context(evaluating(model))
        during.enter_context(taking(model, "these inputs", REMEDY))
        call(model, inputs)
    if silent := [name for name in layers if name not in found]:
        raise InputError(f"{type(inner).__name__} made its output without calling {silent[0]}")
    return {name: found[name] for name in layers}
