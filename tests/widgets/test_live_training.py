from __future__ import annotations

import asyncio
import copy
import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from explored import alts, control, message, narrow_vit, numbers, pictures, text
from ipywidgets import VBox
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

import lora_lens as ll
from lora_lens.plots.single_runs import learning_curves
from lora_lens.widgets.live_training import training_explorer

PATIENCE = 60  # seconds, for slow machines; nothing here measures speed but the ticker
LONG = {"steps": 4000, "evaluations": 401}


@pytest.fixture(scope="module")
def narrow() -> VisionTransformer:
    return narrow_vit(0)


@pytest.fixture(scope="module")
def narrow_spectra(narrow) -> ll.SpectrumSet:
    return ll.spectra(narrow, progress=False)


@pytest.fixture(scope="module")
def task(digits) -> ll.Task:
    return digits.first(train=64, test=40)


@pytest.fixture
def make(narrow, narrow_spectra, task) -> Callable[..., VBox]:
    made = []

    def panel(**settings: object) -> VBox:
        settings = {"rank": 4, "steps": 12, "evaluations": 4, "batch_size": 16} | settings
        made.append(training_explorer(narrow, task, task, narrow_spectra, **settings))
        return made[-1]

    yield panel
    for explorer in made:
        explorer.close()
    wait_until(lambda: not training_threads())


def training_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "training"]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


async def at_rest(explorer: VBox) -> str:
    """What is written, once it has not changed for a second: the step that was going on has ended."""
    async with asyncio.timeout(PATIENCE):
        seen, since = text(explorer), time.monotonic()
        while time.monotonic() - since < 1:
            await asyncio.sleep(0.02)
            if (now := text(explorer)) != seen:
                seen, since = now, time.monotonic()
    return seen


def step(explorer: VBox) -> int:
    found = re.search(r"step (\d+) of", text(explorer))
    return int(found[1]) if found else -1


def can_start(explorer: VBox) -> bool:
    return not control(explorer, "Start").disabled


def press(explorer: VBox, name: str) -> None:
    assert not control(explorer, name).disabled
    control(explorer, name).click()


def test_before_any_click_there_are_axes_and_words_on_what_to_do(make):
    explorer = make()
    assert len(pictures(explorer)) == 1 and "empty before the first step" in alts(explorer)[0]
    assert "press Start" in text(explorer) and "window of rank 4 at position 0.5" in text(explorer)
    assert can_start(explorer) and "<table" not in text(explorer)
    for name in ("Start", "Pause", "Stop"):
        assert control(explorer, name).tooltip
        assert control(explorer, name).disabled == (name != "Start")


@pytest.mark.parametrize(
    ("kind", "method"),
    [("window", ll.Window(4, position=1.0)), ("LoRA", ll.LoRA(4)), ("full fine-tuning", ll.FullFineTuning())],
)
def test_the_numbers_are_those_of_finetune_and_the_model_stays(
    make, narrow, narrow_spectra, task, kind, method
):
    before = copy.deepcopy(narrow.state_dict())
    explorer = make(seed=3)
    control(explorer, "what to train").value = kind
    control(explorer, "position").value = 1.0
    control(explorer, "learning rate").value = 1e-2
    empty = pictures(explorer)
    press(explorer, "Start")
    settings = {"steps": 12, "evaluations": 4, "batch_size": 16, "seed": 3, "progress": False}
    adapted = ll.attach(narrow, method, spectra=narrow_spectra, seed=3)
    run = ll.finetune(adapted, task, task, lr=1e-2, **settings)
    (row,) = numbers(explorer)
    assert row == {
        "run": "1",
        "trained": kind,
        "position": "1" if kind == "window" else "",
        "rank": "4" if kind != "full fine-tuning" else "",
        "learning rate": "0.01",
        "steps": "12",
        "accuracy (%)": f"{100 * run.accuracy:.1f}",
        "forgetting (points)": f"{100 * run.forgetting:.1f}",
        "end": "",
    }
    panel = explorer._panel
    assert panel.finished[0].run.curve.equals(run.curve)
    assert "Run 1 is done" in text(explorer) and pictures(explorer) != empty and can_start(explorer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())


def test_only_what_counts_can_be_chosen(make):
    explorer = make()
    for kind, off in (("LoRA", ["position"]), ("full fine-tuning", ["position", "rank"]), ("window", [])):
        control(explorer, "what to train").value = kind
        assert [n for n in ("position", "rank") if control(explorer, n).disabled] == off


def test_earlier_runs_stay_as_rows_and_pale_lines(make):
    explorer = make()
    for rank in (2, 4):
        control(explorer, "rank").value = rank
        press(explorer, "Start")
    assert [row["rank"] for row in numbers(explorer)] == ["2", "4"]
    assert "pale lines of earlier runs: 1" in alts(explorer)[0]


def test_a_rank_that_does_not_fit_is_said_before_anything_trains(make):
    explorer = make()
    control(explorer, "rank").value = 20
    assert "rank 20 does not fit blocks.0.mlp.fc1" in message(explorer) and not can_start(explorer)
    control(explorer, "Start").click()
    assert "<table" not in text(explorer) and not training_threads()
    control(explorer, "what to train").value = "full fine-tuning"
    assert can_start(explorer) and "alert" not in text(explorer)
    control(explorer, "what to train").value = "LoRA"
    assert "rank 20 does not fit" in message(explorer)
    control(explorer, "rank").value = 16
    assert can_start(explorer) and "alert" not in text(explorer)


def test_a_run_that_diverges_says_so_and_the_next_one_works(make):
    explorer = make(lr=1e30, warmup=0.0)
    press(explorer, "Start")
    assert "Run 1 diverged at step" in message(explorer)
    assert numbers(explorer)[0]["end"] == "diverged"
    control(explorer, "learning rate").value = 1e-3
    press(explorer, "Start")
    assert "Run 2 is done" in text(explorer) and [r["end"] for r in numbers(explorer)] == ["diverged", ""]


def test_bad_arguments_are_refused_at_the_door(narrow, narrow_spectra, task, source):
    with pytest.raises(ValueError, match="rank 20 does not fit"):
        training_explorer(narrow, task, task, narrow_spectra, rank=20)
    with pytest.raises(ValueError, match="another model"):
        training_explorer(narrow, task, task, ll.spectra(narrow_vit(1), progress=False), rank=4)
    with pytest.raises(ValueError, match="evaluations must be at least 2"):
        training_explorer(narrow, task, task, narrow_spectra, rank=4, evaluations=1)
    three = ll.tasks.only_classes(task, ["1", "2", "3"])
    with pytest.raises(ValueError, match="3 classes, but the model's own head has 10"):
        training_explorer(narrow, task, three, narrow_spectra, rank=4)


def test_it_grows_while_it_trains_and_the_page_answers(make):
    explorer = make(steps=200, evaluations=21)
    shown, waits = [], []

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.02)
            waits.append(time.monotonic() - began)

    async def watch() -> None:
        ticker = asyncio.create_task(tick())
        press(explorer, "Start")
        assert not can_start(explorer)
        control(explorer, "Start").click()  # nothing: one run at a time
        assert len(training_threads()) == 1
        while not can_start(explorer):
            if pictures(explorer)[0] not in shown:
                shown.append(pictures(explorer)[0])
            control(explorer, "position").value = round(len(waits) / 1000 % 1, 2)
            await asyncio.sleep(0.05)
        ticker.cancel()

    asyncio.run(asyncio.wait_for(watch(), PATIENCE))
    assert len(shown) >= 3, "the curves did not grow"
    assert len(waits) > 10
    (row,) = numbers(explorer)
    assert row["position"] == "0.5", "what is moved meanwhile counts for the next run"
    assert row["steps"] == "200" and explorer._panel.finished[0].run.curve["step"].iloc[-1] == 200


def test_pause_go_on_stop_and_start_again(make):
    explorer = make(**LONG)

    async def use() -> None:
        press(explorer, "Start")
        await until(lambda: step(explorer) > 5)
        press(explorer, "Pause")
        assert "paused" in await at_rest(explorer)
        held = step(explorer)
        press(explorer, "Go on")
        await until(lambda: step(explorer) > held)
        assert "paused" not in text(explorer) and control(explorer, "Pause").tooltip.startswith("hold")
        press(explorer, "Pause")
        press(explorer, "Stop")
        assert control(explorer, "Stop").disabled and control(explorer, "Pause").disabled
        await until(lambda: can_start(explorer))
        (row,) = numbers(explorer)
        last = int(row["steps"].removesuffix(" of 4000"))
        assert held < last < 4000 and row["end"] == "stopped"
        assert f"Run 1 was stopped after {last} steps" in text(explorer)
        control(explorer, "steps").value = 40
        press(explorer, "Start")
        await until(lambda: can_start(explorer))
        assert [row["steps"] for row in numbers(explorer)] == [f"{last} of 4000", "40"]

    asyncio.run(use())
    assert not training_threads()


def test_a_run_that_fails_in_its_thread_is_said_in_place(task):
    model = narrow_vit(2)
    explorer = training_explorer(model, task, task, rank=4, steps=4, batch_size=8, evaluations=2)
    weight = model.blocks[0].attn.proj.weight

    async def use() -> None:
        with torch.no_grad():
            weight.mul_(2)
        press(explorer, "Start")
        await until(lambda: can_start(explorer))
        assert "This run failed: the spectrum of blocks.0.attn.proj" in message(explorer)
        assert "<table" not in text(explorer)
        with torch.no_grad():
            weight.div_(2)
        press(explorer, "Start")
        await until(lambda: can_start(explorer))
        assert "Run 1 is done" in text(explorer) and "alert" not in text(explorer)

    asyncio.run(use())


@pytest.mark.parametrize("paused", [False, True])
def test_closing_ends_the_thread(make, paused):
    explorer = make(**LONG)

    async def use() -> None:
        press(explorer, "Start")
        await until(lambda: step(explorer) > 1)
        if paused:
            press(explorer, "Pause")
        explorer.close()
        await until(lambda: not training_threads())

    asyncio.run(use())


def test_it_is_watched_again_after_its_event_loop_is_gone(make):
    explorer = make(**LONG)

    async def begin() -> None:
        press(explorer, "Start")
        await until(lambda: step(explorer) > 1)

    async def move() -> None:
        seen = step(explorer)
        control(explorer, "position").value = 0.25
        await until(lambda: step(explorer) > seen)
        press(explorer, "Stop")
        await until(lambda: can_start(explorer))

    asyncio.run(begin())
    asyncio.run(move())
    assert numbers(explorer)[0]["end"] == "stopped"


def test_buttons_may_be_pressed_in_several_threads_with_their_own_loops(make):
    """As in JupyterLab, where a page's messages come to subshells of the kernel."""
    explorer = make(**LONG)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    threads = [threading.Thread(target=loop.run_forever, daemon=True) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        loops[0].call_soon_threadsafe(press, explorer, "Start")
        wait_until(lambda: step(explorer) > 1)
        loops[1].call_soon_threadsafe(press, explorer, "Pause")
        wait_until(lambda: "paused" in text(explorer))
        loops[1].call_soon_threadsafe(press, explorer, "Stop")
        wait_until(lambda: can_start(explorer))
    finally:
        for loop, thread in zip(loops, threads, strict=True):
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
    assert numbers(explorer)[0]["end"] == "stopped"


def test_the_last_run_is_drawn_in_full_and_ends_that_meet_share_a_label():
    def curve(last: int, accuracy: float, retained: float) -> pd.DataFrame:
        return pd.DataFrame(
            {"step": [0, last], "accuracy": [0.1, accuracy], "retained_accuracy": [0.9, retained]}
        )

    runs = {"1": curve(20, 0.80, 0.82), "2": curve(20, 0.81, 0.5), "3": curve(10, 0.7, 0.8)}
    ax = learning_curves(runs | {"now": pd.DataFrame()}, 20, ax=Figure().subplots())
    assert [len(line.get_xdata()) for line in ax.lines] == [0, 0] + [2] * 6
    assert [line.get_alpha() for line in ax.lines] == [None] * 2 + [0.35] * 6
    assert {(t.get_text(), *np.round(t.xy, 2)) for t in ax.texts} == {
        ("1 2", 20, 0.81), ("2", 20, 0.5), ("3", 10, 0.7), ("3", 10, 0.8)
    }  # fmt: skip
    assert ax.get_xlim() == (0, 20) and ax.get_ylim() == (0, 1)
