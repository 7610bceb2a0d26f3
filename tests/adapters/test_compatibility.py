"""Which models, operations and dtypes work, tried one by one; docs/models.md shows the outcome.

`PYTHONPATH=tests python tests/adapters/test_compatibility.py` tries all of them and rewrites the page's
tables.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_model
from torch import Tensor, nn

import lora_lens as ll
from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.spectrum.layer_weights import matrix_shape

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- compatibility -->", "<!-- /compatibility -->"
RANK, ALPHA = 4, 10  # scaling is 2.5, with rsLoRA 5: a scaling that is forgotten or used twice shows
DTYPES = {"32": torch.float32, "b16": torch.bfloat16, "16": torch.float16}
# float32 does sums of a few hundred terms. Of the half types, whose residual and activations are rounded
# once more than the pretrained weight, 0.4 to 2.8 eps were measured; training moves the outputs far more.
TOLERANCE = {d: 1e-5 if d == torch.float32 else 4 * torch.finfo(d).eps for d in DTYPES.values()}


@dataclass(frozen=True)
class Family:
    """A small model with random weights, what it is given, and which layers get which window."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: str | None = None
    middle: str = "all-attention"  # in the mapping per layer: these get the middle window
    last: str = "all-mlp"  # and these the last one


def language(kind: str, head: str = "ForCausalLM", **settings: object) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, kind + head)(config(**sizes | ends | {"vocab_size": 99} | settings))


def vision(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **settings)


def tokens() -> Tensor:
    return torch.randint(3, 99, (2, 9))


def images(side: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, side, side)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 5))


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)


# Tiny layer scales and heads would hide what happens in the layers, and in float16 their gradients, too.
VISIBLE = {"head_init_scale": 1.0, "init_values": None, "global_pool": "token"}
TWO_STAGES = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32}
FAMILIES = {
    "Llama, lm_head tied (transformers)": Family(
        language("Llama", num_key_value_heads=2, tie_word_embeddings=True), tokens
    ),
    "Qwen2 (transformers)": Family(language("Qwen2", num_key_value_heads=2), tokens),
    "GPT-2 (transformers)": Family(language("GPT2", head="LMHeadModel"), tokens),
    "BERT (transformers)": Family(language("Bert", head="ForSequenceClassification"), tokens),
    "ViT (transformers)": Family(
        language("ViT", head="ForImageClassification", image_size=32, patch_size=8), images(32)
    ),
    "ViT (timm)": Family(vision("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1), images(32)),
    "BEiT (timm), all but attn.qkv": Family(
        vision("beit_base_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2, **VISIBLE),
        images(32),
    ),
    "Swin (timm)": Family(vision("swin_tiny_patch4_window7_224", img_size=56, **TWO_STAGES), images(56)),
    "SwinV2 (timm), all-mlp": Family(
        vision("swinv2_tiny_window8_256", img_size=64, **TWO_STAGES), images(64), "all-mlp", "fc1", "fc2"
    ),
    "ConvNeXt (timm), all-conv": Family(
        vision(
            "convnext_atto",
            depths=(1, 1, 1, 1),
            dims=(32, 48, 64, 80),
            ls_init_value=None,
            head_init_scale=1.0,
        ),
        images(32),
        "all-conv",
        "fc1",
        "all-conv",
    ),
    "ResNet (timm), all-conv": Family(
        vision("resnet10t", channels=(12, 16, 20, 24)), images(32), "all-conv", "conv2", "all-conv"
    ),
    "nn.Sequential": Family(plain, lambda: torch.randn(8, 24), None, "0", "all-linear"),
}


@dataclass
class Trial:
    """One cell: its model, inputs and dtype, and an empty folder."""

    family: Family
    dtype: torch.dtype
    folder: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.family.build().eval().to(self.dtype)
        for name, p in self.model.named_parameters():
            if name.endswith("weight") and not p.any():  # a norm that starts so would hide its block
                nn.init.ones_(p)
        x = self.family.inputs()
        self.inputs = x.to(self.dtype) if x.is_floating_point() else x

    def attach(self, method: object = None, **settings: object) -> PeftModel:
        method = method or ll.Window.middle(RANK)
        return ll.attach(self.model, method, targets=self.family.targets, alpha=ALPHA, **settings)

    def trained(self, norms: bool = True, **settings: object) -> PeftModel:
        """As after training, and visibly so: whatever loses the training fails the comparison.

        With ``norms`` the running statistics of batch norms have moved, too, as training mode moves them.
        """
        adapted = self.attach(**settings)
        with torch.no_grad():
            if norms:
                adapted.train()(self.inputs)
                adapted.eval()
            for name, p in adapted.named_parameters():
                if ".lora_" in name:
                    p.add_(0.08 * torch.randn_like(p))
        moved = ll.function_error(adapted, self.model, self.inputs)
        assert moved > 4 * TOLERANCE[self.dtype] and moved > 1e-2, f"the outputs moved by {moved:.1e} only"
        return adapted

    def untouched(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def check_same(self, model: nn.Module, reference: nn.Module) -> None:
        error = ll.function_error(model, reference, self.inputs)
        assert error < TOLERANCE[self.dtype], f"the outputs differ by {error:.1e}"


def start(trial: Trial) -> None:
    trial.check_same(trial.attach(), trial.model)


def start_and_export(trial: Trial, variant: ll.Variant) -> None:
    trial.check_same(trial.attach(variant=variant), trial.model)
    export(trial, norms=False, variant=variant)


def per_layer(trial: Trial) -> None:
    family, model = trial.family, trial.model
    adapted = trial.attach({family.middle: ll.Window.middle(RANK), family.last: ll.Window.last(RANK)})
    trial.check_same(adapted, model)
    table = ll.summary(adapted).set_index("layer")
    middle, last = target_layers(model, family.middle), target_layers(model, family.last)
    components = {name: min(matrix_shape(layer)) for name, layer in (middle | last).items()}
    assert set(middle) and set(last) - set(middle)
    assert {name for name in table.index if table["last"][name] == components[name] - 1} == (
        set(last) - set(middle)
    )
    assert set(table.index) == set(components)
    for name, delta in deltas(adapted).items():
        weight = model.get_submodule(name).weight.detach().double().flatten(1)
        window = torch.linalg.svdvals(weight)[int(table["first"][name]) : int(table["last"][name]) + 1]
        assert torch.linalg.svdvals(delta)[:RANK].tolist() == pytest.approx(window.tolist(), rel=1e-4)


def train(trial: Trial) -> None:
    adapted = trial.attach().train()
    parameters = dict(adapted.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    adapters = {name for name in parameters if ".lora_" in name}
    # Weight decay would change also what gets no gradient.
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3, weight_decay=0)
    outputs = adapted(trial.inputs)
    loss = getattr(outputs, "logits", outputs).float().square().mean()
    (2**10 * loss).backward()  # scaled as usual for float16, where the smallest gradients vanish
    optimizer.step()
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in parameters.values())
    assert {name for name, p in parameters.items() if not torch.equal(p, before[name])} == adapters


def save(trial: Trial) -> None:
    adapted = trial.trained()
    ll.save(adapted, trial.folder / "saved")
    loaded = ll.load(trial.untouched(), trial.folder / "saved")
    tensors = loaded.state_dict()
    differing = [name for name, t in adapted.state_dict().items() if not torch.equal(t, tensors[name])]
    assert not differing, f"{len(differing)} tensors changed, {', '.join(differing[:2])}"
    assert ll.function_error(loaded, adapted, trial.inputs) == 0


def export(trial: Trial, **settings: object) -> None:
    adapted = trial.trained(**settings)
    ll.export(adapted, trial.folder / "exported")
    loaded = PeftModel.from_pretrained(trial.untouched(), trial.folder / "exported")
    trial.check_same(loaded, adapted)


def deltas(adapted: PeftModel) -> dict[str, Tensor]:
    """PEFT's own product of the factors, times the scaling."""
    layers = adapted.get_base_model().named_modules()
    found = {name: layer for name, layer in layers if isinstance(layer, LoraLayer)}
    return {n: layer.get_delta_weight("default").detach().double().flatten(1) for n, layer in found.items()}


def truncate(trial: Trial) -> None:
    initial, adapted = deltas(trial.attach()), trial.trained()
    table = ll.export(adapted, trial.folder / "exported", rank=RANK).set_index("layer")
    loaded = deltas(PeftModel.from_pretrained(trial.untouched(), trial.folder / "exported"))
    assert set(table.index) == set(loaded) == set(initial)
    for name, delta in deltas(adapted).items():
        update = delta - initial[name]
        squares = torch.linalg.svdvals(update).square()
        expected = float(squares[RANK:].sum() / squares.sum())
        left_out = float((update - loaded[name]).square().sum() / squares.sum())
        assert expected > 1e-3, f"truncating {name} loses nothing that could be seen"
        assert table["lost"][name] == pytest.approx(expected, rel=1e-3)
        assert left_out == pytest.approx(expected, rel=1e-3)
        assert torch.linalg.matrix_rank(loaded[name], rtol=1e-5) == table["rank"][name] == RANK


def residual(trial: Trial) -> None:
    # The first window leaves the residual that differs most from the pretrained model.
    adapted, model = trial.trained(method=ll.Window.first(RANK)), trial.model
    ll.export_residual(adapted, trial.folder / "residual")
    saved = trial.folder / "residual" / "base"
    if isinstance(model, transformers.PreTrainedModel):
        base = type(model).from_pretrained(saved, dtype=trial.dtype)
    else:
        base = trial.untouched()
        load_model(base, saved / "model.safetensors")
    error = ll.function_error(base, model, trial.inputs)
    assert error > TOLERANCE[trial.dtype], "the base is the pretrained model, not the residual"
    trial.check_same(PeftModel.from_pretrained(base, trial.folder / "residual" / "adapter"), model)


def merge(trial: Trial) -> None:
    adapted = trial.trained()
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    trial.check_same(merged, adapted)


def detach(trial: Trial) -> None:
    before = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
    plain = ll.detach(trial.trained())
    after = plain.state_dict()
    assert [type(m) for m in plain.modules()] == [type(m) for m in trial.model.modules()]
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert not changed, f"{len(changed)} tensors changed, {', '.join(changed[:2])}"
    assert all(p.requires_grad for p in plain.parameters())
    assert ll.function_error(plain, trial.model, trial.inputs) == 0


def offset(trial: Trial) -> None:
    """To the last bit where nothing was trained, and else as over the residual."""
    exact, model, inputs = {"variant": ll.Variant(base="offset")}, trial.model, trial.inputs
    assert ll.function_error(trial.attach(ll.Window.first(RANK), **exact), model, inputs) == 0
    adapted = trial.trained(norms=False, **exact)
    trial.check_same(adapted, trained_alike(adapted, trial.attach()))
    with adapted.disable_adapter():
        assert ll.function_error(adapted, model, inputs) == 0
    ll.save(adapted, trial.folder / "saved")
    assert ll.function_error(ll.load(trial.untouched(), trial.folder / "saved"), adapted, inputs) == 0
    ll.export(adapted, trial.folder / "exported")
    trial.check_same(PeftModel.from_pretrained(trial.untouched(), trial.folder / "exported"), adapted)
    before = trial.untouched().state_dict()
    trial.check_same(copy.deepcopy(adapted).merge_and_unload(), adapted)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    plain = ll.detach(adapted)
    for now in (model.state_dict(), plain.state_dict()):
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def trained_alike(source: PeftModel, target: PeftModel) -> PeftModel:
    tensors = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in target.named_parameters():
            if ".lora_" in name:
                p.copy_(tensors[name])
    return target


OPERATIONS = {
    "start": start,
    "DoRA": lambda trial: start_and_export(trial, ll.Variant(dora=True)),
    "rsLoRA": lambda trial: start_and_export(trial, ll.Variant(rslora=True)),
    "per layer": per_layer,
    "train": train,
    "save": save,
    "export": export,
    "truncate": truncate,
    "residual": residual,
    "merge": merge,
    "detach": detach,
    "offset": offset,
}


STATISTICS = (
    "training mode moves the running statistics of batch norms, which no adapter can carry: `ll.export` "
    "warns; `ll.finetune` keeps frozen norms in eval mode, and so should your loop"
)


@dataclass(frozen=True)
class Known:
    """Cells that do not work yet: how they fail, and the page's footnote. A cure must show, too."""

    family: str
    operations: tuple[str, ...]
    says: str
    why: str


KNOWN = [
    Known(
        "ResNet (timm), all-conv",
        ("export",),
        r"AssertionError: the outputs differ by",
        STATISTICS,
    ),
]


@cache
def outcome(family: str, operation: str, dtype: str) -> str:
    """ "passed", or what went wrong; each cell is tried once, for its own test and for the table."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            OPERATIONS[operation](Trial(FAMILIES[family], DTYPES[dtype], Path(folder)))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "passed"


@dataclass(frozen=True)
class Refusal:
    """A layer that no window is put into: the reason in the page's words, and in the message's.

    ``needs`` is a package that is not among the tests' requirements: without it the row is taken on trust.
    """

    why: str
    build: Callable[[], nn.Module]
    layer: str
    says: str
    needs: str | None = None


def shared() -> nn.Sequential:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def dilated() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2))


def depthwise() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))


def weight_normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(8, 8)))


def bitsandbytes(kind: str) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(getattr(pytest.importorskip("bitsandbytes").nn, kind)(64, 64))


READ = "another module reads its weight without calling it, and would bypass the adapter"
NORM = "its weight is computed from others: remove the norm first"
REFUSALS = {
    "embedding": Refusal(
        "rows are looked up, no product is formed",
        FAMILIES["Qwen2 (transformers)"].build,
        "model.embed_tokens",
        r"is an embedding",
    ),
    "module used twice": Refusal(
        "PEFT would adapt one of its places alone", shared, "0", r"is also 2, one layer in several places"
    ),
    "grouped or depthwise convolution": Refusal(
        "PEFT's LoRA layer does not reproduce it", depthwise, "0", r"convolution with groups=8"
    ),
    "dilated convolution": Refusal(
        "PEFT's LoRA layer does not reproduce it", dilated, "0", r"convolution with dilation=\(2, 2\)"
    ),
    "`out_proj` of nn.MultiheadAttention": Refusal(
        READ,
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        "0.out_proj",
        r"is bypassed: MultiheadAttention",
    ),
    "`linear1`, `linear2` of nn.TransformerEncoderLayer": Refusal(
        READ, encoder, "layers.0.linear1", r"is bypassed: TransformerEncoder"
    ),
    "`attn.qkv` of timm's BEiT": Refusal(
        READ, FAMILIES["BEiT (timm), all but attn.qkv"].build, "blocks.0.attn.qkv", r"is bypassed"
    ),
    "`attn.qkv` of timm's SwinV2": Refusal(
        READ, FAMILIES["SwinV2 (timm), all-mlp"].build, "layers.0.blocks.0.attn.qkv", r"is bypassed"
    ),
    "torch.nn.utils.weight_norm": Refusal(
        NORM, weight_normed(torch.nn.utils.weight_norm), "0", r"computes its weight"
    ),
    "torch.nn.utils.parametrizations.weight_norm": Refusal(
        NORM, weight_normed(torch.nn.utils.parametrizations.weight_norm), "0", r"computes its weight"
    ),
    "model on the meta device": Refusal("has shapes but no values", on_meta, "0", r"on the meta device"),
    "model adapted already": Refusal(
        "its weights are residuals: detach or merge first",
        lambda: ll.attach(plain(), ll.Window.middle(RANK)),
        "",
        r"adapted already",
    ),
    "bitsandbytes' layers that were not moved to their device yet": Refusal(
        "they are quantized on the way",
        bitsandbytes("Linear4bit"),
        "0",
        r"move bitsandbytes'",
        "bitsandbytes",
    ),
}


@cache
def message(what: str) -> str:
    """What attach says, or nothing if it does not refuse."""
    refusal = REFUSALS[what]
    try:
        ll.attach(refusal.build(), ll.Window.middle(RANK), targets=refusal.layer or None)
    except ValueError as error:
        return str(error)
    return ""


def known(family: str, operation: str) -> Known | None:
    return next((k for k in KNOWN if k.family == family and operation in k.operations), None)


def cell(family: str, operation: str, footnotes: list[str]) -> str:
    passed = [name for name in DTYPES if outcome(family, operation, name) == "passed"]
    if len(passed) == len(DTYPES):
        return "all"
    why = known(family, operation)
    if why and why.why not in footnotes:
        footnotes.append(why.why)
    return " ".join([*passed, f"no ({footnotes.index(why.why) + 1})" if why else "no"])


def tables() -> str:
    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]

    footnotes: list[str] = []
    works = [[family, *(cell(family, o, footnotes) for o in OPERATIONS)] for family in FAMILIES]
    refused: dict[str, list[str]] = {}
    for what, refusal in REFUSALS.items():
        if refusal.needs or message(what):
            refused.setdefault(refusal.why, []).append(what)
    notes = [f"({i}) {why}." for i, why in enumerate(footnotes, 1)]
    lines = table(["", *OPERATIONS], works) + [""] * bool(notes) + notes
    return "\n".join(
        [*lines, "", *table(["refused", "why"], [[", ".join(what), why] for why, what in refused.items()])]
    )


def shown() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_works_or_fails_as_the_page_says(family, operation, dtype):
    expected = known(family, operation)
    said = outcome(family, operation, dtype)
    assert re.match(expected.says, said) if expected else said == "passed"


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_refused_is_named_with_the_reason(what):
    said = message(what)
    assert re.search(REFUSALS[what].says, said)
    assert f"matches {REFUSALS[what].layer}, which" in said or not REFUSALS[what].layer


def test_the_page_shows_these_outcomes():
    assert shown() == tables(), "run PYTHONPATH=tests python tests/adapters/test_compatibility.py"


if __name__ == "__main__":
    found = tables()
    text = PAGE.read_text()
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{found}\n{END}{text.split(END)[1]}")
