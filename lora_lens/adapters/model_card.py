"""The card of an exported adapter, in the format of the Hugging Face hub: what it is, learned and forgot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_lens._base.errors import InputError, InputTypeError, MissingFileError
from lora_lens._base.naming import counted, listed
from lora_lens._base.validate import flag, instance, shown
from lora_lens.adapters.replacing import ABOUT, CARD, CONFIG, WEIGHTS, place_of
from lora_lens.tasks.agreement_task import AgreementTask
from lora_lens.tasks.task import Examples, Task
from lora_lens.tasks.text import LanguageTask

if TYPE_CHECKING:
    from lora_lens.adapters.adapted import AdaptedModel

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FROM_RUN = ("config", "accuracy", "retained_before", "retained_accuracy", "loss_rise")


class TrainingSettings(Protocol):
    """What a card says of the settings of a run."""

    @property
    def lr(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


class TrainedRun(Protocol):
    """A :class:`lora_lens.Run`, as far as its card is concerned."""

    @property
    def config(self) -> TrainingSettings: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def retained_before(self) -> float: ...
    @property
    def retained_accuracy(self) -> float: ...
    @property
    def loss_rise(self) -> float: ...


@dataclass(frozen=True)
class Score:
    """What is known of one task.

    Attributes:
        task: its name.
        kind: the hub's word for what is done there, such as image-classification.
        after: the trained model's accuracy, in [0, 1].
        before: the pretrained model's; None for what it had not learned yet.
        loss_rise: of a task that it knew, in nats.
        measure: what ``before`` and ``after`` are: "accuracy", or "agreement" with the pretrained answers.
    """

    task: str
    kind: str
    after: float
    before: float | None = None
    loss_rise: float = float("nan")
    measure: str = "accuracy"


def scores_of(run: object, task: Task | None, retain: Task | None) -> list[Score]:
    """What a run learned and forgot.

    Raises:
        TypeError: ``run`` is no run, or a task no task.
    """
    for name, one in (("task", task), ("retain", retain)):
        instance(one, (Task, type(None)), name, "the task that the run had, or None")
    if any(not hasattr(run, name) for name in FROM_RUN):
        raise InputTypeError(f"run must be what ll.finetune returns, not {shown(run)}")
    found: Any = run
    scores = [Score("the new task" if task is None else task.name, kind_of(task), found.accuracy)]
    before, after = found.retained_before, found.retained_accuracy
    if before == before:  # NaN where no task was retained
        name = "the retained task" if retain is None else retain.name
        measure = "agreement" if isinstance(retain, AgreementTask) else "accuracy"
        scores.append(Score(name, kind_of(retain), after, before, found.loss_rise, measure))
    return scores


def kind_of(task: Task | None) -> str:
    """The hub's word for a task."""
    if isinstance(task, LanguageTask):
        return "text-generation"
    examples = None if task is None else getattr(task.test, "asked", task.test)  # an agreement's inputs
    images = task is None or (isinstance(examples, Examples) and len(examples.shape) == 3)
    return "image-classification" if images else "text-classification"


def write_card(
    folder: Path,
    peft_model: AdaptedModel,
    ranks: Mapping[str, int],
    training: Mapping[str, object],
    scores: Sequence[Score],
) -> None:
    """Write README.md.

    Args:
        ranks: as they were written, by layer.
        training: what else is to be said of it, by name.
        scores: the new task's first; none where nothing was measured.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    record = peft_model.attachment
    base = str(next(iter(peft_model.peft_config.values())).base_model_name_or_path or "")
    known = base if HUB_ID.fullmatch(base) and not Path(base).exists() else None
    results = []
    for score in scores:
        measures = {score.measure: score.after}
        if score.before is not None:
            measures |= {"forgetting": score.before - score.after, "loss_rise": score.loss_rise}
        results += [
            EvalResult(
                task_type=score.kind,
                dataset_type=re.sub(r"\W+", "_", score.task),
                dataset_name=score.task,
                metric_type=measure,
                metric_value=round(float(value), 6),
            )
            for measure, value in measures.items()
            if value == value
        ]
    data = ModelCardData(
        base_model=known,
        library_name="peft",
        tags=["lora", "lora_lens"],
        model_name="adapter" if results else None,
        eval_results=results or None,
    )
    start = next(iter(record.starts.values()), None)
    rows = {
        "start": record.method,
        "components": "none" if start is None or not len(start.components) else _places(record.starts),
        "variant": str(record.variant),
        "rank in this file": listed(map(str, sorted(set(ranks.values())))),
        "layers": f"{len(ranks)}: {listed(ranks, most=4)}",
        **training,
    }
    text = f"""# LoRA adapter{f" for {known}" if known else ""}

Trained with lora_lens, which starts LoRA from a window of a pretrained weight's singular values. This is an
ordinary LoRA for the unchanged pretrained model: it is written relative to that model, so its rank is up to
twice the one that was trained.

| | |
|---|---|
{_rows(rows.items())}

## What it learned, and what it forgot

{_told(scores)}

## How to load it

```python
from peft import PeftModel

model = ...  # {known or "the pretrained model that the adapter was trained on"}
model = PeftModel.from_pretrained(model, "THIS FOLDER OR REPOSITORY")
```

`lora_lens.load(model, folder)` also compares the model's weights with those that the adapter was made for.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD)


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload an exported adapter with its card to the Hugging Face hub, through huggingface_hub.

    PEFT's own ``push_to_hub`` uploads factors that fit the residual base only.

    Args:
        folder: what :func:`lora_lens.export` wrote. Only the adapter, its card and lora_lens.json are sent.
        repo_id: such as "name/my-adapter"; made if there is none. ``HF_ENDPOINT`` names another hub.
        private: whether a new repository is; default as the account has it.
        token: default the one that huggingface_hub finds.

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``folder`` was not written by :func:`lora_lens.export`, or ``repo_id`` is no name.
        FileNotFoundError: there is no such folder.
        TypeError: an argument is of another type.
        OSError: the hub does not answer, or refuses.

    Example:
        >>> import lora_lens as ll
        >>> try:
        ...     ll.adapters.push_to_hub("no folder", "name/my-adapter")
        ... except FileNotFoundError as error:
        ...     print(str(error).startswith("there is no folder"))
        True
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    place = place_of(folder)
    if not place.is_dir():
        raise MissingFileError(f"there is no folder {place}; give one that ll.export wrote")
    files = (CARD, CONFIG, WEIGHTS, ABOUT)
    if missing := [name for name in files if not (place / name).is_file()]:
        raise InputError(
            f"{place} lacks {listed(missing)}, so ll.export did not write it: factors of ll.save or of PEFT "
            "may fit a residual base only; export the adapter first"
        )
    instance(repo_id, str, "repo_id", 'a name such as "name/my-adapter"')
    if private is not None:
        flag(private, "private")
    api = HfApi(token=token, library_name="lora_lens")
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise InputError(f"repo_id is no name of a repository: {error}") from error
    done = api.upload_folder(
        repo_id=name,
        folder_path=place,
        allow_patterns=list(files),
        commit_message="LoRA adapter by lora_lens",
    )
    return str(done.commit_url)


def _places(starts: Mapping[str, Any]) -> str:
    """The first and the last component over all layers, as one range where they agree."""
    ranges = {(int(s.components[0]), int(s.components[-1])) for s in starts.values() if len(s.components)}
    first, last = min(ranges)
    more = "" if len(ranges) == 1 else f", and {counted(len(ranges) - 1, 'other range')} by layer"
    return f"{first} to {last} of each layer's singular values, the largest being 0{more}"


def _rows(pairs: Any) -> str:
    return "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in pairs)


def _told(scores: Sequence[Score]) -> str:
    if not scores:
        return "Not measured: `ll.export(..., run=run, task=task, retain=retain)` writes it here."
    lines = ["| task | measure | before | after | forgetting (points) | rise of the loss (nats) |"]
    lines.append("|---|---|---|---|---|---|")
    for score in scores:
        kept = ["", f"{100 * score.after:.1f}%", "", ""]
        if score.before is not None:
            kept = [f"{100 * score.before:.1f}%", kept[1], f"{100 * (score.before - score.after):.1f}"]
            kept.append(f"{score.loss_rise:.3f}" if score.loss_rise == score.loss_rise else "")
        lines.append(f"| {score.task} | {score.measure} | {' | '.join(kept)} |")
    return "\n".join(lines)
