#!/usr/bin/env bash
# bitsandbytes 0.50.2: on CPUs with AVX512, 4-bit weights whose rows end within a block are dequantized wrongly.
#
# Quantizing takes a weight as one long row, in blocks of 64 numbers with a scale each, so that a block may reach
# from one row into the next. The CPU's kernel dequantizes row by row and gives part of the numbers the scale of
# another block. A row of 4304 numbers, as in SigLIP's larger vision towers, is no multiple of 64. A layer in training
# mode multiplies by the wrong weight and says nothing; with the state told that the weight is a single row, the same
# kernel gives the right one. Rows that are multiples of 64 are right.
set -euo pipefail
grep -qw avx512f /proc/cpuinfo || { echo "this CPU has no AVX512, with which it was seen"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
cd "$folder"
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import copy

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

torch.manual_seed(0)
for columns in (4288, 4304):
    weight, x = torch.randn(64, columns), torch.randn(5, columns)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    one_row = copy.copy(state)
    one_row.shape = torch.Size([weight.numel()])
    right = dequantize_4bit(packed, one_row).reshape(weight.shape)
    layer = Linear4bit(columns, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.to("cpu").train()
    error = (dequantize_4bit(packed, state) - weight).abs().mean()
    print(f"{columns} = 64 * {columns / 64}: mean error {error:.2f}, as one row {(right - weight).abs().mean():.2f}")
    print(f"{columns}: the layer's answers are off by up to {(layer(x) - x @ right.T).abs().max():.2f}")
PYTHON
grep -q "4288 = 64 \* 67.0: mean error 0.07, as one row 0.07" output
grep -q "4304 = 64 \* 67.25: mean error 0.16, as one row 0.07" output
grep -q "4288: the layer's answers are off by up to 0.00" output
grep -qE "4304: the layer's answers are off by up to [0-9]{2}\." output
echo "as described"
