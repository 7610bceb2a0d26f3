"""Figures in the README and in docs are those of the stored runs: recomputed here, and compared."""

from __future__ import annotations

import ast
import json
import re
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest

import lora_lens as ll

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "data" / "results"
MINUS = "\u2212"
NUMBER = rf"(?<![\w.])[-+{MINUS}]?\d+(?:\.\d+)?"
ROUNDED = 0.0501  # a stored value with four digits, rounded again
# Figures of results, not of settings: shares, points and nats, p values, intervals.
RESULT = r"\d+\.\d+ ?(?:%|points|nats)|\b(?!95 %)\d{2} %|p = 0\.\d|\d\.\d\d? (?:to|and) \d+\.\d|= 0\.\d\d"
NO_RESULTS = {  # of stored runs, though they look like it
    "is-it-a-u": "the least p of five seeds",
    "limits": "the least p of some seeds and rates",
    "480a86eb": "nats as factors",
    "best-text": "an accuracy to ask for",
    "exercise-2": "a simulation, which stands there in full",
    "exercise-3": "a colleague's report",
}


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def rows_of(page: str) -> dict[tuple[str, ...], list[float]]:
    """The numbers of a page's table rows, by what the cells before them say."""
    rows, before = {}, ""
    for line in (ROOT / page).read_text().splitlines():
        if not line.startswith("|"):
            continue
        first, second, *_ = cells = [cell.strip() for cell in line.strip("|").split("|")]
        before = first or before
        words = (before, second) if not re.match(NUMBER, second) else (before,)
        rows[words] = numbers_in(" ".join(cells[len(words) :]))
    return rows


def numbers_in(text: str) -> list[float]:
    return [float(found.replace(MINUS, "-")) for found in re.findall(NUMBER, text)]


def cell_of(notebook: str, cell: str) -> str:
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    return next("".join(c["source"]) for c in cells if c["id"] == cell)


def names_of_a_notebook() -> dict[str, object]:
    """What the cells before those that are executed here have made."""
    helpers = {name: getattr(ll.reports, name) for name in ("listing", "points", "say")}
    return {"ll": ll, "pd": pd, "results": RESULTS, **helpers}


def shown_by(cell: str, names: dict[str, object]) -> object:
    """What the last line of a cell of notebook 04 makes; all other names go into ``names``."""
    tree = ast.parse(cell_of("04_tradeoff_science", cell))
    exec(compile(ast.Module(tree.body[:-1], []), cell, "exec"), names)
    return eval(compile(ast.Expression(tree.body[-1].value), cell, "eval"), names)


@pytest.fixture(scope="module")
def claims() -> dict[str, object]:
    """What the cells of notebook 04 on the paper's claims find and say."""
    names = names_of_a_notebook()
    shown_by("claims-found", names)
    return names | {"shown": shown_by("claims-table", names)}


def test_the_readme_s_table_of_claims_is_the_notebook_s(claims):
    shown = claims["shown"].data.splitlines()
    assert len(shown) == 2 + len(claims["claims"])
    section = (ROOT / "README.md").read_text().split("## The paper's claims")[1].split("\n## ")[0]
    readme = {line.split("|")[1]: line for line in section.splitlines() if "|" in line}
    for line in shown:
        there = readme[line.split("|")[1]]
        assert re.sub(NUMBER, "", there) == re.sub(NUMBER, "", line)
        assert numbers_in(there) == pytest.approx(numbers_in(line), abs=0.11)  # of another processor, say


def test_the_readme_begins_with_what_the_claims_came_to(claims):
    said = (
        "the middle window is in no setting clearly better than ordinary LoRA, "
        "and in a convolutional network far worse"
    )
    assert f"do not train the first components; and {said}" in text_of("README.md")
    found = claims["found"]
    verdicts = found.groupby("claim")["verdict"].agg(set)
    assert "ahead" in verdicts["A U, its left side"] and "behind" not in verdicts["A U, its left side"]
    assert "ahead" not in verdicts["They balance it better with forgetting"] | verdicts["They forget less"]
    behind = found[
        (found["verdict"] == "behind") & (found["claim"] == "They balance it better with forgetting")
    ]
    assert list(behind["kind"]) == ["convolutions"] * 2 and (behind["points"] < -20).all()
    per_kind = found.drop_duplicates("setting")["kind"].value_counts().to_dict()
    assert per_kind == {"images": 2, "convolutions": 2, "language": 2, "tasks in a row": 4}


def test_the_readme_tells_what_its_verdicts_hide(claims):
    said, page = shown_by("claims-short", dict(claims)).data, text_of("README.md")
    figure = r"([-+]?\d+\.\d)"
    for there, here in (
        (r"lead over ordinary LoRA is (.*? settings)", r"lead over ordinary LoRA is (.*? settings)"),
        (r"small L2 penalty (.*? settings)", r"over LoRA under L2 (.*? settings)"),
        (r"high rates, (.*? settings.*? settings)", r"without convolutions (.*? settings.*? settings)"),
        (rf"at most {figure} points less", rf"at most {figure} points less"),
    ):
        told, found = (numbers_in(re.search(p, text)[1]) for p, text in ((there, page), (here, said)))
        assert told == pytest.approx(found, abs=0.11)
    shrunk = re.findall(rf"{figure} points \([^)]*\) on .*?, and was {figure} points", said)
    assert numbers_in(re.search(r"shrank its gap (.*?)\. The", page)[1]) == pytest.approx(
        [abs(float(lead)) for leads in shrunk for lead in reversed(leads)], abs=0.11
    )
    used = claims["single"] | claims["second_round"]
    several = {name.replace("_", " ") for name, runs in used.items() if runs["lr"].nunique() > 1}
    lowest = re.search(r"In (.*?) the first window did best at the lowest", said)[1]
    assert set(lowest.replace(" and ", ", ").split(", ")) == several - {"digits"}
    assert "In all settings with several rates but digits the first window did best at the lowest" in page
    retained = re.findall(rf"{figure} points \({figure} to {figure}\) in sequences", said)
    assert [float(high) < 0 for _, _, high in retained].count(True) == 1 and len(retained) == 4
    less = next(float(mean) for mean, _, high in retained if float(high) < 0)
    assert float(re.search(rf"one of four sequences, by {figure} points", page)[1]) == pytest.approx(
        -less, abs=0.11
    )


@pytest.fixture(scope="module")
def opponents() -> dict[str, object]:
    """What the cells of notebook 04 on stronger opponents find."""
    names = names_of_a_notebook()
    for cell in ("opponents-found", "told-opponents"):
        shown_by(cell, names)
    return names


def test_what_opponents_came_to_is_what_is_stored(opponents):
    against, alone, page = opponents["against"], opponents["alone"], text_of("docs/sweeps.md")
    assert f"classes and on digits {against['method'].nunique()} methods" in page
    assert set(against.groupby(["task", "method"])["seeds"].max()) == {7}
    assert not (against["difference_low"] > 0).any() and "none is clearly better" in page
    behind = against[against["difference_high"] < 0]
    assert set(behind["method"]) == {"window at 0", "PEFT's pissa of rank 8"}
    assert set(behind["task"]) == {"digits"}
    worse = -100 * behind.loc[behind["way"] == "own best rate", "points"]
    said = float(re.search(r"clearly worse, on digits by (\S+) points", page)[1])
    assert list(worse) == pytest.approx([said, said], abs=ROUNDED)
    ahead = alone[alone["difference_low"] > 0].set_index(["task", "method"])["points"]
    said = re.search(r"\(0.01\) is ahead on new classes by (\S+) points and SHiRA on digits by (\S+),", page)
    expected = {
        ("new classes", "LoRA of rank 8, L2 to initial 0.01"): float(said[1]),
        ("digits", "PEFT's SHIRA, r=8"): float(said[2]),
    }
    assert ahead.mul(100).round(1).to_dict() == expected
    behind = alone[alone["difference_high"] < 0].groupby("task")["method"].agg(set)
    assert [len(methods) for methods in behind] == [6, 6]
    both = {"window at 0", "full fine-tuning", "PEFT's OFT"}
    assert set.intersection(*behind) == both | {f"PEFT's {start} of rank 8" for start in ("pissa", "olora")}


def test_the_first_window_stays_behind_at_other_ranks_scalings_and_lengths_as_is_said(opponents):
    names, page = dict(opponents), text_of("docs/sweeps.md")
    shown_by("ranks-found", names)
    first = names["changed"].query("method == 'window at 0'")
    first = first.set_index(["setting", "value", "task"])["points"]
    assert "the first window stays behind the middle one on both tasks, the farther the larger" in page
    assert len(first) == 2 * 10 and (first < 0).all()
    for setting in ("alpha", "steps"):
        assert (first[setting].unstack("task").diff().dropna() < 0).all(axis=None)
    said = re.search(r"by (\S+) points at 120 steps, (\S+) at 480 and (\S+) at 1,920", page).groups()
    means = -100 * first["steps"].groupby("value").mean()
    assert [float(points) for points in said] == pytest.approx(list(means), abs=ROUNDED)
    assert not (names["changed"].query("method == 'window at 0'")["difference_high"] < 0).any()


def test_minilm_forgets_in_longer_trainings_as_is_said():
    table = ll.Sweep.open(RESULTS / "minilm_long.jsonl.xz").table
    learnt, lost = (
        ll.reports.by_seed(table, score).droplevel("lr", axis=1) for score in ("accuracy", "forgetting")
    )
    expected = [100 * scores.mean() for scores in (learnt[0.5], lost[0.5], lost[1.0])]
    page = text_of("docs/sweeps.md")
    said = re.search(r"learns (\S+) % under the middle window and forgets (\S+) points", page).groups()
    last = re.search(r"The last window forgets (\S+) points, more in every seed", page)[1]
    assert [float(points) for points in (*said, last)] == pytest.approx(expected, abs=ROUNDED)
    assert (lost[1.0] > lost[0.5]).all()
    assert "no method clearly forgets more or less than the middle window" in page
    for name in lost.columns.drop(0.5):
        assert ll.reports.more_or_less(lost[name], lost[0.5], ("more", "neither", "less")) == "neither"


def test_lora_leads_in_a_convolutional_network_by_as_much_as_is_said(claims):
    found = claims["found"].query("kind == 'convolutions'").set_index(["claim", "setting"])
    lora = -found.loc["They balance it better with forgetting", "points"]
    said = re.search(r"by (\S+) points on clothes and (\S+) on digits", text_of("docs/sweeps.md"))
    expected = [lora[f"{name} in EfficientNet"] for name in ("fashion", "digits")]
    assert [float(points) for points in said.groups()] == pytest.approx(expected, abs=ROUNDED)


def test_l2_forgets_less_at_equal_accuracy_by_as_much_as_is_said():
    sweeps = [ll.Sweep.open(RESULTS / f"{name}.jsonl.xz") for name in ("digits", "elsewhere")]
    table = pd.concat([sweep.table for sweep in sweeps])
    curves = pd.concat([sweep.curves() for sweep in sweeps])
    penalized = table["method"] == "LoRA of rank 8, L2 to initial 0.01"
    table = table[(table["seed"] < 3) & (penalized | (table["method"] == "window"))]
    said = re.search(r"three seeds \(by (.*?) points at 88 %, by (.*?) at 90 %", text_of("docs/sweeps.md"))
    for goal, points in zip((0.88, 0.9), said.groups(), strict=True):
        read = ll.forgetting.at_matched_accuracy(table, curves, goal)
        least = read[read["reached"] == 3].groupby("method")["forgetting"].min()
        assert 100 * (least["window"] - least.drop("window").item()) == pytest.approx(
            float(points), abs=ROUNDED
        )


def test_the_readme_s_caption_is_the_shipped_sweep_s():
    table = ll.Sweep.open(RESULTS / "digits.jsonl.xz").only("lr == 0.005").table
    first, middle = (
        table[table["position"] == p][["forgetting", "accuracy"]].mean().mul(100).round(1) for p in (0.0, 0.5)
    )
    said = (
        f"the first window (PiSSA) forgets {first['forgetting']} points and learns {first['accuracy']} % of "
        f"the digits, the middle one forgets {middle['forgetting']} and learns {middle['accuracy']} %"
    )
    assert said in text_of("README.md")


def test_the_guide_of_notebook_06_says_what_is_stored():
    guide = cell_of("06_your_model", "guide")
    runs = pd.concat(ll.Sweep.open(RESULTS / f"{s}.jsonl.xz").table for s in ("digits", "elsewhere"))
    name = runs["position"].astype(object).where(runs["position"].notna(), runs["method"])
    lost, learnt = (
        runs.groupby([name, "lr"])[score].mean().mul(100).unstack() for score in ("forgetting", "accuracy")
    )
    flat, most = ([p for p in lost.index if isinstance(p, float) and p >= least] for least in (0.375, 0.25))
    rates = [0.005, 0.01]
    said = {
        r"PiSSA forgot (.*?) points": lost.loc[0.0, [*rates, 0.02]],
        r"PiSSA forgot .* the middle window (.*?) \|": lost.loc[0.5, [*rates, 0.02]],
        r"led the middle one by (.*?) points": learnt.loc[[0.0], 0.005] - learnt.loc[0.5, 0.005],
        r"the window at 0.125 by (\d\.\d)": learnt.loc[[0.0], 0.005] - learnt.loc[0.125, 0.005],
        r"middle window further, from (.*?) points": lost.loc[0.5],
        r"LoRA with it forgot (.*?) points": lost.loc[["LoRA of rank 8, L2 to initial 0.01"], 0.01],
        r"from 0.25 on forgot (.*?), at": lost.loc[most, 0.01].agg(["min", "max"]),
        r"from 0.25 on forgot .*, at (.*?) % ": learnt.loc[most, 0.01].agg(["min", "max"]).round(),
        r"it forgot (.*?) points, the windows": lost.loc["LoRA", rates],
        r"0.375 on (.*?);": pd.concat([lost.loc[flat, rate].agg(["min", "max"]) for rate in rates]),
    }
    for pattern, expected in said.items():
        (found,) = re.findall(pattern, guide)
        assert numbers_in(found) == pytest.approx(list(expected), abs=ROUNDED), pattern


def trained_and_rewound(file: str) -> pd.DataFrame:
    """Accuracy - forgetting in points, by setting, method and seed."""
    rows = pd.read_csv(RESULTS / file).query("part == 'test'")
    rows = rows.assign(value=100 * (rows["accuracy"] - rows["forgetting"]))
    keys = ["setting", "method", "seed"]
    at = {"trained": rows[rows["t"] == 1], "rewound": rows.sort_values("t").drop_duplicates(keys)}
    return pd.DataFrame({name: runs.set_index(keys)["value"] for name, runs in at.items()})


def leads(values: pd.DataFrame, over: str) -> pd.DataFrame:
    """More than another method of the same seed."""
    found = (values - values.xs(over, level="method")).reorder_levels(["setting", "method", "seed"])
    return found.drop(over, level="method").sort_index()


def test_what_going_back_does_to_windows_is_what_is_stored():
    values = trained_and_rewound("rewinding.csv")
    found, rows = leads(values, "LoRA"), rows_of("docs/after_training.md")
    settings = {
        "digits": "digits, vision",
        "new_classes": "new classes",
        "minilm": "sentiment, MiniLM",
        "smollm2": "sentiment, SmolLM2",
    }
    taken_back = []
    for setting, name in settings.items():
        label = next(words[0] for words in rows if words[0].startswith(name))
        for at in ("trained", "rewound"):
            expected = []
            for method in ("first", "middle", "last"):
                seeds = found.loc[(setting, method), at]
                expected += [seeds.mean(), *(ll.forgetting.seed_interval(seeds) if len(seeds) > 1 else ())]
            assert rows[(label, at)] == pytest.approx(expected, abs=ROUNDED), (setting, at)
        first = found.loc[(setting, "first")].mean()
        taken_back += [first["rewound"] - first["trained"], -first["trained"]]
    said = re.search(r"that takes back (.*?) in two language models", text_of("README.md"))[1]
    assert numbers_in(said) == pytest.approx(taken_back, abs=2 * ROUNDED)
    ahead = {s for s in settings if ll.forgetting.seed_interval(found.loc[(s, "middle"), "rewound"])[0] > 0}
    assert not ahead
    middle = found.loc[["digits", "new_classes"]].xs("middle", level="method")["rewound"]
    page = text_of("docs/after_training.md")
    assert "less than a point ahead of LoRA on images, with eight of ten seeds" in page
    assert ((middle > 0).sum(), len(middle)) == (8, 10)
    assert all(0 < lead < 1 for lead in middle.groupby("setting").mean())
    behind = -found.xs("first", level="method")["rewound"].groupby("setting").mean()
    assert "two to four points behind LoRA everywhere" in page
    assert (round(behind.min()), round(behind.max())) == (2, 4)
    gained = (values["rewound"] - values["trained"]).groupby(level=["setting", "method"]).mean()
    gains = gained.loc["new_classes"][["LoRA", "middle", "first"]]
    said = re.search(r"it gains LoRA (.*?); on MiniLM LoRA gains (.*?),", page)
    assert numbers_in(" ".join(said.groups())) == pytest.approx(
        [*gains, gained["minilm", "LoRA"]], abs=ROUNDED
    )


def test_what_going_back_does_to_opponents_is_what_is_stored():
    values = trained_and_rewound("rewound_opponents.csv")
    found, page = leads(values, "window 0.5"), text_of("docs/after_training.md")
    assert set(found.groupby(level=["setting", "method"]).size()) == {3}
    assert "The 24 that" in page and found.index.get_level_values("method").nunique() == 24
    apart = found.groupby(level=["setting", "method"]).mean().groupby(level="setting").std()
    said = re.search(r"leads falls (.*?) on digits and (.*?) on new classes", page)
    expected = apart.loc[["digits", "new_classes"], ["trained", "rewound"]].to_numpy().ravel()
    assert numbers_in(" ".join(said.groups())) == pytest.approx(list(expected), abs=ROUNDED)
    of_rewound = found["rewound"].groupby(level=["setting", "method"])
    low, high = (
        of_rewound.agg(lambda seeds, end=end: ll.forgetting.seed_interval(seeds)[end]) for end in (0, 1)
    )
    assert "none is clearly ahead of the middle window" in page and not (low > 0).any()
    assert (high.xs("window 0", level="method") < 0).all()
    gained = (values["rewound"] - values["trained"]).groupby(level="method").mean()
    said = re.search(r"gains full fine-tuning most, (\S+) points .*? middle window (\S+)\. ", page)
    assert gained.idxmax() == "full fine-tuning"
    assert [float(one) for one in said.groups()] == pytest.approx(
        [gained.max(), gained["window 0.5"]], abs=ROUNDED
    )


def test_what_agreement_tells_is_what_is_stored():
    table = pd.read_csv(RESULTS / "agreement.csv").query("measure == '1 - agreement'").set_index("setting")
    own = table.loc["agreement"].set_index("reference")
    rows = rows_of("docs/measures.md")
    expected = {
        ("the retained images themselves", "digits"): table.loc["digits"],
        ("the same", "new classes"): table.loc["new_classes"],
        ("the same", "few digits"): table.loc["few_digits"],
        ("the same, of texts", "MiniLM"): table.loc["minilm"],
        ("the same, token by token", "SmolLM2"): table.loc["smollm2"],
        ("other images of what the model knows", "digits"): own.loc["other known images"],
        ("the same under strong noise", "the same"): own.loc["known images in noise"],
        ("noise", "the same"): own.loc["noise"],
        ("images of the new task", "the same"): own.loc["the new task's images"],
    }
    for (reference, setting), row in expected.items():
        (numbers,) = (
            found
            for words, found in rows.items()
            if words[0] == reference and words[1:] and words[1].startswith(setting)
        )
        *correlations, slope, error = row[["rank_correlation", "low", "high", "slope", "error_in_points"]]
        assert numbers == pytest.approx([*correlations, slope, error], abs=ROUNDED)
        assert numbers[:4] == pytest.approx([*correlations, slope], abs=0.00501), (reference, setting)
    by_divergence = pd.read_csv(RESULTS / "agreement.csv").query(
        "reference == 'noise' and measure == 'divergence'"
    )
    better = by_divergence["rank_correlation"].iloc[0]
    assert f"by the divergence better ({better:.2f})" in text_of("docs/measures.md")
    assert better > own.loc["noise", "rank_correlation"]
    same_rate = table["same_rate"].round(2)
    sweep = ll.Sweep.open(RESULTS / "minilm.jsonl.xz")
    answers = sweep.answers()
    changed = (answers["before"] != answers["after"]).groupby(answers["run"]).mean()
    runs = sweep.table.assign(changed=sweep.table["run"].map(changed))
    low, high, highest = (
        f"{of['changed'].corr(of['forgetting'], method='spearman'):.2f}" for _, of in runs.groupby("lr")
    )
    digits, minilm = (f"{same_rate[name]:.2f}" for name in ("digits", "minilm"))
    said = (
        f"{digits} on digits, {minilm} on MiniLM ({low} and {high} at two rates, and {highest} at the highest"
    )
    assert said in text_of("docs/measures.md")


RULES = {
    "LoRA, L2 0.01, at 0.005": "LoRA, L2 to initial 0.01, 0.005",
    "LoRA, L2 0.01, at 0.01": "LoRA, L2 to initial 0.01, 0.01",
    "LoRA, L2 0.01, rate of the other pairs": "LoRA, L2 to initial 0.01, rate of others",
    "the best of all fixed rules in the other pairs": "best fixed of others",
    "ridge on rate and position": "ridge on rate and position",
    "window 0.75 at 0.005": "window 0.75, 0.005",
    "LoRA at 0.005": "LoRA, 0.005",
    "window 0.25 at 0.005": "window 0.25, 0.005",
    "last window at 0.005": "window 1, 0.005",
    "first window at 0.005": "window 0, 0.005",
    "foreseen ratio (3 pairs)": "foreseen, scaled rate",
    "pilot (3 pairs)": "pilot",
    "window by the features' change (4 pairs)": "window by relative_change",
    "ridge on measures (4 pairs)": "ridge on measures",
    "LoRA, L2 0.01, own best rate": "own sweep of LoRA, L2 to initial 0.01",
    "middle window, own best rate": "own sweep of window 0.5",
    "window and rate that are best here": "own sweep of windows",
}  # as docs/sweeps.md and data/results/rules.csv call them


def test_what_rules_are_worth_is_what_is_stored():
    stored = pd.read_csv(RESULTS / "rules.csv").set_index(["goal", "rule"])
    rows = rows_of("docs/sweeps.md")
    for name, rule in RULES.items():
        expected = []
        for goal in ("kept", "area"):
            if (goal, rule) in stored.index and pd.notna(stored.loc[(goal, rule), "p_holm"]):
                row = stored.loc[(goal, rule)]
                expected += [-100 * row["difference"], -100 * row["high"], -100 * row["low"], row["p_holm"]]
        (numbers,) = (found for words, found in rows.items() if words[0] == name)
        assert numbers[-len(expected) :] == pytest.approx(expected, abs=ROUNDED), name
    page, better = text_of("docs/sweeps.md"), stored["better"]
    assert (
        "it is better in three of five pairs (kept)" in page
        and "own best rate it is better in five of five" in page
    )
    penalized = "LoRA, L2 to initial 0.01"
    assert better["kept", f"{penalized}, 0.005"] == 3 and better["kept", f"own sweep of {penalized}"] == 5
    assert (
        "Nothing differs from the middle window for certain" in page
        and (stored["p_holm"].dropna() > 0.05).all()
    )
    assert "The first window is worse in all pairs" in page and better["kept", "window 0, 0.005"] == 0
    gains = -100 * stored.loc[("kept", f"{penalized}, 0.005"), ["minilm", "new_classes", "smollm2"]]
    lost = 100 * stored.loc[("kept", f"{penalized}, 0.005"), ["noise", "digits"]]
    said = re.search(r"three of five pairs \(kept\): (.*?) points on MiniLM.*?much, (.*?)\. At 0\.01", page)
    assert numbers_in(" ".join(said.groups())) == pytest.approx([*gains, *lost], abs=ROUNDED)
    without = gains.drop("minilm").sum() - lost.sum()
    said = re.search(r"Without MiniLM the mean at 0\.005 is (\d\.\d)\.", page)[1]
    assert float(said) == pytest.approx(without / 4, abs=ROUNDED)
    thrice = [
        -100 * stored.loc[("kept, thrice", rule), end]
        for rule in (f"{penalized}, 0.005", f"own sweep of {penalized}")
        for end in ("difference", "high", "low")
    ]
    said = re.search(r"at its own best rate are (.*?); there", page)[1]
    assert numbers_in(said) == pytest.approx(thrice, abs=ROUNDED)
    assert f"has {len(stored)} rows" in page
    asked = stored.loc["kept", "p_holm"].notna().sum()
    assert f"about all rules: {asked} of them" in page
    kept = stored.loc["kept", "difference"]
    among, alone = kept["own sweep of windows"], kept["own sweep of window 0.5"]
    assert "gain no more than the best rate of the middle window alone" in page
    assert among == pytest.approx(alone, abs=0.001)


@pytest.mark.parametrize("name", ["04_tradeoff_science", "05_language", "08_after_training"])
def test_no_result_is_typed_into_a_text_of_the_notebook(name):
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
    texts = {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"}
    found = {
        cell: re.findall(RESULT, re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for cell, text in texts.items()
    }
    assert {cell: some for cell, some in found.items() if some and cell not in NO_RESULTS} == {}


def test_an_equal_update_is_read_off_as_far_off_as_is_said():
    sweep = ll.Sweep.open(RESULTS / "digits.jsonl.xz").only("method == 'window'")
    drifts = sweep.drifts()
    left_out = sweep.table["lr"] == 0.01
    sizes = sweep.table["run"].map(ll.forgetting.relative_updates(drifts))
    off = {}
    for position, runs in sweep.table[left_out].groupby("position"):
        others = sweep.table[~left_out & (sweep.table["position"] == position)]
        read = ll.forgetting.at_matched_update(others, drifts, sizes[runs.index].mean())
        off[position] = 100 * (read["forgetting"].iloc[0] - runs["forgetting"].mean())
    off = pd.Series(off)
    too_high = [round(one) for one in off[off.index >= 0.25]]
    said = (
        f"the monotone cubic by {off.abs().mean():.0f}: it was {-off[0.0]:.0f} too low at position 0 and "
        f"{min(too_high)} to {max(too_high)} too high from 0.25 on"
    )
    assert said in text_of("docs/measures.md")


def test_the_words_of_notebook_04_turn_with_the_comparison(claims, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    cells = json.loads((ROOT / "notebooks/04_tradeoff_science.ipynb").read_text())["cells"]
    source = {cell["id"]: "".join(cell["source"]) for cell in cells}

    def said(cell: str, names: dict[str, object]) -> str:
        tree = ast.parse(source[cell])
        exec(compile(ast.Module(tree.body[:-1], []), cell, "exec"), names)
        return eval(compile(ast.Expression(tree.body[-1].value), cell, "eval"), names).data

    table = ll.Sweep.open(RESULTS / "digits.jsonl.xz").table
    names = {"ll": ll, "pd": pd, "table": table, "sweeps": {"digits": table}}
    said("told-runs", names)
    exec(source["c370f70f"], names)
    there = said("told-shape", names)
    assert "left side is there at 0.002, 0.005, 0.01 and 0.02, by" in there and "for itself, at none" in there
    names["table"] = table.assign(position=1 - table["position"])
    said("told-runs", names)
    exec(source["c370f70f"], names)
    there = said("told-shape", names)
    assert "left side is there at none; " in there and "for itself, at 0.002, 0.005, 0.01 and 0.02" in there

    turned = claims["found"].assign(points=-claims["found"]["points"])
    turned["verdict"] = turned["verdict"].replace({"ahead": "behind", "behind": "ahead"})
    shown = said("claims-table", claims | {"found": turned})
    assert shown.count("behind in") == claims["shown"].data.count("ahead in") > 0
    short, other = (said("claims-short", claims | {"found": found}) for found in (claims["found"], turned))
    assert "clearly more in SmolLM2" in short and "clearly less in SmolLM2" in other


PLACES = [0, 0.25, 0.5, 0.75, 1]
METRICS = (  # the first part that a variant's name has says whose inputs it was taken of
    (" relative to ", "new relative to known"),
    ("metric of fashion_mnist, only T-shirt", "known"),
    ("metric of fashion_mnist (", "known"),
    ("metric of ", "new"),
    ("", "plain"),
)


def in_metrics(setting: str, rate: float = 0.005, plain: str = "") -> dict[str, list[float]]:
    """Points of accuracy - forgetting beside the plain window of the same place, rate and seed.

    By metric, for each place the mean and its interval; then how well the place tells what is forgotten,
    R^2 on seeds that are left out, which is all that there is of "plain". The plain windows are those of the
    store ``plain``, of the setting itself by default.
    """
    stores = plain or setting, f"{setting}_metric"
    runs = pd.concat([ll.Sweep.open(RESULTS / f"{name}.jsonl.xz").table for name in stores])
    runs = runs[(runs["method"] == "window") & (runs["lr"] == rate) & runs["seed"].isin(range(5))]
    runs = runs[runs["position"].isin(PLACES)]
    runs = runs.assign(
        value=100 * (runs["accuracy"] - runs["forgetting"]), variant=runs["variant"].fillna("")
    )
    values, lost = (
        runs.pivot_table(index="seed", columns=["variant", "position"], values=column)
        for column in ("value", "forgetting")
    )
    found = {}
    for variant in values.columns.levels[0]:
        beside, of_others = values[variant] - values[""], (lost[variant].sum() - lost[variant]) / 4
        errors = [(lost[variant] - of_others) ** 2, lost[variant].sub(of_others.mean(axis=1), axis=0) ** 2]
        told = 1 - errors[0].to_numpy().sum() / errors[1].to_numpy().sum()
        numbers = [(beside[place].mean(), *ll.forgetting.seed_interval(beside[place])) for place in PLACES]
        name = next(whose for part, whose in METRICS if part in variant)
        found[name] = [*(chain.from_iterable(numbers) if variant else ()), told]
    return found


@pytest.mark.parametrize(("setting", "label"), [("new_classes", "new classes"), ("digits", "digits")])
def test_what_windows_in_metrics_gain_is_what_is_stored(setting, label):
    found, rows = in_metrics(setting), rows_of("docs/sweeps.md")
    assert len(found) == 4
    for name, expected in found.items():
        *points, told = rows[(label, name)]
        assert points == pytest.approx(expected[:-1], abs=ROUNDED), name
        assert told == pytest.approx(expected[-1], abs=ROUNDED / 10), name


def test_what_windows_in_metrics_gain_at_the_other_rates_is_what_is_stored():
    both = [in_metrics("new_classes", 0.0025, "new_classes_opponents"), in_metrics("digits", 0.01)]
    ends = [(n[1 + i], n[2 + i]) for one in both for n in one.values() for i in range(0, len(n) - 1, 3)]
    better, worse = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    assert (len(ends), better, worse) == (30, 2, 6)
    assert "eight of 30 leave out 0, six of them for the worse" in text_of("docs/sweeps.md")
    at = 3 * PLACES.index(0.25)
    new, digits = (one["known"][at : at + 3] for one in both)
    assert new[1] > 0 > digits[1] and digits[2] > 0
