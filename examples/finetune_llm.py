r"""Teach a causal language model to tell classes of texts apart, through a window, and see what it forgets.

    python examples/finetune_llm.py --model FOLDER_OR_HUB_ID --train reviews.jsonl --test more.jsonl \
        --retain articles.jsonl --window 0.5 --rank 16 --lr 5e-4 --steps 200 --output my-lora

The same after ``torchrun --nproc-per-node 2`` or ``accelerate launch`` instead of ``python`` shares each
batch among several processes. ``examples/README.md`` says what it needs in memory, and what was tried.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import lora_lens as ll


@dataclass(frozen=True, eq=False)
class Experiment:
    """All that a run needs, checked."""

    model: PreTrainedModel
    task: ll.Task
    retain: ll.Task | None
    window: ll.Window
    spectra: ll.SpectrumSet
    config: ll.Training


def main() -> None:
    arguments = parsed()
    state = PartialState(cpu=not torch.accelerator.is_available())
    # Its new name is not in transformers 5.0.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    if not state.is_main_process:
        warnings.simplefilter("ignore")  # each process reads the same texts and would say the same
    try:
        experiment = prepared(arguments, state)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if state.is_main_process:
            print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    run = trained(experiment, state, arguments.output)
    if state.is_main_process:
        print(told(run, experiment.retain), f"adapter         {arguments.output}", sep="\n")
    state.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name on the hub, of a causal language model")
    add("--train", type=str, help="file to train on; with --data the name of a split (train)")
    add("--test", type=str, help="file to test on (a fifth of --train); with --data a split (test)")
    add("--data", help="name of a data set on the hub, instead of files")
    add("--config", help="which configuration of --data")
    add("--most", type=int, help="texts of each split of --data at most, drawn at random")
    add("--text", default="text", help="column of the texts (text)")
    add("--label", default="label", help="column of the labels (label)")
    add(
        "--words",
        nargs="+",
        default=[],
        metavar="CLASS=WORD",
        help="what the model says for each class (its name)",
    )
    add("--prompt", default="{text}\\nSentiment:", help="what it is asked; \\n is a new line (%(default)s)")
    add("--most-tokens", type=int, default=512, help="longer texts lose their end (%(default)s)")
    add("--retain", help="file of running text, in the same column, whose rise in loss is the forgetting")
    add("--window", type=float, default=0.5, help="position in the spectrum, 0 to 1 (%(default)s)")
    add("--rank", type=int, default=16, help="components in the window (%(default)s)")
    add("--lr", type=float, default=5e-4, help="learning rate (%(default)s)")
    add("--steps", type=int, default=200, help="(%(default)s)")
    add("--batch-size", type=int, default=16, help="texts per step, of all processes together (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--output", type=Path, required=True, help="new folder for the adapter")
    return parser.parse_args()


def prepared(arguments: argparse.Namespace, state: PartialState) -> Experiment:
    """What the arguments say, the cheapest checks first."""
    if arguments.output.exists():
        raise ValueError(f"{arguments.output} exists already; choose a new folder for --output")
    on_gpu = state.device.type != "cpu"
    window = ll.Window(rank=arguments.rank, position=arguments.window)
    config = ll.Training(
        lr=arguments.lr,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        evaluations=2,
        seed=arguments.seed,
        precision="bfloat16" if on_gpu else "float32",
    )
    if config.batch_size < state.num_processes:
        raise ValueError(f"--batch-size {config.batch_size} is less than one text for each process")
    corpus = read(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    task = ll.tasks.label_word_task(
        corpus,
        tokenizer,
        prompt=arguments.prompt.replace("\\n", "\n"),
        words=words_of(corpus.classes, arguments.words),
        most_tokens=arguments.most_tokens,
    )
    retain = running_text(arguments, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    for wanted in [task] if retain is None else [task, retain]:
        wanted.check_fit(model)
    # Only what the window needs, computed on the GPU where there is one; the weights stay where they are.
    spectra = ll.spectra(model, vectors=[window], device=state.device, progress=state.is_main_process)
    return Experiment(model, task, retain, window, spectra, config)


def read(arguments: argparse.Namespace) -> ll.tasks.Corpus:
    columns = {"text": arguments.text, "label": arguments.label}
    if arguments.data is not None:
        splits = {"train": arguments.train or "train", "test": arguments.test or "test"}
        return ll.tasks.hub_corpus(arguments.data, arguments.config, **splits, **columns, most=arguments.most)
    if arguments.train is None:
        raise ValueError(
            "there is nothing to train on: give --train, a file, or --data, a data set on the hub"
        )
    return ll.tasks.text_corpus(arguments.train, arguments.test, **columns, seed=arguments.seed)


def words_of(classes: Sequence[str], given: Sequence[str]) -> list[str]:
    """One word for each class, with the space that comes before it in running text."""
    pairs = dict(pair.partition("=")[::2] for pair in given)
    if unknown := [name for name in pairs if name not in classes]:
        raise ValueError(
            f"--words: there is no class {unknown[0]!r}; the texts have {', '.join(classes)}, and a word is "
            f"given as {classes[0]}=word"
        )
    return [f" {pairs.get(name, name)}" for name in classes]


def running_text(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> ll.Task | None:
    if arguments.retain is None:
        return None
    corpus = ll.tasks.text_corpus(arguments.retain, text=arguments.text, label=None, seed=arguments.seed)
    return ll.tasks.language_task(corpus, tokenizer)


def trained(experiment: Experiment, state: PartialState, output: Path) -> ll.Run:
    """Every process trains its share; the main one writes what came of it."""
    # In place: otherwise the pretrained weights are kept beside the residual, for ll.detach.
    adapted = ll.attach(experiment.model, experiment.window, spectra=experiment.spectra, inplace=True)
    # Not reentrant: otherwise gradients reach adapters only if the embeddings are made to require them.
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.config.use_cache = False  # of keys and values, which only generation needs
    run = ll.finetune(
        adapted, experiment.task, experiment.retain, experiment.config, progress=state.is_main_process
    )
    if state.is_main_process:
        ll.export(adapted, output)
    return run


def told(run: ll.Run, retain: ll.Task | None) -> str:
    first, last = run.curve.iloc[0], run.curve.iloc[-1]
    lines = [f"accuracy        {first['accuracy']:.4f} -> {last['accuracy']:.4f}"]
    lines += [f"test loss       {first['test_loss']:.4f} -> {last['test_loss']:.4f} nats per text"]
    if retain is not None:
        before, after = first["retained_loss"], last["retained_loss"]
        lines += [f"retained loss   {before:.4f} -> {after:.4f} nats per token"]
        lines += [f"loss rise       {run.loss_rise:+.4f} nats per token"]
        lines += [f"forgetting      {run.forgetting:+.4f} of the next tokens guessed right"]
    lines += ["the training diverged: use a smaller --lr"] if run.diverged else []
    return "\n".join([*lines, f"seconds         {run.seconds:.0f}"])


if __name__ == "__main__":
    main()
