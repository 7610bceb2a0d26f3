"""What it costs to prepare adapters on ViT-B/16: one factorization for all windows against one each.

    python benchmarks/preparation.py [--threads 2] [--repeats 1]

Everything runs in one process on the same randomly initialised model (shapes decide the cost, not
values). Each row's repeats alternate with the others', so a drift of the machine's speed hits all
alike. Copying the model is not counted for PEFT, which changes it in place; for lora_lens it is,
since ``attach`` copies by itself.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_lens as ll

RANK = 16


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peft_start(model: nn.Module, layers: list[str], init: str) -> float:
    copied = copy.deepcopy(model)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights=init)
    return seconds(lambda: get_peft_model(copied, config))


def lapack(model: nn.Module, layers: list[str]) -> float:
    weights = [model.get_submodule(name).weight.detach() for name in layers]
    return seconds(lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights])


def sweep_of(model: nn.Module, count: int) -> float:
    def prepare() -> None:
        spectra = ll.spectra(model, cache=False, progress=False)
        for position in torch.linspace(0, 1, count).tolist():
            ll.attach(model, ll.Window(RANK, position=position), spectra=spectra)

    return seconds(prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    layers = list(ll.spectra(timm.create_model("vit_tiny_patch16_224"), progress=False))

    rows: dict[str, Callable[[], float]] = {
        "lora_lens: spectra": lambda: seconds(lambda: ll.spectra(model, cache=False, progress=False)),
        "lora_lens: spectra and 1 window": lambda: sweep_of(model, 1),
        "lora_lens: spectra and 9 windows": lambda: sweep_of(model, 9),
        "torch.linalg.svd, float32": lambda: lapack(model, layers),
        "PEFT pissa, 1 start": lambda: peft_start(model, layers, "pissa"),
        "PEFT pissa, 9 starts": lambda: sum(peft_start(model, layers, "pissa") for _ in range(9)),
        "PEFT pissa_niter_16, 1 start": lambda: peft_start(model, layers, "pissa_niter_16"),
        "PEFT mica, 1 start": lambda: peft_start(model, layers, "mica"),
    }
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.repeats):
        for name, work in rows.items():
            measured[name].append(work())
            print(f"{name}: {measured[name][-1]:.2f} s", flush=True)

    print(f"ViT-B/16, {len(layers)} weights, rank {RANK}, {arguments.threads} threads")
    print("\n| preparation | median s | min to max |\n|---|---|---|")
    median = {name: statistics.median(times) for name, times in measured.items()}
    for name, times in measured.items():
        print(f"| {name} | {median[name]:.2f} | {min(times):.2f} to {max(times):.2f} |")
    nine = median["PEFT pissa, 9 starts"] / median["lora_lens: spectra and 9 windows"]
    one = median["PEFT pissa, 1 start"] / median["lora_lens: spectra and 1 window"]
    print(f"\nPEFT pissa / lora_lens: 9 windows {nine:.1f}x, 1 window {one:.1f}x")


if __name__ == "__main__":
    main()
