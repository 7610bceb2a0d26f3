#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: a saved LoRA of an Inkling 2 model loads with part of it missing.
#
# transformers keeps renaming rules from the names in released checkpoints to the names in its modules, and
# PEFT applies them to the keys of an adapter when it loads one. The rules are written for released names and
# are not idempotent: the one for Inkling 2 turns "k_sconv.weight_proj", a name that its modules have by now,
# into "k_sconv.weight_proj.weight". So PEFT's own save_pretrained and from_pretrained lose the adapters of
# these layers: B is zero after loading, with a list of missing keys as the only word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null | tee output
import copy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

torch.manual_seed(0)
config = CONFIG_MAPPING["inkling2_text"](
    vocab_size=128, unpadded_vocab_size=128, hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2,
    layer_types=["hybrid_sliding", "hybrid"], num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
    eos_token_id=2,
)
model = AutoModelForCausalLM.from_config(config)
names = [n for n, m in model.named_modules() if n.endswith((".weight_proj", ".q_proj"))]
adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=names))
for name, parameter in adapted.named_parameters():
    if ".lora_B" in name:
        torch.nn.init.constant_(parameter, 0.01)
adapted.save_pretrained("adapter")
again = PeftModel.from_pretrained(model, "adapter")
for name, parameter in again.named_parameters():
    if ".lora_B" in name:
        kind = name.split(".lora_B")[0].split("self_attn.")[1]
        print(kind, "kept" if parameter.abs().sum() > 0 else "LOST")
PYTHON
grep -q "q_proj kept" output
grep -q "k_sconv.weight_proj LOST" output
! grep -q "weight_proj kept" output
echo "as described"
