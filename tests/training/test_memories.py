from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from small_sequences import LORA, SETTINGS, WINDOW, grid, pairs, retained, small_spectra, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.experiments.continual.strategies import Continued, Merged
from lora_lens.tasks.readouts import ask
from lora_lens.tasks.scenarios import ClassIncremental, DomainIncremental, TaskIncremental
from lora_lens.training.memories import EWC, Orthogonal, Replay

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


# --- EWC ---


def test_fisher_is_the_mean_squared_gradient_for_answers_that_the_model_draws():
    """Exactly so where the answers leave no choice, and on average where they do."""
    model, scenario = adapted(), begun(TaskIncremental)
    task, readout = scenario.trained(0)
    with torch.no_grad():
        readout.head.bias.copy_(torch.tensor([30.0, 0.0]))  # every draw is class 0
    kept = EWC(1, examples=6).learnt({}, model, scenario, 0, CONFIG)
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
    drawn = [EWC(1, examples=40).learnt({}, model, scenario, 0, c) for c in seeds]
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
    kept = EWC(1, examples=2).learnt({}, model, scenario, 0, CONFIG)

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
    model, scenario, memory = adapted(), begun(kind), EWC(3.0, examples=4)
    kept = memory.learnt({}, model, scenario, 0, CONFIG)
    scenario.begin(1, small_vit(), 7)
    term = memory.term(kept, model, scenario, 1, CONFIG)
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
    model, scenario, memory = adapted(), begun(ClassIncremental), EWC(1, examples=4)
    first = memory.learnt({}, model, scenario, 0, CONFIG)
    scenario.begin(1, small_vit(), 1)
    alone = memory.learnt({}, model, scenario, 1, CONFIG)
    both = memory.learnt(first, model, scenario, 1, CONFIG)
    assert both.keys() == alone.keys() == first.keys()
    for name in (n for n in both if n.startswith("fisher ")):
        summed = alone[name].clone()
        summed[: len(first[name])] += first[name]
        assert torch.equal(both[name], summed)
    assert both["fisher readout.head.bias"].shape == (4,)
    assert all(torch.equal(both[n], alone[n]) for n in both if n.startswith("anchor "))


def test_what_ewc_keeps_is_a_copy():
    model, scenario = adapted(), begun(DomainIncremental)
    kept = EWC(1, examples=2).learnt({}, model, scenario, 0, CONFIG)
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

    model, scenario, memory = Scaled(), TaskIncremental(pairs()), EWC(2.0, examples=3)
    scenario.begin(0, model, 0)
    kept = memory.learnt({}, model, scenario, 0, CONFIG)
    kept = memory.learnt(kept, model, scenario, 0, CONFIG)
    assert float(kept["fisher model.scale"]) > 0 and not kept["fisher model.unused"].any()
    term = memory.term(kept, model, scenario, 1, CONFIG)
    with torch.no_grad():
        model.scale += 0.5
    assert term().item() == pytest.approx(0.25 * float(kept["fisher model.scale"]), rel=1e-5)


def sequence(strategy: object, method: object = LORA, **others: object) -> pd.DataFrame:
    settings = SETTINGS | {"setting": "domain-incremental", "retain": retained()} | others
    return ll.experiments.continual_sweep(small_vit(), pairs()[:3], strategy, grid(method), **settings).table


def test_ewc_of_strength_0_is_no_memory_bit_for_bit():
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


# --- Orthogonal ---


def a_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.lora_A["default"].weight.detach() for name, layer in lora_layers(model).items()}


def test_the_term_is_the_overlap_with_every_earlier_adapter():
    memory, scenario, kept, earlier = Orthogonal(0.7), begun(TaskIncremental, 3), {}, []
    for seed in range(2):
        model = ll.attach(small_vit(), LORA, seed=seed)
        earlier.append(a_of(model))
        kept = memory.learnt(kept, model, scenario, seed, CONFIG)
    now = ll.attach(small_vit(), LORA, seed=2)
    term = memory.term(kept, now, scenario, 2, CONFIG)
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
    memory, scenario = Orthogonal(1.0), begun(TaskIncremental, 2)
    first, now = (ll.attach(small_vit(), LORA, targets="patch_embed.proj", seed=seed) for seed in (0, 1))
    term = memory.term(memory.learnt({}, first, scenario, 0, CONFIG), now, scenario, 1, CONFIG)
    a, b = (next(iter(a_of(model).values())).flatten(1) for model in (first, now))
    assert term().item() == pytest.approx(float((a @ b.T).square().sum()), rel=1e-5)


def test_under_a_strong_term_adapters_read_other_directions():
    overlap = []
    for strength in (0.0, 10.0):
        memory, scenario = Orthogonal(strength), begun(TaskIncremental, 2)
        first = ll.attach(small_vit(), LORA, targets="blocks.*.mlp.*", seed=0)
        kept = memory.learnt({}, first, scenario, 0, CONFIG)
        now = ll.attach(small_vit(), LORA, targets="blocks.*.mlp.*", seed=1)
        term = memory.term(kept, now, scenario, 1, CONFIG)
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


def test_o_lora_of_strength_0_is_no_memory():
    plain, held = sequence(Merged()), sequence(Merged(Orthogonal(0)))
    differ = ["run", "strategy"]
    pd.testing.assert_frame_equal(plain.drop(columns=differ), held.drop(columns=differ), check_exact=True)
    strong = sequence(Merged(Orthogonal(10)))
    assert (strong["loss"] != plain["loss"]).any()


# --- Replay ---


def filled(size: int, places: int, kind: type = TaskIncremental):
    scenario, memory, kept, history = begun(kind, places), Replay(size), {}, []
    for place in range(places):
        config = ll.Training(seed=1000 * place)
        kept = memory.learnt(kept, small_vit(), scenario, place, config)
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
    scenario, memory, seen = begun(TaskIncremental, 4), Replay(2), torch.zeros(4)
    for seed in range(300):
        kept: dict[str, torch.Tensor] = {}
        for place in range(4):
            kept = memory.learnt(kept, small_vit(), scenario, place, ll.Training(seed=1000 * place + seed))
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
    term = Replay(12).term(kept, model, scenario, 3, ll.Training(batch_size=9, seed=4))
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
        Replay(8).term(kept, model, scenario, 2, CONFIG)().backward()
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


# --- what they are ---


def test_memories_are_plain_values():
    assert [str(m) for m in (EWC(100), EWC(0.5, 30), Orthogonal(0.5), Replay(200))] == [
        "EWC 100",
        "EWC 0.5, 30 examples",
        "O-LoRA 0.5",
        "replay 200",
    ]
    assert EWC(1) == EWC(1.0) and len({Replay(2), Replay(2), Replay(3)}) == 2
    for strength in (-1, float("inf"), float("nan")):
        for memory in (EWC, Orthogonal):
            with pytest.raises(ValueError, match="strength must be at least 0 and finite, not"):
                memory(strength)
    with pytest.raises(ValueError, match="size must be at least 1, not 0"):
        Replay(0)
    with pytest.raises(ValueError, match="examples must be at least 1, not 0"):
        EWC(1, examples=0)
    for wrong in (lambda: Replay(2.5), lambda: Replay(True), lambda: EWC("1")):
        with pytest.raises(TypeError):
            wrong()


def test_learning_leaves_the_model_as_it_was():
    model, scenario = adapted(), begun(TaskIncremental)
    model.train()
    before = copy.deepcopy(model.state_dict())
    EWC(1, examples=3).learnt({}, model, scenario, 0, CONFIG)
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
