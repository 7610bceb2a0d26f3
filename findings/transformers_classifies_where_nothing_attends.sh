#!/usr/bin/env bash
# transformers 5.23.0: decoder models for sequence classification find the end of a text by the padding id alone.
#
# LlamaForSequenceClassification and its kin read the class off the last token that is not pad_token_id. The
# attention_mask is not asked. So (1) padding with another id gives the class at a masked token, and (2) where
# the padding id is also the end-of-text id, the end-of-text token of a text that is not padded is passed over,
# though the mask says that it counts. Both give other logits in silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>/dev/null | tee output
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=2, eos_token_id=2)).eval()

def same(ids, mask, other):
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits
        return torch.allclose(found, model(input_ids=torch.tensor([other])).logits, atol=1e-5)

text = [1, 5, 6, 7]
print("padded with its id, as the text alone:", same([*text, 2, 2], [1, 1, 1, 1, 0, 0], text))
print("padded with another id, as the text alone:", same([*text, 9, 9], [1, 1, 1, 1, 0, 0], text))
print("with an end token that counts, as without it:", same([*text, 2], [1, 1, 1, 1, 1], text))
PYTHON
grep -q "padded with its id, as the text alone: True" output
grep -q "padded with another id, as the text alone: False" output
grep -q "an end token that counts, as without it: True" output
echo "as described"
