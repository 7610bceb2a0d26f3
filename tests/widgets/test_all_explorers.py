from __future__ import annotations

import re
from dataclasses import replace
from inspect import signature
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from explored import control, message, narrow_vit, parts, pictures, shows_results, text
from ipywidgets import HTML, VBox, Widget
from small_language import byte_tokenizer, part_of, small
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lora_lens as ll
from lora_lens.widgets._follower import MOST, Follower, small_parts


@pytest.fixture(scope="module")
def narrow() -> VisionTransformer:
    return narrow_vit(0)


@pytest.fixture(scope="module")
def narrow_spectra(narrow) -> ll.SpectrumSet:
    return ll.spectra(narrow, progress=False)


@pytest.fixture(scope="module")
def table(narrow, digits) -> pd.DataFrame:
    grid = ll.Grid(window=ll.windows(4, 3), lr=(1e-3, 1e-2), seed=(0, 1), baselines=[ll.LoRA(4)])
    small = digits.first(64, 40)
    return ll.sweep(
        grid,
        model=narrow,
        task=small,
        retain=small,
        steps=2,
        evaluations=2,
        batch_size=16,
        jobs=1,
        progress=False,
    ).table


@pytest.fixture
def spectrum_explorer(narrow_spectra) -> VBox:
    return ll.widgets.spectrum_explorer(narrow_spectra, rank=8)


@pytest.fixture
def window_explorer(narrow, narrow_spectra, digits) -> VBox:
    return ll.widgets.window_explorer(narrow, narrow_spectra, digits, rank=8)


@pytest.fixture
def tradeoff_explorer(table) -> VBox:
    return ll.widgets.tradeoff_explorer(table)


def after_attaching(explorer: VBox) -> tuple[str, float]:
    """How many predictions stayed, and the largest difference of the logits."""
    said = re.search(r"after attaching: (\d+ of \d+)\. .*: (\S+)\.</p>", text(explorer))
    return said[1], float(said[2])


@pytest.mark.parametrize(
    ("name", "changes", "images"),
    [
        ("spectrum_explorer", {"kind": "attn.qkv", "block": 1, "rank": 4, "position": 1.0}, 1),
        ("window_explorer", {"layer": "blocks.1.attn.proj", "rank": 4, "position": 1.0}, 4),
        ("tradeoff_explorer", {"score": "accuracy", "0.01": False}, 2),
    ],
)
def test_each_shows_pictures_and_numbers_before_any_click_and_each_control_changes_them(
    request, name, changes, images
):
    explorer = request.getfixturevalue(name)
    assert len(pictures(explorer)) == images
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(explorer))
    assert "<table" in text(explorer) and shows_results(explorer)
    for description, value in changes.items():
        before = pictures(explorer), text(explorer)
        control(explorer, description).value = value
        assert pictures(explorer)[0] != before[0][0]
        assert description == "score" or text(explorer) != before[1]


def test_the_numbers_are_those_of_the_library(spectrum_explorer, narrow_spectra):
    control(spectrum_explorer, "kind").value = "mlp.fc1"
    control(spectrum_explorer, "block").value = 1
    control(spectrum_explorer, "position").value = 1.0
    spectrum = narrow_spectra["blocks.1.mlp.fc1"]
    for shown in (
        "[8, 16) of 16",
        f"{spectrum.effective_rank:.1f}",
        f"{spectrum.stable_rank:.1f}",
        f"{spectrum.energy(ll.Window.last(8)):.2%}",
    ):
        assert f"<td>{shown}</td>" in text(spectrum_explorer)


def test_attaching_at_any_position_keeps_the_predictions(window_explorer):
    for position in (0.0, 0.3, 1.0):
        control(window_explorer, "position").value = position
        same, difference = after_attaching(window_explorer)
        assert same == "8 of 8" and difference < 1e-5


def test_the_page_can_follow_every_picture_of_a_window_in_any_layer(window_explorer):
    for name in control(window_explorer, "layer").options:
        control(window_explorer, "layer").value = name
        (follower,) = parts(window_explorer, Follower)
        html = " ".join(box.value for box in parts(window_explorer, HTML))
        assert set(re.findall('data-follows="([^"]+)"', html)) == set(follower.parts)
        assert {part["kind"] for part in follower.parts.values()} == {"spectrum", "matrices", "maps"}
        assert follower.rank is control(window_explorer, "rank")


def test_what_is_too_large_for_a_page_is_left_to_the_kernel():
    large, little = {"kind": "maps", "energies": bytes(int(MOST) + 1)}, {"kind": "maps", "energies": b""}
    assert small_parts({"large": large, "little": little}) == {"little": little}


def test_switched_off_only_the_offset_form_is_the_pretrained_model(window_explorer):
    control(window_explorer, "position").value = 0.0
    off = re.compile(r"switched off, the (\w+) form gives (\d) of them; the difference is (\S+)\.</p>")
    form, _, difference = off.search(text(window_explorer)).groups()
    assert form == "residual" and float(difference) > 1e-2
    control(window_explorer, "form").value = "offset"
    assert off.search(text(window_explorer)).groups() == ("offset", "8", "0.0e+00")
    assert after_attaching(window_explorer) == ("8 of 8", 0)


def test_every_picture_of_a_window_moves_with_it_and_the_answers_do_not(window_explorer):
    before = pictures(window_explorer)
    control(window_explorer, "position").value = 1.0
    *moved, answers = pictures(window_explorer)
    assert all(now != then for now, then in zip(moved, before, strict=False)) and answers == before[3]


def test_the_features_are_those_of_the_layer_and_of_the_first_images(
    window_explorer, narrow, narrow_spectra, digits
):
    name = "blocks.1.mlp.fc1"
    control(window_explorer, "layer").value = name
    control(window_explorer, "position").value = 0.0
    images = digits.test.inputs[:3]
    split = ll.forgetting.feature_split(narrow, name, narrow_spectra[name], ll.Window.first(8), images)
    assert f"<td>{split.shares.mean():.2%} in the window</td>" in text(window_explorer)


def test_only_layers_with_features_on_a_grid_are_offered(patch_vit, digits):
    spectra = ll.spectra(patch_vit, ["all-linear", "all-conv"], progress=False)
    assert "patch_embed.proj" in spectra
    explorer = ll.widgets.window_explorer(patch_vit, spectra, digits)
    offered = list(control(explorer, "layer").options)
    assert offered == [name for name in spectra if name != "patch_embed.proj"]


def test_a_model_without_tokens_on_a_grid_is_refused(digits):
    class Strips(nn.Module):
        """Reads 7 strips of an image: 7 tokens, which are no square."""

        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(112, 16), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(x.reshape(len(x), 7, 112)).mean(1))

    torch.manual_seed(0)
    model = Strips()
    with pytest.raises(ValueError, match="no features to lay over the images"):
        ll.widgets.window_explorer(model, ll.spectra(model, progress=False), digits)


def test_a_classifier_of_texts_is_explored_token_by_token():
    model = small("bert")
    movies = ll.tasks.probed(model, ll.tasks.text_task(part_of("movies", 32, 8), byte_tokenizer()))
    spectra = ll.spectra(model, progress=False)
    explorer = ll.widgets.window_explorer(model, spectra, movies, rank=4, images=5)
    assert list(control(explorer, "layer").options) == [name for name in spectra if name != "pooler.dense"]
    before = pictures(explorer)
    assert len(before) == 3
    control(explorer, "text").value = 3
    name, four = control(explorer, "layer").value, movies.test.batch(torch.tensor([3]))
    split = ll.forgetting.feature_split(model, name, spectra[name], ll.Window.middle(4), four)
    assert f"<td>{float(split.shares):.2%} in the window</td>" in text(explorer)
    now = pictures(explorer)
    assert now[0] == before[0] and now[1] != before[1] and now[2] == before[2]
    (follower,) = parts(explorer, Follower)
    assert [part["kind"] for part in follower.parts.values()] == ["spectrum", "matrices"]  # no words
    same, difference = after_attaching(explorer)
    assert same == "5 of 5" and difference < 1e-4
    cells = re.findall("<td>(.*)</td>", text(explorer))
    predicted = [movies.classes[i] for i in ll.evaluate(model, movies).predicted[:5]]
    assert cells[5::5] == cells[6::5] == predicted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_is_explored_with_label_words_and_with_running_text(kind):
    model, corpus = small(kind), part_of("movies", 20, 20)
    spectra = ll.spectra(model, progress=False)
    words = ll.tasks.label_word_task(corpus, byte_tokenizer())
    explorer = ll.widgets.window_explorer(model, spectra, words, rank=4, images=4)
    same, difference = after_attaching(explorer)
    assert same == "4 of 4" and difference < 1e-4
    cells = re.findall("<td>(.*)</td>", text(explorer))
    predicted = [words.classes[i] for i in ll.evaluate(model, words).predicted[:4]]
    assert cells[5::5] == cells[6::5] == predicted
    running = ll.tasks.language_task(corpus, byte_tokenizer(), block=16)
    explorer = ll.widgets.window_explorer(model, spectra, running, rank=4, images=4)
    assert len(re.findall("<td>", text(explorer))) == 4
    assert after_attaching(explorer)[0] == "60 of 60"  # 4 blocks with 15 tokens to predict each


@pytest.mark.parametrize("name", ["spectrum_explorer", "window_explorer"])
def test_a_window_that_does_not_fit_is_said_in_place_and_forgotten_afterwards(request, name):
    explorer = request.getfixturevalue(name)
    rank = control(explorer, "rank")
    before = pictures(explorer), text(explorer)
    rank.value = 20
    assert "rank 20 does not fit blocks.0.mlp.fc1" in message(explorer) and not shows_results(explorer)
    rank.value = 8
    assert shows_results(explorer) and (pictures(explorer), text(explorer)) == before


def test_no_learning_rate_chosen_is_said_in_place(tradeoff_explorer):
    for rate in ("0.001", "0.01"):
        control(tradeoff_explorer, rate).value = False
    assert "at least one learning rate" in message(tradeoff_explorer)
    control(tradeoff_explorer, "0.01").value = True
    assert shows_results(tradeoff_explorer)


def test_a_kind_that_a_block_lacks_is_said_in_place():
    names = ("embed", "blocks.0.fc", "blocks.1.fc")
    torch.manual_seed(0)
    spectra = ll.SpectrumSet([ll.spectrum.factorize(name, torch.randn(8, 8)) for name in names])
    explorer = ll.widgets.spectrum_explorer(spectra, rank=2)
    control(explorer, "kind").value = "embed"
    control(explorer, "block").value = 1
    assert "block 1 has no embed" in message(explorer)


def test_tables_that_are_no_sweep_are_refused(table):
    with pytest.raises(ValueError, match="the table is empty"):
        ll.widgets.tradeoff_explorer(table.iloc[:0])
    with pytest.raises(ValueError, match="no column method, rank, position"):
        ll.widgets.tradeoff_explorer(pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match="no column forgetting"):
        ll.widgets.tradeoff_explorer(table.drop(columns="forgetting"))
    with pytest.raises(ValueError, match="no runs of windows"):
        ll.widgets.tradeoff_explorer(table[table["method"] == "LoRA"])


def test_models_spectra_and_tasks_that_do_not_belong_are_refused(narrow, narrow_spectra, digits):
    with pytest.raises(ValueError, match="rank 20 does not fit"):
        ll.widgets.spectrum_explorer(narrow_spectra, rank=20)
    with pytest.raises(ValueError, match="no spectra"):
        ll.widgets.spectrum_explorer(ll.SpectrumSet([]))
    with pytest.raises(ValueError, match="another model"):
        ll.widgets.window_explorer(narrow, ll.spectra(narrow_vit(1), progress=False), digits)
    with pytest.raises(ValueError, match="11 classes"):
        ll.widgets.window_explorer(narrow, narrow_spectra, replace(digits, classes=tuple("0123456789x")))
    flat = ll.Examples(torch.zeros(4, 784), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="shows images"):
        ll.widgets.window_explorer(narrow, narrow_spectra, replace(digits, train=flat, test=flat))


@pytest.fixture
def several(narrow_spectra, spectra) -> VBox:
    return ll.widgets.spectrum_explorer({"narrow": narrow_spectra, "embedded": spectra}, rank=8)


def test_another_model_brings_its_own_choices_and_keeps_those_it_shares(several, spectra):
    assert control(several, "block").options == (("all", ""), ("0", 0), ("1", 1))
    assert control(several, "block").index == control(several, "kind").index == 0
    control(several, "kind").value, control(several, "block").value = "attn.qkv", 1
    control(several, "model").value = "embedded"
    assert (control(several, "kind").value, control(several, "block").value) == ("attn.qkv", 1)
    assert control(several, "rank").max == 96 and "[44, 52) of 96" in text(several)
    assert f"{spectra['blocks.1.attn.qkv'].stable_rank:.1f}" in text(several)
    assert "of embedded" in several.children[-1].children[0].value


def test_choices_that_another_model_lacks_fall_back(several):
    control(several, "model").value = "embedded"
    control(several, "block").value, control(several, "rank").value = 5, 90
    control(several, "model").value = "narrow"
    assert shows_results(several)
    assert (control(several, "block").label, control(several, "rank").value) == ("all", 16)
    assert control(several, "block").index == 0  # what the browser shows


def test_a_change_of_model_draws_once(several, monkeypatch):
    drawn = []
    draw = ll.plots.spectrum
    monkeypatch.setattr(ll.plots, "spectrum", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    control(several, "block").value = 1
    control(several, "rank").value = 12
    control(several, "model").value = "embedded"
    assert len(drawn) == 2  # a window moves over lines that are there already


def test_one_model_has_no_choice_of_models(spectrum_explorer):
    assert "model" not in [getattr(w, "description", "") for w in parts(spectrum_explorer, Widget)]


def test_no_models_and_models_without_spectra_are_refused(narrow_spectra):
    for nothing in ({}, {"narrow": narrow_spectra, "empty": ll.SpectrumSet([])}):
        with pytest.raises(ValueError, match="no spectra"):
            ll.widgets.spectrum_explorer(nothing)
    with pytest.raises(ValueError, match="rank 20 does not fit"):
        ll.widgets.spectrum_explorer({"narrow": narrow_spectra}, rank=20)


def test_fifty_moves_leave_no_figure_open_and_the_style_alone(narrow_spectra):
    style, figures = dict(plt.rcParams), plt.get_fignums()
    explorer = ll.widgets.spectrum_explorer(ll.SpectrumSet([narrow_spectra["blocks.0.attn.qkv"]]))
    shown = set()
    for i in range(50):
        control(explorer, "position").value = (i % 25) / 24
        shown.add(pictures(explorer)[0])
    assert plt.get_fignums() == figures and dict(plt.rcParams) == style
    assert len(shown) == 25


def test_the_page_calls_the_arguments_by_their_names():
    page = (Path(__file__).parents[2] / "docs" / "explorers.md").read_text()
    for name in set(ll.widgets.__all__) - {"pages"}:
        (listed,) = re.findall(rf"^`{name}\((.*?)\)`:", page, flags=re.MULTILINE)
        wanted = list(signature(getattr(ll.widgets, name)).parameters)
        assert listed.split(", ") == wanted[: len(listed.split(", "))], name


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m, s, t: ll.widgets.window_explorer(m, s, None),
            "task must be a Task",
        ),
        (
            lambda m, s, t: ll.widgets.window_explorer(s, m, t),
            "model must be the pretr",
        ),
        (lambda m, s, t: ll.widgets.window_explorer(m, m, t), "spectra must be what"),
        (
            lambda m, s, t: ll.widgets.window_explorer(m, s, t, rank=2.5),
            "rank must be a",
        ),
        (
            lambda m, s, t: ll.widgets.window_explorer(m, s, t, images=0),
            "images must be",
        ),
        (
            lambda m, s, t: ll.widgets.window_explorer(m, s, t, image=3),
            "mean 'images'",
        ),
        (lambda m, s, t: ll.widgets.spectrum_explorer({"a": m}), "spectra must be what"),
        (
            lambda m, s, t: ll.widgets.spectrum_explorer(s, rank="8"),
            "rank must be a whole",
        ),
        (
            lambda m, s, t: ll.widgets.training_explorer(m, t, None),
            "retain must be a Task",
        ),
        (
            lambda m, s, t: ll.widgets.training_explorer(m, t, t, learning_rate=1),
            "training_explorer has no setting 'learning_rate'; did you mean 'lr'",
        ),
        (
            lambda m, s, t: ll.widgets.training_explorer(m, t, t, m),
            "spectra must be what",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(narrow, narrow_spectra, digits, call, said):
    with pytest.raises(ll.errors.LoraLensError, match=said) as error:
        call(narrow, narrow_spectra, digits)
    assert "\n" not in str(error.value)


def test_what_is_no_sweep_is_refused_in_words(table, tmp_path):
    for explorer in (ll.widgets.tradeoff_explorer, ll.widgets.comparison_explorer):
        with pytest.raises(TypeError, match=r"a store is opened with ll\.Sweep\.open"):
            explorer(tmp_path)
    for explorer in (ll.widgets.pair_explorer, ll.widgets.forgotten_explorer):
        for given in (tmp_path, table):
            with pytest.raises(TypeError, match=r"sweep must be an ll\.Sweep, from ll\.sweep"):
                explorer(given, None)
