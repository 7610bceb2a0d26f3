from __future__ import annotations

import pytest
import torch
from explored import alts, control, narrow_vit, numbers, pictures, shows_results

import lora_lens as ll


@pytest.fixture(scope="module")
def spectra(digits) -> dict[str, ll.SpectrumSet]:
    model, few = narrow_vit(0), digits.first(40, 4)
    metrics = {
        "plain": None,
        "digits": few,
        "against noise": ll.spectrum.Metric(few, torch.randn(40, 1, 28, 28)),
    }
    return {name: ll.spectra(model, "blocks.0.*", metric=m, progress=False) for name, m in metrics.items()}


def test_each_metric_has_its_own_energy_and_shares_directions_with_the_plain_spectrum(spectra):
    explorer = ll.widgets.metric_explorer(spectra, rank=8, layer="blocks.0.mlp.fc2", position=0.25)
    window, name = ll.Window(8, position=0.25), "blocks.0.mlp.fc2"
    for row, (metric, some) in zip(numbers(explorer), spectra.items(), strict=True):
        assert row["spectrum"] == metric
        assert row["energy in the window"] == f"{some[name].energy(window):.2%}"
        assert row["effective rank"] == f"{some[name].effective_rank:.1f} of 16"
        held = some[name].energy(ll.Window(int(row["components for 90%"]), start=0))
        before = some[name].energy(ll.Window(int(row["components for 90%"]) - 1, start=0))
        assert before < 0.9 <= held
        common = f"{ll.spectrum.overlap(spectra['plain'][name], some[name], window):.1%}"
        expected = ("", "") if metric == "plain" else (common, "50.0%")
        assert (row["in common with plain"], row["by chance"]) == expected
    assert f"of digits {numbers(explorer)[1]['in common with plain']} in common" in alts(explorer)[0]


def test_the_window_moves_and_any_spectrum_can_be_compared_with(spectra):
    explorer = ll.widgets.metric_explorer(spectra, rank=4)
    shown = {pictures(explorer)[0]}
    of_plain = numbers(explorer)[1]["in common with plain"]
    control(explorer, "compared with").value = "digits"
    assert numbers(explorer)[0]["in common with digits"] == of_plain
    shown.add(pictures(explorer)[0])
    for name, value in (("position", 1.0), ("rank", 5), ("layer", "blocks.0.attn.proj")):
        control(explorer, name).value = value
        shown.add(pictures(explorer)[0])
    assert len(shown) == 5 and shows_results(explorer)
    again = eval(explorer.code(), {"ll": ll, "spectra": spectra})
    assert pictures(again) == pictures(explorer)


def test_windows_of_one_spectrum_have_everything_in_common(spectra):
    plain = spectra["plain"]
    explorer = ll.widgets.metric_explorer({"plain": plain, "again": plain}, rank=3, position=1.0)
    assert numbers(explorer)[1]["in common with plain"] == "100.0%"


def test_spectra_that_do_not_compare_are_refused(spectra):
    plain = spectra["plain"]
    proj = plain["blocks.0.attn.proj"]
    wider = ll.SpectrumSet([ll.spectrum.factorize(proj.name, torch.randn(40, 32))])
    for bad, said in (
        ({"plain": plain}, "spectra of plain only; give at least two"),
        (
            {"plain": plain, "other": ll.SpectrumSet([ll.spectrum.factorize("fc", torch.eye(4))])},
            "no layer in",
        ),
        ({"plain": plain, "wider": wider}, r"proj has the shapes \(32, 32\), \(40, 32\)"),
        (plain, "dict of such"),
    ):
        with pytest.raises(ll.errors.LoraLensError, match=said):
            ll.widgets.metric_explorer(bad)
    with pytest.raises(ValueError, match="rank 20 does not fit"):
        ll.widgets.metric_explorer(spectra, rank=20)
    values = ll.SpectrumSet([ll.Spectrum(s.name, s.shape, s.singular_values) for s in plain.values()])
    with pytest.raises(ValueError, match="no singular vectors"):
        ll.widgets.metric_explorer({"plain": plain, "values": values})
