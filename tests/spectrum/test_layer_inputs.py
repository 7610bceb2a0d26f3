from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors.torch import save_model
from torch import nn

import lora_lens as ll
from lora_lens.spectrum import Metric, layer_inputs

WORDS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3, 4]]


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    most = max(map(len, texts))
    ids = torch.tensor([text + [0] * (most - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (most - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_is_no_input_and_every_text_counts_the_same():
    model, name = tiny_models.llama(), "model.layers.1.mlp.down_proj"
    given: list[torch.Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _m, x: given.append(x[0].detach().double()))
    with torch.no_grad():
        for text in WORDS:
            model(torch.tensor([text]))
    hook.remove()
    expected = sum(x[0].T @ x[0] / x.shape[1] for x in given)
    expected *= len(expected) / expected.trace()
    found, _ = layer_inputs.input_metrics(model, [name], Metric(padded(WORDS), shrinkage=0.0))[name]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Flattened(nn.Module):
    """Takes the tokens of all texts as one sequence, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 6), nn.Linear(6, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(input_ids).flatten(0, 1))


def test_padding_is_none_where_a_model_flattens_its_tokens():
    torch.manual_seed(0)
    model = Flattened()
    found, _ = layer_inputs.input_metrics(model, ["fc"], Metric(padded(WORDS), shrinkage=0.0))["fc"]
    tokens = [model.embed.weight.detach()[text].double() for text in WORDS]
    expected = sum(x.T @ x / len(x) for x in tokens)
    torch.testing.assert_close(found, expected * 6 / expected.trace(), rtol=1e-5, atol=1e-6)


def test_layers_are_taken_in_groups_that_fit_in_memory(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), torch.randn(40, 8)
    at_once = ll.spectra(model, metric=x, progress=False)
    monkeypatch.setattr(layer_inputs, "LARGEST", 2 * 64)
    monkeypatch.setattr(layer_inputs, "ROOM", 100)
    assert list(layer_inputs.in_groups(dict.fromkeys("abcde", 8))) == [["a", "b"], ["c", "d"], ["e"]]
    in_groups = ll.spectra(model, metric=x, progress=False)
    assert list(in_groups) == list(at_once)
    for name, spectrum in at_once.items():
        torch.testing.assert_close(in_groups[name].singular_values, spectrum.singular_values)


def test_the_model_is_left_as_it_was(patch_vit):
    patch_vit.train()
    images = torch.randn(4, 1, 28, 28)
    before = {name: value.clone() for name, value in patch_vit.state_dict().items()}
    ll.spectra(patch_vit, metric=images, progress=False)
    assert all(module.training for module in patch_vit.modules())
    assert all(torch.equal(value, before[name]) for name, value in patch_vit.state_dict().items())
    assert not any(module._forward_pre_hooks for module in patch_vit.modules())
    assert all(p.grad is None for p in patch_vit.parameters())


class Attention(nn.Module):
    """PyTorch's attention multiplies by the weight of its output layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.grouped = nn.MultiheadAttention(8, 2), nn.Conv1d(8, 8, 1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(self.attention(x, x, x)[0].mT)


def test_layers_whose_inputs_cannot_be_observed_are_refused_by_name(tmp_path, patch_vit):
    model, x = Attention(), torch.randn(3, 5, 8)
    with pytest.raises(
        ValueError, match=r"no input reached attention\.out_proj: the model makes its output without"
    ):
        ll.spectra(model, "out_proj", metric=x)
    with pytest.raises(
        ValueError, match=r"grouped is a Conv1d, and a metric needs the inputs of an nn.Linear"
    ):
        ll.spectra(model, "grouped", metric=x)
    images = torch.randn(3, 1, 28, 28)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\[q\] is no layer of this model by itself"):
        ll.spectra(patch_vit, split_qkv=True, metric=images)
    with pytest.raises(ValueError, match="embed is a Embedding, and a metric needs"):
        ll.spectra(Flattened(), "embed", metric=padded(WORDS))
    save_model(patch_vit, tmp_path / "vit.safetensors")
    with pytest.raises(
        ValueError, match=r"a metric needs a model that can run, and .*vit.safetensors is a file"
    ):
        ll.spectra(tmp_path / "vit.safetensors", metric=images)
    adapted = ll.attach(patch_vit, ll.LoRA(2), targets="qkv")
    with pytest.raises(ValueError, match=r"a metric needs the inputs of an nn\.Linear"):
        ll.spectra(adapted, "blocks.0.attn.qkv", metric=images)
