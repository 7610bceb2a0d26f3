from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_language import byte_tokenizer, part_of, small
from small_sequences import LORA, WINDOW, grid, learn, pairs, retained, small_spectra, small_vit
from torch import nn

import lora_lens as ll
from lora_lens.adapters import PeftMethod
from lora_lens.experiments.continual.strategies import Continued, Joint, Merged, Moving, Separate
from lora_lens.forgetting.window_survival import components_of, survival
from lora_lens.tasks.readouts import HeadReadout
from lora_lens.training import EWC, KLAnchor, L2ToInitial, Regularized, Replay

SETTING_NAMES = ("task-incremental", "domain-incremental", "class-incremental")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """By hand as in a sequence."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(table: pd.DataFrame, column: str = "accuracy") -> np.ndarray:
    """(1 + tasks, tasks): after, place."""
    return table.pivot(index="after", columns="place", values=column).to_numpy()


# --- merging and attaching again ---


@pytest.mark.parametrize("window", [ll.Window.first(8), ll.Window.middle(8), ll.Window.last(8)], ids=str)
def test_merging_and_attaching_again_keep_the_function(window, model, digits):
    now, some = copy.deepcopy(model), "blocks.[05].*"
    for task, images in zip(digits_in_pairs(digits), digits.test.inputs[:60].split(30), strict=True):
        adapted = ll.attach(now, window, targets=some)
        ll.finetune(adapted, task, steps=2, batch_size=8, lr=1e-2, evaluations=2, progress=False)
        merged = copy.deepcopy(adapted).merge_and_unload()
        assert ll.function_error(merged, now, images) > 1e-3
        assert ll.function_error(merged, adapted, images) < 2e-5
        for start in (ll.Window.first(8), ll.Window.middle(8), ll.Window.last(8)):
            assert ll.function_error(ll.attach(merged, start, targets=some), merged, images) < 2e-5
        now = merged


def digits_in_pairs(digits: ll.Task) -> list[ll.Task]:
    whole = digits.first(200, 100)
    return [ll.tasks.only_classes(whole, [2 * i, 2 * i + 1]).first(test=1) for i in range(2)]


def test_so_they_do_with_texts():
    now = small("bert")
    texts = torch.arange(60).view(3, 20)
    for number, window in enumerate((ll.Window.first(4), ll.Window.middle(4), ll.Window.last(4))):
        adapted = ll.attach(now, window)
        task = ll.tasks.text_task(part_of(("tweets", "movies", "tweets")[number], 20, 4), byte_tokenizer())
        ll.finetune(adapted, task, steps=2, batch_size=4, lr=1e-2, evaluations=2, progress=False)
        merged = copy.deepcopy(adapted).merge_and_unload()
        assert ll.function_error(merged, now, {"input_ids": texts}) > 1e-3
        assert ll.function_error(merged, adapted, {"input_ids": texts}) < 2e-5
        assert ll.function_error(ll.attach(merged, window), merged, {"input_ids": texts}) < 2e-5
        now = merged


# --- by hand ---


def by_hand(merged: bool, setting: str, tasks: list[ll.Task]) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Accuracies and losses after each task (rows) on each task, and on the retained one, from 0 tasks on."""
    now, heads = copy.deepcopy(small_vit()), {}
    if not merged:
        now = ll.attach(now, WINDOW, spectra=small_spectra())
    if setting == "domain-incremental":
        heads = dict.fromkeys(range(len(tasks)), tasks[0].new_readout(now, seed=0))
    answers, kept = [], []

    def test(model: nn.Module) -> None:
        unknown = (float("nan"),) * 2
        asked = [ll.evaluate(model, task, heads[i]) if i in heads else None for i, task in enumerate(tasks)]
        answers.append([unknown if one is None else (one.accuracy, one.loss) for one in asked])
        kept.append(ll.evaluate(model, retained()).accuracy)

    if setting == "class-incremental":
        names = tuple(str(i) for i in range(2 * len(tasks)))
        tasks = [
            ll.Task(
                task.name, names, *(ll.Examples(e.inputs, e.labels + 2 * i) for e in (task.train, task.test))
            )
            for i, task in enumerate(tasks)
        ]
    test(now)
    for place, task in enumerate(tasks):
        seed = 1000 * place
        config = ll.Training(lr=2e-2, steps=3, batch_size=8, warmup=0.0, evaluations=2, seed=seed)
        adapted = ll.attach(now, WINDOW, seed=seed) if merged else now
        readout = heads.get(place)
        if setting == "class-incremental":
            fresh = pairs()[place].new_readout(now, seed).head
            old = heads[0].head if heads else None
            readout = HeadReadout(nn.Linear(32, 2 * place + 2), "model")
            with torch.no_grad():
                for part in ("weight", "bias"):
                    rows = [getattr(head, part) for head in (old, fresh) if head is not None]
                    getattr(readout.head, part).copy_(torch.cat(rows))
            heads = dict.fromkeys(range(place + 1), readout)
        run = ll.finetune(adapted, task, config=config, readout=readout, progress=False)
        if setting == "task-incremental":
            heads[place] = HeadReadout(run.head, "model")
        now = adapted.merge_and_unload() if merged else adapted
        test(now)
    return *np.moveaxis(np.array(answers), -1, 0), kept


@pytest.mark.parametrize("setting", SETTING_NAMES)
@pytest.mark.parametrize("strategy", [Merged(), Continued()], ids=str)
def test_a_sequence_is_what_it_is_by_hand(strategy, setting):
    table = learn(strategy, setting=setting, retain=retained(), spectra=small_spectra())
    accuracy, loss, kept = by_hand(strategy == Merged(), setting, pairs()[:3])
    np.testing.assert_array_equal(matrix(table), accuracy)
    np.testing.assert_allclose(matrix(table, "loss"), loss, rtol=1e-5)  # tested through leaner layers
    np.testing.assert_array_equal(table.groupby("after")["retained_accuracy"].first(), kept)
    assert (table["retained_before"] == kept[0]).all() and not table["diverged"].any()
    assert len(set(np.nan_to_num(loss[-1]))) == 3  # the model and the heads moved


def test_the_table_says_what_was_run():
    table = learn(Merged(Replay(9)), tasks=pairs()[:3], orders=[(2, 0, 1), (0, 1, 2)], seeds=(0, 1))
    names = [task.name for task in pairs()[:3]]
    assert len(table) == 2 * 2 * 4 * 3 and table["run"].nunique() == 4
    one = table[(table["order"] == "2 0 1") & (table["seed"] == 1)]
    assert one["task"].tolist() == [names[2], names[0], names[1]] * 4
    assert one["place"].tolist() == [0, 1, 2] * 4 and one["after"].tolist() == sorted([0, 1, 2, 3] * 3)
    said = one.iloc[0]
    assert (said["strategy"], said["method"], said["setting"]) == (
        "merged, replay 9",
        "window",
        "task-incremental",
    )
    assert (said["rank"], said["position"], said["steps"], said["batch_size"]) == (4, 0.5, 3, 8)
    assert table["retained_accuracy"].isna().all() and table["start"].isna().all()
    lora = learn(Continued(), Regularized(LORA, L2ToInitial(0.1)), tasks=pairs()[:2])
    assert lora["position"].dtype == lora["start"].dtype == lora["alpha"].dtype == float
    assert lora["position"].isna().all() and set(lora["method"]) == {"LoRA of rank 4, L2 to initial 0.1"}


def test_a_penalty_holds_each_task_near_where_the_last_left_it():
    known = {"spectra": small_spectra()}
    moved = []
    for strength in (0, 100):
        method = Regularized(ll.FullFineTuning(), L2ToInitial(strength))
        table, drift = stored(Continued(), method, **known)
        moved.append(drift[drift["after"] == 3]["update"].mean())
        assert not table["diverged"].any()
    assert 0 < moved[1] < 0.7 * moved[0]


def stored(*arguments, **others) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table and the drifts."""
    with tempfile.TemporaryDirectory() as folder:
        table = learn(*arguments, store=Path(folder) / "s", **others)
        return table, ll.experiments.ContinualSweep.open(Path(folder) / "s").only(table).drifts()


def test_drifts_are_those_of_the_merged_weights():
    table, drift = stored(Merged(), spectra=small_spectra())
    now = copy.deepcopy(small_vit())
    names = list(small_spectra())
    assert list(drift.columns) == [
        "run",
        "after",
        "layer",
        "update",
        "overlap_left",
        "overlap_right",
        "block_change",
    ]
    assert drift["layer"].tolist() == names * 3 and (drift["run"] == table["run"][0]).all()
    windows = {}
    for place, task in enumerate(pairs()[:3]):
        adapted = ll.attach(now, WINDOW, spectra=small_spectra() if place == 0 else None, seed=1000 * place)
        config = ll.Training(lr=2e-2, steps=3, batch_size=8, warmup=0.0, evaluations=2, seed=1000 * place)
        ll.finetune(adapted, task, config=config, progress=False)
        now = adapted.merge_and_unload()
        for name in names:
            weight, first = (m.get_submodule(name).weight.detach().double() for m in (now, small_vit()))
            if place == 0:
                windows[name] = components_of(weight, WINDOW)
            row = drift[(drift["after"] == place + 1) & (drift["layer"] == name)].iloc[0]
            assert row["update"] == pytest.approx(float((weight - first).norm() / first.norm()), rel=1e-5)
            for column, value in survival(windows[name], weight, WINDOW).items():
                assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-6)
    last = drift[drift["after"] == 3]
    assert (last["block_change"] > 1e-4).all() and (last["overlap_left"] < 1).all()


# --- settings and strategies ---


@pytest.mark.parametrize("setting", SETTING_NAMES)
def test_where_there_is_no_head_yet_there_is_no_answer(setting):
    unknown = np.isnan(matrix(learn(setting=setting)))
    expected = np.zeros((4, 3), dtype=bool)
    if setting != "domain-incremental":
        expected = np.arange(3)[None] >= np.arange(4)[:, None]
    np.testing.assert_array_equal(unknown, expected)


def test_separate_adapters_forget_nothing_and_know_what_they_would_alone():
    table = learn(Separate(), retain=retained(), spectra=small_spectra(), setting="class-incremental")
    losses = matrix(table, "loss")
    for place, task in enumerate(pairs()[:3]):
        assert np.isnan(losses[: place + 1, place]).all() and len(set(losses[place + 1 :, place])) == 1
        adapted = ll.attach(small_vit(), WINDOW, spectra=small_spectra(), seed=1000 * place)
        config = ll.Training(lr=2e-2, steps=3, batch_size=8, warmup=0.0, evaluations=2, seed=1000 * place)
        run = ll.finetune(adapted, task, config=config, progress=False)
        assert losses[-1, place] == run.curve["test_loss"].iloc[-1]
    assert table["retained_accuracy"].nunique() == 1
    assert (table["retained_accuracy"] == ll.evaluate(small_vit(), retained()).accuracy).all()


@pytest.mark.parametrize("setting", SETTING_NAMES)
def test_joint_training_is_tested_at_its_end_alone(setting):
    table = learn(Joint(), retain=retained(), setting=setting)
    assert np.isnan(matrix(table)[:3]).all() and not np.isnan(matrix(table)[3]).any()
    kept = table.groupby("after")["retained_accuracy"].first()
    assert kept.isna().tolist() == [False, True, True, False]
    assert kept[0] == ll.evaluate(small_vit(), retained()).accuracy


def test_joint_training_on_the_same_task_twice_is_training_on_it_with_steps_for_both():
    first = pairs()[0]
    twin = ll.Task("twin", first.classes, first.train, first.test)
    table = learn(Joint(), tasks=[first, twin], setting="domain-incremental", spectra=small_spectra())
    doubled = ll.Task("both", first.classes, first.train.joined(first.train), first.test)
    adapted = ll.attach(small_vit(), WINDOW, spectra=small_spectra())
    config = ll.Training(lr=2e-2, steps=6, batch_size=8, warmup=0.0, evaluations=2)
    run = ll.finetune(adapted, doubled, config=config, progress=False)
    assert matrix(table, "loss")[2].tolist() == [run.curve["test_loss"].iloc[-1]] * 2


def test_moving_trains_another_slot_for_each_task():
    _, drift = stored(Moving(), ll.Window.first(4), spectra=small_spectra())
    _, same = stored(Merged(), ll.Window.first(4), spectra=small_spectra())
    pd.testing.assert_frame_equal(
        *(one[one["after"] == 1].drop(columns="run") for one in (drift, same)), check_exact=True
    )
    later = [one[one["after"] == 3]["block_change"].mean() for one in (drift, same)]
    assert later[0] < 0.2 * later[1]  # what the first slot does is hardly touched


def test_a_sequence_that_diverged_is_not_trained_further():
    for strategy, method in (
        (Merged(), WINDOW),
        (Continued(EWC(1, examples=2)), LORA),
        (Merged(Replay(4)), ll.FullFineTuning()),
    ):
        table = learn(strategy, method, lr=1e20, spectra=small_spectra(), setting="class-incremental")
        assert table["diverged"].tolist() == [False] * 3 + [True] * 9
        assert np.isfinite(matrix(table)[-1]).all()


def test_after_a_task_that_diverged_separate_goes_on():
    far = ll.Examples(pairs()[0].train.inputs * 1e30, pairs()[0].train.labels)
    strange = ll.Task("strange", pairs()[0].classes, far, pairs()[0].test)
    table = learn(Separate(), tasks=[strange, pairs()[1]])
    assert table.groupby("after")["diverged"].first().tolist() == [False, True, False]


def test_the_model_and_the_random_state_stay():
    before, state = copy.deepcopy(small_vit().state_dict()), torch.random.get_rng_state()
    learn(Continued(EWC(1, examples=2)), ll.FullFineTuning(), setting="class-incremental")
    assert all(torch.equal(before[name], tensor) for name, tensor in small_vit().state_dict().items())
    assert all(p.requires_grad for p in small_vit().parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


# --- texts ---


def test_texts_of_two_domains_are_learnt_one_after_the_other():
    tasks = [ll.tasks.text_task(part_of(name, 20, 10), byte_tokenizer()) for name in ("tweets", "movies")]
    table = learn(model=small("bert"), tasks=tasks, setting="domain-incremental", batch_size=4)
    assert set(table["task"]) == {"tweets", "movies"} and table["loss"].notna().all()
    losses = matrix(table, "loss")
    assert len({*losses[:, 0]}) == len({*losses[:, 1]}) == 3
    joint = learn(Joint(), model=small("bert"), tasks=tasks, setting="domain-incremental", batch_size=4)
    assert np.isfinite(matrix(joint, "loss")[2]).all()


def test_full_fine_tuning_under_ewc_skips_what_no_text_passes():
    """BERT's pooler, for one, gives nothing to the mean of the tokens."""
    tasks = [ll.tasks.text_task(part_of(name, 12, 6), byte_tokenizer()) for name in ("tweets", "movies")]
    table = learn(
        Continued(EWC(1, examples=2)), ll.FullFineTuning(), model=small("bert"), tasks=tasks, batch_size=4
    )
    assert not table["diverged"].any()


def test_words_are_read_by_the_model_itself():
    tasks = [
        ll.tasks.label_word_task(part_of(name, 12, 6), byte_tokenizer()) for name in ("tweets", "movies")
    ]
    known = {"model": small("llama"), "tasks": tasks, "batch_size": 4}
    one = learn(Merged(Replay(6)), setting="domain-incremental", **known)
    own = learn(Merged(Replay(6)), setting="task-incremental", **known)
    for after in range(3):
        np.testing.assert_array_equal(matrix(one)[after, :after], matrix(own)[after, :after])
    joint = learn(Joint(), setting="task-incremental", **known)
    assert np.isfinite(matrix(joint)[2]).all()


# --- what is refused ---


def with_names(*names: str) -> list[ll.Task]:
    return [ll.Task(name, t.classes, t.train, t.test) for name, t in zip(names, pairs(), strict=False)]


def three_classes() -> ll.Task:
    return ll.tasks.only_classes(ll.tasks.bundled.digits().first(100, 60), [0, 1, 2])


def words() -> list[ll.Task]:
    return [ll.tasks.label_word_task(part_of(name, 8, 4), byte_tokenizer()) for name in ("tweets", "movies")]


def other_words() -> list[ll.Task]:
    first, _ = words()
    own = [" bad", " good"]
    return [first, ll.tasks.label_word_task(part_of("movies", 8, 4), byte_tokenizer(), words=own)]


def in_a_metric() -> ll.SpectrumSet:
    return ll.spectra(small_vit(), metric=torch.randn(9, 1, 28, 28), progress=False)


WRONG = {
    "a metric": (
        lambda: {"spectra": in_a_metric()},
        r"spectra are in the metric of 9 inputs .*, and of a sequence only the first task would start from",
    ),
    "one task": (lambda: {"tasks": pairs()[:1]}, "at least two tasks, not 1"),
    "one name": (lambda: {"tasks": with_names("a", "b", "a")}, "two tasks have one name"),
    "a setting": (
        lambda: {"setting": "online"},
        "must be one of 'task-incremental', .* not 'online'",
    ),
    "an order": (lambda: {"orders": [(0, 1, 1)]}, r"a permutation of 0 to 2, not \(0, 1, 1\)"),
    "a short order": (lambda: {"orders": [(0, 1)]}, r"a permutation of 0 to 2, not \(0, 1\)"),
    "an order twice": (lambda: {"orders": [(0, 1, 2), (0, 1, 2)]}, "an order is given twice"),
    "classes": (
        lambda: {"tasks": [*pairs()[:1], three_classes()], "setting": "domain-incremental"},
        "need the same classes: .* has 2, .* has 3",
    ),
    "words and classes": (
        lambda: {"tasks": words(), "model": small("llama"), "setting": "class-incremental"},
        "is read from the model's own words, so there is no head that could grow",
    ),
    "other words": (
        lambda: {"tasks": other_words(), "model": small("llama"), "setting": "domain-incremental"},
        "share one head must be read in the same way",
    ),
    "other words at once": (
        lambda: {"tasks": other_words(), "model": small("llama"), "strategy": Joint()},
        "trained at once must be read in the same way",
    ),
    "slots": (
        lambda: {"strategy": Moving(), "method": ll.Window.middle(16)},
        r"has 32 components, which is 2 slots of rank 16, and task 3 needs another",
    ),
    "a window": (lambda: {"method": ll.Window.middle(40)}, "40"),
    "anchor and replay": (
        lambda: {
            "strategy": Merged(Replay(9)),
            "method": Regularized(LORA, KLAnchor(1)),
            "retain": retained(),
        },
        "KL anchor 1 and replay 9 would leave no place for new examples",
    ),
    "an anchor to nothing": (
        lambda: {"method": Regularized(LORA, KLAnchor(1))},
        "KL anchor 1 needs examples of what is to be retained: give retain=",
    ),
    "a batch": (
        lambda: {"strategy": Merged(Replay(9)), "batch_size": 1},
        "replay 9 needs half of each batch, and batch_size is 1",
    ),
    "lr": (lambda: {"lr_": 1.0}, "lr and seed are the grid's"),
    "seed": (lambda: {"seed": 1}, "lr and seed are the grid's"),
    "evaluations": (lambda: {"evaluations": 3}, "evaluations has no sense here, as tests follow tasks"),
    "steps": (lambda: {"steps": 0}, "steps must be at least 1, not 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_before_the_first_step(what, tmp_path):
    make, message = WRONG[what]
    arguments = make()
    if "lr_" in arguments:
        with pytest.raises(ValueError, match=message):
            ll.experiments.continual_sweep(
                small_vit(), pairs(), Merged(), grid(WINDOW), lr=1.0, store=tmp_path / "s"
            )
        return
    with pytest.raises(ValueError, match=message):
        learn(store=tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": "digits"}, "tasks must be a sequence of tasks"),
        ({"tasks": [None, None]}, "each of tasks must be a lora_lens.Task"),
        ({"model": None, "tasks": []}, "at least two tasks|model must be"),
        ({"retain": "digits"}, "retain must be a lora_lens.Task"),
        ({"orders": 3}, "orders must be a sequence"),
        ({"orders": [(0, 1.0, 2)]}, "a task's number in an order must be a whole number"),
        ({"orders": []}, "orders is empty"),
        ({"learning_rate": 1e-3}, "continual_sweep has no setting 'learning_rate'; did you mean 'lr'"),
        ({"jobs": 0}, "jobs, the number of processes"),
        ({"spectra": 1}, "spectra must be what"),
    ],
)
def test_what_is_of_another_kind_is_refused_in_words(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        learn(**wrong)


def test_what_cannot_be_chained_is_refused():
    with pytest.raises(TypeError, match=re.escape("expected a strategy such as Merged(), not <class")):
        learn(Merged)
    with pytest.raises(TypeError, match="is learnt by windows, LoRA, FullFineTuning, PEFT's"):
        learn(Merged(), PeftMethod("eva", 4))
    with pytest.raises(TypeError, match="is learnt by windows, LoRA, FullFineTuning, PEFT's"):
        learn(Merged(), ll.LinearProbe())
    with pytest.raises(TypeError, match="Moving moves a window with a position, not"):
        learn(Moving(), LORA)
