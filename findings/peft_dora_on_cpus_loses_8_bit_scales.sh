#!/usr/bin/env bash
# PEFT 0.21.2 with bitsandbytes 0.50.2: a DoRA on 8-bit layers fails on CPUs in its second forward pass.
#
# A pass of bitsandbytes' Linear8bitLt moves the scales (SCB) from its weight to its state. DoRA then asks PEFT's
# dequantize_module_weight for the weight, which on a CPU puts weight.to("cpu") in its place: a new weight that
# bitsandbytes takes for one freshly quantized, and it replaces the scales in the state by those of the new
# weight, which has none. The second pass multiplies by None. The same happens to any layer that was called and is
# then given to dequantize_module_weight; LoRA, which does not ask for the weight, works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$folder"
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("saved")
for dora in (False, True):
    model = LlamaForCausalLM.from_pretrained(
        "saved", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    for number in (1, 2):
        try:
            finite = bool(adapted(torch.arange(8)[None]).logits.isfinite().all())
            result = f"finite {finite}"
        except AttributeError as error:
            result = f"AttributeError: {error}"
        print(f"{'DoRA' if dora else 'LoRA'} on {type(layer).__name__}, pass {number}: {result}")
    print("scales kept:", layer.state.SCB is not None)
PYTHON
grep -q "LoRA on Linear8bitLt, pass 2: finite True" output
grep -q "DoRA on Linear8bitLt, pass 1: finite True" output
grep -q "DoRA on Linear8bitLt, pass 2: AttributeError: 'NoneType' object has no attribute" output
[ "$(grep "scales kept" output | tr '\n' ' ')" = "scales kept: True scales kept: False " ]
echo "as described"
