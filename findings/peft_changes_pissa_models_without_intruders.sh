#!/usr/bin/env bash
# PEFT 0.21.2: reduce_intruder_dimension changes a model with a PiSSA or OLoRA adapter that has no intruders.
#
# It puts its result into a new adapter, which it adds with the config of the old one. So init_lora_weights acts a
# second time: PiSSA takes the largest components out of the base again, out of the residual by now, and OLoRA
# its own. Then the adapter's factors are copied, but the base stays as it is. The report says "No intruders",
# and set_adapter("default"), which the docstring gives as the way back, does not bring the old function back.
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

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(32, 32, bias=False)), torch.randn(8, 32)
with torch.no_grad():  # singular values that fall, as those of trained weights do
    left, _, right = torch.linalg.svd(model[0].weight)
    model[0].weight.copy_(left * torch.logspace(1, -1, 32) @ right)
    for start in (True, "pissa", "olora"):
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules=["0"], init_lora_weights=start)
        )
        changes, said = [], []
        for step in ("before", "reduced", "default again"):
            if step == "reduced":
                reduce_intruder_dimension(adapted, logging_sink=said.append)
            if step == "default again":
                adapted.set_adapter("default")
            changes.append(f"{step} {float((adapted(x) - model(x)).norm() / model(x).norm()):.3f}")
        print(f"{start}: change of the output {', '.join(changes)} ({said[0].split(': ')[1]})")
PYTHON
grep -q "True: change of the output before 0.000, reduced 0.000, default again 0.000 (No intruders)" output
for start in pissa olora; do
    grep -Eq "$start: change of the output before 0.000, reduced (0\.[1-9]|[1-9]).* \(No intruders\)" output
    grep -Eq "$start: .*default again (0\.[1-9]|[1-9]).*" output
done
echo "as described"
