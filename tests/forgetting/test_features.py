from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from small_language import small
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_lens as ll
from lora_lens.forgetting.features import FeatureSplit, patch_grid, splittable
from lora_lens.spectrum.window import Placement
from lora_lens.tasks.readouts import features_of


class Layers(nn.Module):
    """A linear layer between others, which a bias and dropout must not disturb."""

    def __init__(self, rows: int = 6, columns: int = 9):
        super().__init__()
        self.before, self.fc, self.unused = (
            nn.Dropout(0.5),
            nn.Linear(columns, rows),
            nn.Linear(columns, rows),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.before(x))


def made(rows: int, columns: int, seed: int = 0) -> tuple[Layers, ll.Spectrum]:
    torch.manual_seed(seed)
    model = Layers(rows, columns)
    return model, ll.spectra(model, "fc", progress=False)["fc"]


@st.composite
def cases(draw) -> tuple[int, int, Placement, int]:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    k = min(rows, columns)
    rank = draw(st.integers(1, k))
    chosen = draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=k, unique=True))
    rules: list[Placement] = [ll.Window(rank, position=draw(st.floats(0, 1)))]
    rules += [ll.spectrum.Components(tuple(chosen)), ll.spectrum.SpreadComponents(rank)]
    return rows, columns, draw(st.sampled_from(rules)), draw(st.integers(0, 2**16))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_window_and_residual_share_the_energy_and_add_up_to_the_product(case):
    rows, columns, placement, seed = case
    model, spectrum = made(rows, columns, seed)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(seed))
    split = ll.forgetting.feature_split(model, "fc", spectrum, placement, x)
    product = x @ model.fc.weight.T.detach()
    torch.testing.assert_close(split.window + split.residual, product)
    torch.testing.assert_close(split.window, x @ spectrum.component(placement).T, atol=1e-5, rtol=1e-4)
    energy = split.window_norms.square() + split.residual_norms.square()
    torch.testing.assert_close(energy, product.square().sum(-1))
    # Compared before the division: where the product nearly vanishes, rounding is a large share of it.
    most = x.square().sum(-1) * model.fc.weight.detach().square().sum()
    assert ((split.position_shares * energy - split.window_norms.square()).abs() <= 1e-5 * most).all()


def test_the_split_of_a_transformer_s_layer_is_that_of_what_it_was_given(model, source, spectra):
    images, name, window = source.test.inputs[:4], "blocks.2.mlp.fc1", ll.Window.first(8)
    split = ll.forgetting.feature_split(model, name, spectra[name], window, images)
    layer = model.get_submodule(name)
    with torch.no_grad(), features_of(layer) as features:
        model(images)
        product = features[0] @ layer.weight.T
    assert split.layer == name and split.window.shape == (4, 16, 384) and split.window.dtype == torch.float32
    torch.testing.assert_close(split.window + split.residual, product)
    shares = split.window.square().sum((1, 2)) / product.square().sum((1, 2))
    torch.testing.assert_close(split.shares, shares)
    assert split.position_shares.shape == (4, 16)


def test_the_energy_is_shared_in_a_metric_as_well():
    model, x = Layers(), torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(1))
    spectrum, window = ll.spectra(model, "fc", metric=x, progress=False)["fc"], ll.Window.middle(2)
    split = ll.forgetting.feature_split(model, "fc", spectrum, window, x)
    product = x @ model.fc.weight.detach().T
    torch.testing.assert_close(split.window + split.residual, product, rtol=0, atol=1e-5)
    whole = split.window_norms.square() + split.residual_norms.square()
    torch.testing.assert_close(whole, product.square().sum(-1), rtol=1e-4, atol=1e-6)
    energies = ll.forgetting.feature_energies(model, "fc", spectrum, x)
    torch.testing.assert_close(energies.norms(window).shares, split.shares, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, spectrum = made(6, 9)
    model.train()
    model.before.eval()
    weights = [p.clone() for p in model.parameters()]
    split = ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(2), torch.ones(2, 9))
    assert model.training and not model.before.training and not model.fc._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not split.window.requires_grad


def test_inputs_without_positions_count_as_one_and_more_dimensions_as_many():
    model, spectrum = made(6, 9)
    flat, grid = torch.randn(5, 9), torch.randn(5, 2, 4, 9)
    assert ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(2), flat).window.shape == (
        5,
        1,
        6,
    )
    split = ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(2), grid)
    together = ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(2), grid.reshape(5, 8, 9))
    assert torch.equal(split.window, together.window) and split.window.shape == (5, 8, 6)


def test_a_language_model_s_layers_are_split_from_keyword_arguments():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8)).eval()
    name = "transformer.h.0.attn.c_attn"
    spectrum = ll.spectra(gpt, name, progress=False)[name]
    words = {"input_ids": torch.arange(10).reshape(2, 5)}
    split = ll.forgetting.feature_split(gpt, name, spectrum, ll.Window.middle(4), words)
    assert isinstance(gpt.get_submodule(name), Conv1D) and split.window.shape == (2, 5, 48)
    whole = ll.forgetting.feature_split(gpt, name, spectrum, ll.Window.first(16), words)
    torch.testing.assert_close(whole.window, split.window + split.residual)


def test_padding_has_no_share_and_changes_none():
    model, name = small("bert"), "encoder.layer.1.intermediate.dense"
    spectrum = ll.spectra(model, name, progress=False)[name]
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    split = ll.forgetting.feature_split(
        model, name, spectrum, ll.Window.middle(4), {"input_ids": ids, "attention_mask": mask}
    )
    alone = ll.forgetting.feature_split(
        model, name, spectrum, ll.Window.middle(4), {"input_ids": ids[1:, :2]}
    )
    assert not split.position_shares[1, 2:].any() and split.position_shares[0].all()
    torch.testing.assert_close(split.position_shares[1, :2], alone.position_shares[0])
    torch.testing.assert_close(split.shares[1:], alone.shares)


def test_the_layers_of_a_text_model_are_split_by_tokens_and_its_pooler_by_texts():
    model = small("bert")
    names = ["encoder.layer.0.attention.self.query", "pooler.dense", "embeddings.word_embeddings"]
    assert splittable(model, names, {"input_ids": torch.ones(3, 7, dtype=torch.long)}) == {
        names[0]: 7,
        names[1]: 1,
    }


def test_weights_in_half_precision_are_split_in_float32():
    model, _ = made(6, 9)
    model.bfloat16()
    spectrum = ll.spectra(model, "fc", progress=False)["fc"]
    x = torch.randn(2, 3, 9).bfloat16()
    split = ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(2), x)
    assert split.window.dtype == split.residual.dtype == torch.float32
    torch.testing.assert_close(split.window + split.residual, x.float() @ model.fc.weight.float().T)


def test_no_features_have_no_share():
    nothing = FeatureSplit("layer", torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert not nothing.shares.any() and not nothing.position_shares.any()


def test_layers_that_multiply_no_positions_are_refused(patch_vit, model, spectra, source):
    images = source.test.inputs[:2]
    convolution = ll.spectra(patch_vit, "all-conv", progress=False)["patch_embed.proj"]
    window, one = ll.Window.first(4), spectra["blocks.0.attn.qkv"]
    with pytest.raises(ValueError, match=r"patch_embed.proj is a torch Conv2d, .* nn.Linear"):
        ll.forgetting.feature_split(patch_vit, "patch_embed.proj", convolution, window, images)
    adapted = ll.attach(model, window, spectra=spectra).get_base_model()
    with pytest.raises(ValueError, match=r"is a peft Linear, .* of a pretrained model"):
        ll.forgetting.feature_split(adapted, "blocks.0.attn.qkv", one, window, images)
    with pytest.raises(ValueError, match="has no layer 'nothing'"):
        ll.forgetting.feature_split(model, "nothing", one, window, images)


def test_layers_that_are_not_called_or_mix_the_batch_are_refused():
    class Mixing(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(0, 1))

    model, spectrum = made(6, 9)
    other = ll.spectra(model, "unused", progress=False)["unused"]
    with pytest.raises(ValueError, match="without calling unused"):
        ll.forgetting.feature_split(model, "unused", other, ll.Window.first(2), torch.ones(2, 9))
    mixing = Mixing(6, 9)
    mixing.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"shape \(6, 9\) for a batch of 2"):
        ll.forgetting.feature_split(mixing, "fc", spectrum, ll.Window.first(2), torch.ones(2, 3, 9))
    assert splittable(mixing, ["fc", "before", "unused"], torch.ones(2, 3, 9)) == {}
    assert splittable(model, ["fc", "before", "unused"], torch.ones(2, 3, 9)) == {"fc": 3}


def test_spectra_of_another_weight_and_windows_that_do_not_fit_are_refused():
    model, spectrum = made(6, 9)
    x = torch.ones(2, 9)
    turned = replace(spectrum, left=spectrum.left.flip(0))
    for wrong in (made(6, 9, seed=1)[1], made(6, 8)[1], turned):
        with pytest.raises(ValueError, match="spectrum of fc is not that of this model"):
            ll.forgetting.feature_split(model, "fc", wrong, ll.Window.first(2), x)
    with pytest.raises(ValueError, match="rank 7 does not fit fc"):
        ll.forgetting.feature_split(model, "fc", spectrum, ll.Window.first(7), x)
    values = ll.spectra(model, "fc", vectors=False, progress=False)["fc"]
    with pytest.raises(ValueError, match="no singular vectors"):
        ll.forgetting.feature_split(model, "fc", values, ll.Window.first(2), x)


def test_tokens_form_a_square_after_those_that_lead():
    assert patch_grid(16) == (0, 4) and patch_grid(197) == (1, 14) and patch_grid(1) == (0, 1)
    assert patch_grid(21, prefix=5) == (5, 4)
    for positions, prefix in ((7, None), (16, 1), (1, 1), (0, None)):
        with pytest.raises(ValueError, match=f"{positions} positions are no square"):
            patch_grid(positions, prefix)


def test_experts_in_one_tensor_are_no_layers():
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model, texts = MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(20, (2, 5))}
    spectra = ll.spectra(model, ["q_proj", "all-experts"], progress=False)
    query, expert = spectra["model.layers.0.self_attn.q_proj"].name, list(spectra)[1]
    assert expert.endswith("experts.gate_up_proj[0]")
    assert splittable(model, spectra, texts) == {query: 5}  # so an explorer offers the others
    for call in (
        lambda: ll.forgetting.feature_split(model, expert, spectra[expert], ll.Window.first(2), texts),
        lambda: ll.forgetting.feature_energies(model, expert, spectra[expert], texts),
    ):
        with pytest.raises(ValueError, match=r"gate_up_proj\[0\] is no layer but .* an expert of many"):
            call()


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_quantized_layers_are_split_as_the_matrix_that_they_multiply_by(kind):
    pytest.importorskip(kind)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    else:
        from bitsandbytes.nn import Linear4bit

        four_bits = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
        four_bits.load_state_dict(model[0].state_dict())
        model[0] = four_bits.to("cpu")
    spectra = ll.spectra(model, "0", progress=False)
    x, window = torch.randn(5, 64), ll.Window.first(4)
    split = ll.forgetting.feature_split(model, "0", spectra["0"], window, x)
    with torch.no_grad():
        product = model[0](x) - model[0].bias
    torch.testing.assert_close((split.window + split.residual)[:, 0], product, atol=1e-4, rtol=1e-4)
    energies = ll.forgetting.feature_energies(model, "0", spectra["0"], x)
    torch.testing.assert_close(energies.norms(window).shares, split.shares, atol=1e-4, rtol=1e-4)
    assert splittable(model, ["0"], x) == {"0": 1}
