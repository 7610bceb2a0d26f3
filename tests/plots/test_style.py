from __future__ import annotations

import warnings
from threading import Event, Thread

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import lora_lens as ll
from lora_lens.plots._style import house_style, literal, some_axes, styled

NAMES = ["cost $5 or $6", "_private", "_a$b$c", r"\$ and \$x$", "plain_name", "50% $", "a$\\alpha$"]


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_letter_by_letter(name):
    escaped, verbatim = plt.figure(figsize=(3, 1)), plt.figure(figsize=(3, 1))
    escaped.text(0.05, 0.5, literal(name))
    verbatim.text(0.05, 0.5, name, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks
        assert (pixels(escaped) == pixels(verbatim)).all()
    ax = plt.subplots()[1]
    ax.plot([0, 1], label=literal(name))
    assert len(ax.legend().get_texts()) == 1
    plt.close("all")


def shown(ax: plt.Axes) -> set[str]:
    """All that stands in a picture, as a reader sees it."""
    ax.figure.canvas.draw()
    written = [ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()]
    if ax.get_legend() is not None:
        written += ax.get_legend().get_texts()
    return {text._preprocess_math(text.get_text())[0].lstrip("\u200b") for text in written if text.get_text()}


def sweep_of(method: str) -> pd.DataFrame:
    rows = [
        {"run": f"{name} {position} {lr}", "method": name, "rank": 8, "position": position, "start": np.nan,
         "lr": lr, "seed": 0, "accuracy": 0.8, "retained_accuracy": 0.7 - lr, "forgetting": 0.2 + lr}
        for name, positions in (("window", (0.0, 1.0)), (method, (np.nan,)))
        for position in positions for lr in (0.01, 0.02)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", ["_own", "$x$ of $y$"])
def test_names_of_methods_classes_layers_and_models_stay_in_pictures(name):
    table = sweep_of(name)
    for draw in (ll.plots.forgetting_curve, ll.plots.tradeoff, ll.plots.surface, ll.plots.fronts_by_method):
        assert name in shown(draw(table)), draw.__name__
    assert name in shown(ll.plots.robustness(ll.forgetting.rate_robustness(table)))
    assert name in shown(ll.plots.confusion(np.eye(2), [name, "other"]))
    weights = [ll.spectrum.factorize(layer, torch.randn(6, 6)) for layer in (name, f"{name}2")]
    assert name in shown(ll.plots.spectrum(ll.SpectrumSet(weights)))
    assert name in shown(ll.plots.spectrum(weights[0]))
    assert name in shown(ll.plots.cumulative_energy({name: ll.SpectrumSet(weights)}))
    assert name in shown(ll.plots.by_depth(ll.SpectrumSet(weights).table(), heat_map=True))
    assert name in shown(ll.plots.by_depth(ll.SpectrumSet(weights).table()))
    assert name in shown(ll.plots.learning_curves({"": pd.DataFrame()}, 10, (name, "other")))
    plt.close("all")


def test_bad_input_leaves_no_empty_figure():
    for draw in (ll.plots.tradeoff, ll.plots.spectrum, ll.plots.surface, ll.plots.learning_curve):
        with pytest.raises(ll.errors.LoraLensError):
            draw(None)
    assert not plt.get_fignums()


@pytest.mark.parametrize("ax", ["x", 3, np.array([1]), Figure()])
def test_what_cannot_be_drawn_on_is_refused(ax):
    table = sweep_of("LoRA")
    for draw in (ll.plots.tradeoff, ll.plots.surface):
        with pytest.raises(ll.errors.InputTypeError, match="ax must be matplotlib Axes, such as"):
            draw(table, ax=ax)
    with pytest.raises(ll.errors.InputTypeError, match=r"axes must be|each of axes must be"):
        some_axes(ax, 1, "pictures")


def test_a_misspelt_option_is_named_with_the_one_that_was_meant():
    with pytest.raises(TypeError, match=r"plots.tradeoff has no setting 'rate'; did you mean 'rates'"):
        ll.plots.tradeoff(sweep_of("LoRA"), rate=[0.01])


def test_two_threads_in_the_style_leave_the_settings_as_they_were():
    """Each would put back what it found: the second one the style, if it came in during the first."""
    before = dict(matplotlib.rcParams)
    first_in, second_in, first_out = Event(), Event(), Event()

    def first() -> None:
        with house_style():
            first_in.set()
            second_in.wait(0.5)  # comes only where two can be in it at once
        first_out.set()

    def second() -> None:
        first_in.wait()
        with house_style():
            second_in.set()
            first_out.wait(60)

    threads = [Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert dict(matplotlib.rcParams) == before


def test_the_style_is_put_back_after_a_failure():
    before = dict(matplotlib.rcParams)

    @styled
    def broken(*, ax: plt.Axes) -> plt.Axes:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        broken()
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()
