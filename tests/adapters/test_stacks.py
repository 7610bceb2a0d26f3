"""Windows for experts in one tensor and for nn.MultiheadAttention: PEFT adapts both as parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
ROUTED = {"num_experts": 3, "moe_intermediate_size": 24}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": ROUTED | {"shared_expert_intermediate_size": 24},
    "Qwen3Moe": ROUTED,
    "GptOss": {"num_local_experts": 3},  # (experts, in, out), gate and up in turn, and it says is_transposed
    "Llama4": {"num_local_experts": 3, "intermediate_size_mlp": 48},  # (experts, in, out) and says nothing
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": DEEPSEEK,
    "Glm4Moe": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "GraniteMoe": {"num_local_experts": 3},
    "Olmoe": {"num_experts": 3},
    "MiniMax": {"num_local_experts": 3},
    "JetMoe": {"num_local_experts": 3, "kv_channels": 8},  # modules whose own weight has three dimensions
}
WINDOW = ll.Window.middle(3)


def moe(family: str) -> nn.Module:
    name = "Llama4Text" if family == "Llama4" else family
    config = getattr(transformers, f"{name}Config")
    drop = ("num_attention_heads", "head_dim") if family == "JetMoe" else ()
    sizes = {key: value for key, value in SIZES.items() if key not in drop}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**sizes | FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3 or not torch.isfinite(parameter).all():  # not all are drawn
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return moe(request.param)


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return moe("Mixtral")


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 64, (2, 16))}


def stepped(adapted: nn.Module, texts: dict[str, torch.Tensor], lr: float = 1.0) -> None:
    """One step of gradient descent: so an adapter that does not act, stays where it was."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapted(**texts, labels=texts["input_ids"]).loss.backward()
    torch.optim.SGD(trained, lr=lr).step()
    adapted.zero_grad(set_to_none=True)


def test_a_window_for_each_expert_keeps_the_function_and_every_way_out_of_the_model(model, texts, tmp_path):
    adapted = ll.attach(model, WINDOW, targets="all-experts")
    table = ll.summary(adapted)
    stacks = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert len(table) == sum(len(model.get_parameter(name)) for name in stacks)
    assert table["start_error"].max() < 1e-6
    assert ll.function_error(adapted, model, texts) < 1e-5
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(stacks) and all("lora_" in name for name in trained)

    stepped(adapted, texts)
    moved = ll.function_error(adapted, model, texts)
    assert moved > 1e-3
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(model, tmp_path / "saved"), adapted, texts) == 0
    written = ll.export(adapted, tmp_path / "exported")
    assert written["layer"].tolist() == table["layer"].tolist()
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    assert ll.function_error(plain, adapted, texts) < 1e-5
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert ll.function_error(merged, adapted, texts) < 1e-5
    again = ll.detach(adapted)
    assert list(again.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


@pytest.mark.parametrize("family", ["GptOss", "Llama4"])
def test_experts_have_their_own_spectra_and_drift(family, texts):
    model = moe(family)
    spectra = ll.spectra(model, "all-experts", progress=False)
    adapted = ll.attach(model, WINDOW, targets="all-experts", spectra=spectra)
    assert ll.summary(adapted)["layer"].tolist() == list(spectra)
    stepped(adapted, texts)
    table = ll.forgetting.drift(adapted, spectra).set_index("layer")
    merged = copy.deepcopy(adapted).merge_and_unload()
    after = {w.name: w.load() for w in ll.spectrum.weights(merged, "all-experts")}
    for weight in ll.spectrum.weights(model, "all-experts"):
        update = torch.linalg.norm(after[weight.name] - weight.load())
        relative = float(update / torch.linalg.norm(weight.load()))
        assert table.loc[weight.name, "relative"] == pytest.approx(relative, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_pefts_factors_hold_the_expert_slowest_in_a_and_fastest_in_b(family):
    model = moe(family)
    adapted = ll.attach(model, ll.Window.first(2), targets="experts.down_proj")
    layer = next(m for n, m in adapted.named_modules() if n.endswith("experts"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    spectra = ll.spectra(model, "experts.down_proj", progress=False)
    name = next(name for name in spectra if name.endswith("[1]"))
    exchanged = family == "Llama4"  # there PEFT takes the inputs for the outputs
    expected = spectra[name].left[:, :2] if exchanged else spectra[name].right[:2].T
    of_a = nn.functional.normalize(a[2:4], dim=1).T  # of the second expert of three, rank 2
    assert (of_a.T @ expected).abs().diagonal().allclose(torch.ones(2), atol=1e-4)
    expected = spectra[name].right[:2].T if exchanged else spectra[name].left[:, :2]
    of_b = nn.functional.normalize(b[:, 1::3], dim=0)
    assert (of_b.T @ expected).abs().diagonal().allclose(torch.ones(2), atol=1e-4)


def test_one_tensor_of_two_and_layers_beside_experts(mixtral, texts, tmp_path):
    methods = {"experts.down_proj": ll.Window.last(4), "self_attn.*": ll.Window.first(2)}
    adapted = ll.attach(mixtral, methods)
    assert ll.function_error(adapted, mixtral, texts) < 1e-5
    stepped(adapted, texts)
    ll.export(adapted, tmp_path / "exported")
    plain = PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path / "exported")
    assert ll.function_error(plain, adapted, texts) < 1e-5
    assert ll.export(adapted, tmp_path / "smaller", rank=1)["rank"].unique().tolist() == [1]
    smaller = PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path / "smaller")
    assert ll.function_error(smaller, mixtral, texts) > 1e-3
    ll.save(adapted, tmp_path / "saved")
    with pytest.warns(
        UserWarning, match=r"left out model\.layers\.0\.mlp\.experts, .* as a parameter: load it"
    ):
        updates = ll.spectra(tmp_path / "saved", vectors=False, progress=False)
    assert len(updates) == 8 and all("self_attn" in name for name in updates)
    ll.export_residual(adapted, tmp_path / "residual")
    base = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "residual" / "base")
    both = PeftModel.from_pretrained(base, tmp_path / "residual" / "adapter")
    assert ll.function_error(both, mixtral, texts) < 1e-5


def test_placements_of_one_expert_differ_in_place_and_not_in_rank(mixtral, texts):
    own = {"experts.down_proj[1]": ll.Window.first(2), "experts.down_proj": ll.Window.last(2)}
    table = ll.summary(ll.attach(mixtral, own)).set_index("layer")["first"]
    assert table.iloc[:3].tolist() == [30, 0, 30]
    own["experts.down_proj[1]"] = ll.Window.first(3)
    with pytest.raises(ValueError, match=r"would get the ranks 2, 3, and PEFT's adapter of a tensor has one"):
        ll.attach(mixtral, own)
    with pytest.raises(ValueError, match=r"down_proj\[0\], .*down_proj\[2\] would be left out, "):
        ll.attach(mixtral, WINDOW, targets="experts.down_proj[1]")


def test_what_peft_has_not_for_parameters_is_refused_before_any_work(mixtral):
    for variant in (ll.Variant(dora=True), ll.Variant(dropout=0.1)):
        with pytest.raises(ValueError, match=r"experts\.gate_up_proj, .* takes no (dora=True|dropout=0\.1)"):
            ll.attach(mixtral, WINDOW, targets="all-experts", variant=variant)
    with pytest.raises(ValueError, match=r"^PEFT's pissa of rank 2 is for layers, and model\.layers\.0\.mlp"):
        ll.attach(mixtral, ll.PeftMethod("pissa", 2), targets="all-experts")


@pytest.mark.parametrize("family", ["GptOss", "Llama4"])
def test_one_side_alone_is_trained_whatever_peft_calls_it(family, texts):
    model = moe(family)
    adapted = ll.attach(model, WINDOW, targets="all-experts", variant=ll.Variant(split="A", train="A"))
    before = {n: x.lora_B["default"].weight.detach().clone() for n, x in lora_layers(adapted).items()}
    start = {n: x.lora_A["default"].weight.detach().clone() for n, x in lora_layers(adapted).items()}
    stepped(adapted, texts)
    layers = lora_layers(adapted)
    assert all(torch.equal(layers[n].lora_B["default"].weight, b) for n, b in before.items())
    assert any(not torch.equal(layers[n].lora_A["default"].weight, a) for n, a in start.items())


def test_ordinary_lora_on_experts_starts_at_the_pretrained_function(mixtral, texts, tmp_path):
    adapted = ll.attach(mixtral, ll.LoRA(2), targets="all-experts")
    assert ll.function_error(adapted, mixtral, texts) == 0
    stepped(adapted, texts)
    ll.save(adapted, tmp_path)
    assert ll.function_error(ll.load(mixtral, tmp_path), adapted, texts) == 0
    assert ll.function_error(adapted, mixtral, texts) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_rounding_of_the_residual(mixtral, texts, dtype):
    model = copy.deepcopy(mixtral).to(dtype)
    adapted = ll.attach(model, ll.Window.first(4), targets="all-experts")
    assert ll.function_error(adapted, model, texts) < 16 * torch.finfo(dtype).eps
    assert ll.summary(adapted)["adapter_dtype"].unique().tolist() == ["float32"]


def test_a_model_that_peft_wrapped_before_has_its_parameters_in_order_again(mixtral, texts):
    model = copy.deepcopy(mixtral)
    order = list(model.state_dict())
    adapted = ll.attach(model, WINDOW, targets="experts.gate_up_proj", inplace=True)
    adapted(**texts)
    again = ll.detach(adapted, mixtral)
    assert list(again.state_dict()) == order


def test_change_of_b_a_is_that_of_each_expert(mixtral, texts):
    adapted = ll.attach(mixtral, WINDOW, targets="experts.down_proj")
    extra = ll.training.L2ToInitial(2.0).begin(adapted, None, None)
    stepped(adapted, texts)
    merged = copy.deepcopy(adapted).merge_and_unload()
    changes = [
        (merged.get_parameter(name) - mixtral.get_parameter(name)).square().sum()
        for name, _ in mixtral.named_parameters()
        if name.endswith("experts.down_proj")
    ]
    value = extra()
    assert float(value.detach()) == pytest.approx(float(sum(changes).detach()), rel=1e-3)
    value.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_" in n)


class Reading(nn.Module):
    """A mixture of two experts whose parent multiplies by their weights itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.experts = how, Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.experts.down_proj[0].T


class Named(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x=x)


class Asking(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x) * self.experts.factor


class Calling(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.is_transposed = 2.0, False
        self.down_proj = nn.Parameter(torch.randn(2, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ weight.T for weight in self.down_proj)


def test_whoever_reads_experts_otherwise_than_by_a_call_is_named():
    x = torch.randn(3, 8)
    model = Calling("")
    assert ll.function_error(ll.attach(model, ll.Window.first(2), targets="all-experts"), model, x) < 1e-5
    for kind, why in (
        (Reading, "is bypassed: Reading reads it without calling Experts"),
        (Named, "is called by Named with named arguments alone"),
        (Asking, r"Asking reads Experts\.factor, which PEFT's wrapper lacks"),
    ):
        with pytest.raises(ValueError, match=f"matches experts.down_proj, which .*{why}"):
            ll.attach(kind(""), ll.Window.first(2), targets="experts.down_proj")
        with pytest.raises(ValueError, match=f"no tensor of experts that can be adapted.*{why}"):
            ll.attach(kind(""), ll.Window.first(2), targets="all-experts")


def test_experts_in_one_matrix_are_refused_by_name():
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64, "max_seq_len": 32}
    config = transformers.DbrxConfig(
        **sizes,
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    )
    model = transformers.DbrxForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"mlp\.w1, which holds experts in a form in which nothing but the code"
    ):
        ll.attach(model, ll.Window.first(2), targets="experts.mlp.w1")
    left = ll.adapters.coverage(model).set_index("name").loc["transformer.blocks.0.ffn.experts.mlp.w1"]
    assert left["state"] == "left out" and left["parameters"] == 2 * 24 * 32


class Attention(nn.Module):
    """Two blocks of nn.MultiheadAttention, called as open_clip and torchvision do."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.attn = nn.ModuleList(
            [nn.MultiheadAttention(16, 2, batch_first=True, **kwargs) for _ in range(2)]
        )
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention in self.attn:
            x = x + attention(x, x, x, need_weights=False)[0]
        return self.mlp(x)


@pytest.mark.parametrize("training", [False, True])
def test_q_k_and_v_of_multihead_attention_are_one_matrix(tmp_path, training):
    torch.manual_seed(0)
    model, x = Attention().train(training), torch.randn(2, 5, 16)
    adapted = ll.attach(model, ll.Window.middle(3), targets=["in_proj_weight", "mlp"])
    assert ll.summary(adapted)["layer"].tolist() == ["mlp", "attn.0.in_proj_weight", "attn.1.in_proj_weight"]
    assert ll.function_error(adapted, model, x) < 1e-5
    adapted(x).square().sum().backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01).step()
    assert ll.function_error(adapted, model, x) > 1e-3
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(model, tmp_path / "saved"), adapted, x) == 0
    ll.export(adapted, tmp_path / "exported")
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    assert ll.function_error(plain, adapted, x) < 1e-5
    assert ll.function_error(copy.deepcopy(adapted).merge_and_unload(), adapted, x) < 1e-5
    again = ll.detach(adapted)
    assert all(torch.equal(again.state_dict()[key], t) for key, t in model.state_dict().items())


def test_keys_and_values_of_other_widths_have_matrices_of_their_own():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=8, vdim=12)})
    names = list(ll.spectra(model, "*_proj_weight", vectors=False, progress=False))
    assert names == ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]
    adapted = ll.attach(model, ll.Window.first(2), targets="*_proj_weight")
    q, k = torch.randn(5, 16), torch.randn(4, 8)
    v = torch.randn(4, 12)
    now, before = (m["attn"](q, k, v)[0] for m in (adapted.get_base_model(), model))
    assert torch.allclose(now, before, atol=1e-5)


def test_the_output_of_multihead_attention_and_a_layer_that_reads_it_are_refused():
    with pytest.raises(
        ValueError, match=r"out_proj, which is bypassed: MultiheadAttention\.forward reads its"
    ):
        ll.attach(Attention(), ll.Window.first(2), targets="out_proj")
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(
        ValueError, match=r"is bypassed: TransformerEncoderLayer reads it without calling Multih"
    ):
        ll.attach(layer, ll.Window.first(2), targets="in_proj_weight")


def test_a_parameter_that_peft_wrapped_by_itself_is_no_start_of_ours(mixtral):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    adapted = get_peft_model(copy.deepcopy(mixtral), config)
    with pytest.raises(ValueError, match=r"PEFT adapts the parameter down_proj here: attach with ll\.attach"):
        ll.training.L2ToInitial(1.0).begin(adapted, None, None)
