from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from small_sequences import small_spectra, small_vit

import lora_lens as ll
from lora_lens.experiments.store import experiment
from lora_lens.forgetting import fair_comparison, pareto
from lora_lens.forgetting.run_groups import holm
from lora_lens.reports.page import decimal, html_page, plain, points, with_interval
from lora_lens.reports.tables import dominance_section, matched_accuracy
from lora_lens.reports.words import u_shape_section

VOID = {"meta", "img", "br"}
WINDOWS_AND_LORA = [("window", p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] + [("LoRA", np.nan)]
EQUAL_ACCURACY = "Accuracy on the new task (%) at equal"
EQUAL_FORGETTING = "Forgetting of the retained task (points) at equal"


class Page(HTMLParser):
    """A written page: its tables by caption, its pictures, headings and text; fails if tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, pd.DataFrame] = {}
        self.images: list[dict[str, str]] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            head, *rows = self.rows
            self.tables[self.caption] = pd.DataFrame(rows, columns=head)

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.caption += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    def table(self, start: str) -> pd.DataFrame:
        (found,) = [table for caption, table in self.tables.items() if caption.startswith(start)]
        return found


def made_up(
    methods: list[tuple[str, float]] = WINDOWS_AND_LORA,
    rates: tuple[float, ...] = (0.00001, 0.005, 0.02),
    seeds: int = 6,
    rank: int = 8,
) -> pd.DataFrame:
    """A U of 20 points at the middle rate, and noise."""
    noise = np.random.default_rng(0)
    rows = []
    for method, position in methods:
        depth = 0.8 * (position - 0.5) ** 2 if method == "window" else 0.1
        for lr in rates:
            for seed in range(seeds):
                lost = (depth if lr == 0.005 else 0.1) + 0.01 * noise.random()
                rows.append(
                    {"run": f"{method}{position}{lr}{seed}{rank}", "method": method, "rank": rank,
                     "position": position, "start": None, "alpha": None, "steps": 30, "lr": lr, "seed": seed,
                     "trainable": 100, "loss": 0.5, "accuracy": 0.9 - 5 * lr + 0.01 * noise.random(),
                     "retained_before": 0.9, "retained_accuracy": 0.9 - lost, "forgetting": lost,
                     "diverged": False}
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return made_up()


@pytest.fixture(scope="module")
def page(table, tmp_path_factory) -> Page:
    shuffled = table.sample(frac=1, random_state=0)
    return Page(ll.reports.report(shuffled, tmp_path_factory.mktemp("page") / "sweep.html"))


@pytest.fixture(scope="module")
def store(source, digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    grid = ll.Grid(ll.windows(rank=8, count=3), lr=[1e-2], seed=range(2), baselines=[ll.LinearProbe()])
    given = {"model": small_vit(), "task": digits.first(64, 50), "retain": source.first(10, 60)}
    settings = {"steps": 3, "batch_size": 16, "evaluations": 2, "jobs": 1, "progress": False}
    ll.sweep(grid, **given, spectra=small_spectra(), store=folder, **settings)
    return folder


# the page


def test_the_page_is_whole_and_needs_nothing_else(page):
    assert "script" not in page.tags and "link" not in page.tags
    assert page.links and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert page.headings == [
        "Windows of LoRA: what was learned and what was forgotten",
        "What was run",
        "Is forgetting U-shaped?",
        "Figures",
        "At equal learning rates",
        "At each window's own best learning rate",
        "Which window beats which",
        "Limits",
    ]


def test_every_picture_is_drawn_and_told_in_words(page):
    assert len(page.images) == 8
    for image in page.images:
        svg = base64.b64decode(image["src"].split(",")[1])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert len(image["alt"]) > 60
    assert "At learning rate 0.005: 20." in page.images[0]["alt"]


def test_pictures_are_not_left_open_and_a_page_is_the_same_every_time(tmp_path):
    open_before = plt.get_fignums()
    first, again = (ll.reports.report(made_up(rates=(0.005,)), tmp_path / f"{name}.html") for name in "ab")
    assert plt.get_fignums() == open_before
    assert first.read_bytes() == again.read_bytes()


def test_words_of_the_table_are_escaped(tmp_path):
    table = made_up([("a <b> & c", np.nan), ("LoRA", np.nan)], rates=(0.005,))
    page = Page(ll.reports.report(table, tmp_path / "p.html", title="5 < 6 & so on"))
    assert page.headings[0] == "5 < 6 & so on"
    assert "a <b> & c" in page.table(EQUAL_ACCURACY)["window or method"].tolist()
    assert "b" not in page.tags


def test_a_script_among_the_names_and_values_is_only_shown(tmp_path):
    evil = "<script>alert('a & \"b\"')</script>"
    table = made_up([(evil, np.nan), ("LoRA", np.nan)], rates=(0.005, 0.02)).assign(note=evil)
    page = Page(ll.reports.report(table, tmp_path / "p.html", title=evil))
    assert "<script" not in page.source and "script" not in page.tags
    assert page.headings[0] == evil and page.source.count("&lt;script&gt;") > 10
    assert page.table("What all runs share").set_index("setting").loc["note", "value"] == evil
    assert page.table("What differs").set_index("setting").loc["method", "values"] == f"{evil}; LoRA"
    assert evil in page.table(EQUAL_ACCURACY)["window or method"].tolist()
    assert any(evil in image["alt"] for image in page.images)


# the numbers


def test_the_tables_at_equal_rates_are_those_of_the_public_function(page, table):
    names = ["window at 0 (PiSSA)", "window at 0.25", "window at 0.5", "window at 0.75"]
    result = fair_comparison.at_equal_rate(table)
    for start, score in ((EQUAL_ACCURACY, "accuracy"), (EQUAL_FORGETTING, "forgetting")):
        shown = page.table(start).set_index("window or method")
        assert shown.columns.tolist() == ["0.00001", "0.005", "0.02"]
        assert shown.index.tolist() == [*names, "window at 1 (MiLoRA)", "LoRA"]
        values = result[[score, f"{score}_low", f"{score}_high"]].mul(100)
        expected = [f"{m:.1f} ({low:.1f} to {high:.1f})" for m, low, high in values.to_numpy()]
        assert shown.to_numpy().ravel().tolist() == expected


def test_best_rates_and_their_width_are_those_of_the_public_functions(page, table):
    own, robust = fair_comparison.at_own_best_rate(table), ll.forgetting.rate_robustness(table)
    best = page.table("At each window's own best")
    assert best["best rate"].tolist() == own["lr"].map(plain).tolist()
    assert best["chosen on"].unique().tolist() == ["other seeds"]
    assert [cell.split()[0] for cell in best["forgetting (points)"]] == own["forgetting"].map(points).tolist()
    width = page.table("How far the learning rate may be off")
    assert width["highest rate"].tolist() == robust["highest"].map(plain).tolist()
    assert width["octaves"].str.split().str[0].tolist() == robust["octaves"].map(decimal).tolist()
    assert width["grid ends there"].tolist() == ["yes"] * 6


def test_who_beats_whom_is_that_of_the_public_function(page, table):
    shown = page.table("How often the row is better").set_index("window or method")
    pairs = pareto.dominance(table)
    middle_over_first = pairs.query("position_a == 0 and position_b == 0.5")["b_beats_a"].item()
    assert shown.loc["3. window at 0.5", "1"] == points(middle_over_first) != "0.0"
    assert shown.loc["1. window at 0 (PiSSA)", "3"] == points(
        pairs.query("position_a == 0 and position_b == 0.5")["a_beats_b"].item()
    )
    assert [shown.iloc[i, i] for i in range(6)] == ["-"] * 6
    row = [float(v) for v in shown.loc["6. LoRA"].iloc[:5]]
    assert float(shown.loc["6. LoRA", "beats, mean"]) == pytest.approx(np.mean(row), abs=0.11)


def test_the_answer_is_that_of_the_test_adjusted_for_the_number_of_rates(page, table):
    tests = [ll.forgetting.u_shape_test(table, lr) for lr in (0.00001, 0.005, 0.02)]
    shown = page.table("What the end windows forget more")
    assert shown["p"].tolist() == [f"{t.p:.3f}" for t in tests]
    assert shown["p, adjusted"].tolist() == [f"{p:.3f}" for p in holm([t.p for t in tests])]
    assert shown["PiSSA end, excess"][1].split()[0] == points(tests[1].first_excess)
    assert tests[1].words in page.text
    assert "established after Holm's adjustment for 3 tests (level 0.05) at learning rate 0.005." in page.text


@pytest.mark.parametrize(
    ("seeds", "rates", "told"),
    [
        (4, 1, "4 seeds cannot give a p value below 0.0625. It takes 5."),
        (5, 1, None),
        (5, 3, "5 seeds cannot give a p value below 0.0938 after the adjustment. It takes 6."),
        (6, 3, None),  # 3 / 64
        (6, 4, "6 seeds cannot give a p value below 0.0625 after the adjustment. It takes 7."),
        (7, 4, None),
    ],
)
def test_a_verdict_that_the_seeds_could_not_have_given_is_called_one(seeds, rates, told):
    flat = made_up(rates=tuple(0.01 * (i + 1) for i in range(rates)), seeds=seeds)
    words = u_shape_section(flat)[0]
    assert "No U-shape is established" in words
    assert ("None could be" in words) == (told is not None)
    assert told is None or told in words


def test_a_p_value_is_not_rounded_to_nothing(tmp_path):
    table = made_up(rates=(0.005,), seeds=20)
    assert ll.forgetting.u_shape_test(table, 0.005).p < 0.0005
    page = Page(ll.reports.report(table, tmp_path / "p.html"))
    assert page.table("What the end windows forget more")["p"].tolist() == ["<0.001"]
    assert ">&lt;0.001</td>" in page.source


def test_holm_on_a_known_answer():
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04, 0.03]), [0.03, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_adjusted_p_values_lie_between_the_plain_ones_and_bonferroni_s_in_the_same_order(p):
    p, adjusted = np.array(p), holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(len(p) * p, 1) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_numbers_are_written_plainly():
    assert [plain(v) for v in (0.005, 1e-5, 3e-7, 100, 0.1 + 0.2, np.nan)] == [
        "0.005", "0.00001", "0.0000003", "100", "0.3", "-"
    ]  # fmt: skip
    assert [points(v) for v in (0.1234, -0.0001, np.nan)] == ["12.3", "0.0", "-"]
    assert with_interval(0.5, np.nan, np.nan) == "50.0"


def test_the_facts_are_those_of_the_table(page):
    differs = page.table("What differs").set_index("setting")
    assert differs.loc["learning rate", "values"] == "0.00001; 0.005; 0.02"
    assert differs.loc["position of the window", "count"] == "5"
    shared = page.table("What all runs share").set_index("setting")["value"]
    assert shared["rank"] == "8" and shared["steps"] == "30" and shared["alpha"] == "the rank (default)"
    versions = page.table("Versions").set_index("package")["of this report"]
    assert versions["lora_lens"] == ll.__version__
    assert "5 windows and 1 other method (LoRA) at 3 learning rates with 6 seeds: 108 runs" in page.text


def test_runs_that_failed_are_counted_and_results_are_no_settings(tmp_path):
    methods = [("LoRA", np.nan), ("full fine-tuning", np.nan)]
    table = made_up(methods, (0.005, 0.02), seeds=2)
    table = table.assign(retained_loss=0.25, loss_rise=0.125, failed=False, reason="")
    table.loc[[0, 7], ["failed", "reason", "accuracy"]] = [True, "out of memory", np.nan]
    page = Page(ll.reports.report(table, tmp_path / "p.html"))
    assert "6 runs. None diverged. 2 more runs failed, and this page leaves them out." in page.text
    settings = {*page.table("What differs")["setting"], *page.table("What all runs share")["setting"]}
    assert settings.isdisjoint(["retained_loss", "loss_rise", "failed", "reason"])
    again = pd.concat([table, table.assign(loss_rise=0.5, run="again")])
    with pytest.raises(ValueError, match="holds some runs twice"):  # not a mix of settings
        ll.reports.report(again, tmp_path / "p.html")


# with a store


def test_a_store_adds_who_where_and_what_was_forgotten(store, tmp_path):
    kept = ll.experiments.pack(store, tmp_path / "runs.jsonl.xz")
    table = ll.Sweep.open(kept).table
    page = Page(ll.reports.report(ll.Sweep.open(kept).only(table), tmp_path / "p.html"))
    identity = experiment(kept)["identity"]
    assert page.table("What the runs belong to")["hash"].tolist() == [
        identity[key] for key in ("model", "task", "retain")
    ]
    assert page.headings[0] == "Windows of LoRA: learning digits, forgetting fashion_mnist"
    assert (
        page.table("Versions").set_index("package").loc["torch", "of the first runs"]
        == (experiment(kept)["versions"]["torch"])
    )

    curves = ll.Sweep.open(kept).only(table).curves()
    chosen = matched_accuracy(table, curves)
    result = fair_comparison.at_matched_accuracy(table, curves, chosen).query("most_reached")
    shown = page.table("Where the runs first reach").set_index("window or method")
    names = ["window at 0 (PiSSA)", "window at 0.5", "window at 1 (MiLoRA)"]
    found = shown.loc[names, "forgetting (points)"].str.split().str[0].tolist()
    assert (
        found == result.query("method == 'window'").sort_values("position")["forgetting"].map(points).tolist()
    )

    known = ll.forgetting.forgotten_by(ll.Sweep.open(kept).only(table).answers())
    classes = page.table("Test examples by class")
    assert classes["right before"].astype(int).sum() == len(known)
    assert classes["by some run"].astype(int).sum() == (known["share"] > 0).sum()
    weights = page.table("What training did").set_index("window or method")
    runs = table.query("position == 0.5")
    updates = fair_comparison.relative_updates(ll.Sweep.open(kept).only(runs).drifts())
    assert weights.loc["window at 0.5", "size of the update (% of the weights)"] == points(updates.mean())
    assert "The retained task has 60 test examples" in page.text


def test_an_accuracy_may_be_asked_for(store, tmp_path):
    page = Page(ll.reports.report(ll.Sweep.open(store), tmp_path / "p.html", accuracy=0.99))
    shown = page.table("Where the runs first reach an accuracy of 99.0% on the new task (as asked for)")
    assert set(shown["reached"]) == {"0 of 2"} and set(shown["forgetting (points)"]) == {"-"}


def test_the_accuracy_is_one_that_four_fifths_of_every_method_s_runs_reach():
    table = made_up([("window", 0.0), ("window", 1.0), ("linear probe", np.nan)], (0.1, 0.2), seeds=5)
    table.loc[table["method"] == "linear probe", "trainable"] = 0
    best = {
        (0.0, 0.1): [0.9, 0.9, 0.9, 0.9, 0.1],
        (0.0, 0.2): [0.95, 0.95, 0.95, 0.1, 0.1],
        (1.0, 0.1): [0.7, 0.8, 0.8, 0.876, 0.9],
        (1.0, 0.2): [0.1, 0.8512, 0.8612, 0.8712, 0.8812],
    }
    rows = []
    for (position, lr), runs in table.groupby(["position", "lr"], dropna=False):
        for run, score in zip(runs["run"], best.get((position, lr), [0.2] * 5), strict=True):
            rows += [(run, 0, 0.1, 0.9), (run, 15, score, 0.8), (run, 30, 0.05, 0.7)]
    curves = pd.DataFrame(rows, columns=["run", "step", "accuracy", "retained_accuracy"])
    assert matched_accuracy(table, curves) == 0.85
    assert matched_accuracy(table[table["position"] == 0], curves) == 0.9
    assert matched_accuracy(table[table["method"] == "linear probe"], curves) == 0.2
    assert matched_accuracy(table, curves, 0.5) == 0.5


def test_the_experiment_of_a_folder_and_of_its_file(store, tmp_path):
    packed = ll.experiments.pack(store, tmp_path / "runs.jsonl.xz")
    assert experiment(store) == experiment(packed)
    assert set(experiment(store)) == {"identity", "versions"}
    with pytest.raises(FileNotFoundError, match="holds no experiment"):
        experiment(tmp_path)
    with pytest.raises(FileNotFoundError, match="no results folder or file"):
        experiment(tmp_path / "nothing")


# what a sweep cannot tell


def test_without_windows_the_question_is_not_asked(tmp_path):
    page = Page(
        ll.reports.report(made_up([("LoRA", np.nan), ("full fine-tuning", np.nan)]), tmp_path / "p.html")
    )
    assert "Not tested: a U-shape needs windows at positions 0, 1 and between" in page.text
    assert "No curves over positions" in page.text and len(page.images) == 6
    assert page.table(EQUAL_ACCURACY)["window or method"].tolist() == ["LoRA", "full fine-tuning"]


def test_without_windows_no_test_is_among_the_limits(tmp_path):
    methods = [("LoRA", np.nan), ("full fine-tuning", np.nan)]
    text = Page(ll.reports.report(made_up(methods, (0.005,), seeds=3), tmp_path / "p.html")).text
    assert "Intervals are Student's, over 3 seeds" in text and "A single test of a U-shape" not in text


def test_one_seed_has_no_test_and_no_intervals(tmp_path):
    page = Page(ll.reports.report(made_up(rates=(0.005,), seeds=1), tmp_path / "p.html"))
    assert "The seeds are too few for a test." in page.text and "1 seed is too few" in page.text
    assert set(page.table("What the end windows forget more")["p"]) == {"-"}
    assert not page.table(EQUAL_ACCURACY).iloc[:, 1:].stack().str.contains("to").any()
    assert "There is one seed" in page.text


def test_few_seeds_and_diverged_runs_are_named_among_the_limits(tmp_path):
    table = made_up(seeds=4)
    table.loc[:1, "diverged"] = True
    text = Page(ll.reports.report(table.drop(index=5), tmp_path / "p.html")).text
    assert "4 cannot give a p value below 0.0625" in text
    assert "2 runs diverged; the scores after that" in text
    assert "1 of 18 cells of window and rate have fewer seeds" in text
    assert "mean over 3 to 4 seeds" in text
    assert "For 6 of 6 windows and methods the best rate is an end of the grid (0.00001 to 0.02)" in text


def test_one_rate_leaves_no_rate_to_choose(tmp_path):
    page = Page(ll.reports.report(made_up(rates=(0.005,)), tmp_path / "p.html"))
    assert "All runs share the learning rate 0.005: none to choose." in page.text
    assert len(page.images) == 3 and "A U-shape is established in the one test" in page.text


def test_a_half_finished_sweep_says_what_is_missing(tmp_path):
    table = made_up(seeds=2)
    half = table[~((table["position"] == 0.5) & (table["lr"] == 0.02) & (table["seed"] == 0))]
    half = half[~((half["position"] == 0.5) & (half["lr"] == 0.005) & (half["seed"] == 1))]
    page = Page(ll.reports.report(half, tmp_path / "p.html"))
    assert "Not given: no seed of window (rank 8, position 0.5) was run at all its rates" in page.text
    assert "No pictures over learning rates: no seed" in page.text and len(page.images) == 3
    assert page.table(EQUAL_ACCURACY).shape == (6, 4)


def test_ranks_are_told_apart(tmp_path):
    table = pd.concat([made_up(rates=(0.005,), rank=rank) for rank in (4, 16)])
    page = Page(ll.reports.report(table, tmp_path / "p.html"))
    names = page.table(EQUAL_ACCURACY)["window or method"]
    assert names.is_unique and "window at 0.5, rank 16" in set(names) and "LoRA, rank 4" in set(names)
    assert [h for h in page.headings if h.startswith("Rank")] == ["Rank 4", "Rank 16"]
    assert len(page.images) == 1 + 2 * 3
    assert page.table("What the end windows")["learning rate"].tolist() == ["0.005, rank 4", "0.005, rank 16"]
    assert page.table("How often the row is better").shape == (12, 14)
    assert "at learning rate rank 4: 0.005, rank 16: 0.005." in page.text


def test_many_windows_are_set_against_each_other_rank_by_rank(tmp_path):
    def shown_of(table: pd.DataFrame) -> Page:
        path = tmp_path / "part.html"
        sections = [{"heading": "Which window beats which", "pieces": dominance_section(table)}]
        path.write_text(html_page("Ranks", sections))
        return Page(path)

    table = pd.concat([made_up(rates=(0.005,), seeds=2, rank=rank) for rank in (4, 8, 16)])
    page = shown_of(table)
    for rank in (4, 8, 16):
        shown = page.table(f"Rank {rank}: How often the row is better").set_index("window or method")
        pairs = pareto.dominance(table[table["rank"] == rank])
        first = pairs.query("position_a == 0 and position_b == 0.5")
        assert shown.shape == (6, 7)
        assert shown.loc["1. window at 0 (PiSSA)", "3"] == points(first["a_beats_b"].item())
        assert shown.loc["3. window at 0.5", "1"] == points(first["b_beats_a"].item())
    alone = pd.concat([made_up([("window", 0.5)], (0.005,), 2, rank) for rank in range(1, 15)])
    assert shown_of(alone).table("How often the row is better").shape == (14, 16)


# refusals


def test_nothing_but_an_earlier_report_is_replaced(tmp_path):
    table = made_up([("LoRA", np.nan)], rates=(0.005,))
    path = ll.reports.report(table[:2], tmp_path / "p.html")
    before = path.read_bytes()
    assert ll.reports.report(table, path) == path and path.read_bytes() != before
    other = tmp_path / "mine.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(FileExistsError, match="was not written by lora_lens report"):
        ll.reports.report(table, other)
    assert other.read_text() == "<html>mine</html>"
    notes = path.read_text().replace("</h1>", ", with my notes</h1>", 1)
    path.write_text(notes)
    with pytest.raises(FileExistsError, match="was edited since it was written"):
        ll.reports.report(table, path)
    assert path.read_text() == notes
    with pytest.raises(TypeError, match="path must be the file to write, such as"):
        ll.reports.report(table, None)


def test_places_that_cannot_be_written_to_are_named(table, tmp_path):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        ll.reports.report(table, tmp_path / "folder.html")
    with pytest.raises(ValueError, match=r"must end in .html, not 'report.pdf'"):
        ll.reports.report(table, tmp_path / "report.pdf")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ll.reports.report(table, tmp_path / "nowhere" / "p.html")


def test_tables_that_make_no_report_leave_the_old_one(table, store, tmp_path):
    path = ll.reports.report(made_up([("LoRA", np.nan)], (0.005,)), tmp_path / "p.html")
    before = path.read_bytes()
    mixed = pd.concat([table, table.assign(steps=60, run="other")])
    unknown = table[:2]
    for wrong, options, error, message in (
        (table.drop(columns=["forgetting", "lr"]), {}, ValueError, "no column lr, forgetting"),
        (table[:0], {}, ValueError, "the table is empty"),
        (table.assign(accuracy=np.nan), {}, ValueError, "no run of the table has a value of accuracy"),
        (mixed, {}, ValueError, r"mixes values of steps; report one at a time, such as the first: table\["),
        (pd.concat([table, table]), {}, ValueError, "holds some runs twice"),
        (table, {"accuracy": 0.8}, ValueError, r"pass the ll\.Sweep"),
        (ll.Sweep.open(store), {"accuracy": 80}, ValueError, "must be a share"),
        (ll.Sweep.open(store).only(unknown), {}, FileNotFoundError, "holds no run window"),
    ):
        with pytest.raises(error, match=message):
            ll.reports.report(wrong, path, **options)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["p.html"]
