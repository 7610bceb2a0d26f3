from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.training.fused_loop import CannotFuse, FusedLoop, factors_of, set_factors
from lora_lens.training.record import Record

SHORT = {"steps": 10, "batch_size": 16, "evaluations": 6, "lr": 1e-2}
POINTS = [
    (ll.Window.first(4), 1e-2, 0),
    (ll.Window.middle(4), 5e-3, 1),
    (ll.LoRA(4), 2e-2, 0),
    (ll.Window.last(4), 1e-2, 2),
]


@pytest.fixture(scope="module")
def tasks(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(300, 40), source.first(100, 40)


def together(model, spectra, tasks, points=POINTS, watch=(), **settings) -> FusedLoop:
    task, retain = tasks
    factors, records = [], []
    for method, lr, seed in points:
        adapted = ll.attach(model, method, spectra=spectra, seed=seed)
        factors.append(factors_of(adapted))
        config = ll.Training(**SHORT | {"lr": lr, "seed": seed} | settings)
        new, retained = (task, task.new_readout(model, seed)), (retain, retain.own_readout(model))
        watched = [(t, t.own_readout(model)) for t in watch]
        records.append(Record(config, new, retained, watched))
    return FusedLoop(model, factors, records)


def singles(model, spectra, tasks, points=POINTS, watch=(), **settings):
    runs = []
    for method, lr, seed in points:
        adapted = ll.attach(model, method, spectra=spectra, seed=seed)
        config = ll.Training(**SHORT | {"lr": lr, "seed": seed} | settings)
        runs.append((adapted, ll.finetune(adapted, *tasks, config, watch=watch, progress=False)))
    return runs


def test_the_numbers_are_those_of_single_runs(model, spectra, tasks):
    watch = [tasks[1].subset(test=30)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    loop = together(model, spectra, tasks, watch=watch)
    loop.require_agreement()
    found = loop.run()
    for number, (adapted, run) in enumerate(singles(model, spectra, tasks, watch=watch)):
        for column in ("loss", "test_loss", "retained_loss", "update"):
            assert found[number].curve[column].tolist()[1:] == pytest.approx(
                run.curve[column].tolist()[1:], rel=2e-4
            )
        assert found[number].curve["update"][0] == 0
        assert found[number].watched["loss_after"].tolist() == pytest.approx(
            run.watched["loss_after"].tolist(), rel=2e-4
        )
        assert found[number].config == run.config and not found[number].diverged
        torch.testing.assert_close(found[number].head.weight, run.head.weight, rtol=1e-3, atol=1e-4)
        for name, layer in lora_layers(adapted).items():
            factors = loop.factors(number)[name]
            torch.testing.assert_close(factors.b, layer.lora_B["default"].weight, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(factors.a, layer.lora_A["default"].weight, rtol=1e-3, atol=2e-4)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_factors_go_back_into_an_attached_model(model, spectra, tasks):
    loop = together(model, spectra, tasks, POINTS[:2])
    runs = loop.run()
    adapted = ll.attach(model, POINTS[1][0], spectra=spectra, seed=1)
    set_factors(adapted, loop.factors(1))
    readout = ll.tasks.readouts.HeadReadout(runs[1].head, tasks[0].pooling)
    last = runs[1].curve.iloc[-1]
    assert ll.evaluate(adapted, tasks[0], readout).loss == pytest.approx(last["test_loss"], rel=1e-4)
    assert ll.evaluate(adapted, tasks[1]).loss == pytest.approx(last["retained_loss"], rel=1e-4)
    assert (ll.forgetting.drift(adapted, spectra)["relative"] > 1e-4).all()


def test_a_run_that_diverges_ends_alone(model, spectra, tasks):
    points = [POINTS[0], (ll.LoRA(4), 1e20, 0), POINTS[3]]
    found = together(model, spectra, tasks, points).run()
    (_, first), (_, lost), (_, last) = singles(model, spectra, tasks, points)
    assert [run.diverged for run in found] == [False, True, False] and lost.diverged
    assert found[1].curve["step"].tolist() == lost.curve["step"].tolist()
    for one, other in ((found[0], first), (found[2], last)):
        assert one.curve["loss"].tolist()[1:] == pytest.approx(other.curve["loss"].tolist()[1:], rel=2e-4)


@pytest.mark.parametrize(
    ("method", "variant", "message"),
    [
        (ll.FullFineTuning(), None, "only adapters of two factors"),
        (ll.LinearProbe(), None, "only adapters of two factors"),
        (ll.LoRA(2), ll.Variant(dora=True), "does more than add B A"),
        (ll.LoRA(2), ll.Variant(dropout=0.1), "does more than add B A"),
        (ll.Window.last(2), ll.Variant(train="A", split="A"), "trains one factor alone"),
    ],
)
def test_what_trains_otherwise_is_left_to_single_runs(method, variant, message, model):
    adapted = ll.attach(model, method, targets="blocks.0.*", variant=variant)
    with pytest.raises(CannotFuse, match=message):
        factors_of(adapted)


def test_runs_of_other_shapes_or_precision_are_left_to_single_runs(model, spectra, tasks):
    with pytest.raises(CannotFuse, match="different ranks"):
        together(model, spectra, tasks, [POINTS[0], (ll.LoRA(2), 1e-2, 0)])
    with pytest.raises(CannotFuse, match="only float32"):
        together(model, spectra, tasks, precision="bfloat16")


class Seeing(nn.Module):
    """A classifier of images whose examples see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(784, 24), nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.body(images.flatten(1)).relu()
        return self.head(x - x.mean(0, keepdim=True))


def test_a_model_whose_examples_see_each_other_is_noticed(tasks):
    model = Seeing()
    loop = together(model, None, tasks, [(ll.LoRA(2), 1e-2, seed) for seed in range(3)])
    with pytest.raises(CannotFuse, match="change each other's features"):
        loop.require_agreement()


def test_a_model_that_draws_dropout_is_noticed(tasks):
    model = Seeing()
    model.drop = nn.Dropout(0.1)
    with pytest.raises(CannotFuse, match="draws dropout"):
        together(model, None, tasks, [(ll.LoRA(2), 1e-2, seed) for seed in range(2)])


class Drawing(nn.Module):
    """A classifier of images that is trained on noise now and then, or always."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.body, self.head, self.draw = nn.Linear(784, 24), nn.Linear(24, 10), draw

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.body(images.flatten(1))
        return self.head(x * self.draw() if self.training else x)


@pytest.mark.parametrize("rand", [torch.rand, np.random.rand])
def test_a_model_that_draws_numbers_is_noticed_even_if_nothing_comes_of_them(rand, tasks):
    loop = together(
        Drawing(lambda: bool(rand(1) > 1e-6)), None, tasks, [(ll.LoRA(2), 1e-2, seed) for seed in range(2)]
    )
    with pytest.raises(CannotFuse, match="draws random numbers"):
        loop.require_agreement()


def test_runs_are_compared_where_a_task_has_fewer_examples_than_there_are_runs(tasks):
    few = (tasks[0].first(2, 10), tasks[1])
    for model, agrees in ((Drawing(lambda: 1.0), True), (Seeing(), False)):
        loop = together(model, None, few, [(ll.LoRA(2), 1e-2, seed) for seed in range(3)])
        if agrees:
            loop.require_agreement()
        else:
            with pytest.raises(CannotFuse, match="change each other's features"):
                loop.require_agreement()


class Normed(nn.Module):
    """A classifier of images with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(784, 24), nn.BatchNorm1d(24), nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(images.flatten(1))).relu())


def test_batch_norms_that_are_not_trained_keep_their_statistics_whatever_mode_the_model_is_in(tasks):
    points = [(ll.LoRA(2), 1e-2, seed) for seed in range(2)]
    model = Normed().train()
    loop = together(model, None, tasks, points)
    loop.require_agreement()
    for run, (_, single) in zip(loop.run(), singles(model, None, tasks, points), strict=True):
        assert run.curve["loss"].tolist()[1:] == pytest.approx(single.curve["loss"].tolist()[1:], rel=2e-4)
    assert model.norm.running_mean.eq(0).all() and model.norm.training
