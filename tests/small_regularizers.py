"""What the tests of regularizers share: scenarios, adapted models, whole sequences."""

from __future__ import annotations

import pandas as pd
import torch
from small_sequences import LORA, SETTINGS, grid, pairs, retained, small_spectra, small_vit
from torch import nn

import lora_lens as ll

CONFIG = ll.Training(batch_size=8, steps=3, seed=5)


def begun(kind: type, places: int = 1, seed: int = 0):
    """A scenario of the pairs of digits in which so many tasks were begun."""
    scenario = kind(pairs())
    scenario.prepare(small_vit(), seed)
    for place in range(places):
        scenario.begin(place, small_vit(), seed + place)
    return scenario


def adapted(method: object = LORA) -> nn.Module:
    if isinstance(method, ll.FullFineTuning):
        return ll.attach(small_vit(), method)
    return disturbed(ll.attach(small_vit(), method, spectra=small_spectra(), targets="blocks.*.mlp.*"))


def disturbed(model: nn.Module, by: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sequence(strategy: object, method: object = LORA, **others: object) -> pd.DataFrame:
    settings = SETTINGS | {"setting": "domain-incremental", "retain": retained()} | others
    return ll.experiments.continual_sweep(small_vit(), pairs()[:3], strategy, grid(method), **settings).table
