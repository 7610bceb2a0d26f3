"""What a window promises before any training: how fast it would learn, and what that would disturb.

The layer W = U S V^T starts a window w with B = U_w S_w^(1/2) (out, rank) and A = S_w^(1/2) V_w^T
(rank, in), as :func:`lora_lens.attach` does by default, and the first step changes its weight by
dB A + B dA. Two numbers follow without a step, both for steps of Adam, whose first one moves every entry
of dB and dA by the learning rate, whatever the gradient's size (Kingma and Ba 2015, section 2.1).

Learning. With G = dLoss/dW on the new task the factors' gradients are G A^T and B^T G. A step of the rate
lr against their signs lowers the loss, to first order, by lr (||G A^T||_1 + ||B^T G||_1), entrywise.

Disturbance. With x the layer's input on the source's examples and C = E[x x^T], entries of dB and dA that
are +lr or -lr, independently of each other and of x, change the layer's output by

    E||(dB A + B dA) x||^2 = lr^2 (out sum_w s_i v_i^T C v_i + tr(C) sum_w s_i):

E[dB^T dB] = lr^2 out I gives the first term, E[dA x x^T dA^T] = lr^2 ||x||^2 I the second, and the mixed
term vanishes. Real steps are neither independent nor one alone, and the product dB dA of many of them, which
is left out, disturbs about as much in every window. What the numbers are good for, in the embedded digits
sweep (nine windows, means of 3 seeds): at one rate the windows' disturbance and forgetting are in nearly the
same order (rank correlations of 0.7 to 0.9), and at low rates so are learning and accuracy (0.9). But the
ratio does not find the best compromise: from the rate 5e-3 on its correlation with accuracy - forgetting is
negative. So :func:`lora_lens.advise` shows these numbers and does not choose by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lens.adapter import call, check_belongs, chosen_layers, evaluating
from lora_lens.errors import InputError
from lora_lens.evaluation import example_features
from lora_lens.layers import LINEAR, Targets, weight_matrix
from lora_lens.probe import drawn, fitted_head
from lora_lens.readouts import HeadReadout, Inputs, ask, real_positions, to_device
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum import spectra as compute_spectra
from lora_lens.tasks import Examples, Task
from lora_lens.window import Placement


def foresee(
    model: nn.Module,
    task: Task,
    retain_examples: Examples,
    windows: Sequence[Placement],
    *,
    spectra: SpectrumSet | None = None,
    targets: Targets = None,
    examples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """How fast each window would start to learn, and how much that would disturb: no step is taken.

    The new task's head, where it has one, is a logistic regression on the model's frozen features of
    ``examples`` training examples; then a gradient pass over them gives G. See the module's text for both
    formulas.

    Args:
        model: the pretrained model, not adapted; it is left as it was.
        task: what to learn; only its training examples are used.
        retain_examples: of the source, a few hundred; their labels play no part.
        windows: windows or other placements to compare.
        spectra: of this model with the windows' vectors, if they are at hand.
        targets: which linear layers would be adapted, see :func:`lora_lens.layers.target_layers`.
        examples: how many training examples, drawn with ``seed``; all if there are fewer.

    Returns:
        One row per window. Columns: position and start (None where the placement has none);
        learning, sum over layers of ||G A^T||_1 + ||B^T G||_1 (nats per unit of learning rate);
        disturbance, the root of the mean over layers of E||dW x||^2 / E||W x||^2 (a share of the layer's
        output per unit of learning rate); ratio, learning / disturbance, in nats: what the rate does not
        change. Larger is better.

    Raises:
        ValueError: no windows, ``examples`` below 1, a window does not fit, the spectra are another
            model's, a layer is no linear one, or the model has no classifier.
    """
    windows = list(windows)
    if not windows:
        raise InputError("give at least one window to foresee, such as ll.windows(rank=8, count=5)")
    if examples < 1:
        raise InputError(f"examples must be at least 1, not {examples!r}")
    layers = _linear_layers(model, targets, spectra)
    if spectra is None:
        spectra = compute_spectra(model, list(layers), vectors=windows, progress=False)
    for name, layer in layers.items():
        for window in windows:
            check_belongs(spectra[name], window, layer)
    gradients = _gradients(model, layers, task, drawn(task.train, examples, seed))
    moments = _second_moments(model, layers, retain_examples)
    rows = []
    for window in windows:
        learning = disturbed = 0.0
        for name, layer in layers.items():
            learning += first_gain(spectra[name], window, gradients[name])
            change, output = expected_change(spectra[name], window, moments[name], weight_matrix(layer))
            disturbed += change / output / len(layers)
        row = {"position": getattr(window, "position", None), "start": getattr(window, "start", None)}
        disturbance = disturbed**0.5
        row |= {"learning": learning, "disturbance": disturbance, "ratio": learning / disturbance}
        rows.append(row)
    return pd.DataFrame(rows)


def first_gain(spectrum: Spectrum, window: Placement, gradient: Tensor) -> float:
    """||G A^T||_1 + ||B^T G||_1: what the first sign step on both factors gains, per unit of learning rate.

    Args:
        gradient: G, (out_features, in_features), of the loss by the weight.
    """
    b, a = _factors(spectrum, window)
    gradient = gradient.double()
    return float((gradient @ a.T).abs().sum() + (b.T @ gradient).abs().sum())


def expected_change(
    spectrum: Spectrum, window: Placement, moment: Tensor, weight: Tensor
) -> tuple[float, float]:
    """(E||(dB A + B dA) x||^2 for independent entries +1 or -1 of dB and dA, E||W x||^2).

    Args:
        moment: C = E[x x^T], (in_features, in_features), of the layer's inputs.
        weight: W, (out_features, in_features).
    """
    b, a = _factors(spectrum, window)
    moment, weight = moment.double(), weight.double()
    of_b = len(b) * ((a @ moment) * a).sum()
    of_a = moment.trace() * b.square().sum()
    return float(of_b + of_a), float(((weight @ moment) * weight).sum())


def _factors(spectrum: Spectrum, window: Placement) -> tuple[Tensor, Tensor]:
    left, right = spectrum.vectors(window)
    roots = spectrum.singular_values[window.select(spectrum.singular_values, spectrum.name)].sqrt()
    return left.double() * roots, roots[:, None] * right.double()


def _linear_layers(
    model: nn.Module, targets: Targets, spectra: SpectrumSet | None
) -> Mapping[str, nn.Module]:
    layers = chosen_layers(model, targets, spectra)
    for name, layer in layers.items():
        if type(layer) not in LINEAR:
            raise InputError(
                f"{name} is a {type(layer).__name__}, and what a window promises is computed for linear "
                "layers only; leave it out of targets"
            )
    return layers


def _gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], task: Task, examples: Examples
) -> dict[str, Tensor]:
    """dLoss/dW of every layer, (out, in), under a head that is fitted to the frozen features."""
    device = next(model.parameters()).device
    readout = task.new_readout(model, seed=0)
    if isinstance(readout, HeadReadout):
        readout.head = fitted_head(
            example_features(model, task, examples), examples.labels, len(task.classes)
        )
    readout.to(device)
    weights = [layer.weight for layer in layers.values()]
    required = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    sums = [torch.zeros_like(weight) for weight in weights]
    try:
        with evaluating(model), torch.enable_grad():
            for rows in examples.in_batches():
                loss = nn.functional.cross_entropy(*ask(readout, model, examples, rows))
                share = len(rows) / len(examples)
                # A layer that the loss does not depend on, such as a pooler beside a mean, has none.
                found = torch.autograd.grad(share * loss, weights, allow_unused=True)
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        total += gradient
    finally:
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)
    pairs = zip(layers.items(), sums, strict=True)
    return {name: (g.T if isinstance(layer, Conv1D) else g).cpu() for (name, layer), g in pairs}


def _second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], examples: Examples
) -> dict[str, Tensor]:
    """C = E[x x^T] over examples and positions of every layer's inputs, (in, in)."""
    sums: dict[str, list[Tensor | int]] = {}
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for rows in examples.in_batches():
            inputs = to_device(examples.batch(rows), device)
            with _watching(layers, sums, inputs):
                call(model, inputs)
    return {name: (total / count).cpu() for name, (total, count) in sums.items()}


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], sums: dict[str, list[Tensor | int]], inputs: Inputs
) -> Iterator[None]:
    def watch(name: str, x: Tensor) -> None:
        real = real_positions(inputs, x)
        x = (x.flatten(0, -2) if real is None else x[real]).double()
        total, count = sums.get(name, (0, 0))
        sums[name] = [total + x.T @ x, count + len(x)]

    handles = [
        layer.register_forward_pre_hook(lambda _module, given, name=name: watch(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
