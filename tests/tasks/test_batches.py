from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from clean_processes import started
from small_language import byte_tokenizer, part_of, small
from torch import nn

import lora_lens as ll
from lora_lens.tasks import batches
from lora_lens.tasks.batches import in_batches
from lora_lens.tasks.tokens import TokenExamples

# A vocabulary of 50,000, whose logits for 2,048 tokens take 0.4 GB, and as much for every copy of them.
UNDER_A_CAP = """
import resource
import sys
import torch
from small_language import byte_tokenizer, part_of, small
import lora_lens as ll
from lora_lens.tasks import batches

model = small("llama", vocabulary=50_000)
task = ll.tasks.language_task(part_of("movies", 4, 80), byte_tokenizer(), block=128).first(test=16)
ll.evaluate(model, task.first(test=1))  # what a first pass loads is no part of what follows
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
cap = 1024 * used + 630_000_000
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
try:
    with torch.inference_mode():
        ids = task.test.batch(torch.arange(16))["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        lines = [str(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))]
except RuntimeError as error:
    lines = [error.args[0].splitlines()[0]]
for batches.LARGEST in (batches.LARGEST // 3, 2**62):  # measured, and halved
    lines.append(str(len(ll.evaluate(model, task).losses)))
open(sys.argv[1], "w").write("\\n".join(lines))
"""


def sizes(model: nn.Module, examples: ll.Examples) -> list[int]:
    with torch.inference_mode():
        return [len(rows) for rows, _ in in_batches(model, examples, lambda r: model(examples.batch(r)))]


def sizes_of_tokens(model: nn.Module, examples: TokenExamples) -> list[int]:
    with torch.inference_mode():
        return [len(rows) for rows, _ in in_batches(model, examples, lambda r: model(**examples.batch(r)))]


def test_the_embedded_vision_model_has_the_batches_of_the_stored_results(model, source, digits):
    for task in (source, digits):
        assert sizes(model, task.test.first(600)) == [500, 100]


def test_a_language_model_of_smollm2_s_vocabulary_has_the_batches_of_the_stored_results():
    task = ll.tasks.language_task(part_of("movies", 4, 100), byte_tokenizer(), block=128).first(test=17)
    assert sizes_of_tokens(small("llama", vocabulary=49_152), task.test) == [16, 1]  # of 2048 tokens


def test_the_largest_tensor_of_a_batch_stays_within_the_limit(monkeypatch):
    resnet = timm.create_model("resnet18", num_classes=2).eval()
    images = ll.Examples(torch.rand(7, 3, 64, 64), torch.arange(7) % 2)
    task = ll.Task("squares", ("a", "b"), images, images)
    whole = ll.evaluate(resnet, task)
    monkeypatch.setattr(batches, "LARGEST", 5 * 64 * 32 * 32)  # of the first convolution's outputs
    assert sizes(resnet, images) == [5, 2]
    assert np.allclose(ll.evaluate(resnet, task).losses, whole.losses, atol=1e-5)
    monkeypatch.setattr(batches, "LARGEST", 1)
    assert sizes(resnet, images) == [1] * 7


def test_inputs_count_as_well(monkeypatch):
    wide = ll.Examples(torch.rand(10, 1000), torch.zeros(10, dtype=torch.long))
    monkeypatch.setattr(batches, "LARGEST", 4000)
    assert sizes(nn.Linear(1000, 2), wide) == [4, 4, 2]


def test_a_large_vocabulary_takes_fewer_tokens_at_once(monkeypatch):
    task = ll.tasks.language_task(part_of("tweets", 10, 40), byte_tokenizer(), block=16)
    model = small("llama", vocabulary=1000)
    expected = ll.evaluate(model, task).losses
    monkeypatch.setattr(batches, "LARGEST", 50 * 1000)  # the logits of three blocks
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _given, logits: seen.append(logits.numel()))
    found = ll.evaluate(model, task).losses
    assert max(seen) == 3 * 16 * 1000 and np.allclose(found, expected, atol=1e-5)


def test_a_compiled_model_is_not_compiled_for_one_example(source):
    runs = []

    def counted(graph: torch.fx.GraphModule, _example: list[torch.Tensor]):
        runs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), backend=counted)
    assert sizes(compiled, source.test.first(20)) == [20] and len(runs) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the cap needs Linux")
def test_what_would_not_fit_in_memory_is_evaluated_in_smaller_batches(tmp_path):
    process = started(UNDER_A_CAP, tmp_path / "found")
    process.join()
    assert process.exitcode == 0
    as_one_batch, *numbers = (tmp_path / "found").read_text().splitlines()
    assert "can't allocate memory" in as_one_batch
    assert numbers == [str(16 * 127)] * 2


def test_what_does_not_fit_alone_is_told():
    def never(rows: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="80"):
        list(in_batches(nn.Linear(2, 2), ll.Examples(torch.zeros(4, 2), torch.zeros(4).long()), never))
