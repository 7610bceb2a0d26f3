#!/usr/bin/env bash
# PEFT 0.21.2: a LoRA on nn.MultiheadAttention applies the update of out_proj twice, in forward and in merging.
#
# The layer around nn.MultiheadAttention merges its adapters into in_proj_weight and out_proj before it calls
# torch's function. out_proj has a LoRA layer of its own inside, and both merge the same scaling * B @ A. So the
# trained function belongs to base + 2 * scaling * B @ A. Whoever reads the update from the saved factors (to
# take its spectrum, to convert the adapter for another program) has half of it; in_proj counts once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null | tee output
import copy
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]

torch.manual_seed(0)
base, x = Attention().eval(), torch.randn(2, 5, 16)
adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["attn"])).eval()
factors = {name.split(".")[-3]: p for name, p in adapted.named_parameters() if "out_proj.lora" in name}
with torch.no_grad():
    factors["lora_B"].normal_(std=0.3)
    update = 8 / 4 * factors["lora_B"] @ factors["lora_A"]
    for times in (1, 2):
        by_hand = copy.deepcopy(base)
        by_hand.attn.out_proj.weight += times * update
        same = torch.allclose(by_hand(x), adapted(x), atol=1e-5)
        print(f"forward is that of {times} x the update: {same}")
    merged = copy.deepcopy(adapted).merge_and_unload().attn.out_proj.weight - base.attn.out_proj.weight
    print("merged / update:", round(float(merged.norm() / update.norm()), 3))
PYTHON
grep -q "forward is that of 1 x the update: False" output
grep -q "forward is that of 2 x the update: True" output
grep -q "merged / update: 2.0" output
echo "as described"
