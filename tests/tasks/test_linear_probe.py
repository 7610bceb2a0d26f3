from __future__ import annotations

import math

import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from torch import nn

import lora_lens as ll
from lora_lens.tasks.evaluation import example_features
from lora_lens.tasks.linear_probe import DECAY, drawn, fitted_head

CAUSAL_TASKS = [ll.tasks.label_word_task, ll.tasks.language_task]


@pytest.fixture(scope="module")
def task() -> ll.Task:
    return ll.tasks.text_task(part_of("movies", 120, 60), byte_tokenizer())


def clusters(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping classes in five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (150,), generator=generator)
    centres = torch.randn(3, 5, generator=generator)
    return centres[labels] + torch.randn(150, 5, generator=generator), labels


def penalized(head: nn.Linear, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(inputs @ head.weight.T + head.bias, labels)
    return loss + DECAY / 2 * (head.weight**2).sum()


def test_the_head_is_the_minimum_of_the_penalized_loss():
    inputs, labels = clusters()
    head = fitted_head(inputs, labels, 3)
    assert not head.weight.requires_grad
    head.requires_grad_()
    best = penalized(head, inputs, labels)
    slopes = torch.autograd.grad(best, [head.weight, head.bias])
    start = nn.Linear(5, 3)
    nn.init.zeros_(start.weight), nn.init.zeros_(start.bias)
    at_zero = torch.autograd.grad(penalized(start, inputs, labels), [start.weight, start.bias])
    assert max(float(s.abs().max()) for s in slopes) < 1e-3 < 0.1 < max(float(s.abs().max()) for s in at_zero)
    for seed in range(5):  # convex: every other head is worse
        other = nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for new, old in zip(other.parameters(), head.parameters(), strict=True):
                new.copy_(old + 0.1 * torch.randn(old.shape, generator=generator))
        assert penalized(other, inputs, labels) > best


def test_two_classes_on_one_feature_by_hand():
    """By symmetry the weights are (-w, w), the biases 0; then 1 / (1 + e^2w) = DECAY w."""
    head = fitted_head(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 2)
    w = float(head.weight[1])
    assert head.weight[0] == pytest.approx(-w, abs=1e-4)
    assert head.bias.abs().max() < 1e-4
    assert 1 / (1 + torch.tensor(2 * w).exp()) == pytest.approx(DECAY * w, rel=0.02)


def test_it_needs_no_seed_and_no_gradients_outside():
    inputs, labels = clusters()
    first = fitted_head(inputs, labels, 3)
    torch.manual_seed(4)
    with torch.inference_mode(False), torch.no_grad():
        again = fitted_head(inputs, labels, 3)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_probed_task_is_scored_by_its_head_on_the_model_s_features(kind, task):
    model = small(kind)
    found = ll.tasks.probed(model, task)
    assert type(found) is ll.Task and task.head is None and found.fingerprint() != task.fingerprint()
    features = example_features(model, task, task.test)
    logits = features @ found.head.weight.T + found.head.bias
    answers = ll.evaluate(model, found)
    assert answers.predicted.tolist() == logits.argmax(-1).tolist()
    expected = nn.functional.cross_entropy(logits, task.test.labels)
    assert answers.loss == pytest.approx(float(expected), abs=1e-5)
    assert ll.evaluate(model, found, examples=task.train).loss < math.log(2) - 0.05  # what it was fitted to


def test_some_examples_are_drawn_from_all_classes(task):
    model = small("bert")
    some = ll.tasks.probed(model, task, examples=30)
    assert torch.equal(some.head.weight, ll.tasks.probed(model, task.subset(train=30)).head.weight)
    assert not torch.equal(some.head.weight, ll.tasks.probed(model, task).head.weight)
    assert len(some.train) == 120
    with pytest.raises(ValueError, match="examples must be at least 1, not 0"):
        ll.tasks.probed(model, task, examples=0)


def test_an_adapted_model_s_probe_sees_what_training_did(task):
    model = small("bert")
    probe = ll.tasks.probed(model, task)
    adapted = ll.attach(model, ll.Window.first(4))
    before, at_start = ll.evaluate(model, probe), ll.evaluate(adapted, probe)
    assert at_start.losses.tolist() == pytest.approx(before.losses.tolist(), abs=1e-4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    assert abs(ll.evaluate(adapted, probe).loss - before.loss) > 0.01


def test_images_are_probed_as_well(patch_vit, digits):
    few = digits.first(200, 50)
    probe = ll.tasks.probed(patch_vit, few)
    assert probe.head.in_features == 32 and probe.pooling == "model"
    assert ll.evaluate(patch_vit, probe).accuracy > ll.evaluate(patch_vit, few).accuracy + 0.2


def test_a_head_of_another_model_is_refused(task):
    probe = ll.tasks.probed(small("bert"), task)
    wide = small("bert", hidden_size=64)
    with pytest.raises(ValueError, match="head of movies reads 32 features, and the model has 64; fit it to"):
        ll.evaluate(wide, probe)
    with pytest.raises(ValueError, match="movies has 2 classes, but its head has 3"):
        ll.Task("movies", task.classes, task.train, task.test, head=nn.Linear(32, 3))


@pytest.mark.parametrize("make", CAUSAL_TASKS)
def test_what_a_model_says_by_itself_has_no_probe(make):
    words = make(part_of("tweets", 20, 20), byte_tokenizer())
    with pytest.raises(ValueError, match="tweets is read from the model's own words, so no head is fitted"):
        ll.tasks.probed(small("llama"), words)


def test_drawn_examples_are_different_ones_by_their_seed():
    examples = ll.Examples(torch.arange(10.0)[:, None], torch.arange(10))
    first = drawn(examples, 4, seed=0)
    assert len(set(first.labels.tolist())) == 4 and torch.equal(first.inputs[:, 0].long(), first.labels)
    assert first.labels.tolist() == drawn(examples, 4, seed=0).labels.tolist()
    assert first.labels.tolist() != drawn(examples, 4, seed=1).labels.tolist()
    assert sorted(drawn(examples, 99, seed=0).labels.tolist()) == list(range(10))
