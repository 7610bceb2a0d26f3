from __future__ import annotations

import copy

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from peft.helpers import find_kappa_target_modules
from tiny_models import TINY
from torch import nn

import lora_lens as ll
from lora_lens.spectrum import kappa_targets, rank_layers, select_layers, to_yaml


def spectrum(name, values, shape=None):
    values = torch.tensor(values, dtype=torch.float64)
    return ll.Spectrum(name, shape or (len(values),) * 2, values)


FLAT, SHARP = spectrum("flat", [4.0, 3.0, 2.0]), spectrum("sharp", [9.0, 2.0, 1.0])
PAIR = ll.SpectrumSet([SHARP, FLAT])


@pytest.mark.parametrize(("by", "expected"), [("condition_number", [2, 9]), ("effective_rank", None)])
def test_flat_spectra_come_first_by_condition_number_and_by_effective_rank(by, expected):
    ranked = rank_layers(PAIR, by)
    assert list(ranked["layer"]) == ["flat", "sharp"] and list(ranked.index) == [0, 1]
    if expected:
        assert list(ranked[by]) == expected
    assert list(rank_layers(PAIR, by, smallest_first=by == "effective_rank")["layer"]) == ["sharp", "flat"]


@pytest.mark.parametrize("by", ["signal_to_noise", "above_mp"])
def test_a_planted_signal_stands_out_of_noise(by):
    torch.manual_seed(0)
    noise = torch.randn(80, 60)
    planted = noise + 20 * torch.linalg.qr(torch.randn(80, 5))[0] @ torch.linalg.qr(torch.randn(60, 5))[0].T
    found = ll.SpectrumSet([ll.spectrum.factorize(n, w) for n, w in (("noise", noise), ("planted", planted))])
    ranked = rank_layers(found, by).set_index("layer")[by]
    assert list(ranked.index) == ["planted", "noise"]
    s = found["planted"].singular_values
    share = {"above_mp": 5 / 60, "signal_to_noise": float(s[:5].sum() / s[5:].sum() / s[0])}[by]
    assert ranked["planted"] == pytest.approx(share)


def test_a_zero_weight_comes_last_and_does_not_stop():
    zero = spectrum("zero", [0.0, 0.0, 0.0])
    for by in ("condition_number", "signal_to_noise"):
        assert list(rank_layers(ll.SpectrumSet([zero, SHARP, FLAT]), by)["layer"])[-1] == "zero"


def test_the_names_are_targets_and_yaml(model):
    names = select_layers(ll.spectra(model, vectors=False, progress=False), share=0.5)
    found = ll.spectra(model, names, vectors=False, progress=False)
    assert sorted(found) == sorted(names) and len(names) == 12
    assert ll.attach(model, ll.Window.first(2), targets=names).peft_config["default"].target_modules
    assert yaml.safe_load(to_yaml(names)) == {"lora_target_modules": names}
    assert yaml.safe_load(to_yaml(["*", "a: b"], "target_modules")) == {"target_modules": ["*", "a: b"]}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=names))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == len(names)


@pytest.mark.parametrize("top_p", [0.01, 0.2, 0.5, 1.0])
def test_what_peft_would_choose(top_p):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_local_experts": 3}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY | sizes))
    expected = find_kappa_target_modules(model, top_p=top_p, show_progress=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [*linear, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = kappa_targets(ll.spectra(model, names, vectors=False, progress=False), top_p)
    assert found == expected
    dense = ll.spectra(model, linear, vectors=False, progress=False)
    assert kappa_targets(dense, top_p)["target_parameters"] is None
    assert kappa_targets(dense, top_p)["target_modules"] == select_layers(dense, share=top_p)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_layers({}), "spectra must be a SpectrumSet"),
        (lambda: rank_layers(ll.SpectrumSet([])), "spectra holds none"),
        (lambda: rank_layers(PAIR, "kappa"), "by must be"),
        (lambda: select_layers(PAIR, share=0.5, count=1), "two ways to say how many; give one"),
        (lambda: select_layers(PAIR, count=3), "count must be"),
        (lambda: select_layers(PAIR, share=0), "share must be above 0"),
        (lambda: select_layers(PAIR, share=20), "share must be a share"),
        (lambda: to_yaml([]), "layers must name at least one layer"),
        (lambda: to_yaml(3), "layers must be"),
        (lambda: to_yaml(None), "layers must be names of layers"),
        (lambda: to_yaml(["attn.qkv[q]"]), r"attn\.qkv\[q\] is a part of a weight"),
        (lambda: kappa_targets(ll.SpectrumSet([spectrum("qkv[q]", [1.0])])), "is a part of a weight"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
