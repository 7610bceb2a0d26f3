from __future__ import annotations

import copy
import json
import sys

import pandas as pd
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lens as ll
from lora_lens.adapters import PEFT_STARTS, PeftMethod
from lora_lens.adapters.attaching import planned
from lora_lens.adapters.injection import lora_layers
from lora_lens.adapters.start import trained_update
from lora_lens.forgetting.basis_rotation import rotations
from lora_lens.spectrum.adaptable_layers import target_layers
from lora_lens.spectrum.layer_weights import weight_matrix
from lora_lens.tasks.readouts import features_of
from lora_lens.tasks.task import fresh_head

SOME = "blocks.[05].*"
SHORT = {"steps": 4, "batch_size": 16, "evaluations": 2, "lr": 1e-2, "progress": False}
NAMES = pytest.mark.parametrize("name", PEFT_STARTS)


@pytest.fixture(scope="module")
def tasks(source, digits) -> tuple[ll.Task, ll.Task]:
    return digits.first(100, 20), source.first(100, 20)


@pytest.fixture(scope="module")
def started(model, tasks):
    """A fresh model with each start, attached once."""
    kept: dict[str, nn.Module] = {}

    def start(name: str) -> nn.Module:
        if name not in kept:
            kept[name] = ll.attach(
                model, PeftMethod(name, 4), task=tasks[0], retain=tasks[1], targets=SOME, seed=3
            )
        return copy.deepcopy(kept[name])

    return start


def product(layer) -> torch.Tensor:
    b, a = trained_update(layer, None)
    return b.double() @ a.double()


@NAMES
def test_the_function_is_the_pretrained_one_until_training_changes_it(
    name, started, model, spectra, tasks, source
):
    adapted, images = started(name), source.test.inputs[:20]
    assert ll.function_error(adapted, model, images) < 1e-5
    before = ll.forgetting.drift(adapted, spectra)
    assert (before["relative"] < 1e-6).all()

    run = ll.finetune(adapted, *tasks, **SHORT)
    assert not run.diverged and ll.function_error(adapted, model, images) > 1e-3
    after = ll.forgetting.drift(adapted, spectra)
    assert (after["relative"] > 1e-4).all() and after["diagonal"].between(0, 1).all()
    shares = after[["inside", "above", "below", "mixed", "left_inside", "right_inside"]]
    assert shares.notna().all(axis=None) if name == "pissa" else shares.isna().all(axis=None)
    assert len(rotations(adapted, spectra)) == len(after)
    with_window = ll.forgetting.drift(adapted, spectra, window=ll.Window.first(4))
    sums = with_window[["inside", "above", "below", "mixed", "outside"]].sum(axis=1)
    assert sums.to_numpy() == pytest.approx(1, abs=1e-6)


@NAMES
def test_the_update_that_drift_measures_is_the_change_of_the_weights(name, started, model, spectra, tasks):
    adapted = started(name)
    ll.finetune(adapted, *tasks, **SHORT)
    measured = ll.forgetting.drift(adapted, spectra).set_index("layer")["update"]
    merged = copy.deepcopy(adapted).merge_and_unload()
    for layer, update in measured.items():
        change = weight_matrix(merged.get_submodule(layer)) - weight_matrix(model.get_submodule(layer))
        assert float(torch.linalg.norm(change)) == pytest.approx(update, rel=1e-3)


@NAMES
def test_detach_gives_the_pretrained_model_back(name, started, model, tasks):
    adapted = started(name)
    ll.finetune(adapted, *tasks, **SHORT | {"steps": 1})
    state = ll.detach(adapted).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@NAMES
def test_saved_and_exported_adapters_come_back(name, started, model, tasks, source, tmp_path):
    adapted, images = started(name), source.test.inputs[:20]
    ll.finetune(adapted, *tasks, **SHORT)
    ll.save(adapted, tmp_path / "saved")
    again = ll.load(model, tmp_path / "saved")
    assert ll.function_error(again, adapted, images) < 1e-5
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    ranks = ll.export(adapted, tmp_path / "exported")["rank"]
    assert (ranks <= (8 if adapted.attachment.starts or name == "eva" else 4)).all()
    assert ll.function_error(ll.load(model, tmp_path / "exported"), adapted, images) < 1e-5
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True


def test_pissa_trains_what_the_first_window_trains(started, model, spectra, tasks):
    peft, window = started("pissa"), ll.attach(model, ll.Window.first(4), targets=SOME, spectra=spectra)
    for name, layer in lora_layers(window).items():
        assert torch.allclose(product(layer), product(lora_layers(peft)[name]), atol=1e-5)
    runs = [ll.finetune(adapted, *tasks, **SHORT | {"lr": 1e-3}) for adapted in (peft, window)]
    pd.testing.assert_frame_equal(runs[0].curve, runs[1].curve, atol=0.021, rtol=1e-3)
    tables = [ll.forgetting.drift(adapted, spectra) for adapted in (peft, window)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-2, atol=1e-3)


def test_what_is_trained_and_from_where(started):
    for name in PEFT_STARTS:
        adapted = started(name)
        layers = lora_layers(adapted)
        ranks = [layer.r["default"] for layer in layers.values()]
        assert sum(ranks) == 8 * 4 and (max(ranks) <= 8 if name == "eva" else set(ranks) == {4})
        for layer_name, layer in layers.items():
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            assert a.requires_grad and b.requires_grad == (name != "mica")
            assert bool(b.any()) == (name != "eva") and bool(a.any()) == (name != "mica")
            residual = layer.get_base_layer().weight
            taken_out = layer_name in adapted.attachment.starts
            assert taken_out == (name in ("pissa", "olora", "corda", "lora_ga"))
            assert not residual.requires_grad
        assert adapted.attachment.method == f"PEFT's {name} of rank 4"


def test_olora_starts_from_qr_and_mica_from_the_last_left_vectors(started, model, spectra):
    olora, mica = lora_layers(started("olora")), lora_layers(started("mica"))
    for name in olora:
        q, r = torch.linalg.qr(model.get_submodule(name).weight.detach())
        assert torch.allclose(product(olora[name]).float(), q[:, :4] @ r[:4], atol=1e-5)
        left, _ = spectra[name].vectors(ll.Window.last(4))
        b = mica[name].lora_B["default"].weight.detach()
        assert torch.allclose(b @ b.T, left @ left.T, atol=1e-4)


def test_eva_s_rows_span_the_principal_components_of_the_inputs(model, source, digits):
    name = "blocks.0.mlp.fc1"
    task = digits.first(64, 10)
    adapted = ll.attach(model, PeftMethod("eva", 4), task=task, targets=name)
    given = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, x: given.append(x[0]))
    with torch.no_grad():
        model.eval()(task.train.inputs)
    handle.remove()
    x = given[0].flatten(0, -2)
    expected = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    a = lora_layers(adapted)[name].lora_A["default"].weight.detach()
    assert torch.linalg.svdvals(a @ expected.T).min() > 0.99


def test_corda_keeps_what_the_retained_inputs_use_most(started, model, tasks):
    """Along the components that corda trains, the retained inputs are weaker than along PiSSA's."""
    name = "blocks.0.mlp.fc1"
    given = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, x: given.append(x[0]))
    with torch.no_grad():
        model.eval()(tasks[1].train.inputs)
    handle.remove()
    x = given[0].flatten(0, -2).double()
    carried = {n: torch.linalg.norm(product(lora_layers(started(n))[name]) @ x.T) for n in ("corda", "pissa")}
    assert carried["corda"] < 0.1 * carried["pissa"]


def test_lora_ga_s_a_lies_in_the_first_directions_of_the_real_gradient(started, model, tasks):
    name, task = "blocks.5.mlp.fc1", tasks[0]
    own = copy.deepcopy(model).eval()
    head = fresh_head(own.head.in_features, len(task.classes), seed=3)
    with features_of(own.head) as features:
        own(task.train.inputs)
        nn.functional.cross_entropy(head(features[0]), task.train.labels).backward()
    first = torch.linalg.svd(own.get_submodule(name).weight.grad)[2][:4]
    a = lora_layers(started("lora_ga"))[name].lora_A["default"].weight.detach()
    assert torch.linalg.svdvals(a @ first.T).min() > 0.95


def test_the_seed_is_all_that_decides(model, tasks):
    def weights(name: str, seed: int) -> list[torch.Tensor]:
        adapted = ll.attach(
            model, PeftMethod(name, 4), task=tasks[0], retain=tasks[1], targets="blocks.0.mlp.*", seed=seed
        )
        return [p for p in adapted.parameters() if p.requires_grad]

    for name in ("orthogonal", "eva", "lora_ga"):
        torch.manual_seed(11)
        first = weights(name, 0)
        state = torch.get_rng_state()
        again = weights(name, 0)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), name
        assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(weights("orthogonal", 0)[0], weights("orthogonal", 1)[0])


def test_the_model_that_was_given_is_left_as_it_was(model, tasks):
    before = copy.deepcopy(model.state_dict())
    own = copy.deepcopy(model).train()
    for name in ("olora", "corda", "lora_ga", "eva"):
        ll.attach(own, PeftMethod(name, 4), task=tasks[0], retain=tasks[1], targets="blocks.0.mlp.*")
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert own.state_dict().keys() == before.keys()
    assert all(m.training for m in own.modules()) and all(p.requires_grad for p in own.parameters())
    assert all(p.grad is None for p in own.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


def test_a_summary_of_a_start_has_no_components(started):
    table = ll.summary(started("olora"))
    assert table[["first", "last", "energy"]].isna().all(axis=None)
    assert (table["start_error"] < 1e-6).all()
    assert (ll.summary(started("pissa"))["last"] == 3).all()


def test_bad_starts_are_refused_with_their_reason(model, tasks):
    with pytest.raises(ValueError, match=r"'pissa', 'olora', 'orthogonal', .*, 'lora_ga', not 'milora'"):
        PeftMethod("milora", 4)
    with pytest.raises(ValueError, match="orthogonal start needs an even rank, not 5"):
        PeftMethod("orthogonal", 5)
    with pytest.raises(ValueError, match=r"rank 100 does not fit blocks\.0\.attn\.qkv"):
        planned(model, PeftMethod("mica", 100))
    with pytest.raises(ValueError, match=r"lora_ga of rank 49 does not fit .* rank of at most 48"):
        planned(model, PeftMethod("lora_ga", 49))
    with pytest.raises(ValueError, match=r"eva of rank 25 does not fit .* rank of at most 24"):
        planned(model, PeftMethod("eva", 25))
    with pytest.raises(ValueError, match="takes no variant, not dora"):
        planned(model, PeftMethod("pissa", 4), variant=ll.Variant(dora=True))
    for name, missing in (("eva", "task"), ("lora_ga", "task"), ("corda", "retain")):
        with pytest.raises(ValueError, match=f"made from data: give attach {missing}="):
            ll.attach(model, PeftMethod(name, 4))
    adapted = ll.attach(model, PeftMethod("orthogonal", 4), targets="blocks.0.mlp.fc1")
    with pytest.raises(ValueError, match="adapted already"):
        ll.attach(adapted, PeftMethod("pissa", 4))


class TwoLayers(nn.Module):
    """One vector per example, as a target a layer that is never called, and a Conv1D."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare, self.head = nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.turned = Conv1D(12, 16)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)) + self.turned(x))


@pytest.fixture
def vectors() -> ll.Task:
    torch.manual_seed(0)
    examples = ll.Examples(torch.randn(40, 16), torch.arange(40) % 3)
    return ll.Task("vectors", ("a", "b", "c"), examples, examples)


@NAMES
def test_models_without_tokens_work_too(name, vectors):
    model = TwoLayers()
    adapted = ll.attach(model, PeftMethod(name, 4), task=vectors, retain=vectors, targets="body")
    assert ll.function_error(adapted, model, vectors.test.inputs) < 1e-5
    ll.finetune(adapted, vectors, vectors, **SHORT)
    assert ll.function_error(adapted, model, vectors.test.inputs) > 1e-4


def test_layers_that_do_not_fit_are_named(vectors):
    model = TwoLayers()
    for name in ("eva", "corda", "lora_ga"):
        with pytest.raises(ValueError, match="needs the inputs of spare, and the model makes its output"):
            ll.attach(model, PeftMethod(name, 2), task=vectors, retain=vectors, targets=["body", "spare"])
    with pytest.raises(ValueError, match="does not fit turned, a Conv1D"):
        ll.attach(model, PeftMethod("olora", 4), targets="turned")
    with pytest.raises(ValueError, match="head takes no part in the new task's loss"):
        ll.attach(model, PeftMethod("lora_ga", 1), task=vectors, retain=vectors, targets="head")
    with pytest.raises(ValueError, match="batches with at least 16 inputs for each layer; body gets 10"):
        ll.attach(model, PeftMethod("eva", 4), task=vectors.first(10, 10), targets="body")
    assert list(target_layers(model)) == ["body", "spare", "turned"]


def test_without_attrs_only_corda_is_refused(monkeypatch, model, source):
    monkeypatch.setitem(sys.modules, "attr", None)
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.corda", raising=False)
    with pytest.raises(ll.errors.MissingPackageError, match=r"PEFT's corda needs .*: attrs"):
        ll.attach(model, ll.PeftMethod("corda", 4), retain=source.subset(train=20))
    ll.attach(model, ll.PeftMethod("pissa", 4))
