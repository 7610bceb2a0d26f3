"""Examples that stay in their image files and are read when they are needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from PIL import Image
from torch import Tensor

from lora_lens._base.errors import InputError, InputTypeError
from lora_lens._base.hashing import Digest, add_tensor, tensor_bytes
from lora_lens.tasks.images import as_rgb
from lora_lens.tasks.task import Examples, Labelled

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Room:
    """How many bytes of read images are kept in memory; a copy in another process is empty at first."""

    size: float
    used: int = 0

    def takes(self, more: int) -> bool:
        """Whether there is room for so many bytes more, which is then taken."""
        fits = self.used + more <= self.size
        self.used += more if fits else 0
        return fits

    def __getstate__(self) -> dict[str, float]:
        return {"size": self.size, "used": 0}


class ImageFile:
    """One image, as the tensor that a transform makes of it.

    It is read at once, and whenever it is asked for unless it found room. Then it must still be the same.

    Raises:
        ValueError: the file is not readable as an image, or the tensor is not finite.
        TypeError: the transform returns something else.
    """

    __slots__ = ("checksum", "dtype", "kept", "path", "room", "shape", "transform")

    def __init__(self, path: Path, transform: Transform, room: Room) -> None:
        self.path, self.transform, self.room = path, transform, room
        made = self._made()
        if not (isinstance(made, Tensor) and made.is_floating_point()):
            kind = made.dtype if isinstance(made, Tensor) else type(made).__name__
            raise InputTypeError(f"the transform must return a floating-point tensor, not {kind}, for {path}")
        if not torch.isfinite(made).all():
            raise InputError(f"inputs hold NaN or infinite values, from {path}")
        self.shape, self.dtype, self.checksum = made.shape, made.dtype, zlib.crc32(tensor_bytes(made))
        self.kept = self._kept(made)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            ValueError: the file is gone or damaged, or gives another tensor than at first.
        """
        if self.kept is not None:
            return self.kept
        made = self._made()
        if zlib.crc32(tensor_bytes(made)) != self.checksum:
            raise InputError(
                f"{self.path} gives another tensor than when the task was made: the file was changed, or the "
                "transform is random; make the task again, with a transform that always does the same"
            )
        self.kept = self._kept(made)
        return made

    def _made(self) -> Tensor:
        try:
            with Image.open(self.path) as image:
                rgb = as_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # a file may be cut off after a sound header
            raise InputError(
                f"not readable as an image, restore or remove it: {self.path} ({error})"
            ) from error
        return self.transform(rgb)

    def _kept(self, made: Tensor) -> Tensor | None:
        return made.clone() if self.room.takes(made.nbytes) else None  # it may be part of a larger tensor

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        return None, {name: None if name == "kept" else getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, eq=False)
class ImageFiles(Labelled):
    """Images with class labels, as :class:`lora_lens.Examples` of them would be, without holding them all.

    Attributes:
        images: all of one shape and dtype.
        labels: (n,) int64.
    """

    images: tuple[ImageFile, ...]
    labels: Tensor

    def __repr__(self) -> str:
        return f"<{len(self)} image files of shape {tuple(self.shape)}>"

    @property
    def shape(self) -> torch.Size:
        """Of one example."""
        return self.images[0].shape

    @property
    def inputs(self) -> Tensor:
        """All images at once, (n, ...), read into memory."""
        return self.batch(torch.arange(len(self)))

    def take(self, rows: Tensor) -> ImageFiles:
        """Some of the examples, by their numbers."""
        return ImageFiles(self._some(rows), self.labels[rows])

    def joined(self, *others: ImageFiles | Examples) -> ImageFiles | Examples:
        """These examples, then those of the others; all in memory if some of those are."""
        parts = (self, *others)
        labels = torch.cat([part.labels for part in parts])
        if all(isinstance(part, ImageFiles) and part.shape == self.shape for part in parts):
            return ImageFiles(tuple(image for part in parts for image in part.images), labels)
        return Examples(torch.cat([part.inputs for part in parts]), labels)

    def batch(self, rows: Tensor) -> Tensor:
        """Some examples' images, (batch, ...), read by as many threads as there are cores."""
        images = self._some(rows)
        if all(image.kept is not None for image in images):
            return torch.stack([image.kept for image in images])
        with ThreadPoolExecutor(joblib.cpu_count()) as threads:
            return torch.stack(list(threads.map(ImageFile.read, images)))

    def add_to(self, digest: Digest) -> None:
        """Hash all that they hold, as that of Examples, one image after the other."""
        digest.update(f"{self.images[0].dtype}{(len(self), *self.shape)}".encode())
        for image in self.images:
            digest.update(tensor_bytes(image.read()))
        add_tensor(digest, self.labels)

    def _some(self, rows: Tensor) -> tuple[ImageFile, ...]:
        return tuple(self.images[row] for row in torch.arange(len(self))[rows].tolist())
