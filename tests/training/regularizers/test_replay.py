from __future__ import annotations

import itertools

import pandas as pd
import pytest
import torch
from small_regularizers import CONFIG, begun, sequence, trained
from small_sequences import LORA, WINDOW, pairs, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Merged
from lora_lens.tasks.scenarios import ClassIncremental, DomainIncremental, TaskIncremental
from lora_lens.training import Replay
from lora_lens.training.regularizers.base import Past


def filled(size: int, places: int, kind: type = TaskIncremental):
    scenario, regularizer, kept, history = begun(kind, places), Replay(size), {}, []
    for place in range(places):
        config = ll.Training(seed=1000 * place)
        kept = regularizer.keep(small_vit(), Past(None, kept, scenario, place), config)
        history.append(kept)
    return scenario, kept, history


@pytest.mark.parametrize("size", [4, 7, 20, 200])
def test_the_buffer_is_even_within_its_size_and_keeps_what_it_drew_first(size):
    _, _, history = filled(size, 4)
    for after, kept in enumerate(history, start=1):
        assert list(kept) == [str(place) for place in range(after)]
        lengths = {len(rows) for rows in kept.values()}
        assert lengths == {min(40, size // after)}  # 40 training examples in each
        assert sum(len(rows) for rows in kept.values()) <= size
        assert all(len(set(rows.tolist())) == len(rows) for rows in kept.values())
    for earlier, later in itertools.pairwise(history):
        for name, rows in earlier.items():
            assert torch.equal(later[name], rows[: len(later[name])])


def test_a_buffer_smaller_than_the_tasks_keeps_its_size_and_favours_none():
    scenario, regularizer, seen = begun(TaskIncremental, 4), Replay(2), torch.zeros(4)
    for seed in range(300):
        kept: dict[str, torch.Tensor] = {}
        for place in range(4):
            kept = regularizer.keep(
                small_vit(), Past(None, kept, scenario, place), ll.Training(seed=1000 * place + seed)
            )
            assert sum(len(rows) for rows in kept.values()) == 2
        assert len(kept) == 2
        seen[[int(name) for name in kept]] += 1
    assert ((seen / 300 - 0.5).abs() < 0.11).all()  # four standard errors


class Watched(nn.Module):
    """A readout that notes which labels it was asked for, and how many."""

    def __init__(self, readout: nn.Module, notes: list):
        super().__init__()
        self.readout, self.notes = readout, notes

    def forward(self, model, inputs, labels):
        self.notes.append((inputs, labels))
        return self.readout(model, inputs, labels)


def test_replayed_examples_pass_their_own_readout():
    scenario, kept, _ = filled(12, 3)
    scenario.begin(3, small_vit(), 3)
    notes = {place: [] for place in range(3)}
    for place in range(3):
        scenario.readouts[place] = Watched(scenario.readouts[place], notes[place])
    model = ll.attach(small_vit(), LORA)
    term = Replay(12).begin(model, Past(None, kept, scenario, 3), ll.Training(batch_size=9, seed=4))
    values = [float(term().detach()) for _ in range(60)]
    counts = [len(notes[place]) for place in range(3)]
    assert sum(counts) == 60 and min(counts) > 8  # one earlier task at a time, all of them in turn
    for place, seen in notes.items():
        rows = kept[str(place)]
        allowed = {pairs()[place].train.inputs[row].numpy().tobytes() for row in rows}
        assert all(len(labels) == 4 for _, labels in seen)  # half of nine
        assert {image.numpy().tobytes() for inputs, _ in seen for image in inputs} == allowed
    one = notes[0][0]
    logits = scenario.readouts[0].readout.head(features(model, one[0]))
    assert min(abs(float(nn.functional.cross_entropy(logits, one[1])) - v) for v in values) < 1e-6


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    inner = model.get_base_model()
    return inner.forward_head(inner.forward_features(images), pre_logits=True).detach()


def test_replay_trains_a_shared_head_and_spares_those_of_earlier_tasks():
    for kind in (TaskIncremental, DomainIncremental, ClassIncremental):
        scenario, kept, _ = filled(8, 2, kind)
        scenario.begin(2, small_vit(), 2)
        model = ll.attach(small_vit(), LORA)
        Replay(8).begin(model, Past(None, kept, scenario, 2), CONFIG)().backward()
        assert any(p.grad is not None and p.grad.any() for p in trained(model).values())
        heads = [scenario.trained(place)[1].head.weight.grad for place in range(2)]
        assert all((grad is None) == (kind is TaskIncremental) for grad in heads)


def test_replay_halves_the_new_examples_and_brings_an_old_task_back():
    settings = {"setting": "class-incremental", "steps": 30, "batch_size": 16}
    plain, replayed = (sequence(strategy, WINDOW, **settings) for strategy in (Merged(), Merged(Replay(60))))
    for after in (0, 1):
        same = [t[t["after"] == after]["loss"].to_numpy() for t in (plain, replayed)]
        assert pd.Series(same[0]).equals(pd.Series(same[1]))  # the first task has nothing to replay
    old = [t[(t["after"] == 3) & (t["place"] < 2)]["loss"].mean() for t in (plain, replayed)]
    assert old[1] < 0.7 * old[0]
