from __future__ import annotations

import pandas as pd
import pytest
import torch
from small_regularizers import CONFIG, begun, sequence
from small_sequences import LORA, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.experiments.continual.strategies import Merged
from lora_lens.tasks.scenarios import TaskIncremental
from lora_lens.training import Orthogonal
from lora_lens.training.regularizers.base import Past


def a_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.lora_A["default"].weight.detach() for name, layer in lora_layers(model).items()}


def test_the_term_is_the_overlap_with_every_earlier_adapter():
    regularizer, scenario, kept, earlier = Orthogonal(0.7), begun(TaskIncremental, 3), {}, []
    for seed in range(2):
        model = ll.attach(small_vit(), LORA, seed=seed)
        earlier.append(a_of(model))
        kept = regularizer.keep(model, Past(None, kept, scenario, seed), CONFIG)
    now = ll.attach(small_vit(), LORA, seed=2)
    term = regularizer.begin(now, Past(None, kept, scenario, 2), CONFIG)
    expected = sum(
        float((a[name] @ own.T).square().sum()) for a in earlier for name, own in a_of(now).items()
    )
    assert term().item() == pytest.approx(0.7 * expected, rel=1e-5) and expected > 0
    assert {name: tuple(g.shape) for name, g in kept.items()} == {
        name: (own.shape[1],) * 2 for name, own in a_of(now).items()
    }
    optimizer = torch.optim.SGD([p for p in now.parameters() if p.requires_grad], lr=0.1)
    before = term().item()
    for _ in range(20):
        optimizer.zero_grad()
        term().backward()
        optimizer.step()
    assert term().item() < 0.5 * before


def test_a_convolution_s_a_is_read_as_a_matrix():
    regularizer, scenario = Orthogonal(1.0), begun(TaskIncremental, 2)
    first, now = (ll.attach(small_vit(), LORA, targets="patch_embed.proj", seed=seed) for seed in (0, 1))
    kept = regularizer.keep(first, Past(None, {}, scenario, 0), CONFIG)
    term = regularizer.begin(now, Past(None, kept, scenario, 1), CONFIG)
    a, b = (next(iter(a_of(model).values())).flatten(1) for model in (first, now))
    assert term().item() == pytest.approx(float((a @ b.T).square().sum()), rel=1e-5)


def test_under_a_strong_term_adapters_read_other_directions():
    overlap = []
    for strength in (0.0, 10.0):
        regularizer, scenario = Orthogonal(strength), begun(TaskIncremental, 2)
        first = ll.attach(small_vit(), LORA, targets="blocks.*.mlp.*", seed=0)
        kept = regularizer.keep(first, Past(None, {}, scenario, 0), CONFIG)
        now = ll.attach(small_vit(), LORA, targets="blocks.*.mlp.*", seed=1)
        term = regularizer.begin(now, Past(None, kept, scenario, 1), CONFIG)
        optimizer = torch.optim.AdamW(now.parameters(), lr=1e-2)
        task, readout = scenario.trained(1)
        for _ in range(10):
            optimizer.zero_grad()
            logits, labels = readout(now, task.train.inputs[:16], task.train.labels[:16])
            (nn.functional.cross_entropy(logits, labels) + term()).backward()
            optimizer.step()
        earlier = a_of(first)
        overlap.append(sum(float((earlier[n] @ a.T).square().sum()) for n, a in a_of(now).items()))
    assert overlap[1] < 0.3 * overlap[0]


def test_o_lora_of_strength_0_is_no_regularizer():
    plain, held = sequence(Merged()), sequence(Merged(Orthogonal(0)))
    differ = ["run", "strategy"]
    pd.testing.assert_frame_equal(plain.drop(columns=differ), held.drop(columns=differ), check_exact=True)
    strong = sequence(Merged(Orthogonal(10)))
    assert (strong["loss"] != plain["loss"]).any()
