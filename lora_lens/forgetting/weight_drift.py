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

import copy
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lens._base.errors import InputError
from lora_lens._base.naming import block_and_kind, listed
from lora_lens._base.validate import instance
from lora_lens.adapters.injection import (
    ADAPTER,
    attached,
    lora_layers,
    require_unadapted,
    require_unmerged,
)
from lora_lens.adapters.pretrained import matrices_of
from lora_lens.adapters.start import Start, base_rows, effective_weight, is_dora, trained_update
from lora_lens.spectrum.comparison import Side
from lora_lens.spectrum.measures import effective_rank, stable_rank
from lora_lens.spectrum.spectrum import Spectrum, SpectrumSet, require_plain
from lora_lens.spectrum.svd import Factors, product_norm, product_svd, thin_svd
from lora_lens.spectrum.window import Placement, Window

BELONGS = 1e-2  # of the weight's norm; residuals in bfloat16 are off by 2e-3


def drift(adapted: nn.Module, spectra: SpectrumSet, *, window: Placement | None = None) -> pd.DataFrame:
    """One row per adapted layer: how far its weight moved, and between which components.

    Columns: layer, block and kind as in :meth:`lora_lens.spectrum.SpectrumSet.table`; rank, the adapter's;

    - update, ||dW||_F, norm, ||W||_F, and relative, ||dW||_F / ||W||_F (inf or NaN for a zero weight);
    - effective_rank and stable_rank of dW, see :mod:`lora_lens.spectrum.measures`;
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
            started from. Ordinary LoRA, PEFT's own starts and windows in a metric started from none of the
            plain spectrum: without a window their shares but outside and diagonal are NaN.

    Raises:
        ValueError: ``adapted`` is none of attach's, is merged, or holds NaN; the spectra are another
            model's, lack vectors or an adapted layer, or are in a metric; the window does not fit.
        TypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> import lora_lens as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spectra = ll.spectra(model, "0", progress=False)
        >>> adapted = ll.attach(model, ll.Window.first(2), targets="0", spectra=spectra)
        >>> with torch.no_grad():  # in place of training: the window's singular values grow by a tenth
        ...     _ = adapted.get_parameter("base_model.model.0.lora_B.default.weight").mul_(1.1)
        >>> ll.forgetting.drift(adapted, spectra)[["layer", "rank", "inside", "mixed", "diagonal"]].round(2)
          layer  rank  inside  mixed  diagonal
        0     0     2     1.0    0.0       1.0
    """
    _require_placement(window)
    rows = []
    for name, layer, start, spectrum in trained_layers(adapted, spectra):
        components = start.components if start is not None and len(start.components) else None
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
        ValueError: one is adapted or an adapter; a weight is missing, has another shape or is not finite; the
            spectra are not of ``before`` or lack vectors; the window does not fit.
        TypeError: an argument is of another type.
    """
    require_spectra(spectra)
    _require_placement(window)
    for model in (before, after):
        if isinstance(model, nn.Module):
            require_unadapted(model)
    names = list(spectra)
    old, new = matrices_of(before, names), matrices_of(after, names)
    rows = []
    for name, spectrum in spectra.items():
        start, end = old[name]().detach().cpu(), new[name]().detach().cpu()
        if start.shape != end.shape:
            raise InputError(
                f"{name} has shape {tuple(start.shape)} before and {tuple(end.shape)} after; "
                "only two states of one model compare"
            )
        require_start_of(spectrum, name, start[some_rows(spectrum)])
        update = _factorized(name, end.double() - start.double())
        components = None if window is None else spectrum.components_of(window)
        rows.append(_named(name) | _measured(update, spectrum, components))
    return pd.DataFrame(rows)


def _measured(update: Factors, spectrum: Spectrum, components: Tensor | None) -> dict[str, float]:
    """The columns of :func:`drift` from the update's own factors, float64."""
    left, values, right = update
    u, v = (basis(spectrum, side).double() for side in ("left", "right"))
    rows = u.T @ left * values  # (k, R); rows @ columns is C
    columns = right @ v  # (R, k)
    whole = values.square().sum()
    in_span = product_norm(rows, columns).square()
    diagonal = (rows * columns.T).sum(1).square().sum()
    norm = torch.linalg.norm(spectrum.singular_values)
    measured = {
        "update": whole.sqrt(),
        "norm": norm,
        "relative": whole.sqrt() / norm,
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


def trained_layers(
    adapted: nn.Module, spectra: SpectrumSet
) -> Iterator[tuple[str, LoraLayer, Start | None, Spectrum]]:
    """Each adapted layer by name, with what it started from and its pretrained weight's spectrum."""
    peft_model, record = attached(adapted)
    require_unmerged(peft_model)
    require_spectra(spectra)
    for name, layer in lora_layers(peft_model).items():
        spectrum, start = spectrum_of(spectra, name), record.starts.get(name)
        require_start_of(spectrum, name, start_rows(layer, start, some_rows(spectrum)))
        yield name, layer, start, spectrum


def _trained(name: str, layer: LoraLayer, start: Start | None) -> Factors:
    """dW of a layer as its singular value decomposition in float64."""
    if is_dora(layer):  # DoRA: rows of a new length
        return _factorized(name, effective_weight(layer) - start_rows(layer, start, slice(None)))
    b, a = trained_update(layer, start)
    require_finite(name, b)
    require_finite(name, a)
    return product_svd(b.double(), a.double())


def _factorized(name: str, update: Tensor) -> Factors:
    require_finite(name, update)
    left, values, right = thin_svd(update)
    return left.double(), values, right.double()


def merged_copy(adapted: nn.Module) -> nn.Module | None:
    """The model with all of PEFT's adapters merged, a copy; None where they are of a kind that has no merge.

    Without PEFT, the model itself.
    """
    if not isinstance(adapted, PeftModel):
        return adapted
    try:
        return copy.deepcopy(adapted).merge_and_unload()
    except NotImplementedError:
        return None


def start_rows(layer: LoraLayer, start: Start | None, rows: slice) -> Tensor:
    """Rows of the pretrained weight, float64, whatever form the start has."""
    return base_rows(layer, rows) if start is None else start.pretrained(layer, rows)


def some_rows(spectrum: Spectrum) -> slice:
    return slice(None, None, max(spectrum.shape[0] // 64, 1))


def require_spectra(spectra: object) -> None:
    instance(spectra, SpectrumSet, "spectra", "what ll.spectra(model) returns for the pretrained model")


def spectrum_of(spectra: SpectrumSet, name: str) -> Spectrum:
    """The spectrum of a layer.

    Raises:
        ValueError: there is none.
    """
    if name not in spectra:
        raise InputError(
            f"there is no spectrum of {name!r}; there are spectra of {listed(spectra)}: take ll.spectra of "
            "the model before training, with the same targets"
        )
    return spectra[name]


def _require_placement(window: object) -> None:
    if window is not None:
        instance(window, Placement, "window", "a window, such as ll.Window.middle(8), or None")


def require_start_of(spectrum: Spectrum, name: str, some: Tensor) -> None:
    """W V = U S, tried on a sample of rows: wrong for any other weight. Spectra in a metric are refused."""
    require_plain(spectrum, "what training did to a weight")
    out, columns = spectrum.shape
    belongs = spectrum.k == min(spectrum.shape) and some.shape == (
        len(range(out)[some_rows(spectrum)]),
        columns,
    )
    if belongs:
        left, right = (basis(spectrum, side).double() for side in ("left", "right"))
        expected = left[some_rows(spectrum)] * spectrum.singular_values
        error = torch.linalg.norm(some.double() @ right - expected)
        belongs = bool(error <= BELONGS * torch.linalg.norm(expected))
    if not belongs:
        raise InputError(
            f"the spectrum of {spectrum.name}, shape {spectrum.shape}, is not that of {name}'s pretrained "
            "weight: take ll.spectra of the model before training, with the same targets"
        )


def require_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise InputError(
            f"what was trained of {name} holds NaN or infinite values, so it has no update: the training "
            "diverged; train again at a smaller learning rate"
        )


def basis(spectrum: Spectrum, side: Side) -> Tensor:
    """All singular vectors of one side as columns, (out_features or in_features, k), float32."""
    left, right = spectrum.vectors(Window(spectrum.k, start=0))
    return left if side == "left" else right.T


def _named(name: str) -> dict[str, object]:
    block, kind = block_and_kind(name)
    return {"layer": name, "block": block, "kind": kind}
