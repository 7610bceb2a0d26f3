#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: a forward pass of an adapted parameter decides what later adapters' keys mean.
#
# lora.ParamWrapper (target_parameters) parametrizes its parameter for each pass and takes the parametrization off
# again, which puts the parameter behind the others of its module, also after unload(). The wrappers of two
# parameters of one module lie in each other in the module's order, and the saved keys name only the depth. So an
# adapter of a model on which another was tried and unloaded saves keys that mean the other parameter in a fresh
# model: a size mismatch for Mixtral, and for square experts, as in this small Nemotron-H, another function in
# silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

shared = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2)
mixtral = dict(num_hidden_layers=1, intermediate_size=16, num_local_experts=2)
nemotron = dict(
    layers_block_type=["attention", "moe"], head_dim=8, moe_intermediate_size=32, n_routed_experts=2,
    n_group=1, topk_group=1, moe_shared_expert_intermediate_size=32,
)
x = torch.arange(8)[None]

def pretrained(kind, sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shared, **sizes)).eval()

def adapter(model, parameters, start):
    config = LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=start)
    return get_peft_model(model, config).eval()

for kind, sizes, first in (("mixtral", mixtral, "gate_up_proj"), ("nemotron_h", nemotron, "up_proj")):
    for tried in (False, True):
        model = pretrained(kind, sizes)
        experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
        if tried:
            once = adapter(model, [f"experts.{first}"], True)
            once(x)
            model = once.unload()
        order = [name for name, _ in experts.named_parameters()]
        trained = adapter(model, [f"experts.{first}", "experts.down_proj"], False)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
            meant = trained(x).logits
            trained.save_pretrained("adapter")
            try:
                found = PeftModel.from_pretrained(pretrained(kind, sizes), "adapter").eval()(x).logits
                result = f"same after loading {torch.allclose(found, meant, atol=1e-4)}"
            except RuntimeError as error:
                result = "size mismatch" if "size mismatch" in str(error) else repr(error)
        print(f"{kind}, another tried before {tried}: {' '.join(order)}: {result}")
PYTHON
grep -q "mixtral, another tried before False: gate_up_proj down_proj: same after loading True" output
grep -q "mixtral, another tried before True: down_proj gate_up_proj: size mismatch" output
grep -q "nemotron_h, another tried before False: up_proj down_proj: same after loading True" output
grep -q "nemotron_h, another tried before True: down_proj up_proj: same after loading False" output
echo "as described"
