from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_lens as ll

IDS = {"input_ids": torch.arange(2, 18).view(2, 8)}
EMBEDDINGS = {"gpt2": ["wte", "lm_head"], "llama": ["embed_tokens", "lm_head"]}


def language_model(kind: str, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **sizes)).eval()


def trained(adapted: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapted


def read_back(model: nn.Module, folder) -> tuple[nn.Module, PeftModel]:
    base = type(model).from_pretrained(folder / "base").eval()
    return base, PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_tied_embeddings_trained_in_full_are_written_and_read_back(kind, tmp_path):
    model = language_model(kind)
    adapted = trained(ll.attach(model, ll.Window(rank=4, start=0), modules_to_save=EMBEDDINGS[kind]))
    ll.export_residual(adapted, tmp_path / "both")
    base, plain = read_back(model, tmp_path / "both")
    assert ll.function_error(plain, model, IDS) < 1e-5
    assert ll.function_error(ll.load(base, tmp_path / "both" / "adapter"), model, IDS) < 1e-5
    ll.export(adapted, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert ll.function_error(plain, adapted, IDS) < 1e-5
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(model, tmp_path / "saved"), adapted, IDS) == 0


def test_tensors_shared_against_the_config_are_written_in_full(tmp_path):
    model = language_model("llama", tied=False)
    model.lm_head.weight = (
        model.model.embed_tokens.weight
    )  # transformers would leave it out, and draw a new one
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    ll.export_residual(
        ll.attach(model, ll.Window(rank=4, start=0), targets="all-attention"), tmp_path / "both"
    )
    _, plain = read_back(model, tmp_path / "both")
    assert ll.function_error(plain, model, IDS) < 1e-5


class Tied(nn.Module):
    def __init__(self, overlapping: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        if overlapping:
            rows = torch.randn(25, 8)
            self.embed.weight, self.head.weight = nn.Parameter(rows[:20]), nn.Parameter(rows[5:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.embed(x))))


@pytest.mark.parametrize("overlapping", [False, True])
def test_plain_modules_with_shared_tensors_are_written_and_read_back(overlapping, tmp_path):
    model, x = Tied(overlapping).eval(), torch.arange(20)
    adapted = trained(
        ll.attach(model, ll.Window(rank=4, start=0), targets="inner", modules_to_save=["embed"])
    )
    ll.export_residual(adapted, tmp_path / "both")
    base = Tied(overlapping).eval()
    if overlapping:  # load_model takes no tensors that overlap
        base.load_state_dict(load_file(tmp_path / "both" / "base" / "model.safetensors"))
    else:
        load_model(base, tmp_path / "both" / "base" / "model.safetensors")
    assert ll.function_error(PeftModel.from_pretrained(base, tmp_path / "both" / "adapter"), model, x) < 1e-5


@pytest.mark.parametrize("regions", [True, False], ids=["compile_regions", "compiled blocks"])
def test_compiled_blocks_leave_no_trace_in_what_is_written(regions, tmp_path):
    from accelerate.utils import compile_regions

    model = language_model("gpt2")
    adapted = trained(ll.attach(model, ll.Window(rank=4, start=0), modules_to_save=["ln_f"]))
    reference = copy.deepcopy(adapted)
    if regions:
        adapted = compile_regions(adapted, backend="eager")
    else:
        blocks = adapted.get_base_model().transformer.h
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block, backend="eager")
    assert set(ll.export(adapted, tmp_path / "lora")["rank"]) == {8}
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert ll.function_error(plain, reference, IDS) < 1e-5
    ll.save(adapted, tmp_path / "saved")
    assert ll.function_error(ll.load(model, tmp_path / "saved"), reference, IDS) == 0
    ll.export_residual(adapted, tmp_path / "both")
    _, plain = read_back(model, tmp_path / "both")
    assert ll.function_error(plain, model, IDS) < 1e-5
    adapted.save_pretrained(tmp_path / "checkpoint")
    again = ll.load(model, tmp_path / "saved", checkpoint=tmp_path / "checkpoint")
    assert ll.function_error(again, reference, IDS) == 0


@pytest.mark.parametrize("adapted_part", ["with head", "without"])
@pytest.mark.parametrize("stored_part", ["with head", "without"])
def test_detach_takes_the_file_of_the_model_with_or_without_its_head(adapted_part, stored_part, tmp_path):
    model = language_model("gpt2")
    parts = {"with head": model, "without": model.transformer}
    parts[stored_part].save_pretrained(tmp_path)
    untouched = copy.deepcopy(parts[adapted_part])
    for original in (tmp_path, copy.deepcopy(parts[stored_part])):
        mine = copy.deepcopy(untouched)
        adapted = trained(ll.attach(mine, ll.Window(rank=4, start=0), inplace=True))
        bare = ll.detach(adapted, original=original)
        assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), untouched.parameters(), strict=True))
    other = ll.attach(copy.deepcopy(untouched), ll.Window(rank=4, start=0), inplace=True)
    with pytest.raises(ValueError, match="is not the model that was adapted"):
        ll.detach(other, original=language_model("llama"))


def test_a_checkpoint_with_resized_embeddings_needs_the_model_of_then(tmp_path):
    model = language_model("llama")
    model.save_pretrained(tmp_path / "pretrained")
    first, later = (LlamaForCausalLM.from_pretrained(tmp_path / "pretrained").eval() for _ in range(2))
    first.resize_token_embeddings(60)
    adapted = ll.attach(first, ll.Window(rank=4, start=0))
    ll.save(adapted, tmp_path / "saved")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "pretrained")
    trained(adapted).save_pretrained(tmp_path / "checkpoint")
    state = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in state
    settings = {"folder": tmp_path / "saved", "checkpoint": tmp_path / "checkpoint"}
    assert ll.function_error(ll.load(first, **settings), adapted, IDS) == 0
    with pytest.raises(ValueError, match=r"with 60 rows, 50 in this model.*resize_token_embeddings\(60\)"):
        ll.load(later, **settings)
    later.resize_token_embeddings(60)  # draws new rows
    with pytest.raises(ValueError, match=r"other values than in this model.*'lm_head.weight': \.\.\."):
        ll.load(later, **settings)
    later.load_state_dict({"lm_head.weight": state["base_model.model.lm_head.weight"]}, strict=False)
    assert ll.function_error(ll.load(later, **settings), adapted, IDS) == 0
