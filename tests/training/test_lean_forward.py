from __future__ import annotations

import copy

import pytest
import torch
from small_regularizers import disturbed
from torch import nn

import lora_lens as ll
from lora_lens.tasks.readouts import ask
from lora_lens.training.lean_forward import lean_layers
from lora_lens.training.loop import set_training_mode

SOME = "blocks.[05].*"
METHODS = [ll.Window.first(4), ll.Window.middle(8), ll.LoRA(4)]


def changed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def gradients(adapted: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    adapted.zero_grad()
    adapted(images).square().sum().backward()
    return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"alpha": 3.0, "variant": ll.Variant(rslora=True)}], ids=str)
def test_outputs_and_gradients_are_peft_s(method, settings, model, spectra, source):
    adapted = disturbed(ll.attach(model, method, targets=SOME, spectra=spectra, **settings))
    images = source.test.inputs[:16]
    expected, outputs = gradients(adapted, images), adapted(images)
    with lean_layers(adapted, "float32"):
        assert len(changed(adapted)) == len(ll.spectrum.target_layers(model, SOME))
        torch.testing.assert_close(adapted(images), outputs, rtol=1e-4, atol=1e-4)
        found = gradients(adapted, images)
        with torch.inference_mode():
            torch.testing.assert_close(adapted(images), outputs.detach(), rtol=1e-4, atol=1e-4)
    assert not changed(adapted) and torch.equal(adapted(images), outputs)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4


def test_ten_steps_are_those_of_a_plain_loop_over_peft_s_layers(model, spectra, digits, source):
    config = ll.Training(steps=10, batch_size=16, evaluations=11, lr=1e-2, warmup=0.0)
    tasks = digits.first(200, 50), source.first(200, 50)
    run = ll.finetune(ll.attach(model, ll.Window.middle(4), spectra=spectra), *tasks, config, progress=False)
    adapted = ll.attach(model, ll.Window.middle(4), spectra=spectra)
    readout = tasks[0].new_readout(adapted, 0)
    parameters = [p for p in [*adapted.parameters(), *readout.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    set_training_mode(adapted)
    losses = []
    for rows, _ in zip(tasks[0].train.shuffled(16, 0), range(10), strict=False):
        loss = nn.functional.cross_entropy(*ask(readout, adapted, tasks[0].train, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert run.curve["loss"].tolist()[1:] == pytest.approx(losses, rel=1e-4)


def test_one_factor_alone_is_trained_as_peft_does(model, source):
    variant = ll.Variant(train="A", split="A")
    adapted = disturbed(ll.attach(model, ll.Window.last(4), targets=SOME, variant=variant))
    expected = gradients(adapted, source.test.inputs[:8])
    with lean_layers(adapted, "float32"):
        found = gradients(adapted, source.test.inputs[:8])
    assert found.keys() == expected.keys() and all("lora_A" in name for name in found)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        "dropout",
        "dora",
        "bfloat16 run",
        "half base",
        "hook inside",
        "compiled",
        "other adapter",
        "trained base",
    ],
)
def test_whatever_peft_heeds_stays_peft_s(change, model):
    variant = {"dropout": ll.Variant(dropout=0.1), "dora": ll.Variant(dora=True)}.get(change)
    base = copy.deepcopy(model).bfloat16() if change == "half base" else model
    adapted = ll.attach(base, ll.LoRA(4), targets="blocks.0.mlp.fc1", variant=variant)
    layer = adapted.get_submodule("base_model.model.blocks.0.mlp.fc1")
    if change == "hook inside":
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    if change == "compiled":
        layer.compile()
    if change == "other adapter":
        adapted.add_adapter("other", copy.deepcopy(adapted.peft_config["default"]))
        adapted.set_adapter("other")
    if change == "trained base":
        layer.base_layer.bias.requires_grad_(True)
    with lean_layers(adapted, "bfloat16" if change == "bfloat16 run" else "float32"):
        assert not changed(adapted)


def test_a_merged_or_disabled_adapter_is_heeded_while_it_lasts(model, source):
    images = source.test.inputs[:4]
    adapted = disturbed(ll.attach(model, ll.LoRA(4), targets=SOME)).eval()
    with torch.no_grad(), lean_layers(adapted, "float32"):
        trained = adapted(images)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(images), model(images))
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(images), trained, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()


def test_layers_are_peft_s_again_after_an_error(model):
    adapted = ll.attach(model, ll.LoRA(4), targets=SOME)
    with pytest.raises(ZeroDivisionError), lean_layers(adapted, "float32"):
        assert changed(adapted)
        raise ZeroDivisionError
    assert not changed(adapted)
