"""Adapted models in the loops of others: transformers, TRL, accelerate, torch.compile, quantized bases."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from clean_processes import printed
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import lora_lens as ll

HERE = Path(__file__).parents[1]
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
FENCED = re.compile(r"```py\n(.*?)```", re.DOTALL)
BLOCKS = [(page.name, block) for page in PAGES for block in FENCED.findall(page.read_text())]
MIDDLE = ll.Window.middle(rank=4)


def llama(vocabulary: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def some_ids(count: int = 4, vocabulary: int = 64) -> Tensor:
    return torch.randint(2, vocabulary, (count, 12), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Of every parameter that got one; of a language model's loss, or of the sum of squares."""
    model.train()
    model.zero_grad()
    if inputs.is_floating_point():
        model(inputs).square().sum().backward()
    else:
        model(input_ids=inputs, labels=inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_only_adapters_changed(before: dict[str, Tensor], after: dict[str, Tensor], saved: str = ""):
    """All of A, B and the saved module, and nothing else by a single bit: not the residual, no buffer."""
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = ("lora_A", "lora_B", *([f"{saved}.modules_to_save"] if saved else []))
    assert changed == {name for name in before if any(part in name for part in wanted)}


# transformers


@pytest.fixture(scope="module")
def classification():
    """A small BERT with a new classifier, and sequences whose class their first token tells."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    ids = some_ids(128)
    data = [{"input_ids": row, "labels": int(row[0] < 32)} for row in ids]
    return BertForSequenceClassification(config).eval(), data, {"input_ids": ids}


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=24, save_steps=12, logging_steps=4, per_device_train_batch_size=16,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["residual", "offset"])
def trainer_run(classification, tmp_path_factory, request):
    """A window trained by Trainer, the folder with its start and checkpoints, and its state before."""
    model, data, _ = classification
    folder = tmp_path_factory.mktemp("trainer")
    variant = ll.Variant(base=request.param)
    adapted = ll.attach(model, MIDDLE, modules_to_save=["classifier"], variant=variant)
    before = copy.deepcopy(adapted.state_dict())
    ll.save(adapted, folder / "start")
    trainer = Trainer(adapted, arguments(folder / "out"), train_dataset=data)
    trainer.train()
    return adapted, folder, before, losses(trainer)


def test_trainer_trains_adapters_and_the_saved_module_alone(trainer_run):
    adapted, _, before, loss = trainer_run
    assert len(loss) == 6 and loss[-1] < loss[0] - 0.02
    assert_only_adapters_changed(before, adapted.state_dict(), saved="classifier")


def test_a_checkpoint_of_trainer_goes_on_the_start_that_was_saved(classification, trainer_run):
    model, _, inputs = classification
    adapted, folder, *_ = trainer_run
    again = ll.load(model, folder / "start", checkpoint=folder / "out" / "checkpoint-24")
    assert ll.function_error(again, adapted, inputs) == 0
    earlier = ll.load(model, folder / "start", checkpoint=folder / "out" / "checkpoint-12")
    assert ll.function_error(earlier, adapted, inputs) > 1e-2


def test_what_trainer_trained_is_exported_for_the_original_model(classification, trainer_run, tmp_path):
    model, _, inputs = classification
    adapted = trainer_run[0]
    ll.export(adapted, tmp_path / "exported")
    elsewhere = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    assert ll.function_error(elsewhere, adapted, inputs) < 1e-5
    assert ll.function_error(model, adapted, inputs) > 1e-2


def test_trainer_resumes_from_its_checkpoint(classification, trainer_run, tmp_path):
    model, data, inputs = classification
    adapted, folder, *_ = trainer_run
    shutil.copytree(folder / "out" / "checkpoint-12", tmp_path / "checkpoint-12")
    again = ll.load(model, folder / "start")
    trainer = Trainer(again, arguments(tmp_path), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 24 and len(losses(trainer)) == 6  # three of them from the checkpoint
    assert ll.function_error(again, adapted, inputs) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_gradient_checkpointing_changes_no_gradient(reentrant):
    ids = some_ids()
    expected = gradients(ll.attach(llama(), MIDDLE), ids)
    adapted = ll.attach(llama(), MIDDLE)
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = count_calls(adapted.get_base_model().model.layers[0].input_layernorm)
    assert_equal_gradients(gradients(adapted, ids), expected)
    assert len(calls) == 2  # so it was indeed computed again


def test_timm_gradient_checkpointing_changes_no_gradient(model, source):
    images = source.test.inputs[:4]
    expected = gradients(ll.attach(model, MIDDLE), images)
    adapted = ll.attach(model, MIDDLE)
    adapted.set_grad_checkpointing(True)
    calls = count_calls(adapted.get_base_model().blocks[0].norm1)
    assert_equal_gradients(gradients(adapted, images), expected)
    assert len(calls) == 2


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]):
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(float(g.abs().max()) > 0 for g in expected.values())
    torch.testing.assert_close(found, expected)


# accelerate


def train_with_accelerate(folder: Path, batch_size: int) -> None:
    accelerator = Accelerator(cpu=True)
    adapted = ll.attach(llama(), MIDDLE)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    batches = DataLoader(some_ids(32), batch_size=batch_size)
    wrapped, optimizer, batches = accelerator.prepare(adapted, optimizer, batches)
    for ids in batches:
        accelerator.backward(wrapped(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    result = {"wrapped in": type(wrapped).__name__, "steps": len(batches), "trained": trained(adapted)}
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        ll.export(wrapped, folder / "exported")


def test_two_processes_train_as_one_does_on_both_their_batches(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    # Processes are forked by a fresh one: here, after other tests, threads run that a fork would lack.
    code = f"""
import sys
from pathlib import Path
from accelerate import debug_launcher
sys.path.append({str(Path(__file__).parent)!r})
from test_other_loops import train_with_accelerate
debug_launcher(train_with_accelerate, (Path({str(two)!r}), 4), num_processes=2)
"""
    printed(code)
    train_with_accelerate(one, 8)

    alone, *both = (torch.load(f) for f in (one / "rank0.pt", two / "rank0.pt", two / "rank1.pt"))
    assert [r["steps"] for r in (alone, *both)] == [4, 4, 4]
    assert [r["wrapped in"] for r in both] == ["DistributedDataParallel"] * 2
    torch.testing.assert_close(both[0]["trained"], both[1]["trained"], rtol=0, atol=0)
    torch.testing.assert_close(both[0]["trained"], alone["trained"], rtol=0, atol=1e-5)
    start = trained(ll.attach(llama(), MIDDLE))
    assert all(float((alone["trained"][name] - p).abs().max()) > 1e-3 for name, p in start.items())

    exported = [PeftModel.from_pretrained(llama(), f / "exported") for f in (one, two)]
    inputs = {"input_ids": some_ids()}
    assert ll.function_error(*exported, inputs) < 1e-5
    assert ll.function_error(exported[1], llama(), inputs) > 1e-2


# torch.compile


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)
@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 cannot trace the context managers that PEFT's forward enters"
)
def test_a_compiled_model_is_the_eager_one_and_is_exported_like_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torch._inductor.config.compile_threads", 1
    )  # workers start slower than this compiles
    for base in ("residual", "offset"):
        check_compiled(ll.Variant(base=base), tmp_path / base)


def check_compiled(variant: ll.Variant, folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    x = torch.randn(5, 16)
    eager, adapted = (ll.attach(model, MIDDLE, targets=["0", "2"], variant=variant) for _ in range(2))
    compiled = torch.compile(adapted, fullgraph=True)
    torch.testing.assert_close(compiled(x), eager(x))
    prefix = "_orig_mod."
    found = {name.removeprefix(prefix): g for name, g in gradients(compiled, x).items()}
    assert_equal_gradients(found, gradients(eager, x))

    optimizer = torch.optim.SGD((p for p in compiled.parameters() if p.requires_grad), lr=1e-2)
    optimizer.step()
    ll.export(compiled, folder / "exported")
    elsewhere = PeftModel.from_pretrained(copy.deepcopy(model), folder / "exported")
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(x), compiled(x))
        assert float((elsewhere(x) - model(x)).abs().max()) > 1e-3
    back = ll.detach(compiled)
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)


# TRL


SENTENCES = ["the big cat sat on the mat", "the small dog ran under a hill"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *sorted({w for sentence in SENTENCES for w in sentence.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def test_sfttrainer_trains_a_window_and_it_is_exported(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = llama(len(tokenizer))
    adapted = ll.attach(model, MIDDLE)
    before = copy.deepcopy(adapted.state_dict())
    config = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=12, logging_steps=1, per_device_train_batch_size=8,
        learning_rate=2e-2, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": SENTENCES * 32})
    trainer = trl.SFTTrainer(adapted, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()

    loss = losses(trainer)
    assert len(loss) == 12 and all(map(torch.isfinite, map(torch.tensor, loss)))
    assert loss[-1] < loss[0] - 0.2
    assert_only_adapters_changed(before, adapted.state_dict())
    ll.export(adapted, tmp_path / "exported")
    elsewhere = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    inputs = {"input_ids": tokenizer(SENTENCES[:1], return_tensors="pt")["input_ids"]}
    assert ll.function_error(elsewhere, adapted, inputs) < 1e-5
    assert ll.function_error(model, adapted, inputs) > 1e-1


@pytest.mark.parametrize("base", ["residual", "offset"])
def test_dpotrainer_compares_with_the_pretrained_function_not_with_the_residual(tokenizer, base, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, inputs = llama(len(tokenizer)), {"input_ids": some_ids(vocabulary=len(tokenizer))}
    adapted = ll.attach(model, ll.Window(rank=8, start=0), variant=ll.Variant(base=base))
    with adapted.disable_adapter():
        without = ll.function_error(adapted, model, inputs)
    assert without == 0 if base == "offset" else without > 0.1  # the residual, which is no reference
    config = trl.DPOConfig(
        str(tmp_path / "out"), max_steps=4, logging_steps=1, per_device_train_batch_size=4,
        learning_rate=2e-2, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    pair = {"prompt": "the big", "chosen": " cat sat on the mat", "rejected": " dog ran under a hill"}
    data = datasets.Dataset.from_list([pair] * 16)
    trainer = trl.DPOTrainer(adapted, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()

    loss = losses(trainer)
    assert loss[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: at the start, policy and reference are one
    assert loss[-1] < loss[0] - 1e-3
    ll.export(adapted, tmp_path / "exported")
    elsewhere = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "exported")
    assert ll.function_error(elsewhere, adapted, inputs) < 1e-5
    assert ll.function_error(model, adapted, inputs) > 1e-2


# Quantized bases


def quantization(kind: str) -> TorchAoConfig | BitsAndBytesConfig:
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def minilm_residual(tmp_path_factory):
    """MiniLM, its residual and adapter of the largest 64 components on disk, and sentences."""
    model = ll.tasks.bundled.minilm()
    folder = tmp_path_factory.mktemp("residual") / "minilm"
    ll.export_residual(ll.attach(model, ll.Window(rank=64, start=0)), folder)
    sentences = ["The cat sat on the mat.", "Interest rates rose in March.", "How do I reset my password?"]
    inputs = AutoTokenizer.from_pretrained(model.name_or_path)(sentences, return_tensors="pt", padding=True)
    return model, folder, dict(inputs)


def quantized(source: str | Path, kind: str) -> BertModel:
    return BertModel.from_pretrained(
        source, quantization_config=quantization(kind), device_map="cpu",
        dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def relative_error(model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Of the hidden states of all tokens but padding, whose states nothing reads."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, expected = (m.eval()(**inputs).last_hidden_state[real] for m in (model, reference))
    return float((found - expected).norm() / expected.norm())


# The error of MiniLM rounded as it is; of the residual alone, 0.016, 0.031 and 0.164 were measured.
KINDS = {"torchao int8": 0.027, "bitsandbytes int8": 0.044, "bitsandbytes nf4": 0.229}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_residual_is_rounded_so_a_quantized_base_loses_less(minilm_residual, kind):
    pytest.importorskip(kind.split()[0])
    model, folder, inputs = minilm_residual
    plain = relative_error(quantized(model.name_or_path, kind), model, inputs)
    window = PeftModel.from_pretrained(quantized(folder / "base", kind), folder / "adapter")
    assert plain == pytest.approx(KINDS[kind], rel=0.3)
    assert 0 < relative_error(window, model, inputs) < 0.85 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_trained_over_a_quantized_base(minilm_residual, kind):
    pytest.importorskip(kind.split()[0])
    _, folder, inputs = minilm_residual
    # A fresh one: where bitsandbytes has evaluated 4-bit weights on some CPUs, their gradients are wrong.
    base = quantized(folder / "base", kind)
    adapted = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    before = copy.deepcopy(adapted.state_dict())
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    values = []
    for _ in range(3):
        loss = adapted(**inputs).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[0] > values[1] > values[2]
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    used = {name for name in trained(adapted) if "pooler" not in name}  # the loss does not use the pooler
    assert with_gradient == used
    after = adapted.state_dict()
    for name, old in before.items():
        if isinstance(old, Tensor):  # bitsandbytes also keeps words here
            assert torch.equal(dense(old), dense(after[name])) == (name not in used), name


def dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor


# The pages


def test_the_pages_have_blocks_to_run():
    pages = {"after_training.md", "loops.md", "measures.md", "models.md", "texts.md"}
    assert {page for page, _ in BLOCKS} == pages


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page} {i}" for i, (page, _) in enumerate(BLOCKS)])
def test_every_block_of_the_pages_runs_as_it_stands(page, block, tmp_path, monkeypatch):
    for package in re.findall(r"^from (trl|datasets|torchao)\b", block, re.MULTILINE):
        pytest.importorskip(package)
    (tmp_path / "data").symlink_to(HERE.parent / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {"__name__": page})
