"""What the two forms of one start cost: the base as residual, or as it is with the start taken off (offset).

    python benchmarks/forms.py [--out benchmarks/results]

Attaching with given spectra to ViT-B/16 with random weights, on a copy, and how many of its adapted weights
that copies; and training steps (forward, backward, AdamW) of ViT-S/16 and SmolLM2-135M, one thread, in
float32 and bfloat16: by the forward pass that PEFT gives ``Trainer``, and by the layers that ``ll.finetune``
uses.
Forms alternate in one process, in processor seconds, so that other work on the machine matters little: read
the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import product

import timm
import torch
from measuring import alternating, machine, markdown, models, options, publish, spread, threads
from torch import nn

import lora_lens as ll
from lora_lens.training.lean_forward import lean_layers

FORMS = ("residual", "offset")
RANKS = (8, 16)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS, STEPS = 7, 5


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def attach(model: nn.Module, form: str, spectra: ll.SpectrumSet) -> Callable[[], float]:
    variant = ll.Variant(base=form)
    return lambda: seconds(lambda: ll.attach(model, ll.Window.middle(16), spectra=spectra, variant=variant))


def copied_share(model: nn.Module, form: str, spectra: ll.SpectrumSet) -> float:
    """The share of the adapted weights' bytes that lie elsewhere than in the model that was given."""
    adapted = ll.attach(model, ll.Window.middle(16), spectra=spectra, variant=ll.Variant(base=form))
    bases = {name: adapted.get_submodule(f"base_model.model.{name}.base_layer").weight for name in spectra}
    apart = sum(
        w.nbytes for n, w in bases.items() if w.data_ptr() != model.get_submodule(n).weight.data_ptr()
    )
    return apart / sum(w.nbytes for w in bases.values())


def step(adapted: nn.Module, batch: torch.Tensor, lean: bool) -> Callable[[], float]:
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-5)

    def work() -> None:
        if batch.is_floating_point():
            loss = adapted(batch).square().mean()
        else:
            loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed() -> float:
        with lean_layers(adapted, "float32" if lean else "PEFT's own"):
            return seconds(work)

    return timed


def main() -> None:
    arguments = options(__doc__).parse_args()
    vit, smol = models().values()
    spectra = ll.spectra(vit, vectors=[ll.Window.middle(16)], progress=False)
    rows = []
    with threads(1):
        times = alternating({form: attach(vit, form, spectra) for form in FORMS}, REPEATS, "attach")
    ratio = statistics.median(times["residual"]) / statistics.median(times["offset"])
    rows.append(["attach", *(spread(times[form]) for form in FORMS), f"1/{ratio:.1f}"])
    shares = [copied_share(vit, form, spectra) for form in FORMS]
    rows.append(["adapted weights that are copied", *(f"{share:.0%}" for share in shares), ""])

    small = timm.create_model("vit_small_patch16_224", num_classes=10)
    images = torch.randn(4, 3, 224, 224)
    words = torch.randint(0, 1000, (2, 128))
    with threads(1):
        todo = product((("ViT-S/16", small, images), ("SmolLM2", smol, words)), PRECISIONS, RANKS)
        for (label, model, batch), precision, rank in todo:
            dtype = PRECISIONS[precision]
            model = deepcopy(model).to(dtype)
            batch = batch.to(dtype) if batch.is_floating_point() else batch
            window = ll.Window.middle(rank)
            own = ll.spectra(model, vectors=[window], progress=False)
            both = {
                form: ll.attach(model, window, spectra=own, variant=ll.Variant(base=form)).train()
                for form in FORMS
            }
            for path, lean in (("PEFT's layers", False), ("ll.finetune's layers", True)):
                name = f"step, {label}, {precision}, rank {rank}, {path}"
                times = alternating({f: step(a, batch, lean) for f, a in both.items()}, STEPS, name)
                pairs = zip(*times.values(), strict=True)
                ratio = statistics.median(offset / residual for residual, offset in pairs)
                rows.append([name, *(spread(times[form]) for form in FORMS), f"{ratio:.2f}"])
    text = f"Two forms of one start: processor seconds, median and range. {machine()}.\n\n"
    publish(arguments.out, "forms", text + markdown(["", *FORMS, "offset / residual"], rows))


if __name__ == "__main__":
    main()
