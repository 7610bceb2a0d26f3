#!/usr/bin/env bash
# transformers 5.23.0 offers HqqConfig and quantizes no model with it: loading raises NotImplementedError.
#
# Weights that are quantized while they are loaded go through get_quantize_ops of the method's quantizer. Those of HQQ
# and HIGGS say that a weight needs quantizing and do not define it (nor does GGUF's, whose files are dequantized
# another way), so the base class's error is all there is, on any device. hqq itself quantizes the same layer on a
# CPU, and passes a gradient on to its input.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 setuptools==80.9.0 wheel==0.45.1
"$folder/venv/bin/pip" install --quiet --no-build-isolation hqq==0.2.8.post1
cd "$folder"
cat > try.py <<'PY'
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import HqqConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("tiny")
try:
    LlamaForCausalLM.from_pretrained("tiny", quantization_config=HqqConfig(nbits=4, group_size=32))
    print("loading: worked")
except NotImplementedError as error:
    print(f"loading: NotImplementedError: {error}")
without = [
    name
    for name, quantizer in sorted(auto.AUTO_QUANTIZER_MAPPING.items())
    if quantizer.param_needs_quantization is not HfQuantizer.param_needs_quantization
    and quantizer.get_quantize_ops is HfQuantizer.get_quantize_ops
]
print(f"say that weights need quantizing, and cannot: {', '.join(without)}")
layer = HQQLinear(
    torch.nn.Linear(64, 32), BaseQuantizeConfig(nbits=4, group_size=32, axis=1), compute_dtype=torch.float32, device="cpu"
)
x = torch.randn(3, 64, requires_grad=True)
layer(x).sum().backward()
print(f"hqq's own layer on a CPU: gradient {'there' if x.grad.any() else 'missing'}")
PY
"$folder/venv/bin/python" -W ignore try.py 2>/dev/null | tee output
grep -q "^loading: NotImplementedError: QuantizationMethod.HQQ is not available yet" output
grep -q "cannot: .*higgs.*hqq" output
grep -q "CPU: gradient there" output
echo "as described"
