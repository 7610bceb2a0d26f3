from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from asking_models import EXACT, UNKNOWN, Executed, HarmlessAsking, Net
from kept_models import KEPT, Keeper, Knowing, ReadThroughParent
from keyword_models import BY_KEYWORD, Positional
from reading_models import USED, Layers
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, Wav2Vec2Config, Wav2Vec2ForXVector

import lora_lens as ll
from lora_lens.spectrum.adaptable_layers import adaptable
from lora_lens.spectrum.usage.weight_reads import used_otherwise


def found(model: nn.Module) -> dict[str, str]:
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return used_otherwise(dict(model.named_modules()), linear)


@pytest.mark.parametrize("kind", USED, ids=lambda kind: kind.__name__)
def test_layers_that_are_not_only_called_are_found(kind):
    assert set(found(kind())) == USED[kind]


@pytest.mark.parametrize("kind", [k for k in USED if USED[k]], ids=lambda kind: kind.__name__)
def test_what_is_left_keeps_the_model_s_function(kind):
    """None of them would without the check: in most the adapter of the layer never acts."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 8)
    rest = sorted(adaptable(model).layers)
    if rest:
        assert ll.function_error(ll.attach(model, ll.Window.first(4), targets=rest), model, x) < 1e-5
    for name in USED[kind]:
        with pytest.raises(ValueError, match=f"{name}, which is "):
            ll.attach(model, ll.Window.first(4), targets=name)


@pytest.mark.parametrize("how", KEPT)
def test_layers_that_an_object_beside_keeps_are_left_out(how):
    torch.manual_seed(0)
    model, x = Keeper(how).eval(), torch.randn(3, 8)
    reasons = found(model)
    assert set(reasons) == {"b"} and re.search(
        "is bypassed: Keeper also keeps it as its branch", reasons["b"]
    )
    with pytest.warns(UserWarning, match="b: is bypassed"):
        adapted = ll.attach(model, ll.Window.first(4))
    assert ll.function_error(adapted, model, x) < 1e-5


def test_an_object_that_knows_the_whole_model_keeps_no_layer_of_it():
    assert not found(Knowing()) and set(found(ReadThroughParent())) == {"b"}


def left_out_of_net(model: nn.Module) -> set[str]:
    """The names that are found, after a check that the rest may be adapted."""
    reasons, x = found(model), torch.randn(3, 8)
    rest = sorted(set(adaptable(model).layers) - {"inner.layers.0", "inner.layers.1"})
    if rest:
        assert ll.function_error(ll.attach(model, ll.Window.first(4), targets=rest), model, x) < 1e-5
    return set(reasons)


@pytest.mark.parametrize("ask", EXACT)
def test_weights_that_are_asked_for_by_name_are_found(ask):
    assert left_out_of_net(Net(EXACT[ask]).eval()) == {"inner.b"}


@pytest.mark.parametrize("ask", UNKNOWN)
def test_where_the_name_is_not_known_all_that_may_be_meant_is_left_out(ask):
    assert "inner.b" in left_out_of_net(Net(UNKNOWN[ask]).eval())


def test_code_that_is_executed_is_read_and_asking_for_modules_is_harmless():
    assert "b" in found(Executed()) and not found(HarmlessAsking())
    assert HarmlessAsking()(torch.randn(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("kind", BY_KEYWORD, ids=lambda kind: kind.__name__)
def test_layers_that_are_called_by_keyword_are_left_out(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 8)
    reasons = found(model)
    assert set(reasons) == {BY_KEYWORD[kind]}
    assert "gives it input=, which PEFT's layer does not take" in reasons[BY_KEYWORD[kind]]
    with pytest.warns(UserWarning, match="is called by keyword"):
        adapted = ll.attach(model, ll.Window.first(4))
    assert ll.function_error(adapted, model, x) < 1e-5


def test_an_input_by_the_name_that_peft_has_for_it_is_fine():
    model, x = Positional().eval(), torch.randn(3, 8)
    assert not found(model) and not used_otherwise(dict(model.named_modules()), {"l": model.layers[2]})
    adapted = ll.attach(model, ll.Window.first(4), targets=["a", "b.b", "layers.2"])
    assert ll.function_error(adapted, model, x) < 1e-5


def test_code_without_source_is_read_by_its_instructions():
    names = {"Layers": Layers, "torch": torch}
    exec(
        "class Alias(Layers):\n"
        "    def forward(self, x):\n"
        "        w = self.a.weight\n"
        "        return x.to(self.b.weight.dtype) @ w\n"
        "class Loop(Layers):\n"
        "    def forward(self, x):\n"
        "        for layer in self.layers: x = x @ layer.weight\n"
        "        return self.a(x)\n"
        "class Method(Layers):\n"
        "    def read(self): return getattr(self, 'a').weight\n"
        "    def forward(self, x): return x @ self.read()\n"
        "class Plain(Layers):\n"
        "    def forward(self, x): return self.a(x.to(self.a.weight.dtype)) + self.layers[0](x)\n",
        names,
    )
    for kind, used in {"Alias": {"a"}, "Loop": {"layers.0", "layers.1"}, "Method": {"a"}}.items():
        assert used <= set(found(names[kind]()))
    assert not found(names["Plain"]())


class Optional(Layers):
    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.slices, self.exact = 2, exact

    def forward(self, x):
        if self.slices > 1 and self.exact:
            return F.linear(x, self.a.weight)
        return self.a(x)


def test_settings_decide_which_code_runs():
    assert found(Optional(exact=True)) and not found(Optional(exact=False))
    several = nn.Sequential(Optional(exact=False), Optional(exact=True), Optional(exact=False))
    assert set(found(several)) == {"1.a"}


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99, state_size=4))


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 32, [1, 1], [2, 4], [7, 7], num_classes=5)


def x_vector() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    small = {
        "conv_dim": (32,) * 7,
        "tdnn_dim": (32,) * 5,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 9,
    }
    return Wav2Vec2ForXVector(Wav2Vec2Config(**sizes, **small, num_conv_pos_embeddings=8))


def eva() -> nn.Module:
    return timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=28)


def davit() -> nn.Module:
    return timm.create_model("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4))


@pytest.mark.parametrize(
    ("build", "inputs", "targets", "named", "why"),
    [
        (swin, (2, 3, 56, 56), "all-linear", "attn.qkv", "shifted_window_attention reads its weight"),
        (mamba, (2, 9), "all-linear", "x_proj", r"(mamba_inner_fn|MambaMixer\.\w+) reads its weight"),
        (x_vector, (2, 16000), "all-linear", "tdnn.0.kernel", "TDNNLayer.forward reads its weight"),
        (eva, (2, 3, 28, 28), "all-linear", "attn.qkv", "EvaAttention.forward reads its weight"),
        (
            davit,
            (2, 3, 56, 56),
            "all-conv",
            "downsample.conv",
            "reads its kernel_size, which PEFT's layer lacks",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_families_whose_parents_use_layers_themselves(build, inputs, targets, named, why, recwarn):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randint(99, inputs) if len(inputs) == 2 and inputs[1] < 10 else torch.randn(inputs)
    adapted = ll.attach(model, ll.Window.first(2), targets=targets)
    assert ll.function_error(adapted, model, x) < 1e-5
    said = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert len(said) == (build is not x_vector)  # whose TDNN belongs to the head
    assert all(re.search(why, text) for text in said)
    with pytest.raises(ValueError, match=why):
        ll.attach(model, ll.Window.first(2), targets=named)


def test_plain_models_lose_no_layer_and_warn_of_nothing(patch_vit, recwarn):
    adapted = ll.attach(patch_vit, ll.Window.middle(4))
    assert len(ll.summary(adapted)) == 8
    assert not [w for w in recwarn if "left out" in str(w.message)]
