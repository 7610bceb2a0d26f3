from __future__ import annotations

from pathlib import Path

import pytest
import torch
from explored import alts, control, narrow_vit, numbers, pictures, shows_results

import lora_lens as ll


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Two checkpoints of the first window, of which the second has moved one layer more than the others."""
    folder = tmp_path_factory.mktemp("trained")
    adapted = ll.attach(narrow_vit(0), ll.Window.first(4))
    ll.save(adapted, folder / "start")
    for step in (10, 20):
        with torch.no_grad():
            for name, factor in adapted.named_parameters():
                if factor.requires_grad:
                    factor.mul_(1.1 if "blocks.1.mlp.fc1" in name and step == 20 else 1.01)
        adapted.save_pretrained(folder / "out" / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def grown(checkpoints, digits) -> ll.forgetting.Growth:
    model = narrow_vit(0)
    known = ll.tasks.agreement(model, digits.test.inputs[:20])
    spectra = ll.spectra(model, progress=False)
    return ll.forgetting.growth(
        checkpoints / "out", model, known, start=checkpoints / "start", spectra=spectra
    )


def test_the_last_checkpoint_is_shown_first_and_all_follows_the_step(grown):
    explorer = ll.widgets.growth_explorer(grown)
    (last,) = numbers(explorer)
    assert last["checkpoint"] == "step 20" and last["update / weight"] == f"{grown['relative'].iloc[-1]:.2%}"
    assert last["moved most"].startswith("blocks.1.mlp.fc1, by ")
    curve, layers = alts(explorer)
    assert curve == f"forgetting over the steps; at step 20 it is {grown['forgetting'].iloc[-1]:.2%}"
    relative = 100 * grown.layers.query("step == 20")["relative"]
    assert layers == (f"relative update by layer at step 20, {relative.min():.3g} to {relative.max():.3g}%")
    before = pictures(explorer)
    control(explorer, "step").value = 10
    assert all(now != then for now, then in zip(pictures(explorer), before, strict=True))
    here, last = numbers(explorer)
    assert (here["checkpoint"], last["checkpoint"]) == ("step 10", "step 20, the last")
    assert here["update / weight"] == f"{grown['relative'].iloc[1]:.2%}" and shows_results(explorer)


def test_curve_and_map_are_chosen_apart(grown):
    explorer = ll.widgets.growth_explorer(grown, step=10)
    curve, layers = pictures(explorer)
    control(explorer, "measure").value = "rotation"
    assert pictures(explorer)[0] != curve and pictures(explorer)[1] == layers
    control(explorer, "of each layer").value = "inside"
    assert pictures(explorer)[1] != layers
    assert alts(explorer)[1].endswith("at step 10, 100 to 100%")  # the window's factors only grew
    code = 'll.widgets.growth_explorer(growth, step=10, measure="rotation", of_each_layer="inside")'
    assert explorer.code() == code
    assert pictures(eval(code, {"ll": ll, "growth": grown})) == pictures(explorer)


def test_what_was_not_measured_is_not_offered(checkpoints):
    bare = ll.forgetting.growth(checkpoints / "out", narrow_vit(0), start=checkpoints / "start")
    explorer = ll.widgets.growth_explorer(bare)
    assert [value for _, value in control(explorer, "measure").options] == ["update", "relative"]
    assert [value for _, value in control(explorer, "of each layer").options] == ["relative"]


def test_a_table_without_layers_is_refused(grown):
    with pytest.raises(TypeError, match=r"growth must be what ll\.forgetting\.growth returns"):
        ll.widgets.growth_explorer(grown.iloc[:2])
