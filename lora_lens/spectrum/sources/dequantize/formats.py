"""All formats that are read, and who reads the others."""

from __future__ import annotations

from collections.abc import Callable

from lora_lens.spectrum.sources.dequantize.bits_and_bytes import int8_rows, nf4
from lora_lens.spectrum.sources.dequantize.fp4 import mxfp4, packed_fp4
from lora_lens.spectrum.sources.dequantize.integers import gptq_or_awq, packed_integers
from lora_lens.spectrum.sources.dequantize.layer import Layer, Plain
from lora_lens.spectrum.sources.dequantize.one_per_value import scaled
from lora_lens.spectrum.sources.dequantize.torch_ao import torchao_tensor

FORMATS: tuple[Callable[[Layer], Plain | None], ...] = (
    scaled,
    mxfp4,
    packed_fp4,
    gptq_or_awq,
    packed_integers,
    nf4,
    int8_rows,
    torchao_tensor,
)
# Who reads what is not read here, by a part of the layer, or by the dtype of its weight.
OTHERS = {
    "W_q": "HQQ, which the hqq package reads",
    "codebooks": "AQLM, which the aqlm package reads",
    "weight._data": "quanto, which the optimum-quanto package reads",
    "centroids.weight": "VPTQ, which the vptq package reads",
    "trellis": "EXL3, which the exllamav3 package reads",
    "q_weight": "EXL2, which the exllamav2 package reads",
    "Qidxs": "QuIP#, which the quip-sharp project reads",
    "U32": "MLX, which the mlx package reads",
}


def dequantized(layer: Layer) -> Plain | None:
    """The matrix that a quantized layer stands for; None if its format is not read.

    Raises:
        InputError: a part is missing, or of another shape than the others; the message goes on from the
            layer's name.
    """
    return next(filter(None, (read(layer) for read in FORMATS)), None)


def library_of(layer: Layer) -> str:
    """Who reads a format that is not read here, as "HQQ, which the hqq package reads", or ""."""
    marks = {*layer.tensors, *(dtype for part, (_, _, dtype) in layer.tensors.items() if part == "weight")}
    return next((who for mark, who in OTHERS.items() if mark in marks), "")
