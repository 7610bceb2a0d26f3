#!/usr/bin/env bash
# transformers 5.23.0: FP8 weights whose last block is a partial one are dequantized with the wrong scales.
#
# A matrix of 192 rows in blocks of 128 has two rows of scales: one for the first 128 rows, one for the other 64.
# Fp8Dequantize does not ask weight_block_size but divides the rows by the number of scales, so that each holds for
# 96 rows, and the rows 96 to 127 get the scale of the next block. Where the division leaves a remainder (320 rows,
# three scales) loading fails; otherwise nothing is said. from_pretrained takes this way for dequantize=True, and
# on any machine without a GPU that computes in FP8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import json
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

def spread(scales, shape):
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]

sizes = dict(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4)
fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "dequantize": True}
for width in (256, 192, 320):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=width))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[128:] *= 8  # the second block is larger than the first
    model.save_pretrained("saved")
    tensors, meant = load_file("saved/model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:  # as FP8 checkpoints are made
        weight = tensors[name]
        rows, columns = weight.shape
        blocks = pad(weight, (0, -columns % 128, 0, -rows % 128)).unfold(0, 128, 128).unfold(1, 128, 128)
        scales = blocks.abs().amax((2, 3)) / 448
        tensors[name] = (weight / spread(scales, weight.shape)).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
        meant[name] = tensors[name].float() * spread(scales, weight.shape)
    save_file(tensors, "saved/model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path("saved/config.json").read_text()) | {"quantization_config": fp8}
    Path("saved/config.json").write_text(json.dumps(config))
    try:
        loaded = LlamaForCausalLM.from_pretrained("saved", dtype=torch.float32)
    except RuntimeError as error:
        print(f"{width} rows: {type(error).__name__}")
        continue
    name = "model.layers.0.mlp.up_proj.weight"
    found, weight = loaded.get_parameter(name).detach(), meant[name]
    wrong = (found != weight).any(1).nonzero().flatten().tolist()
    error = float((found - weight).norm() / weight.norm())
    where = f"{wrong[0]} to {wrong[-1]}" if wrong else "none"
    print(f"{width} rows: error {error:.3f} of the weight, wrong rows {where}")
PYTHON
grep -q "256 rows: error 0.000 of the weight, wrong rows none" output
grep -Eq "192 rows: error 0\.[1-9][0-9]* of the weight, wrong rows 96 to 127" output
grep -q "320 rows: RuntimeError" output
echo "as described"
