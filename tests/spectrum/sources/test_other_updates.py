from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import weights


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 20))


ON_BOTH = {"target_modules": ["0", "1"], "init_weights": False, "alpha": 5}
CONFIGS = {
    "LoHa": LoHaConfig(r=3, **ON_BOTH),
    "LoHa by patterns": LoHaConfig(r=3, rank_pattern={"1": 2}, alpha_pattern={"1": 9}, **ON_BOTH),
    "LoKr": LoKrConfig(r=2, **ON_BOTH),
    "LoKr in four": LoKrConfig(r=1, decompose_both=True, decompose_factor=4, **ON_BOTH),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_update_is_what_peft_merges(tmp_path, kind):
    model = layers()
    adapted = get_peft_model(copy.deepcopy(model), CONFIGS[kind])
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    found = weights(tmp_path)
    assert [w.name for w in found] == ["0", "1"]
    for weight in found:
        change = merged.get_submodule(weight.name).weight - model.get_submodule(weight.name).weight
        torch.testing.assert_close(weight.load(), change.detach(), rtol=1e-4, atol=1e-6)
        assert weight.shape == tuple(change.shape)
    assert len(ll.spectra(tmp_path, progress=False)) == 2


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_a_file_of_lycoris_is_scaled_by_the_alpha_in_it(tmp_path, kind):
    model = layers()
    adapted = get_peft_model(copy.deepcopy(model), CONFIGS[kind])
    adapted.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    tensors = {f"lycoris_{key.removeprefix('base_model.model.')}": tensor for key, tensor in tensors.items()}
    tensors |= {f"lycoris_{i}.alpha": torch.tensor(5.0) for i in range(2)}
    save_file(tensors, tmp_path / "lycoris.safetensors")
    scaling = 5 / CONFIGS[kind].r
    for i, (one, other) in enumerate(
        zip(weights(tmp_path / "lycoris.safetensors"), weights(tmp_path / "peft"), strict=True)
    ):
        factored = f"lycoris_{i}.lokr_w1" not in tensors or f"lycoris_{i}.lokr_w2" not in tensors
        torch.testing.assert_close(one.load() * (1 if factored else scaling), other.load())
    del tensors["lycoris_1.alpha"]
    save_file(tensors, tmp_path / "lycoris.safetensors")
    with pytest.raises(ValueError, match=r"nothing says how .* of lycoris_1 is scaled"):
        weights(tmp_path / "lycoris.safetensors")


def test_what_is_no_whole_product_is_refused(tmp_path):
    tensors = {f"lora_unet_a.hada_w{i}_{s}": torch.ones(4, 4) for i in (1, 2) for s in "ab"}
    tensors["lora_unet_a.alpha"] = torch.tensor(4.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors | {"lora_unet_a.hada_w2_b": torch.ones(3, 4)}, path)
    with pytest.raises(ValueError, match="the factors of lora_unet_a do not fit together"):
        weights(path)
    for more in ("dora_scale", "hada_t1"):
        save_file(tensors | {f"lora_unet_a.{more}": torch.ones(4, 4)}, path)
        with pytest.raises(ValueError, match="without LoRA's factors"):
            weights(path)


def test_vera_needs_its_base(tmp_path):
    get_peft_model(layers(), VeraConfig(r=4, target_modules=["0", "1"])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a VeRA adapter, whose matrices are shared and cut to each layer"
    ):
        weights(tmp_path)
