from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

import lora_lens as ll

ROOT = Path(__file__).parents[2]
FIGURE = r"-?\d+\.\d(?!\d)"  # one digit after the point: no rate, and no position but 0.5
FIGURES = rf"{FIGURE}(?:(?:, | and ){FIGURE})*"
RATES = r"(?:[\d.]+(?:, | and )?)+"


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    """Five seeds at the rates of notebook 03; random components stand in for full fine-tuning."""
    table = ll.Sweep.open(ROOT / "data/results/digits.jsonl.xz").only("lr >= 0.005 and lr <= 0.01").table
    return table.replace({"method": {"8 random components, seed 0": "full fine-tuning"}})


def mirrored(table: pd.DataFrame) -> pd.DataFrame:
    """The last window's runs are said to be the first's, and the other way round."""
    return table.assign(position=1 - table["position"])


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    """In each seed other windows are the good ones."""
    order = np.random.default_rng(0).permutation
    scores = ["accuracy", "retained_accuracy", "forgetting"]
    return table.assign(
        **table.groupby(["seed", "lr"])[scores].transform(lambda runs: order(runs.to_numpy()))
    )


TABLES = {
    "five seeds": lambda table: table,
    "three seeds": lambda table: table[table["seed"] < 3],
    "two other seeds": lambda table: table[table["seed"] > 2],
    "one seed": lambda table: table[table["seed"] == 4],
    "mirrored": lambda table: mirrored(table[table["seed"] < 3]),
    "shuffled": lambda table: shuffled(table[table["seed"] < 3]),
}


class Told:
    """What notebook 03 says of a table in its folded cells, by the cells' ids, and the table's own means."""

    def __init__(self, table: pd.DataFrame, results: Path) -> None:
        cells = json.loads((ROOT / "notebooks/03_tradeoff.ipynb").read_text())["cells"]
        source = {cell["id"]: "".join(cell["source"]) for cell in cells}
        self.folded = [c["id"] for c in cells if c["metadata"].get("jupyter") == {"source_hidden": True}]
        names = {"ll": ll, "pd": pd, "table": table, "results": results}
        exec(source["tradeoff-09"], names)
        names["front"] = names["means"][ll.forgetting.pareto_front(names["means"])].sort_values("accuracy")
        self.said = {}
        for cell in self.folded:
            tree = ast.parse(source[cell])
            exec(compile(ast.Module(tree.body[:-1], []), cell, "exec"), names)
            self.said[cell] = eval(compile(ast.Expression(tree.body[-1].value), cell, "eval"), names).data
        self.shown, self.table, self.front = names["shown"], table, names["front"]

    @property
    def text(self) -> str:
        return "\n".join(self.said.values())

    def differences(self, one: float | str, other: float | str, score: str) -> pd.DataFrame:
        """Of two windows or methods, (rates, seeds)."""
        at = ["lr", "seed"]
        one, other = (
            self.table[self.table["position" if isinstance(name, float) else "method"] == name]
            for name in (one, other)
        )
        return (one.set_index(at)[score] - other.set_index(at)[score]).unstack()


@pytest.fixture(scope="module", params=TABLES)
def told(request, stored, tmp_path_factory) -> Told:
    return Told(TABLES[request.param](stored), tmp_path_factory.mktemp("results"))


def taken(pattern: str, text: str) -> tuple[list[tuple[str, ...]], str]:
    """The groups of the places that match, and the text without these places."""
    found = [match.groups() for match in re.finditer(pattern, text)]
    assert found, pattern
    return found, re.sub(pattern, "", text)


def test_every_figure_of_notebook_03_stands_in_its_table(told):
    apart, text = taken(f"lie up to ({FIGURE}) points apart", told.text)
    ((pays, gains),), text = taken(f"pays ({FIGURE}) points of the old task for ({FIGURE}) of the new", text)
    ((width,),), text = taken(f"all windows from 0.375 on lie within ({FIGURE}) points of accuracy", text)
    grown = "by (?) points with PiSSA, by (?) with the middle window and by (?) with MiLoRA"
    (growth,), text = taken(grown.replace("?", FIGURE), text)
    ((error,),), text = taken(rf"1000}}\$ = ({FIGURE}) points", text)
    _, text = taken(r"(position) [\d.]+\d", text)

    figures = re.findall(f"({FIGURES})( %)?", text)
    for some, percent in figures:
        column = told.shown["accuracy" if percent else "forgetting"]
        assert {float(x) for x in re.findall(FIGURE, some)} <= set(column.to_numpy().ravel()), some
    assert len(re.findall(FIGURE, text)) > 40

    windows = told.table[told.table["method"] == "window"]
    of_one = windows.groupby(["lr", "position"])["forgetting"]
    spread = 100 * (of_one.max() - of_one.min()).groupby("lr").max()
    assert [float(x) for (x,) in apart] == pytest.approx(list(spread), abs=0.051)
    last_step = told.front[["forgetting", "accuracy"]].diff().iloc[-1]
    assert [float(pays), float(gains)] == pytest.approx(list(100 * last_step), abs=0.051)
    flat = windows[windows["position"] >= 0.375].groupby(["position", "lr"])["accuracy"].mean().unstack()
    assert float(width) == pytest.approx(100 * (flat.max() - flat.min()).max(), abs=0.051)
    assert 0.7 < float(error) <= 1.0
    of_window = windows.pivot_table(index="position", columns="lr", values="forgetting")
    assert [float(x) for x in growth] == pytest.approx(
        list(100 * (of_window[0.01] - of_window[0.005])[[0.0, 0.5, 1.0]]), abs=0.051
    )


def test_the_words_of_notebook_03_agree_with_its_table(told):
    comparisons = {
        r"Beside the middle window PiSSA forgets (.*?);": (0.0, 0.5, "forgetting"),
        r"; MiLoRA forgets (.*?)\. A U": (1.0, 0.5, "forgetting"),
        r"Beside the middle window PiSSA learns (.*?)\.(?!\d)": (0.0, 0.5, "accuracy"),
        r"avoid the first\? (.*?)\.\*": (0.0, 0.5, "forgetting"),
        r"%: PiSSA learns (.*?)\.(?!\d)": (0.0, 0.5, "accuracy"),
        r"And the last\? (.*?)\.\*": (1.0, 0.5, "forgetting"),
        r"points: beside the middle window (.*?)\.(?!\d)": ("LoRA", 0.5, "forgetting"),
    }
    for pattern, (one, other, score) in comparisons.items():
        ((sentence,),), _ = taken(pattern, told.text)
        difference, rates = told.differences(one, other, score), []
        for word, some in re.findall(rf"([A-Za-z ]+) at ({RATES})", sentence):
            rates += [float(rate) for rate in re.findall(r"\d\.\d+", some)]
            for rate in re.findall(r"\d\.\d+", some):
                agrees(word, difference.loc[float(rate)])
        assert sorted(rates) == list(difference.index), sentence
    than_first, than_last = re.search("learns (.*) than PiSSA, and (.*) than MiLoRA", told.text).groups()
    agrees(than_first, told.differences(0.5, 0.0, "accuracy").iloc[-1])
    agrees(than_last, told.differences(0.5, 1.0, "accuracy").iloc[-1])
    first, last = re.search(
        r"PiSSA's grows (.*) than the middle window's, MiLoRA's (.*)\. At", told.text
    ).groups()
    for word, end in ((first, 0.0), (last, 1.0)):
        agrees(word, told.differences(end, 0.5, "forgetting").diff().iloc[-1])


def agrees(word: str, seeds: pd.Series) -> None:
    """The word is that of the t test of the seeds' differences; a single seed has none."""
    sign = {"more": 1, "yes": 1, "less": -1, "no": -1}.get(word.strip().lower(), 0)
    assert sign or word.strip().lower() in ("neither clearly more nor less", "not clearly")
    clear = len(seeds) > 1 and ttest_1samp(seeds, 0).pvalue < 0.05
    assert sign == (np.sign(seeds.mean()) if clear else 0)


def test_each_u_of_notebook_03_is_one(told):
    said, shaped = told.said["tradeoff-21"], []
    rows = re.findall(
        r"At ([\d.]+) PiSSA .*position ([\d.]+)\).*PiSSA forgets (.*?); MiLoRA forgets (.*)\.", said
    )
    for rate, best, *words in rows:
        for end, word in zip((0.0, 1.0), words, strict=True):
            agrees(word, told.differences(end, float(best), "forgetting").loc[float(rate)])
        shaped += [rate] if words == ["more", "more"] else []
    assert len(rows) == 2
    assert re.findall(r"0\.\d+", said.rpartition("makes a U")[2]) == shaped


def test_the_front_of_notebook_03_is_told_from_end_to_end(told):
    scores = ["accuracy", "retained_accuracy"]
    means = told.table.groupby(["method", "position", "lr"], dropna=False)[scores].mean().reset_index()
    ends = re.search(
        "begins with (.*?), which .* and ends with (.*?), which", told.said["notice-plane"]
    ).groups()
    for end, score in zip(ends, ("retained_accuracy", "accuracy"), strict=True):
        best = means[np.isclose(means[score], means[score].max())]
        assert end in [
            f"the window at position {p:g} and rate {r:g}" if m == "window" else f"{m} at rate {r:g}"
            for m, p, r in zip(best["method"], best["position"], best["lr"], strict=True)
        ]
    inside = means.query("position == 0 and accuracy >= 0.9 and retained_accuracy >= 0.8")
    assert ("not in this corner at all" in told.said["notice-plane"]) == inside.empty


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_readers_see_sentences_and_not_what_makes_them(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^(say\(|from lora_lens.reports import)", source, re.M):
            assert cell["metadata"] == {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]}, cell[
                "id"
            ]


def test_sentences_turn_where_their_comparison_turns(stored, tmp_path):
    assert "avoid the first? Yes at 0.005 and 0.01." in Told(stored, tmp_path).text
    turned = Told(mirrored(stored), tmp_path).text
    assert "And the last? Yes at 0.005 and 0.01." in turned
    assert "avoid the first? Yes" not in turned


def test_runs_that_cannot_be_told_apart_are_refused(stored):
    with pytest.raises(
        ValueError, match=r"two runs of the window at 0 share learning rate 0\.005 and seed 0; keep"
    ):
        windows = stored[stored["position"] == 0].sort_values(["lr", "seed"])
        ll.reports.by_seed(
            pd.concat([windows, windows.assign(run=windows["run"] + "b", rank=4)]), "forgetting"
        )
    forgetting = ll.reports.by_seed(stored, "forgetting")
    with pytest.raises(ValueError, match="keep the rates that both have"):
        ll.reports.at_each_rate(forgetting[0.0], forgetting[0.5].drop(columns=0.01))


def test_seeds_are_paired_by_number_and_one_alone_decides_nothing():
    one, other = pd.Series({0: 0.1, 1: 0.5, 2: 0.9}), pd.Series({2: 0.8, 1: 0.4, 0: 0.05})
    assert ll.reports.more_or_less(one, other) == "more"
    assert ll.reports.more_or_less(other, one) == "less"
    assert ll.reports.more_or_less(one, one) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one[:1], other[2:]) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one, other[:1]) == "neither clearly more nor less"
    assert ll.reports.more_or_less(one, list(other[::-1])) == "more"
    for unpaired in (other.rename({0: 7, 1: 8, 2: 9}), list(other[:2])):
        with pytest.raises(ValueError, match="no pairs; give a value of each for the same seeds"):
            ll.reports.more_or_less(one, unpaired)
    assert ll.reports.points([0.92, 0.931]) == str(pd.Series([0.92, 0.931]).mul(100).mean().round(1))


def test_an_interval_has_two_ends_with_signs():
    assert ll.reports.interval((-0.00001, 0.0624)) == "+0.0 to +6.2"
    with pytest.raises(ValueError, match="shares must be the two ends of an interval, not"):
        ll.reports.interval((0.1, 0.2, 0.3))
