"""The script for people's own language models, as they run it: in one process, and in two."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from clean_processes import printed
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lora_lens as ll

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "finetune_llm.py"
LAYERS = 14  # two blocks of seven
LONGEST = 90  # characters of a text; all of them fit --most-tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama with random weights and a tokenizer of its own in "model", and texts in files."""
    folder = tmp_path_factory.mktemp("llm")
    movies, articles = ll.tasks.bundled_texts.sentiment("movies"), ll.tasks.bundled_texts.articles()
    save_tokenizer(movies.train.texts[:1000], folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=700, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for part, count in (("train", 200), ("test", 60)):
        texts = getattr(movies, part)
        rows = [
            {"review": text, "label": movies.classes[label]}
            for text, label in zip(texts.texts, texts.labels, strict=True)
            if len(text) < LONGEST
        ]
        write(folder / f"{part}.jsonl", rows[:count])
    write(folder / "articles.jsonl", [{"review": text} for text in articles.train.texts[:10]])
    return folder


def save_tokenizer(texts: tuple[str, ...], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(folder: Path, output: Path, changed: Mapping[str, object] | None = None) -> list[str]:
    settings = {
        "model": folder / "model", "train": folder / "train.jsonl", "test": folder / "test.jsonl",
        "retain": folder / "articles.jsonl", "text": "review", "rank": 4, "lr": 1e-2, "steps": 12,
        "words": "negative=bad", "most-tokens": 100, "output": output,
    }  # fmt: skip
    return [
        part for name, value in (settings | (changed or {})).items() for part in (f"--{name}", str(value))
    ]


def told(code: str, folder: Path, output: Path) -> dict[str, list[float]]:
    """The numbers on each line that the script printed."""
    start = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}\n"
    lines = printed(start + code, *options(folder, output)).splitlines()
    lines = [line for line in lines if line and not line.startswith("adapter")]
    found = {
        line[:16].strip(): [float(x) for x in re.findall(r"[+-]?\d+\.?\d*", line[16:])] for line in lines
    }
    assert len(found) == len(lines)  # so no process repeated another's
    return found


@pytest.fixture(scope="module")
def one(folder) -> dict[str, list[float]]:
    return told("runpy.run_path(sys.argv[0], run_name='__main__')", folder, folder / "one")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, list[float]]:
    """Started by what torchrun itself calls, but forked: new processes would import everything anew."""
    code = """
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def run():
    runpy.run_path(sys.argv[0], run_name="__main__")

config = LaunchConfig(
    1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"
)
elastic_launch(config, run)()
"""
    return told(code, folder, folder / "two")


def updates(output: Path) -> dict[str, Tensor]:
    """B A of every layer, as exported."""
    state = load_file(output / "adapter_model.safetensors")
    return {
        name.removesuffix(".lora_A.weight"): state[name.replace("lora_A", "lora_B")] @ a
        for name, a in state.items()
        if "lora_A" in name
    }


def test_the_script_tells_what_was_learnt_and_what_it_cost(one):
    assert list(one) == ["accuracy", "test loss", "retained loss", "loss rise", "forgetting", "seconds"]
    before, after = one["test loss"]
    assert after < before - 0.5
    before, after = one["retained loss"]
    assert before == pytest.approx(math.log(700), abs=0.2)  # random weights know nothing
    assert one["loss rise"] == [pytest.approx(after - before, abs=2e-4)] and after != before


def test_gradients_reach_every_adapter_through_checkpointing(folder, one):
    found = updates(folder / "one")
    assert len(found) == LAYERS and all(float(update.norm()) > 1e-2 for update in found.values())


def test_two_processes_do_what_one_does(folder, one, two):
    for name in set(one) - {"seconds"}:
        assert one[name] == pytest.approx(two[name], abs=2e-4), name
    torch.testing.assert_close(updates(folder / "two"), updates(folder / "one"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("output", ["one", "two"])
def test_peft_alone_gives_the_trained_model(folder, output, request):
    """Its answers to the test texts, computed one by one without lora_lens."""
    printed = request.getfixturevalue(output)
    pretrained = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    before = loss_and_accuracy(pretrained, folder)
    after = loss_and_accuracy(PeftModel.from_pretrained(pretrained, folder / output).eval(), folder)
    for place, (loss, accuracy) in enumerate((before, after)):
        assert printed["test loss"][place] == pytest.approx(loss, abs=1e-4)
        assert printed["accuracy"][place] == pytest.approx(accuracy, abs=1e-4)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, folder: Path) -> tuple[float, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    words = [tokenizer(f" {name}")["input_ids"] for name in ("bad", "positive")]
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    scores = []
    for row in rows:
        prompt = tokenizer(row["review"])["input_ids"] + tokenizer("\nSentiment:")["input_ids"]
        likely = [model(torch.tensor([prompt + word])).logits[0].log_softmax(-1) for word in words]
        scores.append(
            [
                sum(float(p[len(prompt) - 1 + place, token]) for place, token in enumerate(word))
                for p, word in zip(likely, words, strict=True)
            ]
        )
    labels = torch.tensor([int(row["label"] == "positive") for row in rows])
    logits = torch.tensor(scores)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return float(nn.functional.cross_entropy(logits, labels)), float(accuracy)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("finetune_llm")


def test_a_missing_file_is_one_line_and_status_2(script, folder, tmp_path, monkeypatch, capsys):
    missing = options(folder, tmp_path / "out", {"train": tmp_path / "nothing.jsonl"})
    monkeypatch.setattr(sys, "argv", ["finetune_llm.py", *missing])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and "Traceback" not in said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("finetune_llm.py")]
    assert line == f"finetune_llm.py: error: there is no file {tmp_path / 'nothing.jsonl'}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"words": "happy=good"}, "there is no class 'happy'; the texts have negative, positive"),
        ({"words": "positive=negative"}, "the tokens of ' negative' begin those of ' negative'"),
        ({"label": "stars"}, "has no column 'stars'"),
        ({"prompt": "Sentiment:"}, r"the prompt must hold \{text\} once"),
        ({"rank": 100}, "rank 100 .*q_proj|q_proj.* rank 100"),
        ({"lr": -1}, "lr must be positive and finite, not -1.0"),
        ({"most-tokens": 300}, "the longest text has|most_tokens"),
        ({"output": EXAMPLES}, "exists already; choose a new folder"),
    ],
    ids=["unknown class", "equal words", "column", "prompt", "rank", "rate", "tokens", "output"],
)
def test_bad_input_is_one_line_and_status_2(script, folder, tmp_path, monkeypatch, capsys, changed, message):
    if "most-tokens" in changed:
        write(
            tmp_path / "long.jsonl", [{"review": f"{c} " * 250, "label": c} for c in ("negative", "positive")]
        )
        changed = changed | {"train": tmp_path / "long.jsonl"}
    monkeypatch.setattr(sys, "argv", ["finetune_llm.py", *options(folder, tmp_path / "out", changed)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and re.match(f"finetune_llm.py: error: .*({message})", lines[0]), lines


def bytes_of(*tensors: Tensor) -> int:
    """What they take in memory, what they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_kept_in_memory_is_what_the_page_says(folder, inplace):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    base, targets = bytes_of(*model.parameters()), sum(2 * layer.weight.numel() for layer in linear(model))
    factors = sum(4 * 4 * sum(layer.weight.shape) for layer in linear(model))  # of rank 4, float32
    adapted = ll.attach(model, ll.Window.middle(4), inplace=inplace)
    del model  # which does not free what attach keeps of it
    starts = adapted.attachment.starts.values()
    originals = [start.original for start in starts if start.original is not None]
    assert bytes_of(*adapted.parameters()) == base + factors
    assert bytes_of(*(t for start in starts for t in (start.a, start.b))) == factors
    assert bytes_of(*originals) == (0 if inplace else targets)
    ids = {"input_ids": torch.arange(12)[None]}
    adapted(**ids).logits.float().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert bytes_of(*(p.grad for p in trained)) == factors
    moments = [m for state in optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
    assert bytes_of(*moments) == 2 * factors


def linear(model: nn.Module) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def test_the_page_names_options_that_exist(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_llm.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    option = re.compile(r"--[a-z][a-z_-]*")
    known = set(option.findall(capsys.readouterr().out.split("options:")[1]))
    others = {"--nproc-per-node", "--multi_gpu", "--num_processes", "--cpu", "--photos"}
    used = set(option.findall((EXAMPLES / "README.md").read_text())) - others
    assert {"--model", "--train", "--output"} <= used <= known
