from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lora_lens as ll
from lora_lens.tasks.image_files import ImageFiles
from lora_lens.tasks.image_folder import folder_task

SIZE = 96
ONE = 3 * SIZE * SIZE * 4  # bytes of an image that was read


def write(folder: Path, count: int, size: int, suffix: str) -> Path:
    """Noisy images in two classes, ``count`` in each."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        for i in range(count):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}{suffix}")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """300 images, 33 MB once they are read."""
    return write(tmp_path_factory.mktemp("many"), 150, SIZE, ".jpg")


@pytest.fixture
def few(tmp_path) -> Path:
    return write(tmp_path, 10, 16, ".png")


def task_of(folder: Path, **options: object) -> ll.Task:
    return folder_task(folder, test_share=0.5, progress=False, **options)


def in_memory(task: ll.Task) -> ll.Task:
    train, test = (ll.Examples(part.inputs, part.labels) for part in (task.train, task.test))
    return ll.Task(task.name, task.classes, train, test)


def tensor_bytes() -> int:
    """Of all tensors that there are in this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tiny_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", img_size=16, **sizes)


@pytest.mark.parametrize("images", [0, 20, 300])
def test_a_folder_takes_no_more_memory_than_it_is_given(many, images):
    before = tensor_bytes()
    task = task_of(many, memory=images * ONE / 1e9)
    for part in (task.train, task.test):
        for rows in part.in_batches(50):
            assert part.batch(rows).shape == (50, 3, SIZE, SIZE)
    assert images * ONE <= tensor_bytes() - before < (images + 1) * ONE


def test_it_trains_and_scores_bit_for_bit_as_in_memory(few):
    task, model = task_of(few, memory=0), tiny_vit()
    whole = in_memory(task)
    assert isinstance(task.train, ImageFiles) and task.fingerprint() == whole.fingerprint()
    runs = []
    for one in (task, whole):
        adapted = ll.attach(model, ll.Window(rank=4, position=0.0))
        settings = {"steps": 6, "batch_size": 4, "lr": 3e-3, "evaluations": 2, "progress": False}
        runs.append(ll.finetune(adapted, one, retain=ll.tasks.probed(model, one), **settings))
        ll.detach(adapted)
    assert runs[0].accuracy == runs[1].accuracy and runs[0].forgetting == runs[1].forgetting
    left, right = (ll.evaluate(model, one).losses for one in (task, whole))
    assert np.array_equal(left, right)


def test_what_is_taken_from_it_stays_in_files(few):
    task = task_of(few, memory=0)
    whole = in_memory(task)
    for change in (
        lambda t: t.subset(train=4, test=4),
        lambda t: ll.tasks.few_shot(t, 2),
        lambda t: ll.tasks.only_classes(t, ["dogs", "cats"]),
    ):
        found = change(task)
        assert isinstance(found.train, ImageFiles) and isinstance(found.test, ImageFiles)
        assert found.fingerprint() == change(whole).fingerprint()
    both = task.train.joined(task.test)
    assert isinstance(both, ImageFiles)
    assert torch.equal(both.inputs, whole.train.joined(whole.test).inputs)
    mixed = task.train.joined(whole.test)
    assert isinstance(mixed, ll.Examples) and torch.equal(mixed.inputs, both.inputs)
    assert torch.equal(mixed.labels, both.labels)
    assert torch.equal(task.train.batch(task.train.labels == 1), whole.train.inputs[whole.train.labels == 1])


def test_changed_images_are_those_of_the_same_task_in_memory(few):
    task = task_of(few, memory=0)
    whole = in_memory(task)
    for change in (
        lambda t: ll.tasks.corrupted(t, "gaussian_noise", 3),
        lambda t: ll.tasks.rotated(t, 90),
        lambda t: ll.tasks.permuted(t, 0),
    ):
        assert change(task).fingerprint() == change(whole).fingerprint()
    assert ll.tasks.rotated(task, 360) is task


def test_another_process_is_handed_no_images(many):
    task = task_of(many)
    assert tensor_bytes() >= 300 * ONE
    handed = pickle.dumps(task)
    assert len(handed) < 300 * 500
    again = pickle.loads(handed)
    assert again.fingerprint() == task.fingerprint()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), r"not readable as an image, restore.*: .*{name} \(.*No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "not readable as an image.*{name}"),
        (lambda file: Image.new("RGB", (16, 16)).save(file), "{name} gives another tensor.*was changed"),
        (lambda file: Image.new("RGB", (9, 9)).save(file), "{name} gives another tensor"),
    ],
    ids=["gone", "damaged", "changed", "resized"],
)
def test_a_file_that_is_harmed_later_is_named(few, harm, message):
    task, model = task_of(few, memory=0), tiny_vit()
    file = task.test.images[3].path
    harm(file)
    with pytest.raises(ll.errors.InputError, match=message.format(name=file.name)):
        ll.evaluate(model, task)


def test_a_random_transform_is_refused_where_it_would_be_seen(few):
    def noisy(image: Image.Image) -> torch.Tensor:
        return torch.rand(3, 4, 4)

    with pytest.raises(ll.errors.InputError, match=r"\d\.png gives another tensor.*transform is random"):
        task_of(few, transform=noisy, memory=0).train.batch(torch.tensor([0]))
    task = task_of(few, transform=noisy)  # all of it was kept
    assert torch.equal(task.train.inputs, task.train.inputs)


def test_tensors_that_are_not_finite_name_their_file(few):
    with pytest.raises(ll.errors.InputError, match=r"NaN or infinite values, from .*\d\.png"):
        task_of(few, transform=lambda image: torch.full((3, 2, 2), torch.nan))


@pytest.mark.parametrize(("memory", "error"), [(-1, ValueError), ("1 GB", TypeError)])
def test_memory_is_a_number_of_gigabytes(few, memory, error):
    with pytest.raises(error, match="memory must be"):
        task_of(few, memory=memory)
