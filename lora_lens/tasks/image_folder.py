"""A task from a folder of images, one subfolder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms.functional import to_tensor

from lora_lens._base.errors import InputError, InputTypeError, MissingFileError
from lora_lens._base.naming import listed
from lora_lens._base.progress import progress_bar
from lora_lens._base.validate import flag, instance, number, seed_number, shown, whole_number
from lora_lens.tasks.image_files import ImageFile, ImageFiles, Room, Transform
from lora_lens.tasks.images import has_white
from lora_lens.tasks.sampling import held_out
from lora_lens.tasks.task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
Files = dict[str, list[Path]]  # of every class, in the order of the labels
LISTED = 5  # names in an error


def folder_task(
    path: str | Path,
    transform: Transform | None = None,
    *,
    train: str = "train",
    test: str | None = None,
    test_share: float | None = None,
    limit: int | tuple[int | None, int | None] | None = None,
    seed: int = 0,
    name: str | None = None,
    memory: float = 1.0,
    progress: bool = True,
) -> Task:
    """A task from image files, ``path/train/<class>/*.jpg`` and ``path/val/<class>/*.jpg``.

    With ``test_share``, from one folder without such parts, ``path/<class>/*.jpg``: that share of every
    class, drawn at random, is for testing. Files end in one of ``SUFFIXES``, in any case; others, and what is
    hidden, are left out. Images are read as people see them, see :func:`lora_lens.tasks.images.as_rgb`:
    turned by their EXIF data, on white where they are transparent, of several frames the first. Classes are
    sorted by name. That is the order of ImageNet's heads if its folders are called by their WordNet numbers,
    n01440764 and so on.

    The setting of a vision transformer that learns Caltech101 and is to retain ImageNet::

        model = timm.create_model("vit_base_patch16_224", pretrained=True)
        transform = timm_transform(model)
        # half of the validation images would be for training, which retaining does not need: 1 per class
        imagenet = folder_task("imagenet/val", transform, test_share=0.5, limit=(1, 5), name="ImageNet")
        # without the folder BACKGROUND_Google, which is not one of the 101 classes
        caltech = folder_task("caltech101", transform, test_share=0.2, limit=(30, 20), name="Caltech101")
        adapted = lora_lens.attach(model, lora_lens.Window(rank=8, position=0.5))
        run = lora_lens.finetune(adapted, caltech, retain=imagenet)

    Every image is read once, so that whatever is wrong with a file is known before work begins. The first
    of them stay in memory, up to ``memory``; the others are read again whenever they are needed, and must
    then be what they were. A value takes 4 bytes, so one of 3 x 224 x 224 takes 0.6 MB. What is made of a
    task by :func:`lora_lens.tasks.corrupted`, ``rotated`` and ``permuted`` is in memory whole.

    Args:
        path: the folder.
        transform: from an RGB image to a floating-point tensor of the same shape for all, the same each
            time, such as :func:`timm_transform`; without one, pixels in [0, 1], (3, h, w), as large as they
            are.
        train: the subfolder of the training images.
        test: the subfolder of the test images; by default "val", or "test" if there is no "val".
        test_share: in (0, 1), instead of the two subfolders. It is rounded to whole images, and every
            class keeps at least one image on either side.
        limit: images per class, at most, in each part; or a pair, for training and for testing, of
            which None is no limit. They are drawn at random.
        seed: of the split and of the images drawn.
        name: of the task; by default the folder's.
        memory: of images that are kept, in GB, in each process that uses the task.
        progress: show a bar while checking and reading.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: there are fewer than two classes, a class without images,
            or one that is in one part only; one folder for both parts; a file is no readable image, or one
            of 32-bit numbers; tensors of different shapes, or that are not finite; a share, limit, seed or
            memory out of range. Later, from whatever uses the task: a file that is gone, damaged or changed,
            or a transform that makes another tensor of it than at first.
        TypeError: the transform does not return floating-point tensors; an argument of another type.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> import lora_lens as ll
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for place in range(8):
        ...         (Path(folder) / "ab"[place % 2]).mkdir(exist_ok=True)
        ...         Image.new("RGB", (8, 8)).save(Path(folder) / "ab"[place % 2] / f"{place}.png")
        ...     ll.tasks.folder_task(folder, test_share=0.25, name="letters", progress=False)
        <Task letters: 2 classes; 6 training, 2 test examples>
    """
    path = Path(instance(path, (str, Path), "path", "a folder's path"))
    if transform is not None and not callable(transform):
        raise InputTypeError(f"transform must be a function of an image, not {shown(transform)}")
    for part, given in (("train", train), ("test", test)):
        if part == "train" or given is not None:
            instance(given, (str, Path), part, "a subfolder's name")
    limits, progress = _limits(limit), flag(progress, "progress")
    room = Room(10**9 * number(memory, "memory", least=0))
    random = np.random.default_rng(seed_number(seed))
    if test_share is None:
        parts = _parts(path, train, test)
    else:
        if test is not None:
            raise InputError(f"give either test={test!r} or test_share={test_share}, not both")
        test_share = number(test_share, "test_share", above=0, below=1)
        parts = _split(_files(path), test_share, random)
    parts = [
        {c: _drawn(files, most, random) for c, files in part.items()}
        for part, most in zip(parts, limits, strict=True)
    ]
    _check([f for part in parts for files in part.values() for f in files], progress)
    return Task(
        path.resolve().name if name is None else name,
        tuple(parts[0]),
        *(_read(part, transform or to_tensor, room, progress) for part in parts),
    )


def timm_transform(model: nn.Module) -> Transform:
    """How a timm model wants its images: resized, cropped at the centre and normalised, without augmentation.

    The size is the model's own, also if it was made for another than it was
    pretrained with (``timm.create_model(..., img_size=...)``).

    Raises:
        ValueError: the model does not say how it was pretrained: it is not from ``timm.create_model``.

    Example:
        >>> import timm
        >>> from PIL import Image
        >>> import lora_lens as ll
        >>> transform = ll.tasks.timm_transform(timm.create_model("test_vit"))
        >>> transform(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 160, 160])
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise InputError(
            f"this {type(model).__name__} has no pretrained_cfg, which timm.create_model gives its models; "
            "pass folder_task a transform of your own"
        )
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    own = {} if size is None else {"input_size": (3, *size)}
    return create_transform(**resolve_model_data_config(model, args=own), is_training=False)


def _limits(limit: int | tuple[int | None, int | None] | None) -> list[int | None]:
    """For training and for testing."""
    if limit is None:
        return [None, None]
    pair = limit if isinstance(limit, (tuple, list)) else (limit, limit)
    if len(pair) != 2:
        raise InputError(f"limit must be a number of images per class, or a pair of them, not {limit!r}")
    return [None if most is None else whole_number(most, "limit", least=1) for most in pair]


def _parts(path: Path, train: str, test: str | None) -> list[Files]:
    if not path.is_dir():
        raise MissingFileError(f"there is no folder {path}")
    if test is None:
        test = next((n for n in ("val", "test") if (path / n).is_dir()), None)
    if test is None or not ((path / train).is_dir() and (path / test).is_dir()):
        raise MissingFileError(
            f"{path} needs the folders {train!r} and {test or 'val or test'!r}; "
            "if it holds the classes themselves, give test_share, such as 0.2"
        )
    if (path / train).resolve() == (path / test).resolve():
        raise InputError(
            f"{path}: train and test are both the folder {test!r}, and a test on it would tell what was "
            "memorized; name two folders, or give test_share"
        )
    parts = [_files(path / train), _files(path / test)]
    for here, there in ((0, 1), (1, 0)):
        lost = [c for c in parts[here] if c not in parts[there]]
        if lost:
            has, lacks = (train, test) if here == 0 else (test, train)
            raise InputError(
                f"{path}: classes in {has!r} but not in {lacks!r}: "
                f"{listed(lost, most=LISTED)}; both need the same"
            )
    return parts


def _files(folder: Path) -> Files:
    """Every class's image files, sorted by name."""
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder}")
    classes = [f for f in _sorted(folder) if f.is_dir()]
    if len(classes) < 2:
        raise InputError(
            f"{folder} has {len(classes)} subfolders; expected one for each of at least two classes"
        )
    files = {c.name: [f for f in _sorted(c) if f.suffix.lower() in SUFFIXES] for c in classes}
    empty = [c for c, found in files.items() if not found]
    if empty:
        raise InputError(
            f"{folder}: no {', '.join(SUFFIXES)} files in {listed(empty, most=LISTED)}; "
            "every subfolder is a class, so fill or remove them"
        )
    return files


def _sorted(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in the same order on every system."""
    return sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda f: f.name)


def _split(files: Files, share: float, random: np.random.Generator) -> list[Files]:
    train, test = {}, {}
    for name, found in files.items():
        if len(found) < 2:
            raise InputError(f"class {name!r} has 1 image, {found[0]}; splitting it takes at least 2")
        for_test = set(held_out(len(found), share, random))
        test[name] = [f for i, f in enumerate(found) if i in for_test]
        train[name] = [f for i, f in enumerate(found) if i not in for_test]
    return [train, test]


def _drawn(files: list[Path], most: int | None, random: np.random.Generator) -> list[Path]:
    if most is None or len(files) <= most:
        return files
    return [files[i] for i in sorted(random.permutation(len(files))[:most])]


def _check(files: list[Path], progress: bool) -> None:
    """Open every file before the long work of decoding; damage beyond the header may show only there."""
    broken, deep = [], []
    for file in progress_bar(files, shown=progress, desc="checking images", unit="image"):
        try:
            with Image.open(file) as image:
                if not has_white(image):
                    deep.append(str(file))
                image.verify()
        except MemoryError:
            raise
        except Exception:  # Pillow's formats raise many kinds
            broken.append(str(file))
    if broken:
        raise InputError(f"not readable as images, restore or remove them: {listed(broken, most=LISTED)}")
    if deep:
        raise InputError(
            "images of 32-bit numbers, of which none is known to be white; save them with 8 or 16 bits: "
            f"{listed(deep, most=LISTED)}"
        )


def _read(part: Files, transform: Transform, room: Room, progress: bool) -> ImageFiles:
    """The files, class after class, each of which is read once."""
    files = [(f, label) for label, found in enumerate(part.values()) for f in found]
    images: list[ImageFile] = []
    for file, _ in progress_bar(files, shown=progress, desc="reading", unit="image"):
        images.append(ImageFile(file, transform, room))
        for what in ("shape", "dtype"):
            if (here := getattr(images[-1], what)) != (first := getattr(images[0], what)):
                raise InputError(
                    f"{file} became a tensor of {what} {_plain(here)}, but {files[0][0]} one of "
                    f"{_plain(first)}; give a transform that makes all the same, such as timm_transform"
                )
    return ImageFiles(tuple(images), torch.tensor([label for _, label in files]))


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
