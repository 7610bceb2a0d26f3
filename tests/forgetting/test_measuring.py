from __future__ import annotations

import copy
import json

import pytest
import torch
from explored import narrow_vit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from small_language import byte_tokenizer, part_of, small
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import lora_lens as ll


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return narrow_vit(0)


@pytest.fixture(scope="module")
def clothes(source) -> ll.Task:
    return source.first(64, 60)


def moved(adapted: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapted


def scores(measured: ll.forgetting.Measured) -> list[float]:
    return measured.table.drop(columns="task").to_numpy().ravel().tolist()


@pytest.mark.parametrize("method", [ll.Window(rank=4, start=0), ll.LoRA(4)], ids=str)
def test_all_forms_of_one_trained_model_measure_the_same(narrow, clothes, method, tmp_path):
    start = ll.attach(narrow, method)
    ll.save(start, tmp_path / "start")
    adapted = moved(start)
    adapted.save_pretrained(tmp_path / "checkpoint-3")
    ll.save(adapted, tmp_path / "saved")
    ll.export(adapted, tmp_path / "exported")
    merged = copy.deepcopy(adapted).merge_and_unload()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    save_file(narrow.state_dict(), tmp_path / "pretrained.safetensors")

    reference = ll.measure(narrow, adapted, clothes)
    before, after = ll.evaluate(narrow, clothes), ll.evaluate(adapted, clothes)
    assert scores(reference) == [
        before.accuracy, after.accuracy, before.accuracy - after.accuracy,
        before.loss, after.loss, after.loss - before.loss,
    ]  # fmt: skip
    weights, now = narrow.state_dict(), merged.state_dict()
    for row in reference.drift.itertuples():
        old, new = weights[f"{row.layer}.weight"].double(), now[f"{row.layer}.weight"].double()
        assert row.norm == pytest.approx(float(old.norm()), rel=1e-5)
        assert row.update == pytest.approx(float((new - old).norm()), rel=1e-3)
    forms = [
        (narrow, merged, {}),
        (narrow, tmp_path / "saved", {}),
        (narrow, tmp_path / "exported", {}),
        (narrow, PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "exported"), {}),
        (narrow, tmp_path / "checkpoint-3", {"start": tmp_path / "start"}),
        (narrow, tmp_path / "merged.safetensors", {}),
        (tmp_path / "pretrained.safetensors", str(tmp_path / "merged.safetensors"), {"like": narrow}),
    ]
    for old, new, options in forms:
        found = ll.measure(old, new, [clothes], **options)
        assert scores(found) == pytest.approx(scores(reference), abs=1e-5)
        shared = found.drift.set_index("layer").loc[reference.drift["layer"], "update"]
        assert shared.tolist() == pytest.approx(reference.drift["update"].tolist(), rel=1e-3)
        assert found.relative == pytest.approx(reference.relative, rel=1e-3)
    spectra = ll.spectra(narrow, progress=False)
    for new in (adapted, merged):
        assert {"inside", "diagonal"} <= set(ll.measure(narrow, new, clothes, spectra=spectra).drift)


def test_language_models_are_measured_from_folders(tmp_path):
    model, retain = (
        small("llama"),
        ll.tasks.language_task(part_of("movies", 20, 20), byte_tokenizer(), block=16),
    )
    adapted = moved(ll.attach(model, ll.Window.middle(4)))
    model.save_pretrained(tmp_path / "pretrained")
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(tmp_path / "merged")
    found = ll.measure(tmp_path / "pretrained", tmp_path / "merged", retain)
    rise = ll.evaluate(adapted, retain).loss - ll.evaluate(model, retain).loss
    assert found.table["loss_rise"].iloc[0] == pytest.approx(rise, abs=1e-4) and rise != 0


def test_what_would_measure_against_the_wrong_model_is_refused(narrow, clothes, tmp_path):
    adapted = moved(ll.attach(narrow, ll.Window.first(4)))
    adapted.save_pretrained(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="this model is adapted already"):
        ll.measure(adapted, narrow, clothes)
    with pytest.raises(ValueError, match="is not the one that this adapter was made for"):
        ll.measure(narrow_vit(1), adapted, clothes)
    with pytest.raises(
        ValueError, match=r"init_lora_weights=False: its base may hold a residual.*ll\.save wrote"
    ):
        ll.measure(narrow, tmp_path / "checkpoint-3", clothes)
    with pytest.raises(ValueError, match="holds an adapter, and before must be a whole model"):
        ll.measure(tmp_path / "checkpoint-3", narrow, clothes)
    known = ll.tasks.agreement(narrow, clothes.test.inputs)
    with pytest.raises(ValueError, match="this model is adapted already"):
        ll.measure(narrow, adapted.get_base_model(), known)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="is disabled: call enable"):
        ll.measure(narrow, adapted, clothes)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="is merged into its base"):
        ll.measure(narrow, adapted, clothes)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        ll.measure(narrow, tmp_path / "nothing", clothes)
    with pytest.raises(ValueError, match=r"neither config\.json"):
        ll.measure(narrow, tmp_path, clothes)
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is of another model: "):
        ll.measure(narrow, tmp_path / "other.safetensors", clothes)
    with pytest.raises(ValueError, match="pass like="):
        ll.measure(tmp_path / "other.safetensors", narrow, clothes)
    with pytest.raises(TypeError, match="each of retain must be a task"):
        ll.measure(narrow, narrow, ["clothes"])
    with pytest.raises(ValueError, match="retain is empty"):
        ll.measure(narrow, narrow, [])
    with pytest.raises(TypeError, match=r"retain must be a task.*ll\.tasks\.agreement"):
        ll.measure(narrow, narrow, None)
    with pytest.raises(TypeError, match="after must be a model, or the path of one"):
        ll.measure(narrow, None, clothes)
    with pytest.raises(ValueError, match=r"only \d+% of the answers that agreement retains"):
        ll.measure(narrow, narrow, ll.tasks.agreement(narrow_vit(1), clothes.test.inputs))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Trainer"]}))
    with pytest.raises(ValueError, match="names Trainer, which is no model of transformers"):
        ll.measure(tmp_path, narrow, clothes)


def test_an_adapters_folder_leaves_the_pretrained_model_as_it_is(narrow, clothes, tmp_path):
    """PEFT would take OLoRA's start from the shared weights, and put a stored embedding into them."""
    weights = copy.deepcopy(narrow.state_dict())
    settings = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights="olora")
    get_peft_model(copy.deepcopy(narrow), settings).save_pretrained(tmp_path / "olora")
    with pytest.raises(ValueError, match="init_lora_weights='olora'"):
        ll.measure(narrow, tmp_path / "olora", clothes)
    assert all(torch.equal(now, weights[name]) for name, now in narrow.state_dict().items())

    model, tokenizer = small("llama"), byte_tokenizer()
    texts = part_of("movies", 4, 4).test.texts
    known = ll.tasks.agreement(model, list(texts), tokenizer=tokenizer)
    trained = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        trained.get_input_embeddings().weight.neg_()
    trained.save_pretrained(tmp_path / "embedding", save_embedding_layers=True)
    expected, embedding = ll.evaluate(trained, known), model.get_input_embeddings().weight.clone()
    state = torch.get_rng_state()
    measured = ll.measure(model, tmp_path / "embedding", known)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert measured.table.loc[0, ["before", "after"]].tolist() == [1.0, expected.accuracy]
    assert expected.accuracy < 0.9


@pytest.mark.parametrize("settings", ["[]", "{}", '{"peft_type": "NEWER"}', "{"])
def test_a_config_that_peft_does_not_know_is_refused(narrow, clothes, settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ll.errors.LoraLensError, match=r"_config\.json (is|holds) no|expected one LoRA"):
        ll.measure(narrow, tmp_path, clothes)


@pytest.mark.parametrize("kind", ["window", "PEFT's own"])
def test_growth_follows_a_trainers_checkpoints(narrow, clothes, kind, tmp_path):
    spectra = ll.spectra(narrow, progress=False)
    start = None
    if kind == "window":
        adapted, start = ll.attach(narrow, ll.Window.first(4)), tmp_path / "start"
        ll.save(adapted, start)
    else:
        adapted = get_peft_model(copy.deepcopy(narrow), LoraConfig(r=4, target_modules=["qkv", "fc1"]))
    reference = {}
    for step in (8, 100, 20):  # not in the order of their names
        moved(adapted, seed=step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        reference[step] = ll.measure(narrow, copy.deepcopy(adapted), clothes)
    table = ll.forgetting.growth(tmp_path / "run", narrow, clothes, start=start, spectra=spectra)
    assert table["step"].tolist() == [0, 8, 20, 100]
    assert table.iloc[0].drop(["step", "retained_accuracy"]).eq(0).all()
    for row in table.iloc[1:].itertuples():
        expected = reference[row.step]
        assert row.forgetting == expected.table["forgetting"].iloc[0]
        assert row.loss_rise == pytest.approx(expected.table["loss_rise"].iloc[0], abs=1e-5)
        assert row.relative == pytest.approx(expected.relative, rel=1e-4)
        assert 0 < row.rotation <= row.relative
        of_layers = table.layers[table.layers["step"] == row.step]
        assert of_layers["layer"].tolist() == expected.drift["layer"].tolist()
        assert of_layers["update"].tolist() == pytest.approx(expected.drift["update"].tolist(), rel=1e-4)
    inside = table.layers["inside"].notna()
    assert inside.all() if kind == "window" else not inside.any()
    short = ll.forgetting.growth(tmp_path / "run", narrow, start=start)
    assert list(short) == ["step", "update", "relative"]
    assert list(short.layers) == ["layer", "block", "kind", "update", "norm", "relative", "step"]
    assert not hasattr(table.iloc[:2], "layers")  # of some checkpoints they would be those of all
    assert ll.plots.growth(table, "forgetting").lines[0].get_ydata().tolist() == table["forgetting"].tolist()
    with pytest.raises(ValueError, match="no column forgetting"):
        ll.plots.growth(short, "forgetting")


def test_folders_that_are_no_trainers_are_refused(narrow, tmp_path):
    with pytest.raises(ValueError, match="holds no folder checkpoint-<step>"):
        ll.forgetting.growth(tmp_path, narrow)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ll.forgetting.growth(tmp_path / "nothing", narrow)
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-5 holds no adapter_config\.json"):
        ll.forgetting.growth(tmp_path, narrow)
    other = ll.attach(narrow_vit(0), ll.LoRA(4), targets="qkv")
    other.save_pretrained(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="holds an adapter of another model"):
        ll.forgetting.growth(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    wider = VisionTransformer(img_size=28, patch_size=14, in_chans=1, embed_dim=64, depth=2, num_heads=2)
    with pytest.raises(ValueError, match=r"of another model: .*size mismatch for .*qkv"):
        ll.forgetting.growth(tmp_path, wider)
    file = tmp_path / "checkpoint-5" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"checkpoint-5/adapter_model\.safetensors is truncated"):
        ll.forgetting.growth(tmp_path, narrow)


def test_growth_of_another_models_own_answers_is_refused(narrow, clothes, tmp_path):
    ll.attach(narrow, ll.LoRA(4)).save_pretrained(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="so they are another model's"):
        ll.forgetting.growth(tmp_path, narrow, ll.tasks.agreement(narrow_vit(1), clothes.test.inputs))
