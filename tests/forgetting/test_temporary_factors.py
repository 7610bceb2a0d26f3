"""Ways back of what PEFT adapts as a parameter: experts in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

import lora_lens as ll
from lora_lens.tasks.text import LanguageTask
from lora_lens.tasks.tokens import TokenExamples

F = ll.forgetting
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3}
MODELS = {"Mixtral": "MixtralConfig", "Llama4": "Llama4TextConfig"}  # Llama 4's experts are (in, out)
PATHS = [F.WholeUpdate(), F.SmallValues(1), F.FirstComponents(4), F.Intruders(5, 0.7)]


@pytest.fixture(scope="module", params=MODELS)
def experts(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, MODELS[request.param])(**SIZES)
        model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 3 or not torch.isfinite(parameter).all():  # not all are drawn
                    parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def texts() -> TokenExamples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((8,), 12)
    return TokenExamples(torch.randint(64, (96,), generator=generator), lengths, torch.zeros(8).long())


def moved(model: nn.Module, method: object, targets: object) -> nn.Module:
    """An adapted model with random steps in place of training."""
    adapted = ll.attach(model, method, targets=targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapted


def weights_of(adapted: nn.Module) -> dict[str, torch.Tensor]:
    merged = copy.deepcopy(adapted).merge_and_unload()
    return {name: p.detach().clone() for name, p in merged.named_parameters()}


@pytest.mark.parametrize("method", [ll.Window(3, position=0.5), ll.LoRA(3)], ids=str)
def test_experts_in_one_tensor_go_back(experts, texts, method, tmp_path):
    adapted = moved(experts, method, ["all-experts", "q_proj"])
    known = ll.tasks.agreement(experts, texts)
    task = LanguageTask("texts", (), texts, texts)
    back = ll.rewind(adapted, task, known, t=[0, 1], paths=PATHS, progress=False)
    start, end = dict(experts.named_parameters()), weights_of(adapted)
    changed = [name for name in end if not torch.allclose(start[name], end[name], atol=1e-3)]
    assert len(changed) == 3 and sum("experts" in name for name in changed) == 2
    for t in (0, 0.4, 1, 1.2):
        with back.at(t) as there:
            now = weights_of(there)
        for name in end:
            torch.testing.assert_close(
                now[name], start[name] + t * (end[name] - start[name]), atol=2e-6, rtol=0
            )
    whole = back.table[back.table["path"] == str(PATHS[0])].set_index("t")
    assert whole["forgetting"][0] == 0 and whole["loss_rise"][0] < whole["loss_rise"][1]

    batch = texts.batch(torch.arange(4))
    with torch.no_grad():
        trained = adapted(**batch).logits
    for path in PATHS:  # each by its own factors, of several ranks among the experts
        back.export(tmp_path / "point", 0.4, path)
        plain = PeftModel.from_pretrained(copy.deepcopy(experts), tmp_path / "point")
        with back.at(0.4, path) as there:
            assert ll.function_error(plain, there, batch) < 1e-5
            assert not torch.allclose(there(**batch).logits, trained, atol=1e-4)
    torch.testing.assert_close(weights_of(adapted), end, atol=0, rtol=0)


def test_disabled_experts_are_refused(experts, texts):
    adapted = moved(experts, ll.LoRA(2), "all-experts")
    known = ll.tasks.agreement(experts, texts)
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"experts.*\[0\] is disabled: call enable_adapter_layers"):
        ll.rewind(adapted, known, known, progress=False)
