"""What training did to each weight, measured against the spectrum that it started from.

With W = U S V^T the pretrained weight and dW what training added, C = U^T dW V says between which
components the update acts: C[i, j] leads from the input direction of component j to the output
direction of component i. To first order in dW the diagonal of C changes singular values (stretch) and
the rest of it turns singular vectors (rotation; Stewart and Sun 1990, "Matrix perturbation theory"),
which Quercia et al. (arXiv 2602.03493) hold responsible for forgetting.

The first steps of a window move it by dB A + B dA, which always has one side in the window: only the
second order, dB dA, reaches a pair of components that both lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens.adapter import call, evaluating
from lora_lens.comparison import Side
from lora_lens.factorization import Factors, product_norm, product_svd, thin_svd
from lora_lens.features import Inputs
from lora_lens.injection import (
    ADAPTER,
    Start,
    attached,
    factor_matrix,
    is_dora,
    lora_layers,
    matrices_of,
    require_unmerged,
    trained_update,
)
from lora_lens.layers import block_and_kind, classifier, listed, weight_matrix
from lora_lens.spectral_metrics import effective_rank, stable_rank
from lora_lens.spectrum import Spectrum, SpectrumSet, factorize
from lora_lens.window import Placement, Window

BELONGS = 1e-2  # of the weight's norm; residuals in bfloat16 are off by 2e-3


def drift(adapted: nn.Module, spectra: SpectrumSet, *, window: Placement | None = None) -> pd.DataFrame:
    """One row per adapted layer: how far its weight went, and between which components.

    Columns: layer, block and kind as in :meth:`lora_lens.spectrum.SpectrumSet.table`; rank, the adapter's;

    - update, ||dW||_F, and relative, ||dW||_F / ||W||_F (inf or NaN for a zero weight);
    - effective_rank and stable_rank of dW, see :mod:`lora_lens.spectral_metrics`;
    - five shares of ||dW||_F^2 in [0, 1] that sum to 1, by the entries of C = U^T dW V (k, k): inside,
      both components are the window's; above, both have larger singular values than the window; below,
      both have smaller ones; mixed, the other pairs; outside, ||dW||^2 - ||C||^2, what leaves the span
      of U or of V, 0 for square weights. A random dW has n_left n_right / (out in) in each;
    - left_inside, ||U_w^T dW||^2 / ||dW||^2, and right_inside, ||dW V_w||^2 / ||dW||^2, in [0, 1]: what
      has its output, or its input, in the window, wherever the other side is;
    - diagonal, sum_i C[i, i]^2 / ||C||^2 in [0, 1]: 1 for a pure change of singular values, and
      sin(angle / 2)^2 where left (or right) vectors turn in planes by one angle.

    Above and below count from the window's first and last component. Components that a placement skips
    between them are neither, so a pair with one of them is mixed. An update of zero has 0 for both
    norms and both ranks, and NaN shares.

    dW comes from the adapter's factors, at a cost of O((out + in) r k + k r^2) per layer; dW and C are
    not formed. With DoRA dW is no product of factors, so it is formed, with rounding of about 1e-7 ||W||_F,
    and factorized. Modules that PEFT trains in full (modules_to_save) have no row.

    Args:
        adapted: from :func:`lora_lens.attach` or :func:`lora_lens.load`, trained or not.
        spectra: of the pretrained model, with all vectors.
        window: where inside, above and below are; default the components that each layer's adapter
            started from. Ordinary LoRA started from none: without a window its shares but outside and
            diagonal are NaN.

    Raises:
        ValueError: ``adapted`` is none of attach's, is merged, or holds NaN; the spectra are another
            model's or lack vectors; the window does not fit.
        KeyError: there is no spectrum of an adapted layer.
    """
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    rows = []
    for name, layer in lora_layers(peft_model).items():
        spectrum, start = spectra[name], record.starts.get(name)
        _require_start_of(spectrum, name, _start_rows(layer, start, _some_rows(spectrum)))
        components = None if start is None else start.components
        if window is not None:
            components = spectrum.components_of(window)
        row = _named(name) | {"rank": layer.r[ADAPTER]}
        rows.append(row | _measured(_trained(name, layer, start), spectrum, components))
    return pd.DataFrame(rows)


def drift_between(
    before: nn.Module | str | Path,
    after: nn.Module | str | Path,
    spectra: SpectrumSet,
    *,
    window: Placement | None = None,
) -> pd.DataFrame:
    """As :func:`drift`, without rank, for two models or files, such as before and after full fine-tuning.

    One row per spectrum. The update is the difference of the weights, formed and factorized.

    Args:
        before, after: models without adapters, or weight files.
        spectra: of ``before``, with all vectors.
        window: where inside, above and below are; without it those shares are NaN.

    Raises:
        ValueError: a weight is missing, has another shape or is not finite; the spectra are not of
            ``before`` or lack vectors; the window does not fit.
    """
    names = list(spectra)
    old, new = matrices_of(before, names), matrices_of(after, names)
    rows = []
    for name, spectrum in spectra.items():
        start, end = old[name]().detach().cpu(), new[name]().detach().cpu()
        if start.shape != end.shape:
            raise ValueError(
                f"{name} has shape {tuple(start.shape)} before and {tuple(end.shape)} after; "
                "only two states of one model compare"
            )
        _require_start_of(spectrum, name, start[_some_rows(spectrum)])
        update = _factorized(name, end.double() - start.double())
        components = None if window is None else spectrum.components_of(window)
        rows.append(_named(name) | _measured(update, spectrum, components))
    return pd.DataFrame(rows)


def turned(adapted: nn.Module, layer: str, spectrum: Spectrum, side: Side = "left") -> Tensor:
    """|cos| of the angles between one layer's singular vectors before and now: (k, k), float32, in [0, 1].

    Entry (i, j) is |<u_i, u'_j>|, for vectors u of the pretrained weight and u' of the weight with its
    adapter, by descending singular values: the identity where nothing turned or changed its order,
    about 1 / sqrt(dimension) everywhere for random bases. Vectors of nearly equal singular values turn
    freely within their plane. :func:`lora_lens.comparison.overlap_matrix` is the same by bands.

    Args:
        adapted: from :func:`lora_lens.attach`.
        layer: the name of an adapted layer.
        spectrum: of its pretrained weight, with all vectors.
        side: left (columns of U, outputs) or right (rows of V^T, inputs).

    Raises:
        ValueError: the layer is not adapted, ``side`` is another word, or as :func:`drift`.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    found = lora_layers(peft_model)
    if layer not in found:
        raise ValueError(f"{layer!r} is not adapted; these layers are: {listed(found)}")
    start = record.starts.get(layer)
    _require_start_of(spectrum, layer, _start_rows(found[layer], start, _some_rows(spectrum)))
    weight = _effective(found[layer])
    _require_finite(layer, weight)
    old, new = (_basis(s, side) for s in (spectrum, factorize(layer, weight)))
    return (old.T @ new).abs().clamp_max(1)


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
        before, after: two states of one model, adapted or not, on the inputs' device; they run in
            evaluation mode and are left as they were.
        inputs: a batch as the models take it, or a mapping of keyword arguments.
        layers: modules by their names without PEFT, whose outputs are compared (of several outputs the
            first, of several calls the last); default the classifier's input, under its name.

    Raises:
        ValueError: a model has no such layer or does not call it, what it gives is no batch or has
            another shape in the other model, or there is no classifier.
    """
    old, new = (_features(model, inputs, layers) for model in (before, after))
    batch = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    rows = []
    for (name, x), (_, y) in zip(old.items(), new.items(), strict=True):
        if x.shape != y.shape or x.ndim < 2 or len(x) != batch:
            raise ValueError(
                f"the features of {name} have shape {tuple(x.shape)} before and {tuple(y.shape)} after for a "
                f"batch of {batch}: expected the same (batch, ...) from both"
            )
        x, y = (f.to("cpu", torch.float64).flatten(1) for f in (x, y))
        change = torch.linalg.norm(y - x) / torch.linalg.norm(x)
        rows.append({"layer": name, "cka": cka(x, y), "relative_change": float(change)})
    return pd.DataFrame(rows)


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
        raise ValueError(
            f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (n, p) and (n, q), "
            "one row for each of the same n examples"
        )
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= max(x.shape[1], y.shape[1]):
        # ||Y^T X||^2 = <X X^T, Y Y^T>, and ||X^T X|| = ||X X^T||
        x, y = x @ x.T, y @ y.T
        shared = (x * y).sum()
    else:
        shared = (y.T @ x).square().sum()
        x, y = x.T @ x, y.T @ y
    return float(shared / (torch.linalg.norm(x) * torch.linalg.norm(y)))


def _measured(update: Factors, spectrum: Spectrum, components: Tensor | None) -> dict[str, float]:
    """The columns of :func:`drift` from the update's own factors, float64."""
    left, values, right = update
    u, v = (_basis(spectrum, side).double() for side in ("left", "right"))
    rows = u.T @ left * values  # (k, R); rows @ columns is C
    columns = right @ v  # (R, k)
    whole = values.square().sum()
    in_span = product_norm(rows, columns).square()
    diagonal = (rows * columns.T).sum(1).square().sum()
    measured = {
        "update": whole.sqrt(),
        "relative": whole.sqrt() / torch.linalg.norm(spectrum.singular_values),
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        **_shares(rows, columns, in_span, components),
        "outside": (whole - in_span).clamp_min(0),
    }
    if components is not None:
        measured["left_inside"] = rows[components].square().sum()
        measured["right_inside"] = (values[:, None] * columns[:, components]).square().sum()
    else:
        measured |= dict.fromkeys(("left_inside", "right_inside"), float("nan"))
    for key in ("inside", "above", "below", "mixed", "outside", "left_inside", "right_inside"):
        measured[key] = measured[key] / whole  # as tensors, where 0 / 0 is NaN
    return {key: float(value) for key, value in measured.items()} | {"diagonal": float(diagonal / in_span)}


def _shares(
    rows: Tensor, columns: Tensor, in_span: Tensor, components: Tensor | None
) -> dict[str, Tensor | float]:
    """inside, above, below and mixed parts of ||C||_F^2, C = rows @ columns, not yet divided."""
    if components is None:
        return dict.fromkeys(("inside", "above", "below", "mixed"), float("nan"))
    first, last = int(components[0]), int(components[-1])
    parts = {"inside": components, "above": slice(0, first), "below": slice(last + 1, None)}
    squares = {key: product_norm(rows[part], columns[:, part]).square() for key, part in parts.items()}
    return squares | {"mixed": (in_span - sum(squares.values())).clamp_min(0)}


def _trained(name: str, layer: LoraLayer, start: Start | None) -> Factors:
    """dW of a layer as its singular value decomposition in float64."""
    if is_dora(layer):  # DoRA: rows of a new length
        return _factorized(name, _effective(layer) - _start_rows(layer, start, slice(None)))
    b, a = trained_update(layer, start)
    _require_finite(name, b)
    _require_finite(name, a)
    return product_svd(b.double(), a.double())


def _factorized(name: str, update: Tensor) -> Factors:
    _require_finite(name, update)
    left, values, right = thin_svd(update)
    return left.double(), values, right.double()


def _effective(layer: LoraLayer) -> Tensor:
    """The weight with its adapter, (out_features, in_features), float64, on the CPU."""
    b, a = (factor_matrix(f).to("cpu", torch.float64) for f in (layer.lora_B, layer.lora_A))
    base = weight_matrix(layer.get_base_layer()).to("cpu", torch.float64)
    weight = torch.addmm(base, b, a, alpha=layer.scaling[ADAPTER])
    if is_dora(layer):
        lengths = layer.lora_magnitude_vector[ADAPTER].weight.detach().to("cpu", torch.float64)
        weight *= lengths.reshape(-1, 1) / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight


def _start_rows(layer: LoraLayer, start: Start | None, rows: slice) -> Tensor:
    """Rows of the pretrained weight, float64, from the residual and the factors at the start."""
    base = weight_matrix(layer.get_base_layer())[rows].to("cpu", torch.float64)
    if start is None:
        return base
    b, a = start.b[rows].to("cpu", torch.float64), start.a.to("cpu", torch.float64)
    return torch.addmm(base, b, a, alpha=layer.scaling[ADAPTER])


def _some_rows(spectrum: Spectrum) -> slice:
    return slice(None, None, max(spectrum.shape[0] // 64, 1))


def _require_start_of(spectrum: Spectrum, name: str, some: Tensor) -> None:
    """W V = U S, tried on a sample of rows: wrong for any other weight."""
    out, columns = spectrum.shape
    belongs = spectrum.k == min(spectrum.shape) and some.shape == (
        len(range(out)[_some_rows(spectrum)]),
        columns,
    )
    if belongs:
        left, right = (_basis(spectrum, side).double() for side in ("left", "right"))
        expected = left[_some_rows(spectrum)] * spectrum.singular_values
        error = torch.linalg.norm(some.double() @ right - expected)
        belongs = bool(error <= BELONGS * torch.linalg.norm(expected))
    if not belongs:
        raise ValueError(
            f"the spectrum of {spectrum.name}, shape {spectrum.shape}, is not that of {name}'s pretrained "
            "weight: take ll.spectra of the model before training, with the same targets"
        )


def _require_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"what was trained of {name} holds NaN or infinite values, so it has no update: the training "
            "diverged; train again at a smaller learning rate"
        )


def _basis(spectrum: Spectrum, side: Side) -> Tensor:
    """All singular vectors of one side as columns, (out_features or in_features, k), float32."""
    left, right = spectrum.vectors(Window(spectrum.k, start=0))
    return left if side == "left" else right.T


def _named(name: str) -> dict[str, object]:
    block, kind = block_and_kind(name)
    return {"layer": name, "block": block, "kind": kind}


def _features(model: nn.Module, inputs: Inputs, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """By layer what one pass in evaluation mode gives there, (batch, ...)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(inner.named_modules())
    if layers is None:
        head = classifier(inner)
        layers = [next(name for name, module in modules.items() if module is head)]
    else:
        head = None
    if missing := [name for name in layers if name not in modules]:
        raise ValueError(f"{type(inner).__name__} has no module {missing[0]!r}; layers= takes module names")
    with _kept({name: modules[name] for name in layers}, head) as found, evaluating(model):
        call(model, inputs)
    if silent := [name for name in layers if name not in found]:
        raise ValueError(f"{type(inner).__name__} made its output without calling {silent[0]}")
    return {name: found[name] for name in layers}


@contextmanager
def _kept(modules: Mapping[str, nn.Module], head: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """A mapping that each module's last output goes to, or of ``head`` its input."""
    found: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module):
        def keep(_module: nn.Module, given: tuple, output: object) -> None:
            value = given[0] if module is head else output
            found[name] = value if isinstance(value, Tensor) else value[0]

        return module.register_forward_hook(keep)

    handles = [hook(name, module) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
