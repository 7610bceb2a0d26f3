"""No sentence of a notebook about runs that a machine makes contradicts these runs, whatever they are.

Notebook 03 is executed anew on other seeds, rates and threads, after few steps; and its folded cells are
executed on stored tables of all kinds. What is true is computed here, from the runs, and not by
:mod:`lora_lens.reports`.
"""

from __future__ import annotations

import ast
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_1samp

import lora_lens as ll

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks/03_tradeoff.ipynb"
FIGURE = r"-?\d+\.\d(?!\d)"  # one digit after the point: no rate, and no position but 0.5
FIGURES = rf"{FIGURE}(?:(?:, | and ){FIGURE})*"
RATE = r"\d\.\d\d+"
RATES = rf"(?:{RATE}(?:, | and )?)+"
ROUNDED = 0.0501  # in points: a figure has one digit after the point
SCORES = ["accuracy", "retained_accuracy", "forgetting"]
OTHERWISE = {  # what another run of 03 has in place of: a minute of one core, and numbers of other sizes
    "tradeoff-03": {"first(test=1000)": "first(test=200)", "train=4000, test=1000": "train=120, test=250"},
    "tradeoff-07": {
        "count=5": "count=3",
        "[5e-3, 1e-2]": "[1e-2, 4e-2]",
        "range(3)": "range(7, 9)",
        "steps=120": "steps=10,\n    jobs=1",
        "batch_size=32": "batch_size=8",
    },
}


@dataclass
class Told:
    """What notebook 03 says of runs.

    Attributes:
        said: by its folded cells, by the cells' ids.
        shown: the table of means that it writes as text.
        runs: one row each.
        images: of the new task, that a run was tested on.
    """

    said: dict[str, str]
    shown: str
    runs: pd.DataFrame
    images: int

    @property
    def text(self) -> str:
        return "\n".join(self.said.values())

    @property
    def rates(self) -> list[float]:
        return sorted(self.runs["lr"].unique())

    @property
    def means(self) -> pd.DataFrame:
        """In percent, one row for each window or method and rate."""
        name = self.runs["position"].astype(object).where(self.runs["position"].notna(), self.runs["method"])
        return self.runs.groupby([name.rename("name"), "lr"], sort=False)[SCORES].mean().mul(100)

    @property
    def front(self) -> pd.DataFrame:
        """Of these rows those that no other beats, by accuracy."""
        ours, kept = (self.means[score].to_numpy() for score in ("accuracy", "retained_accuracy"))
        beaten = [
            ((ours >= a) & (kept >= k) & ((ours > a) | (kept > k))).any()
            for a, k in zip(ours, kept, strict=True)
        ]
        return self.means[~np.array(beaten)].sort_values("accuracy")

    def differences(self, one: float | str, other: float | str, score: str) -> pd.DataFrame:
        """Of two windows or methods, (rates, seeds)."""
        at = ["lr", "seed"]
        one, other = (
            self.runs[self.runs["position" if isinstance(name, float) else "method"] == name]
            for name in (one, other)
        )
        return (one.set_index(at)[score] - other.set_index(at)[score]).unstack()


def folded(cell: dict) -> bool:
    return cell["metadata"].get("jupyter") == {"source_hidden": True}


def told_of(table: pd.DataFrame, results: Path, images: int = 1000) -> Told:
    """From a table, without executing the rest of the notebook."""
    cells = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}
    names = {
        "ll": ll,
        "pd": pd,
        "table": table,
        "results": results,
        "digits": ll.tasks.bundled.digits().first(test=images),
    }
    exec("".join(cells["tradeoff-09"]["source"]), names)
    names["front"] = names["means"][ll.forgetting.pareto_front(names["means"])].sort_values("accuracy")
    said = {id: shown("".join(cell["source"]), names) for id, cell in cells.items() if folded(cell)}
    return Told(said, (results / "table.txt").read_text(), table, images)


def shown(source: str, names: dict[str, object]) -> str:
    """The Markdown that a cell's last line makes."""
    tree = ast.parse(source)
    exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(tree.body[-1].value), "cell", "eval"), names).data


def executed_anew(results: Path) -> Told:
    """From another run of the whole notebook, with two threads."""
    import nbformat  # which takes seconds
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell["id"]: cell for cell in notebook.cells}
    for cell, changes in OTHERWISE.items():
        for there, other in changes.items():
            assert cells[cell].source.count(there) == 1, there
            cells[cell].source = cells[cell].source.replace(there, other)
    environment = os.environ | {
        "LORA_LENS_RESULTS": str(results),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # or two threads spin, waiting for each other, where others work
        "TQDM_DISABLE": "1",
    }
    client = NotebookClient(
        notebook, timeout=1800, startup_timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute(env=environment)
    said = {id: cell.outputs[-1].data["text/markdown"] for id, cell in cells.items() if folded(cell)}
    return Told(said, (results / "table.txt").read_text(), ll.Sweep.open(results / "sweep").table, 250)


def usual(table: pd.DataFrame, seeds: range = range(3)) -> pd.DataFrame:
    """Of five seeds, at the rates of notebook 03."""
    return table[table["seed"].isin(seeds) & table["lr"].between(0.005, 0.01)]


def mirrored(table: pd.DataFrame) -> pd.DataFrame:
    """The last window's runs are said to be the first's, and the other way round."""
    return table.assign(position=1 - table["position"])


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    """In each seed other windows are the good ones."""
    order = np.random.default_rng(0).permutation
    return table.assign(
        **table.groupby(["seed", "lr"])[SCORES].transform(lambda runs: order(runs.to_numpy()))
    )


def single(table: pd.DataFrame) -> pd.DataFrame:
    """The middle window at the lower rate is better than all others, in both tasks."""
    best = (table["position"] == 0.5) & (table["lr"] == table["lr"].min())
    return table.assign(
        accuracy=table["accuracy"].where(~best, 0.99),
        retained_accuracy=table["retained_accuracy"].where(~best, table["retained_before"]),
        forgetting=table["forgetting"].where(~best, 0.0),
    )


def shaped(table: pd.DataFrame) -> pd.DataFrame:
    """Both ends forget far more than the windows between: a U."""
    worse = 0.3 * table["position"].isin([0.0, 1.0])
    return table.assign(
        forgetting=table["forgetting"] + worse, retained_accuracy=table["retained_accuracy"] - worse
    )


TABLES = {
    "five seeds": lambda table: usual(table, range(5)),
    "three seeds": usual,
    "two other seeds": lambda table: usual(table, range(3, 5)),
    "one seed": lambda table: usual(table, range(4, 5)),
    "four rates": lambda table: table[table["seed"] < 3],  # as after exercise 1
    "mirrored": lambda table: mirrored(usual(table)),
    "shuffled": lambda table: shuffled(usual(table)),
    "a U": lambda table: shaped(usual(table)),
    "one best": lambda table: single(usual(table)),
}


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    """Five seeds at four rates; random components stand in for full fine-tuning."""
    table = ll.Sweep.open(ROOT / "data/results/digits.jsonl.xz").table
    return table.replace({"method": {"8 random components, seed 0": "full fine-tuning"}})


@pytest.fixture(scope="module", params=["executed anew", *TABLES])
def told(request, stored, tmp_path_factory) -> Told:
    results = tmp_path_factory.mktemp("results")
    if request.param == "executed anew":
        return executed_anew(results)
    return told_of(TABLES[request.param](stored), results)


def taken(pattern: str, text: str) -> tuple[list[tuple[str, ...]], str]:
    """The groups of the places that match, and the text without these places."""
    found = [match.groups() for match in re.finditer(pattern, text)]
    assert found, pattern
    return found, re.sub(pattern, "", text)


def test_the_table_of_notebook_03_is_that_of_its_runs(told):
    for name, rates in told.means.groupby(level="name", sort=False):
        name = name if isinstance(name, str) else f"window {name:.3f}"
        (line,) = (line for line in told.shown.splitlines() if line.startswith(f"{name} "))
        found = [float(figure) for figure in line.removeprefix(name).split()]
        rates = rates.sort_index(level="lr")
        assert found == pytest.approx([*rates["accuracy"], *rates["forgetting"]], abs=ROUNDED)
    assert f"means over {told.runs['seed'].nunique()} seeds" in told.shown


def test_every_figure_of_notebook_03_stands_in_its_table(told):
    apart, text = taken(f"lie up to ({FIGURE}) points apart", told.text)
    ((width,),), text = taken(f"all windows after PiSSA's lie within ({FIGURE}) points of accuracy", text)
    grown = "by (?) points with PiSSA, by (?) with the middle window and by (?) with MiLoRA"
    (growth,), text = taken(grown.replace("?", FIGURE), text)
    ((images, right, wrong, of, error),), text = taken(
        rf"on ([\d,]+) images the .*sqrt{{(0\.\d+) \\cdot (0\.\d+) / (\d+)}}\$ = ({FIGURE}) points", text
    )
    if len(told.front) > 1:
        (last_step,), text = taken(f"pays ({FIGURE}) points of the old task for ({FIGURE}) of the new", text)
        expected = told.front[["forgetting", "accuracy"]].diff().iloc[-1]
        assert [float(x) for x in last_step] == pytest.approx(list(expected), abs=ROUNDED)
    seeds = told.runs["seed"].nunique()
    if seeds > 1:
        (said,), text = taken(rf"With (\d+) seeds it reaches ({FIGURE}) standard deviations", text)
        assert [float(x) for x in said] == pytest.approx(
            [seeds, t.ppf(0.975, seeds - 1) / seeds**0.5], abs=0.051
        )
    text = re.sub(r"position [\d.]+\d", "", text)

    figures = re.findall(f"({FIGURES})( %)?", text)
    for some, percent in figures:
        column = told.means["accuracy" if percent else "forgetting"].to_numpy()
        for figure in re.findall(FIGURE, some):
            assert np.abs(column - float(figure)).min() < ROUNDED, some
    assert len(re.findall(FIGURE, text)) > 30

    windows = told.runs[told.runs["method"] == "window"]
    of_one = windows.groupby(["lr", "position"])["forgetting"]
    spread = 100 * (of_one.max() - of_one.min()).groupby("lr").max()
    assert [float(x) for (x,) in apart] == pytest.approx(list(spread), abs=ROUNDED)
    flat = windows[windows["position"] > 0].groupby(["position", "lr"])["accuracy"].mean().unstack()
    assert float(width) == pytest.approx(100 * (flat.max() - flat.min()).max(), abs=ROUNDED)
    learns = told.means.loc[(0.5, told.rates[0]), "accuracy"] / 100
    assert [float(right), float(wrong)] == pytest.approx([learns, 1 - learns], abs=0.0006)
    assert int(images.replace(",", "")) == int(of) == told.images
    assert float(error) == pytest.approx(100 * (learns * (1 - learns) / told.images) ** 0.5, abs=ROUNDED)
    of_window = windows.pivot_table(index="position", columns="lr", values="forgetting")
    assert [float(x) for x in growth] == pytest.approx(
        list(100 * (of_window[told.rates[-1]] - of_window[told.rates[0]])[[0.0, 0.5, 1.0]]), abs=ROUNDED
    )


PLACES = {  # a sentence's figures are those of this window or method; {} stands for them
    r"At {rate} PiSSA forgets {} points, the other": (0.0, "forgetting"),
    r"At {rate} PiSSA gets {} % of the digits right, the other": (0.0, "accuracy"),
    r"At {rate} PiSSA forgets {} points, MiLoRA": (0.0, "forgetting"),
    r"At {rate} PiSSA forgets [-.\d]+ points, MiLoRA {}, the best": (1.0, "forgetting"),
    r"At {rate} PiSSA gets {} % of the digits right, the middle": (0.0, "accuracy"),
    r"At {rate} PiSSA gets [-.\d]+ % of the digits right, the middle window {} %, MiLoRA": (0.5, "accuracy"),
    r"At {rate} PiSSA gets .* %, MiLoRA {} %\. The middle": (1.0, "accuracy"),
}
OF_ALL_RATES = {
    r"\*\* PiSSA forgets {} points, the middle window": (0.0, "forgetting"),
    r"\*\* PiSSA forgets [-.,\d and]+ points, the middle window {}\. Of": (0.5, "forgetting"),
    r"\. Of the digits PiSSA gets {} % right": (0.0, "accuracy"),
    r"\. Of the digits PiSSA gets .* % right, the middle window {} %": (0.5, "accuracy"),
    r"\*\* MiLoRA forgets {} points": (1.0, "forgetting"),
    r"\*\*Ordinary LoRA\*\* forgets {} points": ("LoRA", "forgetting"),
    r"\*\*Full fine-tuning\*\* forgets {} points": ("full fine-tuning", "forgetting"),
}


def test_each_figure_of_notebook_03_is_that_of_the_window_it_is_told_of(told):
    for pattern, (name, score) in PLACES.items():
        found = re.findall(pattern.format(f"({FIGURE})", rate=f"({RATE})"), told.text)
        assert found, pattern
        for rate, figure in found:
            assert float(figure) == pytest.approx(told.means.loc[(name, float(rate)), score], abs=ROUNDED), (
                pattern
            )
    for pattern, (name, score) in OF_ALL_RATES.items():
        (figures,) = re.findall(pattern.format(f"({FIGURES})"), told.text)
        expected = told.means.loc[name, score].sort_index()
        assert [float(x) for x in re.findall(FIGURE, figures)] == pytest.approx(
            list(expected), abs=ROUNDED
        ), pattern


def test_ranges_of_notebook_03_reach_from_the_lowest_to_the_highest_window(told):
    ranges = {
        rf"At ({RATE}) PiSSA forgets .* points, the other windows between ({FIGURES})\.": (
            "forgetting",
            0.01,
        ),
        rf"At ({RATE}) PiSSA gets .*, the other windows between ({FIGURES}) %": ("accuracy", 0.01),
    }
    for pattern, (score, least) in ranges.items():
        found = re.findall(pattern, told.text)
        assert [float(rate) for rate, _ in found] == told.rates
        for rate, figures in found:
            windows = told.runs[(told.runs["position"] >= least) & (told.runs["lr"] == float(rate))]
            means = 100 * windows.groupby("position")[score].mean()
            assert [float(x) for x in re.findall(FIGURE, figures)] == pytest.approx(
                [means.min(), means.max()], abs=ROUNDED
            )


def test_the_words_of_notebook_03_agree_with_its_table(told):
    comparisons = {
        r"Compared with the middle window PiSSA forgets (.*?);": (0.0, 0.5, "forgetting"),
        r"; MiLoRA forgets (.*?)\. A U": (1.0, 0.5, "forgetting"),
        r"Compared with the middle window PiSSA learns (.*?)\.(?!\d)": (0.0, 0.5, "accuracy"),
        r"avoid the first\? (.*?)\.\*": (0.0, 0.5, "forgetting"),
        r"%: PiSSA learns (.*?)\.(?!\d)": (0.0, 0.5, "accuracy"),
        r"And the last\? (.*?)\.\*": (1.0, 0.5, "forgetting"),
        r"points: compared with the middle window (.*?)\.(?!\d)": ("LoRA", 0.5, "forgetting"),
        r"points: compared with ordinary LoRA (.*?)\.(?!\d)": ("full fine-tuning", "LoRA", "forgetting"),
    }
    for pattern, (one, other, score) in comparisons.items():
        ((sentence,),), _ = taken(pattern, told.text)
        difference, rates = told.differences(one, other, score), []
        for word, some in re.findall(rf"([A-Za-z ]+) at ({RATES})", sentence):
            for rate in re.findall(RATE, some):
                rates.append(float(rate))
                agrees(word, difference.loc[float(rate)])
        assert sorted(rates) == told.rates, sentence
    (high,), _ = taken(rf"At ({RATE}) PiSSA gets .*, MiLoRA .* %\. The middle window learns", told.text)
    assert [float(rate) for rate in high] == told.rates[-1:]
    than_first, than_last = re.search("learns (.*) than PiSSA, and (.*) than MiLoRA", told.text).groups()
    agrees(than_first, told.differences(0.5, 0.0, "accuracy").iloc[-1])
    agrees(than_last, told.differences(0.5, 1.0, "accuracy").iloc[-1])
    first, last = re.search(
        r"PiSSA's grows (.*) than the middle window's, MiLoRA's (.*)\. At", told.text
    ).groups()
    ends = [float(rate) for rate in re.search(rf"From ({RATE}) to ({RATE}) forgetting", told.text).groups()]
    assert ends == [told.rates[0], told.rates[-1]]
    for word, end in ((first, 0.0), (last, 1.0)):
        seeds = told.differences(end, 0.5, "forgetting")
        agrees(word, seeds.iloc[-1] - seeds.iloc[0])


def agrees(word: str, seeds: pd.Series) -> None:
    """The word is that of the t test of the seeds' differences; a single seed has none."""
    sign = {"more": 1, "yes": 1, "less": -1, "no": -1}.get(word.strip().lower(), 0)
    assert sign or word.strip().lower() in ("neither clearly more nor less", "not clearly")
    alike = np.ptp(seeds) == 0  # which the test has no p for
    clear = len(seeds) > 1 and (seeds.iloc[0] != 0 if alike else ttest_1samp(seeds, 0).pvalue < 0.05)
    assert sign == (np.sign(seeds.mean()) if clear else 0)


def test_each_u_of_notebook_03_is_one(told):
    said, shaped = told.said["tradeoff-21"], []
    rows = re.findall(
        rf"At ({RATE}) PiSSA .*position ([\d.]+)\) ({FIGURE})\..*PiSSA forgets (.*?); MiLoRA forgets (.*)\.",
        said,
    )
    for rate, best, figure, *words in rows:
        forgotten = told.means.xs(float(rate), level="lr")["forgetting"]
        between = forgotten[[name for name in forgotten.index if isinstance(name, float) and 0 < name < 1]]
        assert float(figure) == pytest.approx(between.min(), abs=ROUNDED)
        assert between[float(best)] == pytest.approx(between.min())
        for end, word in zip((0.0, 1.0), words, strict=True):
            agrees(word, told.differences(end, float(best), "forgetting").loc[float(rate)])
        shaped += [rate] if words == ["more", "more"] else []
    assert [float(rate) for rate, *_ in rows] == told.rates
    assert re.findall(RATE, said.rpartition("makes a U")[2]) == shaped


def test_the_front_of_notebook_03_is_told_from_end_to_end(told):
    said = told.said["notice-plane"]
    places = re.findall(
        r"(?:begins with|ends with|single point,) (.*?), which learns (.*?) % and forgets (.*?) points", said
    )
    ends = told.front.iloc[[0, -1]] if len(told.front) > 1 else told.front
    assert len(places) == len(ends)
    for (place, *figures), ((name, rate), row) in zip(places, ends.iterrows(), strict=True):
        name = f"{name} at" if isinstance(name, str) else f"the window at position {name:g} and"
        assert place == f"{name} rate {rate:g}"
        assert [float(x) for x in figures] == pytest.approx([row["accuracy"], row["forgetting"]], abs=ROUNDED)
    first = told.means.loc[0.0].query("accuracy >= 90 and retained_accuracy >= 80")
    listed = re.search("PiSSA is (.*?)\\.\\n", said)[1]
    assert [float(rate) for rate in re.findall(RATE, listed)] == sorted(first.index)
    assert ("not in this corner at all" in listed) == first.empty


def test_sentences_turn_where_their_comparison_turns(stored, tmp_path):
    assert "avoid the first? Yes at 0.005 and 0.01." in told_of(usual(stored, range(5)), tmp_path).text
    turned = told_of(mirrored(usual(stored, range(5))), tmp_path).text
    assert "And the last? Yes at 0.005 and 0.01." in turned
    assert "avoid the first? Yes" not in turned


def test_figures_in_the_solutions_of_notebook_03_are_those_of_their_code(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
        outside, _, solution = text.partition("<details>")
        figures = re.findall(FIGURE, re.sub(r"```.*?```", "", solution, flags=re.DOTALL))
        assert not re.findall(rf"{FIGURE} (?:%|points)", outside), "a result is typed into a text"
        if figures:
            tree = ast.parse(re.search(r"```python\n(.*?)```", solution, re.DOTALL)[1])
            names = {"ll": ll}
            exec(compile(ast.Module(tree.body[:-1], []), "solution", "exec"), names)
            table = eval(compile(ast.Expression(tree.body[-1].value), "solution", "eval"), names)
            assert {float(figure) for figure in figures} <= set(table.to_numpy().ravel()), cell["id"]


def cell_of(notebook: str, id: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    return next("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["id"] == id)


def test_the_live_run_of_notebook_05_is_told_as_it_went(model, digits, source):
    said = set()
    for rate in (1e-4, 3e-2):
        adapted = ll.attach(model, ll.Window.first(8))
        run = ll.finetune(
            adapted,
            digits.first(train=80, test=100),
            retain=source.first(test=100),
            lr=rate,
            steps=10,
            batch_size=8,
            evaluations=2,
            progress=False,
        )
        names = {"run": run, "points": ll.reports.points, "say": ll.reports.say}
        text = shown(cell_of("05", "minilm-live"), names)
        *figures, verb = re.search(
            rf"from ({FIGURE}) to ({FIGURE}) %, and ({FIGURE}) points .* (lost|gained)", text
        ).groups()
        expected = [run.curve["accuracy"].iloc[0], run.accuracy, abs(run.forgetting)]
        assert [float(x) for x in figures] == pytest.approx([100 * x for x in expected], abs=ROUNDED)
        assert (verb == "lost") == (run.forgetting > 0)
        said.add(text)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("end", "suffers"),
    [((0.5, 0.8), "The older"), ((0.9, 0.4), "The newer"), ((0.8, 0.7), "Both"), ((0.95, 1.0), "Neither")],
)
def test_the_live_sequence_of_notebook_07_is_told_as_it_went(end, suffers):
    nan = float("nan")
    R = np.array([[0.9, nan, nan], [0.85, 0.8, nan], [*end, 0.99]])
    live = pd.DataFrame({"place": [2, 0, 1], "task": ["coat, sandal", "top, trouser", "pullover, dress"]})
    text = shown(cell_of("07", "live-notice"), {"live": live, "R": R, "live_steps": 7})
    assert f'"top, trouser" has gone from 90 to {100 * end[0]:.0f} %' in text
    assert f'"pullover, dress" has gone from 80 to {100 * end[1]:.0f} %' in text
    assert f"%. {suffers} " in text and "7 steps" in text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_readers_see_sentences_and_not_what_makes_them(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^(say\(|from lora_lens.reports import)", source, re.M):
            assert cell["metadata"] == {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]}, cell[
                "id"
            ]
