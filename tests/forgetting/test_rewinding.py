from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout, suppress
from dataclasses import replace

import pandas as pd
import pytest
import torch
from explored import narrow_vit
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from small_language import byte_tokenizer, part_of, small
from torch import nn

import lora_lens as ll

F = ll.forgetting
PATHS = [F.WholeUpdate(), F.MostMoved(3), F.FirstComponents(4), F.SmallValues(2), F.Intruders(5, 0.7)]
METHODS = [ll.Window(rank=4, start=0), ll.Window(rank=4, position=0.5), ll.LoRA(4)]


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return narrow_vit(0)


@pytest.fixture(scope="module")
def tasks(digits, source) -> tuple[ll.Task, ll.Task]:
    return digits.first(64, 40), source.first(64, 40)


def moved(model: nn.Module, method: object, size: float = 0.05, **options: object) -> nn.Module:
    """An adapted model with random steps in place of training."""
    adapted = ll.attach(model, method, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return adapted


def weights_of(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """The merged weights, float64."""
    merged = copy.deepcopy(adapted).double().merge_and_unload()
    return {name: p.detach() for name, p in merged.named_parameters()}


def head_of(task: ll.Task, features: int = 32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(features, len(task.classes))


def rewound(adapted: nn.Module, tasks: tuple[ll.Task, ll.Task], **options: object) -> F.Rewound:
    options = {"t": [0, 0.5, 1], "readout": head_of(tasks[0]), "progress": False, **options}
    return ll.rewind(adapted, *tasks, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_ends_are_the_pretrained_and_the_trained_model(narrow, tasks, method):
    adapted = moved(narrow, method)
    back = rewound(adapted, tasks)
    images = tasks[0].test.inputs
    with torch.no_grad():
        trained = adapted(images)
        with back.at(0) as there:
            start = there(images)
        with back.at(1) as there:
            assert torch.equal(there(images), trained)  # bit for bit
    if isinstance(method, ll.LoRA):
        assert torch.equal(start, narrow(images))  # also bit for bit: its base is the pretrained model
    else:
        # The residual is rounded once, when it is attached; the way back adds nothing to that.
        assert torch.equal(start, ll.attach(narrow, method)(images))
        assert ll.function_error(ll.attach(narrow, method), narrow, images) < 1e-5
    first, last = back.table.iloc[0], back.table.iloc[-1]
    assert first["forgetting"] == first["update"] == 0 and last["update"] == 1
    assert first["retained_accuracy"] == ll.evaluate(narrow, tasks[1]).accuracy
    assert last["retained_loss"] == ll.evaluate(adapted, tasks[1]).loss


@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_every_path_is_the_formula_applied_to_the_weights(narrow, tasks, method):
    adapted = moved(narrow, method, 0.1)
    back = rewound(adapted, tasks, paths=PATHS)
    pretrained = {name: p.detach().double() for name, p in narrow.named_parameters()}
    trained = weights_of(adapted)
    names = [name for name, w in pretrained.items() if not torch.equal(trained[name].float(), w.float())]
    updates = {name: trained[name] - pretrained[name] for name in names}
    far = sorted(names, key=lambda n: -float(updates[n].norm() / pretrained[n].norm()))[:3]

    def kept(path: object, name: str) -> torch.Tensor:
        w, update = pretrained[name], updates[name]
        if isinstance(path, F.WholeUpdate):
            return torch.zeros_like(update)
        if isinstance(path, F.MostMoved):
            return torch.zeros_like(update) if name in far else update
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        if isinstance(path, F.FirstComponents):
            p, q = u[:, :4] @ u[:, :4].T, v[:4].T @ v[:4]
            return (torch.eye(len(p)) - p) @ update @ (torch.eye(len(q)) - q)
        if isinstance(path, F.SmallValues):
            left, values, right = torch.linalg.svd(update, full_matrices=False)
            return left[:, :2] * values[:2] @ right[:2]
        left, values, right = torch.linalg.svd(trained[name], full_matrices=False)
        new = [i for i in range(5) if (u.T @ left[:, i]).abs().max() < 0.7]
        return update - left[:, new] * values[new] @ right[new]

    some = False
    for path in PATHS:
        for t in (0, 0.3, 1.2):
            with back.at(t, path) as there:
                now = weights_of(there)
            for name in names:
                expected = pretrained[name] + t * updates[name] + (1 - t) * kept(path, name)
                torch.testing.assert_close(now[name], expected, atol=2e-5, rtol=0)
                some |= isinstance(path, F.Intruders) and not torch.equal(kept(path, name), updates[name])
    assert some  # there were intruders to scale


def test_intruders_are_reduced_as_by_pefts_function(narrow, tasks, tmp_path):
    adapted = moved(narrow, ll.LoRA(4), 0.2)
    images, folder = tasks[0].test.inputs, tmp_path / "reduced"
    for strength, count, threshold in ((0.75, 10, 0.5), (0.2, 3, 0.8)):
        path = F.Intruders(count, threshold)
        back = rewound(adapted, tasks, paths=path, t=[strength])
        back.export(folder, strength, path, rank=4)
        ours = PeftModel.from_pretrained(copy.deepcopy(narrow), folder)
        theirs = copy.deepcopy(adapted)
        said = io.StringIO()
        settings = {"top_k": count, "threshold_epsilon": threshold, "mitigation_lambda": strength}
        with redirect_stdout(said):
            reduce_intruder_dimension(theirs, **settings)
        assert "Intruders: " in said.getvalue()
        assert ll.function_error(ours, theirs, images) < 1e-5
        assert ll.function_error(ours, adapted, images) > 1e-2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_exported_point_is_a_plain_adapter_with_the_same_answers(narrow, tasks, method, tmp_path):
    paths = PATHS if method is METHODS[1] else [PATHS[0], PATHS[-1]]
    back = rewound(moved(narrow, method), tasks, paths=paths)
    images = tasks[0].test.inputs
    for path in paths:
        written = back.export(tmp_path / "point", 0.4, path)
        plain = PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "point")
        with back.at(0.4, path) as there:
            assert ll.function_error(plain, there, images) < 1e-5
            assert ll.function_error(ll.load(narrow, tmp_path / "point"), there, images) < 1e-5
            ll.export(there, tmp_path / "by hand")  # other calls know the model at a point, too
        again = PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "by hand")
        assert ll.function_error(again, plain, images) < 1e-5
        assert written["rank"].max() <= 16
    best = back.best()
    back.export(tmp_path / "best")
    with back.at(best) as there:
        plain = PeftModel.from_pretrained(copy.deepcopy(narrow), tmp_path / "best")
        assert ll.function_error(plain, there, images) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_and_their_trained_embeddings_go_back(kind, tmp_path):
    model, corpus = small(kind), part_of("movies", 8, 8)
    task = ll.tasks.label_word_task(corpus, byte_tokenizer())
    retain = ll.tasks.language_task(corpus, byte_tokenizer(), block=16)
    name = {"gpt2": "transformer.ln_f", "llama": "model.norm"}[kind]
    adapted = moved(model, ll.Window(rank=4, start=0), 0.1, modules_to_save=[name])
    back = ll.rewind(adapted, task, retain, t=[0, 1], progress=False)
    batch = task.test.batch(torch.arange(4))
    with back.at(0) as there:
        assert ll.function_error(there, model, batch) < 1e-5
    whole = adapted.get_base_model().get_submodule(name)
    with back.at(0.5):
        half = whole.modules_to_save["default"].weight.clone()
    assert torch.allclose(half, (whole.modules_to_save["default"].weight + whole.original_module.weight) / 2)
    assert not torch.allclose(half, whole.original_module.weight)
    back.export(tmp_path / "half", 0.5)
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "half")
    with back.at(0.5) as there:
        assert ll.function_error(plain, there, batch) < 1e-5
    assert back.table["loss_rise"].iloc[0] == 0 and back.table["loss_rise"].iloc[1] != 0
    assert back.best(score="loss_rise").t in (0, 1)


def test_convolutions_go_back(patch_vit, tasks):
    adapted = moved(patch_vit, ll.Window.middle(4), targets=["patch_embed.proj", "mlp.fc1"])
    back = rewound(adapted, tasks, paths=[F.WholeUpdate(), F.FirstComponents(2)])
    images = tasks[0].test.inputs
    with back.at(0) as there:
        assert ll.function_error(there, patch_vit, images) < 1e-5
    with back.at(0.5, F.FirstComponents(2)) as there:
        assert ll.function_error(there, patch_vit, images) > 1e-3


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("how", ["rewind", "at", "finished"])
def test_the_model_is_left_as_it_was_found_whatever_happens(narrow, tasks, how):
    adapted = moved(narrow, METHODS[0]).train()
    before = {name: (p, p.clone(), p.requires_grad) for name, p in adapted.named_parameters()}
    modes = [module.training for module in adapted.modules()]
    if how == "finished":
        rewound(adapted, tasks, paths=PATHS)
    elif how == "at":
        with suppress(Stop), rewound(adapted, tasks).at(0.3):
            raise Stop
    else:
        calls = []

        def interrupt(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise Stop

        handle = adapted.get_base_model().blocks[1].register_forward_hook(interrupt)
        with pytest.raises(Stop):
            rewound(adapted, tasks)
        handle.remove()
        assert len(calls) == 3
    after = dict(adapted.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, values, trainable) in before.items():
        assert after[name] is parameter and torch.equal(parameter, values)
        assert parameter.requires_grad == trainable
    assert [module.training for module in adapted.modules()] == modes


def test_the_base_is_neither_copied_nor_written(narrow, tasks):
    adapted = moved(narrow, METHODS[0])
    bases = [p for name, p in adapted.named_parameters() if "base_layer" in name]
    places = [(p.data_ptr(), p._version) for p in bases]
    back = rewound(adapted, tasks)
    with back.at(0.5) as there:
        now = [p for name, p in there.named_parameters() if "base_layer" in name]
        assert [(p.data_ptr(), p._version) for p in now] == places
        factors = sum(p.numel() for name, p in there.named_parameters() if "lora_" in name)
    assert factors == 2 * sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)


def test_points_are_found_by_weight_by_accuracy_and_by_search(narrow, tasks):
    back = rewound(moved(narrow, METHODS[0]), tasks, paths=PATHS[:2], t=[0, 1, 0.5, 0.5])
    assert back.table["t"].tolist() == [0, 0.5, 1] * 2
    made_up = back.table.assign(
        accuracy=[0.1, 0.6, 0.8, 0.2, 0.8, 0.8], forgetting=[0, 0.1, 0.4, 0, 0.3, 0.4]
    )
    back = replace(back, table=made_up)
    assert (back.best().path, back.best().t, back.best().accuracy) == (PATHS[0], 0.5, 0.6)
    assert back.best(0.0).t == 1 and back.best(0.0).path == PATHS[0]  # equal: the farther t, the first path
    assert back.best(10).t == 0
    assert (back.best(accuracy=0.7).path, back.best(accuracy=0.7).forgetting) == (PATHS[1], 0.3)
    assert back.best(path=PATHS[1]).t == 0.5 and "t = 0.5" in repr(back)
    with pytest.raises(ValueError, match=r"no point has an accuracy of 0.9; the largest is 0.8"):
        back.best(accuracy=0.9)
    with pytest.raises(ValueError, match="was not measured; there are whole update"):
        back.best(path=F.SmallValues(1))
    searched = rewound(moved(narrow, METHODS[0]), tasks, t=[0, 1], refine=3)
    values = searched.table["accuracy"] - searched.table["forgetting"]
    assert len(values) == 5 and values.max() >= values.iloc[[0, -1]].max()
    pd.testing.assert_series_equal(
        searched.table["update"], searched.table["t"], check_names=False, check_exact=False
    )


def test_some_layers_alone_go_back(narrow, tasks):
    adapted = moved(narrow, METHODS[1])
    paths = [F.WholeUpdate("blocks.0.mlp.fc1"), F.WholeUpdate(["mlp.fc1", "mlp.fc2"])]
    back = rewound(adapted, tasks, paths=paths)
    with back.at(0, paths[0]) as there:
        now = weights_of(there)
    trained, pretrained = weights_of(adapted), dict(narrow.named_parameters())
    for name, weight in now.items():
        expected = pretrained[name].double() if name == "blocks.0.mlp.fc1.weight" else trained[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no adapted layer is called 'fc9'"):
        rewound(adapted, tasks, paths=F.WholeUpdate("fc9"))


def disabled(adapted: nn.Module) -> nn.Module:
    adapted.disable_adapter_layers()
    return adapted


def with_nan(adapted: nn.Module) -> nn.Module:
    next(p for p in adapted.parameters() if p.requires_grad).data[0, 0] = float("nan")
    return adapted


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.fc(x.flatten(1))))


def with_moved_norms() -> nn.Module:
    adapted = ll.attach(Normed(), ll.Window.first(2), targets="fc").train()
    adapted(torch.randn(8, 1, 28, 28))
    return adapted


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda m: m, {}, "expected a model from ll.attach"),
        (lambda m: disabled(moved(m, METHODS[0])), {}, "is disabled: call enable_adapter_layers"),
        (lambda m: with_nan(moved(m, METHODS[0])), {}, "holds NaN or infinite values"),
        (lambda m: moved(m, METHODS[0], variant=ll.Variant(dora=True)), {}, "has DoRA"),
        (lambda m: with_moved_norms(), {"readout": head_of}, "training moved norm.running_mean"),
        (
            lambda m: moved(m, METHODS[0]),
            {"readout": None},
            "pass readout=run.head, or readout=task.own_read",
        ),
        (lambda m: moved(m, METHODS[0]), {"readout": nn.Linear(32, 3)}, "has 10 classes, and the head has 3"),
        (lambda m: moved(m, METHODS[0]), {"readout": nn.Linear(64, 10)}, r"reads 64 features.*gives 32"),
        (lambda m: moved(m, METHODS[0]), {"t": []}, "t is empty"),
        (lambda m: moved(m, METHODS[0]), {"t": [0, 1.3]}, r"each of t must be in \[0, 1.2\], not 1.3"),
        (lambda m: moved(m, METHODS[0]), {"t": -0.1}, r"each of t must be in \[0, 1.2\], not -0.1"),
        (lambda m: moved(m, METHODS[0]), {"paths": []}, "at least one way back"),
        (lambda m: moved(m, METHODS[0]), {"paths": [PATHS[0]] * 2}, "none of them twice"),
        (lambda m: moved(m, METHODS[0]), {"paths": F.WholeUpdate}, "must be one such as"),
        (lambda m: moved(m, METHODS[0]), {"paths": F.MostMoved(99)}, "count must be at most 8, the adapted"),
        (lambda m: moved(m, METHODS[0]), {"paths": F.FirstComponents(99)}, "rank 99 does not fit"),
        (lambda m: moved(m, METHODS[2]), {"paths": F.SmallValues(4)}, "keep must be below 4, the rank"),
        (
            lambda m: moved(m, METHODS[0]),
            {"paths": F.FirstComponents(4), "spectra": ll.spectra(narrow_vit(1), progress=False)},
            "is not that of",
        ),
    ],
)
def test_what_cannot_be_rewound_is_refused_in_words(narrow, tasks, make, options, words):
    if options.get("readout") is head_of:
        options = {"readout": head_of(tasks[0], 16)}
    with pytest.raises(ValueError, match=words):
        rewound(make(narrow), tasks, **options)


def test_a_merged_model_and_a_missing_task_are_refused(narrow, tasks):
    adapted = moved(narrow, METHODS[0])
    back = rewound(adapted, tasks)
    with pytest.raises(TypeError, match="retain must be a task"):
        ll.rewind(adapted, tasks[0], None)
    with pytest.raises(TypeError, match="readout must be the trained head"):
        rewound(adapted, tasks, readout=nn.ReLU())
    with pytest.raises(ValueError, match="t must be in"), back.at(2):
        pass
    with pytest.raises(TypeError, match=r"path must be one such as .* not 'whole update'"):
        back.best(path="whole update")
    others = ll.tasks.agreement(narrow_vit(1), tasks[1].test.inputs)
    with pytest.raises(ValueError, match=r"the pretrained model gives only .* another model's"):
        rewound(adapted, (tasks[0], others))
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="is merged into its base"):
        rewound(adapted, tasks)
    with pytest.raises(ValueError, match="is merged into its base"), back.at(0.5):
        pass


def test_the_head_of_the_model_itself_is_the_readout_where_it_was_trained(narrow, tasks):
    adapted = moved(narrow, METHODS[0], modules_to_save=["head"])
    back = ll.rewind(adapted, *tasks, t=[0, 1], progress=False)
    assert back.table["accuracy"].iloc[0] == ll.evaluate(narrow, tasks[0]).accuracy
    assert back.table["accuracy"].iloc[1] == ll.evaluate(adapted, tasks[0]).accuracy
