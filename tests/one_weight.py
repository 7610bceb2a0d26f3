"""A model with one weight of known spectrum, and ways to move it: for the tests of drift and rotation."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.layer_weights import set_weight_matrix, weight_matrix


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def one_layer(out: int = 24, inputs: int = 16) -> nn.Sequential:
    """A model with one weight of well separated singular values, from 10 down to 1."""
    k = min(out, inputs)
    s = torch.logspace(1, 0, k, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(inputs, out))
    set_weight_matrix(model[0], orthonormal(out, k, 0) * s @ orthonormal(inputs, k, 1).T)
    return model


def spectra_of(model: nn.Module) -> ll.SpectrumSet:
    return ll.spectra(model, "0", progress=False)


def with_update(model: nn.Module, update: torch.Tensor, method: ll.Window | ll.LoRA) -> nn.Module:
    """The one-layer model, adapted and trained to W + update, of the adapter's rank at most."""
    adapted = ll.attach(model, method, targets="0", spectra=spectra_of(model))
    layer = adapted.get_base_model()[0]
    target = weight_matrix(model[0]).double() + update - weight_matrix(layer.get_base_layer()).double()
    left, values, right = torch.linalg.svd(target)
    rank = layer.r["default"]
    assert values[rank:].max() < 1e-5
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(left[:, :rank] * values[:rank])
        layer.lora_A["default"].weight.copy_(right[:rank])
    return adapted


def only_row(table: pd.DataFrame) -> pd.Series:
    assert len(table) == 1
    return table.iloc[0]


def moved(adapted: nn.Module, size: float = 0.02, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return adapted
