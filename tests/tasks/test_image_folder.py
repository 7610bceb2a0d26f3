from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lora_lens as ll
from lora_lens.tasks.image_folder import folder_task, timm_transform

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 200, 30)}


def write(folder: Path, counts: dict[str, int], size: int = 32) -> Path:
    """Noisy images of one colour per class, as PNG; every image is another."""
    random = np.random.default_rng(len(str(folder.name)))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = random.integers(-30, 31, (size, size, 3))
            pixels = (np.array(COLOURS[name]) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture
def colours(tmp_path) -> Path:
    """Two classes in the usual layout, 12 images each to train on and 5 to test on."""
    write(tmp_path / "colours" / "train", {"red": 12, "blue": 12})
    write(tmp_path / "colours" / "val", {"red": 5, "blue": 5})
    return tmp_path / "colours"


def tiny_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=3
    )


def test_a_folder_becomes_a_task_with_its_classes_sorted(colours):
    task = folder_task(colours)
    assert task.name == "colours" and task.classes == ("blue", "red")
    assert task.train.inputs.shape == (24, 3, 32, 32) and task.test.inputs.shape == (10, 3, 32, 32)
    assert (
        task.train.labels.tolist() == [0] * 12 + [1] * 12 and task.test.labels.tolist() == [0] * 5 + [1] * 5
    )
    first = np.asarray(Image.open(colours / "val" / "blue" / "000.png"), dtype=np.float32) / 255
    assert np.allclose(task.test.inputs[0].permute(1, 2, 0).numpy(), first)
    assert folder_task(colours, name="other").name == "other"


def test_the_test_folder_is_val_or_test_or_the_one_named(colours):
    as_val = folder_task(colours)
    (colours / "val").rename(colours / "test")
    assert folder_task(colours).fingerprint() == as_val.fingerprint()
    (colours / "test").rename(colours / "held_out")
    (colours / "train").rename(colours / "learn")
    assert folder_task(colours, train="learn", test="held_out").fingerprint() == as_val.fingerprint()


@pytest.mark.parametrize("parts", [{"test": "train"}, {"train": "val"}, {"test": "val/../train"}], ids=str)
def test_one_folder_for_both_parts_is_refused(colours, parts):
    with pytest.raises(ll.errors.InputError, match=r"train and test are both the folder.*or give test_share"):
        folder_task(colours, **parts)


def test_one_folder_of_classes_is_split_by_class_without_overlap(tmp_path):
    write(tmp_path / "one", {"red": 10, "blue": 5, "green": 2})
    task = folder_task(tmp_path / "one", test_share=0.2)
    assert torch.bincount(task.train.labels).tolist() == [4, 1, 8]
    assert torch.bincount(task.test.labels).tolist() == [1, 1, 2]  # a class of two keeps one on either side
    every = torch.cat([task.train.inputs, task.test.inputs]).flatten(1)
    assert len(every.unique(dim=0)) == 17
    assert folder_task(tmp_path / "one", test_share=0.2).fingerprint() == task.fingerprint()
    assert folder_task(tmp_path / "one", test_share=0.2, seed=1).fingerprint() != task.fingerprint()


def test_a_limit_draws_that_many_of_every_class(colours):
    task = folder_task(colours, limit=4)
    assert torch.bincount(task.train.labels).tolist() == torch.bincount(task.test.labels).tolist() == [4, 4]
    task = folder_task(colours, limit=(6, 100))
    assert torch.bincount(task.train.labels).tolist() == [6, 6]
    assert torch.bincount(task.test.labels).tolist() == [5, 5]
    assert len(task.train.inputs.flatten(1).unique(dim=0)) == 12
    assert folder_task(colours, limit=(6, 100)).fingerprint() == task.fingerprint()
    assert folder_task(colours, limit=(6, 100), seed=1).fingerprint() != task.fingerprint()


def test_other_formats_are_made_rgb_and_other_files_left_out(colours):
    red = colours / "train" / "red"
    Image.new("L", (32, 32), 255).save(red / "grey.JPEG")
    Image.new("RGBA", (32, 32), (255, 0, 0, 10)).save(red / "rgba.PNG")
    (red / "notes.txt").write_text("not an image")
    (red / ".hidden.png").write_text("not an image")
    (colours / "train" / ".cache").mkdir()
    task = folder_task(colours)
    assert len(task.train) == 26
    assert torch.equal(task.train.inputs[-2], torch.ones(3, 32, 32))


def test_broken_files_are_all_named_before_anything_is_loaded(colours):
    (colours / "val" / "red" / "broken.png").write_bytes(b"no image")
    good = (colours / "train" / "blue" / "003.png").read_bytes()
    (colours / "train" / "blue" / "003.png").write_bytes(good[:-300] + bytes(300))

    def never(_image: Image.Image) -> torch.Tensor:
        raise AssertionError("loading began")

    with pytest.raises(ValueError, match=r"not readable as images.*blue.003\.png, .*red.broken\.png$"):
        folder_task(colours, never)


def test_a_file_cut_off_after_its_header_is_named(colours):
    cut = colours / "train" / "blue" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"not readable as an image.*cut\.jpg"):
        folder_task(colours)


def test_both_parts_need_the_same_classes(colours):
    write(colours / "train", {"green": 1})
    with pytest.raises(ValueError, match="classes in 'train' but not in 'val': green"):
        folder_task(colours)
    (colours / "train" / "green").rename(colours / "val" / "green")
    with pytest.raises(ValueError, match="classes in 'val' but not in 'train': green"):
        folder_task(colours)


def test_folders_that_make_no_task_are_refused(colours, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        folder_task(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        folder_task(tmp_path / "nowhere", test_share=0.5)
    with pytest.raises(FileNotFoundError, match=r"'train' and 'val or test'; if .*, give test_share"):
        folder_task(colours / "train")
    with pytest.raises(FileNotFoundError, match="needs the folders 'train' and 'later'"):
        folder_task(colours, test="later")
    with pytest.raises(ValueError, match="files in train, val; every subfolder is a class"):
        folder_task(colours, test_share=0.5)
    (colours / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jpg, .*, \.webp files in empty"):
        folder_task(colours)
    write(tmp_path / "single", {"red": 3})
    with pytest.raises(ValueError, match="has 1 subfolders; expected one for each of at least two"):
        folder_task(tmp_path / "single", test_share=0.5)
    write(tmp_path / "rare", {"red": 3, "blue": 1})
    with pytest.raises(
        ValueError, match=r"class 'blue' has 1 image, .*000\.png; splitting it takes at least 2"
    ):
        folder_task(tmp_path / "rare", test_share=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 0.5, "test": "val"}, "either test='val' or test_share=0.5"),
        ({"test_share": 1}, r"test_share must be in \(0, 1\), not 1"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"limit": (1, 2, 3)}, "limit must be a number of images per class, or a pair"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_settings_out_of_range_are_refused(colours, options, message):
    with pytest.raises(ValueError, match=message):
        folder_task(colours, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"path": None}, {"limit": 2.5}, {"limit": "3"}, {"seed": 0.5}, {"test_share": "0.2"},
        {"transform": "resize"}, {"train": 3}, {"train": None}, {"test": 3}, {"progress": "yes"},
    ],
)  # fmt: skip
def test_settings_of_other_types_are_refused(colours, options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
        folder_task(**{"path": colours} | options)


def test_images_without_a_known_white_are_named_before_anything_is_loaded(colours):
    Image.fromarray(np.zeros((32, 32), dtype=np.float32)).save(colours / "val" / "red" / "deep.tif")
    with pytest.raises(ValueError, match=r"images of 32-bit numbers.*8 or 16 bits: .*red.deep\.tif$"):
        folder_task(colours)


def test_a_photo_lies_as_its_camera_says(colours):
    wide = Image.new("RGB", (32, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 16, 32))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    wide.save(colours / "val" / "red" / "999.png", exif=exif)
    pixels = folder_task(colours).test.inputs[-1]
    assert pixels[:, 4, 28].tolist() == [0, 0, 1] and pixels[:, 28, 4].tolist() == [1, 0, 0]


def test_a_transform_must_make_tensors_of_one_shape(colours):
    with pytest.raises(TypeError, match=r"floating-point tensor, not Image, for .*blue.000\.png"):
        folder_task(colours, lambda image: image)
    with pytest.raises(TypeError, match=r"floating-point tensor, not torch\.uint8"):
        folder_task(colours, lambda image: torch.zeros(3, dtype=torch.uint8))
    Image.new("RGB", (40, 32)).save(colours / "train" / "red" / "wide.png")
    with pytest.raises(
        ValueError, match=r"wide\.png became .*\(3, 32, 40\), but .*\(3, 32, 32\); give a transform"
    ):
        folder_task(colours)


def test_timm_s_transform_is_the_model_s_own_size_and_range(colours):
    Image.new("RGB", (90, 70), (255, 0, 0)).save(colours / "train" / "red" / "wide.png")
    task = folder_task(colours, timm_transform(tiny_vit()))
    assert task.train.inputs.shape == (25, 3, 32, 32)
    assert torch.allclose(task.train.inputs[-1, :, 16, 16], torch.tensor([1.0, -1.0, -1.0]))  # mean, std 0.5
    full = timm.create_model("resnet18", num_classes=2)
    assert timm_transform(full)(Image.new("RGB", (300, 400))).shape == (3, 224, 224)


def test_a_model_that_timm_did_not_create_is_refused(model):
    with pytest.raises(
        ValueError, match=r"this VisionTransformer has no pretrained_cfg.*transform of your own"
    ):
        timm_transform(model)


def test_a_small_vit_learns_a_folder_and_is_tested_on_another(colours, tmp_path):
    vit = tiny_vit()
    transform = timm_transform(vit)
    write(tmp_path / "known", {"red": 4, "green": 4, "blue": 4})
    known = folder_task(tmp_path / "known", transform, test_share=0.5)
    adapted = ll.attach(vit, ll.Window(rank=4, position=0.0))
    task = folder_task(colours, transform)
    run = ll.finetune(
        adapted, task, retain=known, steps=30, batch_size=8, lr=3e-3, evaluations=2, progress=False
    )
    assert run.accuracy == 1 and not run.diverged
    assert len(run.items) == 6
