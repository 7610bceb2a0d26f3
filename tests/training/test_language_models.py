from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_language import VOCABULARY, byte_tokenizer, part_of, small
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import lora_lens as ll
from lora_lens.experiments.identity import ANSWERS, MODEL_SETTINGS, experiment_identity

SHORT = {"steps": 4, "batch_size": 8, "evaluations": 2, "progress": False}
QUESTIONS, TOKENS = ("What is the capital of France?", "What is the opposite of hot?"), 8


@pytest.fixture(scope="module")
def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    return ll.tasks.bundled.smollm2(), ll.tasks.bundled.smollm2_tokenizer()


@pytest.fixture(scope="module")
def as_it_was(smollm2, articles) -> tuple[ll.tasks.Answers, pd.DataFrame]:
    """What it answers without a window, and what it says."""
    return ll.evaluate(smollm2[0], articles), ll.forgetting.replies(*smollm2, QUESTIONS, TOKENS)


@pytest.fixture(scope="module")
def articles(smollm2) -> ll.Task:
    return ll.tasks.language_task(ll.tasks.bundled_texts.articles(), smollm2[1], block=32).first(
        train=8, test=4
    )


def running(name: str = "tweets", train: int = 40, test: int = 20) -> ll.Task:
    return ll.tasks.language_task(part_of(name, train, test), byte_tokenizer(), block=16)


def classified(name: str = "movies", train: int = 48, test: int = 24) -> ll.Task:
    return ll.tasks.text_task(part_of(name, train, test), byte_tokenizer())


def plain_loss(model: PreTrainedModel, task: ll.Task) -> float:
    """transformers' own next-token loss; all blocks predict as many tokens."""
    blocks = task.test.tokens.long().view(len(task.test), -1)
    with torch.inference_mode():
        return float(np.mean([float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in blocks]))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# SmolLM2 itself


def test_smollm2_is_the_same_model_under_every_window(smollm2, articles, as_it_was):
    (model, _), (before, said) = smollm2, as_it_was
    targets = "layers.[0-2].*"
    spectra = ll.spectra(model, targets, progress=False)
    assert len(spectra) == 3 * 7
    assert before.loss == pytest.approx(plain_loss(model, articles), abs=1e-5)
    assert said["reply"].tolist()[0] == "The capital of France is Paris."
    for window in ll.windows(rank=8, count=3):
        adapted = ll.attach(model, window, targets=targets, spectra=spectra)
        now = ll.evaluate(adapted, articles)
        assert now.loss == pytest.approx(before.loss, abs=1e-6)
        np.testing.assert_allclose(now.losses, before.losses, atol=2e-4)
        assert np.array_equal(now.predicted, before.predicted)


def test_smollm2_is_the_same_model_with_a_window_on_every_layer(smollm2, articles, as_it_was):
    (model, tokenizer), (before, said) = smollm2, as_it_was
    adapted = ll.attach(model, ll.Window.first(8))
    assert len(ll.summary(adapted)) == 30 * 7
    now = ll.evaluate(adapted, articles)
    assert now.loss == pytest.approx(before.loss, abs=1e-6)
    np.testing.assert_allclose(now.losses, before.losses, atol=2e-4)
    pd.testing.assert_frame_equal(ll.forgetting.replies(adapted, tokenizer, QUESTIONS, TOKENS), said)


def test_the_loss_rise_is_that_of_plain_transformers(smollm2, articles):
    model, tokenizer = smollm2
    tweets = ll.tasks.language_task(ll.tasks.bundled_texts.sentiment("tweets"), tokenizer, block=32)
    adapted = ll.attach(model, ll.Window.first(8), targets="layers.[0-1].mlp.*")
    run = ll.finetune(
        adapted, tweets.first(16, 2), articles, steps=2, batch_size=4, evaluations=2, lr=2e-2, progress=False
    )
    before, after = plain_loss(model, articles), plain_loss(adapted.merge_and_unload(), articles)
    assert run.loss_rise == pytest.approx(after - before, abs=2e-5)
    assert abs(run.loss_rise) > 0.01
    assert len(run.items) == len(articles.test) * 31


# Learning


def test_minilm_learns_the_sentiment_of_film_reviews():
    model, tokenizer = ll.tasks.bundled.minilm(), ll.tasks.bundled.minilm_tokenizer()
    task = ll.tasks.text_task(ll.tasks.bundled_texts.sentiment("movies"), tokenizer).first(test=60)
    known = ll.tasks.text_task(ll.tasks.bundled_texts.genres(), tokenizer).first(test=60)
    known = ll.tasks.probed(model, known, examples=120)
    adapted = ll.attach(model, ll.Window.middle(8), targets="layer.[3-5].*")
    run = ll.finetune(adapted, task, known, steps=10, batch_size=12, evaluations=2, lr=5e-3, progress=False)
    assert run.accuracy > run.curve["accuracy"].iloc[0] + 0.1
    assert run.curve["test_loss"].iloc[-1] < run.curve["test_loss"].iloc[0]
    assert run.retained_before > 0.7 and run.head.in_features == 384
    assert run.retained_accuracy == ll.evaluate(adapted, known).accuracy


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_learns_which_word_comes_next(kind):
    films = [f"film number {n} was {'fine' if n % 2 else 'poor'}" for n in range(60)]
    parts = (
        ll.tasks.Texts(films[part], [n % 2 for n in range(60)][part]) for part in (slice(40), slice(40, 60))
    )
    task = ll.tasks.label_word_task(ll.tasks.Corpus("films", ("bad", "good"), *parts), byte_tokenizer())
    adapted = ll.attach(small(kind), ll.Window.middle(8))
    run = ll.finetune(adapted, task, **SHORT | {"steps": 40, "evaluations": 3}, lr=1e-2)
    assert run.accuracy == 1 and run.curve["test_loss"].iloc[-1] < 0.3 < run.curve["test_loss"].iloc[0]
    assert run.head is None


def test_a_model_learns_to_continue_texts():
    task = running(train=200, test=40)
    adapted = ll.attach(small("llama"), ll.LoRA(8))
    run = ll.finetune(adapted, task, task, **SHORT | {"steps": 20}, lr=1e-2)
    assert run.curve["test_loss"].iloc[-1] < run.curve["test_loss"].iloc[0] - 0.1
    assert run.curve["test_loss"].tolist() == run.curve["retained_loss"].tolist()
    assert run.loss_rise == pytest.approx(run.curve["test_loss"].diff().iloc[-1])
    assert run.items["label"].tolist() == [t for ids in task.test.tokens.split(16) for t in ids[1:].tolist()]


# How a run goes


def test_dropout_follows_the_seed_and_the_global_random_state_stays():
    task, known = classified(), running()

    def run(dropout: float, seed: int = 0) -> pd.DataFrame:
        model = small("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        return ll.finetune(ll.attach(model, ll.Window.middle(4)), task, known, **SHORT, seed=seed).curve

    first = run(0.2)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    pd.testing.assert_frame_equal(first, run(0.2), check_exact=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first["loss"].iloc[-1] != run(0.0)["loss"].iloc[-1]
    assert first["test_loss"].iloc[0] == run(0.0)["test_loss"].iloc[0]  # testing is without dropout
    assert not first.equals(run(0.2, seed=1))


def test_bfloat16_learns_much_the_same():
    task, known = classified(), running()

    def run(precision: str) -> ll.Run:
        adapted = ll.attach(small("llama"), ll.Window.middle(4))
        found = ll.finetune(adapted, task, known, **SHORT, lr=3e-3, precision=precision)
        assert {p.dtype for p in adapted.parameters()} == {torch.float32}
        return found

    exact, low = run("float32"), run("bfloat16")
    assert low.config.precision == "bfloat16"
    for column in ("loss", "test_loss", "retained_loss"):
        assert low.curve[column].iloc[-1] != exact.curve[column].iloc[-1]
        assert low.curve[column].iloc[-1] == pytest.approx(exact.curve[column].iloc[-1], rel=0.02)
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bfloat16', not 'float16'"):
        ll.Training(precision="float16")


def test_watched_tasks_are_tested_before_and_after():
    model = small("llama")
    task, known = classified(), running()
    words = ll.tasks.label_word_task(part_of("products", 4, 16), byte_tokenizer())
    watch = [words, ll.tasks.probed(model, classified("newspaper"))]
    before = [ll.evaluate(model, t) for t in watch]
    adapted = ll.attach(model, ll.Window.first(4))
    run = ll.finetune(adapted, task, known, **SHORT, lr=3e-2, watch=watch)
    after = [ll.evaluate(adapted, t) for t in watch]
    assert run.watched["task"].tolist() == ["products", "newspaper"]
    for column, found in (("before", before), ("after", after)):
        assert run.watched[column].tolist() == pytest.approx([a.accuracy for a in found])
        losses = run.watched[f"loss_{column}"]
        assert losses.tolist() == pytest.approx([a.loss for a in found], abs=1e-4)
    assert (run.watched["loss_after"] - run.watched["loss_before"]).abs().min() > 0.01
    assert ll.finetune(ll.attach(model, ll.LinearProbe()), task, **SHORT).watched is None


def test_watching_changes_no_other_number():
    task, known = classified(), running()

    def run(watch: list[ll.Task]) -> pd.DataFrame:
        adapted = ll.attach(small("llama"), ll.Window.middle(4))
        return ll.finetune(adapted, task, known, **SHORT, watch=watch).curve

    pd.testing.assert_frame_equal(run([]), run([running("newspaper")]), check_exact=True)


# What is refused, before the first step


def refused(
    message: str, task: ll.Task, model: nn.Module, retain: ll.Task | None = None, **settings: object
) -> None:
    adapted = ll.attach(model, ll.Window.middle(4))
    adapted.eval()
    before = state(adapted)
    with pytest.raises(ValueError, match=message):
        ll.finetune(adapted, task, retain, **SHORT, **settings)
    assert same_state(adapted, before) and not any(m.training for m in adapted.modules())


def test_two_watched_tasks_of_one_name_are_refused():
    watch = [running("tweets"), classified("tweets")]
    refused(
        r"two watched tasks have one name.*\['tweets', 'tweets'\]", classified(), small("llama"), watch=watch
    )


def test_texts_that_do_not_fit_the_model_are_refused_before_any_step():
    minilm = ll.tasks.text_task(part_of("movies", 16, 8), ll.tasks.bundled.minilm_tokenizer())
    words = ll.tasks.label_word_task(part_of("movies", 16, 8), byte_tokenizer())
    other = "they were tokenized for another model"
    refused(other, minilm, small("bert"))
    refused(other, classified(), small("llama"), watch=[minilm])
    refused(other, classified(), small("llama"), retain=minilm)
    for task in (classified(), words):
        refused("takes at most 32; make the task with most_tokens=32", task, small("gpt2", positions=32))
    refused("takes at most 8; make", running(), small("gpt2", positions=8))


def test_a_watched_task_without_a_head_is_refused_before_any_step():
    refused("BertModel has no linear classifier", classified(), small("bert"), watch=[classified("tweets")])
    refused(
        "the model's own head has 400; retain the task",
        classified(),
        small("llama"),
        retain=classified("tweets"),
    )


@pytest.mark.parametrize(
    "task", [running(), ll.tasks.label_word_task(part_of("tweets", 8, 8), byte_tokenizer())]
)
def test_a_linear_probe_cannot_learn_what_the_model_says_itself(task):
    probe = ll.attach(small("llama"), ll.LinearProbe())
    with pytest.raises(
        ValueError, match=r"nothing to train: tweets has no head of its own.*attach an adapter"
    ):
        ll.finetune(probe, task, **SHORT)


# A vocabulary that grows


def test_spectra_outlive_a_larger_vocabulary():
    model, task, known = small("llama"), classified(), running()
    spectra = ll.spectra(model, progress=False)
    before, identity = ll.evaluate(model, known), experiment_identity(model, task, known)
    model.resize_token_embeddings(VOCABULARY + 8)
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    assert ll.summary(adapted)["start_error"].max() < 1e-5
    larger, now = ll.evaluate(model, known), ll.evaluate(adapted, known)
    np.testing.assert_allclose(now.losses, larger.losses, atol=1e-4)
    assert larger.loss >= before.loss  # more words to choose from
    changed = experiment_identity(model, task, known)
    different = {key for key in identity if identity[key] != changed[key]}
    assert different == {"model", MODEL_SETTINGS, ANSWERS}
    assert np.isfinite(ll.finetune(adapted, known, **SHORT).curve["test_loss"]).all()


# Sweeps


@pytest.fixture(scope="module")
def experiment() -> dict:
    model = small("bert")
    return {
        "model": model,
        "task": classified(),
        "retain": ll.tasks.probed(model, classified("tweets")),
        "watch": [
            ll.tasks.probed(model, classified("products")),
            ll.tasks.probed(model, classified("newspaper")),
        ],
        "spectra": ll.spectra(model, progress=False),
    }


GRID = ll.Grid(ll.windows(4, 2), lr=[1e-2], baselines=[ll.LoRA(4), ll.LinearProbe()])


@pytest.fixture(scope="module")
def swept(experiment, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    store = tmp_path_factory.mktemp("sweep") / "s"
    return store, ll.sweep(GRID, **experiment, **SHORT, store=store, jobs=1).table


def test_a_sweep_keeps_what_it_watched(swept, experiment):
    store, table = swept
    watched = ll.Sweep.open(store).only(table).watched()
    assert watched.columns.tolist() == [
        "run", "task", "before", "after", "loss_before", "loss_after", "forgetting", "loss_rise",
    ]  # fmt: skip
    assert watched["run"].tolist() == [run for run in table["run"] for _ in range(2)]
    assert watched["task"].tolist() == ["products", "newspaper"] * 4
    before = [ll.evaluate(experiment["model"], task) for task in experiment["watch"]]
    assert watched["before"].tolist() == [a.accuracy for a in before] * 4
    assert watched["loss_before"].tolist() == pytest.approx([a.loss for a in before] * 4, abs=1e-4)
    pd.testing.assert_series_equal(
        watched["forgetting"], watched["before"] - watched["after"], check_names=False
    )
    rise = watched["loss_after"] - watched["loss_before"]
    pd.testing.assert_series_equal(watched["loss_rise"], rise, check_names=False)
    probe = watched["run"] == table.set_index("method")["run"]["linear probe"]
    assert (watched.loc[probe, "loss_rise"] == 0).all() and (watched.loc[~probe, "loss_rise"] != 0).all()


def test_a_sweep_of_texts_tells_losses_and_drift(swept):
    store, table = swept
    curves = ll.Sweep.open(store).only(table).curves()
    last, first = (curves.groupby("run", sort=False)["retained_loss"].nth(place) for place in (-1, 0))
    assert table["retained_loss"].tolist() == last.tolist()
    assert table["loss_rise"].tolist() == pytest.approx((last.to_numpy() - first.to_numpy()).tolist())
    assert curves["test_loss"].notna().all() and curves["test_loss"].gt(0).all()
    drifts = ll.Sweep.open(store).only(table).drifts()
    assert drifts["run"].nunique() == 3 and drifts["neighbours"].between(0, 1).all()


def test_what_was_watched_is_in_the_packed_file(swept, tmp_path):
    store, table = swept
    file = ll.experiments.pack(store, tmp_path / "s.jsonl.xz")
    pd.testing.assert_frame_equal(
        ll.Sweep.open(file).only(table).watched(),
        ll.Sweep.open(store).only(table).watched(),
        check_exact=True,
    )
    pd.testing.assert_frame_equal(
        ll.Sweep.open(file).only(table).curves(), ll.Sweep.open(store).only(table).curves(), check_exact=True
    )
    names = [part.split()[0] for part in ll.experiments.experiment(file)["identity"]["watch"].split("; ")]
    assert names == ["products", "newspaper"]
    assert set(ll.Sweep.open(file).table["loss_rise"]) == set(table["loss_rise"])


def test_a_folder_of_a_sweep_that_watched_something_else_is_refused(swept, experiment, tmp_path):
    store, table = swept
    for watch in ([], experiment["watch"][:1], experiment["watch"][::-1]):
        with pytest.raises(ValueError, match=r"different experiment \(watch: there products"):
            ll.sweep(GRID, **experiment | {"watch": watch}, **SHORT, store=store, jobs=1)
    one = ll.Grid(ll.windows(4, 2)[:1], lr=[1e-2])
    bare = ll.sweep(one, **experiment | {"watch": ()}, **SHORT, store=tmp_path / "bare", jobs=1).table
    assert bare["accuracy"].tolist() == table["accuracy"].tolist()[:1]
    with pytest.raises(ValueError, match=r"different experiment \(watch: there None, here products"):
        ll.sweep(one, **experiment, **SHORT, store=tmp_path / "bare", jobs=1)
    with pytest.raises(ValueError, match=r"watched other tasks; give the sweep watch=\[...\]"):
        ll.Sweep.open(tmp_path / "bare").only(bare).watched()


def test_a_sweep_over_next_tokens_refuses_a_linear_probe_before_its_first_run(tmp_path):
    grid = ll.Grid(ll.windows(4, 2), baselines=[ll.LinearProbe()])
    tasks = {"model": small("llama"), "task": running(), "retain": running("movies")}
    with pytest.raises(ValueError, match="nothing to train: tweets"):
        ll.sweep(grid, **tasks, **SHORT, store=tmp_path / "s", jobs=1)
    assert not (tmp_path / "s").exists()
    table = ll.sweep(ll.Grid(ll.windows(4, 2)), **tasks, **SHORT, store=tmp_path / "s", jobs=1).table
    assert np.isfinite(table["loss_rise"]).all() and len(
        ll.Sweep.open(tmp_path / "s").only(table).answers()
    ) == 2 * 15 * len(tasks["retain"].test)
