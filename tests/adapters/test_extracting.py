from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_lens as ll
from lora_lens.forgetting.weight_drift import drift_between
from lora_lens.spectrum import weights

TOKENS = torch.arange(12).reshape(2, 6)
llama = pytest.fixture(tiny_models.llama, scope="module")


@pytest.fixture(scope="module")
def tuned(llama):
    """The model after a LoRA of rank 2 on four layers was merged into it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(llama), config).merge_and_unload()


def test_a_merged_lora_comes_out_again(llama, tuned, tmp_path):
    found = ll.extract(llama, tuned, tmp_path, rank=2, progress=False).set_index("layer")
    assert set(found.index[found["rank"] > 0]) == {
        n for n in found.index if n.endswith(("q_proj", "down_proj"))
    }
    assert found["lost"].max() < 1e-10 and (found["update"] > 0).sum() == 4
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, tuned(TOKENS).logits, rtol=1e-4, atol=1e-5)
        again = ll.load(copy.deepcopy(llama), tmp_path)
        torch.testing.assert_close(again(TOKENS).logits, tuned(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_from_files_in_shards_and_by_a_share_of_the_energy(llama, tuned, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    tuned.save_pretrained(tmp_path / "after", max_shard_size="8KB")
    assert len(list((tmp_path / "after").glob("*.safetensors"))) > 1
    found = ll.extract(
        str(tmp_path / "before"), tmp_path / "after", tmp_path / "lora", rank=0.7, progress=False
    )
    found = found.set_index("layer")
    spectra = ll.spectra(tmp_path / "lora", progress=False)
    for name, old in ((w.name, w.load()) for w in weights(llama)):
        energies = torch.linalg.svdvals((tuned.get_submodule(name).weight - old).double()).square()
        if energies.sum() == 0:
            assert found.loc[name, "rank"] == 0
            continue
        rank = int((energies.cumsum(0) / energies.sum() < 0.7).sum()) + 1
        assert found.loc[name, "rank"] == rank and found.loc[name, "lost"] <= 0.3
        torch.testing.assert_close(
            spectra[name].singular_values[:rank].square(), energies[:rank], rtol=1e-5, atol=1e-9
        )
    assert set(found["rank"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda m: None, {}, "none of the 14 layers differs between before and after"),
        (lambda m: None, {"rank": 0}, "rank must be"),
        (lambda m: None, {"rank": 1.0}, "rank must be"),
        (lambda m: None, {"targets": "embed_tokens"}, "embed_tokens is an embedding, for which no LoRA"),
        (lambda m: setattr(m.model, "layers", m.model.layers[:1]), {}, r"only before has model\.layers\.1"),
        (
            lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Linear(16, 8)),
            {},
            r"up_proj has shape \(24, 16\) before and \(8, 16\) after",
        ),
        (lambda m: m.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan), {}, "up_proj after"),
    ],
)
def test_bad_input(llama, tmp_path, change, arguments, message):
    after = copy.deepcopy(llama)
    change(after)
    with pytest.raises((ValueError, TypeError), match=message):
        ll.extract(llama, after, tmp_path, progress=False, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["residual", "offset"])
def test_what_is_no_model_of_its_own_is_refused(llama, base, tmp_path):
    """The base under an adapter is a residual or the pretrained weight, and its file holds updates."""
    adapted = ll.attach(llama, ll.Window.first(2), targets="q_proj", variant=ll.Variant(base=base))
    ll.export(adapted, tmp_path / "exported")
    spectra = ll.spectra(llama, "q_proj", progress=False)
    for after, message in (
        (adapted, "adapted already"),
        (adapted.get_base_model(), "adapted already"),
        (tmp_path / "exported", "is an adapter, so what it holds are updates"),
    ):
        with pytest.raises(ValueError, match=message):
            ll.extract(llama, after, tmp_path / "lora", targets="q_proj", progress=False)
        with pytest.raises(ValueError, match=message):
            drift_between(llama, after, spectra)
    assert not (tmp_path / "lora").exists()


def test_convolutions_are_refused(tmp_path):
    before = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    after = copy.deepcopy(before)
    after[0].weight.data.mul_(2)
    with pytest.raises(ValueError, match="0 is a convolution, for which no LoRA is written"):
        ll.extract(before, after, tmp_path, targets="all-conv", progress=False)


def test_experts_are_left_out_by_a_warning_and_refused_by_name(tmp_path):
    torch.manual_seed(0)
    sizes = tiny_models.TINY | {"num_hidden_layers": 1, "num_local_experts": 2}
    before = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    after = copy.deepcopy(before)
    after.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    with pytest.warns(UserWarning, match=r"left out .*experts.*\[0\]"):
        found = ll.extract(before, after, tmp_path, progress=False)
    assert list(found["layer"][found["rank"] > 0]) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"\[0\] is an expert, a parameter of its module, for which no LoRA"):
        ll.extract(before, after, tmp_path, targets="experts.down_proj", progress=False)


@pytest.mark.parametrize("files", [False, True])
def test_dense_layers_of_a_mixture_are_found_again_by_plain_peft(files, tmp_path):
    """PEFT takes gate_proj for that of the experts there; files of transformers hold these one by one."""
    torch.manual_seed(0)
    sizes = tiny_models.TINY | {"num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    sizes |= {"num_experts_per_tok": 2}
    before = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    after = copy.deepcopy(before)
    after.model.layers[0].mlp.gate_proj.weight.data.mul_(2)
    after.model.layers[1].self_attn.q_proj.weight.data.mul_(2)
    sources = [before, after]
    if files:
        before.save_pretrained(tmp_path / "before")
        after.save_pretrained(tmp_path / "after")
        sources = [tmp_path / "before", tmp_path / "after"]
    with pytest.warns(UserWarning, match=r"left out .*experts"):
        ll.extract(*sources, tmp_path / "lora", rank=24, progress=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, after(TOKENS).logits, rtol=1e-4, atol=1e-5)
