#!/usr/bin/env bash
# PEFT 0.21.2: CorDA cannot be imported where only PEFT and what it requires are installed.
#
# peft/tuners/lora/corda.py takes its dataclass from attr, the package attrs, which neither PEFT nor anything it
# requires installs. In many environments attrs is there for another package's sake, so it goes unnoticed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
try() {
    "$folder/venv/bin/python" -W ignore -c "from peft.tuners.lora.corda import preprocess_corda" 2>&1 | tail -n 1
}
{
    echo "as installed: $(try)"
    "$folder/venv/bin/pip" install --quiet attrs==26.1.0
    echo "with attrs: $(try)"
} | tee output
grep -q "as installed: ModuleNotFoundError: No module named 'attr'" output
grep -q "with attrs: $" output
echo "as described"
