"""How exact an adapted model is: each weight at its start, and the function as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_lens._base import validate
from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind
from lora_lens._base.precision import as_double
from lora_lens._base.torch_tools import call, evaluating
from lora_lens.adapters.adapted_share import Summary, coverage
from lora_lens.adapters.injection import attached, lora_layers, require_unmerged
from lora_lens.adapters.peft_names import ADAPTER
from lora_lens.adapters.uncalled import noting_uncalled
from lora_lens.spectrum.layer_weights import weight_of
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.tasks.readouts import REMEDY, require_batch, taking


def summary(adapted: nn.Module) -> Summary:
    """Which layers are adapted, how exactly, and what share of the model they are.

    Args:
        adapted: from :func:`attach`, trained or not.

    Returns:
        One row per layer, and of experts in one tensor one per expert. Columns: layer, kind, rank, first and
        last (the lowest and highest component, counted from 0; missing for ordinary LoRA, PEFT's own starts
        and windows in a metric), energy (the share of ||W||_F^2 that these components hold, in [0, 1]; NaN
        where the adapter took its start from the weight, but not from components of its plain spectrum),
        scaling, base ("residual" or "offset", see :class:`Variant`; missing for ordinary LoRA), base_dtype
        (of a quantized weight its class), adapter_dtype, and start_error: the relative error of the weight at
        the start, ||effective weight - W||_F / ||W||_F with the factors as attached; NaN if there is a
        residual and the pretrained weight was not kept (inplace=True).

        Printed, the table also says what share of the model's matrices is adapted, and why the others are
        not: see :func:`lora_lens.adapters.coverage`, which is its ``coverage``.

    Raises:
        ValueError: ``adapted`` does not come from :func:`attach`, or is merged.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> ll.summary(ll.attach(model, ll.Window.middle(2)))[["layer", "rank", "first", "last", "scaling"]]
          layer  rank  first  last  scaling
        0     0     2      2     3      1.0
        1     2     2      1     2      1.0
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    rows = []
    for name, layer in lora_layers(peft_model).items():
        start, base = record.starts.get(name), layer.get_base_layer()
        components = start.components.tolist() if start else []
        rows.append(
            {
                "layer": name,
                "kind": block_and_kind(name)[1],
                "rank": layer.r[ADAPTER],
                "first": components[0] if components else None,
                "last": components[-1] if components else None,
                "energy": 0.0 if start is None else start.energy(layer),
                "scaling": float(layer.scaling[ADAPTER]),
                "base": None if start is None else start.form,
                "base_dtype": quantized_as(base) or str(weight_of(base).dtype).removeprefix("torch."),
                "adapter_dtype": str(layer.lora_A[ADAPTER].weight.dtype).removeprefix("torch."),
                "start_error": 0.0 if start is None else start.error(layer),
            }
        )
    table = Summary(rows)
    table.coverage = coverage(peft_model)
    return table


@torch.inference_mode()
def function_error(adapted: nn.Module, model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> float:
    """The largest output difference between two models, relative to the largest output.

    max |f_adapted(x) - f(x)| / max |f(x)| over a batch; what :func:`attach`
    promises to keep at the rounding level of the base's dtype.

    Args:
        adapted: the adapted model, on the device of the inputs.
        model: the pretrained model, on the same device.
        inputs: a batch, or a mapping of keyword arguments such as a tokenizer gives. Of outputs with
            several tensors the first counts, which is the logits where the model has them. Outputs
            at positions that an ``attention_mask`` among the inputs masks are left out.

    Returns:
        A share of the largest output; 0 for equal outputs, infinite where ``model`` gives nothing but zeros.

    Raises:
        ValueError: the models do not take the inputs, or there are none; the outputs are no tensors, or of
            different shapes.
        TypeError: ``adapted`` or ``model`` is no model, or the inputs are of another type.

    Warns:
        UserWarning: adapted layers that were not called although the module that holds them ran.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> ll.function_error(ll.attach(model, ll.Window.first(2)), model, torch.randn(5, 8)) < 1e-5
        True
    """
    for model_name, each in (("adapted", adapted), ("model", model)):
        validate.instance(each, nn.Module, model_name, "a model")
    require_batch(inputs)
    with evaluating(adapted), evaluating(model), noting_uncalled(adapted):
        reference, now = (_first_output(m, inputs) for m in (model, adapted))
    if reference.shape != now.shape:
        raise InputError(
            f"the outputs of the two models have the shapes {tuple(now.shape)} and {tuple(reference.shape)}, "
            "so they are no two states of one model"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None and reference.shape[:-1] == mask.shape:
        mask = mask.bool().to(reference.device)
        reference, now = reference[mask], now[mask]
    difference, largest = float((now - reference).abs().max()), float(reference.abs().max())
    return difference / largest if largest else difference and float("inf")


def _first_output(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    with taking(model, "these inputs", REMEDY):
        output = call(model, inputs)
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        several = output.values() if isinstance(output, Mapping) else output
        first = next(iter(several), None) if isinstance(several, Iterable) else output
        output = first if logits is None else logits
    if not isinstance(output, Tensor):
        raise InputError(
            f"the first output of {type(model).__name__} is a {type(output).__name__}, no tensor"
        )
    return as_double(output)
