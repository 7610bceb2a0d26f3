from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

import lora_lens as ll
from lora_lens.training import finetune

DATA = Path(__file__).parent.parent / "data"


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
    run = finetune(
        ll.attach(model, ll.LinearProbe()), source.subset(train=64, test=64), source,
        steps=1, evaluations=2, progress=False,
    )  # fmt: skip
    with safe_open(DATA / "vit_fashion_mnist.safetensors", "pt") as file:
        stated = float(file.metadata()["test_accuracy"])
    assert run.retained_accuracy >= 0.90
    assert run.retained_accuracy == pytest.approx(stated, abs=5e-4)
    assert f"{stated:.4f}" in (DATA / "vit_fashion_mnist.md").read_text()


def test_all_data_fit_in_40_megabytes():
    assert sum(f.stat().st_size for f in DATA.iterdir() if f.is_file()) < 40e6


def test_a_damaged_or_missing_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("digits.npz", "SHA256SUMS"):
        shutil.copy(DATA / name, folder)
    monkeypatch.setattr(ll.embedded, "PACKAGE", tmp_path)
    assert ll.embedded.digits().name == "digits"
    raw = bytearray((folder / "digits.npz").read_bytes())
    raw[5000] ^= 1
    (folder / "digits.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"digits.npz is damaged"):
        ll.embedded.digits()
    with pytest.raises(
        FileNotFoundError, match=r"fashion_mnist.npz is missing|vit_fashion_mnist.safetensors is missing"
    ):
        ll.embedded.vision()
