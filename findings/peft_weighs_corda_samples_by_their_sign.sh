#!/usr/bin/env bash
# PEFT 0.21.2: CorDA scales each sample by its largest entry, not by the largest in size: signs decide what counts.
#
# The covariance of a layer's inputs is summed over calls, and each call's inputs are divided by
# torch.max(input).abs(). That bounds them by 1 only if the largest entry is also the largest in size. Where all
# entries are negative, as in log-probabilities, it is the one nearest to zero: one sample that holds a confident
# token has nearly all of the covariance, though the same samples with the other sign all count. A sample whose largest
# entry is zero, as after -relu(x), is refused as invalid.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 attrs==26.1.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

torch.manual_seed(0)
layer = nn.Sequential(nn.Linear(8, 8))
calibration = CordaConfig(corda_method="kpm", prune_temporary_fields=False)
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda", corda_config=calibration)

def covariance(samples):
    preprocess_corda(layer, config, run_model=lambda: [layer(sample[None]) for sample in samples])
    return layer[0].covariance_matrix

scores = torch.randn(10, 50, 8)
scores[3, 0] = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])  # one of 50 tokens is confident
samples = scores.log_softmax(-1)
for name, x in (("log-probabilities", samples), ("the same, negated", -samples)):
    share = covariance(x[3:4]).trace() / 10 / covariance(x).trace()
    squares = x[3].square().sum() / x.square().sum()
    print(f"{name}: sample 3 of 10 has {float(squares):.2f} of the squares and {float(share):.2f} of the covariance")
try:
    covariance(-torch.randn(10, 50, 8).relu())
except ValueError as error:
    print("-relu(x):", error)
print("relu(x):", "finite" if covariance(torch.randn(10, 50, 8).relu()).isfinite().all() else "not finite")
PYTHON
grep -Eq "log-probabilities: sample 3 of 10 has 0\.1[0-9] of the squares and (0\.9[0-9]|1\.00) of" output
grep -Eq "the same, negated: sample 3 of 10 has 0\.1[0-9] of the squares and 0\.[01][0-9] of" output
grep -q -e "-relu(x): Invalid value found in input" output
grep -q "^relu(x): finite" output
echo "as described"
