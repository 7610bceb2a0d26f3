"""How an adapter is built: variants, precision, and PEFT's own starts beside ours."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_lens as ll

VARIANTS = (
    ll.Variant(rslora=True),
    ll.Variant(dora=True),
    ll.Variant(split="A"),
    ll.Variant(split="B", dora=True, rslora=True),
    ll.Variant(train="A", split="A"),
    ll.Variant(train="B"),
    ll.Variant(dtype=torch.float64),
)


def layers(adapted: nn.Module) -> dict[str, nn.Module]:
    base = adapted.get_base_model()
    return {name: base.get_submodule(name) for name in adapted.attachment.starts}


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_starts_from_the_pretrained_function(variant, alpha, model, source, spectra):
    adapted = ll.attach(model, ll.Window.first(8), spectra=spectra, alpha=alpha, variant=variant)
    assert ll.function_error(adapted, model, source.test.inputs[:32]) < 1e-5


def test_rslora_divides_alpha_by_the_root_of_the_rank(model, spectra):
    settings = {"spectra": spectra, "variant": ll.Variant(rslora=True)}
    assert set(ll.summary(ll.attach(model, ll.Window.first(16), alpha=8, **settings))["scaling"]) == {2.0}
    assert set(ll.summary(ll.attach(model, ll.Window.first(16), **settings))["scaling"]) == {4.0}


@pytest.mark.parametrize("alpha", [None, 32])
def test_the_split_decides_which_factor_holds_the_singular_values(alpha, model, spectra):
    window = ll.Window.first(4)
    for split in ("balanced", "A", "B"):
        adapted = ll.attach(model, window, spectra=spectra, alpha=alpha, variant=ll.Variant(split=split))
        for name, layer in layers(adapted).items():
            values = (spectra[name].singular_values[:4] / layer.scaling["default"]).float()
            a = torch.linalg.norm(layer.lora_A["default"].weight, dim=1)
            b = torch.linalg.norm(layer.lora_B["default"].weight, dim=0)
            expected = {"balanced": (values.sqrt(),) * 2, "A": (values, values**0), "B": (values**0, values)}
            torch.testing.assert_close((a, b), expected[split], rtol=1e-5, atol=0)


def test_the_split_changes_how_far_a_step_moves_the_weight(model, digits, spectra):
    batch = digits.train.first(16)
    moved = {}
    for split in ("balanced", "A", "B"):
        variant = ll.Variant(split=split)
        adapted = ll.attach(model, ll.Window.last(8), spectra=spectra, variant=variant)
        before = {name: layer.get_delta_weight("default").detach() for name, layer in layers(adapted).items()}
        step = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        nn.functional.cross_entropy(adapted(batch.inputs), batch.labels).backward()
        step.step()
        steps = [layer.get_delta_weight("default") - before[name] for name, layer in layers(adapted).items()]
        moved[split] = float(sum(s.detach().square().sum() for s in steps).sqrt())
    # One orthonormal factor passes the other's whole gradient on; two small factors pass little.
    assert moved["A"] > 3 * moved["balanced"] and moved["B"] > 3 * moved["balanced"]


@pytest.mark.parametrize(("train", "fixed"), [("A", "lora_B"), ("B", "lora_A")])
def test_a_factor_that_is_not_trained_stays(train, fixed, model, digits, source, spectra):
    variant = ll.Variant(train=train, split=train)
    adapted = ll.attach(model, ll.Window.last(8), spectra=spectra, variant=variant)
    adapted.set_adapter("default")  # PEFT makes everything trainable there, unless told
    names = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert names and not any(fixed in name for name in names)
    before = {n: p.clone() for n, p in adapted.named_parameters()}
    ll.finetune(adapted, digits.first(64, 10), source.first(1, 10), steps=3, progress=False)
    for name, now in adapted.named_parameters():
        assert torch.equal(now, before[name]) == (name not in names), name


def test_dropout_over_a_window_is_warned_about_and_over_lora_is_not(patch_vit):
    with pytest.warns(UserWarning, match=r"dropout=0.1 also drops inputs of the pretrained components"):
        adapted = ll.attach(patch_vit, ll.Window.first(8), variant=ll.Variant(dropout=0.1))
    x = torch.randn(4, 1, 28, 28)
    assert ll.function_error(adapted, patch_vit, x) < 1e-5
    adapted.train(), patch_vit.eval()
    assert float((adapted(x) - patch_vit(x)).detach().abs().max()) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.attach(patch_vit, ll.LoRA(4), variant=ll.Variant(dropout=0.1))


def test_variants_without_sense_are_refused(patch_vit):
    for settings, message in (
        ({"split": "C"}, "split must be one of 'balanced', 'A', 'B', not 'C'"),
        ({"train": "none"}, "train must be one of 'both', 'A', 'B', not 'none'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dtype": torch.int8}, "dtype must be a floating one, not torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            ll.Variant(**settings)
    for variant in (ll.Variant(split="A"), ll.Variant(train="A")):
        with pytest.raises(ValueError, match=r"ordinary LoRA starts at B = 0"):
            ll.attach(patch_vit, ll.LoRA(4), variant=variant)


# Rounding the residual to the base's dtype costs each weight up to eps / 2 of itself; outputs gather
# the errors of some thirty layers and the rounding of their own activations.
@pytest.mark.parametrize(
    ("dtype", "of_weights", "of_outputs"),
    [(torch.float32, 1e-7, 1e-5), (torch.bfloat16, 2.0**-8, 0.05), (torch.float16, 2.0**-11, 0.01)],
    ids=str,
)
@pytest.mark.parametrize("window", ll.windows(8, 3), ids=str)
def test_the_error_at_the_start_is_that_of_the_base_s_dtype(
    window, dtype, of_weights, of_outputs, model, source
):
    base = copy.deepcopy(model).to(dtype)
    adapted = ll.attach(base, window, alpha=12)
    table = ll.summary(adapted)
    assert set(table["base_dtype"]) == {str(dtype).removeprefix("torch.")}
    assert set(table["adapter_dtype"]) == {"float32"}
    assert table["start_error"].max() < of_weights
    assert ll.function_error(adapted, base, source.test.inputs[:32].to(dtype)) < of_outputs


def test_the_residual_makes_up_for_the_rounding_of_half_precision_factors(model):
    base = copy.deepcopy(model).double()
    adapted = ll.attach(base, ll.Window.first(8), variant=ll.Variant(dtype=torch.bfloat16))
    assert set(ll.summary(adapted)["adapter_dtype"]) == {"bfloat16"}
    assert ll.summary(adapted)["start_error"].max() < 1e-12


def test_the_last_window_is_milora(model, spectra):
    ours = ll.attach(model, ll.Window.last(8), spectra=spectra)
    for name, layer in layers(ours).items():
        u, s, v = torch.linalg.svd(model.get_submodule(name).weight.detach().double(), full_matrices=False)
        minor = (u[:, -8:] * s[-8:]) @ v[-8:]
        torch.testing.assert_close(layer.get_delta_weight("default").double(), minor, atol=1e-5, rtol=0)
        principal = (u[:, :-8] * s[:-8]) @ v[:-8]
        torch.testing.assert_close(layer.get_base_layer().weight.double(), principal, atol=1e-5, rtol=0)


def test_mica_s_frozen_b_is_our_last_left_vectors(model, spectra):
    ours = ll.attach(model, ll.Window.last(8), spectra=spectra, variant=ll.Variant(split="A", train="A"))
    config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="mica", target_modules=list(spectra))
    theirs = get_peft_model(copy.deepcopy(model), config)
    for name, layer in layers(ours).items():
        mine = layer.lora_B["default"].weight.detach()
        other = theirs.get_base_model().get_submodule(name).lora_B["default"].weight.detach()
        cosines = torch.linalg.svdvals(mine.T @ other)  # of the angles between the spans
        torch.testing.assert_close(cosines, torch.ones(8), atol=1e-5, rtol=0)
        signs = (mine * other).sum(0)
        torch.testing.assert_close(signs.abs(), torch.ones(8), atol=1e-3, rtol=0)
        assert not layer.lora_B["default"].weight.requires_grad


def test_detaching_gives_the_pretrained_weights_back_bit_for_bit(model, spectra, source):
    mine = copy.deepcopy(model)
    mine.head.weight.requires_grad_(False)
    for method in (ll.Window.first(8), ll.LoRA(4)):
        adapted = ll.attach(mine, method, spectra=spectra)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        bare = ll.detach(torch.compile(adapted, backend="eager"))
        assert type(bare) is type(mine) and bare is not mine
        for (name, p), (other, q) in zip(bare.named_parameters(), mine.named_parameters(), strict=True):
            assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad
            assert p.data_ptr() != q.data_ptr()


def test_detaching_after_the_pretrained_model_was_trained_asks_for_the_original(patch_vit):
    kept = copy.deepcopy(patch_vit)
    adapted = ll.attach(patch_vit, ll.Window.first(4))
    with torch.no_grad():
        patch_vit.blocks[0].attn.qkv.weight.mul_(2)
    with pytest.raises(
        ValueError, match=r"changed after attach \(its blocks.0.attn.qkv.weight\); pass original="
    ):
        ll.detach(adapted)
    with pytest.raises(ValueError, match=r"expected a model from ll.attach"):
        ll.detach(patch_vit)
    bare = ll.detach(adapted, original=kept)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), kept.parameters(), strict=True))


def test_a_convolution_in_channels_last_order_is_adapted_and_restored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1))
    model = model.to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 8, 9, 9)
    before = copy.deepcopy(model.state_dict())
    for inplace in (False, True):
        adapted = ll.attach(model, ll.Window.middle(4), targets="all-conv", inplace=inplace)
        reference = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
        reference.load_state_dict(before)
        assert ll.function_error(adapted, reference, x) < 1e-5
        bare = ll.detach(adapted, original=reference)
        assert all(torch.equal(t, before[k]) for k, t in bare.state_dict().items())


def test_function_error_takes_batches_by_name_and_leaves_modes_alone():
    encoder = ll.tasks.bundled.minilm()
    ids = {"input_ids": torch.arange(1000, 1012).view(1, 12)}
    adapted = ll.attach(encoder, ll.Window.middle(8), targets="all-attention")
    encoder.train()
    encoder.embeddings.eval()
    assert ll.function_error(adapted, encoder, ids) < 1e-5
    assert encoder.training and not encoder.embeddings.training
