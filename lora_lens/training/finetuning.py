"""One short fine-tuning run: learn a task, and watch what the model forgets meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.processes import accelerator as accelerator_of_all
from lora_lens._base.progress import progress_bar
from lora_lens._base.validate import flag, instance, sequence, shown
from lora_lens.tasks.evaluation import check_examples
from lora_lens.tasks.readouts import Readout
from lora_lens.tasks.task import Task
from lora_lens.training.loop import TrainingLoop, new_examples
from lora_lens.training.record import Before, Record
from lora_lens.training.regularizers.base import Regularizer
from lora_lens.training.run import Progress, Run
from lora_lens.training.settings import Training, training_with


def finetune(
    model: nn.Module,
    task: Task,
    retain: Task | None = None,
    config: Training | None = None,
    *,
    regularizer: Regularizer | None = None,
    readout: Readout | None = None,
    watch: Sequence[Task] = (),
    before: Before | None = None,
    progress: bool = True,
    on_step: Callable[[Progress], object] | None = None,
    **settings: object,
) -> Run:
    """Train the trainable part of ``model``, and the head that the task needs beside it, on ``task``.

    A classification by a head gets a new one, which reads the same features as the model's own; the own one
    stays as it is, and tests the retained task on the adapted features. Frozen batch norms keep their
    statistics. Blocks below the first that is trained run once per example where that changes nothing
    (:mod:`lora_lens.training.prefix_cache`). The model is trained in place, on the device that accelerate
    picks; started by torchrun or accelerate launch, each process takes its part of every batch, and all end
    with the same weights. The same seed on the same machine with the same number of threads gives the same
    numbers.

    Args:
        model: from :func:`lora_lens.attach`.
        task: what to learn.
        retain: what the model could do before, by itself or with the head of :func:`lora_lens.tasks.probed`.
        config: the settings; default those of ``Training()``.
        regularizer: added to the loss of every step against forgetting, see
            :mod:`lora_lens.training.regularizers`. One that needs examples of its own takes them out of
            ``batch_size``, so a step costs the same.
        readout: reads the task's answers and is trained with the model; default a new one, from the task.
        watch: more that the model could do before, tested before the first and after the last step only.
        before: answers of the pretrained model that are at hand, or that count where ``model`` starts with
            another function; default those of ``model`` before the first step.
        progress: show a bar with the loss and both scores.
        on_step: called with a :class:`Progress` before the first step and after each. The run waits for it,
            and ends once it returns something true; then the tasks are tested there, as after the last
            step. Each of several processes calls it, and all of them end as soon as one call does.
        settings: of :class:`Training`, by name; they replace those of ``config``.

    Returns:
        What the run learnt and forgot, a :class:`lora_lens.Run`.

    Raises:
        ValueError: there is nothing to train, a task does not fit the model (another tokenizer, texts that
            are too long, images of another size, no linear classifier, other classes than the model's head),
            the regularizer does not fit, gradients are off, or a batch has fewer examples than there are
            processes.
        TypeError: an argument is of another type, or there is no such setting.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> import lora_lens as ll
        >>> shape = {"img_size": 28, "patch_size": 14, "in_chans": 1, "num_classes": 2}
        >>> model = VisionTransformer(**shape, embed_dim=16, depth=1, num_heads=2)  # random weights
        >>> images = ll.Examples(torch.randn(20, 1, 28, 28), torch.arange(20) % 2)
        >>> task = ll.Task("noise", ("even", "odd"), images, images)
        >>> adapted = ll.attach(model, ll.Window.middle(4))
        >>> run = ll.finetune(adapted, task, retain=task, steps=2, batch_size=10, progress=False)
        >>> run.curve["step"].tolist(), 0 <= run.accuracy <= 1, -1 <= run.forgetting <= 1
        ([0, 1, 2], True, True)
    """
    config = training_with(settings, "finetune", config)
    watch = _checked_tasks(model, task, retain, watch, regularizer, readout, on_step)
    progress = flag(progress, "progress")
    names = [t.name for t in watch]
    if len(set(names)) < len(names):
        raise InputError(f"two watched tasks have one name, and their rows could not be told apart: {names}")
    new = (task, task.new_readout(model, config.seed) if readout is None else readout)
    retained = None if retain is None else (retain, retain.own_readout(model))
    watched = [(t, t.own_readout(model)) for t in watch]
    accelerator = accelerator_of_all()
    if (size := new_examples(config, regularizer)) < accelerator.num_processes:
        raise InputError(
            f"{size} new examples per step cannot be shared by {accelerator.num_processes} processes; use a "
            f"larger batch_size than {config.batch_size}"
        )
    for part in (model, new[1]):
        part.to(accelerator.device)
    for test in [new, *([] if retained is None else [retained]), *watched]:
        check_examples(model, *test, precision=config.precision)
    instance(before, (Before, type(None)), "before", "an ll.training.Before, or None")
    shown_here = progress and accelerator.is_main_process
    with progress_bar(shown=shown_here, total=config.steps, desc=task.name, unit="step") as bar:
        callbacks = [_on(bar), *([] if on_step is None else [on_step])]
        record = Record(config, new, retained, watched, before)
        return TrainingLoop(model, record, accelerator, regularizer=regularizer, callbacks=callbacks).run()


def _on(bar: tqdm) -> Callable[[Progress], None]:
    """What moves a bar on."""

    def show(progress: Progress) -> None:
        if progress.step == 0:
            return
        bar.update()
        last = progress.rows[-1]
        bar.set_postfix(
            loss=f"{progress.loss:.3f}",
            accuracy=f"{last['accuracy']:.3f}",
            retained=f"{last['retained_accuracy']:.3f}",
            refresh=False,
        )

    return show


def _checked_tasks(
    model: nn.Module,
    task: Task,
    retain: Task | None,
    watch: Sequence[Task],
    regularizer: Regularizer | None,
    readout: Readout | None,
    on_step: Callable[[Progress], object] | None,
) -> tuple[Task, ...]:
    """The watched tasks, after everything that :func:`finetune` is given was seen to be of its type."""
    instance(model, nn.Module, "model", "a torch model, such as from ll.attach")
    if not torch.is_grad_enabled():
        raise InputError(
            "gradients are off, so nothing can be trained; call finetune outside torch.no_grad() and "
            "torch.inference_mode()"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise InputError(
            f"this {type(model).__name__} was made under torch.inference_mode(), so its weights cannot be "
            "trained; make it outside"
        )
    of_task = "a task, such as from ll.tasks.folder_task or ll.tasks.text_task"
    instance(task, Task, "task", of_task)
    instance(retain, (Task, type(None)), "retain", f"{of_task}, or None")
    watch = sequence(watch, "watch", "tasks", one=Task)
    for one in watch:
        instance(one, Task, "each of watch", of_task)
    expected = "one such as ll.training.L2ToInitial(1.0), or None"
    instance(regularizer, (Regularizer, type(None)), "regularizer", expected)
    instance(readout, (nn.Module, type(None)), "readout", "what task.new_readout gives, or None")
    if on_step is not None and not callable(on_step):
        raise InputTypeError(f"on_step must be a function of a Progress, not {shown(on_step)}")
    return watch
