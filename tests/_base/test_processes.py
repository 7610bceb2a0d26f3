from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from clean_processes import started

SCRIPT = """
import sys
import torch
from explored import narrow_vit
import lora_lens as ll
from lora_lens._base.processes import accelerator

model = ll.attach(narrow_vit(0), ll.FullFineTuning())
task = ll.tasks.bundled.digits().subset(64, 10)
settings = {"steps": 3, "batch_size": 8, "lr": 1e-2, "warmup": 0.0, "evaluations": 2, "progress": False}
ll.finetune(model, task, weight_decay=0.5, **settings)
forms = {}
for form in ("residual", "offset"):
    forms[form] = ll.attach(narrow_vit(0), ll.Window.middle(4), variant=ll.Variant(base=form))
    ll.finetune(forms[form], task, **settings)
number = torch.tensor([float(accelerator().process_index)])
mean = accelerator().reduce(number, "mean").item()
if accelerator().is_main_process:
    merged = {form: adapted.merge_and_unload().state_dict() for form, adapted in forms.items()}
    found = {"count": accelerator().num_processes, "mean": mean}
    torch.save({"full": model.state_dict()} | merged | found, sys.argv[1])
"""


def trained(folder: Path, name: str, processes: int) -> dict[str, object]:
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    # As torchrun has it; without it, there is one process.
    launched = [started(SCRIPT, folder / name, **(common | rank if processes > 1 else {})) for rank in each]
    for process in launched:
        process.join(600)
    assert [process.exitcode for process in launched] == [0] * processes
    return torch.load(folder / name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> tuple[dict, dict]:
    """By one process and by two."""
    folder = tmp_path_factory.mktemp("trained")
    return trained(folder, "one", 1), trained(folder, "two", 2)


def test_processes_without_a_gpu_find_each_other(states):
    assert [(state["count"], state["mean"]) for state in states] == [(1, 0), (2, 0.5)]


def test_two_processes_leave_alone_what_one_leaves_alone(states):
    """The old head of full fine-tuning gets no gradient, so no weight decay either."""
    one, two = (state["full"] for state in states)
    assert torch.equal(one["head.weight"], two["head.weight"])


@pytest.mark.parametrize("kind", ["full", "residual", "offset"])
def test_two_processes_train_as_one_does(states, kind):
    one, two = (state[kind] for state in states)
    for name, weight in one.items():
        assert weight.numpy() == pytest.approx(two[name].numpy(), abs=2e-3), name
    assert any(not torch.equal(one[name], two[name]) for name in one)  # they did share the batches
