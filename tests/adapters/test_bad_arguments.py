"""Wrong arguments of attach and of what it takes get one clear message, before anything is computed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import lora_lens as ll
from lora_lens.adapters.exactness import function_error
from lora_lens.spectrum.placement import AfterEnergy, ByLayer, Components, RandomComponents

WRONG = [
    ({"targets": []}, ValueError, r"targets must name at least one layer, not \[\]"),
    ({"targets": ""}, ValueError, "targets must name at least one layer, not ''"),
    ({"targets": 3}, TypeError, "targets must be a sequence of names or patterns of layers.*not 3"),
    ({"targets": ["qkv", 3]}, TypeError, "targets must hold names or patterns of layers, not 3"),
    ({"targets": {"qkv": 1}}, TypeError, "targets must be a sequence"),
    ({"targets": b"qkv"}, TypeError, "targets must be a sequence"),
    ({"alpha": math.inf}, ValueError, "alpha must be positive and finite, not inf"),
    ({"alpha": 1e-300}, ValueError, "alpha must be .*not 1e-300"),
    ({"alpha": 1e300}, ValueError, "alpha must be .*not 1e[+]300"),
    ({"alpha": math.nan}, ValueError, "alpha must be positive and finite, not nan"),
    ({"alpha": -1}, ValueError, "alpha must be positive and finite, not -1"),
    ({"alpha": "8"}, TypeError, "alpha must be a number, not '8'"),
    ({"alpha": True}, TypeError, "alpha must be a number, not True"),
    ({"spectra": {}}, TypeError, r"spectra must be what ll\.spectra\(model\) gives, not {}"),
    ({"spectra": "model.safetensors"}, TypeError, "spectra must be what"),
    ({"variant": "dora"}, TypeError, r"variant must be an ll\.Variant.*not 'dora'"),
    ({"variant": {"dora": True}}, TypeError, r"variant must be an ll\.Variant"),
    ({"modules_to_save": 3}, TypeError, "modules_to_save must be a sequence of names of modules"),
    ({"inplace": "yes"}, TypeError, "inplace must be True or False, not 'yes'"),
    ({"inplace": 1}, TypeError, "inplace must be True or False, not 1"),
    ({"seed": 1.5}, TypeError, "seed must be a whole number, not 1.5"),
    ({"seed": -1}, ValueError, "seed must be at least 0, not -1"),
    ({"seed": None}, TypeError, "seed must be a whole number, not None"),
    ({"model": None}, TypeError, "model must be a torch.nn.Module.*not None"),
    ({"model": "gpt2"}, TypeError, "model must be a torch.nn.Module.*not 'gpt2'"),
    ({"model": nn.Linear}, TypeError, "model must be a torch.nn.Module"),
    ({"method": None}, TypeError, "expected a Window or another placement"),
    ({"method": "pissa"}, TypeError, "expected a Window or another placement"),
    ({"method": ll.Window}, TypeError, "expected a Window or another placement"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_attach(wrong, error, message, patch_vit):
    arguments = {"model": patch_vit, "method": ll.Window.middle(2)} | wrong
    with pytest.raises(error, match=message) as raised:
        ll.attach(arguments.pop("model"), arguments.pop("method"), **arguments)
    assert isinstance(raised.value, ll.errors.LoraLensError)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [w for w in WRONG if next(iter(w[0])) in ("targets", "alpha", "seed", "model")]
    + [
        ({"method": "pissa"}, TypeError, "expected a Window or another .* or PeftMethod, not 'pissa'"),
        (
            {"inplace": True},
            ValueError,
            "PEFT's pissa of rank 4 is attached to a copy: leave inplace=True out",
        ),
        ({"modules_to_save": ["head"]}, ValueError, "takes no modules_to_save"),
        ({"task": "mnist"}, TypeError, r"task must be an ll\.Task, not 'mnist'"),
        ({"retain": 3}, TypeError, r"retain must be an ll\.Task, not 3"),
    ],
)
def test_attach_with_a_start_of_peft(wrong, error, message, patch_vit):
    arguments = {"model": patch_vit, "method": ll.PeftMethod("pissa", 4)} | wrong
    with pytest.raises(error, match=message) as raised:
        ll.attach(arguments.pop("model"), arguments.pop("method"), **arguments)
    assert isinstance(raised.value, ll.errors.LoraLensError)


def test_numbers_of_numpy_and_torch_are_taken(patch_vit):
    adapted = ll.attach(
        patch_vit,
        ll.LoRA(np.int64(2)),
        targets=np.array(["qkv", "fc1"]),
        alpha=np.float32(4),
        inplace=np.bool_(False),
        seed=torch.tensor(3),
    )
    other = ll.attach(patch_vit, ll.LoRA(2), targets=["qkv", "fc1"], alpha=4.0, seed=3)
    assert ll.summary(adapted).equals(ll.summary(other))
    a, b = (m.get_base_model().blocks[0].attn.qkv.lora_A["default"].weight for m in (adapted, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ll.Window("8", position=0), TypeError, "rank must be a whole number, not '8'"),
        (lambda: ll.Window(True, position=0), TypeError, "rank must be a whole number, not True"),
        (lambda: ll.Window(8, position="0.5"), TypeError, "position must be a number, not '0.5'"),
        (lambda: ll.Window(8, position=True), TypeError, "position must be a number, not True"),
        (lambda: ll.Window(8, start=1.5), TypeError, "start must be a whole number, not 1.5"),
        (lambda: ll.Window(8, start=True), TypeError, "start must be a whole number, not True"),
        (lambda: ll.windows(8, 1), ValueError, "count must be at least 2, not 1"),
        (lambda: ll.windows(8, 2.5), TypeError, "count must be a whole number"),
        (lambda: ll.LoRA(None), TypeError, "rank must be a whole number, not None"),
        (lambda: ll.LoRA(0), ValueError, "rank must be at least 1, not 0"),
        (lambda: Components(5), TypeError, "components must be a sequence of whole numbers"),
        (lambda: Components("123"), TypeError, "components must be a sequence of whole numbers"),
        (lambda: Components([1.0]), TypeError, "a component must be a whole number, not 1.0"),
        (lambda: RandomComponents(2, seed=-1), ValueError, "seed must be at least 0, not -1"),
        (lambda: RandomComponents(2, seed=0.5), TypeError, "seed must be a whole number, not 0.5"),
        (lambda: AfterEnergy(2, "0.5"), TypeError, "share of the energy must be a number"),
        (lambda: AfterEnergy(2, math.nan), ValueError, r"share of the energy must be in \(0, 1\), not nan"),
        (lambda: ByLayer([ll.Window.first(2)]), TypeError, "placements must be a mapping"),
        (lambda: ByLayer({3: ll.Window.first(2)}), TypeError, "a pattern of placements must be a string"),
        (lambda: ll.PeftMethod("pisa", 4), ValueError, "did you mean 'pissa'"),
        (lambda: ll.PeftMethod("pissa", 4.0), TypeError, "rank must be a whole number, not 4.0"),
        (lambda: ll.Variant(dora="yes"), TypeError, "dora must be True or False, not 'yes'"),
        (lambda: ll.Variant(dropout="0.1"), TypeError, "dropout must be a number, not '0.1'"),
        (lambda: ll.Variant(dtype="float32"), TypeError, "dtype must be a torch.dtype.*not 'float32'"),
        (lambda: ll.Variant(dtype=torch.float8_e4m3fn), ValueError, "dtype must be a floating one, not"),
        (lambda: ll.Variant(train=None), TypeError, "train must be one of 'both', 'A', 'B', not None"),
    ],
)
def test_windows_placements_and_methods(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert isinstance(raised.value, ll.errors.LoraLensError)


def test_function_error_of_what_does_not_compare():
    one, two = nn.Linear(4, 3), nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"have the shapes \(2, 1\) and \(2, 3\), so they are no two states"):
        function_error(two, one, torch.ones(2, 4))
    with pytest.raises(TypeError, match="inputs must be a batch or a mapping of keyword arguments"):
        function_error(one, one, [1, 2])
    with pytest.raises(TypeError, match="adapted must be a model, not None"):
        function_error(None, one, torch.ones(2, 4))

    class Strange(nn.Module):
        def forward(self, _):
            return {"text": "no tensor"}

    with pytest.raises(ValueError, match="the first output of Strange is a str, no tensor"):
        function_error(Strange(), Strange(), torch.ones(1))


def test_function_error_where_the_function_is_zero():
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    assert function_error(zero, zero, torch.ones(2, 4)) == 0
    assert function_error(nn.Linear(4, 3), zero, torch.ones(2, 4)) == math.inf


def test_a_layer_without_spectrum_is_named(patch_vit):
    spectra = ll.spectra(patch_vit, "qkv", progress=False)
    with pytest.raises(ValueError, match=r"there is no spectrum of blocks\.0\.mlp\.fc1"):
        ll.attach(patch_vit, ll.Window.first(2), spectra=spectra, targets=["qkv", "fc1"])


def test_factors_that_the_adapter_s_type_cannot_hold_are_refused(patch_vit):
    half = ll.Variant(dtype=torch.float16)
    with torch.no_grad():
        patch_vit.blocks[0].attn.qkv.weight *= 1e6
    before = {name: value.clone() for name, value in patch_vit.state_dict().items()}
    with pytest.raises(ValueError, match=r"larger than torch\.float16 can hold, with alpha=1e-06 and rank 2"):
        ll.attach(patch_vit, ll.Window.middle(2), alpha=1e-6, variant=half, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in patch_vit.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (None, TypeError, "inputs must be a batch or a mapping of keyword arguments, not None"),
        (torch.zeros(0, 1, 28, 28), ValueError, "inputs hold no examples"),
        (torch.zeros(2, 3, 5, 5), ValueError, "VisionTransformer does not take these inputs: .*give a batch"),
        (torch.zeros(2, 1, 28, 28).byte(), ValueError, "VisionTransformer does not take these inputs"),
    ],
)
def test_batches_that_no_measure_can_be_taken_on_are_refused_in_words(model, inputs, error, message):
    for measure in (ll.forgetting.feature_change, ll.function_error):
        with pytest.raises(error, match=message):
            measure(model, model, inputs)
