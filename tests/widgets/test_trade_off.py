"""The trade-off plane that is clicked and brushed, and what a picked run shows."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from base64 import b64decode
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from explored import control, message, narrow_vit, parts, pictures, shows_results, text
from ipywidgets import HTML, FloatRangeSlider, VBox
from matplotlib.colors import to_hex
from PIL import Image

import lora_lens as ll
from lora_lens.widgets._run_choice import RANGED
from lora_lens.widgets._run_plane import PALE, RunPlane
from lora_lens.widgets._run_view import RunView, named_runs

DIGITS = Path(__file__).parents[2] / "data" / "results" / "digits.jsonl.xz"


@pytest.fixture(scope="module")
def kept() -> pd.DataFrame:
    """Some runs of the sweep that the project keeps: 11 windows and methods, 2 rates, 2 seeds."""
    table = ll.Sweep.open(DIGITS).table
    return table[table["lr"].isin([0.005, 0.02]) & (table["seed"] < 2)]


@pytest.fixture(scope="module")
def fashion() -> ll.Task:
    return ll.tasks.bundled.vision()[1].first(test=1000)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Few short real runs in a folder."""
    digits = ll.tasks.bundled.digits().first(64, 40)
    folder = tmp_path_factory.mktemp("sweeps") / "runs"
    grid = ll.Grid(window=ll.windows(4, 3), lr=(1e-3, 1e-2), seed=(0,))
    model = narrow_vit(0)
    fast = {"steps": 2, "evaluations": 2, "batch_size": 16, "jobs": 1, "progress": False}
    spectra = ll.spectra(model, progress=False)
    ll.sweep(grid, model=model, task=digits, retain=digits, spectra=spectra, store=folder, **fast)
    return folder


@pytest.fixture
def plane(kept) -> VBox:
    """Without a store, which is quicker."""
    return ll.widgets.tradeoff_explorer(kept)


def pick(explorer: VBox, run: str) -> None:
    """As the page does when a point is clicked."""
    explorer.page.picked = run


def brush(explorer: VBox, corners: str) -> None:
    explorer.page.brushed = corners


def spots(explorer: VBox) -> dict[str, dict[str, str]]:
    """The buttons in the plane, by run."""
    (html,) = (h.value for h in parts(explorer, HTML) if 'class="ll-plane"' in h.value)
    buttons = [dict(re.findall(r'([\w-]+)="([^"]*)"', b)) for b in re.findall("<button ([^>]*)>", html)]
    return {button["value"]: button for button in buttons}


def inside(explorer: VBox) -> set[str]:
    return {run for run, button in spots(explorer).items() if "ll-aside" not in button["class"]}


def ranges(explorer: VBox) -> list[tuple[float, float]]:
    return [slider.value for slider in parts(explorer, FloatRangeSlider)]


def said(explorer: VBox) -> str:
    """The sentence on how many runs are chosen."""
    (found,) = (h.value for h in parts(explorer, HTML) if re.match(r"<p>\d+ of \d+ run", h.value))
    return unescape(found[3:-4])


def about(explorer: VBox) -> str:
    """What is written of the picked run."""
    (found,) = (h.value for h in parts(explorer, HTML) if h.value.startswith("<b>The run"))
    return unescape(found)


def picture_of(explorer: VBox, words: str) -> tuple[str, str]:
    """The text and the source of the picture whose text holds these words."""
    found = [re.findall('<img alt="([^"]*)" src="([^"]*)"', h.value) for h in parts(explorer, HTML)]
    (one,) = ((unescape(alt), source) for some in found for alt, source in some if words in alt)
    return one


def test_every_run_is_a_point_that_says_what_it_is(plane, kept):
    assert set(spots(plane)) == set(kept["run"]) and inside(plane) == set(kept["run"])
    row = kept[kept["method"] == "window"].iloc[0]
    label = spots(plane)[row["run"]]["aria-label"]
    assert label == (
        f"window at {row['position']:g}, learning rate {row['lr']:g}, seed {row['seed']}: "
        f"accuracy {100 * row['accuracy']:.1f}%, forgetting {100 * row['forgetting']:.1f} points"
    )
    assert said(plane).startswith(f"{len(kept)} of {len(kept)} runs: accuracy from ")


def test_points_further_right_and_up_are_better(plane, kept):
    left, top = (
        [float(re.search(rf"{side}: ([\d.]+)%", spots(plane)[run]["style"])[1]) for run in kept["run"]]
        for side in ("left", "top")
    )
    assert np.corrcoef(left, kept["accuracy"])[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(top, kept["retained_accuracy"])[0, 1] == pytest.approx(-1, abs=1e-4)


def test_chosen_points_are_in_colour_the_others_pale_and_hidden_ones_gone(kept):
    table = kept.reset_index(drop=True)
    plane = RunPlane(table)
    shown, chosen = (table["lr"] == 0.005).to_numpy(), (table["accuracy"] > 0.92).to_numpy()
    whole = plane.html(shown, shown, None, "points")
    assert plane.html(shown, chosen, None, "points") != whole
    drawn = {"pale": [], "colour": []}
    for points in plane.ax.lines:
        if points.get_marker() not in ("None", ""):
            pale = to_hex(points.get_markeredgecolor()) == PALE
            drawn["pale" if pale else "colour"].extend(map(tuple, points.get_xydata().tolist()))
    for name, rows in (("pale", shown), ("colour", shown & chosen)):  # those in colour lie on their pale ones
        assert sorted(drawn[name]) == sorted(map(tuple, table.loc[rows, RANGED].to_numpy().tolist())) != []
    box = (0.3, 0.8), (0.2, 0.9)
    assert plane.html(shown, chosen, box, "points") != plane.html(shown, chosen, None, "points")
    front = [line for line in plane.ax.lines if line.get_linestyle() != "None"]
    best = table[shown & chosen]
    best = best[ll.forgetting.pareto_front(best)]
    assert sorted(front[0].get_xdata()) == sorted(best["accuracy"])


def test_windows_are_coloured_by_position_whatever_is_chosen(kept):
    table = kept[(kept["method"] == "window") & (kept["lr"] == 0.005)].reset_index(drop=True)
    plane = RunPlane(table)
    every, last = {}, {}
    for chosen, colours in ((table["position"] >= 0, every), (table["position"] == 1, last)):
        plane.html((table["lr"] > 0).to_numpy(), chosen.to_numpy(), None, "points")
        for points in (line for line in plane.ax.lines if line.get_zorder() == 4 and line.get_visible()):
            colours |= dict.fromkeys(map(tuple, points.get_xydata()), to_hex(points.get_markerfacecolor()))
    assert len(set(every.values())) == table["position"].nunique()
    assert last == {row: every[row] for row in last}


def test_a_page_can_draw_the_picture_of_any_choice_by_itself():
    grid = [np.linspace(0, 1, 36), [0.001, 0.002, 0.005, 0.01]]
    table = pd.MultiIndex.from_product(grid, names=["position", "lr"]).to_frame(index=False)
    table[RANGED] = np.random.default_rng(0).uniform(0.2, 0.8, (len(table), 2))
    table = table.assign(method=["LoRA"] * 4 + ["window"] * 140)
    table.loc[10, RANGED] = 0.82  # the best in both: a front of one run is no line
    table.loc[20, "accuracy"] = np.nan
    plane = RunPlane(table)
    shown, chosen = (table["lr"] > 0.001).to_numpy(), (table["accuracy"] > 0.5).to_numpy()
    picture = re.search('base64,([^"]+)', plane.html(shown, chosen, None, ""))[1]
    sent = plane.for_page(shown, 0.01)
    drawn, markers = (Image.open(BytesIO(sent[name])).convert("RGBA") for name in ("under", "markers"))
    scores = np.frombuffer(sent["scores"], "<f8").reshape(-1, 2)
    columns, side = markers.width // sent["side"], sent["side"]
    for (accuracy, _), place in zip(scores, np.frombuffer(sent["places"], "<i2").reshape(-1, 3), strict=True):
        if accuracy > 0.5:
            number, left, upper = place.tolist()
            x, y = side * (number % columns), side * (number // columns)
            drawn.alpha_composite(markers.crop((x, y, x + side, y + side)), (left, upper))
    expected = np.asarray(Image.open(BytesIO(b64decode(picture))), int)
    assert np.abs(np.asarray(drawn.convert("RGB"), int) - expected).max() <= 4  # as alpha is rounded
    assert np.ptp(expected, axis=2).max() > 100
    assert sorted(map(tuple, scores)) == sorted(map(tuple, table.loc[shown, RANGED].dropna().to_numpy()))


def test_the_best_run_is_shown_before_any_click(plane, kept):
    best = kept.loc[(kept["accuracy"] + kept["retained_accuracy"]).idxmax()]
    assert [r for r, b in spots(plane).items() if b["aria-pressed"] == "true"] == [best["run"]]
    assert f"learning rate {best['lr']:g}, seed {best['seed']}</b>" in about(plane)
    assert f"<td>{100 * best['accuracy']:.1f}</td>" in about(plane) and "rank 8" in about(plane)


def test_a_click_shows_what_the_store_keeps_of_that_run(kept, fashion):
    plane = ll.widgets.tradeoff_explorer(ll.Sweep.open(DIGITS).only(kept), fashion)
    before = [picture_of(plane, words)[1] for words in ("along the run", "each of 24 weights", "forgot")]
    row = kept[(kept["position"] == 0) & (kept["lr"] == 0.02)].iloc[0]
    pick(plane, row["run"])
    after = [picture_of(plane, words)[1] for words in ("along the run", "each of 24 weights", "forgot")]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert f"window at 0, learning rate 0.02, seed {row['seed']}" in about(plane)
    run = kept[kept["run"] == row["run"]]
    moved = 100 * ll.Sweep.open(DIGITS).only(run).drifts()["relative"]
    assert f"by {moved.min():.1f} to {moved.max():.1f}% of its size" in picture_of(plane, "24 weights")[0]
    counts = ll.forgetting.transitions(ll.Sweep.open(DIGITS).only(run).answers()).iloc[0]
    assert (
        f"Of {counts['kept'] + counts['forgotten']} images that were classified right before, the run forgot "
        f"{counts['forgotten']}; {counts['gained']} that" in text(plane)
    )
    assert picture_of(plane, "forgot")[0].startswith(
        f"12 of {counts['forgotten']} images that the run forgot"
    )


def stale(explorer: VBox) -> bool:
    return any("ll-stale" in html._dom_classes for html in parts(explorer, HTML))


def test_under_a_running_loop_the_last_pick_is_shown_in_full(kept):
    """As in a notebook: slow parts come later, and those of an earlier pick must not stay."""
    first, second = kept["run"].iloc[[4, 9]]
    words = ("along the run", "each of 24 weights")
    plain = ll.widgets.tradeoff_explorer(ll.Sweep.open(DIGITS).only(kept))
    pick(plain, second)
    expected = [picture_of(plain, some) for some in words]

    async def clicked_twice_and_brushed() -> VBox:
        explorer = ll.widgets.tradeoff_explorer(ll.Sweep.open(DIGITS).only(kept))
        pick(explorer, first)
        await asyncio.sleep(0.17)  # by now the first one's parts may have begun, or be there
        pick(explorer, second)
        await asyncio.sleep(0)
        brush(explorer, "0.2,0.2,1,1")
        assert stale(explorer)
        async with asyncio.timeout(120):
            while stale(explorer):
                await asyncio.sleep(0.02)
        return explorer

    explorer = asyncio.run(clicked_twice_and_brushed())
    assert [picture_of(explorer, some) for some in words] == expected
    assert len(inside(explorer)) < len(kept)


def test_parts_that_come_too_late_do_not_count_as_shown(kept):
    first, second = kept["run"].iloc[[4, 9]]
    view = RunView(named_runs(kept), ll.Sweep.open(DIGITS), None)
    late = view.show(first)
    next(late)
    list(view.show(second))
    assert view.show(second) is None  # all of it is there
    assert list(late) == []
    assert view.show(first) is not None


def test_a_click_leaves_the_plane_and_the_choice_as_they_are(plane, kept):
    """Or the button that has the focus would be lost."""
    (box,) = (h for h in parts(plane, HTML) if 'class="ll-plane"' in h.value)
    before, chosen = box.value, said(plane)
    pick(plane, kept["run"].iloc[5])
    assert box.value == before and said(plane) == chosen
    control(plane, "0.02").value = False
    assert spots(plane)[kept[kept["lr"] == 0.005]["run"].iloc[0]]["aria-pressed"] == "false"
    control(plane, "0.02").value = True
    assert spots(plane)[kept["run"].iloc[5]]["aria-pressed"] == "true"


def test_a_brush_moves_the_sliders_and_chooses_the_runs_within(plane, kept):
    image = picture_of(plane, "a point per run")[1]
    brush(plane, "0.6,0.2,0.9,0.8")
    (left, right), (bottom, top) = ranges(plane)
    x, y = kept["accuracy"], kept["retained_accuracy"]
    for (low, high), scores, ends in (((left, right), x, (0.6, 0.9)), ((bottom, top), y, (0.2, 0.8))):
        margin = 0.05 * (scores.max() - scores.min())
        drawn = [scores.min() - margin + end * (scores.max() - scores.min() + 2 * margin) for end in ends]
        assert drawn[0] - 0.01 <= low <= drawn[0] and drawn[1] <= high <= drawn[1] + 0.01
    wanted = kept[x.between(left, right) & y.between(bottom, top)]
    assert 0 < len(wanted) < len(kept) and inside(plane) == set(wanted["run"])
    assert said(plane) == (
        f"{len(wanted)} of {len(kept)} runs: accuracy from {100 * wanted['accuracy'].min():.1f} to "
        f"{100 * wanted['accuracy'].max():.1f}%, retained accuracy from "
        f"{100 * wanted['retained_accuracy'].min():.1f} to {100 * wanted['retained_accuracy'].max():.1f}%, "
        f"forgetting from {100 * wanted['forgetting'].min():.1f} to "
        f"{100 * wanted['forgetting'].max():.1f} points."
    )
    alt, now = picture_of(plane, "a point per run")
    assert now != image and f"{len(wanted)} of {len(kept)} in colour" in alt


def test_sliders_do_what_the_brush_does_and_all_of_it_can_be_undone(plane, kept):
    image = picture_of(plane, "a point per run")[1]
    brush(plane, "0.6,0.2,0.9,0.8")
    brushed = picture_of(plane, "a point per run")[1], said(plane)
    values = ranges(plane)
    control(plane, "windows").value = ("LoRA",)
    control(plane, "all runs").click()
    assert said(plane).startswith(f"{len(kept)} of") and picture_of(plane, "a point per run")[1] == image
    for name, value in zip(("accuracy", "retained accuracy"), values, strict=True):
        (slider,) = (s for s in parts(plane, FloatRangeSlider) if s.description == name)
        slider.value = value
    assert (picture_of(plane, "a point per run")[1], said(plane)) == brushed
    control(plane, "all runs").click()
    brush(plane, "0.6,0.2,0.9,0.8")
    assert ranges(plane) == values  # the same rectangle a second time


def test_windows_choose_points_means_and_curves(plane, kept):
    curve = picture_of(plane, "position of the window")[1]
    control(plane, "windows").value = ("window at 0", "window at 0.5")
    assert inside(plane) == set(kept[kept["position"].isin([0, 0.5])]["run"])
    assert set(spots(plane)) == set(kept["run"])  # the others are pale, and can still be picked
    assert picture_of(plane, "position of the window")[1] != curve
    control(plane, "windows").value = ("LoRA",)
    assert "None of these is a window placed by position" in text(plane) and shows_results(plane)
    control(plane, "windows").value = ()
    assert "choose at least one window or method" in unescape(message(plane))


def test_rates_take_points_away(plane, kept):
    control(plane, "0.02").value = False
    assert set(spots(plane)) == set(kept[kept["lr"] == 0.005]["run"])


def test_no_run_and_one_run_are_said_plainly(plane, kept):
    brush(plane, "0,0.9,0.05,1")
    assert said(plane).startswith(f"0 of {len(kept)} runs: none lies in these ranges") and shows_results(
        plane
    )
    worst = kept.loc[kept["accuracy"].idxmin()]
    brush(plane, "0,0,1,1")
    (slider,) = (s for s in parts(plane, FloatRangeSlider) if s.description == "accuracy")
    slider.value = (slider.min, worst["accuracy"])
    assert said(plane).startswith(f"1 of {len(kept)} runs: window at {worst['position']:g}, learning rate")


def test_what_the_page_cannot_send_is_said_in_place(plane):
    pick(plane, "no such run")
    assert "the table has no run 'no such run'" in unescape(message(plane))
    brush(plane, "1,2,3")
    assert "a rectangle is four shares" in unescape(message(plane))
    pick(plane, next(iter(spots(plane))))
    assert shows_results(plane)


def test_without_a_store_a_click_tells_scores_and_settings(kept):
    explorer = ll.widgets.tradeoff_explorer(kept.drop(columns="run"))
    assert len(spots(explorer)) == len(kept) and len(pictures(explorer)) == 2  # curve and plane
    run, button = list(spots(explorer).items())[3]
    pick(explorer, run)
    assert button["aria-label"].split(":")[0] in about(explorer) and "steps 120" in about(explorer)


def test_runs_that_the_store_lacks_or_kept_in_part_are_said_in_place(small, tmp_path):
    table = ll.Sweep.open(small).table
    partial = shutil.copytree(small, tmp_path / "partial")
    lost, earlier = table["run"].iloc[:2]
    (partial / "runs" / f"{lost}.json").unlink()
    record = json.loads((partial / "runs" / f"{earlier}.json").read_text())
    for key in ("drift", "features", "items"):
        record.pop(key, None)
    (partial / "runs" / f"{earlier}.json").write_text(json.dumps(record))
    explorer = ll.widgets.tradeoff_explorer(
        ll.Sweep.open(partial).only(table), ll.tasks.bundled.digits().first(64, 40)
    )
    pick(explorer, lost)
    assert text(explorer).count(f"holds no run {lost}") == 3 and shows_results(explorer)
    pick(explorer, earlier)
    assert picture_of(explorer, "along the run") and "was kept with its drift" in text(explorer)
    assert f"run {earlier} in {partial} was kept without its answers" in text(explorer)
    pick(explorer, table["run"].iloc[5])
    assert picture_of(explorer, "along the run") and "Not shown" not in text(explorer)


def test_a_plane_that_cannot_be_shown_is_refused(kept, fashion):
    explore = ll.widgets.tradeoff_explorer
    with pytest.raises(ValueError, match=r"no part of a table; with retain, give the ll\.Sweep"):
        explore(kept, retain=fashion)
    with pytest.raises(ValueError, match="answers are to 1000 other test images"):
        explore(ll.Sweep.open(DIGITS).only(kept), fashion.first(test=900))
    with pytest.raises(ValueError, match=r"the table holds run .* twice"):
        explore(pd.concat([kept, kept]))
    with pytest.raises(ValueError, match="no column run"):
        explore(ll.Sweep.open(DIGITS).only(kept.drop(columns="run")))
    with pytest.raises(ValueError, match="no runs of windows placed by position"):
        explore(kept[kept["method"] == "LoRA"])


def test_of_ten_thousand_runs_some_hundreds_can_be_picked_and_a_brush_shows_more(kept):
    random = np.random.default_rng(0)
    table = pd.concat([kept] * -(-10_000 // len(kept)), ignore_index=True)[:10_000]
    table = table.assign(run=[f"run {i}" for i in range(len(table))], seed=np.arange(len(table)))
    for score in ("accuracy", "retained_accuracy"):
        table[score] = (table[score] + random.normal(0, 0.01, len(table))).clip(0, 1)
    explorer = ll.widgets.tradeoff_explorer(table)
    assert 100 < len(spots(explorer)) <= 500
    best = table.loc[table[["accuracy", "retained_accuracy"]].sum(axis=1).idxmax(), "run"]
    assert spots(explorer)[best]["aria-pressed"] == "true"
    before = inside(explorer)
    brush(explorer, "0.6,0.6,1,1")
    assert inside(explorer) - before and len(spots(explorer)) <= 500
