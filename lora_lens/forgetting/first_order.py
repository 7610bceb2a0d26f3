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
is left out, disturbs about as much in every window. :func:`lora_lens.advise` does not choose by these
numbers: ``docs/measures.md`` says what they predicted on digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lens._base.errors import InputError
from lora_lens._base.naming import Targets
from lora_lens._base.torch_tools import call, evaluating, real_positions, seeing_inputs, to_device
from lora_lens._base.validate import instance, seed_number, sequence, whole_number
from lora_lens.adapters.low_rank import check_belongs, chosen_layers
from lora_lens.forgetting.weight_drift import require_spectra, spectrum_of
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.layer_weights import LINEAR, weight_matrix
from lora_lens.spectrum.placement import Components
from lora_lens.spectrum.quantized_layers import quantized_as
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet
from lora_lens.spectrum.window import Placement
from lora_lens.tasks.batches import batch_limit
from lora_lens.tasks.evaluation import example_features
from lora_lens.tasks.linear_probe import drawn, fitted_head
from lora_lens.tasks.readouts import HeadReadout, ask
from lora_lens.tasks.task import Examples, Task, require_examples

ROWS = 4096  # inputs of a layer in one product
WITH_GRADIENT = 32  # examples in a pass whose activations are kept


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
    ``examples`` training examples; then a gradient pass over them gives G. The module's docstring has both
    formulas. Of G and of C only what the windows need is kept: G v_i, u_i^T G and v_i^T C v_i for their
    components i, so beside the model it takes one layer's gradient at a time.

    Args:
        model: the pretrained model, not adapted; it is left as it was.
        task: what to learn; only its training examples are used.
        retain_examples: of the source, a few hundred; their labels play no part.
        windows: windows or other placements to compare.
        spectra: of this model with the windows' vectors, if you have them.
        targets: which linear layers would be adapted, see :func:`lora_lens.spectrum.target_layers`.
        examples: how many training examples are used; all if there are fewer.
        seed: of their draw.

    Returns:
        One row per window. Columns: position and start (None where the placement has none);
        learning, sum over layers of ||G A^T||_1 + ||B^T G||_1 (nats per unit of learning rate);
        disturbance, the root of the mean over layers of E||dW x||^2 / E||W x||^2 (a share of the layer's
        output per unit of learning rate); ratio, learning / disturbance, in nats: what the rate does not
        change. Larger is better. A layer that gives nothing on the source's examples, as one of zeros, has
        no such share and is left out of the mean; NaN where no layer is left.

    Raises:
        ValueError: no windows, ``examples`` below 1, a window does not fit, the spectra are another
            model's, a layer is no linear one, or the model has no classifier.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> from timm.models import VisionTransformer
        >>> images = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**images, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> promised = ll.forgetting.foresee(model, task, images, ll.windows(rank=2, count=3))
        >>> promised["position"].tolist(), bool(promised["disturbance"].is_monotonic_decreasing)
        ([0.0, 0.5, 1.0], True)
    """
    instance(model, nn.Module, "model", "a pretrained model")
    instance(task, Task, "task", "a task, such as from ll.tasks.folder_task or ll.tasks.text_task")
    windows = sequence(windows, "windows", "windows", one=Placement)
    if not windows:
        raise InputError("give at least one window to foresee, such as ll.windows(rank=8, count=5)")
    for window in windows:
        instance(window, Placement, "each of windows", "a window, such as those of ll.windows(rank=8)")
    require_examples(retain_examples, "retain_examples")
    if spectra is not None:
        require_spectra(spectra)
    examples = whole_number(examples, "examples", least=1)
    seed = seed_number(seed)
    layers = _linear_layers(model, targets, spectra)
    if spectra is None:
        spectra = compute_spectra(model, list(layers), vectors=windows, progress=False)
    for name, layer in layers.items():
        for window in windows:
            check_belongs(spectrum_of(spectra, name), window, layer)
    sums = {name: LayerSums(layer, spectra[name], windows) for name, layer in layers.items()}
    _pass_back(model, layers, sums, task, drawn(task.train, examples, seed))
    _pass_forward(model, layers, sums, retain_examples)
    answering = [one for one in sums.values() if one.output > 0]
    table = pd.DataFrame(
        {
            "position": [getattr(window, "position", None) for window in windows],
            "start": [getattr(window, "start", None) for window in windows],
            "learning": [sum(one.learning(window) for one in sums.values()) for window in windows],
            "disturbance": [
                np.sqrt(np.mean([one.change(window) / one.output for one in answering]))
                if answering
                else np.nan
                for window in windows
            ],
        }
    )
    return table.assign(ratio=table["learning"] / table["disturbance"])


class LayerSums:
    """What a gradient and the inputs of one layer come to along the windows' components.

    Attributes:
        output: E||W x||^2 of the inputs so far.

    Args:
        layer: a linear one.
        spectrum: of its weight, with the windows' vectors.
    """

    def __init__(self, layer: nn.Module, spectrum: Spectrum, windows: Sequence[Placement]) -> None:
        self._layer, self._spectrum = layer, spectrum
        self._components = torch.cat([spectrum.components_of(window) for window in windows]).unique()
        left, right = spectrum.vectors(Components(self._components.tolist()))
        self._left, self._right = left.T, right  # (c, out), (c, in)
        self._values = spectrum.singular_values[self._components]  # (c,)
        self._of_left = torch.zeros(right.shape, dtype=torch.float64)  # u_i^T G
        self._of_right = torch.zeros(left.T.shape, dtype=torch.float64)  # G v_i
        self._along = torch.zeros(len(self._components), dtype=torch.float64)  # sums of (v_i x)^2
        self._squares = self._outputs = 0.0
        self._count = 0

    def add_gradient(self, gradient: Tensor) -> None:
        """G or a part of it, (out_features, in_features)."""
        gradient = gradient.float()
        self._of_left += (self._left.to(gradient.device) @ gradient).cpu()
        self._of_right += (self._right.to(gradient.device) @ gradient.T).cpu()

    def add_inputs(self, inputs: Tensor) -> None:
        """Some x, (n, in_features)."""
        weight, right = weight_matrix(self._layer).float(), self._right.to(inputs.device)
        for x in inputs.float().split(ROWS):
            self._along += (x @ right.T).square().sum(0).cpu()
            self._squares += float(x.square().sum())
            self._outputs += float((x @ weight.T).square().sum())
        self._count += len(inputs)

    @property
    def output(self) -> float:
        return self._outputs / max(self._count, 1)

    def learning(self, window: Placement) -> float:
        """||G A^T||_1 + ||B^T G||_1: what the first sign step on both factors gains, per learning rate."""
        part = self._part(window)
        sizes = self._of_left[part].abs().sum(1) + self._of_right[part].abs().sum(1)
        return float((self._values[part].sqrt() * sizes).sum())

    def change(self, window: Placement) -> float:
        """E||(dB A + B dA) x||^2 for independent entries +1 or -1 of dB and dA."""
        part = self._part(window)
        of_b = self._left.shape[1] * (self._values[part] * self._along[part]).sum()
        of_a = self._squares * self._values[part].sum()
        return float(of_b + of_a) / max(self._count, 1)

    def _part(self, window: Placement) -> Tensor:
        return torch.searchsorted(self._components, self._spectrum.components_of(window))


def _linear_layers(
    model: nn.Module, targets: Targets, spectra: SpectrumSet | None
) -> Mapping[str, nn.Module]:
    layers = chosen_layers(model, targets, spectra)
    for name, layer in layers.items():
        if kind := quantized_as(layer):
            raise InputError(
                f"the weight of {name} is quantized ({kind}) and has no gradient, which foresee needs: "
                "give it the model in floating point"
            )
        if type(layer) not in LINEAR:
            raise InputError(
                f"{name} is a {type(layer).__name__}, and what a window promises is computed for linear "
                "layers only; leave it out of targets"
            )
    return layers


def _pass_back(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sums: Mapping[str, LayerSums],
    task: Task,
    examples: Examples,
) -> None:
    """Add up dLoss/dW of every layer, under a head that is fitted to the frozen features."""
    device = next(model.parameters()).device
    readout = task.new_readout(model, seed=0)
    if isinstance(readout, HeadReadout):
        readout.head = fitted_head(
            example_features(model, task, examples), examples.labels, len(task.classes)
        )
    readout.to(device)
    with evaluating(model), torch.no_grad():
        most = batch_limit(model, examples, partial(ask, readout, model, examples))
    with evaluating(model), torch.enable_grad(), _handing_over(model, layers, sums):
        for batch in examples.in_batches(most):
            for rows in batch.split(WITH_GRADIENT):
                loss = nn.functional.cross_entropy(*ask(readout, model, examples, rows))
                (loss * (len(rows) / len(examples))).backward()


@contextmanager
def _handing_over(
    model: nn.Module, layers: Mapping[str, nn.Module], sums: Mapping[str, LayerSums]
) -> Iterator[None]:
    """While it lasts, a pass back gives each layer's gradient to its sums, and drops it at once.

    A layer that the loss does not depend on, such as a pooler beside a mean, gets none.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def hand_over(weight: nn.Parameter) -> None:
        for name, layer in layers.items():
            if layer.weight is weight:
                sums[name].add_gradient(weight.grad.T if isinstance(layer, Conv1D) else weight.grad)
        weight.grad = None

    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        with ExitStack() as during:
            for weight in {id(layer.weight): layer.weight for layer in layers.values()}.values():
                weight.requires_grad_(True)
                during.enter_context(weight.register_post_accumulate_grad_hook(hand_over))
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _pass_forward(
    model: nn.Module, layers: Mapping[str, nn.Module], sums: Mapping[str, LayerSums], examples: Examples
) -> None:
    """Add up every layer's inputs over examples and positions."""

    def add(name: str, x: Tensor) -> None:
        real = real_positions(inputs, x)
        sums[name].add_inputs(x.flatten(0, -2) if real is None else x[real])

    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        # Before the hooks, which would see its example twice.
        most = batch_limit(model, examples, lambda rows: call(model, to_device(examples.batch(rows), device)))
    with seeing_inputs(layers, add), evaluating(model), torch.no_grad():
        for rows in examples.in_batches(most):
            inputs = to_device(examples.batch(rows), device)
            call(model, inputs)
