"""Exactly the planned layers are adapted, whatever their names; a failed attach leaves no trace."""

import copy
import json
import warnings

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import lora_lens as ll
from lora_lens.adapters.injection import lora_layers, whole_modules
from lora_lens.adapters.planned_layers import injected
from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.spectrum.layer_weights import matrix_shape

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MIXTURES = {
    "Glm4Moe": EXPERTS | ROUTED,
    "Dots1": EXPERTS | ROUTED | {"head_dim": 8},
    "Qwen3Moe": EXPERTS | {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "Qwen2Moe": EXPERTS | {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeShared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
}
METHODS = [
    ll.Window.middle(3),
    ll.LoRA(3),
    {"q_proj": ll.Window.first(4), "all-linear": ll.Window.last(2)},
    ll.PeftMethod("pissa", 3),
]


def mixture(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | MIXTURES[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))}


def moved(adapted: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (p for p in adapted.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapted.eval()


def attached(model: nn.Module, method: object, targets: list[str], **settings: object) -> PeftModel:
    if isinstance(method, ll.PeftMethod):
        return ll.attach(model, method, targets=targets)
    return ll.attach(model, method, targets=targets, **settings)


@pytest.mark.parametrize("name", MIXTURES)
def test_dense_and_shared_layers_of_mixtures_are_adapted_and_exported(name, tmp_path):
    model, inputs = mixture(name), tokens()
    planned = [n for n, layer in target_layers(model).items() if min(matrix_shape(layer)) >= 4]
    for place, method in enumerate(METHODS):
        adapted = attached(model, method, planned).eval()
        assert list(lora_layers(adapted)) == planned
        assert ll.function_error(adapted, model, inputs) < 1e-6
        moved(adapted)
        assert ll.function_error(adapted, model, inputs) > 1e-3
        ll.export(adapted, tmp_path / f"{place}")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing|.*unexpected", category=UserWarning)
            theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"{place}").eval()
        assert ll.function_error(theirs, adapted, inputs) < 1e-5
        ll.save(adapted, tmp_path / "saved")
        assert ll.function_error(ll.load(model, tmp_path / "saved").eval(), adapted, inputs) < 1e-6


def test_what_peft_cannot_adapt_is_exported_in_full(tmp_path):
    model, inputs = mixture("Glm4Moe"), tokens()
    adapted = moved(ll.attach(model, ll.Window.middle(2), variant=ll.Variant(dora=True)))
    ll.export(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.gate_proj" in config["modules_to_save"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert ll.function_error(theirs, adapted, inputs) < 1e-5
    assert ll.function_error(ll.load(model, tmp_path).eval(), adapted, inputs) < 1e-5


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64, max_position_embeddings=16, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize("method", [ll.Window.middle(2), ll.LoRA(2)], ids=str)
def test_modules_to_save_are_meant_in_whole_parts(method, tmp_path):
    model, inputs = distilbert(), tokens()
    targets = ["all-linear", "pre_classifier"]
    adapted = moved(ll.attach(model, method, targets=targets, modules_to_save="classifier"))
    assert list(whole_modules(adapted)) == ["classifier"]
    assert "pre_classifier" in lora_layers(adapted)
    ll.export(adapted, tmp_path / "plain")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "plain").eval()
    assert ll.function_error(theirs, adapted, inputs) < 1e-5
    for write in (ll.save, ll.export):
        write(adapted, tmp_path / "ours")
        assert ll.function_error(ll.load(model, tmp_path / "ours").eval(), adapted, inputs) < 1e-5
    restored = ll.detach(adapted).state_dict()
    assert all(torch.equal(tensor, restored[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("lassifier", ValueError, "names 'lassifier', and DistilBert.* has no such module"),
        (["layer"], ValueError, r"a ModuleList, which is never called itself; name .*layer\.0"),
        ([3], ValueError, "names 3"),
        ({"classifier"}, TypeError, "must be a sequence of names of modules"),
        (None, TypeError, "must be a sequence of names of modules"),
    ],
)
def test_wrong_modules_to_save(wanted, error, message):
    with pytest.raises(error, match=message):
        ll.attach(distilbert(), ll.LoRA(2), modules_to_save=wanted)


class Refused(nn.Module):
    """What PEFT refuses when some layers are adapted already: it looks at names in Mamba models."""

    def __init__(self):
        super().__init__()
        self.config = transformers.MambaConfig()
        self.register_buffer("seen", torch.ones(2))
        self.blocks = nn.ModuleList([nn.ModuleDict({"in_proj": nn.Linear(6, 6)}) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)
        self.out_proj = nn.Linear(6, 6)
        self.out_proj.bias.requires_grad_(False)
        self.norm.eval()
        self.register_forward_hook(lambda *_: None)

    def get_input_embeddings(self):  # where PEFT puts a hook
        return self.blocks[0]["in_proj"]

    def forward(self, x):
        for block in self.blocks:
            x = block["in_proj"](x)
        return self.out_proj(self.norm(x))


def known(model: nn.Module) -> dict[str, object]:
    """All that an attach may change."""
    modules = {}
    for name, m in model.named_modules(remove_duplicate=False):
        inside = {k: list(v.items()) if isinstance(v, dict) else v for k, v in vars(m).items()}
        modules[name] = (id(m), sorted((k, repr(v)) for k, v in inside.items()))
    parameters = {n: (id(p), p.requires_grad, p.dtype, p._version) for n, p in model.named_parameters()}
    values = {n: t.clone() for n, t in model.state_dict().items()}
    config = {k: repr(v) for k, v in vars(model.config).items()} if hasattr(model, "config") else {}
    return {
        "modules": modules,
        "parameters": parameters,
        "values": values,
        "config": config,
        "random": torch.get_rng_state(),
    }


def lacking(model: nn.Module) -> ll.SpectrumSet:
    return ll.SpectrumSet([s for n, s in ll.spectra(model, progress=False).items() if "1" not in n])


def without_vectors(model: nn.Module) -> ll.SpectrumSet:
    """The last layer has values only."""
    vectors = {name: [ll.Window.middle(2)] for name in list(target_layers(model))[:-1]}
    return ll.spectra(model, vectors=vectors, progress=False)


def broken(model: nn.Module) -> None:
    list(target_layers(model).values())[-1].weight.data[0, 0] = float("nan")


FAILURES = {
    "a spectrum is missing": lambda m: ll.attach(
        m, ll.Window.middle(2), spectra=lacking(m), targets="all-linear", inplace=True
    ),
    "vectors are missing": lambda m: ll.attach(
        m, ll.Window.middle(2), spectra=without_vectors(m), inplace=True
    ),
    "weights are not finite": lambda m: (broken(m), ll.attach(m, ll.Window.middle(2), inplace=True)),
    "no module to save": lambda m: ll.attach(m, ll.LoRA(2), modules_to_save=["nothing"], inplace=True),
    "a container to save": lambda m: ll.attach(m, ll.LoRA(2), modules_to_save=["blocks"], inplace=True),
    "PEFT refuses": lambda m: ll.attach(m, ll.LoRA(2), targets="*_proj", inplace=True),
    "PEFT refuses beside modules to save": lambda m: ll.attach(
        m, ll.Window.middle(2), targets="*_proj", modules_to_save="norm", inplace=True
    ),
    "PEFT's start refuses": lambda m: ll.attach(m, ll.PeftMethod("pissa", 2), targets="*_proj"),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_failed_attach_leaves_the_model_bit_for_bit_as_it_was(fail):
    torch.manual_seed(0)
    model = Refused()
    if "finite" in str(fail.__code__.co_names) or "broken" in fail.__code__.co_names:
        broken(model)
    before = known(model)
    with pytest.raises(ll.errors.LoraLensError):
        fail(model)
    after = known(model)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert after["config"] == before["config"]
    assert torch.equal(after["random"], before["random"])
    assert before["values"].keys() == after["values"].keys()
    same = [torch.equal(before["values"][n].nan_to_num(), t.nan_to_num()) for n, t in after["values"].items()]
    assert all(same)


def test_what_fails_within_peft_takes_away_its_hooks_and_layers():
    model = Refused()
    before = known(model)
    names = ["blocks.0.in_proj", "blocks.1.in_proj", "out_proj"]
    config = LoraConfig(r=2, target_modules=names)
    with pytest.raises(ValueError, match=r"PEFT cannot adapt these layers: .*'out_proj' is incompatible"):
        injected(model, config, names, ["norm"], autocast=True, seed=3)
    after = known(model)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert torch.equal(after["random"], before["random"])
    assert config.target_modules == set(names)
    adapted = injected(model, config, names[:2], ["norm"], autocast=True, seed=3)
    assert known(model)["modules"][""][1] != before["modules"][""][1]
    assert [n for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)] == names[:2]


def test_an_adapter_added_removed_or_replaced_after_attach_is_noticed(patch_vit, tmp_path):
    spectra = ll.spectra(patch_vit, progress=False)

    def changed(change):
        adapted = ll.attach(patch_vit, ll.Window.middle(4), spectra=spectra)
        change(adapted, adapted.get_base_model().blocks[1].mlp)
        return adapted

    cases = (
        (lambda a, mlp: setattr(mlp, "fc1", nn.Linear(32, 128)), "blocks.1.mlp.fc1 lost the adapter"),
        (lambda a, mlp: setattr(mlp, "fc1", mlp.fc1.get_base_layer()), "blocks.1.mlp.fc1 lost the adapter"),
        (lambda a, mlp: second(a).set_adapter("second"), "has second active and not 'default'"),
        (lambda a, mlp: a.delete_adapter("default"), "has no adapter active"),
        (lambda a, mlp: setattr(mlp, "extra", copy.deepcopy(mlp.fc1)), "blocks.1.mlp.extra was adapted by"),
        (lambda a, mlp: delattr(mlp, "fc2"), "blocks.1.mlp.fc2 lost the adapter"),
    )
    for change, message in cases:
        adapted = changed(change)
        for ask in (
            ll.summary,
            lambda a: ll.forgetting.drift(a, spectra),
            lambda a: ll.export(a, tmp_path / "e"),
            lambda a: ll.save(a, tmp_path / "s"),
        ):
            with pytest.raises(ValueError, match=message):
                ask(adapted)
    assert not list(tmp_path.iterdir())
    idle = changed(lambda a, mlp: second(a))  # as TRL's DPO keeps its reference
    assert ll.summary(idle).equals(ll.summary(changed(lambda a, mlp: None)))


def second(adapted: PeftModel) -> PeftModel:
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["qkv", "fc1"]))
    return adapted


def small_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


ASKED = {
    "summary": ll.summary,
    "drift": lambda a: ll.forgetting.drift(a, ll.spectra(small_llama(), progress=False)),
    "export": lambda a: ll.export(a, "new"),
    "export_residual": lambda a: ll.export_residual(a, "new"),
    "save": lambda a: ll.save(a, "new"),
    "detach": ll.detach,
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_weights_that_went_elsewhere_after_attach_are_asked_for_in_words(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted = ll.attach(small_llama(), ll.Window.middle(4))
    accelerate.cpu_offload(adapted, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj are offloaded .*remove_hook_from_submodules"):
        ask(adapted)
    accelerate.hooks.remove_hook_from_submodules(adapted)
    ask(adapted)


def test_detaching_a_model_that_was_cast_or_cut_is_refused():
    model = small_llama()
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        adapted = ll.attach(model, ll.Window.middle(4)).to(kind)
        with pytest.raises(ValueError, match=f"q_proj was cast from torch.float32 to {kind} after attach"):
            ll.detach(adapted)
        with pytest.raises(ValueError, match="was cast from"):
            ll.detach(adapted, original=model)
    adapted = ll.attach(model, ll.Window.middle(4))
    adapted.get_base_model().model.layers = adapted.get_base_model().model.layers[:1]
    with pytest.raises(ValueError, match="lost the adapter that attach gave"):
        ll.detach(adapted)


def test_another_scaling_is_noticed_until_it_is_undone(patch_vit, tmp_path):
    adapted = ll.attach(patch_vit, ll.Window.middle(4), alpha=8)
    layer = lora_layers(adapted)["blocks.0.attn.qkv"]
    layer.set_scale("default", 0.5)
    for ask in (ll.summary, lambda a: ll.export(a, tmp_path / "e"), lambda a: ll.save(a, tmp_path / "s")):
        with pytest.raises(ValueError, match=r"the scaling of blocks.0.attn.qkv is 1, and attach made it 2"):
            ask(adapted)
    layer.set_scale("default", 1)
    ll.save(adapted, tmp_path / "s")


def test_the_summary_of_a_merged_adapter_is_refused(patch_vit):
    adapted = ll.attach(patch_vit, ll.Window.middle(4))
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="is merged into its base; call unmerge_adapter"):
        ll.summary(adapted)


def test_a_layer_that_is_called_base_layer_comes_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "default": nn.Linear(8, 8)})
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.parts["default"](self.parts["base_layer"](x).relu()))

    model, x = Net().eval(), torch.randn(3, 8)
    adapted = ll.attach(model, ll.Window.middle(2))
    assert ll.function_error(adapted, model, x) < 1e-6
    assert torch.equal(ll.detach(adapted)(x), model(x))


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled blocks": lambda model: blocks_in(model, lambda block: torch.compile(block, backend="eager")),
    "checkpointed layers": lambda model: checkpointed(model),
    "regions": lambda model: regions(model),
}


def blocks_in(model, wrap):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.blocks = nn.Sequential(*map(wrap, inner.blocks))
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    kinds = ("Block", "Linear")
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in kinds)
    return model


def regions(model):
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_survive_wrappers_after_and_before_attach(wrap, patch_vit, tmp_path):
    model, x = patch_vit.eval(), torch.randn(3, 1, 28, 28)
    spectra = ll.spectra(model, progress=False)
    plain = moved(ll.attach(model, ll.Window.middle(4), spectra=spectra, modules_to_save="head"))
    rows, drifts = ll.summary(plain), ll.forgetting.drift(plain, spectra)

    later = wrap(copy.deepcopy(plain))
    assert ll.function_error(later, plain, x) < 1e-6
    assert ll.summary(later).equals(rows)
    assert ll.forgetting.drift(later, spectra).equals(drifts)
    assert list(ll.export(later, tmp_path / "export")["layer"]) == list(rows["layer"])
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "export").eval()
    assert ll.function_error(theirs, plain, x) < 1e-5
    ll.save(later, tmp_path / "saved")
    assert ll.function_error(ll.load(model, tmp_path / "saved").eval(), plain, x) < 1e-6
    assert ll.function_error(ll.detach(later), model, x) == 0

    earlier = wrap(copy.deepcopy(model))
    assert list(target_layers(earlier)) == list(target_layers(model))
    for inplace in (False, True):
        adapted = ll.attach(earlier, ll.Window.middle(4), spectra=spectra, inplace=inplace).eval()
        assert ll.function_error(adapted, model, x) < 1e-6
        assert list(ll.summary(adapted)["layer"]) == list(rows["layer"])
        moved(adapted)
        assert ll.function_error(adapted, model, x) > 1e-3
        assert ll.function_error(ll.detach(adapted, model), model, x) == 0
