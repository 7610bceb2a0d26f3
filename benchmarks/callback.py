"""What does ForgettingCallback cost a run of transformers' Trainer, beside the evaluations themselves?

    python benchmarks/callback.py        # two evaluations in 60 steps of MiniLM on reviews, on one core

Times are of the processor, so that other work on the machine does not count. The callback's own time is what
passes in its methods but for the answers of the model: the norms of all layers' updates, rows and log.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import options
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import lora_lens as ll
from lora_lens.training import forgetting_monitor

STEPS, MOST = 60, 0.05


class Timed(ll.training.ForgettingCallback):
    """Adds up the processor seconds that pass in its methods."""

    spent = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_train_end"):
            return found

        def timed(*given: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return found(*given, **named)
            finally:
                Timed.spent += time.process_time() - started

        return timed


def timing(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return function(*given, **named)
        finally:
            seconds.append(time.process_time() - started)

    return timed


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(1)
    tokenizer = ll.tasks.bundled.minilm_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(
        ll.tasks.bundled.minilm().name_or_path, num_labels=2
    )
    corpus = ll.tasks.bundled_texts.sentiment("movies")
    ids = tokenizer(list(corpus.train.texts[:500]), truncation=True, max_length=64)["input_ids"]
    data = [{"input_ids": one, "labels": label} for one, label in zip(ids, corpus.train.labels, strict=False)]
    articles = ll.tasks.bundled_texts.articles().test.texts[:100]
    known = ll.tasks.agreement(model, articles, tokenizer=tokenizer, most_tokens=64)
    adapted = ll.attach(model, ll.Window.middle(8), modules_to_save=["classifier"])
    asked: list[float] = []
    forgetting_monitor.evaluate = timing(forgetting_monitor.evaluate, asked)
    watch = Timed(known, every=STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = Trainer(
            adapted, settings, train_dataset=data, processing_class=tokenizer, callbacks=[watch]
        )
        started = time.process_time()
        trainer.train()
        whole = time.process_time() - started
    own = Timed.spent - sum(asked)
    layers = sum(name.startswith("update/") for name in watch.monitor.table)
    plain = whole - Timed.spent
    text = (
        "| | processor seconds |\n|---|---|\n"
        f"| {STEPS} steps of Trainer without the callback | {plain:.1f} |\n"
        f"| evaluations: before, and two of {len(known.test)} texts | {sum(asked):.2f} |\n"
        f"| the callback beside them: {layers} layers' updates, twice | {own:.3f} |\n"
        f"| its share of the run | {100 * own / plain:.2f} % |\n"
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "callback.md").write_text(text)
    if own > MOST * plain:
        raise SystemExit(f"the callback takes more than {100 * MOST:.0f} % of the run")


if __name__ == "__main__":
    main()
