from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import BertModel

import lora_lens as ll
from lora_lens.tasks.bundled import vision_architecture


def trained(adapted: nn.Module, seed: int = 0) -> nn.Module:
    """As after some training: every trainable number has moved visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return adapted


@pytest.fixture
def inputs(source) -> torch.Tensor:
    return source.test.inputs[:64]


METHODS = {
    "window": (ll.Window.middle(8), {}),
    "scaled": (ll.Window.first(8), {"alpha": 32}),
    "rslora": (ll.Window.last(8), {"variant": ll.Variant(rslora=True)}),
    "dora": (ll.Window.middle(8), {"variant": ll.Variant(dora=True)}),
    "only A": (ll.Window.last(8), {"variant": ll.Variant(split="A", train="A")}),
    "only B": (ll.Window.last(8), {"variant": ll.Variant(split="B", train="B")}),
    "per kind": ({"all-attention": ll.Window.middle(8), "all-mlp": ll.Window.last(2)}, {}),
    "LoRA": (ll.LoRA(8), {}),
}


@pytest.fixture(params=METHODS, ids=str)
def adapted(request, model, spectra) -> PeftModel:
    method, settings = METHODS[request.param]
    return trained(ll.attach(model, method, spectra=spectra, **settings))


def test_an_export_gives_plain_peft_the_trained_function_of_the_original(adapted, model, inputs, tmp_path):
    assert ll.function_error(adapted, model, inputs) > 1e-2
    table = ll.export(adapted, tmp_path / "lora")
    assert {f.name for f in (tmp_path / "lora").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lens.json",
    }
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert ll.function_error(loaded, adapted, inputs) < 1e-5
    assert (table["lost"] == 0).all()
    both = adapted.attachment.starts and adapted.attachment.variant.train == "both"
    ranks = ll.summary(adapted)["rank"] * (2 if both else 1)
    assert table["rank"].tolist() == ranks.tolist()
    merged = loaded.merge_and_unload()
    assert ll.function_error(merged, adapted, inputs) < 1e-5


def test_what_was_saved_goes_on_where_it_was(adapted, model, inputs, tmp_path):
    ll.save(adapted, tmp_path / "a")
    again = ll.load(model, tmp_path / "a")
    assert ll.function_error(again, adapted, inputs) == 0
    assert dict(again.attachment.starts).keys() == adapted.attachment.starts.keys()
    assert again.attachment.method == adapted.attachment.method
    assert again.attachment.variant == adapted.attachment.variant
    wanted = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == wanted
    for (name, a), (_, b) in zip(adapted.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    onward = [trained(copy.deepcopy(m), seed=1) for m in (adapted, again)]
    assert ll.function_error(*onward, inputs) == 0
    assert all(
        torch.equal(p, q) for p, q in zip(ll.detach(again).parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("power", [0.5, 1])
def test_a_window_in_a_metric_starts_exactly_and_travels_as_others_do(power, model, source, inputs, tmp_path):
    metric = ll.spectrum.Metric(source, power=power, examples=30)
    spectra = ll.spectra(model, "all-mlp", metric=metric, progress=False)
    start = ll.attach(model, ll.Window.last(8), spectra=spectra)
    assert ll.function_error(start, model, inputs) < 1e-5
    assert start.attachment.method == f"window of rank 8 at position 1 in the {metric}"
    assert ll.summary(start)["first"].isna().all() and (ll.summary(start)["start_error"] < 1e-6).all()
    adapted = trained(start)
    assert ll.function_error(adapted, model, inputs) > 1e-3

    ll.save(adapted, tmp_path / "saved")
    loaded = ll.load(model, tmp_path / "saved")
    assert ll.function_error(loaded, adapted, inputs) == 0
    assert loaded.attachment.method == adapted.attachment.method
    ll.export(adapted, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert ll.function_error(plain, adapted, inputs) < 1e-5
    again = ll.detach(adapted)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_peft_does_not_take_a_saved_window_for_an_adapter_of_the_original(model, spectra, tmp_path):
    ll.save(ll.attach(model, ll.Window.middle(8), spectra=spectra), tmp_path / "a")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")


def test_an_export_is_loaded_with_its_base_checked(adapted, model, inputs, tmp_path):
    ll.export(adapted, tmp_path / "lora")
    assert ll.function_error(ll.load(model, tmp_path / "lora"), adapted, inputs) < 1e-5


def test_truncation_loses_what_it_says(model, spectra, inputs, tmp_path):
    adapted = trained(ll.attach(model, ll.Window.middle(8), spectra=spectra))
    lost, errors = [], []
    for rank in (16, 12, 8, 4):
        table = ll.export(adapted, tmp_path / str(rank), rank=rank)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / str(rank))
        assert set(table["rank"]) == {rank}
        row = table.iloc[0]
        layer = adapted.get_base_model().get_submodule(row["layer"])
        now = layer.get_base_layer().weight + layer.get_delta_weight("default")
        update = (now - model.get_submodule(row["layer"]).weight).detach().double()
        values = torch.linalg.svdvals(update)
        assert row["update"] == pytest.approx(float(values.norm()), rel=1e-4)
        assert row["lost"] == pytest.approx(float((values[rank:].norm() / values.norm()) ** 2), abs=1e-6)
        kept = loaded.get_base_model().get_submodule(row["layer"]).get_delta_weight("default").detach()
        left_out = torch.linalg.norm(update - kept) / torch.linalg.norm(update)
        assert float(left_out**2) == pytest.approx(row["lost"], abs=1e-6)
        lost.append(table["lost"].max())
        errors.append(ll.function_error(loaded, adapted, inputs))
    assert lost == sorted(lost) and lost[0] == 0 and lost[-1] > 0.1
    assert errors == sorted(errors) and errors[0] < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_residual_base_and_step_zero_adapter_are_the_pretrained_function(
    dora, model, spectra, inputs, tmp_path
):
    method = {"all-attention": ll.Window.first(8), "all-mlp": ll.Window.middle(4)}
    adapted = trained(ll.attach(model, method, spectra=spectra, alpha=12, variant=ll.Variant(dora=dora)))
    ll.export_residual(adapted, tmp_path / "both")
    base = vision_architecture().eval()
    load_model(base, tmp_path / "both" / "base" / "model.safetensors")
    assert ll.function_error(base, model, inputs) > 1e-2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / "adapter", is_trainable=True)
    assert ll.function_error(theirs, model, inputs) < 1e-5
    assert any(p.requires_grad for p in theirs.parameters())
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv.weight is not the one that this adapter was made"
    ):
        ll.load(model, tmp_path / "both" / "adapter")
    assert ll.function_error(ll.load(base, tmp_path / "both" / "adapter"), model, inputs) < 1e-5
    assert ll.function_error(adapted, model, inputs) > 1e-2  # it was only read


def test_a_transformers_model_goes_through_from_pretrained(tmp_path):
    encoder = ll.tasks.bundled.minilm()
    ids = {"input_ids": torch.arange(1000, 1024).view(2, 12)}
    adapted = trained(ll.attach(encoder, ll.Window.middle(8), targets=["query", "value"]))
    ll.export(adapted, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(encoder), tmp_path / "lora")
    assert ll.function_error(loaded, adapted, ids) < 1e-5
    ll.export_residual(adapted, tmp_path / "both")
    base = BertModel.from_pretrained(tmp_path / "both" / "base").eval()
    start = PeftModel.from_pretrained(base, tmp_path / "both" / "adapter")
    assert ll.function_error(start, encoder, ids) < 1e-5


def test_several_exports_live_on_one_base_without_harm(model, spectra, inputs, tmp_path):
    both = [trained(ll.attach(model, w, spectra=spectra), seed=i) for i, w in enumerate(ll.windows(8, 2))]
    for i, adapted in enumerate(both):
        ll.export(adapted, tmp_path / str(i))
    host = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "0", adapter_name="0")
    host.load_adapter(tmp_path / "1", adapter_name="1")
    for i in (0, 1, 0):
        host.set_adapter(str(i))
        assert ll.function_error(host, both[i], inputs) < 1e-5
    with host.disable_adapter():
        assert ll.function_error(host, model, inputs) == 0
    bare = host.unload()
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))


def test_modules_trained_in_full_travel_with_the_adapter(model, spectra, inputs, tmp_path):
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra, modules_to_save=["head"])
    assert "head" not in adapted.attachment.starts
    trained(adapted)
    ll.export(adapted, tmp_path / "lora")
    assert (
        ll.function_error(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora"), adapted, inputs)
        < 1e-5
    )
    ll.save(adapted, tmp_path / "a")
    assert ll.function_error(ll.load(model, tmp_path / "a"), adapted, inputs) == 0
    ll.export_residual(adapted, tmp_path / "both")
    base = vision_architecture().eval()
    load_model(base, tmp_path / "both" / "base" / "model.safetensors")
    start = PeftModel.from_pretrained(base, tmp_path / "both" / "adapter")
    assert ll.function_error(start, model, inputs) < 1e-5
    bare = ll.detach(adapted)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="modules_to_save names 'score', and VisionTransformer has no such"):
        ll.attach(model, ll.Window.middle(4), spectra=spectra, modules_to_save=["score"])


def test_a_trainer_s_checkpoint_is_picked_up(model, spectra, inputs, tmp_path):
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    ll.save(adapted, tmp_path / "window")
    trained(adapted).save_pretrained(tmp_path / "checkpoint-10")
    again = ll.load(model, tmp_path / "window", checkpoint=tmp_path / "checkpoint-10")
    assert ll.function_error(again, adapted, inputs) == 0
    other = trained(ll.attach(model, ll.Window.middle(8), spectra=spectra))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained with r=8, and the adapter that was saved has 4"):
        ll.load(model, tmp_path / "window", checkpoint=tmp_path / "other")


def test_in_place_and_back_with_the_original_s_file(model, spectra, inputs, tmp_path):
    mine = copy.deepcopy(model)
    ll.save(trained(ll.attach(model, ll.Window.middle(4), spectra=spectra)), tmp_path / "a")
    adapted = ll.load(mine, tmp_path / "a", inplace=True)
    assert adapted.get_base_model() is mine
    with pytest.raises(
        ValueError, match="was not kept, because the model was adapted in place; pass original="
    ):
        ll.detach(adapted)
    save_model(model, str(tmp_path / "original.safetensors"))
    assert ll.detach(adapted, original=tmp_path / "original.safetensors") is mine
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), model.parameters(), strict=True))


def test_an_adapter_for_another_base_is_refused(model, spectra, tmp_path):
    adapted = trained(ll.attach(model, ll.Window.middle(4), spectra=spectra))
    ll.save(adapted, tmp_path / "a")
    ll.export(adapted, tmp_path / "lora")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[2].mlp.fc1.weight[0, 0] += 1e-3
    before = copy.deepcopy(other.state_dict())
    for folder in ("a", "lora"):
        with pytest.raises(ValueError, match=r"blocks.2.mlp.fc1.weight is not the one.*their hashes differ"):
            ll.load(other, tmp_path / folder, inplace=True)
        with pytest.raises(ValueError, match="here bfloat16"):
            ll.load(copy.deepcopy(model).bfloat16(), tmp_path / folder)
        with pytest.raises(
            ValueError, match=r"BertModel is not the model that was adapted.*matches no weight"
        ):
            ll.load(ll.tasks.bundled.minilm(), tmp_path / folder)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(ValueError, match="is not the one that this adapter was made for"):
        ll.detach(adapted, original=other)
    with pytest.raises(ValueError, match="this model is adapted already"):
        ll.load(ll.attach(model, ll.LoRA(2)), tmp_path / "lora")
    assert len(ll.summary(adapted)) == 24  # still adapted


def test_damaged_and_foreign_folders_are_refused(model, spectra, tmp_path):
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    ll.save(adapted, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        ll.load(model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no lora_lens.json.*PeftModel.from_pretrained"):
        ll.load(model, tmp_path)
    weights = tmp_path / "a" / "on_residual" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or malformed"):
        ll.load(model, tmp_path / "a")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks on_residual/adapter_model.safetensors"):
        ll.load(model, tmp_path / "a")
    weights.write_bytes(content)
    about = tmp_path / "a" / "lora_lens.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="has format 2, expected 1"):
        ll.load(model, tmp_path / "a")
    about.write_text('{"format": 1, "kind": "window"}')
    with pytest.raises(ValueError, match=r"lora_lens.json lacks method, variant, weights: save the adapter"):
        ll.load(model, tmp_path / "a")
    about.write_text("{}")
    with pytest.raises(ValueError, match=r"lora_lens.json lacks format, kind"):
        ll.load(model, tmp_path / "a")
    about.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        ll.load(model, tmp_path / "a")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(model, spectra, tmp_path):
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapter of blocks.0.attn.qkv is merged.*unmerge_adapter"):
        ll.export(adapted, tmp_path / "lora")
    adapted.unmerge_adapter()
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        ll.export(adapted, tmp_path / "lora", rank=0)
    with torch.no_grad():
        adapted.get_base_model().blocks[1].mlp.fc2.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"adapter of blocks.1.mlp.fc2 holds NaN.*diverged"):
        ll.export(adapted, tmp_path / "lora")
    with pytest.raises(
        ValueError, match=r"expected a model from ll.attach or ll.load, not VisionTransformer"
    ):
        ll.export(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="LoRA of rank 4 has no residual base"):
        ll.export_residual(ll.attach(model, ll.LoRA(4)), tmp_path / "both")
    assert list(tmp_path.iterdir()) == []
