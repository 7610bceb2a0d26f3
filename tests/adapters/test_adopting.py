from __future__ import annotations

import copy

import pytest
import torch
from explored import narrow_vit
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_lens as ll


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return narrow_vit(0)


def peft_model(narrow: nn.Module, **settings: object) -> PeftModel:
    settings = {"r": 4, "target_modules": ["qkv", "fc1"], **settings}
    return get_peft_model(copy.deepcopy(narrow), LoraConfig(**settings))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "lora_alpha": 8}, {"modules_to_save": ["head"]}]
)
def test_what_peft_made_is_saved_exported_rewound_and_taken_off(narrow, source, settings, tmp_path):
    adapted = ll.adapters.adopt(peft_model(narrow, **settings))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    clothes = source.first(8, 8)
    images = clothes.test.inputs
    assert ll.function_error(adapted, narrow, images) > 1e-3
    ll.export(adapted, tmp_path / "exported")
    plain = PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "exported")
    assert ll.function_error(plain, adapted, images) < 1e-6
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(narrow, tmp_path / "saved"), adapted, images) == 0
    back = ll.rewind(adapted, clothes, clothes, t=[0], readout=clothes.own_readout(adapted), progress=False)
    with back.at(0) as there:
        assert ll.function_error(there, narrow, images) == 0
    spectra = ll.spectra(narrow, progress=False)
    assert len(ll.forgetting.drift(adapted, spectra)) == len(adapted.planned_layers) == 4
    pretrained = ll.detach(adapted)
    assert all(torch.equal(p, q) for p, q in zip(pretrained.parameters(), narrow.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': its base may hold a residual"),
        ({"init_lora_weights": False}, "init_lora_weights=False: its base may hold a residual"),
        ({"bias": "all"}, "trains more than factors A and B of layers: biases"),
        ({"lora_bias": True}, "trains more than factors A and B of layers: blocks.0.attn.qkv"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(narrow, settings, words):
    with pytest.raises(ValueError, match=words):
        ll.adapters.adopt(peft_model(narrow, **settings))


def test_other_adapters_and_several_are_refused(narrow):
    two = peft_model(narrow)
    two.add_adapter("other", LoraConfig(r=2, target_modules=["qkv"]))
    ia3 = get_peft_model(copy.deepcopy(narrow), IA3Config(target_modules=["qkv"], feedforward_modules=[]))
    for model in (two, ia3):
        with pytest.raises(
            ValueError, match="expected one LoRA called 'default', and the model has 'default'"
        ):
            ll.adapters.adopt(model)
    with pytest.raises(TypeError, match="peft_model must be a PeftModel"):
        ll.adapters.adopt(narrow)
