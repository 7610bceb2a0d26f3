"""The offset form: the base stays the pretrained weight, and the layer takes the start off."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from small_sequences import small_spectra, small_vit
from tiny_models import gpt2, llama
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers
from lora_lens.spectrum.quantized_layers import keep_trainable
from lora_lens.tasks.tokens import TokenExamples
from lora_lens.training.lean_forward import is_plain, lean_layers

OFFSET = ll.Variant(base="offset")
MIDDLE = ll.Window.middle(4)
IDS = {"input_ids": torch.randint(2, 32, (4, 8), generator=torch.Generator().manual_seed(1))}


def disturbed(adapted: PeftModel) -> PeftModel:
    """As after training; the same for the two forms of one model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
    return adapted


def gradients(adapted: nn.Module, inputs: object) -> dict[str, Tensor]:
    adapted.zero_grad()
    outputs = adapted(**inputs) if isinstance(inputs, dict) else adapted(inputs)
    getattr(outputs, "logits", outputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}


def both_forms(model: nn.Module, method: object = MIDDLE, **settings: object) -> tuple[PeftModel, PeftModel]:
    variants = [ll.Variant(base=base, **settings) for base in ("residual", "offset")]
    return tuple(disturbed(ll.attach(model, method, variant=variant)) for variant in variants)


# The function


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"train": "A", "split": "A"}, {"train": "B"}, {"dtype": torch.float64}],
    ids=str,
)
def test_the_gradients_are_those_over_the_residual(build, settings):
    residual, offset = both_forms(build().double().eval(), **settings)
    expected, found = gradients(residual, IDS), gradients(offset, IDS)
    assert all(bool(g.any()) for g in expected.values())
    # The residual form rounds its factors and its base to float64 and float32 at other places.
    exact = settings.get("dtype") == torch.float64
    torch.testing.assert_close(
        found, expected, rtol=1e-7 if exact else 1e-3, atol=1e-9 if exact else 1e-6, check_dtype=False
    )


def test_dropout_leaves_the_start_exact_in_training_mode_too(model, source):
    images = source.test.inputs[:4]
    adapted = ll.attach(model, ll.Window.first(8), variant=ll.Variant(base="offset", dropout=0.5)).train()
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        assert torch.equal(adapted(images), model(images))
        disturbed(adapted)
        assert not torch.equal(adapted(images), adapted(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_exact_when_the_model_is_cast_after_attach(dtype):
    model = llama()
    adapted = ll.attach(model, ll.Window.first(4), variant=OFFSET).to(dtype)
    assert ll.function_error(adapted, model.to(dtype), IDS) == 0


def test_autocast_starts_exactly(model, source):
    images = source.test.inputs[:4]
    adapted = ll.attach(model, ll.Window.first(8), variant=OFFSET)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(adapted(images), model(images))


def test_lean_layers_give_the_same_outputs_and_gradients(model, source):
    images = source.test.inputs[:4]
    _, adapted = both_forms(model)
    assert all(map(is_plain, lora_layers(adapted).values()))
    expected, outputs = gradients(adapted, images), adapted(images)
    with lean_layers(adapted, "float32"):
        found, lean = gradients(adapted, images), adapted(images)
        start = ll.attach(model, MIDDLE, variant=OFFSET)
    torch.testing.assert_close(lean, outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    with lean_layers(start, "float32"):
        assert ll.function_error(start, model, images) == 0


# The model


def test_no_adapted_weight_is_copied_and_none_changes(model, source):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = ll.attach(model, MIDDLE, variant=OFFSET)
    for name, layer in lora_layers(adapted).items():
        assert layer.get_base_layer().weight.data_ptr() == model.get_submodule(name).weight.data_ptr()
    disturbed(adapted).merge_adapter()
    assert ll.function_error(adapted, model, source.test.inputs[:4]) > 1e-2
    copy.deepcopy(adapted).merge_and_unload()
    adapted.unmerge_adapter()
    plain = ll.detach(adapted)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_merging_an_adapter_of_others_leaves_the_pretrained_model_alone(model):
    before = copy.deepcopy(model.state_dict())
    adapted = ll.attach(model, MIDDLE, variant=OFFSET)
    adapted.add_adapter("other", LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    adapted.merge_adapter(["other"])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_an_adapter_with_the_same_config_is_a_copy_and_another_one_an_ordinary_lora(model, source):
    images, adapted = source.test.inputs[:4], ll.attach(model, ll.Window.first(8), variant=OFFSET)
    adapted.add_adapter("ref", adapted.peft_config["default"])
    for name, p in list(adapted.named_parameters()):
        if ".default." in name:
            adapted.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    adapted.add_adapter("zero", LoraConfig(target_modules=["qkv", "fc1"]))
    disturbed(adapted)
    for name in ("ref", "zero"):
        adapted.set_adapter(name)
        assert ll.function_error(adapted, model, images) == 0
    adapted.set_adapter("default")
    assert ll.function_error(adapted, model, images) > 1e-2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_go_their_own_way(copied, model, source):
    images = source.test.inputs[:4]
    adapted = disturbed(ll.attach(model, MIDDLE, variant=OFFSET))
    again = copied(adapted)
    assert ll.function_error(again, adapted, images) == 0
    expected = again(images)
    disturbed(adapted)
    assert torch.equal(again(images), expected)
    again.merge_adapter()
    assert not any(layer.merged for layer in lora_layers(adapted).values())


def test_in_place_the_model_is_detached_without_the_original():
    model, original = gpt2(), gpt2()
    adapted = disturbed(ll.attach(model, MIDDLE, variant=OFFSET, inplace=True))
    assert set(ll.summary(adapted)["start_error"]) == {0.0}
    adapted.merge_adapter()
    plain = ll.detach(adapted)
    assert plain is model
    assert all(torch.equal(p, original.state_dict()[n]) for n, p in plain.state_dict().items())


def test_a_pretrained_model_that_was_trained_meanwhile_is_noticed(model):
    own = copy.deepcopy(model)
    adapted = ll.attach(own, MIDDLE, variant=OFFSET)
    with torch.no_grad():
        own.blocks[0].attn.qkv.weight.mul_(2)
    with pytest.raises(ValueError, match="the pretrained model was changed after attach"):
        ll.detach(adapted)


def test_a_layer_that_lost_its_start_is_refused(model, tmp_path):
    adapted = ll.attach(model, MIDDLE, variant=OFFSET)
    next(iter(lora_layers(adapted).values())).lora_variant.clear()
    with pytest.raises(ValueError, match=r"PEFT forgot the start of blocks.0.attn.qkv"):
        ll.save(adapted, tmp_path / "saved")


# What is measured and written


def test_drift_and_rotation_are_those_over_the_residual(model, spectra):
    residual, offset = both_forms(model)
    for measure in (ll.forgetting.drift, ll.forgetting.rotations):
        expected, found = measure(residual, spectra), measure(offset, spectra)
        for column in expected.select_dtypes("number"):
            assert found[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-3, abs=1e-5)


def test_the_summary_names_the_form(model):
    residual, offset = both_forms(model)
    one, other = ll.summary(residual), ll.summary(offset)
    assert set(one["base"]) == {"residual"} and set(other["base"]) == {"offset"}
    assert other["energy"].tolist() == pytest.approx(one["energy"].tolist(), rel=1e-3)
    assert set(other["start_error"]) == {0.0} and min(one["start_error"]) > 0
    assert ll.summary(ll.attach(model, ll.LoRA(4), variant=OFFSET))["base"].isna().all()


def test_the_residual_is_exported_from_either_form(model, tmp_path):
    for name, adapted in zip(("residual", "offset"), both_forms(model), strict=True):
        ll.export_residual(adapted, tmp_path / name)
    for part in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / name / part) for name in ("residual", "offset"))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_folder_tells_the_form_and_without_the_field_it_is_the_residual(model, tmp_path):
    residual, offset = both_forms(model)
    ll.save(residual, tmp_path / "residual")
    assert '"base"' not in (tmp_path / "residual" / "lora_lens.json").read_text()
    again = ll.load(model, tmp_path / "residual")
    assert set(ll.summary(again)["base"]) == {"residual"}
    ll.save(offset, tmp_path / "offset")
    assert set(ll.summary(ll.load(model, tmp_path / "offset"))["base"]) == {"offset"}
    updates = [{w.name: w.load() for w in ll.spectrum.weights(tmp_path / n)} for n in ("residual", "offset")]
    torch.testing.assert_close(updates[0], updates[1])


def test_what_peft_writes_goes_on_from_the_same_start_alone(model, source, tmp_path):
    adapted = ll.attach(model, MIDDLE, variant=OFFSET)
    ll.save(adapted, tmp_path / "start")
    disturbed(adapted).save_pretrained(tmp_path / "checkpoint")
    again = ll.load(model, tmp_path / "start", checkpoint=tmp_path / "checkpoint")
    assert ll.function_error(again, adapted, source.test.inputs[:4]) == 0
    ll.save(ll.attach(model, ll.Window.last(4), variant=OFFSET), tmp_path / "other")
    with pytest.raises(ValueError, match="started from other factors"):
        ll.load(model, tmp_path / "other", checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="offset form, whose update is not B A alone"):
        ll.spectra(tmp_path / "checkpoint", progress=False)


# Training


def test_a_start_that_a_checkpoint_brings_along_is_saved_with_it(model, source, tmp_path):
    first, last = (ll.attach(model, w, variant=OFFSET) for w in (ll.Window.first(4), ll.Window.last(4)))
    set_peft_model_state_dict(last, get_peft_model_state_dict(first))  # as a trainer that goes on
    images = source.test.inputs[:8]
    assert ll.function_error(last, model, images) == 0
    ll.save(last, tmp_path)
    assert ll.function_error(ll.load(model, tmp_path), model, images) < 1e-6


@pytest.mark.parametrize("fuse", [1, 2])
def test_a_sweep_gives_the_numbers_of_the_residual_alone_and_together(fuse, source, digits):
    tasks = {"task": digits.first(64, 20), "retain": source.first(50, 20)}
    settings = {"steps": 4, "batch_size": 16, "evaluations": 2, "progress": False}
    settings |= {"model": small_vit(), "spectra": small_spectra(), "fuse": fuse, "jobs": 1}
    grid = ll.Grid([ll.Window.first(4), ll.LoRA(4)], lr=[1e-2])
    residual, offset = (
        ll.sweep(grid, **tasks, variant=ll.Variant(base=base), **settings).table
        for base in ("residual", "offset")
    )
    assert set(offset["variant"]) == {"offset base"}
    numbers = [c for c in residual.select_dtypes("float") if "second" not in c]
    assert {"accuracy", "forgetting"} <= set(numbers)
    for column in numbers:
        expected = pytest.approx(residual[column].tolist(), rel=1e-3, abs=1e-3, nan_ok=True)
        assert offset[column].tolist() == expected, column


# Where the base must not change


def test_a_tied_weight_gets_a_window_and_its_other_layer_none(tmp_path):
    model = gpt2().eval()
    adapted = ll.attach(model, MIDDLE, targets=["lm_head", "c_attn"])
    forms = ll.summary(adapted).set_index("layer")["base"]
    assert forms["lm_head"] == "offset" and set(forms.drop("lm_head")) == {"residual"}  # both in one model
    assert ll.function_error(adapted, model, IDS) < 1e-5
    disturbed(adapted)
    assert torch.equal(adapted.get_base_model().transformer.wte.weight, model.transformer.wte.weight)
    ll.save(adapted, tmp_path / "saved")
    again = ll.load(model, tmp_path / "saved")
    assert ll.function_error(again, adapted, IDS) == 0
    assert ll.summary(again)["base"].tolist() == ll.summary(adapted)["base"].tolist()
    ll.export(adapted, tmp_path / "exported")
    elsewhere = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    assert ll.function_error(elsewhere, adapted, IDS) < 1e-5
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert ll.function_error(merged, adapted, IDS) < 1e-5
    with pytest.raises(ValueError, match=r"lm_head shares its weight with .*so it has no residual"):
        ll.export_residual(adapted, tmp_path / "residual")
    assert "lm_head" not in ll.summary(ll.attach(model, MIDDLE))["layer"].tolist()


@pytest.mark.parametrize("method", [ll.PeftMethod("pissa", 4), ll.PeftMethod(LoraConfig(r=4))], ids=str)
def test_what_peft_builds_leaves_shared_weights_alone(method):
    with pytest.raises(ValueError, match=r"does not fit lm_head, which shares its weight"):
        ll.attach(gpt2(), method, targets="lm_head")


def test_impossible_variants_are_refused():
    with pytest.raises(ValueError, match="DoRA has no offset form"):
        ll.Variant(base="offset", dora=True)
    with pytest.raises(ValueError, match="base must be"):
        ll.Variant(base="both")
    with pytest.raises(ValueError, match=r"lm_head shares its weight .* leave dora out"):
        ll.attach(gpt2(), MIDDLE, targets="lm_head", variant=ll.Variant(dora=True))


def torchao(kind: str) -> Callable[[], object]:
    def config() -> object:
        import torchao.quantization as quantization

        settings = {"weight_dtype": torch.int4} if kind == "IntxWeightOnlyConfig" else {}
        return TorchAoConfig(getattr(quantization, kind)(**settings))

    return config


def bitsandbytes(**settings: object) -> Callable[[], object]:
    return lambda: BitsAndBytesConfig(**settings)


KINDS = {
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_quantized_weights_trains_and_is_exported_for_them(checkpoint, kind, tmp_path):
    pytest.importorskip(kind.split()[0])

    def load() -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(
            checkpoint, quantization_config=KINDS[kind](), device_map="cpu", dtype=torch.float32
        ).eval()
        keep_trainable(model.modules())  # or some CPUs round the scales of 4 bits in its first evaluation
        return model

    model, plain = load(), LlamaForCausalLM.from_pretrained(checkpoint)
    spectra = ll.spectra(model, progress=False)
    for one, other in zip(spectra.values(), ll.spectra(plain, progress=False).values(), strict=True):
        assert one.shape == other.shape
        off = float((one.singular_values - other.singular_values).norm() / other.singular_values.norm())
        assert 1e-4 < off < (0.02 if "int8" in kind else 0.2)
    adapted = ll.attach(model, ll.Window.first(4), spectra=spectra)
    assert set(ll.summary(adapted)["base"]) == {"offset"}
    assert ll.function_error(adapted, model, IDS) == 0
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.5)
    losses = []
    for _ in range(3):  # evaluated on the way, as in any run
        loss = adapted.train()(**IDS, labels=IDS["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(p.grad.any()) for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss))
        with torch.no_grad():
            adapted.eval()(**IDS)
    assert losses[0] > losses[1] > losses[2]
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(load(), tmp_path / "saved"), adapted, IDS) == 0
    ll.export(adapted, tmp_path / "exported")
    elsewhere = PeftModel.from_pretrained(load(), tmp_path / "exported")
    assert ll.function_error(elsewhere, adapted, IDS) < 1e-5
    assert 0 < ll.forgetting.drift(adapted, spectra)["relative"].max() < 0.2
    tokens = TokenExamples(torch.arange(12) % 32, torch.full((2,), 6), torch.zeros(2, dtype=torch.int64))
    measured = ll.measure(load(), tmp_path / "exported", ll.tasks.agreement(load(), tokens))
    assert measured.table.loc[0, "before"] == 1 and measured.table.loc[0, "loss_rise"] > 0
    with pytest.raises(ValueError, match=r"is quantized .* so it has no residual"):
        ll.export_residual(adapted, tmp_path / "residual")

    expected = adapted(**IDS).logits
    merged = copy.deepcopy(adapted)
    merged.merge_adapter()
    assert ll.function_error(merged, adapted, IDS) < (0.1 if "int8" in kind else 0.4)
    merged.unmerge_adapter()
    assert torch.equal(merged(**IDS).logits, expected)
    assert ll.function_error(ll.detach(adapted), model, IDS) == 0


def test_a_4_bit_weight_that_was_packed_to_evaluate_it_is_read_and_trained_like_any_other():
    """bitsandbytes packs on CPUs with AVX512-BF16 alone; what it packs can be had on any."""
    nn_of = pytest.importorskip("bitsandbytes").nn
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    layer = nn_of.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), layer, nn.Linear(128, 2)).eval()
    expected = ll.spectra(model, "2", progress=False)["2"].singular_values
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    found = ll.spectra(model, "2", progress=False)["2"].singular_values
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-3)  # packing rounds the scales

    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    layer.support_avx512bf16_for_cpu = True
    adapted = ll.attach(model, MIDDLE, targets=["0", "2"], inplace=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        adapted.eval()(x)
    assert all(bool(g.any()) for g in gradients(adapted.train(), x).values())


def test_a_quantized_layer_that_peft_takes_for_a_plain_one_trains_but_is_not_merged():
    nn_of = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    layer = nn_of.Linear8bitLt(64, 128, has_fp16_weights=False).to("cpu")
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(128, 2)).eval()
    adapted = ll.attach(model, MIDDLE, targets=["0"])
    x = torch.randn(3, 64)
    assert ll.function_error(adapted, model, x) == 0
    assert all(bool(g.any()) for g in gradients(adapted, x).values())
    with pytest.raises(ValueError, match="is_loaded_in_8bit"):
        adapted.merge_adapter()
    assert isinstance(adapted.get_base_model()[0], LoraLayer)
