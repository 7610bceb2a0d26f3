from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_lens as ll

GRID = ll.windows(rank=8, count=9)


@pytest.mark.parametrize("window", GRID, ids=str)
def test_every_window_of_the_grid_leaves_the_function_as_it_is(window, model, source, spectra):
    adapted = ll.attach(model, window, spectra=spectra)
    assert isinstance(adapted, PeftModel)
    assert ll.function_error(adapted, model, source.test.inputs[:256]) < 1e-5


@pytest.mark.parametrize("window", [GRID[0], GRID[4], GRID[8]], ids=str)
@pytest.mark.parametrize("alpha", [None, 1.0, 32.0])
def test_the_adapter_holds_the_window_and_the_base_the_residual(window, alpha, model, spectra):
    adapted = ll.attach(model, window, spectra=spectra, alpha=alpha)
    for name, spectrum in spectra.items():
        layer = adapted.base_model.model.get_submodule(name)
        piece = layer.get_delta_weight("default")
        torch.testing.assert_close(piece, spectrum.component(window), atol=1e-5, rtol=0)
        weight = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(layer.get_base_layer().weight + piece, weight, atol=1e-6, rtol=0)
        left = torch.linalg.norm(layer.get_base_layer().weight.detach().double())
        energy = 1 - spectrum.energy(window)
        assert float(left**2 / torch.linalg.norm(weight.double()) ** 2) == pytest.approx(energy, abs=1e-5)


def test_the_first_window_is_peft_s_own_pissa(model, spectra):
    ours = ll.attach(model, ll.Window.first(8), spectra=spectra, alpha=16)
    config = LoraConfig(r=8, lora_alpha=16, init_lora_weights="pissa", target_modules=list(spectra))
    theirs = get_peft_model(copy.deepcopy(model), config)
    for name in spectra:
        a, b = (m.base_model.model.get_submodule(name) for m in (ours, theirs))
        torch.testing.assert_close(
            a.get_delta_weight("default"), b.get_delta_weight("default"), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(a.get_base_layer().weight, b.get_base_layer().weight, atol=1e-5, rtol=0)


@given(out=st.integers(2, 24), inputs=st.integers(2, 24), alpha=st.floats(0.1, 64), data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_window_of_any_weight_is_exact(out, inputs, alpha, data):
    k = min(out, inputs)
    rank = data.draw(st.integers(1, k))
    window = ll.Window(rank, start=data.draw(st.integers(0, k - rank)))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model = nn.Sequential(nn.Linear(inputs, out), nn.Tanh(), nn.Linear(out, 3))
    adapted = ll.attach(model, window, targets="0", alpha=alpha)
    assert ll.function_error(adapted, model, torch.randn(32, inputs)) < 1e-5


def test_the_caller_s_model_changes_only_when_asked_to(patch_vit):
    before = copy.deepcopy(patch_vit.state_dict())
    for method in (ll.Window.middle(4), ll.LoRA(4), ll.LinearProbe(), ll.FullFineTuning()):
        adapted = ll.attach(patch_vit, method)
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(1)
    assert all(p.requires_grad for p in patch_vit.parameters())
    for name, tensor in patch_vit.state_dict().items():
        assert torch.equal(tensor, before[name])
    inplace = ll.attach(patch_vit, ll.Window.middle(4), inplace=True)
    assert inplace.base_model.model is patch_vit


def trainable(model: nn.Module) -> set[str]:
    return {
        n.split(".lora_")[0].removeprefix("base_model.model.")
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def test_baselines_have_the_same_interface(patch_vit):
    layers = set(ll.spectra(patch_vit))
    assert trainable(ll.attach(patch_vit, ll.Window.last(4))) == layers
    assert trainable(ll.attach(patch_vit, ll.LoRA(4), targets="qkv")) == {
        f"blocks.{b}.attn.qkv" for b in (0, 1)
    }
    assert trainable(ll.attach(patch_vit, ll.LinearProbe())) == set()
    assert trainable(ll.attach(patch_vit, ll.FullFineTuning())) == {
        n for n, _ in patch_vit.named_parameters()
    }


def test_ordinary_lora_starts_at_zero_and_its_seed_decides_a(patch_vit):
    x = torch.randn(4, 1, 28, 28)
    one, same, other = (ll.attach(patch_vit, ll.LoRA(4), seed=s) for s in (0, 0, 1))
    assert ll.function_error(one, patch_vit, x) == 0
    name = "base_model.model.blocks.0.attn.qkv.lora_A.default.weight"
    a, b, c = (m.state_dict()[name] for m in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_attaching_leaves_the_global_random_state_alone(patch_vit):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ll.attach(patch_vit, ll.LoRA(4))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("method", [ll.Window.first(33), ll.LoRA(33)])
def test_a_rank_larger_than_a_weight_s_spectrum_names_it(patch_vit, method):
    with pytest.raises(ValueError, match=r"rank 33 does not fit blocks.0.attn.qkv: its spectrum has 32"):
        ll.attach(patch_vit, method)


def test_a_window_beyond_the_spectrum_names_the_weight(patch_vit):
    with pytest.raises(ValueError, match=r"\[30, 34\) does not fit blocks.0.attn.qkv.*at most 28"):
        ll.attach(patch_vit, ll.Window(4, start=30))


def test_spectra_of_another_model_or_of_before_training_are_refused(patch_vit, spectra):
    own = ll.spectra(patch_vit)
    with torch.no_grad():
        patch_vit.blocks[0].attn.qkv.weight.add_(0.1 * torch.randn(96, 32))
    with pytest.raises(ValueError, match=r"spectrum of blocks.0.attn.qkv is not that of this model"):
        ll.attach(patch_vit, ll.Window.first(4), spectra=own)
    with pytest.raises(ValueError, match="is not that of this model"):
        ll.attach(patch_vit, ll.Window.first(4), spectra=spectra, targets="blocks.0.attn.qkv")


def test_an_adapted_model_is_not_adapted_again(patch_vit):
    adapted = ll.attach(patch_vit, ll.Window.first(4))
    with pytest.raises(ValueError, match="adapted already"):
        ll.attach(adapted, ll.Window.first(4))


def test_other_methods_and_alphas_are_refused(patch_vit):
    with pytest.raises(TypeError, match="expected a Window or another placement"):
        ll.attach(patch_vit, 8)
    with pytest.raises(ValueError, match="alpha must be positive and finite, not 0"):
        ll.attach(patch_vit, ll.Window.first(4), alpha=0)


def test_without_targets_only_what_is_adapted_safely_is_taken_from_the_spectra():
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(
        32, 2, 64
    )  # its attention reads out_proj's weight without calling it
    spectra = ll.spectra(decoder)
    assert set(spectra) == {"self_attn.out_proj", "multihead_attn.out_proj", "linear1", "linear2"}
    adapted = ll.attach(decoder, ll.Window.middle(4), spectra=spectra)
    assert trainable(adapted) == {"linear1", "linear2"}
    with pytest.raises(ValueError, match="none of the spectra is of a layer that is adapted by default"):
        ll.attach(decoder, ll.Window.middle(4), spectra=ll.spectra(decoder, "out_proj"))


def test_a_window_of_zeros_says_that_it_never_learns(patch_vit):
    with torch.no_grad():
        patch_vit.blocks[0].mlp.fc1.weight.zero_()
        patch_vit.blocks[1].mlp.fc1.weight[:, 4:] = 0  # of rank 4
    said = "all components in the window are zero in blocks.0.mlp.fc1, so A and B start at zero"
    with pytest.warns(UserWarning, match=said):
        adapted = ll.attach(patch_vit, ll.Window.first(4), targets="fc1")
    adapted(torch.randn(2, 1, 28, 28)).square().sum().backward()
    moved = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad.any()]
    assert moved and all(".blocks.1." in name for name in moved)
