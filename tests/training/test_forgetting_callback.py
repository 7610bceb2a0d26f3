"""What a model forgets in the loops of others, and in one of one's own."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_language import byte_tokenizer, small
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import lora_lens as ll

TEXTS = [f"{way} {what}" for what in ("film", "story", "song", "play") for way in ("a fine", "a dull", "one")]
SCORES = {"eval_retained_accuracy", "eval_forgetting", "eval_retained_loss", "eval_loss_rise", "eval_update"}
WINDOW = ll.Window.first(rank=4)


def arguments(folder: Path, **more: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        } | more,
    )  # fmt: skip


def accuracy(predicted) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


class Reporter(TrainerCallback):
    """Notes what a trainer reports, as those for TensorBoard and others do."""

    def __init__(self) -> None:
        self.rows = []

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append({"step": state.global_step} | dict(logs))


@pytest.fixture(scope="module")
def classification():
    """A small BERT with classes, texts with classes for Trainer, and what the model says of other texts."""
    model, tokenizer = small("bert classifier"), byte_tokenizer()
    data = [
        {"input_ids": ids[:3], "labels": i % 2} for i, ids in enumerate(tokenizer(TEXTS * 2)["input_ids"])
    ]
    known = ll.tasks.agreement(model, [f"not {text}" for text in TEXTS], tokenizer=tokenizer)
    return model, data, known


def trained(classification, folder, *callbacks, model=None, **more):
    base, data, _ = classification
    adapted = ll.attach(base, WINDOW) if model is None else model
    trainer = Trainer(
        adapted, arguments(folder, **more), train_dataset=data, eval_dataset=data[:8],
        compute_metrics=accuracy, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return adapted, trainer


def measured(trainer: Trainer) -> dict[int, dict]:
    """The rows with scores by their step."""
    return {row["step"]: row for row in trainer.state.log_history if "eval_forgetting" in row}


def test_scores_and_drift_go_into_the_log_of_trainer(classification, tmp_path):
    reporter, watch = Reporter(), ll.training.ForgettingCallback(classification[2], every=3)
    plain, whole = trained(classification, tmp_path)
    adapted, trainer = trained(classification, tmp_path, reporter, watch)
    rows = measured(trainer)
    assert list(rows) == [3, 6] and rows[6].keys() >= SCORES
    now = ll.evaluate(adapted, classification[2])
    assert rows[6]["eval_forgetting"] == pytest.approx(1 - now.accuracy) and now.accuracy < 1
    assert rows[6]["eval_loss_rise"] == pytest.approx(now.loss)
    moved = ll.forgetting.drift(adapted, ll.spectra(classification[0], progress=False))
    for name, update in zip(moved["layer"], moved["update"], strict=True):
        assert rows[6][f"eval_update/{name}"] == pytest.approx(update, rel=1e-4)
    assert rows[6]["eval_update"] == pytest.approx(np.linalg.norm(moved["update"]), rel=1e-4)
    # The callback changes nothing, and those that report see its scores although they came before it.
    for name, p in plain.named_parameters():
        assert torch.equal(p, adapted.get_parameter(name))
    assert [row["step"] for row in reporter.rows if "eval_forgetting" in row] == [3, 6]
    assert len(whole.state.log_history) <= len(trainer.state.log_history)
    assert watch.monitor.table["step"].tolist() == [0, 3, 6]
    assert watch.monitor.table["retained_accuracy"][0] == 1


def test_the_best_checkpoint_is_that_of_the_best_trade_off(classification, tmp_path):
    watch = ll.training.ForgettingCallback(classification[2], score="eval_accuracy", weight=5.0, layers=False)
    more = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "trade_off", "greater_is_better": True,
    }  # fmt: skip
    adapted, trainer = trained(classification, tmp_path, watch, **more)
    table, rows = watch.monitor.table, measured(trainer)
    values = {step: row["eval_accuracy"] - 5 * row["eval_forgetting"] for step, row in rows.items()}
    assert list(values) == [1, 2, 3, 4, 5, 6] and len(set(values.values())) > 1
    for step, value in values.items():
        assert rows[step]["eval_trade_off"] == pytest.approx(value)
    best = max(values, key=values.get)
    assert trainer.state.best_global_step == best == watch.monitor.best["step"]
    kept = table.set_index("step").loc[best, "retained_loss"]
    assert ll.evaluate(adapted, classification[2]).loss == pytest.approx(kept, rel=1e-4)  # it was loaded
    assert not any("eval_update/" in key for row in rows.values() for key in row)
    # Asked again afterwards, the scores are those of the checkpoint that was loaded.
    assert trainer.evaluate()["eval_retained_loss"] == pytest.approx(kept, rel=1e-4)


def test_training_stops_early_by_the_trade_off(classification, tmp_path):
    watch = ll.training.ForgettingCallback(classification[2], score="eval_accuracy", weight=100.0)
    more = {
        "max_steps": 40, "learning_rate": 0.1, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "trade_off", "greater_is_better": True,
    }  # fmt: skip
    _, trainer = trained(classification, tmp_path, watch, EarlyStoppingCallback(2), **more)
    assert trainer.state.global_step < 40
    values = [row["eval_trade_off"] for row in measured(trainer).values()]
    assert max(values[-2:]) <= max(values[:-2])


def test_before_is_the_pretrained_model_and_not_the_residual(classification, tmp_path):
    model, data, known = classification
    before = ll.evaluate(model, known)
    adapted = ll.attach(model, WINDOW)
    with adapted.disable_adapter():  # the trap: this is the residual
        assert ll.evaluate(adapted, known).loss > 0.01
    monitor = ll.training.ForgettingMonitor(adapted, known)
    assert monitor.before.accuracy == before.accuracy == 1 and monitor.before.loss < 1e-4

    # Going on from a checkpoint, the adapter is trained, and "before" is still what it started from.
    more = {"save_strategy": "steps", "save_steps": 3}
    trained(classification, tmp_path, model=adapted, **more)
    ll.save(adapted, tmp_path / "adapter")
    watch = ll.training.ForgettingCallback(known, every=3)
    again = ll.attach(model, WINDOW)
    trainer = Trainer(again, arguments(tmp_path, **more), train_dataset=data, callbacks=[watch])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert watch.monitor.before.accuracy == 1 and watch.monitor.before.loss < 1e-4
    assert measured(trainer)[6]["eval_retained_loss"] == pytest.approx(ll.evaluate(again, known).loss)
    trained_already = ll.training.ForgettingMonitor(ll.load(model, tmp_path / "adapter"), known)
    assert trained_already.before.loss < 1e-4 and trained_already.measure(1)["forgetting"] > 0


def test_before_of_adapters_from_elsewhere(classification):
    model, _, known = classification
    plain = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["query"]))
    assert ll.training.ForgettingMonitor(plain, known).before.loss < 1e-4
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="pissa")
    residual = get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match=r"with its adapter.*before=ll\.training\.Before"):
        ll.training.ForgettingMonitor(residual, known)
    given = ll.training.Before(retain=ll.evaluate(model, known))
    monitor = ll.training.ForgettingMonitor(residual, known, before=given)
    assert monitor.measure(0)["retained_loss"] < 1e-4 and "update" not in monitor.table


def test_a_trained_dora_has_no_before(classification):
    model, _, known = classification
    adapted = ll.attach(model, WINDOW, variant=ll.Variant(dora=True))
    assert ll.training.ForgettingMonitor(adapted, known).before.loss < 1e-4
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).mul_(1.1)
    with pytest.raises(ValueError, match=r"DoRA.*before="):
        ll.training.ForgettingMonitor(adapted, known)


def test_what_cannot_be_measured_is_refused_before_the_first_step(classification, tmp_path):
    model, data, known = classification
    with pytest.raises(TypeError, match=r"retain must be a task.*agreement"):
        ll.training.ForgettingCallback(None)
    with pytest.raises(ValueError, match="every must be at least 1"):
        ll.training.ForgettingCallback(known, every=0)
    with pytest.raises(ValueError, match=r"80% is 0\.8"):
        ll.training.ForgettingCallback(known, at_least=80)
    trainer = Trainer(
        ll.attach(model, WINDOW), arguments(tmp_path), train_dataset=data,
        callbacks=[ll.training.ForgettingCallback(known)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="never evaluates"):
        trainer.train()
    watch = ll.training.ForgettingCallback(known, score="eval_f1")
    with pytest.raises(ValueError, match=r"no 'eval_f1'.*eval_accuracy.*compute_metrics=") as refused:
        trained(classification, tmp_path, watch, eval_strategy="steps", eval_steps=2)
    assert "eval_forgetting" not in str(refused.value)
    steps = {"eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match=r"give ForgettingCallback score="):
        trained(
            classification, tmp_path, ll.training.ForgettingCallback(known), **steps,
            metric_for_best_model="trade_off",
        )  # fmt: skip
    two = Trainer(
        ll.attach(model, WINDOW), arguments(tmp_path, eval_strategy="steps", eval_steps=3),
        train_dataset=data, eval_dataset={"one": data[:4], "two": data[4:8]}, compute_metrics=accuracy,
        callbacks=[ll.training.ForgettingCallback(known, score="eval_two_accuracy")],
    )  # fmt: skip
    two.train()  # the first evaluation set lacks the score, and the second has it
    assert sum("eval_trade_off" in row for row in two.state.log_history) == 2
    merged = ll.attach(model, WINDOW)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        ll.training.ForgettingMonitor(merged, known)


def test_training_all_weights_from_a_checkpoint_has_no_before(classification, tmp_path):
    model, data, known = classification
    more = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    trained(classification, tmp_path, model=copy.deepcopy(model), **more)
    watch = ll.training.ForgettingCallback(known, every=3)
    trainer = Trainer(
        copy.deepcopy(model), arguments(tmp_path, **more), train_dataset=data, callbacks=[watch]
    )
    with pytest.raises(ValueError, match="goes on after step 3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_loop_of_ones_own(classification):
    model, _, known = classification
    adapted = ll.attach(model, WINDOW)
    monitor = ll.training.ForgettingMonitor(adapted, known, at_least=0.5)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([ids[:3] for ids in byte_tokenizer()(TEXTS)["input_ids"]])
    for step in range(1, 4):
        nn.functional.cross_entropy(adapted(ids).logits, torch.arange(len(ids)) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.measure(step, accuracy=[0.4, 0.6, 0.7][step - 1])
    table = monitor.table
    assert table["step"].tolist() == [0, 1, 2, 3] and (table["update"].diff()[1:] > 0).all()
    np.testing.assert_allclose(table["trade_off"][2:], -table["forgetting"][2:])
    assert table["trade_off"][1] < -1 and monitor.best["step"] in (2, 3)  # 0.4 does not reach 0.5
    assert adapted.training is False
    with adapted.disable_adapter(), pytest.raises(ValueError, match="is disabled: call enable"):
        monitor.measure(4)  # what it answers then is the residual's, under a window


def test_in_trls_trainers(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    model = small("llama")
    known = ll.tasks.agreement(model, [f"not {text}" for text in TEXTS], tokenizer=tokenizer)
    common = {
        "max_steps": 2, "learning_rate": 3e-2, "bf16": False, "report_to": [], "use_cpu": True,
        "per_device_train_batch_size": 2, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    pairs = datasets.Dataset.from_dict(
        {"prompt": ["say"] * 12, "chosen": TEXTS, "rejected": [text[::-1] for text in TEXTS]}
    )
    for kind, config, data, score in (
        (trl.SFTTrainer, trl.SFTConfig, texts, "eval_mean_token_accuracy"),
        (trl.DPOTrainer, trl.DPOConfig, pairs, "eval_rewards/accuracies"),
    ):
        adapted = ll.attach(model, WINDOW)
        watch = ll.training.ForgettingCallback(known, score=score)
        trainer = kind(
            adapted, args=config(str(tmp_path), **common), train_dataset=data, eval_dataset=data,
            processing_class=tokenizer, callbacks=[watch],
        )  # fmt: skip
        trainer.train()
        row = measured(trainer)[2]
        assert row.keys() >= {*SCORES, score, "eval_trade_off"} and row["eval_update"] > 0
        assert row["eval_trade_off"] == pytest.approx(row[score] - row["eval_forgetting"])
        assert watch.monitor.before.loss < 1e-4 and row["eval_retained_loss"] > 1e-4
        assert row["eval_retained_loss"] == pytest.approx(ll.evaluate(adapted, known).loss, rel=1e-3)
