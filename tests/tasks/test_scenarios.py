from __future__ import annotations

import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from small_sequences import pairs, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.tasks.readouts import HeadReadout, LabelWords
from lora_lens.tasks.scenarios import (
    ClassIncremental,
    DomainIncremental,
    OwnHeads,
    TaskIncremental,
    all_at_once,
    grown,
    one_of,
    relabelled,
)

KINDS = [TaskIncremental, DomainIncremental, ClassIncremental]


def run_through(kind: type, places: int = 3):
    scenario = kind(pairs())
    scenario.prepare(small_vit(), 0)
    for place in range(places):
        scenario.begin(place, small_vit(), 10 + place)
    return scenario


def test_each_task_has_a_head_of_its_own():
    scenario = TaskIncremental(pairs())
    scenario.prepare(small_vit(), 0)
    assert scenario.asked(0, 0) is None and scenario.shared() is None and scenario.state() == {}
    for place in range(3):
        scenario.begin(place, small_vit(), 10 + place)
        task, readout = scenario.trained(place)
        assert task is pairs()[place] and readout.head.out_features == 2
        assert torch.equal(readout.head.weight, task.new_readout(small_vit(), 10 + place).head.weight)
        assert all(p.requires_grad for p in readout.parameters())
        for earlier in range(place):
            assert not any(p.requires_grad for p in scenario.readouts[earlier].parameters())
        assert scenario.asked(place, place) is None and scenario.asked(place, place + 1)[1] is readout


def test_one_head_serves_all_domains_from_the_start():
    scenario = DomainIncremental(pairs())
    scenario.prepare(small_vit(), 4)
    readout = scenario.shared()
    assert torch.equal(readout.head.weight, pairs()[0].new_readout(small_vit(), 4).head.weight)
    for place in range(4):
        assert scenario.asked(place, 0) == (pairs()[place], readout)
        scenario.begin(place, small_vit(), 9)
        assert scenario.trained(place) == (pairs()[place], readout)
    assert all(p.requires_grad for p in readout.parameters())


def test_the_head_grows_by_the_classes_of_each_task():
    scenario = ClassIncremental(pairs())
    scenario.prepare(small_vit(), 0)
    assert scenario.shared() is None and scenario.asked(0, 0) is None
    before = torch.empty(0, 32)
    for place in range(4):
        scenario.begin(place, small_vit(), 10 + place)
        task, readout = scenario.trained(place)
        head = readout.head
        fresh = pairs()[place].new_readout(small_vit(), 10 + place).head
        assert torch.equal(head.weight, torch.cat([before, fresh.weight]))
        assert head.out_features == 2 * place + 2 and all(p.requires_grad for p in head.parameters())
        assert task.classes == tuple(str(digit) for digit in range(2 * place + 2))
        for old in range(place + 1):
            seen, same = scenario.asked(old, place + 1)
            assert same is readout is scenario.shared() and seen.classes == task.classes
            for part in ("train", "test"):
                expected = getattr(pairs()[old], part).labels + 2 * old
                assert torch.equal(getattr(seen, part).labels, expected)
        assert place == 3 or scenario.asked(place + 1, place + 1) is None
        with torch.no_grad():
            head.weight.mul_(1.5)
        before = head.weight.detach().clone()


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_come_back_from_their_state(kind):
    scenario = run_through(kind)
    with torch.no_grad():
        for place in range(3):
            scenario.trained(place)[1].head.weight.add_(0.1)
    state = scenario.state()
    again = kind(pairs())
    again.restore(state, small_vit())
    images = pairs()[0].test.inputs
    for place in range(3):
        logits = [s.trained(place)[1](small_vit(), images, images)[0] for s in (scenario, again)]
        assert torch.equal(*logits)
    with torch.no_grad():
        scenario.trained(2)[1].head.weight.add_(1)
    for name, kept in state.items():  # not what is trained on
        assert all(torch.equal(tensor, again.state()[name][part]) for part, tensor in kept.items())
    if kind is TaskIncremental:
        assert not any(p.requires_grad for r in again.readouts.values() for p in r.parameters())
    else:
        assert all(p.requires_grad for p in again.shared().parameters())


def test_a_grown_head_gives_the_old_answers_and_the_new_ones():
    old, new = nn.Linear(5, 2), nn.Linear(5, 3)
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    together = grown(old, new)(features)
    assert torch.allclose(together, torch.cat([old(features), new(features)], dim=1), atol=1e-6)


# --- all tasks at once ---


def unequal() -> list[ll.Task]:
    whole = ll.tasks.bundled.digits().first(200, 80)
    groups = ([0, 1], [2, 3, 4], [5, 6])
    return [ll.tasks.only_classes(whole, group) for group in groups]


def test_own_heads_have_the_loss_of_separate_heads():
    tasks = unequal()
    together, readout = all_at_once("task-incremental", tasks, small_vit(), seed=3)
    assert isinstance(readout, OwnHeads) and readout.head.out_features == 7
    assert len(together.train) == sum(len(task.train) for task in tasks)
    start, losses = 0, []
    for place, task in enumerate(tasks):
        own, head = one_of("task-incremental", tasks, place, readout)
        assert own is task and head.head.out_features == len(task.classes)
        rows = torch.arange(start, start + len(task.train))
        start += len(task.train)
        logits, labels = head(small_vit(), task.train.inputs, task.train.labels)
        expected = nn.functional.cross_entropy(logits, labels, reduction="none")
        masked, moved = readout(small_vit(), together.train.inputs[rows], together.train.labels[rows])
        found = nn.functional.cross_entropy(masked, moved, reduction="none")
        torch.testing.assert_close(found, expected)
        assert torch.isinf(masked).sum(1).eq(7 - len(task.classes)).all()
        losses.append(found)
    mean = nn.functional.cross_entropy(*readout(small_vit(), together.train.inputs, together.train.labels))
    torch.testing.assert_close(mean, torch.cat(losses).mean())
    mean.backward()
    assert torch.isfinite(readout.head.weight.grad).all() and readout.head.weight.grad.any(1).all()


def test_at_once_the_settings_differ_in_the_head_alone():
    tasks = unequal()
    together, readout = all_at_once("class-incremental", tasks, small_vit(), seed=3)
    assert isinstance(readout, HeadReadout) and together.classes == tuple("0123456")
    labels = torch.cat([t.train.labels + o for t, o in zip(tasks, (0, 2, 5), strict=True)])
    assert torch.equal(together.train.labels, labels)
    assert torch.equal(together.train.inputs, torch.cat([t.train.inputs for t in tasks]))
    last, same = one_of("class-incremental", tasks, 2, readout)
    assert same is readout and torch.equal(last.test.labels, tasks[2].test.labels + 5)

    together, readout = all_at_once("domain-incremental", pairs(), small_vit(), seed=3)
    assert readout.head.out_features == 2 and len(together.train) == 160
    assert one_of("domain-incremental", pairs(), 1, readout) == (pairs()[1], readout)


# --- what is refused ---


def texts(pooling: str) -> ll.Task:
    return ll.tasks.text_task(part_of("movies", 8, 4), byte_tokenizer(), pooling=pooling)


def words(name: str, own: list[str] | None = None) -> ll.Task:
    return ll.tasks.label_word_task(part_of(name, 8, 4), byte_tokenizer(), words=own)


def test_tasks_that_cannot_share_a_head_are_refused():
    with pytest.raises(ValueError, match=r"need the same classes: .* has 2, .* has 3; use"):
        DomainIncremental(unequal())
    with pytest.raises(ValueError, match="movies is read from the model's own words"):
        ClassIncremental([words("movies"), words("tweets")])
    for kind in (DomainIncremental, ClassIncremental):
        with pytest.raises(ValueError, match="share one head must be read in the same way"):
            kind([texts("mean"), texts("last")])
    with pytest.raises(ValueError, match="share one head must be read in the same way"):
        DomainIncremental([words("movies"), words("tweets", [" bad", " good"])])
    for tasks in ([texts("mean"), texts("last")], [words("movies"), words("tweets", [" bad", " good"])]):
        TaskIncremental(tasks)
        with pytest.raises(ValueError, match="are trained at once must be read in the same way"):
            all_at_once("task-incremental", tasks, small("llama"), seed=0)


@pytest.mark.parametrize("kind", [TaskIncremental, DomainIncremental])
def test_words_need_no_head(kind):
    tasks, model = [words("movies"), words("tweets")], small("llama")
    scenario = kind(tasks)
    scenario.prepare(model, 0)
    for place in range(2):
        scenario.begin(place, model, 0)
        task, readout = scenario.trained(place)
        assert task is tasks[place] and isinstance(readout, LabelWords) and not list(readout.parameters())
    again = kind(tasks)
    again.restore(scenario.state(), model)
    answers = [ll.evaluate(model, *s.asked(1, 2)).loss for s in (scenario, again)]
    assert answers[0] == answers[1]


def test_classes_of_one_name_in_several_tasks_are_told_apart():
    task = pairs()[0]
    names = ["0", "1", "0", "1", "0", "0 (2)"]
    assert relabelled(task, 2, names).classes == ("0", "1", "0 (2)", "1 (2)", "0 (3)", "0 (2) (2)")
    scenario = ClassIncremental([task] * 3)
    for place in range(3):
        scenario.begin(place, small_vit(), place)
    found, _ = scenario.trained(2)
    assert len(found.classes) == 6 and found.train.labels.unique().tolist() == [4, 5]
