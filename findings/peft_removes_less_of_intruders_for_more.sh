#!/usr/bin/env bash
# PEFT 0.21.2: reduce_intruder_dimension removes less of the intruders the higher mitigation_lambda is.
#
# The docstring calls it the portion that is subtracted: "The higher the value the more of the intruder dimension is
# subtracted". The code adds (mitigation_lambda - 1) times the intruders, as the paper does (arXiv 2410.21228), so
# a share of 1 - mitigation_lambda is subtracted: all of it at 0, none at 1, and a quarter at the default of 0.75.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import copy
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

print("docstring:", "the value the more of the intruder dimension is subtracted" in reduce_intruder_dimension.__doc__)
torch.manual_seed(0)
adapted = get_peft_model(nn.Sequential(nn.Linear(256, 256, bias=False)), LoraConfig(r=1, target_modules=["0"]))
layer = adapted.base_model.model[0]
with torch.no_grad():  # an update far larger than the weight: its one component is the intruder
    layer.lora_B["default"].weight.normal_(std=10)
for value in (0.0, 0.25, 0.75, 1.0):
    reduced = copy.deepcopy(adapted)
    reduce_intruder_dimension(reduced, mitigation_lambda=value, logging_sink=None)
    old, new = (reduced.base_model.model[0].get_delta_weight(name) for name in ("default", "intruder_reduced"))
    print(f"mitigation_lambda {value}: {float((old - new).norm() / old.norm()):.2f} of the update removed")
PYTHON
grep -q "docstring: True" output
grep -q "mitigation_lambda 0.0: 1.00 of the update removed" output
grep -q "mitigation_lambda 0.25: 0.75 of the update removed" output
grep -q "mitigation_lambda 0.75: 0.25 of the update removed" output
grep -q "mitigation_lambda 1.0: 0.00 of the update removed" output
echo "as described"
