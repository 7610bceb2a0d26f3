from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lens as ll
from lora_lens._base.errors import LoraLensError
from lora_lens.adapters.replacing import write_about

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
VALUES = [None, True, 0, -1, 2, 1.5, float("nan"), 1e400, "", "x", "LORA", [], [1], ["0"], {}, {"a": 1}, [[]]]


class Mixed(nn.Module):
    """Linear and convolution, so that factors have several shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
        self.conv = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(torch.tanh(self.inner(x)).view(len(x), 4, 4)).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture
def adapted(model) -> nn.Module:
    method = {"inner.0": ll.Window(rank=3, start=0), "conv": ll.Window(rank=4, start=1)}
    adapted = ll.attach(model, method, modules_to_save=["head"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    return adapted


@pytest.fixture
def folder(adapted, tmp_path) -> Path:
    ll.save(adapted, tmp_path / "a")
    return tmp_path / "a"


def mutated(value: object) -> Iterator[object]:
    """``value`` with each of its parts in turn replaced by something else, or gone."""
    yield from (v for v in VALUES if v != value or type(v) is not type(value))
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items)[:40]:
        rest = value.copy()
        del rest[key]
        yield rest
        for other in mutated(part):
            changed = value.copy()
            changed[key] = other
            yield changed
    if isinstance(value, dict):
        yield {**value, "later": "x"}


def loads_or_says(model: nn.Module, folder: Path, reference: nn.Module | None = None) -> bool:
    """Whether it loads; if not, it must be with a word of ours and the model untouched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
        try:
            loaded = ll.load(mine, folder, inplace=True)
        except LoraLensError as error:
            assert len(str(error)) > 20
            assert str(mine) == str(model) and type(mine) is type(model)
            assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items())
            assert all(p.requires_grad for p in mine.parameters())
            return False
    if reference is not None:
        assert ll.function_error(loaded, reference, X) < 1e-5
    return True


@pytest.mark.parametrize("earlier", [True, False], ids=["earlier version", "signed"])
def test_a_lora_lens_json_with_any_field_wrong_is_refused_or_makes_no_difference(
    earlier, adapted, model, folder
):
    path = folder / "lora_lens.json"
    known = json.loads(path.read_text())
    if earlier:  # it had neither list nor hash
        del known["sha256"], known["files"]
    loaded = 0
    for changed in mutated(known):
        path.write_text(json.dumps(changed))
        loaded += loads_or_says(model, folder, adapted)
    assert loaded < 30 if earlier else loaded < 12
    for text in ("", "{", "[]", "null", '"x"', "\x00", "[" * 5000):
        path.write_text(text)
        assert not loads_or_says(model, folder)
    path.write_bytes(b"\xff\xfe{}")
    assert not loads_or_says(model, folder)


def test_an_adapter_config_with_any_field_wrong_is_refused_or_taken_with_a_warning(model, folder):
    path = folder / "on_residual" / "adapter_config.json"
    known = json.loads(path.read_text())
    for changed in mutated(known):
        path.write_text(json.dumps(changed))
        loads_or_says(model, folder)
    path.write_text(json.dumps({**known, "lora_dropout": 0.5}))
    with pytest.warns(UserWarning, match=r"adapter_config.json was changed since lora_lens wrote it"):
        ll.load(model, folder)
    path.write_text(json.dumps({**known, "later": 3}))
    with pytest.warns(UserWarning, match=r"written by a later version of PEFT.*later=3"):
        ll.load(model, folder)
    path.write_text(json.dumps({**known, "lora_bias": True}))
    with pytest.raises(ValueError, match="lora_bias=True, which no adapter of lora_lens has"):
        ll.load(model, folder)


def test_tensors_that_are_missing_too_many_or_others_are_refused_by_name(model, folder):
    about = json.loads((folder / "lora_lens.json").read_text())
    kept = {key: value for key, value in about.items() if key not in ("sha256", "files")}
    for name in ("start.safetensors", "on_residual/adapter_model.safetensors"):
        known = load_file(folder / name)
        key = min(known)
        wrong = {
            "missing": {k: t for k, t in known.items() if k != key},
            "more": {**known, "other": torch.ones(2)},
            "integers": {**known, key: known[key].to(torch.int32)},
            "shape": {**known, key: known[key].flatten()[:3].clone()},
            "empty": {},
        }
        for tensors in wrong.values():
            save_file(tensors, folder / name)
            write_about(folder, kept)  # as if it had been written so
            with pytest.raises(LoraLensError, match=r"other|inner|conv|head"):
                ll.load(model, folder)
            assert not loads_or_says(model, folder)
        save_file(known, folder / name)
    write_about(folder, kept)
    assert loads_or_says(model, folder)


def test_what_only_lora_lens_writes_must_be_as_it_was_written(model, folder):
    tensors = load_file(folder / "start.safetensors")
    tensors[min(tensors)] += 1
    save_file(tensors, folder / "start.safetensors")
    with pytest.raises(ValueError, match=r"start.safetensors is not as lora_lens wrote it"):
        ll.load(model, folder)


def test_a_missing_config_does_not_ask_the_hub(adapted, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ll.export(adapted, "a/b")
    Path("a/b/adapter_config.json").unlink()

    def asked(*names: object, **settings: object) -> None:
        raise AssertionError(f"asked the hub for {names}")

    monkeypatch.setattr("peft.config.hf_hub_download", asked)
    with pytest.raises(FileNotFoundError, match=r"a/b lacks adapter_config.json"):
        ll.load(model, "a/b")


def test_checkpoints_in_the_forms_that_trainers_leave_them(adapted, model, folder, tmp_path):
    adapted.save_pretrained(tmp_path / "ck")
    file = tmp_path / "ck" / "adapter_model.safetensors"
    state = load_file(file)
    for wrapped in (
        {k.replace("inner.0", "inner._orig_mod.0"): t for k, t in state.items()},
        {f"module.{k}": t for k, t in state.items()},
        {k.replace(".weight", ".default.weight") if "lora" in k else k: t for k, t in state.items()},
    ):
        save_file(wrapped, file)
        for place in (tmp_path / "ck", file):
            assert ll.function_error(ll.load(model, folder, checkpoint=place), adapted, X) == 0
    (tmp_path / "named" / "default").mkdir(parents=True)
    save_file(state, tmp_path / "named" / "default" / "adapter_model.safetensors")
    assert ll.function_error(ll.load(model, folder, checkpoint=tmp_path / "named"), adapted, X) == 0

    (tmp_path / "pickled").mkdir()
    torch.save(state, tmp_path / "pickled" / "adapter_model.bin")
    wrong = {
        tmp_path / "pickled": "pickled files are not opened",
        tmp_path / "pickled" / "adapter_model.bin": "is no .safetensors file",
        tmp_path: "give one of its folders: ck",
        tmp_path / "none": "there is no file or folder",
        "": "checkpoint must be",
        3: "checkpoint must be",
    }
    for place, words in wrong.items():
        with pytest.raises(LoraLensError, match=words):
            ll.load(model, folder, checkpoint=place)
    ll.export(adapted, tmp_path / "exported")
    with pytest.raises(ValueError, match=r"holds what ll.save or ll.export wrote, kind 'adapter'"):
        ll.load(model, folder, checkpoint=tmp_path / "exported")


def test_arguments_of_other_types_are_named(adapted, model, folder):
    for wrong, words in (
        (lambda: ll.load(None, folder), "model must be the pretrained model, not None"),
        (lambda: ll.load(model, folder, inplace=1), "inplace must be True or False, not 1"),
        (lambda: ll.load(model, None), "folder must be the path of a folder, not None"),
        (lambda: ll.save(None, folder), "not NoneType"),
        (lambda: ll.save(model, folder), "not Mixed"),
        (lambda: ll.export(adapted, folder, rank=0), "rank must be at least 1, not 0"),
        (lambda: ll.export(adapted, folder, rank=1.5), "rank must be a whole number, not 1.5"),
        (lambda: ll.export(adapted, folder, rank="8"), "rank must be a whole number, not '8'"),
        (lambda: ll.export(adapted, folder, rank=True), "rank must be a whole number, not True"),
        (lambda: ll.load(model, folder / "start.safetensors"), "there is no folder"),
    ):
        with pytest.raises(LoraLensError, match=words):
            wrong()
