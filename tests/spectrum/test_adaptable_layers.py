from __future__ import annotations

import functools
import operator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import lora_lens as ll
from lora_lens._base.naming import block_and_kind
from lora_lens.spectrum.adaptable_layers import adaptable, target_layers
from lora_lens.spectrum.patterns import part_of
from lora_lens.spectrum.refusals import unchangeable
from lora_lens.spectrum.sources.matrices import weights


def test_patterns_select_by_the_end_of_the_name_in_whole_parts(model):
    assert list(target_layers(model, "qkv")) == [f"blocks.{b}.attn.qkv" for b in range(6)]
    assert list(target_layers(model, "blocks.[0-1].mlp.*")) == [
        f"blocks.{b}.mlp.{fc}" for b in (0, 1) for fc in ("fc1", "fc2")
    ]
    assert next(iter(target_layers(model, ["fc2", "blocks.0.attn.qkv"]))) == "blocks.0.attn.qkv"
    assert list(target_layers(model, "head")) == ["head"]


def test_without_patterns_all_linear_layers_but_the_classifier(patch_vit):
    assert len(target_layers(patch_vit)) == 8
    assert "head" not in target_layers(patch_vit)


def test_a_pattern_that_matches_nothing_lists_what_could_match(patch_vit):
    with pytest.raises(ValueError, match=r"'q_proj' matches no module.*attn.qkv.*mlp.fc1"):
        target_layers(patch_vit, "q_proj")


def test_convolutions_are_layers_too(patch_vit):
    assert list(target_layers(patch_vit, "all-conv")) == ["patch_embed.proj"]
    assert "patch_embed.proj" in target_layers(patch_vit, ["qkv", "proj"])
    assert list(target_layers(patch_vit, "attn.proj")) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_a_pattern_that_matches_only_modules_without_a_weight_says_so(patch_vit):
    with pytest.raises(ValueError, match=r"'act' matches only blocks.0.mlp.act \(GELU\)"):
        target_layers(patch_vit, "act")


def test_block_and_kind():
    assert block_and_kind("blocks.3.attn.qkv") == (3, "attn.qkv")
    assert block_and_kind("model.layers.11.self_attn.q_proj") == (11, "self_attn.q_proj")
    assert block_and_kind("head") == (-1, "head")
    assert block_and_kind("0") == (0, "0")


def test_groups_go_by_type_and_by_the_usual_names(model):
    assert set(target_layers(model, "all-linear")) == set(target_layers(model))
    attention, mlp = (set(target_layers(model, group)) for group in ("all-attention", "all-mlp"))
    assert {block_and_kind(n)[1] for n in attention} == {"attn.qkv", "attn.proj"}
    assert {block_and_kind(n)[1] for n in mlp} == {"mlp.fc1", "mlp.fc2"}
    assert all("backbone" in name for name in target_layers(model, "all-conv"))
    for group in ("all-linear", "all-conv", "all-attention", "all-mlp"):
        assert set(ll.spectra(model, group, vectors=False)) == set(target_layers(model, group))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.0.attn.c_proj", "attention"),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("decoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("blk.3.attn_q", "attention"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("encoder.layer.0.output.dense", "mlp"),
        ("decoder.block.0.layer.1.DenseReluDense.wi_0", "mlp"),
        ("blk.3.ffn_up", "mlp"),
        ("layers.0.linear1", "mlp"),
        ("head", "other"),
        ("layers.0.downsample.reduction", "other"),
    ],
)
def test_the_part_that_a_layer_plays_is_told_by_its_name(name, part):
    assert part_of(name) == part


def test_a_group_without_members_says_why():
    with pytest.raises(ValueError, match=r"Sequential has no convolution that can be adapted$"):
        target_layers(nn.Sequential(nn.Linear(2, 2)), "all-conv")
    with pytest.raises(ValueError, match=r"has no convolution.*; 0 is a convolution with groups=2"):
        target_layers(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), "all-conv")


def small_in_the_middle() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 3), nn.Linear(3, 24), nn.Linear(24, 20))


def test_groups_leave_out_what_cannot_hold_the_rank_and_say_so_once():
    model = small_in_the_middle()
    with pytest.warns(UserWarning, match=r"^2 layers .* left out.*: 1, 2: .* fewer components than") as said:
        adapted = ll.attach(model, ll.Window.middle(4))
    assert [str(w.message) for w in said if "left out" in str(w.message)] == [str(said[0].message)]
    assert said[0].filename == __file__
    assert list(ll.summary(adapted)["layer"]) == ["0", "3"]
    assert len(ll.summary(ll.attach(model, ll.Window.middle(3)))) == 4
    with pytest.raises(ValueError, match=r"rank 4 does not fit 1: its spectrum has 3"):
        ll.attach(model, ll.Window.middle(4), targets="1")
    with pytest.raises(ValueError, match=r"rank 30 does not fit 0: its spectrum has 24.*at most 24"):
        ll.attach(model, ll.LoRA(30))


def test_each_placement_of_a_mapping_leaves_out_what_its_own_rank_does_not_fit():
    plan = {"all-linear": ll.Window.middle(4), "[1-2]": ll.Window.middle(2)}
    table = ll.summary(ll.attach(small_in_the_middle(), plan)).set_index("layer")
    assert table["rank"].to_dict() == {"0": 4, "1": 2, "2": 2, "3": 4}


class OwnProduct(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Nothing(nn.Linear):
    pass


class Rounded(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = 1

    def forward(self, x):
        return self.scale * super().forward(x)


class ScaledByCall(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class ScaledByKeyword(nn.Linear):
    def forward(self, x, *, scale=1.0):
        return super().forward(x) * scale


class ScaledByAny(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(args[0]) * kwargs.get("scale", 1.0)


class ScaledByMore(nn.Linear):
    def forward(self, x, *scales):
        return functools.reduce(operator.mul, scales, super().forward(x))


class ScaledAround(nn.Linear):
    def __call__(self, x, scale=1.0):
        return super().__call__(x) * scale


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (OwnProduct(8, 8), True),
        (OwnProduct(8, 8, bias=False), True),
        (Nothing(8, 8), True),
        (Rounded(8, 8), False),
        (Noisy(8, 8), False),
        (Scaled(8, 8), False),
        (ScaledByCall(8, 8), False),
        (ScaledByKeyword(8, 8), False),
        (ScaledByAny(8, 8), False),
        (ScaledByMore(8, 8), False),
        (ScaledAround(8, 8), False),
        (SamePadding(3, 4, 3), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_that_compute_the_same_are_taken(layer, taken):
    model = nn.Sequential(layer)
    assert ("0" in adaptable(model).layers) == taken
    if taken:
        x = torch.randn(3, 8)
        assert ll.function_error(ll.attach(model, ll.Window.middle(4)), model, x) < 1e-5
    else:
        with pytest.raises(ValueError, match=r"0, which is a \w+, and a window fits"):
            target_layers(model, "0")


def hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output.relu())


def patched(layer: nn.Module) -> None:
    layer.forward = lambda x: x


@pytest.mark.parametrize(("change", "why"), [(hooked, "forward hooks"), (patched, "a forward of its own")])
def test_layers_that_were_changed_by_hand_are_refused(change, why):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[0])
    assert list(adaptable(model).layers) == ["1"]
    with pytest.raises(ValueError, match=why):
        target_layers(model, "0")


def test_weights_that_share_memory_are_tied_whatever_their_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    model.register_parameter("also", model[2].weight)
    found = adaptable(model)
    assert list(found.layers) == ["0", "1", "2"] and not found.groups["all-linear"]  # only by their names
    assert unchangeable(model, found.layers) == {
        name: f"shares its weight with {other} (tied weights)" for name, other in ("01", "10", ("2", "also"))
    }


def test_falcon_is_adapted_by_default():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    model = FalconForCausalLM(FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    adapted = ll.attach(model, ll.Window.first(4))
    assert len(ll.summary(adapted)) == 4
    assert ll.function_error(adapted, model, torch.randint(99, (2, 9))) < 1e-5


def test_what_peft_refuses_is_left_out_with_a_word():
    model = nn.Module()
    model.config = SimpleNamespace(model_type="mamba")
    model.in_proj, model.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    assert list(adaptable(model).layers) == ["in_proj"]
    assert adaptable(model).reasons == {"out_proj": "is refused by PEFT in models of type mamba"}


def test_routers_are_no_usual_targets_in_models_as_in_their_files(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, vocab_size=99))
    assert not [name for name in target_layers(model) if "gate" in name.split(".")[-1].split("_")[-1:]]
    assert "model.layers.0.mlp.shared_expert_gate" in target_layers(model, "shared_expert_gate")
    assert not [w.name for w in weights(model) if w.name.endswith(("shared_expert_gate", "mlp.gate"))]


@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": 1, "dilation": 2}, {"kernel_size": 3, "padding_mode": "circular"}],
    ids=["dilation of one point", "mode of no padding"],
)
def test_settings_of_convolutions_that_change_nothing_are_no_reason_to_refuse(settings):
    model, images = nn.Sequential(nn.Conv2d(4, 8, **settings)), torch.randn(2, 4, 7, 7)
    adapted = ll.attach(model, ll.Window.middle(2), targets="all-conv")
    assert ll.function_error(adapted, model, images) < 1e-5
    other = {"kernel_size": 3, "dilation": 2} if "dilation" in settings else settings | {"padding": 1}
    reason = "dilation" if "dilation" in settings else "padding_mode"
    with pytest.raises(
        ValueError, match=f"is a convolution with {reason}=.*, which PEFT's LoRA layer does not"
    ):
        ll.attach(nn.Sequential(nn.Conv2d(4, 8, **other)), ll.Window.middle(2), targets="0")


def test_a_parameter_that_is_no_layers_weight_is_named_with_the_reason():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.proj = nn.Parameter(torch.zeros(1, 5, 8)), nn.Linear(8, 8)

    with pytest.raises(
        ValueError, match=r"matches pos_embed, which is a parameter of Positions and no layer's"
    ):
        target_layers(Positions(), "pos_embed")
    assert list(target_layers(Positions(), "*")) == ["proj"]


def test_trying_a_strangers_layer_draws_no_random_numbers():
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    state = torch.get_rng_state()
    assert set(adaptable(nn.Sequential(Own(4, 4))).layers) == {"0"}
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    Own(4, 4)
    assert torch.equal(torch.get_rng_state(), expected)
