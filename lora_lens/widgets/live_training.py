"""The live panel: choose what to train, watch both tasks while it trains, pause, stop, compare runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from threading import RLock

import pandas as pd
from ipywidgets import HTML, Button, Dropdown, IntSlider, Layout
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import nn

from lora_lens._base.errors import LoraLensError
from lora_lens._base.validate import instance, whole_number
from lora_lens.adapters.attaching import attach, planned
from lora_lens.adapters.low_rank import chosen_layers
from lora_lens.adapters.methods import FullFineTuning, LoRA, MethodLike
from lora_lens.plots.single_runs import learning_curves
from lora_lens.plots.spectra import some_spectra
from lora_lens.spectrum.factorizing import spectra as compute_spectra
from lora_lens.spectrum.spectrum import SpectrumSet
from lora_lens.spectrum.window import Window
from lora_lens.tasks.task import Task
from lora_lens.training.finetuning import finetune
from lora_lens.training.run import Progress, Run
from lora_lens.training.settings import Training, training_with
from lora_lens.widgets._background_run import FULL, ORDINARY, WINDOW, BackgroundRun
from lora_lens.widgets._explorer import (
    WORDS,
    Explorer,
    alarm,
    explorer,
    html_table,
    running_loop,
    said,
    table_box,
)
from lora_lens.widgets._picture import Picture, fixed_axes
from lora_lens.widgets.spectra import position_slider, rank_slider, require_rank

RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)
LOOK = 0.2  # seconds between two looks at a run
IN_PICTURE = 6  # runs that stay as pale lines; the table keeps all
ROWS = 8


@explorer
def training_explorer(
    model: nn.Module,
    task: Task,
    retain: Task,
    spectra: SpectrumSet | None = None,
    *,
    rank: int = 8,
    lr: float = 5e-3,
    steps: int = 120,
    batch_size: int = 32,
    evaluations: int = 13,
    **settings: object,
) -> Explorer:
    """Fine-tune while you watch: what the model learns of a new task, and what it forgets meanwhile.

    Controls: what to train (a window, ordinary LoRA or every weight), the window's position, rank,
    learning rate and steps; buttons to start, pause and stop, within a step. Shown: what is going on, the
    accuracy on both tasks along the run, with the runs before it as pale lines, and one row per run.
    The numbers are those of :func:`lora_lens.finetune` with the same settings and seed.

    A run trains in a thread of its own, one at a time. Controls that are moved meanwhile count for the next
    run. While a run goes on, torch's global random state is the run's: other cells that draw from it change
    a model with dropout, and are changed by it. Without a running event loop, in plain Python, a run is
    trained at once to its end.

    Args:
        model: the pretrained model; it is only read, each run trains a copy.
        task: what to learn. It is tested ``evaluations`` times, so a few hundred test examples are best:
            ``task.subset(test=500)``.
        retain: what the model can do already; likewise.
        spectra: from :func:`lora_lens.spectra`; default taken now.
        rank: of the window or of LoRA, at first.
        lr: the learning rate at first.
        steps: how many, at first.
        batch_size: examples per step, in all runs.
        evaluations: how many times both tasks are tested in a run.
        settings: others of :class:`lora_lens.Training`, for all runs.

    Raises:
        ValueError: the spectra are another model's, the rank does not fit a weight, a task does not fit the
            model, or a setting is impossible.

    Example:
        >>> from collections import OrderedDict
        >>> import lora_lens as ll, torch
        >>> images = ll.Examples(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
        >>> task = ll.Task("squares", ("dark", "light"), images, images)
        >>> flat, body, head = torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(OrderedDict(flat=flat, body=body, head=head))
        >>> explorer = ll.widgets.training_explorer(model, task, task, rank=2, steps=2)
        >>> [control.description for control in explorer.children[1].children]
        ['what to train', 'position', 'rank']
    """
    instance(model, nn.Module, "model", "the pretrained model, a torch module")
    for name, given in (("task", task), ("retain", retain)):
        instance(given, Task, name, "a Task, such as that of ll.tasks.bundled.digits()")
    rank = whole_number(rank, "rank", least=1)
    settings |= {"lr": lr, "steps": steps, "batch_size": batch_size, "evaluations": evaluations}
    view = {name: settings.pop(name) for name in ("what_to_train", "position") if name in settings}
    config = training_with(
        settings, "training_explorer", also=("rank", "spectra", "what_to_train", "position")
    )
    task.new_readout(model, config.seed)
    retain.own_readout(model)
    spectra = compute_spectra(model) if spectra is None else some_spectra(spectra)
    planned(model, Window.middle(rank), spectra=spectra)
    made = _TrainingExplorer(_Panel(model, task, retain, spectra, rank, config))
    made.set(view)
    return made


class _TrainingExplorer(Explorer):
    """Closing it ends its run."""

    def __init__(self, panel: _Panel) -> None:
        self._panel = panel
        super().__init__(panel.rows(), panel.results(), panel.show_plan)

    def close(self) -> None:
        self._panel.close()
        super().close()


class _Panel:
    """The controls, the run that is going on, and the runs before it.

    Handlers of controls may be called in several threads, each with an event loop, as JupyterLab hands the
    messages of widgets to subshells of the kernel: what they do together is done under one lock.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        retain: Task,
        spectra: SpectrumSet,
        rank: int,
        config: Training,
    ) -> None:
        self.model, self.task, self.retain, self.spectra, self.config = model, task, retain, spectra, config
        self.cut = SpectrumSet([spectra[name] for name in chosen_layers(model, None, spectra)])
        self.kind = Dropdown(options=[WINDOW, ORDINARY, FULL], description="what to train", style=WORDS)
        self.rank, self.position = rank_slider(rank, self.cut), position_slider()
        rates = [(f"{value:g}", value) for value in sorted({*RATES, config.lr})]
        self.rate = Dropdown(options=rates, value=config.lr, description="learning rate", style=WORDS)
        unit = 1 if config.steps % 10 else 10
        most = max(4 * config.steps, 40)
        self.steps = IntSlider(config.steps, unit, most, unit, description="steps")
        self.start_button = _button("Start", "play", "train with these settings", self.start)
        self.pause_button = _button("Pause", "pause", "hold the run after this step", self.pause)
        self.stop_button = _button("Stop", "stop", "end the run after this step and test it", self.stop)
        self.plan, self.now, self.curves, self.numbers = HTML(), HTML(), HTML(), table_box()
        self.training: BackgroundRun | None = None
        self.finished: list[BackgroundRun] = []
        self._watching: asyncio.Task | None = None
        self._lock = RLock()
        self._new_picture(config.steps)
        self.now.value = _said(
            "Nothing is trained yet. Choose what to train, and press Start. Two curves will grow:",
            f"of {task.name}, which is new to the model, and of {retain.name}, which it must not forget.",
        )

    def rows(self) -> list[list]:
        buttons = [self.start_button, self.pause_button, self.stop_button]
        return [[self.kind, self.position, self.rank], [self.rate, self.steps], buttons]

    def results(self) -> list[HTML]:
        return [self.plan, self.now, self.curves, self.numbers]

    def show_plan(self) -> None:
        """What the next run would be; whatever is going on goes on."""
        with self._lock:
            self.position.disabled = self.kind.value != WINDOW
            self.rank.disabled = self.kind.value == FULL
            fault = self._fault()
            what = f"Next run: {self._method()}, learning rate {self.rate.value:g}, {self.steps.value} steps."
            self.plan.value = (
                _said(what) if fault is None else alarm(f"{fault}; before that, nothing starts.")
            )
            self._offer_buttons()
            self._keep_watching()

    def start(self) -> None:
        with self._lock:
            if self.training is not None or self._fault() is not None:
                return
            config = replace(self.config, lr=self.rate.value, steps=self.steps.value)
            self._new_picture(config.steps)
            self.training = training = BackgroundRun(self._train, self._method(), config)
            self._offer_buttons()
            if running_loop() is not None:
                training.start()
                self._keep_watching()
                return
        try:
            training.work()
        finally:
            self._look()

    def pause(self) -> None:
        with self._lock:
            if self.training is not None and not self.training.ending:
                (self.training.go_on if self.training.paused else self.training.pause)()
                self._show_state()

    def stop(self) -> None:
        with self._lock:
            if self.training is not None:
                self.training.end()
                self._show_state()

    def close(self) -> None:
        with self._lock:
            if self.training is not None:
                self.training.end()
                self.training = None

    def _train(self, method: MethodLike, config: Training, on_step: Callable[[Progress], bool]) -> Run:
        adapted = attach(self.model, method, spectra=self.spectra, seed=config.seed)
        return finetune(adapted, self.task, self.retain, config, progress=False, on_step=on_step)

    def _method(self) -> MethodLike:
        if self.kind.value == WINDOW:
            return Window(self.rank.value, position=self.position.value)
        return LoRA(self.rank.value) if self.kind.value == ORDINARY else FullFineTuning()

    def _fault(self) -> str | None:
        """What is wrong with the settings."""
        if self.kind.value == FULL:
            return None
        try:
            require_rank(self.rank.value, self.cut)
        except LoraLensError as error:
            return str(error)
        return None

    def _offer_buttons(self) -> None:
        training = self.training
        self.start_button.disabled = training is not None or self._fault() is not None
        self.stop_button.disabled = self.pause_button.disabled = training is None or training.ending
        paused = training is not None and training.paused
        self.pause_button.description = "Go on" if paused else "Pause"
        self.pause_button.icon = "play" if paused else "pause"
        self.pause_button.tooltip = "go on with the run" if paused else "hold the run after this step"

    def _show_state(self) -> None:
        self._offer_buttons()
        self._keep_watching()
        self._look()

    def _keep_watching(self) -> None:
        """Look at the run from the loop that runs here, unless another loop does so already.

        A loop may be gone meanwhile: subshells of a kernel come and go with the pages.
        """
        loop = running_loop()
        watched = self._watching is not None and not self._watching.done()
        if loop is None or self.training is None or (watched and self._watching.get_loop().is_running()):
            return
        self._watching = loop.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            with self._lock:
                self._look()
                if self.training is None:
                    self._watching = None
                    return
            await asyncio.sleep(LOOK)

    def _look(self) -> None:
        """Show how far the run is; only what is new is drawn."""
        with self._lock:
            training = self.training
            if training is None:
                return
            done, progress = training.done, training.progress
            try:
                self._grow(() if progress is None else progress.rows, training.config.steps)
                self.now.value = self._in_words(training, progress)
            except Exception as error:  # nobody else would hear of it
                self.now.value = alarm(said(error, "this view"))
            if done:
                self._finish(training)

    def _finish(self, training: BackgroundRun) -> None:
        self.training = None
        if training.run is None:
            reason = said(training.error, "training") if training.error else "it was interrupted"
            self.now.value = alarm(f"This run failed: {reason}. Change the settings, or start it again.")
        else:
            self.finished.append(training)
            self._grow(training.run.curve.to_dict("records"), training.config.steps)
            table = pd.DataFrame([f.row(number) for number, f in enumerate(self.finished, 1)])
            self.numbers.value = html_table(table, rows_in_view=ROWS)
            self.now.value = self._result_in_words(training)
        self._offer_buttons()

    def _new_picture(self, steps: int) -> None:
        """Axes long enough for the runs before, with those as pale lines and room for the next one."""
        kept = self._pale = list(enumerate(self.finished, 1))[-IN_PICTURE:]
        runs = {str(number): finished.run.curve for number, finished in kept}
        length = max([steps, *(f.run.config.steps for _, f in kept)])

        def draw(figure: Figure) -> list[Artist]:
            ax = learning_curves(
                runs | {"": pd.DataFrame()},
                length,
                (f"new task: {self.task.name}", f"retained task: {self.retain.name}"),
                ax=fixed_axes(figure, (0.1, 0.14, 0.79, 0.77)),
            )
            self._lines = ax.lines[:2]
            return self._lines

        self._picture, self._drawn = Picture(draw), -1
        self._grow((), steps)

    def _grow(self, rows: Sequence[dict[str, float]], steps: int) -> None:
        if len(rows) == self._drawn:
            return
        for line, column in zip(self._lines, ("accuracy", "retained_accuracy"), strict=True):
            line.set_data([row["step"] for row in rows], [row[column] for row in rows])
        before = f"; pale lines of earlier runs: {len(self._pale)}" if self._pale else ""
        scores = f", {self._scores(rows)}" if rows else ", empty before the first step"
        self.curves.value = self._picture.html(
            f"test accuracy on both tasks along the {steps} steps of a run{scores}{before}"
        )
        self._drawn = len(rows)

    def _scores(self, rows: Sequence[dict[str, float]]) -> str:
        first, last = rows[0], rows[-1]
        return (
            f"at step {last['step']}: {self.task.name} {last['accuracy']:.1%}, {self.retain.name} "
            f"{last['retained_accuracy']:.1%} ({first['retained_accuracy']:.1%} before)"
        )

    def _in_words(self, training: BackgroundRun, progress: Progress | None) -> str:
        what = f"Run {len(self.finished) + 1} ({training.method}, learning rate {training.config.lr:g})"
        if progress is None:
            return _said(f"{what}: the first step is prepared,", "and both tasks are tested.")
        state = "; stopping" if training.ending else "; paused" if training.paused else ""
        loss = f", loss {progress.loss:.2f}" if progress.step else ""
        return _said(
            f"{what}: step {progress.step} of {progress.steps}{loss}; {training.seconds:.0f} s{state}.",
            f"Tested {self._scores(progress.rows)}.",
        )

    def _result_in_words(self, training: BackgroundRun) -> str:
        run, number, last = training.run, len(self.finished), training.last_step
        if run.diverged:
            return alarm(
                f"Run {number} diverged at step {last}: its loss is no finite number any more. Take a "
                f"smaller learning rate than {training.config.lr:g}."
            )
        how = "was stopped" if run.stopped else "is done"
        return _said(
            f"Run {number} {how} after {last} steps, {training.seconds:.0f} s.",
            f"{self.task.name}: {run.accuracy:.1%}. {self.retain.name}: {run.retained_before:.1%} before, "
            f"{run.retained_accuracy:.1%} now; {100 * run.forgetting:.1f} percentage points are forgotten.",
        )


def _button(description: str, icon: str, tooltip: str, press: Callable[[], None]) -> Button:
    made = Button(description=description, icon=icon, tooltip=tooltip, layout=Layout(width="8em"))
    made.on_click(lambda _made: press())
    return made


def _said(*lines: str) -> str:
    return f'<p style="margin: 0.2em 0">{"<br>".join(map(escape, lines))}</p>'
