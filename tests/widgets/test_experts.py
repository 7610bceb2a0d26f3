from __future__ import annotations

import pytest
import torch
from explored import alts, control, message, numbers, pictures, shows_results, text
from tiny_models import TINY
from transformers import MixtralConfig, MixtralForCausalLM

import lora_lens as ll

DOWN, GATE_UP = (f"model.layers.*.mlp.experts.{name}_proj[*]" for name in ("down", "gate_up"))


@pytest.fixture(scope="module")
def spectra() -> ll.SpectrumSet:
    """Three experts in each of two blocks; in the second block the first two write the same outputs."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3))
    with torch.no_grad():
        down = model.model.layers[1].mlp.experts.down_proj
        down[1] = 3 * down[0]
    return ll.spectra(model, ["all-experts", "q_proj"], progress=False)


def down(spectra: ll.SpectrumSet) -> list[ll.Spectrum]:
    return [spectra[f"model.layers.1.mlp.experts.down_proj[{i}]"] for i in range(3)]


def test_one_expert_stands_beside_the_others(spectra):
    explorer = ll.widgets.expert_explorer(spectra, rank=4, tensor=DOWN, block=1, expert=2)
    assert control(explorer, "tensor").options == (GATE_UP, DOWN)  # q_proj has no experts
    window, experts = ll.Window(4, position=0.5), down(spectra)
    assert f"3 experts of {DOWN} in block 1, expert 2 in front" in alts(explorer)[0]
    rows = {row.pop("measure"): row for row in numbers(explorer)}
    energies = [s.energy(window) for s in experts]
    assert rows["energy in the window"]["expert 2"] == f"{energies[2]:.2%}"
    assert rows["energy in the window"]["mean of 3"] == f"{sum(energies) / 3:.2%}"
    assert rows["largest s"]["most"] == f"{experts[1].singular_values[0]:.3g} (expert 1)"
    assert rows["effective rank"]["expert 2"] == f"{experts[2].effective_rank:.1f}"


def test_windows_of_two_experts_are_compared_by_outputs_and_by_inputs(spectra):
    explorer = ll.widgets.expert_explorer(spectra, rank=4, tensor=DOWN, block=1, position=0.0)
    experts, window = down(spectra), ll.Window.first(4)
    for side, directions, width in (("left", "output", 16), ("right", "input", 24)):
        control(explorer, "directions").value = side
        pairs = [
            ll.spectrum.overlap(experts[i], experts[j], window, side) for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        said = (
            f"have {sum(pairs) / 3:.1%} in common on average, {4 / width:.1%} by chance; most alike are 0 and"
        )
        assert (
            f"{said} 1, 100.0%" in alts(explorer)[1] and control(explorer, "directions").label == directions
        )
    before = pictures(explorer)
    control(explorer, "expert").value = 1
    assert pictures(explorer)[0] != before[0] and pictures(explorer)[1] == before[1]
    control(explorer, "position").value = 1.0
    assert all(now != then for now, then in zip(pictures(explorer), before, strict=True))
    assert pictures(eval(explorer.code(), {"ll": ll, "spectra": spectra})) == pictures(explorer)


def test_experts_that_are_layers_and_halves_of_a_tensor_are_found():
    names = [
        f"{side}.layers.1.ffn.experts.expert_{i}.fc1" for side in ("encoder", "decoder") for i in range(2)
    ]
    names += [f"layers.0.experts.gate_up_proj[{i}][{part}]" for i in range(3) for part in ("gate", "up")]
    some = ll.SpectrumSet([ll.spectrum.factorize(name, torch.randn(6, 6)) for name in names])
    explorer = ll.widgets.expert_explorer(some, rank=2)
    up = "layers.*.experts.gate_up_proj[*][up]"
    layers = [f"{side}.layers.*.ffn.experts.expert_*.fc1" for side in ("encoder", "decoder")]
    assert control(explorer, "tensor").options == (*layers, up.replace("up]", "gate]"), up)
    assert "singular values of 2 experts of encoder" in alts(explorer)[0]
    control(explorer, "tensor").value = up
    assert f"block 1 has no expert 0 of {up}" in message(explorer) and not shows_results(explorer)
    control(explorer, "block").value = 0
    assert "singular values of 3 experts" in alts(explorer)[0] and shows_results(explorer)


def test_without_vectors_only_the_directions_are_missing(spectra):
    values = ll.SpectrumSet([ll.Spectrum(s.name, s.shape, s.singular_values) for s in spectra.values()])
    explorer = ll.widgets.expert_explorer(values, rank=4)
    assert "in block 0, expert 0" in alts(explorer)[0]
    assert len(pictures(explorer)) == 1 and "Not shown: the spectrum of" in text(explorer)


def test_spectra_without_experts_are_refused(spectra):
    dense = ll.SpectrumSet([s for name, s in spectra.items() if "q_proj" in name])
    with pytest.raises(ValueError, match="there are no experts among SpectrumSet of 2 weights"):
        ll.widgets.expert_explorer(dense, rank=4)
    with pytest.raises(ValueError, match="rank 20 does not fit"):
        ll.widgets.expert_explorer(spectra, rank=20)
