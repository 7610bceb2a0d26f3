"""What layers of a model are given on some data, as second moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lora_lens._base.errors import InputError
from lora_lens._base.torch_tools import call, evaluating, real_positions, seeing_inputs, taking, to_device
from lora_lens._base.wrappers import inner_model, submodule
from lora_lens.spectrum.metric import Metric, Moments, relative

LARGEST = 2**27  # entries of all moments that are held at a time; in float64 they take 1 GB
ROOM = 2**23  # of a block of inputs

REMEDY = "give the metric data of this model's own kind"


def in_groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of layers, as many at a time as their moments leave room for; ``sizes`` are their in_features."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size**2 > LARGEST:
            yield group
            group, held = [], 0
        group.append(name)
        held += size**2
    if group:
        yield group


def input_metrics(model: nn.Module, names: Sequence[str], metric: Metric) -> dict[str, tuple[Tensor, float]]:
    """By layer, C with a trace of in_features, (in, in), float64, and the share of the identity in it.

    Raises:
        ValueError: a layer's inputs cannot be observed, do not reach it, or are no metric.
    """
    layers = observable(model, names)
    found = {}
    of_data = _moments(model, layers, metric, metric.data)
    others = None if metric.relative_to is None else _moments(model, layers, metric, metric.relative_to)
    for name in names:
        moment, shrinkage = of_data.pop(name).shrunk(metric.shrinkage, name)
        if others is not None:
            moment = relative(moment, others.pop(name).shrunk(metric.shrinkage, name)[0], name)
        found[name] = moment, shrinkage
    return found


def observable(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named layers, all of which multiply each of their inputs by one matrix.

    Raises:
        ValueError: one is of another kind.
    """
    layers = {}
    for name in names:
        try:
            layer: nn.Module | None = submodule(model, name)
        except AttributeError:
            layer = None  # a part of a fused weight, or an expert of many
        plain = isinstance(layer, _ConvNd) and not layer.transposed
        if isinstance(layer, _ConvNd):
            plain &= layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if layer is None or not (plain or isinstance(layer, (nn.Linear, Conv1D))):
            what = "no layer of this model by itself" if layer is None else f"a {type(layer).__name__}"
            raise InputError(
                f"{name} is {what}, and a metric needs the inputs of an nn.Linear, a Conv1D or a plain "
                "convolution of a pretrained model; leave it out with targets="
            )
        layers[name] = layer
    return layers


def _moments(
    model: nn.Module, layers: Mapping[str, nn.Module], metric: Metric, data: object
) -> dict[str, Moments]:
    model = inner_model(model)
    device = next(model.parameters()).device
    found = {name: Moments() for name in layers}

    def see(name: str, x: Tensor) -> None:
        layer, moments = layers[name], found[name]
        x = x.detach()
        if isinstance(layer, _ConvNd):
            x = x if x.ndim == layer.weight.ndim else x[None]
            size = _unfolded(layer, x[:1]).numel()
            for part in x.split(max(ROOM // size, 1)):
                moments.add(_weighted(_unfolded(layer, part), None))
            return
        real = real_positions(batch)
        if real is not None and x.ndim == 2 and len(x) == real.numel():
            x = x.reshape(*real.shape, -1)  # a model that takes all texts' tokens as one sequence
        real = real_positions(batch, x)
        x = x[None, None] if x.ndim == 1 else x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        for rows in torch.arange(len(x), device=x.device).split(max(ROOM // x[0].numel(), 1)):
            moments.add(_weighted(x[rows], None if real is None else real[rows]))

    with (
        evaluating(model),
        torch.no_grad(),
        seeing_inputs(layers, see),
        taking(model, "these inputs", REMEDY),
    ):
        for given in metric.batches(data):
            batch = to_device(given, device)
            call(model, batch)
    return found


def _weighted(x: Tensor, real: Tensor | None) -> Tensor:
    """(examples, positions, in) in float64, over the root of how many positions of an example are real."""
    x = x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
    if real is None:
        return x / math.sqrt(x.shape[1])
    real = real.to(x.device)
    counts = real.sum(1)
    x = x.masked_fill(~real[..., None], 0) / counts.clamp_min(1).sqrt()[:, None, None]
    return x[counts > 0]


def _unfolded(layer: _ConvNd, x: Tensor) -> Tensor:
    """What a convolution multiplies by its weight as a matrix: (batch, places, channels * kernel)."""
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
    for axis, (size, step) in enumerate(zip(layer.kernel_size, layer.stride, strict=True), 2):
        x = x.unfold(axis, size, step)
    places = len(layer.kernel_size)
    found: Tensor = x.movedim(1, places + 1).flatten(places + 1).flatten(1, places)
    return found
