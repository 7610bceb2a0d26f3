from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from small_sequences import small_spectra, small_vit

import lora_lens as ll
from lora_lens.experiments.pretrained import ask_pretrained
from lora_lens.experiments.runs import Experiment, groups_of, run_one, run_together
from lora_lens.training import L2ToInitial, Regularized
from lora_lens.training.fused_loop import CannotFuse

WINDOWS = ll.windows(rank=4, count=3)


@pytest.fixture(scope="module")
def experiment(source, digits) -> Experiment:
    model, spectra = small_vit(), small_spectra()
    task, retain, watch = digits.first(200, 40), source.first(100, 40), (source.subset(test=30),)
    methods = [*WINDOWS, ll.LoRA(4), ll.LoRA(2), ll.FullFineTuning(), Regularized(ll.LoRA(4), L2ToInitial(1))]
    names = list(ll.spectrum.target_layers(model))
    layers = dict.fromkeys(methods, names)
    training = ll.Training(steps=8, batch_size=16, evaluations=3)
    shared = Experiment(model, task, retain, watch, layers, None, ll.Variant(), spectra, spectra, training)
    return replace(shared, pretrained=ask_pretrained(model, task, retain, watch, "float32"))


def test_records_of_runs_together_are_those_of_runs_one_by_one(experiment):
    points = [(WINDOWS[0], 1e-2, 0), (WINDOWS[1], 5e-3, 1), (ll.LoRA(4), 1e-2, 0)]
    for point, together in zip(points, run_together(experiment, points), strict=True):
        alone = run_one(experiment, point)
        assert together.keys() == alone.keys()
        for key in ("run", "settings"):
            assert together[key] == alone[key]
        for key, value in alone["result"].items():
            assert together["result"][key] == pytest.approx(value, rel=1e-3, abs=0.011)
        for key in ("curve", "drift", "watched", "items"):
            one, other = pd.DataFrame(alone[key]), pd.DataFrame(together[key])
            assert list(one) == list(other) and len(one) == len(other)
        drifts = [pd.DataFrame(record["drift"]) for record in (alone, together)]
        assert drifts[1]["relative"].tolist() == pytest.approx(drifts[0]["relative"].tolist(), rel=1e-3)


def test_groups_hold_what_has_one_shape_and_keep_to_their_size(experiment):
    grid = ll.Grid(window=WINDOWS, lr=[1e-3, 1e-2], baselines=[*list(experiment.layers)[3:]])
    points = list(grid)
    groups = groups_of(experiment, points, 3)
    assert sorted(map(str, (p for group in groups for p in group))) == sorted(map(str, points))
    assert max(map(len, groups)) == 3
    for group in groups:
        if len(group) > 1:
            assert len({getattr(method, "rank", None) for method, _, _ in group}) == 1
            assert not any(isinstance(m, (ll.FullFineTuning, Regularized)) for m, _, _ in group)
    assert groups == groups_of(experiment, points, 3)
    assert all(len(group) == 1 for group in groups_of(experiment, points, 1))
    for other in (
        replace(experiment, variant=ll.Variant(dora=True)),
        replace(experiment, training=replace(experiment.training, precision="bfloat16")),
    ):
        assert all(len(group) == 1 for group in groups_of(other, points, 3))


def test_what_cannot_be_fused_says_so(experiment):
    with pytest.raises(CannotFuse, match="only adapters of two factors"):
        run_together(experiment, [(ll.FullFineTuning(), 1e-3, seed) for seed in range(2)])
