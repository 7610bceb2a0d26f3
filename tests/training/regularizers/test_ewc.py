from __future__ import annotations

import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from small_regularizers import CONFIG, adapted, begun, disturbed, sequence, trained
from small_sequences import pairs, small_spectra, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.experiments.continual.strategies import Continued
from lora_lens.tasks.readouts import ask
from lora_lens.tasks.scenarios import ClassIncremental, DomainIncremental, TaskIncremental
from lora_lens.training import EWC
from lora_lens.training.regularizers.base import Past


def test_fisher_is_the_mean_squared_gradient_for_answers_that_the_model_draws():
    """Exactly so where the answers leave no choice, and on average where they do."""
    model, scenario = adapted(), begun(TaskIncremental)
    task, readout = scenario.trained(0)
    with torch.no_grad():
        readout.head.bias.copy_(torch.tensor([30.0, 0.0]))  # every draw is class 0
    kept = EWC(1, examples=6).keep(model, Past(None, {}, scenario, 0), CONFIG)
    rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(5))[:6]
    expected = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for image in task.train.inputs[rows]:
        model.zero_grad()
        logits, _ = readout(model, image[None], torch.tensor([0]))
        nn.functional.cross_entropy(logits, torch.tensor([0])).backward()
        for name, p in trained(model).items():
            expected[name] += p.grad.square() / 6
    for name, value in expected.items():
        torch.testing.assert_close(kept[f"fisher model.{name}"], value, rtol=1e-3, atol=0)
        assert torch.equal(kept[f"anchor model.{name}"], trained(model)[name])

    with torch.no_grad():
        readout.head.bias.zero_()
    seeds = [ll.Training(seed=seed) for seed in range(25)]
    drawn = [EWC(1, examples=40).keep(model, Past(None, {}, scenario, 0), c) for c in seeds]
    name, p = next((n, p) for n, p in trained(model).items() if n.endswith("fc2.lora_B.default.weight"))
    mean = torch.stack([kept[f"fisher model.{name}"] for kept in drawn]).mean(0)
    exact = torch.zeros_like(p)
    for image in task.train.inputs:
        logs = readout(model, image[None], torch.tensor([0]))[0].log_softmax(-1)[0]
        for log in logs:
            exact += log.exp().detach() * torch.autograd.grad(log, p, retain_graph=True)[0].square()
    assert len(task.train) == 40
    assert float((mean - exact / 40).norm() / (exact / 40).norm()) < 0.15


def test_fisher_of_a_language_task_is_that_of_whole_examples():
    """By hand: for each block the gradient of the sum of the drawn tokens' log-probabilities, squared."""
    model = ll.attach(disturbed(small("llama"), 0.1), ll.LoRA(2))
    corpus = ll.tasks.language_task(part_of("movies", 12, 4), byte_tokenizer(), block=24)
    scenario = TaskIncremental([corpus, replace(corpus, name="other")])
    scenario.prepare(model, 0)
    scenario.begin(0, model, 0)
    disturbed(model)
    task, readout = scenario.trained(0)
    kept = EWC(1, examples=2).keep(model, Past(None, {}, scenario, 0), CONFIG)

    generator = torch.Generator().manual_seed(CONFIG.seed)
    expected = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for row in torch.randperm(len(task.train), generator=generator)[:2]:
        logs = ask(readout, model, task.train, row[None])[0].log_softmax(-1)
        assert len(logs) == 23
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)[:, 0]
        whole = {name: torch.zeros_like(p) for name, p in trained(model).items()}
        for token, log in zip(drawn, logs, strict=True):
            found = torch.autograd.grad(log[token], list(trained(model).values()), retain_graph=True)
            for total, gradient in zip(whole.values(), found, strict=True):
                total += gradient
        for name, gradient in whole.items():
            expected[name] += gradient.square() / 2
    for name, value in expected.items():
        torch.testing.assert_close(kept[f"fisher model.{name}"], value, rtol=1e-3, atol=1e-7)
    assert sum(float(value.sum()) for value in expected.values()) > 0


@pytest.mark.parametrize("kind", [TaskIncremental, DomainIncremental, ClassIncremental])
def test_the_term_is_half_the_weighted_squared_distance(kind):
    model, scenario, regularizer = adapted(), begun(kind), EWC(3.0, examples=4)
    kept = regularizer.keep(model, Past(None, {}, scenario, 0), CONFIG)
    scenario.begin(1, small_vit(), 7)
    term = regularizer.begin(model, Past(None, kept, scenario, 1), CONFIG)
    assert term().item() == 0
    disturbed(model)
    shared = {} if scenario.shared() is None else dict(scenario.shared().named_parameters())
    assert bool(shared) == (kind is not TaskIncremental)
    with torch.no_grad():
        for p in shared.values():
            p += 0.1
    expected = 0.0
    for prefix, parameters in (("model.", trained(model)), ("readout.", shared)):
        for name, p in parameters.items():
            anchor, fisher = (kept[f"{what} {prefix}{name}"] for what in ("anchor", "fisher"))
            if prefix == "readout." and kind is ClassIncremental:
                assert len(anchor) == 2 and len(p) == 4
            expected += 1.5 * float((fisher * (p[: len(anchor)] - anchor).square()).sum().detach())
    assert len(kept) == 2 * (len(trained(model)) + len(shared))
    assert term().item() == pytest.approx(expected, rel=1e-5) and expected > 0
    term().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_fisher_is_summed_over_the_tasks_and_a_grown_head_keeps_its_rows():
    model, scenario, regularizer = adapted(), begun(ClassIncremental), EWC(1, examples=4)
    first = regularizer.keep(model, Past(None, {}, scenario, 0), CONFIG)
    scenario.begin(1, small_vit(), 1)
    alone = regularizer.keep(model, Past(None, {}, scenario, 1), CONFIG)
    both = regularizer.keep(model, Past(None, first, scenario, 1), CONFIG)
    assert both.keys() == alone.keys() == first.keys()
    for name in (n for n in both if n.startswith("fisher ")):
        summed = alone[name].clone()
        summed[: len(first[name])] += first[name]
        assert torch.equal(both[name], summed)
    assert both["fisher readout.head.bias"].shape == (4,)
    assert all(torch.equal(both[n], alone[n]) for n in both if n.startswith("anchor "))


def test_what_ewc_keeps_is_a_copy():
    model, scenario = adapted(), begun(DomainIncremental)
    kept = EWC(1, examples=2).keep(model, Past(None, {}, scenario, 0), CONFIG)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    disturbed(model)
    with torch.no_grad():
        scenario.readout.head.weight += 1
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_parameters_without_use_or_without_a_row_are_no_trouble():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.unused = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
            self.head = nn.Linear(784, 10)

        def forward(self, images):
            return self.head(self.scale * images.flatten(1))

    model, scenario, regularizer = Scaled(), TaskIncremental(pairs()), EWC(2.0, examples=3)
    scenario.begin(0, model, 0)
    kept = regularizer.keep(model, Past(None, {}, scenario, 0), CONFIG)
    kept = regularizer.keep(model, Past(None, kept, scenario, 0), CONFIG)
    assert float(kept["fisher model.scale"]) > 0 and not kept["fisher model.unused"].any()
    term = regularizer.begin(model, Past(None, kept, scenario, 1), CONFIG)
    with torch.no_grad():
        model.scale += 0.5
    assert term().item() == pytest.approx(0.25 * float(kept["fisher model.scale"]), rel=1e-5)


def test_ewc_of_strength_0_is_no_regularizer_bit_for_bit():
    plain, held = sequence(Continued()), sequence(Continued(EWC(0, examples=3)))
    differ = ["run", "strategy"]
    pd.testing.assert_frame_equal(plain.drop(columns=differ), held.drop(columns=differ), check_exact=True)


def test_a_strong_ewc_holds_what_the_first_task_learnt(tmp_path):
    update = []
    for strength in (0, 1e6):
        store = tmp_path / str(strength)
        table = sequence(Continued(EWC(strength, examples=8)), store=store, spectra=small_spectra(), steps=8)
        drift = (
            ll.experiments.ContinualSweep.open(store).only(table).drifts().groupby("after")["update"].mean()
        )
        update.append((drift[1], drift[3]))
    assert update[0][0] == update[1][0] and update[0][1] > 1.3 * update[0][0]
    assert abs(update[1][1] / update[1][0] - 1) < 0.3 * (update[0][1] / update[0][0] - 1)


def test_learning_leaves_the_model_as_it_was():
    model, scenario = adapted(), begun(TaskIncremental)
    model.train()
    before = copy.deepcopy(model.state_dict())
    EWC(1, examples=3).keep(model, Past(None, {}, scenario, 0), CONFIG)
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
