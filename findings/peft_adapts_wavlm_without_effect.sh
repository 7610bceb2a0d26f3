#!/usr/bin/env bash
# transformers 5.23.0 with PEFT 0.21.2: a LoRA on q_proj and v_proj of WavLM neither acts nor learns.
#
# WavLM's attention hands the weights of q_proj, k_proj and v_proj to torch's multi_head_attention_forward and
# never calls these layers. PEFT replaces them by its own, whose "weight" is the frozen one, so the adapter is
# on no path to the output: whatever its values are, the output is the same to the last bit, and backward
# leaves its tensors without a gradient. Wav2Vec2, with the same names, is as expected.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import torch
from peft import LoraConfig, get_peft_model
from transformers import Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

sizes = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
    conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
for kind, config in ((Wav2Vec2Model, Wav2Vec2Config), (WavLMModel, WavLMConfig)):
    torch.manual_seed(0)
    model, sound = kind(config(**sizes)).eval(), torch.randn(1, 4000)
    before = model(sound).last_hidden_state.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.normal_()
    after = adapted(sound).last_hidden_state
    if after.requires_grad:
        after.square().sum().backward()
    learning = sum(p.grad is not None for p in trainable.values())
    same = torch.equal(before, after)
    print(f"{kind.__name__}: output unchanged {same}, {learning} of {len(trainable)} adapter tensors with a gradient")
PYTHON
grep -q "Wav2Vec2Model: output unchanged False, 8 of 8" output
grep -q "WavLMModel: output unchanged True, 0 of 8" output
echo "as described"
