"""Small real models and tasks that many tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Where there is a GPU, training moves a model to it, and the tests compare with tensors on the CPU.
# For those that can use one: CUDA_VISIBLE_DEVICES=0 pytest tests/spectrum
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from hypothesis import settings

import lora_lens as ll

if TYPE_CHECKING:  # what takes seconds is not imported by the process that only hands out the tests
    from timm.models.vision_transformer import VisionTransformer

# Importing the tests makes a million objects that stay: nothing is collected before that is done.
gc.disable()

settings.register_profile("no deadline", deadline=None)  # a busy machine makes no test wrong
settings.load_profile("no deadline")


@cache
def torch_settings() -> dict[str, tuple[Callable, Callable]]:
    """What a test may change for itself, and what all tests after it would run under if it stayed."""
    import torch

    return {
        "autocast": (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
        "float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    }


# Begun first, so that processes that share the files end at the same time: the slowest. Between those that
# start processes of their own stand some that only compute, or the former would all wait for each other.
SLOWEST = """
experiments/test_worker_processes adapters/test_other_loops adapters/test_compatibility
training/test_language_models experiments/test_engines_ray widgets/test_continual reports/test_sweep_report
course/test_notebook_sentences adapters/test_saving experiments/continual/test_sequence_sweeps
experiments/test_engines_dask widgets/test_all_explorers adapters/test_zoo project/test_repository
tasks/test_bundled adapters/test_peft_starts project/test_imports project/test_examples
widgets/test_fair_comparison widgets/test_explorer widgets/test_forgotten experiments/continual/test_store
forgetting/test_generations experiments/test_engines training/test_finetuning project/test_finetune_llm
training/test_fused_loop adapters/test_replacing widgets/test_trade_off _base/test_processes
""".split()  # noqa: SIM905


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[bool]:
    """Put torch back as a test found it, and name the test, so that no other fails for it."""
    settings = torch_settings()
    before = {name: get() for name, (get, _) in settings.items()}
    result = yield
    for name, (get, put) in settings.items():
        if get() != before[name]:
            item.warn(pytest.PytestWarning(f"{item.nodeid} left torch's {name} at {get()}"))
            put(before[name])
    return result


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Keep the tests' spectra out of the user's cache folder, in subprocesses, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def gguf_files_are_read_once() -> Iterator[None]:
    """Spare the tests what costs transformers most of the time that it takes to load SmolLM2.

    It has gguf read the file's vocabulary for the configuration, the weights and the tokenizer each, and list
    all names of tensors once for each of the 397 modules.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    read = cache(lambda path, changed: gguf_reader(path))
    gguf_reader = gguf.GGUFReader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(path, Path(path).stat().st_mtime_ns))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="session")
def pretrained() -> tuple[VisionTransformer, ll.Task]:
    """The embedded model and the task it knows."""
    return ll.tasks.bundled.vision()


@pytest.fixture(scope="session")
def model(pretrained) -> VisionTransformer:
    return pretrained[0]


@pytest.fixture(scope="session")
def source(pretrained) -> ll.Task:
    return pretrained[1]


@pytest.fixture(scope="session")
def digits() -> ll.Task:
    return ll.tasks.bundled.digits()


@pytest.fixture(scope="session")
def spectra(model) -> ll.SpectrumSet:
    return ll.spectra(model, progress=False)


@pytest.fixture
def patch_vit() -> VisionTransformer:
    """A fresh timm ViT with an ordinary patch embedding, whose projection is a convolution."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2
    )
