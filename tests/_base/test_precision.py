from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lora_lens as ll

# torch reads this once, when it starts, and then holds the processor to be of that kind.
CAPABILITY = "ATEN_CPU_CAPABILITY"


@pytest.mark.parametrize("kind", ["default", "avx2"])
def test_a_processor_without_units_for_bfloat16_is_given_float32(kind):
    script = "import lora_lens as ll; print(ll.training.fastest_precision())"
    found = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {CAPABILITY: kind}, capture_output=True, text=True
    )
    assert found.stdout == "float32\n"


def test_it_is_a_precision_that_can_be_asked_for():
    precision = ll.training.fastest_precision()
    assert ll.Training(precision=precision).precision == precision
    assert (precision == "bfloat16") == ("AVX512" in torch.backends.cpu.get_cpu_capability())
