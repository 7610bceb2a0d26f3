from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from torch import nn

import lora_lens as ll
from lora_lens.spectrum.sources.matrices import Weight, weights

Q = "model.layers.0.self_attn.q_proj"
A, B = torch.randn(4, 32), torch.randn(16, 4)


llama = pytest.fixture(tiny_models.llama, scope="module")
gpt2 = pytest.fixture(tiny_models.gpt2, scope="module")


def by_name(found: list[Weight]) -> dict[str, Weight]:
    for weight in found:
        assert tuple(weight.load().shape) == weight.shape, weight.name
    assert len({w.name for w in found}) == len(found)
    return {w.name: w for w in found}


def test_a_trainers_checkpoint_of_a_window_is_told_from_no_other_and_warned_of(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    ll.attach(model, ll.Window.first(2), targets="0").save_pretrained(tmp_path / "window")
    with pytest.warns(UserWarning, match="fits a residual"):
        ll.spectra(tmp_path / "window", progress=False)
    ll.attach(model, ll.LoRA(2), targets="0").save_pretrained(tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights(tmp_path / "lora")


def trained(model, **settings):
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return adapted


def fresh(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_the_change_that_merging_it_makes(llama, tmp_path, rslora):
    adapted = trained(
        fresh(llama),
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
    )
    adapted.save_pretrained(tmp_path)
    merged = dict(adapted.merge_and_unload().named_parameters())
    found = by_name(weights(tmp_path))
    assert len(found) == 5
    before = dict(llama.named_parameters())
    for name, weight in found.items():
        change = merged[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(weight.load(), change, rtol=1e-4, atol=1e-5)
        b, a = weight.factors()
        assert (b.shape, a.shape) == ((weight.shape[0], a.shape[0]), (b.shape[1], weight.shape[1]))
        assert torch.equal(b @ a, weight.load())
    assert found["model.layers.1.mlp.down_proj"].factors()[0].shape == (16, 3)
    assert len(weights(tmp_path, "q_proj")) == 2


def test_adapters_of_convolutions_and_of_transposed_and_fused_layers(gpt2, tmp_path):
    adapted = trained(fresh(gpt2), r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted.save_pretrained(tmp_path / "gpt2")
    merged = adapted.merge_and_unload().transformer.h[1].attn.c_attn.weight
    value = by_name(weights(tmp_path / "gpt2", split_qkv=True))["transformer.h.1.attn.c_attn[v]"]
    change = (merged - gpt2.transformer.h[1].attn.c_attn.weight).T[32:]
    torch.testing.assert_close(value.load(), change, rtol=1e-4, atol=1e-5)
    b, a = value.factors()
    assert torch.equal(b @ a, value.load())

    base = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU())
    before = base[0].weight.detach().clone()
    adapted = trained(base, r=2, lora_alpha=3, target_modules=["0"])
    adapted.save_pretrained(tmp_path / "conv")
    (update,) = weights(tmp_path / "conv")
    change = (adapted.merge_and_unload()[0].weight - before).flatten(1)
    torch.testing.assert_close(update.load(), change, rtol=1e-4, atol=1e-5)


def test_other_adapters_are_refused(llama, tmp_path):
    trained(fresh(llama), r=2, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"holds a DoRA adapter.*merge this one"):
        weights(tmp_path / "dora")
    trained(fresh(llama), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "holds a LOHA adapter"),
        ({"r": 3}, "are no pair of rank 3"),
        ({"lora_alpha": None}, "gives no scaling of"),
        ({"rank_pattern": {"(": 2}}, "gives no scaling of"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            weights(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    config.write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match="a pickle can run code"):
        weights(tmp_path / "lora")


def moved(adapted):
    """As training would: every factor a little elsewhere."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return adapted


def change_of(adapted, llama) -> torch.Tensor:
    merged = adapted.merge_and_unload().get_submodule(Q).weight
    return merged.detach() - llama.get_submodule(Q).weight.detach()


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read_as_the_change_that_they_make(llama, tmp_path, start):
    adapted = moved(
        get_peft_model(fresh(llama), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    )
    adapted.save_pretrained(tmp_path)
    found = by_name(weights(tmp_path))[Q].load()
    torch.testing.assert_close(found, change_of(adapted, llama), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_are_taken_from_the_base_are_refused_until_they_are_converted(llama, tmp_path, start):
    adapted = get_peft_model(
        fresh(llama), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    )
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, before training
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = start
    moved(adapted).save_pretrained(tmp_path / "raw")
    with pytest.raises(
        ValueError, match=rf"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"
    ):
        weights(tmp_path / "raw")
    adapted.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    found = by_name(weights(tmp_path / "converted"))[Q].load()
    torch.testing.assert_close(found, change_of(adapted, llama), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "something new"])
def test_starts_that_need_data_or_are_unknown_are_refused_by_their_name(llama, tmp_path, start):
    trained(fresh(llama), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        weights(tmp_path)


def test_what_ll_save_wrote_of_a_window_is_the_update_of_the_pretrained_weight(llama, tmp_path):
    adapted = moved(ll.attach(llama, ll.Window.middle(4), targets="q_proj"))
    ll.save(adapted, tmp_path / "saved")
    ll.export(adapted, tmp_path / "exported")
    ll.export_residual(adapted, tmp_path / "residual")
    expected = by_name(weights(tmp_path / "exported"))
    for place in ("saved", "saved/on_residual", "saved/on_residual/adapter_model.safetensors"):
        found = by_name(weights(tmp_path / place))
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight.load(), expected[name].load(), rtol=1e-4, atol=1e-6)
    for place in ("residual", "residual/adapter"):
        with pytest.raises(ValueError, match="no update; for what training changed"):
            weights(tmp_path / place)


def test_the_file_counts_as_its_folder_and_alone_is_refused(llama, tmp_path):
    trained(fresh(llama), r=2, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    by_folder, by_file = by_name(weights(tmp_path / "a")), by_name(weights(file))
    assert by_folder.keys() == by_file.keys()
    assert torch.equal(by_folder[Q].load(), by_file[Q].load())
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(
        ValueError, match=r"nothing says how B @ A of .*q_proj is scaled.*adapter_config\.json"
    ):
        weights(alone)


def test_names_of_adapters_in_keys_and_in_folders(llama, tmp_path):
    adapted = trained(fresh(llama), r=2, target_modules=["q_proj"])
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    adapted.save_pretrained(tmp_path)
    expected = by_name(weights(tmp_path))[Q].load()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    save_file(named, file)
    assert torch.equal(by_name(weights(tmp_path))[Q].load(), expected)
    more = {key.replace(".weight", ".b.weight"): tensor.clone() for key, tensor in tensors.items()}
    save_file(named | more, file)
    with pytest.raises(ValueError, match="several adapters, b, default"):
        weights(tmp_path)
    file.unlink()
    (tmp_path / "adapter_config.json").unlink()
    assert {w.name for w in weights(tmp_path)} == {
        Q.replace("q_proj", "v_proj").replace("0", str(i)) for i in (0, 1)
    }
    shutil.copytree(tmp_path / "other", tmp_path / "third")
    with pytest.raises(ValueError, match="several adapters, in other, third"):
        weights(tmp_path)


def test_of_a_whole_model_under_peft_the_base_is_read_as_from_the_live_one(llama, tmp_path):
    adapted = trained(fresh(llama), r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    state = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    found, live = by_name(weights(tmp_path)), by_name(weights(adapted))
    assert found.keys() == live.keys()
    assert all(torch.equal(found[name].load(), live[name].load()) for name in live)


def test_experts_adapted_as_parameters_are_left_out_with_a_warning(tmp_path):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=3))
    trained(
        model,
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"left out model\.layers\.0\.mlp\.experts.*target_parameters"):
        found = by_name(weights(tmp_path))
    assert list(found) == [Q, Q.replace("0", "1")]
    with pytest.raises(ValueError, match=r"mlp\.experts is adapted through target_parameters"):
        weights(tmp_path, "experts")


@pytest.mark.parametrize(
    ("tensors", "config", "header"),
    [
        ({"l.lora_down.weight": A, "l.lora_up.weight": B, "l.alpha": torch.tensor(8.0)}, None, None),
        ({"l.lora.down.weight": A, "l.lora.up.weight": B, "l.alpha": torch.tensor(8.0)}, None, None),
        (
            {
                "l.lora_down.weight": A.reshape(4, 8, 2, 2),
                "l.lora_up.weight": B.reshape(16, 4, 1, 1),
                "l.alpha": torch.tensor([8.0]),
            },
            None,
            None,
        ),
        (
            {"unet.l.lora_A.weight": A, "unet.l.lora_B.weight": B},
            None,
            {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})},
        ),
        ({"l.lora_a": A.T, "l.lora_b": B.T}, {"lora_parameters": {"rank": 4, "scale": 2.0}}, None),
    ],
    ids=["kohya", "old diffusers", "kohya's convolutions", "diffusers", "mlx"],
)
def test_other_programs_adapters_are_scaled_as_they_say(tmp_path, tensors, config, header):
    path = tmp_path / "adapters.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (found,) = weights(path)
    torch.testing.assert_close(found.load(), 2.0 * B @ A)


PAIR = {"l.lora_down.weight": A, "l.lora_up.weight": B}
ALPHA = {"l.alpha": torch.tensor(8.0)}


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (PAIR, None, "nothing says how B @ A of l is scaled"),
        (PAIR | ALPHA | {"l.dora_scale": torch.ones(16, 1)}, None, r"^l is adapted by more .*dora_scale"),
        (PAIR | ALPHA | {"l.lora_mid.weight": torch.ones(4, 4, 3, 3)}, None, "by more than B @ A.*lora_mid"),
        ({"l.lora_down.weight": A} | ALPHA, None, r"lora_down\.weight has no partner"),
        (PAIR | {"l.alpha": torch.tensor(float("nan"))}, None, "gives no scaling of l: nan"),
        (PAIR | ALPHA, {"ss_network_args": '{"rs_lora": "True"}'}, "rank-stabilized"),
        ({"l.hada_w1_a": B, "l.hada_w1_b": A} | ALPHA, None, "without LoRA's factors.*hada_w1_a"),
        ({"l.lokr_w1": A, "l.lokr_w1_a": A, "l.lokr_w2": B}, None, "without LoRA's factors.*lokr_w1"),
        ({"base_model.model.l.oft_R.weight": A}, None, "without LoRA's factors.*oft_R"),
        ({"lora_unet_l.a1.weight": A, "lora_unet_l.b1.weight": B}, None, "without LoRA's factors.*a1"),
        ({"lycoris_l.weight": B, "lycoris_l.on_input": A}, None, "without LoRA's factors"),
        ({"l.adapter.linear_in.weight": A, "l.adapter.linear_out.weight": B}, None, "nothing says how B @ A"),
        ({"l.processor.qkv_lora1.down.weight": A, "l.processor.qkv_lora1.up.weight": B}, None, "is scaled"),
    ],
)
def test_factors_are_never_listed_as_weights(tmp_path: Path, tensors, header, message):
    path = tmp_path / "x.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=header)
    with pytest.raises(ValueError, match=message):
        weights(path)


def test_a_loha_file_is_refused_without_its_config(llama, tmp_path):
    get_peft_model(fresh(llama), LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert len(weights(tmp_path / "adapter_model.safetensors")) == len(weights(tmp_path)) > 0
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="nothing says how"):
        weights(tmp_path)


def test_an_adapter_of_embeddings_is_the_same_by_its_file(llama, tmp_path):
    """PEFT writes the base of an adapted embedding along."""
    for place, targets in (("some", ["embed_tokens", "q_proj"]), ("only", ["embed_tokens"])):
        adapted = trained(fresh(llama), r=2, lora_alpha=6, target_modules=targets)
        adapted.save_pretrained(tmp_path / place)
        file = tmp_path / place / "adapter_model.safetensors"
        assert any("embed_tokens.base_layer" in key for key in load_file(file))
        by_folder = by_name(weights(tmp_path / place, targets))
        by_file = by_name(weights(file, targets))
        assert by_folder.keys() == by_file.keys() and len(by_file) == (3 if place == "some" else 1)
        assert all(torch.equal(by_folder[name].load(), by_file[name].load()) for name in by_file)


def test_a_single_expert_adapted_as_a_parameter_is_no_layer(tmp_path):
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, num_local_experts=1, num_experts_per_tok=1)
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.v_proj.weight"]
    adapted = trained(model, r=2, target_modules=["q_proj"], target_parameters=parameters)
    adapted.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.warns(UserWarning, match=r"left out model\.layers\.0\.mlp\.experts.*target_parameters"):
            found = weights(source)
        assert {w.name.rpartition(".")[2] for w in found} == {"q_proj", "v_proj"}


def test_an_embedding_of_mlx_is_as_the_model_has_it(tmp_path):
    a, b = torch.randn(12, 4), torch.randn(4, 12)
    save_file({"embed_tokens.lora_a": a, "embed_tokens.lora_b": b}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"rank": 4, "scale": 2.0}}')
    (found,) = weights(tmp_path)
    torch.testing.assert_close(found.load(), 2.0 * a @ b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"lora_alpha": True}, "lora_alpha must be"), ({"use_rslora": "false"}, "use_rslora must be True or")],
)
def test_settings_of_another_type_are_not_guessed_at(llama, tmp_path, wrong, message):
    trained(fresh(llama), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
    with pytest.raises(ValueError, match=f"gives no scaling of .*{message}"):
        weights(tmp_path)


@pytest.mark.parametrize("what", ["hada_w1_a", "lokr_w1", "diff"])
def test_layers_adapted_otherwise_are_not_left_out_beside_pairs(tmp_path, what):
    path = tmp_path / "x.safetensors"
    save_file(PAIR | ALPHA | {f"m.{what}": B.clone(), "norm.w_norm": B[0].clone()}, path)
    with pytest.raises(ValueError, match=rf"^m is adapted by other than B @ A \({what}\)"):
        weights(path)
    assert [w.name for w in weights(path, "l")] == ["l"]


def test_the_output_of_torch_s_attention_is_left_out_because_peft_applies_its_update_twice(tmp_path):
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    adapted = trained(base, r=2, lora_alpha=6, target_modules=["attn"])
    adapted.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.warns(UserWarning, match=r"left out attn\.out_proj: .* PEFT applies twice"):
            (update,) = weights(source)
        with pytest.raises(ValueError, match=r"^attn\.out_proj is the output of nn\.MultiheadAttention"):
            weights(source, "out_proj")
    change = adapted.merge_and_unload()["attn"].in_proj_weight - before["attn.in_proj_weight"]
    assert update.name == "attn"
    torch.testing.assert_close(update.load(), change, rtol=1e-4, atol=1e-5)
