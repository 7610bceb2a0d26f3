"""Pretrain the embedded vision transformers on Fashion-MNIST or on digits and write their model cards.

    python data/pretrain_vision.py                  # torchvision downloads Fashion-MNIST
    python data/pretrain_vision.py --fashion DIR    # DIR holds the four original .gz files
    python data/pretrain_vision.py --known --epochs 15  # the model that sees six of the ten classes
    python data/pretrain_vision.py --digits         # the model of digits.npz, which needs no other file

Writes ``vit_fashion_mnist``, ``vit_fashion_known`` or ``vit_digits`` (.safetensors and .md)
beside this script and brings ``SHA256SUMS`` up to date. The test images are
looked at once, after the last epoch; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
from prepare import read_fashion_mnist, write_checksums
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_lens.tasks.bundled import (
    FASHION_CLASSES,
    FASHION_MEAN,
    FASHION_STD,
    KNOWN_CLASSES,
    digits,
    vision_architecture,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    epochs: int = 25
    batch_size: int = 128
    lr: float = 1e-3
    warmup_epochs: float = 1.5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    flip: bool = True
    rotate_degrees: float = 0.0  # at most, to either side
    shift_pixels: int = 2
    erase_probability: float = 0.25
    erase_pixels: int = 8
    seed: int = 0


# An eighth of the images, so more passes; a mirrored digit is none.
DIGITS_RECIPE = Recipe(epochs=40, warmup_epochs=4.0, flip=False, rotate_degrees=10.0)
TRAINED_ON = {
    "vit_fashion_mnist": "all ten classes of Fashion-MNIST",
    "vit_fashion_known": f"six classes ({', '.join(KNOWN_CLASSES)}) of Fashion-MNIST",
    "vit_digits": "the MNIST digits of `digits.npz`, without having seen Fashion-MNIST",
}
FASHION_LICENCE = "Fashion-MNIST (MIT, Zalando SE)"
DIGITS_LICENCE = (
    "MNIST as packaged by Juan Cazala (package: MIT; MNIST: CC BY-SA 3.0, Yann LeCun and Corinna Cortes)"
)


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Flip, rotate, shift and erase each image of a normalised (batch, 1, 28, 28) tensor on its own."""
    batch, _, height, width = images.shape
    if recipe.flip:
        flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flip, images.flip(-1), images)
    if recipe.rotate_degrees:
        turns = 2 * torch.rand(batch, generator=generator) - 1
        images = rotate_each(images, torch.deg2rad(recipe.rotate_degrees * turns))

    s = recipe.shift_pixels
    padded = nn.functional.pad(images, (s, s, s, s), mode="replicate")
    top, left = torch.randint(0, 2 * s + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + top)[:, :, None]  # (batch, height, 1)
    columns = (torch.arange(width) + left)[:, None, :]  # (batch, 1, width)
    images = padded[torch.arange(batch)[:, None, None], 0, rows, columns][:, None]

    e = recipe.erase_pixels
    top, left = torch.randint(0, height - e + 1, (2, batch, 1), generator=generator)
    y, x = torch.arange(height), torch.arange(width)
    in_rows, in_columns = (y >= top) & (y < top + e), (x >= left) & (x < left + e)
    erase = torch.rand(batch, 1, 1, generator=generator) < recipe.erase_probability
    hole = (in_rows[:, :, None] & in_columns[:, None, :] & erase)[:, None]
    return images.masked_fill(hole, 0.0)


def rotate_each(images: Tensor, radians: Tensor) -> Tensor:
    """Each image turned by its own angle, (batch,), on the darkest pixel as background."""
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    turns = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    places = nn.functional.affine_grid(turns, list(images.shape), align_corners=False)
    background = images.amin()
    return nn.functional.grid_sample(images - background, places, align_corners=False) + background


def normalise(images: Tensor) -> Tensor:
    return ((images.float() / 255 - FASHION_MEAN) / FASHION_STD)[:, None]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(x).argmax(-1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def pretrain(images: Tensor, labels: Tensor, recipe: Recipe) -> nn.Module:
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = vision_architecture(int(labels.max()) + 1)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0}],
        lr=recipe.lr,
    )
    per_epoch = len(labels) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=per_epoch * recipe.epochs,
        pct_start=recipe.warmup_epochs / recipe.epochs,
        cycle_momentum=False,
        div_factor=100,
        final_div_factor=100,
    )
    for epoch in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator)[: per_epoch * recipe.batch_size]
        bar = tqdm(order.split(recipe.batch_size), desc=f"epoch {epoch + 1}/{recipe.epochs}", mininterval=5)
        for rows in bar:
            logits = model(augment(images[rows], recipe, generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def only_known(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images of ``KNOWN_CLASSES``, with labels in that order."""
    new = torch.tensor([KNOWN_CLASSES.index(c) if c in KNOWN_CLASSES else -1 for c in FASHION_CLASSES])
    known = new[labels] >= 0
    return images[known], new[labels][known]


def read(name: str, fashion: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Normalised images and labels, to train on and to test on."""
    if name == "vit_digits":
        task = digits()
        return (task.train.inputs, task.train.labels), (task.test.inputs, task.test.labels)
    splits = read_fashion_mnist(fashion)
    train, test = (
        (normalise(torch.from_numpy(x)), torch.from_numpy(y).long())
        for x, y in (splits["train"], splits["test"])
    )
    return (only_known(*train), only_known(*test)) if name == "vit_fashion_known" else (train, test)


def model_card(
    name: str,
    recipe: Recipe,
    counts: dict[str, int],
    scores: dict[str, float],
    parameters: int,
    minutes: float,
) -> str:
    of_digits = name == "vit_digits"
    command = "python data/pretrain_vision.py"
    command += {"vit_fashion_mnist": "", "vit_fashion_known": " --known", "vit_digits": " --digits"}[name]
    if recipe.epochs != (DIGITS_RECIPE if of_digits else Recipe).epochs:
        command += f" --epochs {recipe.epochs}"
    torch_version = torch.__version__.split("+")[0]
    threads = torch.get_num_threads()
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    return f"""# {name}

A small timm `VisionTransformer` ({parameters:,} parameters, float32) pretrained by the lora_lens
project on {TRAINED_ON[name]}:
28 x 28 grey images, convolutional stem (three 3 x 3 convolutions of stride 2), 16 tokens of width
96, 6 blocks, 3 heads, average pooling. Architecture: `lora_lens.tasks.bundled.vision_architecture`.

| measured once, after the last epoch | |
|---|---|
| accuracy on the {counts["test"]:,} test images | {scores["test"]:.4f} |
| accuracy on the {counts["train"]:,} training images | {scores["train"]:.4f} |
| training time | {minutes:.0f} min with {threads} CPU thread{"s" * (threads > 1)} |

**Input**: pixel values / 255, minus {FASHION_MEAN}, divided by {FASHION_STD}.
**Made by**: `{command}` with torch {torch_version} and timm {timm.__version__}.
**Intended use**: the pretrained model of the lora_lens experiments. It is no classifier
for production. **Licence**: MIT, like the project; trained on
{DIGITS_LICENCE if of_digits else FASHION_LICENCE}.

| training setting | value |
|---|---|
{settings}
| optimizer | AdamW, one-cycle cosine schedule, gradient norm clipped at 1 |
| augmentation | {"small rotation" if of_digits else "horizontal flip"}, shift, erased square |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="folder with the four original Fashion-MNIST files")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--known", action="store_true", help="train on six classes only")
    which.add_argument("--digits", action="store_true", help="train on the digits of digits.npz instead")
    parser.add_argument(
        "--epochs", type=int, help=f"default {Recipe.epochs}, or {DIGITS_RECIPE.epochs} with --digits"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where to write the model and its card")
    arguments = parser.parse_args()

    name = (
        "vit_digits" if arguments.digits else "vit_fashion_known" if arguments.known else "vit_fashion_mnist"
    )
    recipe = DIGITS_RECIPE if arguments.digits else Recipe()
    if arguments.epochs is not None:
        recipe = replace(recipe, epochs=arguments.epochs)
    (train_x, train_y), (test_x, test_y) = read(name, arguments.fashion)
    started = time.monotonic()
    model = pretrain(train_x, train_y, recipe)
    minutes = (time.monotonic() - started) / 60
    scores = {"train": accuracy(model, train_x, train_y), "test": accuracy(model, test_x, test_y)}

    metadata = {"recipe": json.dumps(asdict(recipe)), **{f"{k}_accuracy": str(v) for k, v in scores.items()}}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, arguments.output / f"{name}.safetensors", metadata=metadata)
    parameters = sum(p.numel() for p in model.parameters())
    counts = {"train": len(train_y), "test": len(test_y)}
    card = model_card(name, recipe, counts, scores, parameters, minutes)
    (arguments.output / f"{name}.md").write_text(card)
    write_checksums(arguments.output)
    print(f"test accuracy {scores['test']:.4f}, train accuracy {scores['train']:.4f}, {minutes:.1f} min")


if __name__ == "__main__":
    main()
